"""Import what the paper's authors publish, or their code writes, into the layout of the stages.

Their files are PyTorch's: state dicts, dense tensors without keys, labels and indices as tensors. Each is recognised by its
name, looked into with `weights_only=True`, checked, and copied or converted in pieces. What it is of follows from the flags,
else from the names of its folders, else from the defaults.
"""

import csv
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from dncbm.bottleneck.published_files import (
    check_rows,
    labels_of_files,
    labels_of_images,
    read_integers,
    read_matrix,
    read_probe,
    write_features,
    write_strengths,
)
from dncbm.bottleneck.published_report import Row, missing, print_report
from dncbm.concepts.naming import names_in
from dncbm.concepts.sae import load_sae
from dncbm.features.datasets import counted, is_hidden
from dncbm.features.datasets.probe import ProbeImages, probe_images
from dncbm.features.stage import PROBE_FEATURES, open_features, probe_class_names
from dncbm.flags import config_defaults
from dncbm.probe.fit import save_probe
from dncbm.probe.model import ProbeData
from dncbm.probe.stage import load_probe_data, record_accuracy
from dncbm.runs import commands
from dncbm.runs.artifacts import (
    PUBLISHED,
    Artifacts,
    flags_of_published_probe,
    flags_of_published_sae,
    published_file,
    published_name,
)
from dncbm.runs.declarations import (
    SPLITS,
    ImageEncoder,
    NamedEncoder,
    NamedProbe,
    NamedSAE,
    ProbeDataset,
    ProbeFeatures,
    ProbeRun,
    Published,
    SAEFeatures,
    SAERun,
    Splits,
)
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import IMPORTED, Outcome, check_chain, file_hash, making, manifest_path, read_manifest, write_json
from dncbm.runs.settings import LOCAL_DIR, Settings
from sparse_autoencoder import CheckpointError, SparseAutoencoder, load_checkpoint
from sparse_autoencoder.declare import build, values
from sparse_autoencoder.files import whole_file

COMPARED = 64
"""Images whose imported strengths are compared with what the SAE gives."""
MOST_DIFFERENT = 0.1
"""Norm of the difference, relative to that of the latents, above which strengths are not those of the SAE and the features."""
FAR_OFF = 0.005
"""Difference in accuracy from what a probe's file says of which the user is warned."""
WORDS = "words"
messages = logging.getLogger(__name__)


def import_published(
    settings: Settings,
    published: Published,
    sae: NamedSAE,
    probe: NamedProbe,
    *,
    device: str = "auto",
    overwrite: bool = False,
) -> Outcome:
    """Stage 12: lay the authors' files where the stages expect them, and say what was found, what is missing and who makes it.

    SAEs, names and embeddings are copied unchanged. Features and strengths get keys: `val` is in the order of the data set,
    `train` and `train_val` in that of `train_idxs.pth` and `train_val_idxs.pth`. A probe whose strengths are there gets
    its row of `probe_results.csv`.

    Raises UserError if the folder is missing or has none of their files; or, after all others have been imported, if a file
    could not be used.
    """
    folder = published.folder
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name the folder of the published files")
    flag = {"img_enc_name": published.encoder, "sae_dataset": published.sae_dataset, "probe_dataset": published.probe_dataset}
    flag |= {"sae": sae.name, "probe": probe.name}
    files, n_others = _find(settings, folder, {name: value for name, value in flag.items() if value is not None})
    if not files:
        called = ", ".join(published_name(kind, "train") for kind in PUBLISHED)
        raise UserError(
            f"{folder} has no file that is called like the authors' ({called}), only {counted(n_others, 'other file')}: "
            "name the folder that has theirs"
        )
    work = _Import(settings, folder, files, resolve_device(device), overwrite)
    work.each("sae", work.sae)
    work.each(WORDS, work.words)
    work.each("names", work.names)
    work.each("embeddings", work.embeddings)
    work.splits()
    work.each("features", work.features)
    work.each("strengths", work.strengths)
    work.each("probe", work.probe)
    datasets = dict.fromkeys(one.told["probe_dataset"] for one in files if "probe_dataset" in one.told)
    probed = {one.told["probe_dataset"] for one in files if one.kind == "probe" and "probe_dataset" in one.told}
    print_report([*work.rows, *missing(settings, work.runs, list(datasets), probed)])
    if n_others:
        print(f"{counted(n_others, 'file')} of other names {'was' if n_others == 1 else 'were'} not opened")
    if n_refused := sum(row.status == "refused" for row in work.rows):
        raise UserError(f"{n_refused} of the {len(work.rows)} entries above could not be imported, for the reasons there")
    return Outcome.RAN if any(row.status == "imported" for row in work.rows) else Outcome.ALREADY_DONE


# --------------------------------------------------------------------------------------------------- what was found


@dataclass(frozen=True)
class _File:
    """One of the authors' files."""

    path: Path
    kind: str
    by_name: Mapping[str, Any]
    """Flag -> value that its name and its folders tell."""
    given: Mapping[str, Any]
    """Flag -> value of the command line, which wins."""

    @property
    def told(self) -> dict[str, Any]:
        """Flag -> value of all that is known of it."""
        return {**self.by_name, **self.given}


def _find(settings: Settings, folder: Path, given: Mapping[str, Any]) -> tuple[list[_File], int]:
    """The files that are called like the authors', and the number of the others. What was made or imported here is neither."""
    words = Artifacts(settings).words().name
    files, n_others = list[_File](), 0
    for path in _walk(folder):
        found = (WORDS, dict[str, Any]()) if path.name == words else published_file(path, settings)
        if found is None:
            n_others += 1
        elif not manifest_path(path).is_file():
            kind, told = found
            files.append(_File(path, kind, told, given))
    return files, n_others


def _walk(folder: Path) -> Iterator[Path]:
    """The regular files under a folder, at any depth, links included, without hidden ones; no folder is entered twice."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    entered = set[tuple[int, int]]()
    for top, below, names in os.walk(folder, onerror=fail, followlinks=True):
        about = os.stat(top)
        if (about.st_dev, about.st_ino) in entered:
            below.clear()
            continue
        entered.add((about.st_dev, about.st_ino))
        below[:] = sorted(name for name in below if not is_hidden(name))
        yield from (path for name in sorted(names) if not is_hidden(name) and (path := Path(top, name)).is_file())


_Done: TypeAlias = tuple[Outcome, str, Path]
"""What an import did, what the file holds, and where that lies now."""


# -------------------------------------------------------------------------------------------------------- importing


@dataclass
class _Import:
    """An import in progress."""

    settings: Settings
    folder: Path
    files: list[_File]
    device: torch.device
    overwrite: bool
    rows: list[Row] = field(default_factory=list)
    runs: list[SAERun] = field(default_factory=list)
    """The SAEs that files were taken to belong to."""
    taken: dict[Path, Path] = field(default_factory=dict)
    """Artifact -> the file that it was made from."""

    @property
    def artifacts(self) -> Artifacts:
        return Artifacts(self.settings)

    def each(self, kind: str, function: Callable[[_File], _Done]) -> None:
        """Import every file of a kind."""
        for file in self.files:
            if file.kind == kind:
                self.attempt([file], partial(function, file))

    def attempt(self, files: Sequence[_File], function: Callable[[], _Done]) -> None:
        """Import files and add a line to the report; what cannot be used is refused there."""
        names = [os.path.relpath(file.path, self.folder) for file in files]
        shown = ", ".join(names)
        if len(names) > 1 and len(folders := {os.path.dirname(name) for name in names}) == 1:
            shown = os.path.join(folders.pop(), f"{{{','.join(os.path.basename(name) for name in names)}}}")
        try:
            outcome, what, target = function()
        except (UserError, CheckpointError) as error:
            self.rows.append(Row("refused", shown, (str(error),)))
            return
        status = {Outcome.RAN: "imported", Outcome.ALREADY_DONE: "already done", Outcome.PROVIDED: "in place"}[outcome]
        self.rows.append(Row(status, what, (shown, f"-> {target}")))

    def make(
        self,
        sources: Iterable[Path],
        target: Path,
        write: Callable[[], Iterable[Path]],
        *,
        inputs: Mapping[str, Path] | None = None,
        settings: Mapping[str, Any] | None = None,
        run: Mapping[str, Any] | None = None,
        files: Callable[[], Iterable[Path]] | None = None,
        before: Callable[[], object] = lambda: None,
        **details: Any,
    ) -> Outcome:
        """Make an artifact of files of the authors.

        Raises UserError if something else is there and --overwrite was not given, or another file was taken for the same.
        """
        sources = list(sources)
        prints = {f"published {path.name}": file_hash(path) for path in sources}
        first = self.taken.setdefault(target, sources[0])
        if first != sources[0] and file_hash(first) != file_hash(sources[0]):
            raise UserError(
                f"{sources[0]} and {first} were both taken for {target}: import their folders one by one, and say "
                "what the files are with --img_enc_name, --sae_dataset, --probe_dataset, --sae or --probe"
            )
        if manifest_path(target).parent == target and target.is_file():
            raise UserError(
                f"{target} is a file, where a folder must go: move the authors' files out of the roots of config.py"
            )
        with making(
            target, IMPORTED, settings or {}, {**prints, **(inputs or {})}, overwrite=self.overwrite, run=run, files=files,
            before=before,
        ) as work:  # fmt: skip
            if work.needed:
                outputs = list(write())
                work.done(outputs, imported_from=[str(path.absolute()) for path in sources], **details)
        if work.outcome is Outcome.PROVIDED and file_hash(target) not in prints.values():
            raise UserError(f"{target} is there, and it is another file: pass --overwrite to replace it, or move it away")
        return work.outcome

    def copy(self, file: _File, target: Path, **about: Any) -> Outcome:
        """Copy a file unchanged, unless it lies where it belongs."""
        if target.exists() and file.path.samefile(target):
            return Outcome.PROVIDED

        def write() -> list[Path]:
            with whole_file(target) as temporary:
                shutil.copyfile(file.path, temporary)
            return [target]

        return self.make([file.path], target, write, **about)

    # What a file is of

    @property
    def defaults(self) -> dict[str, Any]:
        """Flag -> default of the config; the authors' SAEs are all of one type."""
        return config_defaults(self.settings) | {"sae_type": "relu", "input_transform": "none"}

    def run_of(self, file: _File, expansion_factor: int | None = None) -> SAERun:
        """The SAE that a file belongs to: the one that is named, else the only one found that agrees, else the default."""
        told = {flag: file.told[flag] for flag in ("img_enc_name", "sae_dataset") if flag in file.told}
        if "sae" in file.told:
            try:
                named = flags_of_published_sae(file.told["sae"])
            except ValueError as error:
                raise UserError(f"{file.path}: the SAE {file.told['sae']}: {error}") from error
            places = {flag: self.defaults[flag] for flag in ("img_enc_name", "sae_dataset") if flag in self.defaults}
            return self._taken_for(build(SAERun, places | named | told))
        found = [run for run in self.runs if all(values(run)[flag] == value for flag, value in told.items())]
        if expansion_factor is None and len(found) == 1:
            return found[0]
        factor = {} if expansion_factor is None else {"expansion_factor": expansion_factor}
        return self._taken_for(build(SAERun, self.defaults | factor | told))

    def _taken_for(self, run: SAERun) -> SAERun:
        self.settings.encoder(run.encoder)  # which must be in the config
        if run.dataset not in self.settings.sae_datasets:
            known = ", ".join(self.settings.sae_datasets) or "nothing"
            raise UserError(
                f"--sae_dataset {run.dataset!r} is not in `sae_datasets` of {self.settings.path}, which has: {known}"
            )
        if run not in self.runs:
            self.runs.append(run)
        return run

    def encoder_of(self, file: _File) -> str:
        """The encoder of a file: the one that is named, else that of the SAEs found, else the default."""
        of_runs = {run.encoder for run in self.runs}
        name = file.told.get("img_enc_name") or (of_runs.pop() if len(of_runs) == 1 else None)
        encoder = build(NamedEncoder, self.defaults | ({"img_enc_name": name} if name else {})).encoder
        self.settings.encoder(encoder)  # which must be in the config
        return encoder

    def dataset_of(self, file: _File) -> str:
        """The probe data set that a file is of. Raises UserError if nothing tells, or config.py lacks it."""
        dataset = file.told.get("probe_dataset")
        if dataset is None:
            raise UserError(f"{file.path}: no folder is the name of a data set of config.py: name it with --probe_dataset")
        self.settings.own_split(dataset, "train")
        return str(dataset)

    def published_sae(self, file: _File, run: SAERun) -> tuple[Path, SparseAutoencoder]:
        """The published SAE of a run. Raises UserError if it is missing, or another is in use, which was trained here."""
        path = self.artifacts.published_sae(run)
        if self.artifacts.sae_in_use(run) != path:
            state = "was trained here" if self.artifacts.sae(run).is_file() else "is missing"
            raise UserError(
                f"{file.path} belongs to the SAE {run.config_name} of {run.dataset} and {run.encoder}, which {state}: import "
                f"it together with its {published_name('sae')}, or say with --sae which is meant"
            )
        return path, load_sae(self.settings, run)

    # Files that are copied

    def sae(self, file: _File) -> _Done:
        model = load_checkpoint(file.path)
        shape = f"{model.n_latents} latents of {model.n_inputs} features"
        factor, rest = divmod(model.n_latents, model.n_inputs)
        if rest:
            raise UserError(f"{file.path} has {shape}, which is no whole expansion factor")
        run = self.run_of(file, factor)
        if run.expansion_factor != factor:
            raise UserError(f"{file.path} has {shape}, which is not the expansion factor of {run.config_name}")
        width = _width(self.settings, run.encoder)
        if width not in (None, model.n_inputs):
            raise UserError(
                f"{file.path} has {shape}, but {run.encoder} gives {width}: say with --img_enc_name which encoder it is of"
            )
        if self.artifacts.sae(run).is_file():
            raise UserError(
                f"{file.path} would never be used, since {self.artifacts.sae(run)} was trained here: import it under another "
                f"name, with --sae {run.config_name}_published, or move that away"
            )
        target = self.artifacts.published_sae(run)
        return self.copy(file, target, run=values(run), latents=model.n_latents), f"SAE of {shape}", target

    def words(self, file: _File) -> _Done:
        target = self.artifacts.words()
        if target.is_file():  # words have no manifest: anybody may edit them
            if file_hash(file.path) != file_hash(target) and not self.overwrite:
                raise UserError(f"{target} has other words than {file.path}: pass --overwrite to replace it")
            if file_hash(file.path) == file_hash(target):
                return Outcome.ALREADY_DONE, "words", target
        with whole_file(target) as temporary:
            shutil.copyfile(file.path, temporary)
        return Outcome.RAN, "words", target

    def names(self, file: _File) -> _Done:
        run = self.run_of(file)
        checkpoint, model = self.published_sae(file, run)
        try:
            names = names_in(file.path)
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"{file.path} is no list of index,name: {first_line(error)}") from error
        if len(names) != model.n_latents:
            raise UserError(f"{file.path} names {len(names)} latents, but the SAE has {model.n_latents}")
        target, ours = self.artifacts.published_names(run), self.artifacts.concept_names(run)
        outcome = self.copy(file, target, inputs={"SAE": checkpoint}, latents=len(names))
        used = f", but {ours} is used before it" if ours.is_file() else ""
        return outcome, f"names of {len(names)} latents{used}", target

    def embeddings(self, file: _File) -> _Done:
        vocabulary = f"_{self.settings.vocabulary}"
        if not file.path.stem.endswith(vocabulary):
            raise UserError(
                f"{file.path}: its name does not end with {vocabulary}.pth, the `vocabulary` in {self.settings.path}"
            )
        if "img_enc_name" not in file.told:
            raise UserError(
                f"{file.path}: no encoder of {self.settings.path} has this name: say with --img_enc_name which it is"
            )
        named = self.encoder_of(file)
        found = read_matrix(file.path)
        words, checked = self.artifacts.words(), ""
        if words.is_file():
            n_words = sum(bool(line.strip()) for line in words.read_text(encoding="utf-8-sig").splitlines())
            if len(found) != n_words:
                raise UserError(
                    f"{file.path} has {len(found)} rows, but {words} has {n_words} words: they do not belong together"
                )
            checked = f" of {n_words} words"
        self._check_width(file.path, found, named)
        check_rows(found, file.path)
        ours, target = self.artifacts.embeddings(named), self.artifacts.published_embeddings(named)
        if ours.is_file() and not self.overwrite:
            raise UserError(
                f"{file.path} would replace {ours}, which was made here: pass --overwrite to use the published file"
            )
        run = values(NamedEncoder(named))
        return self.copy(file, target, run=run, words=len(found)), f"embeddings{checked}", target

    def _check_width(self, path: Path, found: torch.Tensor, encoder: str) -> None:
        """Raises UserError if something of an encoder has another width than its SAEs, or than is known of it."""
        saes = [run for run in self.runs if run.encoder == encoder and self.artifacts.published_sae(run).is_file()]
        widths = {load_sae(self.settings, run).n_inputs for run in saes} or {_width(self.settings, encoder)} - {None}
        if widths and found.shape[1] not in widths:
            raise UserError(
                f"{path} has {found.shape[1]} features per row, but {encoder} has {', '.join(map(str, widths))}: it is of "
                "another encoder"
            )

    # Labels and the split

    def splits(self) -> None:
        """Import the labels and the indices of every probe data set, which several files hold together."""
        by_dataset: dict[str | None, list[_File]] = {}
        for file in self.files:
            if file.kind in ("indices", "labels"):
                by_dataset.setdefault(file.told.get("probe_dataset"), []).append(file)
        for files in by_dataset.values():
            self.attempt(files, partial(self.split, files))

    def split(self, files: Sequence[_File]) -> _Done:
        dataset = self.dataset_of(files[0])
        by_kind: dict[str, dict[str, Path]] = {"indices": {}, "labels": {}}
        for one in files:
            if (first := by_kind[one.kind].setdefault(one.told["probe_split"], one.path)) != one.path:
                raise UserError(f"{one.path} and {first} were both taken for {dataset}: import their folders one by one")
        if self.settings.own_split(dataset, "train_val") == "train_val":
            raise UserError(
                f"{files[0].path.parent}: the authors' train_val is part of train, but {self.settings.path} names a "
                f"train_val that {dataset} brings: leave it out of `probe_datasets`"
            )
        indices = {split: read_integers(path) for split, path in by_kind["indices"].items()}
        labels = {split: read_integers(path) for split, path in by_kind["labels"].items()}
        target = self.artifacts.probe_split(dataset)
        if missing := [split for split in ("train", "train_val") if split not in indices]:
            absent = " and no ".join(published_name("indices", split) for split in missing)
            raise UserError(
                f"{files[0].path.parent} has no {absent}, so that nobody knows which images the rows and labels of train are: "
                f"add it, or make the split with {PROBE_FEATURES.command('--probe_dataset', dataset)}"
            )
        order = np.concatenate([indices["train"], indices["train_val"]])
        if not len(order) or not np.array_equal(np.sort(order), np.arange(len(order))):
            raise UserError(
                f"{by_kind['indices']['train']} and {by_kind['indices']['train_val']} do not divide one set of images"
            )
        images = self._images(dataset)
        if images:
            own = labels_of_images(images, indices, labels, by_kind["labels"])
            names = list(images["train"].class_names)
        else:
            own = labels_of_files(indices, labels, by_kind["labels"], files[0].path.parent)
            names = [f"class {number}" for number in range(1 + max(int(found.max()) for found in own.values()))]
        arrays = {self.artifacts.labels(dataset, split): found for split, found in own.items()}
        arrays |= {self.artifacts.split_indices(dataset, split): found for split, found in indices.items()}
        about: dict[str, Any] = {"class_names": names}
        for split, found in images.items():
            if found.groups is not None:
                arrays[self.artifacts.groups(dataset, split)] = found.groups
                about["group_names"] = list(found.group_names)
        sizes = {split: len(found) for split, found in (indices | {"val": own["val"]}).items()}

        def write() -> list[Path]:
            for path, array in arrays.items():
                with whole_file(path) as temporary:
                    np.save(temporary, array)
            write_json(target, about | {"sizes": sizes})
            return [target, *arrays]

        named_by = "images" if images else "numbers"
        outcome = self.make([one.path for one in files], target, write, settings={"class names": named_by})
        said = "" if images else " (numbered: no file of the authors names them, and the images are missing)"
        return outcome, f"labels and split of {dataset}, {counted(len(names), 'class')[:-1]}es{said}", target

    def _images(self, dataset: str) -> dict[str, ProbeImages]:
        """The images of a data set by own split; none if their folder is missing."""
        if not self.settings.probe_datasets[dataset].path.is_dir():
            return {}
        return {split: probe_images(self.settings, dataset, split) for split in ("train", "val")}

    def keys(self, file: _File, dataset: str, n_rows: int) -> NDArray[np.int64]:
        """The index in the data set's own split of each row of a file. Raises UserError if it is unknown, or of other rows."""
        split, split_file = file.told["probe_split"], self.artifacts.probe_split(dataset)
        if split == "val":
            labels = self.artifacts.labels(dataset, "val")
            keys = np.arange(len(np.load(labels, mmap_mode="r")) if labels.is_file() else n_rows)
        else:
            is_theirs = manifest_path(split_file).is_file() and read_manifest(split_file)["stage"] == IMPORTED
            if not is_theirs:
                here = "the split here is another" if split_file.is_file() else "they are missing"
                raise UserError(
                    f"{file.path}: its rows are in the random order of train_idxs.pth and train_val_idxs.pth, and {here}: "
                    "import those with it" + (", with --overwrite" if split_file.is_file() else "")
                )
            check_chain(split_file)
            keys = np.load(self.artifacts.split_indices(dataset, split))
        if len(keys) != n_rows:
            raise UserError(f"{file.path} has {n_rows} rows, but {split} of {dataset} has {counted(len(keys), 'label')}")
        return keys

    # Files that are converted

    def features(self, file: _File) -> _Done:
        told, split = file.told, file.told["probe_split"]
        place = told | {"img_enc_name": self.encoder_of(file)}
        found = read_matrix(file.path)
        of_probe = "probe_dataset" in (told if "sae_dataset" not in file.by_name else file.by_name)
        about: SAEFeatures | ProbeFeatures
        inputs: dict[str, Path] = {}
        if of_probe:
            about = build(ProbeFeatures, place)
            keys = self.keys(file, self.dataset_of(file), len(found))
            if manifest_path(split_file := self.artifacts.probe_split(about.dataset)).is_file():
                inputs["split"] = split_file
        elif "sae_dataset" in told:
            about = build(SAEFeatures, place)
            keys = np.arange(len(found))
        else:
            raise UserError(
                f"{file.path}: no folder is the name of a data set of config.py: name it with --probe_dataset or --sae_dataset"
            )
        self._check_width(file.path, found, about.encoder)
        target = self.artifacts.features(about.dataset, about.encoder, about.hook, split)
        outcome = self.make(
            [file.path], target, partial(write_features, found, keys, target, f"{about.dataset} {split}"), inputs=inputs,
            run=values(about), before=partial(check_rows, found, file.path), images=len(found),
        )  # fmt: skip
        return outcome, f"features of {counted(len(found), 'image')}, {about.dataset} {split}", target

    def strengths(self, file: _File) -> _Done:
        dataset, run, split = self.dataset_of(file), self.run_of(file), file.told.get("probe_split")
        if split is None:
            raise UserError(f"{file.path}: it must lie in a folder called {', '.join(SPLITS)}, which says what its rows are")
        checkpoint, model = self.published_sae(file, run)
        found = read_matrix(file.path)
        if found.shape[1] != model.n_latents:
            raise UserError(f"{file.path} has {found.shape[1]} concepts, but the SAE {checkpoint} has {model.n_latents}")
        keys = self.keys(file, dataset, len(found))
        inputs = {"SAE": checkpoint}
        features = self.artifacts.features(dataset, run.encoder, run.hook, split)
        split_file = self.artifacts.probe_split(dataset)
        if manifest_path(features).is_file():
            inputs[f"{split} features"] = features
        elif manifest_path(split_file).is_file():
            inputs["split"] = split_file

        def check() -> None:
            check_rows(found, file.path, least=0)
            if manifest_path(features).is_file():
                self._compare(file, run, dataset, model, found, keys)

        target = self.artifacts.strengths(run, dataset, split)
        shown = values(run) | values(ProbeDataset(dataset)) | values(Splits(split))
        write = partial(write_strengths, found, keys, target, f"{dataset} {split}")
        outcome = self.make(
            [file.path], target, write, inputs=inputs, run=shown, before=check, images=len(found), latents=model.n_latents
        )
        return outcome, f"concept strengths of {counted(len(found), 'image')}, {dataset} {split}", target

    def _compare(
        self, file: _File, run: SAERun, dataset: str, model: SparseAutoencoder, found: torch.Tensor, keys: NDArray[np.int64]
    ) -> None:
        """Raises UserError if strengths are not what the SAE makes of the features, as a sample of the images shows."""
        store = open_features(self.settings, dataset, run.encoder, run.hook, file.told["probe_split"])
        _, rows, places = np.intersect1d(keys, store.keys, return_indices=True)
        if not len(rows):
            return
        sample = np.unique(np.linspace(0, len(rows) - 1, COMPARED).astype(np.int64))
        with torch.inference_mode():
            wanted = model.encode(store.gather(places[sample]))
        error = torch.linalg.vector_norm(found[torch.from_numpy(rows[sample])].float() - wanted)
        if error > MOST_DIFFERENT * torch.linalg.vector_norm(wanted):
            raise UserError(
                f"{file.path} does not hold what the SAE {self.artifacts.published_sae(run)} makes of the features "
                f"{store.folder}: it belongs to another SAE, or its rows are in another order"
            )

    def probe(self, file: _File) -> _Done:
        dataset = self.dataset_of(file)
        run = self.run_of(file)
        try:
            named = flags_of_published_probe(file.told["probe"])
        except ValueError as error:
            raise UserError(f"{file.path}: the probe {file.told['probe']}: {error}") from error
        probe = build(ProbeRun, named | {"probe_dataset": dataset, "probe_on_features": file.told["probe_on_features"]})
        weight, accuracy = read_probe(file.path)
        inputs: dict[str, Path] = {}
        if probe.on_features:
            self._check_width(file.path, weight, run.encoder)
        else:
            inputs["SAE"], model = self.published_sae(file, run)
            if weight.shape[1] != model.n_latents:
                raise UserError(f"{file.path} reads {weight.shape[1]} concepts, but the SAE has {model.n_latents}")
        if self.artifacts.probe_split(dataset).is_file():
            n_classes = len(probe_class_names(self.settings, dataset))
            if len(weight) != n_classes:
                raise UserError(f"{file.path} has {len(weight)} classes, but {dataset} has {n_classes}")
        target, accuracies = self.artifacts.probe(run, probe), self.artifacts.probe_accuracies(run, probe)
        data: dict[str, ProbeData] = {}
        metrics: dict[str, float] = {}

        def load() -> None:
            if not self._not_evaluable(run, probe):
                data.update({split: load_probe_data(self.settings, run, probe, split) for split in SPLITS})

        def evaluate() -> None:
            metrics.update(record_accuracy(self.settings, run, probe, weight.T.contiguous().to(self.device), data)[0])

        def write() -> list[Path]:
            save_probe(weight.T, target)
            if data:
                evaluate()
            return [target, accuracies] if data else [target]

        shown = values(ImageEncoder(run.encoder, run.hook) if probe.on_features else run) | values(probe)
        files = partial(self.artifacts.probe_files, run, probe)
        outcome = self.make(
            [file.path],
            target,
            write,
            inputs=inputs,
            run=shown,
            files=files,
            before=load,
            classes=len(weight),
            metrics=metrics,
        )
        if outcome is Outcome.ALREADY_DONE and not accuracies.is_file():  # its inputs or the labels were missing before
            load()
            if data:
                evaluate()
        said = "" if accuracies.is_file() else f", not evaluated: {self._not_evaluable(run, probe)}"
        if metrics:
            said = _compared(target, metrics["val_top1"], accuracy)
        return outcome, f"probe on {probe.inputs} of {dataset}{said}", target

    def _not_evaluable(self, run: SAERun, probe: ProbeRun) -> str:
        """What a probe lacks to be evaluated; nothing if its inputs and the labels are there."""
        if not self.artifacts.probe_split(probe.dataset).is_file():
            return "there are no labels"
        for split in SPLITS:
            folder = (
                self.artifacts.features(probe.dataset, run.encoder, run.hook, split)
                if probe.on_features
                else self.artifacts.strengths(run, probe.dataset, split)
            )
            if not manifest_path(folder).is_file():
                return f"the {probe.inputs} of {split} are missing"
        return ""


def _compared(probe: Path, ours: float, theirs: float | None) -> str:
    """The accuracy of a probe on val, for the report, beside that in the authors' file; a warning if they differ."""
    if theirs is None:
        return f", top-1 {ours:.1%} on val"
    if abs(ours - theirs) > FAR_OFF:
        messages.warning(
            f"{probe}: top-1 on val is {ours:.1%} here, and {theirs:.1%} in the authors' file: the labels or the probe's "
            "inputs may be others, or in another order"
        )
    return f", top-1 {ours:.1%} on val ({theirs:.1%} in the file)"


@cache
def _width_of_model(model: str) -> int | None:
    import open_clip

    return (open_clip.get_model_config(model) or {}).get("embed_dim")


def _width(settings: Settings, encoder: str) -> int | None:
    """The number of features of an encoder, as far as open_clip knows without its weights."""
    model = settings.encoder(encoder).model
    return None if model.startswith((LOCAL_DIR, "hf-hub:")) else _width_of_model(model)


IMPORT_PUBLISHED = commands.IMPORT_PUBLISHED.stage(function=import_published)
