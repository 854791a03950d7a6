"""Export the trained bottleneck as a folder that one line loads, or its SAE for SAELens."""

from dncbm.cli import main

if __name__ == "__main__":
    main("export")
