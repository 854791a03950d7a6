"""Meta clusters (METHOD section 5): groups of images with similar concept strengths, and the concepts that set them apart.

Arrays of `numbers.npz`, with one row per cluster of at least MIN_IMAGES images, by falling strength of its leading concept:

- `cluster`, `size`: its number, and its number of images.
- `concepts`, `strengths`: the N_CONCEPTS latents of largest mean-centred strength; -1 fills a row that has fewer.
- `images`: indices of N_IMAGES of its images, drawn at random.
- `class_number`, `class_share`: its most frequent class, and the share of its images in that class.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dncbm.concepts.naming import NAMES
from dncbm.concepts.sae import SAE
from dncbm.concepts.strengths import STRENGTHS, ConceptStrengths
from dncbm.explain.dumps.dump import Arrays, Dump, Integers, Kind, Plan, dump_stage, images_of, narrowed, sources_of
from dncbm.explain.explanations import MAX_ITERATIONS, Clustering, kmeans, leading, mean_centred, mean_strengths
from dncbm.features.stage import probe_class_names
from dncbm.runs.artifacts import Artifacts, ExplanationFolder
from dncbm.runs.declarations import Clusters, Explained, ProbeDataset, SAERun, Selection
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import making
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import values
from sparse_autoencoder.files import whole_file

PAPER_CLUSTERS = {"imagenet": 1300, "places365": 500, "cifar10": 20}
"""k of the paper, which gives none for CIFAR100."""
CLUSTERS_PER_CLASS = 2
"""For other data sets; CIFAR10's k in the paper is twice its number of classes too."""
MIN_IMAGES = N_IMAGES = 9
N_CONCEPTS = 6


@dataclass(frozen=True)
class Cluster:
    """A cluster in a figure."""

    number: int
    size: int
    class_name: str
    """The most frequent class of its images."""
    class_share: float
    """The share of its images in that class."""
    concepts: tuple[tuple[str, float], ...]
    """Label and mean-centred strength, the strongest first."""
    images: tuple[Path, ...]


@dataclass(frozen=True)
class Page:
    """A figure."""

    name: str
    title: str
    clusters: tuple[Cluster, ...]


def n_clusters_of(settings: Settings, images: ProbeDataset, clusters: Clusters) -> int:
    """k: the one asked for, else the paper's, else CLUSTERS_PER_CLASS; 0 while stage 5 has not made the split."""
    if k := clusters.n_clusters or PAPER_CLUSTERS.get(images.dataset):
        return k
    known = Artifacts(settings).probe_split(images.dataset).is_file()
    return CLUSTERS_PER_CLASS * len(probe_class_names(settings, images.dataset)) if known else 0


def cluster_images(
    files: ExplanationFolder, strengths: ConceptStrengths, n_clusters: int, seed: int, made_from: Path, overwrite: bool
) -> Integers:
    """The cluster of each of N images, kept in `files` for the next run on the same strengths. An interrupted run resumes.

    `made_from` is the folder of the strengths; `overwrite` replaces a clustering of other strengths.

    Raises UserError if there are fewer images than clusters; StaleArtifact if there is a clustering of other strengths and
    `overwrite` is off.
    """
    if n_clusters > (n_images := strengths.matrix.shape[0]):
        raise UserError(f"--n_clusters {n_clusters} is more than the {n_images} images: ask for fewer")
    kept, state = files.cluster_labels, files.cluster_state
    settled = {"n_clusters": n_clusters, "seed": seed}
    with making(files.clustering, "kmeans", settled, {"strengths": made_from}, overwrite=overwrite) as work:
        if work.needed:
            begun = _load_state(state) if state.is_file() else None
            first = begun.iterations if begun else 0
            with tqdm(desc=f"K-means, k {n_clusters}", total=MAX_ITERATIONS, initial=first, unit="iteration") as bar:

                def report(now: Clustering) -> None:
                    bar.update(now.iterations - bar.n)
                    bar.set_postfix(inertia=f"{now.inertia:.4g}")
                    with whole_file(state) as temporary:
                        np.savez(temporary, **{key: value for key, value in vars(now).items() if key != "ended"})

                ended = kmeans(strengths.matrix, n_clusters, seed, begun=begun, on_progress=report)
            with whole_file(kept) as temporary:
                np.save(temporary, ended.labels)
            work.done([kept], iterations=ended.iterations, inertia=ended.inertia)
    state.unlink(missing_ok=True)
    return np.load(kept)


def _load_state(path: Path) -> Clustering:
    with np.load(path) as found:
        return Clustering(found["centres"], found["labels"], int(found["iterations"]), float(found["inertia"]), False)


def plan(settings: Settings, run: SAERun, images: ProbeDataset, explained: Explained, clusters: Clusters) -> Plan:
    """How the images of a split are clustered. K-means has the SAE's seed. Raises UserError if an input is missing."""
    artifacts, dataset, split, seed = Artifacts(settings), images.dataset, explained.split, run.training.seed
    sources = sources_of(settings, run, dataset, split)
    about = sources.about_classes()
    n_clusters = n_clusters_of(settings, images, clusters)

    def compute(overwrite: bool) -> Arrays:
        strengths = sources.strengths()
        files = artifacts.meta_clusters(run, dataset, split, n_clusters)
        made_from = artifacts.strengths(run, dataset, split)
        labels = cluster_images(files, strengths, n_clusters, seed, made_from, overwrite)
        classes = sources.labels(strengths)
        sizes = np.bincount(labels, minlength=n_clusters)
        large = np.flatnonzero(sizes >= MIN_IMAGES)
        if not len(large):
            raise UserError(f"none of the {n_clusters} clusters has {MIN_IMAGES} images: ask for fewer with --n_clusters")
        centred = mean_centred(mean_strengths(strengths.matrix, labels, n_clusters), strengths.matrix)
        outstanding = leading(centred, 1).values[large, 0]
        large = large[np.argsort(-outstanding, kind="stable")]
        top = leading(centred[large], N_CONCEPTS)
        drawn, frequent, shares = [], [], []
        for cluster in large:
            rows = np.flatnonzero(labels == cluster)
            chosen = np.random.default_rng([seed, int(cluster)]).choice(rows, N_IMAGES, replace=False)
            drawn.append(strengths.keys[np.sort(chosen)])
            counts = np.bincount(classes[rows])
            frequent.append(counts.argmax())
            shares.append(counts.max() / len(rows))
        return {
            "cluster": large, "size": sizes[large], "concepts": top.concepts, "strengths": top.values,
            "images": np.array(drawn), "class_number": np.array(frequent), "class_share": np.array(shares),
        }  # fmt: skip

    return Plan(
        inputs=sources.inputs | {"split": artifacts.probe_split(dataset)},
        settings={"n_clusters": n_clusters, "seed": seed}, about=about | {"k": n_clusters}, compute=compute,
        run=values(run) | values(images) | values(explained) | {"n_clusters": n_clusters},
    )  # fmt: skip


def select(dump: Dump, selection: Selection) -> list[int]:
    """Numbers of clusters. A class chooses those where it is the most frequent, a concept those where it is shown."""
    what = f"cluster of at least {MIN_IMAGES} images with the number"
    return narrowed(dump, selection, "cluster", what, dump.numbers["class_number"], dump.numbers["concepts"])


def page(dump: Dump, clusters: Sequence[int]) -> Page:
    """A figure of some clusters."""
    members = tuple(_cluster(dump, cluster) for cluster in clusters)
    name = "clusters_" + "_".join(str(member.number) for member in members)
    title = "; ".join(f"{member.number}: {', '.join(label for label, _ in member.concepts[:2])}" for member in members)
    return Page(name, title, members)


def _cluster(dump: Dump, cluster: int) -> Cluster:
    of = dump.row("cluster", cluster)
    class_name, concepts = dump.about["classes"][of["class_number"]], dump.labelled(of["concepts"], of["strengths"])
    return Cluster(cluster, of["size"], class_name, of["class_share"], concepts, dump.images(of["images"]))


KIND = Kind(
    name="meta_clusters", things="clusters", takes=(SAERun, ProbeDataset, Explained, Clusters), per_figure=3,
    files=lambda artifacts, run, images, explained, clusters, *_: artifacts.meta_clusters(
        run, images.dataset, explained.split, n_clusters_of(artifacts.settings, images, clusters)
    ),
    plan=plan, select=select, images=partial(images_of, "cluster"), page=page,
)  # fmt: skip
SUMMARY = "Cluster the images of a split by their concept strengths."
DUMP = dump_stage(KIND, "vis_meta_clustering", SUMMARY, (STRENGTHS, NAMES), SAE)
