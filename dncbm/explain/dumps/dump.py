"""Dumps: what explanations are drawn from. A dump is a folder that needs nothing outside itself:

- `numbers.npz` and `about.json`: numbers and texts of everything that can be drawn.
- `images/<dataset>/<index>.jpg`: thumbnails of what was chosen to be drawn.
- `chosen.json`: what was chosen (`items`), and which images the thumbnails are of (`images`: data set -> fingerprint).
  Choosing more adds thumbnails and computes nothing again.
"""

import difflib
import json
import shutil
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
from dncbm.features.datasets import open_image, read_file
from dncbm.features.datasets.probe import display_name, probe_images
from dncbm.features.stage import (
    PROBE_FEATURES,
    are_extracted,
    features_background,
    images_print,
    probe_class_names,
    probe_labels,
)
from dncbm.probe.stage import PROBE, load_probe
from dncbm.runs.artifacts import Artifacts, ExplanationFolder
from dncbm.runs.declarations import HOOKS, SPLITS, LatentSelection, ProbeRun, SAERun, Selection
from dncbm.runs.devices import default_cores
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.locks import locked
from dncbm.runs.manifests import Outcome, fingerprint, making, manifest_path, read_manifest, write_json
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder.files import remove_leftovers, whole_file

Integers = NDArray[np.int64]
Arrays = dict[str, Any]

LISTS = ("names", "labels", "classes", "class_folders", "datasets")
"""The texts of a dump that are lists."""
ROWS = -1
THUMBNAIL = 224
"""Pixels per side of a thumbnail. Smaller images keep their size."""


@dataclass(frozen=True)
class Array:
    """What an array of `numbers.npz` must be."""

    whole: bool
    """Whether it holds whole numbers; else finite ones."""
    least: int = 0
    below: int | None = None
    """Whole numbers are at least `least` and below this."""
    width: int | None = None
    """Numbers in a row; None if the array has one dimension."""
    length: int | None = ROWS
    """Its rows: a number, any (None), or as many as all other arrays that say ROWS."""
    ends: str = ""
    """The array that these numbers cut into parts: each is where a part ends."""

    def complaint(self, found: NDArray[Any], arrays: Mapping[str, NDArray[Any]]) -> str | None:
        """What is wrong with an array, if anything is."""
        shape_fits = found.ndim == (1 if self.width is None else 2) and self.width in (None, *found.shape[1:])
        if not shape_fits or self.length not in (ROWS, None, len(found)):
            return f"has the shape {found.shape}"
        if found.dtype.kind not in ("iu" if self.whole else "f"):
            return f"holds {found.dtype}"
        if not self.whole:
            return None if np.isfinite(found).all() else "holds numbers that are not finite"
        low, high = (int(found.min()), int(found.max())) if found.size else (self.least, self.least)
        if low < self.least or (self.below is not None and found.size and high >= self.below):
            return f"holds {low if low < self.least else high}, which is out of range"
        if self.ends and ((np.diff(found) < 0).any() or high != len(arrays.get(self.ends, ()))):
            return f"does not divide {self.ends}"
        return None


def whole(below: int | None = None, *, width: int | None = None, filled: bool = False, length: int | None = ROWS) -> Array:
    """An array of whole numbers from 0, or of -1 too if it is filled up with that."""
    return Array(True, -1 if filled else 0, below, width, length)


def real(*, width: int | None = None, length: int | None = ROWS) -> Array:
    """An array of finite numbers."""
    return Array(False, width=width, length=length)


@dataclass(frozen=True)
class Dump:
    """A finished dump. Every part raises UserError, naming the file and what makes it again, if it is missing or damaged."""

    files: ExplanationFolder
    kind: "Kind | None" = None
    """By which the parts are checked."""
    again: str = "its script with --overwrite"

    @cached_property
    def about(self) -> dict[str, Any]:
        """Texts: encoder, sae, dataset and split, names of latents (`labels`, one per latent) and of classes."""
        return self._read(self.files.about, lambda path: self._texts(json.loads(path.read_text(encoding="utf-8"))))

    @cached_property
    def numbers(self) -> dict[str, NDArray[Any]]:
        """The arrays that the kind's module documents."""
        expected = self.kind.arrays(self.about) if self.kind else {}
        return self._read(self.files.numbers, lambda path: checked(_arrays(path), expected))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the numbers and texts."""
        return fingerprint(self.files.dump)

    @property
    def chosen(self) -> list[int]:
        """The items chosen to be drawn so far, in the order of the figures."""
        items: list[int] = self._choice()["items"]
        if items and self.kind is not None:
            self.numbers  # noqa: B018 - so that damage there is not taken for damage here
            known = self.kind.select(self, self.kind.selects())
            if unknown := sorted(set(items) - set(known)):
                raise self._unreadable(self.files.chosen, f"the dump has no {unknown[0]} among its {self.kind.things}")
        return items

    @property
    def pictured(self) -> dict[str, str]:
        """Data set -> fingerprint of the images that its thumbnails are of, as far as it is known."""
        found: dict[str, str] = self._choice()["images"]
        return found

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

    def _texts(self, found: Any) -> dict[str, Any]:
        needed = ("encoder", "sae_dataset", "sae", "split", "names", "labels", *(self.kind.texts if self.kind else ()))
        for key in needed:
            is_list = key in LISTS
            value = found[key]
            if not isinstance(value, list if is_list else str) or (is_list and not all(isinstance(x, str) for x in value)):
                raise ValueError(f"{key} is not {'a list of texts' if is_list else 'a text'}")
        for one, other in (("names", "labels"), ("classes", "class_folders")):
            if other in needed and len(found[one]) != len(found[other]):
                raise ValueError(f"{one} and {other} differ in length")
        if found["split"] not in SPLITS:
            raise ValueError(f"there is no split {found['split']!r}")
        texts: dict[str, Any] = found
        return texts

    def _choice(self) -> dict[str, Any]:
        def read(path: Path) -> dict[str, Any]:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            items, images = found["items"], found["images"]
            if not isinstance(items, list) or not all(type(item) is int for item in items):
                raise ValueError("items are not whole numbers")
            if not all(isinstance(value, str) for value in images.values()):
                raise ValueError("images are not fingerprints")
            return found

        return self._read(self.files.chosen, read) if self.files.chosen.is_file() else {"items": [], "images": {}}

    def _read(self, path: Path, read: Callable[[Path], Any]) -> Any:
        try:
            return read(path)
        except UserError:
            raise
        except Exception as error:  # damaged files raise anything
            raise self._unreadable(path, f"{type(error).__name__}: {first_line(error)}") from error

    def _unreadable(self, path: Path, reason: str) -> UserError:
        return UserError(f"cannot read {path} ({reason}): make it again with {self.again} and the same flags")


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def checked(arrays: dict[str, NDArray[Any]], expected: Mapping[str, Array]) -> dict[str, NDArray[Any]]:
    """The arrays. Raises ValueError if one is missing, or is not what is expected."""
    rows = {}
    for name, array in expected.items():
        if name not in arrays:
            raise ValueError(f"it lacks {name}")
        if complaint := array.complaint(arrays[name], arrays):
            raise ValueError(f"{name} {complaint}")
        if array.length == ROWS:
            rows[name] = len(arrays[name])
    if len(set(rows.values())) > 1:
        raise ValueError("its arrays differ in length: " + ", ".join(f"{name} {n}" for name, n in rows.items()))
    return arrays


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
    arrays: Callable[[Mapping[str, Any]], Mapping[str, Array]] = lambda about: {}
    """The texts -> what the arrays must be, as far as it is checked."""
    texts: tuple[str, ...] = ("dataset", "classes", "class_folders")
    """The texts that there are besides those of every kind."""
    describe: Callable[[Any], str] = lambda page: str(page.title)
    """A page of `page` -> what it shows, for those who cannot see it."""
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

    def counted(self, n: int) -> str:
        """`1 class`, `2 classes`."""
        return counted(n, self.things)

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
        if overwrite:
            with locked(files.dump):
                _remove_unreadable(Dump(files, kind, stage.command("--overwrite")))
        with making(files.dump, f"{kind.name}_dump", plan.settings, plan.inputs, overwrite=overwrite, run=plan.run) as work:
            if work.needed:
                arrays: Arrays = {name: np.asarray(array) for name, array in plan.compute(overwrite).items()}
                try:
                    checked(arrays, kind.arrays(plan.about))
                except ValueError as error:
                    raise UserError(f"{kind.things} of {files.dump.parent} cannot be explained: {error}") from error
                with whole_file(files.numbers) as temporary:
                    np.savez(temporary, **arrays)
                write_json(files.about, plan.about)
                work.done([files.numbers, files.about])
        if manifest_path(files.clustering).is_file():  # a process was killed between the two
            files.cluster_state.unlink(missing_ok=True)
        made = Dump(files, kind, stage.command("--overwrite"))
        with locked(files.dump):
            items = _choose(settings, made, kind, selection, overwrite)
        print(f"{kind.counted(len(items))} to draw: {files.dump}")
        return Outcome.RAN

    stage = Stage(
        name=f"{kind.name}_dump", script=f"visualization/{script}_dump.py", summary=summary, function=dump,
        takes=(*kind.takes, *kind.dump_takes, kind.selects), inputs=inputs,
        outputs=lambda artifacts, *declared: [kind.files(artifacts, *declared).dump],
        made=lambda artifacts: artifacts.dumps(kind.name), explains=explains,
    )  # fmt: skip
    return stage


def _remove_unreadable(dump: Dump) -> None:
    """Remove texts and numbers that cannot be read, so that they are made again."""
    try:
        dump.numbers  # noqa: B018
    except UserError:
        for path in (dump.files.about, dump.files.numbers):
            path.unlink(missing_ok=True)


def _choose(settings: Settings, dump: Dump, kind: Kind, selection: LatentSelection, overwrite: bool) -> list[int]:
    """Add what a selection chooses to what was chosen before, with its thumbnails. Returns the items of the selection.

    Thumbnails of other images than the features were extracted from are made again.
    """
    items = kind.items(dump, selection)
    try:
        earlier, pictured = dump.chosen, dump.pictured
    except UserError:
        if not overwrite:
            raise
        earlier, pictured = [], {}
    known = set(earlier)
    chosen = earlier + [item for item in items if item not in known]
    prints = {dataset: images_print(settings, *_features_of(dump, dataset)) for dataset in kind.images(dump, items)}
    stale = [dataset for dataset, found in prints.items() if pictured.get(dataset) != found]
    for dataset in stale:
        shutil.rmtree(dump.files.image(dataset, 0).parent, ignore_errors=True)
    # Written before the thumbnails are, so that those of an interrupted run count.
    write_json(dump.files.chosen, {"items": earlier, "images": pictured | prints})
    for dataset, indices in kind.images(dump, chosen if stale or overwrite else items).items():
        _add_thumbnails(settings, dump, dataset, indices, overwrite)
    write_json(dump.files.chosen, {"items": chosen, "images": pictured | prints})
    return items


def _features_of(dump: Dump, dataset: str) -> tuple[str, str, str, str]:
    """Data set, encoder, hook point and split of the features that a dump is made from."""
    hook = read_manifest(dump.files.dump)["run"].get("hook_points", HOOKS[0])
    return dataset, dump.about["encoder"], hook, dump.about["split"]


def _add_thumbnails(settings: Settings, dump: Dump, dataset: str, indices: Sequence[int] | Integers, overwrite: bool) -> None:
    """Make the thumbnails that are missing; with `overwrite` those that cannot be read too."""
    thumbnails = {index: dump.files.image(dataset, index) for index in np.unique(indices).tolist()}
    missing = [index for index, path in thumbnails.items() if not path.is_file() or (overwrite and not _is_image(path))]
    if not missing:
        return
    split = settings.own_split(dataset, dump.about["split"])
    images = probe_images(settings, dataset, split)
    extract = PROBE_FEATURES.command("--probe_dataset", dataset, "--overwrite")
    features = _features_of(dump, dataset)
    if not are_extracted(settings, images, *features):
        raise UserError(
            f"the images of the {split} split of {dataset} are not those that the features were extracted from: put them "
            f"back, or run {extract} and the stages after it"
        )
    if missing[-1] >= len(images.labels):
        raise UserError(
            f"{dump.files.numbers} shows image {missing[-1]} of the {split} split of {dataset}, which has "
            f"{counted(len(images.labels), 'images')}: run {extract} and the stages after it"
        )
    remove_leftovers(thumbnails[missing[0]].parent)
    background = features_background(settings, *features)

    def add(index: int) -> None:
        try:
            thumbnail = square(images.image(index, background))
        except Exception as error:  # decoders raise anything
            reason = first_line(error)
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


def _is_image(path: Path) -> bool:
    try:
        open_image(read_file(path)).load()
    except Exception:  # decoders raise anything
        return False
    return True


def counted(n: int, things: str) -> str:
    """`1 image`, `2 images`."""
    one = things.removesuffix("es") if things.endswith("sses") else things.removesuffix("s")
    return f"{n:d} {one if n == 1 else things}"


def listed(concepts: Sequence[tuple[str, float]]) -> str:
    """Concepts and their values in words."""
    return ", ".join(f"{label} {value:+.3g}" for label, value in concepts) or "none"


def square(image: Image.Image, side: int = THUMBNAIL) -> Image.Image:
    """The centre square of an image, at most `side` pixels wide: roughly what the encoder sees after preprocessing."""
    own = min(image.size)
    left, top = (image.width - own) // 2, (image.height - own) // 2
    cropped = image.crop((left, top, left + own, top + own))
    return cropped.resize((side, side), Image.Resampling.LANCZOS) if own > side else cropped


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
        """Read them. Raises UserError if they are damaged, or there are none."""
        found = load_concept_strengths(self.settings, self.run, self.dataset, self.split)
        if not len(found.keys):
            raise UserError(f"the {self.split} split of {self.dataset} has no images to explain")
        return found

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
    names, path = read_names(settings, run), Artifacts(settings).concept_names_in_use(run)
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
    """The numbers of names. A flag divides names at their commas, so that what stands side by side may be one name."""
    if not wanted:
        return None
    numbers: dict[str, set[int]] = {}
    for key in spellings:
        for number, name in enumerate(dump.about[key]):
            numbers.setdefault(_as_flag(name), set()).add(number)
    most = 1 + max((name.count(",") for name in numbers), default=0)
    found: list[int] = []
    place = 0
    while place < len(wanted):
        for n in range(min(most, len(wanted) - place), 0, -1):
            name = _as_flag(",".join(wanted[place : place + n]))
            if name in numbers:
                break
        else:
            near = ", ".join(difflib.get_close_matches(name, numbers, n=3))
            raise UserError(f"{complaint} {wanted[place][:100]!r}" + (f"; did you mean {near}?" if near else ""))
        found += numbers[name]
        place += n
    return np.array(found, dtype=np.int64)


def _as_flag(name: str) -> str:
    """A name without what the flags of lists leave out: spaces around commas and nothing between two."""
    return ",".join(part.strip() for part in name.split(",") if part.strip()) or name


def known_indices(selection: LatentSelection, known: Integers, what: str) -> Integers:
    """The indices of a selection, in its order. Raises UserError if one is not among `known`."""
    among = set(known.tolist())
    unknown = [index for index in selection.indices if index not in among]
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
