"""Draw classes with the concepts that lead them."""

from dncbm.cli import main

if __name__ == "__main__":
    main("global_explanations_plot")
