"""Draw meta clusters with their images and concepts, as vis_meta_clustering_dump.py computed them."""

from dncbm.cli import main

if __name__ == "__main__":
    main("meta_clusters_plot")
