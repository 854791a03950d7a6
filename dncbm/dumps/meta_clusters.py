"""Meta clusters (METHOD section 5): groups of images with similar concept strengths, and the concepts that set them apart.

Arrays of `numbers.npz`, a row for each cluster that is large enough, first the one whose leading concept stands out most:

- `cluster`, `size`: its number, and of how many images.
- `concepts`, `strengths`: the N_CONCEPTS latents of largest mean-centred strength; -1 where there are fewer.
- `images`: indices of N_IMAGES of its images, drawn at random.
- `class_number`, `class_share`: its most frequent class.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from dncbm.artifacts import Artifacts, SAERun
from dncbm.concepts import ConceptStrengths
from dncbm.dumps import (
    Computed,
    Dump,
    Integers,
    Selection,
    about_run,
    choose,
    class_texts,
    make_dump,
    narrowed,
    sources_of,
)
from dncbm.errors import UserError
from dncbm.explanations import MAX_ITERATIONS, Clustering, kmeans, leading, mean_centred, mean_strengths
from dncbm.features import probe_class_names
from dncbm.manifests import Outcome, Recipe, begin, fingerprint, finish, whole_file
from dncbm.settings import Settings

PAPER_CLUSTERS = {"imagenet": 1300, "places365": 500, "cifar10": 20}
"""k of the paper; it has none for CIFAR100."""
CLUSTERS_OF_A_CLASS = 2
"""Elsewhere k is twice the number of classes, as it is for CIFAR10."""
MIN_IMAGES = N_IMAGES = 9
N_CONCEPTS = 6
PER_FIGURE = 3
"""Clusters."""


@dataclass(frozen=True)
class Cluster:
    """A cluster in a figure."""

    number: int
    size: int
    class_name: str
    class_share: float
    """Of its images are of this class, the most frequent one."""
    concepts: tuple[tuple[str, float], ...]
    """Label and mean-centred strength, the strongest first."""
    images: tuple[Path, ...]


@dataclass(frozen=True)
class Page:
    """A figure."""

    name: str
    title: str
    clusters: tuple[Cluster, ...]


def default_clusters(settings: Settings, dataset: str) -> int:
    """The paper's k, or CLUSTERS_OF_A_CLASS for each class. Raises UserError if that needs a split that was not made."""
    if dataset in PAPER_CLUSTERS:
        return PAPER_CLUSTERS[dataset]
    return CLUSTERS_OF_A_CLASS * len(probe_class_names(settings, dataset))


def cluster_images(
    folder: Path, strengths: ConceptStrengths, n_clusters: int, seed: int, made_from: str, *, overwrite: bool
) -> Integers:
    """The cluster of each image, from an earlier run of the same strengths, k and seed where there is one.

    An interrupted run goes on from its last iterations.

    Args:
        folder: where it is kept.
        strengths: of the images.
        n_clusters: k.
        seed: of k-means++.
        made_from: fingerprint of the strengths.
        overwrite: replace a clustering of other strengths.

    Raises:
        UserError: there are fewer images than clusters.
        StaleArtifact: there is a clustering of other strengths.
    """
    n_images = strengths.matrix.shape[0]
    if n_clusters > n_images:
        raise UserError(f"--n_clusters {n_clusters} is more than the {n_images} images: ask for fewer")
    kept, state = folder / "labels.npy", folder / "state.npz"
    recipe = Recipe("kmeans", {"n_clusters": n_clusters, "seed": seed}, {"strengths": made_from})
    if begin(folder, recipe, overwrite=overwrite) is Outcome.RAN:
        begun = None
        if state.is_file():
            with np.load(state) as found:
                begun = Clustering(
                    found["centres"], found["labels"], int(found["iterations"]), float(found["inertia"]), False
                )
        first = begun.iterations if begun else 0
        with tqdm(desc=f"K-means, k {n_clusters}", total=MAX_ITERATIONS, initial=first, unit="iteration") as bar:

            def report(now: Clustering) -> None:
                bar.update(now.iterations - bar.n)
                bar.set_postfix(inertia=f"{now.inertia:.4g}")
                with whole_file(state) as temporary:
                    kept_values: dict[str, Any] = {key: value for key, value in vars(now).items() if key != "ended"}
                    np.savez(temporary, **kept_values)

            ended = kmeans(strengths.matrix, n_clusters, seed, begun=begun, on_progress=report)
        with whole_file(kept) as temporary:
            np.save(temporary, ended.labels)
        finish(folder, recipe, [kept], {"iterations": ended.iterations, "inertia": ended.inertia})
        state.unlink(missing_ok=True)
    labels: Integers = np.load(kept)
    return labels


def dump(
    settings: Settings,
    run: SAERun,
    dataset: str,
    split: str,
    n_clusters: int | None = None,
    selection: Selection | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Cluster the images of a split, and gather what is drawn of the clusters.

    Args:
        settings: the config.
        run: the SAE, whose seed is K-means' too.
        dataset: a name of probe_datasets.
        split: of it.
        n_clusters: k; `default_clusters` where it is None.
        selection: which clusters to draw.
        overwrite: replace what was computed from other inputs.

    Returns:
        The dump's folder.

    Raises:
        UserError: no strengths or names; fewer images than clusters; no cluster is large enough.
        StaleArtifact: there is a dump or a clustering from other inputs.
    """
    artifacts = Artifacts(settings)
    sources = sources_of(settings, run, dataset, split)
    n_clusters = n_clusters or default_clusters(settings, dataset)
    place = artifacts.meta_clusters(run, dataset, split, n_clusters)
    seed = run.training.seed

    def compute() -> Computed:
        strengths = sources.strengths()
        made_from = fingerprint(artifacts.strengths(run, dataset, split))
        labels = cluster_images(
            artifacts.clustering(place), strengths, n_clusters, seed, made_from, overwrite=overwrite
        )
        classes = sources.labels(strengths)
        sizes = np.bincount(labels, minlength=n_clusters)
        clusters = np.flatnonzero(sizes >= MIN_IMAGES)
        if not len(clusters):
            raise UserError(
                f"none of the {n_clusters} clusters has {MIN_IMAGES} images: ask for fewer with --n_clusters"
            )
        centred = mean_centred(mean_strengths(strengths.matrix, labels, n_clusters), strengths.matrix)
        outstanding = leading(centred, 1).values[clusters, 0]
        clusters = clusters[np.argsort(-outstanding, kind="stable")]
        top = leading(centred[clusters], N_CONCEPTS)
        images, frequent, shares = [], [], []
        for cluster in clusters:
            rows = np.flatnonzero(labels == cluster)
            chosen = np.random.default_rng([seed, int(cluster)]).choice(rows, N_IMAGES, replace=False)
            images.append(strengths.keys[np.sort(chosen)])
            counts = np.bincount(classes[rows])
            frequent.append(counts.argmax())
            shares.append(counts.max() / len(rows))
        arrays = {
            "cluster": clusters,
            "size": sizes[clusters],
            "concepts": top.concepts,
            "strengths": top.values,
            "images": np.array(images),
            "class_number": np.array(frequent),
            "class_share": np.array(shares),
        }
        return arrays, about_run(run, split, sources.names) | class_texts(settings, dataset) | {"k": n_clusters}

    recipe = Recipe(
        "meta_clusters",
        {"n_clusters": n_clusters, "seed": seed},
        sources.inputs | {"split": fingerprint(artifacts.probe_split(dataset))},
    )
    made = make_dump(artifacts.dump(place), recipe, compute, overwrite=overwrite)
    choose(settings, made, "clusters", items(made, selection or Selection()), lambda clusters: _images(made, clusters))
    return made.folder


def items(dump: Dump, selection: Selection) -> list[int]:
    """The clusters to draw, the most outstanding first.

    A class chooses those in which it is the most frequent, a concept those that it leads with others.

    Raises:
        UserError: a selection names what is not there.
    """
    numbers = dump.numbers
    what = f"cluster of {MIN_IMAGES} images with the number"
    classes = numbers["class_number"][:, None]
    return limited(narrowed(dump, selection, numbers["cluster"], what, classes, numbers["concepts"]), selection.limit)


def limited(clusters: list[int], n_figures: int | None) -> list[int]:
    """The first of them."""
    return clusters[: n_figures * PER_FIGURE if n_figures else None]


def pages(dump: Dump, clusters: Sequence[int]) -> list[Page]:
    """Figures of PER_FIGURE clusters."""
    found = []
    for start in range(0, len(clusters), PER_FIGURE):
        members = tuple(_cluster(dump, cluster) for cluster in clusters[start : start + PER_FIGURE])
        name = "clusters_" + "_".join(str(member.number) for member in members)
        title = "; ".join(
            f"{member.number}: {', '.join(label for label, _ in member.concepts[:2])}" for member in members
        )
        found.append(Page(name, title, members))
    return found


def _cluster(dump: Dump, cluster: int) -> Cluster:
    numbers, about = dump.numbers, dump.about
    row = _row(dump, cluster)
    concepts = zip(numbers["concepts"][row].tolist(), numbers["strengths"][row].tolist(), strict=True)
    return Cluster(
        cluster,
        int(numbers["size"][row]),
        about["classes"][numbers["class_number"][row]],
        float(numbers["class_share"][row]),
        tuple((about["labels"][concept], strength) for concept, strength in concepts if concept >= 0),
        tuple(dump.image(about["dataset"], key) for key in numbers["images"][row].tolist()),
    )


def _row(dump: Dump, cluster: int) -> int:
    return int(np.flatnonzero(dump.numbers["cluster"] == cluster)[0])


def _images(dump: Dump, clusters: Iterable[int]) -> dict[str, Integers]:
    rows = [_row(dump, cluster) for cluster in clusters]
    return {dump.about["dataset"]: dump.numbers["images"][rows].ravel()}
