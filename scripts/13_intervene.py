"""Remove, keep or scale concepts, and measure the probe's accuracy before, after, and after a refit."""

from dncbm.cli import main

if __name__ == "__main__":
    main("intervene")
