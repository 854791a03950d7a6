"""Dumps: what explanations are drawn from. A dump is a folder that needs nothing outside itself:

- `numbers.npz` and `about.json`: numbers and texts of everything that can be drawn.
- `images/<dataset>/<index>.jpg`: thumbnails of what was chosen to be drawn.
- `chosen.json`: what was chosen. Choosing more adds thumbnails and computes nothing again.
"""

import difflib
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from dncbm.concepts.naming import NAMES, ConceptName, concept_labels, read_names
from dncbm.concepts.strengths import ConceptStrengths, finished_strengths, load_concept_strengths, strengths_width
from dncbm.features.datasets.probe import display_name, probe_images
from dncbm.features.stage import probe_class_names, probe_labels
from dncbm.probe.stage import PROBE, load_probe
from dncbm.runs.artifacts import Artifacts, ExplanationFolder
from dncbm.runs.declarations import LatentSelection, ProbeRun, SAERun, Selection
from dncbm.runs.devices import default_cores
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome, fingerprint, making, write_json
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder.files import whole_file

Integers = NDArray[np.int64]
Arrays = dict[str, Any]

THUMBNAIL = 224
"""Pixels per side of a thumbnail. Smaller images keep their size."""


@dataclass(frozen=True)
class Dump:
    """A finished dump."""

    files: ExplanationFolder

    @cached_property
    def about(self) -> dict[str, Any]:
        """Texts: encoder, sae, dataset and split, names of latents (`labels`, one per latent) and of classes."""
        return self._read(self.files.about, lambda path: json.loads(path.read_text(encoding="utf-8")))

    @cached_property
    def numbers(self) -> dict[str, NDArray[Any]]:
        """The arrays that the kind's module documents."""
        return self._read(self.files.numbers, lambda path: dict(np.load(path)))  # no pickles

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the numbers and texts."""
        return fingerprint(self.files.dump)

    @property
    def chosen(self) -> list[int]:
        """The items chosen to be drawn so far, in the order of the figures."""
        known = self.files.chosen.is_file()
        return self._read(self.files.chosen, lambda path: json.loads(path.read_text())) if known else []

    def row(self, column: str, number: int) -> dict[str, Any]:
        """The row of every array at which a column has a number; single numbers as Python's."""
        at = np.flatnonzero(self.numbers[column] == number)[0]
        return {name: array[at] if array.ndim > 1 else array[at].item() for name, array in self.numbers.items()}

    def labelled(self, concepts: Integers, values: NDArray[Any]) -> tuple[tuple[str, float], ...]:
        """Label and value of each concept, without the -1 that fill a row."""
        pairs = zip(concepts.tolist(), values.tolist(), strict=True)
        return tuple((self.about["labels"][concept], value) for concept, value in pairs if concept >= 0)

    def images(self, indices: Integers) -> tuple[Path, ...]:
        """Thumbnails of images of the data set, without the -1 that fill a row."""
        return tuple(self.files.image(self.about["dataset"], index) for index in indices.tolist() if index >= 0)

    def _read(self, path: Path, read: Callable[[Path], Any]) -> Any:
        try:
            return read(path)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read {path} ({type(error).__name__}): make the dump again with --overwrite") from error


# ------------------------------------------------------------------------------------------- kinds and their stage


@dataclass(frozen=True)
class Plan:
    """How a dump is computed. Making a plan reads no strengths."""

    inputs: Mapping[str, Path]
    settings: Mapping[str, Any]
    """What the dump depends on besides its inputs."""
    run: Mapping[str, Any]
    """Flag -> value of everything by which the dump can be found."""
    about: dict[str, Any]
    """The texts."""
    compute: Callable[[bool], Arrays]
    """Whether to replace what was kept aside from other inputs -> the numbers."""


@dataclass(frozen=True)
class Kind:
    """A kind of explanation. Its module in `dumps` declares it; `dump_stage` and `plot_stage` derive the stages from it."""

    name: str
    things: str
    """What is chosen to be drawn, in the plural."""
    takes: tuple[type, ...]
    """The declarations that name an explanation."""
    files: Callable[..., ExplanationFolder]
    """Artifacts and `takes` -> the explanation's files."""
    plan: Callable[..., Plan]
    """The config, `takes` and `dump_takes` -> how to compute."""
    select: Callable[[Dump, Any], list[int]]
    """Every item that a selection allows, in the order of the figures; UserError if it names something unknown."""
    images: Callable[[Dump, Sequence[int]], Mapping[str, Sequence[int] | Integers]]
    """Items -> data set -> indices of the images in their figures."""
    page: Callable[..., Any]
    """The dump, `per_figure` items and the options of the plot -> what a figure shows."""
    dump_takes: tuple[type, ...] = ()
    """Declarations that only the dump reads."""
    selects: type[LatentSelection] = Selection
    per_figure: int = 1
    """Items in a figure."""
    most: Callable[[Any], int | None] = lambda selection: None
    """The largest number of figures for a selection without a limit."""
    spread: bool = False
    """Whether a limit takes items evenly from first to last, so that a data set sorted by class shows them all."""

    def items(self, dump: Dump, selection: LatentSelection) -> list[int]:
        """The items to draw, in the order of the figures. Raises UserError if the selection names something unknown."""
        return self.limited(self.select(dump, selection), selection.limit or self.most(selection))

    def limited(self, items: list[int], n_figures: int | None) -> list[int]:
        """The items of this many figures."""
        n = len(items) if n_figures is None else min(n_figures * self.per_figure, len(items))
        return [items[place * len(items) // n] for place in range(n)] if self.spread else items[:n]

    def pages(self, dump: Dump, items: Sequence[int], *options: Any) -> list[Any]:
        """The figures of some items."""
        starts = range(0, len(items), self.per_figure)
        return [self.page(dump, items[start : start + self.per_figure], *options) for start in starts]


def dump_stage(kind: Kind, script: str, summary: str, inputs: tuple[Stage, ...], explains: Stage) -> Stage:
    """The stage that computes a kind's numbers and texts and adds the thumbnails of what is to be drawn.

    Its function takes the config, the kind's declarations and a selection. It computes on the CPU, whatever `device` says.
    It raises UserError if an input is missing, the selection names something unknown or an image cannot be read;
    StaleArtifact if the dump was made from other inputs and `overwrite` is off.
    """

    def dump(settings: Settings, *declared: Any, device: str = "cpu", overwrite: bool = False) -> Outcome:
        *named, selection = declared
        plan, files = kind.plan(settings, *named), kind.files(Artifacts(settings), *named)
        made = Dump(files)
        with making(files.dump, kind.name, plan.settings, plan.inputs, overwrite=overwrite, run=plan.run) as work:
            if work.needed:
                arrays = plan.compute(overwrite)
                with whole_file(files.numbers) as temporary:
                    np.savez(temporary, **arrays)
                write_json(files.about, plan.about)
                work.done([files.numbers, files.about])
        items = kind.items(made, selection)
        for dataset, indices in kind.images(made, items).items():
            _add_thumbnails(settings, made, dataset, indices)
        earlier = made.chosen
        known = set(earlier)
        write_json(files.chosen, earlier + [item for item in items if item not in known])
        print(f"{len(items)} {kind.things} to draw: {files.dump}")
        return Outcome.RAN

    return Stage(
        name=f"{kind.name}_dump", script=f"visualization/{script}_dump.py", summary=summary, function=dump,
        takes=(*kind.takes, *kind.dump_takes, kind.selects), inputs=inputs,
        outputs=lambda artifacts, *declared: [kind.files(artifacts, *declared).dump],
        made=lambda artifacts: artifacts.dumps(kind.name), explains=explains,
    )  # fmt: skip


def _add_thumbnails(settings: Settings, dump: Dump, dataset: str, indices: Sequence[int] | Integers) -> None:
    thumbnails = {index: dump.files.image(dataset, index) for index in np.unique(indices).tolist()}
    missing = [index for index, path in thumbnails.items() if not path.is_file()]
    if not missing:
        return
    split = settings.own_split(dataset, dump.about["split"])
    images = probe_images(settings, dataset, split)

    def add(index: int) -> None:
        try:
            thumbnail = square(images.image(index).convert("RGB"))
        except Exception as error:  # decoders raise anything
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"cannot read image {index} of the {split} split of {dataset}: {reason}; probe_datasets[{dataset!r}] in "
                f"{settings.path} names its folder"
            ) from error
        with whole_file(thumbnails[index]) as temporary:
            thumbnail.save(temporary, "JPEG", quality=92)

    with ThreadPoolExecutor(default_cores()) as pool:
        try:
            for _ in tqdm(pool.map(add, missing), desc=f"images of {dataset}", total=len(missing), unit="image"):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)  # otherwise leaving the block waits for all remaining images
            raise


def square(image: Image.Image) -> Image.Image:
    """The centre square of an image, at most THUMBNAIL pixels wide: roughly what the encoder sees after preprocessing."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cropped = image.crop((left, top, left + side, top + side))
    return cropped.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS) if side > THUMBNAIL else cropped


# ------------------------------------------------------------------------------------------- what every kind reads


@dataclass(frozen=True)
class Sources:
    """The strengths of a split, read only on request, and the names of their concepts."""

    settings: Settings
    run: SAERun
    dataset: str
    split: str
    names: list[ConceptName]
    inputs: dict[str, Path]
    """Every artifact that is read."""

    def strengths(self) -> ConceptStrengths:
        """Read them. Raises UserError if they are damaged."""
        return load_concept_strengths(self.settings, self.run, self.dataset, self.split)

    def labels(self, strengths: ConceptStrengths) -> Integers:
        """The true class of each image."""
        return probe_labels(self.settings, self.dataset, self.split, strengths.keys)

    def about(self) -> dict[str, Any]:
        """Texts about the run and its latents."""
        named = {"names": [name.name for name in self.names], "labels": concept_labels(self.names)}
        run = {"encoder": self.run.encoder, "sae_dataset": self.run.dataset, "sae": self.run.config_name}
        return run | {"split": self.split} | named

    def about_classes(self) -> dict[str, Any]:
        """The same, and the names of classes, both as people write them and as the data set does."""
        names = probe_class_names(self.settings, self.dataset)
        classes = [display_name(name) for name in names]
        return self.about() | {"dataset": self.dataset, "classes": classes, "class_folders": names}


def sources_of(settings: Settings, run: SAERun, dataset: str, split: str) -> Sources:
    """What latents are explained from, in a split of a data set.

    Raises UserError if an input is missing, or names and strengths come from different SAEs.
    """
    folder = finished_strengths(settings, run, dataset, split)
    names, path = read_names(settings, run), Artifacts(settings).concept_names(run)
    if len(names) != (n_latents := strengths_width(folder)):
        raise UserError(
            f"{path} names {len(names)} latents and the strengths have {n_latents}: make the names again with "
            f"{NAMES.command('--overwrite')}"
        )
    return Sources(settings, run, dataset, split, names, {f"{dataset} {split} strengths": folder, "names": path})


def probed_sources_of(settings: Settings, run: SAERun, probe: ProbeRun, split: str) -> tuple[Sources, torch.Tensor]:
    """What predictions are explained from, and the probe's weights, F x C.

    Raises UserError if an input is missing, or the probe belongs to another SAE.
    """
    artifacts, weight = Artifacts(settings), load_probe(settings, run, probe)
    sources, path = sources_of(settings, run, probe.dataset, split), artifacts.probe(run, probe)
    if len(weight) != len(sources.names):
        raise UserError(
            f"{path} weighs {len(weight)} concepts and the strengths have {len(sources.names)}: train it again with "
            f"{PROBE.command('--overwrite')}"
        )
    inputs = {"probe": path, "split": artifacts.probe_split(probe.dataset)}
    return replace(sources, inputs=sources.inputs | inputs), weight


# ----------------------------------------------------------------------------------------------------------- choosing


def chosen_concepts(dump: Dump, selection: LatentSelection) -> Integers | None:
    """The latents that a selection names, all that share a name included; None if it names none.

    Raises UserError if no latent has such a name.
    """
    return _named(dump, selection.concepts, ("names", "labels"), "--concepts: no latent has the name")


def _named(dump: Dump, wanted: Sequence[str], spellings: Sequence[str], complaint: str) -> Integers | None:
    if not wanted:
        return None
    numbers: dict[str, set[int]] = {}
    for key in spellings:
        for number, name in enumerate(dump.about[key]):
            numbers.setdefault(name, set()).add(number)
    for name in wanted:
        if name not in numbers:
            near = ", ".join(difflib.get_close_matches(name, numbers, n=3))
            raise UserError(f"{complaint} {name!r}" + (f"; did you mean {near}?" if near else ""))
    return np.array([number for name in wanted for number in numbers[name]], dtype=np.int64)


def known_indices(selection: LatentSelection, known: Integers, what: str) -> Integers:
    """The indices of a selection, in its order. Raises UserError if one is not among `known`."""
    unknown = [index for index in selection.indices if not (known == index).any()]
    if unknown:
        raise UserError(f"--indices: there is no {what} {unknown[0]}")
    return np.array(selection.indices, dtype=np.int64)


def narrowed(
    dump: Dump, selection: Selection, column: str, what: str, classes: NDArray[Any], concepts: NDArray[Any]
) -> list[int]:
    """The items of a dump that a selection allows: an item needs one of the indices, classes and concepts that it gives.

    `column` is the array with the number of each item, `what` says in errors what a number stands for, `classes` has the
    class of each item and `concepts` (items x any) its concepts.

    Raises UserError if nothing is allowed, or the selection names something unknown.
    """
    of = dump.numbers[column]
    items = known_indices(selection, of, what) if selection.indices else of
    complaint = f"--classes: {dump.about['dataset']} has no class"
    named = _named(dump, selection.classes, ("classes", "class_folders"), complaint)
    for wanted, having in ((named, classes[:, None]), (chosen_concepts(dump, selection), concepts)):
        if wanted is not None:
            items = items[np.isin(items, of[np.isin(having, wanted).any(axis=1)])]
    if not len(items):
        raise UserError("--classes, --concepts: no item has everything that was chosen")
    return items.tolist()


def images_of(column: str, dump: Dump, items: Sequence[int]) -> dict[str, Integers]:
    """The images in the rows of some items, where `images` holds them, by data set."""
    images = dump.numbers["images"][np.isin(dump.numbers[column], items)]
    return {dump.about["dataset"]: images[images >= 0]}
