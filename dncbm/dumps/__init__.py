"""Dumps: what explanations are drawn from, one module a kind. A dump is a folder that needs nothing beside it:

- `numbers.npz` and `about.json`: numbers and texts of everything that can be drawn.
- `images/<dataset>/<index>.jpg`: thumbnails of what was chosen to be drawn.
- `chosen.json`: what that is. Choosing more adds thumbnails and computes nothing again.
"""

import difflib
import json
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
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

from dncbm.artifacts import Artifacts, ProbeRun, SAERun
from dncbm.concepts import ConceptStrengths, finished_strengths, load_concept_strengths, strengths_width
from dncbm.datasets.probe import display_name, probe_images
from dncbm.errors import UserError
from dncbm.features import default_cores, probe_class_names, probe_labels
from dncbm.manifests import Outcome, Recipe, begin, fingerprint, finish, manifest_path, whole_file, write_json
from dncbm.naming import ConceptName, concept_labels, read_names
from dncbm.probing import load_probe
from dncbm.settings import Settings

Integers = NDArray[np.int64]
Computed = tuple[dict[str, Any], dict[str, Any]]
"""What becomes numbers.npz and about.json."""

THUMBNAIL = 224
"""Pixels of a side. Smaller images keep their size."""


@dataclass(frozen=True)
class Selection:
    """What is to be drawn; what is left empty restricts nothing."""

    limit: int | None = None
    """At most so many figures."""
    indices: tuple[int, ...] = ()
    """Of latents, clusters, images (in the dataset's own split) or classes."""
    classes: tuple[str, ...] = ()
    """Names of classes."""
    concepts: tuple[str, ...] = ()
    """Names of latents."""

    def __bool__(self) -> bool:
        return self != Selection()


@dataclass(frozen=True)
class Dump:
    """A finished dump."""

    folder: Path

    @cached_property
    def about(self) -> dict[str, Any]:
        """Texts: encoder, sae, dataset and split, names of latents (`labels`, one for each) and of classes."""
        loaded: dict[str, Any] = self._read("about.json", lambda path: json.loads(path.read_text(encoding="utf-8")))
        return loaded

    @cached_property
    def numbers(self) -> dict[str, NDArray[Any]]:
        """What the module of the kind says."""
        loaded: dict[str, NDArray[Any]] = self._read("numbers.npz", lambda path: dict(np.load(path)))  # no pickles
        return loaded

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the numbers and texts."""
        return fingerprint(self.folder)

    def image(self, dataset: str, index: int) -> Path:
        """Thumbnail of an image of a dataset's split."""
        return self.folder / "images" / dataset / f"{index}.jpg"

    @property
    def chosen(self) -> list[int]:
        """What was chosen to be drawn so far, in the order of the figures."""
        if not (self.folder / "chosen.json").is_file():
            return []
        found: list[int] = self._read("chosen.json", lambda path: json.loads(path.read_text()))
        return found

    def _read(self, name: str, read: Callable[[Path], Any]) -> Any:
        try:
            return read(self.folder / name)
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise UserError(
                f"cannot read {self.folder / name} ({type(error).__name__}): make the dump again with --overwrite"
            ) from error


def open_dump(folder: Path) -> Dump:
    """A finished dump. Raises UserError if it is not there or not finished."""
    if not manifest_path(folder).is_file():
        state = "is not finished" if folder.is_dir() else "is not there"
        raise UserError(f"the dump {folder} {state}: run the _dump.py of this figure with the same flags")
    return Dump(folder)


def make_dump(folder: Path, recipe: Recipe, compute: Callable[[], Computed], *, overwrite: bool) -> Dump:
    """Compute a dump's numbers and texts, unless they are there from the same recipe.

    Raises:
        StaleArtifact: they are there from another recipe, and `overwrite` is off.
    """
    if begin(folder, recipe, overwrite=overwrite) is Outcome.RAN:
        arrays, about = compute()
        with whole_file(folder / "numbers.npz") as temporary:
            np.savez(temporary, **arrays)
        write_json(folder / "about.json", about)
        finish(folder, recipe, [folder / "numbers.npz", folder / "about.json"])
    return open_dump(folder)


def choose(
    settings: Settings,
    dump: Dump,
    what: str,
    items: Sequence[int],
    images: Callable[[Iterable[int]], Mapping[str, Integers]],
) -> None:
    """Add the thumbnails that some items need to a dump, and note that they were chosen.

    Args:
        settings: the config, which says where the images are.
        dump: a finished dump.
        what: latents, clusters, images or classes.
        items: their numbers, in the order of the figures.
        images: items -> dataset -> the indices of its images.

    Raises:
        UserError: an image is not there any more.
    """
    for dataset, indices in images(items).items():
        missing = [int(index) for index in np.unique(indices) if not dump.image(dataset, int(index)).is_file()]
        _add_thumbnails(settings, dump, dataset, missing)
    earlier = dump.chosen
    known = set(earlier)
    write_json(dump.folder / "chosen.json", earlier + [int(item) for item in items if int(item) not in known])
    print(f"{len(items)} {what} to draw: {dump.folder}")


def _add_thumbnails(settings: Settings, dump: Dump, dataset: str, missing: list[int]) -> None:
    if not missing:
        return
    split = "val" if dump.about["split"] == "val" else "train"
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
        with whole_file(dump.image(dataset, index)) as temporary:
            thumbnail.save(temporary, "JPEG", quality=92)

    with ThreadPoolExecutor(default_cores()) as pool:
        try:
            for _ in tqdm(pool.map(add, missing), desc=f"images of {dataset}", total=len(missing), unit="image"):
                pass
        except BaseException:
            pool.shutdown(cancel_futures=True)  # or leaving would wait for all the others
            raise


def square(image: Image.Image) -> Image.Image:
    """The centre square of an image, at most THUMBNAIL pixels wide: about what CLIP's preprocessing shows the encoder."""
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    cropped = image.crop((left, top, left + side, top + side))
    return cropped.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS) if side > THUMBNAIL else cropped


# ------------------------------------------------------------------------------------------- what every kind reads


@dataclass(frozen=True)
class Sources:
    """The strengths of a split, which are read only when they are asked for, and the names of their concepts."""

    settings: Settings
    run: SAERun
    dataset: str
    split: str
    names: list[ConceptName]
    inputs: dict[str, str]
    """Fingerprints of all that is read, for a recipe."""

    def strengths(self) -> ConceptStrengths:
        """Read them. Raises UserError where they are damaged."""
        return load_concept_strengths(self.settings, self.run, self.dataset, self.split)

    def labels(self, strengths: ConceptStrengths) -> Integers:
        """The true class of each image."""
        return probe_labels(self.settings, self.dataset, self.split, strengths.keys)


def sources_of(settings: Settings, run: SAERun, dataset: str, split: str) -> Sources:
    """What latents are explained from, in a split of a dataset.

    Raises:
        UserError: some of it is not there, or names and strengths are of different SAEs.
    """
    folder = finished_strengths(settings, run, dataset, split)
    names, path = read_names(settings, run), Artifacts(settings).concept_names(run)
    if len(names) != (n_latents := strengths_width(folder)):
        raise UserError(
            f"{path} names {len(names)} latents and the strengths have {n_latents}: "
            "make the names again with `python scripts/04_assign_names.py --overwrite`"
        )
    inputs = {f"{dataset} {split} strengths": fingerprint(folder), "names": fingerprint(path)}
    return Sources(settings, run, dataset, split, names, inputs)


def probed_sources_of(settings: Settings, run: SAERun, probe: ProbeRun, split: str) -> tuple[Sources, torch.Tensor]:
    """What predictions are explained from, and the probe's weights, F x C.

    Raises:
        UserError: some of it is not there, or the probe is of another SAE.
    """
    artifacts = Artifacts(settings)
    weight = load_probe(settings, run, probe)
    sources = sources_of(settings, run, probe.dataset, split)
    if len(weight) != len(sources.names):
        raise UserError(
            f"{artifacts.probe(run, probe)} weighs {len(weight)} concepts and the strengths have {len(sources.names)}: "
            "train it again with `python scripts/07_train_linear_probe.py --overwrite`"
        )
    inputs = {
        "probe": fingerprint(artifacts.probe(run, probe)),
        "split": fingerprint(artifacts.probe_split(probe.dataset)),
    }
    return replace(sources, inputs=sources.inputs | inputs), weight


def about_run(run: SAERun, split: str, names: Sequence[ConceptName]) -> dict[str, Any]:
    """The texts of every dump."""
    return {
        "encoder": run.encoder,
        "sae_dataset": run.dataset,
        "sae": run.config_name,
        "split": split,
        "names": [name.name for name in names],
        "labels": concept_labels(names),
    }


def class_texts(settings: Settings, dataset: str) -> dict[str, Any]:
    """Names of classes, as people write them and as the dataset does."""
    names = probe_class_names(settings, dataset)
    return {"dataset": dataset, "classes": [display_name(name) for name in names], "class_folders": names}


# ----------------------------------------------------------------------------------------------------------- choosing


def chosen_classes(dump: Dump, selection: Selection) -> Integers | None:
    """Numbers of the classes that a selection names, in either spelling; None if it names none.

    Raises:
        UserError: there is no such class.
    """
    if not selection.classes:
        return None
    spellings: dict[str, set[int]] = {}
    for key in ("classes", "class_folders"):
        for number, name in enumerate(dump.about[key]):
            spellings.setdefault(name, set()).add(number)
    return _numbers(selection.classes, spellings, f"--classes: {dump.about['dataset']} has no class")


def chosen_concepts(dump: Dump, selection: Selection) -> Integers | None:
    """The latents that a selection names, all of those that share a name; None if it names none.

    Raises:
        UserError: no latent has such a name.
    """
    if not selection.concepts:
        return None
    spellings: dict[str, set[int]] = {}
    for key in ("names", "labels"):
        for number, name in enumerate(dump.about[key]):
            spellings.setdefault(name, set()).add(number)
    return _numbers(selection.concepts, spellings, "--concepts: no latent has the name")


def _numbers(wanted: Sequence[str], spellings: Mapping[str, set[int]], complaint: str) -> Integers:
    found: list[int] = []
    for name in wanted:
        if name not in spellings:
            near = difflib.get_close_matches(name, spellings, n=3)
            raise UserError(f"{complaint} {name!r}" + (f"; near it are {', '.join(near)}" if near else ""))
        found += sorted(spellings[name])
    return np.array(found, dtype=np.int64)


def known_indices(selection: Selection, known: Integers, what: str) -> Integers:
    """The indices of a selection, in its order.

    Raises:
        UserError: one is not among `known`.
    """
    unknown = [index for index in selection.indices if not (known == index).any()]
    if unknown:
        raise UserError(f"--indices: there is no {what} {unknown[0]}")
    return np.array(selection.indices, dtype=np.int64)


def narrowed(
    dump: Dump, selection: Selection, of: Integers, what: str, classes: NDArray[Any], concepts: NDArray[Any]
) -> list[int]:
    """What a selection chooses among all that a dump explains.

    Args:
        dump: the dump.
        selection: indices, and names of classes and concepts, one of each of which it has to have.
        of: the number of each item.
        what: what a number is of, for the error.
        classes: items x any, the classes that an item has.
        concepts: items x any, the concepts that an item has.

    Raises:
        UserError: it chooses nothing, or names what is not there.
    """
    items = known_indices(selection, of, what) if selection.indices else of
    for wanted, having in ((chosen_classes(dump, selection), classes), (chosen_concepts(dump, selection), concepts)):
        if wanted is not None:
            items = items[np.isin(items, of[np.isin(having, wanted).any(axis=1)])]
    if not len(items):
        raise UserError("--classes, --concepts: nothing has all that was chosen")
    numbers: list[int] = items.tolist()
    return numbers
