"""Draw images with the concepts that their predictions are made of."""

from dncbm.cli import main

if __name__ == "__main__":
    main("local_explanations_plot")
