"""Print the paper's table, with our figures beside the published ones, and write it as Markdown, CSV and LaTeX."""

from dncbm.cli import main

if __name__ == "__main__":
    main("results_table")
