"""Cluster the images of a split by their concept strengths, for vis_meta_clustering_plot.py to draw."""

from dncbm import arguments
from dncbm.dumps import meta_clusters


def main() -> None:
    settings, args = arguments.parse(
        __doc__, arguments.explained, arguments.clusters, arguments.selection("clusters", "classes", "concepts")
    )
    meta_clusters.dump(
        settings,
        arguments.explained_sae(settings, args),
        args.probe_dataset,
        args.probe_split,
        args.n_clusters,
        arguments.selection_from(args),
        overwrite=args.overwrite,
    )


if __name__ == "__main__":
    arguments.run(main)
