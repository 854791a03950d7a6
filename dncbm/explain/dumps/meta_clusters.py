"""Meta clusters (METHOD section 5): groups of images with similar concept strengths, and the concepts that set them apart.

Arrays of `numbers.npz`, with one row per cluster of at least MIN_IMAGES images, by falling strength of its leading concept:

- `cluster`, `size`: its number, and its number of images.
- `concepts`, `strengths`: the N_CONCEPTS latents of largest mean-centred strength; -1 fills a row that has fewer.
- `images`: indices of N_IMAGES of its images, drawn at random.
- `class_number`, `class_share`: its most frequent class, and the share of its images in that class.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dncbm.concepts.naming import NAMES
from dncbm.concepts.sae import SAE
from dncbm.concepts.strengths import STRENGTHS, ConceptStrengths
from dncbm.explain.dumps.dump import (
    Array,
    Arrays,
    Dump,
    Integers,
    Kind,
    Plan,
    checked,
    counted,
    dump_stage,
    images_of,
    listed,
    narrowed,
    real,
    sources_of,
    whole,
)
from dncbm.explain.explanations import MAX_ITERATIONS, Clustering, kmeans, leading, mean_centred, mean_strengths
from dncbm.features.stage import probe_class_names
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts, ExplanationFolder
from dncbm.runs.declarations import Clusters, Explained, ProbeDataset, SAERun, Selection
from dncbm.runs.errors import UserError, first_line
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
        raise UserError(f"--n_clusters {n_clusters} is more than the {counted(n_images, 'images')}: ask for fewer")
    kept, state = files.cluster_labels, files.cluster_state
    if overwrite:  # what cannot be read counts as absent
        for path, read in ((kept, _load_labels), (state, _load_state)):
            try:
                read(path, strengths, n_clusters)
            except UserError:
                path.unlink(missing_ok=True)
    settled = {"n_clusters": n_clusters, "seed": seed}
    inputs = {"strengths": made_from}
    with making(files.clustering, f"{KIND.name}_dump", settled, inputs, overwrite=overwrite, scratch=[state]) as work:
        if work.needed:
            begun = _load_state(state, strengths, n_clusters) if state.is_file() else None
            first = begun.iterations if begun else 0
            with tqdm(desc=f"K-means, k {n_clusters}", total=MAX_ITERATIONS, initial=first, unit="iteration") as bar:

                def report(now: Clustering) -> None:
                    bar.update(now.iterations - bar.n)
                    bar.set_postfix(inertia=f"{now.inertia:.4g}")
                    with whole_file(state) as temporary:
                        np.savez(temporary, **{key: value for key, value in vars(now).items() if key != "ended"})

                with warnings.catch_warnings():
                    # Of images that are alike; that there are fewer clusters is seen in the result.
                    warnings.filterwarnings("ignore", "Number of distinct clusters")
                    ended = kmeans(strengths.matrix, n_clusters, seed, begun=begun, on_progress=report)
            with whole_file(kept) as temporary:
                np.save(temporary, ended.labels)
            work.done([kept], iterations=ended.iterations, inertia=ended.inertia)
    return _load_labels(kept, strengths, n_clusters)


def _load_labels(path: Path, strengths: ConceptStrengths, n_clusters: int) -> Integers:
    try:
        return checked({"labels": np.load(path, allow_pickle=False)}, _labels(strengths, n_clusters))["labels"]
    except Exception as error:  # damaged files raise anything
        raise _unreadable(path, error) from error


def _load_state(path: Path, strengths: ConceptStrengths, n_clusters: int) -> Clustering:
    width = strengths.matrix.shape[1]
    expected = _labels(strengths, n_clusters) | {"centres": real(width=width, length=n_clusters)}
    try:
        with np.load(path, allow_pickle=False) as file:
            found = checked(dict(file), expected)
        iterations, inertia = int(found["iterations"]), float(found["inertia"])
        if not 0 <= iterations < MAX_ITERATIONS:
            raise ValueError(f"{iterations} iterations")
    except Exception as error:
        raise _unreadable(path, error) from error
    return Clustering(found["centres"], found["labels"], iterations, inertia, False)


def _labels(strengths: ConceptStrengths, n_clusters: int) -> dict[str, Array]:
    return {"labels": whole(n_clusters, length=strengths.matrix.shape[0])}


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"cannot read {path} ({type(error).__name__}: {first_line(error)}): remove it, or make it again with "
        f"{DUMP.command('--overwrite')} and the same flags"
    )


def plan(settings: Settings, run: SAERun, images: ProbeDataset, explained: Explained, clusters: Clusters) -> Plan:
    """How the images of a split are clustered. K-means has the SAE's seed. Raises UserError if an input is missing."""
    artifacts, dataset, split, seed = Artifacts(settings), images.dataset, explained.split, run.training.seed
    sources = sources_of(settings, run, dataset, split)
    about = sources.about_classes()
    n_clusters = n_clusters_of(settings, images, clusters)

    def compute(overwrite: bool) -> Arrays:
        strengths = sources.strengths()
        if (n_images := len(strengths.keys)) < MIN_IMAGES:
            few = counted(n_images, "images")
            raise UserError(f"the {split} split of {dataset} has {few}; clusters of at least {MIN_IMAGES} are shown")
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


def arrays(about: Mapping[str, Any]) -> dict[str, Array]:
    """What the arrays must be."""
    return {
        "cluster": whole(), "size": whole(), "concepts": whole(len(about["labels"]), width=N_CONCEPTS, filled=True),
        "strengths": real(width=N_CONCEPTS), "images": whole(width=N_IMAGES), "class_share": real(),
        "class_number": whole(len(about["classes"])),
    }  # fmt: skip


def select(dump: Dump, selection: Selection) -> list[int]:
    """Numbers of clusters. A class chooses those where it is the most frequent, a concept those where it is shown."""
    what = f"cluster of at least {MIN_IMAGES} images with the number"
    return narrowed(dump, selection, "cluster", what, dump.numbers["class_number"], dump.numbers["concepts"])


def page(dump: Dump, clusters: Sequence[int]) -> Page:
    """A figure of some clusters."""
    members = tuple(_cluster(dump, cluster) for cluster in clusters)
    name = "clusters_" + "_".join(str(member.number) for member in members)
    leading = ([label for label, _ in member.concepts[:2]] or ["no concept"] for member in members)
    title = "; ".join(f"{member.number}: {', '.join(labels)}" for member, labels in zip(members, leading, strict=True))
    return Page(name, title, members)


def _cluster(dump: Dump, cluster: int) -> Cluster:
    of = dump.row("cluster", cluster)
    class_name, concepts = dump.about["classes"][of["class_number"]], dump.labelled(of["concepts"], of["strengths"])
    return Cluster(cluster, of["size"], class_name, of["class_share"], concepts, dump.images(of["images"]))


def describe(page: Page) -> str:
    """The figure in words."""
    return " ".join(
        f"Cluster {one.number}, {counted(one.size, 'images')}, {one.class_share:.0%} of them {one.class_name}. Mean-centred "
        f"strengths: {listed(one.concepts)}."
        for one in page.clusters
    )


KIND = Kind(
    name=commands.META_CLUSTERS.name, things="clusters", takes=commands.META_CLUSTERS.takes, per_figure=3,
    files=lambda artifacts, run, images, explained, clusters, *_: artifacts.meta_clusters(
        run, images.dataset, explained.split, n_clusters_of(artifacts.settings, images, clusters)
    ),
    plan=plan, arrays=arrays, select=select, images=partial(images_of, "cluster"), page=page, describe=describe,
)  # fmt: skip
DUMP = dump_stage(KIND, commands.META_CLUSTERS.script, commands.META_CLUSTERS.dump_summary, (STRENGTHS, NAMES), SAE)
