"""Draw meta clusters with their images and concepts."""

from dncbm.cli import main

if __name__ == "__main__":
    main("meta_clusters_plot")
