"""Compare all SAEs: settings, L0, explained variance, names and accuracies as a table, a CSV file and a figure."""

from dncbm.cli import main

if __name__ == "__main__":
    main("compare_runs")
