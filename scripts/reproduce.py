"""Plan and run the paper's experiment, or a sweep: every stage, for encoders, data sets, settings and seeds."""

from dncbm.cli import main

if __name__ == "__main__":
    main("reproduce")
