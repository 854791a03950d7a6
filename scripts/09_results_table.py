"""Stage 9: the paper's table, ours beside the published figures; printed, and written as Markdown, CSV and LaTeX."""

from dncbm import arguments, results_table
from dncbm.artifacts import Artifacts


def main() -> None:
    settings, _ = arguments.parse(__doc__)
    print(results_table.results_table(settings))
    for suffix in results_table.FORMATS:
        print(Artifacts(settings).results_table(suffix))


if __name__ == "__main__":
    arguments.run(main)
