"""Stage 9: the paper's table, ours beside the published figures; printed, and written as Markdown, CSV and LaTeX."""

from dncbm.cli import main

if __name__ == "__main__":
    main("results_table")
