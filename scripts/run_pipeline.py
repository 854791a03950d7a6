"""All stages in order. Finished stages are skipped; interrupted ones resume."""

from dncbm.cli import main

if __name__ == "__main__":
    main("pipeline")
