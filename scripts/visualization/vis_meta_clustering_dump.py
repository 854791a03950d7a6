"""Cluster the images of a split by their concept strengths, for vis_meta_clustering_plot.py to draw."""

from dncbm.cli import main

if __name__ == "__main__":
    main("meta_clusters_dump")
