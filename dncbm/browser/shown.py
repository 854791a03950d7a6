"""What a site shows: the images that are kept, and all that is known of a run."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from dncbm.concepts.naming import NAMES, ConceptName, NameTests, read_name_tests, read_names
from dncbm.concepts.sae import load_sae
from dncbm.concepts.strengths import PARTS, STRENGTHS, finished_strengths, load_concept_strengths, map_part
from dncbm.features.datasets.probe import display_name
from dncbm.features.stage import probe_class_names, probe_labels
from dncbm.probe.stage import PROBE, group_names, load_groups, load_probe
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import ProbeRun, SAERun
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import manifest_path
from dncbm.runs.settings import Settings

MOST_IMAGES = 50_000
"""Images of a data set that are kept; of more, this many evenly from the first to the last."""
CONCEPTS_PER_CHUNK = 64
CLASSES_PER_CHUNK = 16
IMAGES_PER_CHUNK = 512
WEIGHTS_PER_CHUNK = 1_000_000
"""Numbers in a chunk of a probe's weights; a chunk holds at least one concept."""


@dataclass(frozen=True, eq=False)
class Kept:
    """The images of a data set that a site shows, which all of its runs share."""

    dataset: str
    keys: NDArray[np.int64]
    """Index of each in the data set's own split, n."""
    n_split: int
    """Images of the split that have strengths."""
    labels: NDArray[np.int64]
    """True class of each, n."""
    classes: tuple[str, ...]
    """The classes, as people write them."""
    groups: NDArray[np.int64] | None
    """Group of each, n, where there are groups."""
    group_names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class ShownRun:
    """A run as it is shown."""

    run: SAERun
    dictionary: torch.Tensor
    """The decoder, F x D."""
    names: list[ConceptName] | None
    """None if latents have no names."""
    tests: NameTests | None
    """None if they were not tested."""
    strengths: tuple[scipy.sparse.csr_matrix | None, ...]
    """One for each data set: kept images x F, float32, without zeros, concepts in ascending order; None if there are none."""
    probe: ProbeRun | None
    """None if there is no probe, or no strengths of its data set."""
    weight: torch.Tensor | None
    """The probe's, F x C."""
    probed: int | None
    """Which of the data sets the probe classifies."""

    @property
    def n_latents(self) -> int:
        """F."""
        return len(self.dictionary)


def weight_rows(n_latents: int, n_classes: int) -> int:
    """Concepts in a chunk of a probe's weights."""
    return max(1, min(n_latents, WEIGHTS_PER_CHUNK // n_classes))


def with_strengths(settings: Settings, run: SAERun, split: str) -> list[str]:
    """The probe data sets of the config that have finished strengths of a split."""
    artifacts = Artifacts(settings)
    return [name for name in settings.probe_datasets if manifest_path(artifacts.strengths(run, name, split)).is_file()]


def kept_images(settings: Settings, run: SAERun, split: str, first: str) -> list[Kept]:
    """The images that a site shows: of every probe data set with strengths of the split, at most MOST_IMAGES.

    The data set `first` comes first if it is among them.

    Raises UserError if strengths or labels are damaged; StaleArtifact if what they were made from has changed since.
    """
    found = []
    for dataset in sorted(with_strengths(settings, run, split), key=lambda name: name != first):
        every = _keys(finished_strengths(settings, run, dataset, split))
        n = min(len(every), MOST_IMAGES)
        if not n:
            continue
        keys = every[np.arange(n) * len(every) // n]
        groups = load_groups(settings, dataset, split, keys)
        of_groups = () if groups is None else group_names(settings, dataset, int(groups.max()) + 1)
        found.append(
            Kept(
                dataset, keys, len(every), probe_labels(settings, dataset, split, keys),
                tuple(display_name(name) for name in probe_class_names(settings, dataset)),
                None if groups is None else groups.numpy(), tuple(of_groups),
            )
        )  # fmt: skip
    return found


def _keys(folder: Path) -> NDArray[np.int64]:
    """The keys of finished strengths, in the order of their rows."""
    parts = [map_part(path)["keys"] for path in sorted(folder.glob(PARTS))]
    return np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64)


def read_run(settings: Settings, run: SAERun, probe: ProbeRun, split: str, kept: list[Kept]) -> ShownRun:
    """All that is known of a run. Its strengths of all data sets are in memory.

    Args:
        settings: the config.
        run: the SAE.
        probe: its probe, which need not exist.
        split: the split of the images.
        kept: the images that are shown; there may be no strengths of them.

    Raises:
        UserError: the SAE is missing; a file is damaged; its parts do not belong together; strengths lack images.
        StaleArtifact: what a part was made from has changed since.
    """
    artifacts, dictionary = Artifacts(settings), load_sae(settings, run).dictionary
    names, tests = None, None
    if (path := artifacts.concept_names_in_use(run)).is_file():
        names, tests = read_names(settings, run), read_name_tests(settings, run)
        _check_width(path, "names", len(names), dictionary, NAMES.command("--overwrite"))
    available = with_strengths(settings, run, split)
    strengths = [_restricted(settings, run, one, split, dictionary) if one.dataset in available else None for one in kept]
    probed = next((d for d, one in enumerate(kept) if one.dataset == probe.dataset), None)
    weight, path = None, artifacts.probe(run, probe)
    if probed is not None and strengths[probed] is not None and path.is_file():
        weight = load_probe(settings, run, probe)
        _check_width(path, "weighs", len(weight), dictionary, PROBE.command("--overwrite"))
    has_probe = weight is not None
    return ShownRun(
        run, dictionary, names, tests, tuple(strengths), probe if has_probe else None, weight, probed if has_probe else None
    )


def _restricted(
    settings: Settings, run: SAERun, kept: Kept, split: str, dictionary: torch.Tensor
) -> scipy.sparse.csr_matrix:  # fmt: skip
    """A run's strengths of the kept images, n x F."""
    found = load_concept_strengths(settings, run, kept.dataset, split)
    folder, again = Artifacts(settings).strengths(run, kept.dataset, split), STRENGTHS.command("--overwrite")
    _check_width(folder, "are of", found.matrix.shape[1], dictionary, again)
    matrix = found.matrix
    if not np.array_equal(found.keys, kept.keys):
        order = np.argsort(found.keys)
        places = np.searchsorted(found.keys, kept.keys, sorter=order)
        rows = order[np.minimum(places, len(order) - 1)] if len(order) else order
        lacking = len(kept.keys) if not len(rows) else int((found.keys[rows] != kept.keys).sum())
        if lacking:
            raise UserError(
                f"the concept strengths {folder} lack {lacking} of the images that are shown: run {again} with the flags of "
                "this SAE"
            )
        matrix = matrix[rows]
    matrix.eliminate_zeros()
    matrix.sort_indices()
    return matrix


def _check_width(path: Path, does: str, width: int, dictionary: torch.Tensor, again: str) -> None:
    if width != len(dictionary):
        raise UserError(
            f"{path} {does} {width} latents, but the SAE has {len(dictionary)}: run {again} with the flags of this SAE"
        )
