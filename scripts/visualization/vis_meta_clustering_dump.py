"""Cluster the images of a split by their concept strengths."""

from dncbm.cli import main

if __name__ == "__main__":
    main("meta_clusters_dump")
