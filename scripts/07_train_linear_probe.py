"""Train and evaluate the sparse linear probe on concept strengths, or with --probe_on_features the baseline."""

from dncbm.cli import main

if __name__ == "__main__":
    main("probe")
