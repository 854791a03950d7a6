"""Draw meta clusters with their images and concepts, as vis_meta_clustering_dump.py computed them."""

from dncbm import arguments
from dncbm.artifacts import Artifacts
from dncbm.dumps import meta_clusters
from dncbm.plotting.meta_clusters import draw
from dncbm.plotting.pages import plot


def main() -> None:
    settings, args = arguments.parse(
        __doc__,
        arguments.explained,
        arguments.clusters,
        arguments.selection("clusters", "classes", "concepts"),
        arguments.drawing,
    )
    n_clusters = args.n_clusters or meta_clusters.PAPER_CLUSTERS.get(args.probe_dataset, 0)
    wanted = Artifacts(settings).meta_clusters(
        arguments.sae_from(args), args.probe_dataset, args.probe_split, n_clusters
    )
    folder = arguments.computed(settings, wanted, "vis_meta_clustering_dump.py", last="n_clusters")
    plot(settings, folder, meta_clusters, draw, arguments.selection_from(args), arguments.drawing_from(args))


if __name__ == "__main__":
    arguments.run(main)
