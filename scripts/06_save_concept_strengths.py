"""Compute the concept strengths of the images that the probe classifies."""

from dncbm.cli import main

if __name__ == "__main__":
    main("strengths")
