"""Extract the labels, the split and the features of the images that the probe classifies."""

from dncbm.cli import main

if __name__ == "__main__":
    main("probe_features")
