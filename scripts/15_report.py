"""Write one page about a run: what it supports, with the figures that this rests on."""

from dncbm.cli import main

if __name__ == "__main__":
    main("report")
