"""Import what the paper's authors publish, or their code writes, into the layout of the stages.

Their files are PyTorch's: state dicts, dense tensors without keys, labels and indices as tensors. Each is recognised by its
name, read with `weights_only=True`, checked, and copied or converted in pieces. What it belongs to follows from the flags,
else from the names of its folders, else from the defaults.
"""

import csv
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from dncbm.bottleneck import published_files as formats
from dncbm.bottleneck.published_report import Row, missing, print_report
from dncbm.concepts.naming import names_in
from dncbm.concepts.sae import load_sae
from dncbm.concepts.vocabulary import read_words
from dncbm.features.datasets import counted
from dncbm.features.datasets.probe import ProbeImages, probe_images
from dncbm.features.hub import HUB
from dncbm.features.stage import PROBE_FEATURES, open_features, probe_class_names
from dncbm.features.store import FeatureStore
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
from dncbm.runs.results import check_results
from dncbm.runs.settings import LOCAL_DIR, Settings
from sparse_autoencoder import CheckpointError, SparseAutoencoder, load_checkpoint
from sparse_autoencoder.declare import build, values
from sparse_autoencoder.files import whole_file

COMPARED = 64
"""Images whose imported strengths are compared with what the SAE gives."""
MOST_DIFFERENT = 0.1
"""Norm of the difference, relative to that of the latents, above which strengths are not those of the SAE and the features."""
FAR_OFF = 0.005
"""Difference in accuracy from what a probe's file says at which the user is warned."""
PLACES = ("img_enc_name", "sae_dataset")
"""The flags of an SAE that its name does not hold."""
STATUS = {Outcome.RAN: "imported", Outcome.ALREADY_DONE: "already done", Outcome.PROVIDED: "in place"}
messages = logging.getLogger(__name__)

_Done: TypeAlias = tuple[Outcome, str, Path]
"""What an import did, what the file holds, and where that lies now."""


def import_published(
    settings: Settings,
    published: Published,
    sae: NamedSAE,
    probe: NamedProbe,
    *,
    device: str = "auto",
    overwrite: bool = False,
) -> Outcome:
    """Stage 12: put the authors' files where the stages expect them; list what was found, and what is missing with its stage.

    SAEs, names and embeddings are copied unchanged. Features and strengths get keys: `val` is in the order of the data set,
    `train` and `train_val` in that of `train_idxs.pth` and `train_val_idxs.pth`. A probe whose inputs and labels exist
    gets its row of `probe_results.csv`.

    Raises UserError if the folder is missing or has none of their files; or, after all others have been imported, if a file
    could not be used.
    """
    folder = published.folder
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name the folder of the published files")
    given = {"img_enc_name": published.encoder, "sae_dataset": published.sae_dataset, "probe_dataset": published.probe_dataset}
    given |= {"sae": sae.name, "probe": probe.name}
    files, n_others = _find(settings, folder, {flag: value for flag, value in given.items() if value is not None})
    if not files:
        called = ", ".join(published_name(kind, "train") for kind in PUBLISHED)
        raise UserError(
            f"{folder} has no file with a name of the authors' files ({called}), only {counted(n_others, 'other file')}: "
            "name the folder that has theirs"
        )
    defaults = config_defaults(settings) | {"sae_type": "relu", "input_transform": "none"}  # as all SAEs of the authors
    work = _Import(settings, resolve_device(device), overwrite, defaults)
    kinds: dict[str, Callable[..., _Done]] = {  # each needs the earlier ones
        "sae": work.sae, "words": work.words, "names": work.names, "embeddings": work.embeddings, "split": work.split,
        "features": work.features, "strengths": work.strengths, "probe": work.probe,
    }  # fmt: skip
    rows = list[Row]()
    for kind, function in kinds.items():
        together: dict[Any, list[_File]] = {}  # all labels and indices of a data set are one artifact
        for file in files:
            if kind == ("split" if file.kind in ("indices", "labels") else file.kind):
                together.setdefault(file.told.get("probe_dataset") if kind == "split" else file.path, []).append(file)
        for of_artifact in together.values():
            shown = ", ".join([os.path.relpath(of_artifact[0].path, folder), *(file.path.name for file in of_artifact[1:])])
            try:
                outcome, what, target = function(*of_artifact)
                rows.append((STATUS[outcome], what, shown, f"-> {target}"))
            except (UserError, CheckpointError) as error:
                rows.append(("refused", shown, str(error)))
    datasets = dict.fromkeys(str(file.told.get("probe_dataset")) for file in files)
    probed = {str(file.told.get("probe_dataset")) for file in files if file.kind == "probe"}
    print_report([*rows, *missing(settings, work.runs, list(datasets), probed)])
    if n_others:
        print(f"{counted(n_others, 'file')} of other names {'was' if n_others == 1 else 'were'} not opened")
    statuses = [status for status, *_ in rows]
    if n_refused := statuses.count("refused"):
        raise UserError(f"{n_refused} of the {len(rows)} entries above could not be imported, for the reasons there")
    return Outcome.RAN if "imported" in statuses else Outcome.ALREADY_DONE


# --------------------------------------------------------------------------------------------------- what was found


class _File(NamedTuple):
    """One of the authors' files."""

    path: Path
    kind: str
    by_name: dict[str, Any]
    """Flag -> value that its name and its folders tell."""
    told: dict[str, Any]
    """Flag -> value, with the flags of the command line, which win."""


def _find(settings: Settings, folder: Path, given: dict[str, Any]) -> tuple[list[_File], int]:
    """The files with names of the authors' files, and the number of others. What was made or imported here is left out."""

    def fail(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from error

    words = Artifacts(settings).words().name
    files, n_others, entered = list[_File](), 0, set[str]()
    for top, below, names in os.walk(folder, onerror=fail, followlinks=True):
        if (real := os.path.realpath(top)) in entered:  # links may lead in circles
            below.clear()
            continue
        entered.add(real)
        below.sort()
        for path in (Path(top, name) for name in sorted(names)):
            if not path.is_file() or manifest_path(path).is_file():
                continue
            found = ("words", {}) if path.name == words else published_file(path, settings)
            if found is None:
                n_others += 1
            else:
                kind, told = found
                files.append(_File(path, kind, told, told | given))
    return files, n_others


# -------------------------------------------------------------------------------------------------------- importing


@dataclass
class _Import:
    """An import in progress. Its methods raise UserError if files cannot be used."""

    settings: Settings
    device: torch.device
    overwrite: bool
    defaults: dict[str, Any]
    """Flag -> value where neither flags nor folders tell."""
    runs: list[SAERun] = field(default_factory=list)
    """The SAEs that files were taken to belong to."""
    taken: dict[Path, Path] = field(default_factory=dict)
    """Artifact -> the file that it was made from."""
    widths: dict[str, int] = field(default_factory=dict)
    """Encoder -> its number of features, which its SAE tells."""

    def __post_init__(self) -> None:
        self.artifacts = Artifacts(self.settings)

    def make(
        self,
        sources: Sequence[Path],
        target: Path,
        write: Callable[[], Iterable[Path]],
        *,
        inputs: Mapping[str, Path] | None = None,
        settings: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        **options: Any,
    ) -> Outcome:
        """Make an artifact of files of the authors; `options` are those of `making`.

        Refuses if something else exists there and --overwrite was not given, or another file was taken for the same.
        """
        made_of: dict[str, Path | str] = {f"published {path.name}": file_hash(path) for path in sources}
        prints = list(made_of.values())
        first = self.taken.setdefault(target, sources[0])
        if first != sources[0] and file_hash(first) not in prints:
            raise UserError(
                f"{first} was taken for {target}, too: import their folders one by one, and say what the files are with "
                "--img_enc_name, --sae_dataset, --probe_dataset, --sae or --probe"
            )
        if manifest_path(target).parent == target and target.is_file():
            raise UserError(f"{target} is a file where a folder must go: move the authors' files out of config.py's folders")
        made_of |= inputs or {}
        with making(target, IMPORTED, settings or {}, made_of, overwrite=self.overwrite, **options) as work:
            if work.needed:
                work.done(write(), imported_from=[str(path.absolute()) for path in sources], metrics=metrics or {})
        if work.outcome is Outcome.PROVIDED and file_hash(target) not in prints:
            raise UserError(f"{target} exists and is another file: pass --overwrite to replace it, or move it away")
        return work.outcome

    def copy(self, file: _File, target: Path, **about: Any) -> Outcome:
        """Copy a file unchanged, unless it is already in place."""
        if target.exists() and file.path.samefile(target):
            return Outcome.PROVIDED
        return self.make([file.path], target, lambda: [_copied(file.path, target)], **about)

    # What a file belongs to

    def run_of(self, file: _File, expansion_factor: int | None = None) -> SAERun:
        """The SAE that a file belongs to: the one that is named, else the only one found that agrees, else the default."""
        told = {flag: file.told[flag] for flag in PLACES if flag in file.told}
        found = [run for run in self.runs if told.items() <= values(run).items()]
        if "sae" in file.told:
            places = {flag: self.defaults[flag] for flag in PLACES if flag in self.defaults}
            run = build(SAERun, places | flags_of_published_sae(file.told["sae"]) | told)
        elif expansion_factor is None and len(found) == 1:
            return found[0]
        else:
            factor = {} if expansion_factor is None else {"expansion_factor": expansion_factor}
            run = build(SAERun, self.defaults | factor | told)
        self.settings.encoder(run.encoder)  # config.py must have both
        self.settings.sae_dataset(run.dataset)
        if run not in self.runs:
            self.runs.append(run)
        return run

    def encoder_of(self, file: _File) -> str:
        """The encoder of a file: the one that is named, else that of the SAEs found, else the default."""
        of_runs = {run.encoder for run in self.runs}
        known = {"img_enc_name": of_runs.pop()} if len(of_runs) == 1 else {}
        encoder = build(NamedEncoder, self.defaults | known | file.told).encoder
        self.settings.encoder(encoder)  # config.py must have it
        return encoder

    def dataset_of(self, file: _File) -> str:
        """The probe data set of a file, which config.py must have."""
        if "probe_dataset" not in file.told:
            raise UserError("no folder is the name of a data set of config.py: name it with --probe_dataset")
        self.settings.own_split(file.told["probe_dataset"], "train")
        return str(file.told["probe_dataset"])

    def published_sae(self, run: SAERun) -> tuple[Path, SparseAutoencoder]:
        """The published SAE of a run. Refused if it is missing, or another is in use, which was trained here."""
        path = self.artifacts.published_sae(run)
        if self.artifacts.sae_in_use(run) != path:
            state = "was trained here" if self.artifacts.sae(run).is_file() else "is missing"
            raise UserError(
                f"it belongs to the SAE {run.config_name} of {run.dataset} and {run.encoder}, which {state}: import it "
                f"together with its {published_name('sae')}, or say with --sae which is meant"
            )
        return path, load_sae(self.settings, run)

    def check_width(self, width: int, encoder: str) -> None:
        """Refuse a file of another number of features than its encoder has, as far as that is known."""
        wanted = self.widths.get(encoder) or _width(self.settings, encoder)
        if wanted not in (None, width):
            raise UserError(
                f"it has {width} features, but {encoder} has {wanted}: say with --img_enc_name which encoder it belongs to"
            )

    def keys(self, file: _File, dataset: str, n_rows: int) -> tuple[NDArray[np.int64], dict[str, Path]]:
        """The index in the data set's own split of each row of a file, and the artifact that says so, as an input.

        Rows of `val` are in the order of the data set, whatever the split.
        """
        split, split_file = file.told["probe_split"], self.artifacts.probe_split(dataset)
        if split == "val":
            labels = self.artifacts.labels(dataset, "val")
            keys, inputs = np.arange(len(np.load(labels, mmap_mode="r")) if labels.is_file() else n_rows), dict[str, Path]()
        else:
            if not manifest_path(split_file).is_file() or read_manifest(split_file)["stage"] != IMPORTED:
                why = "the split here is another: with --overwrite," if split_file.is_file() else "they are missing:"
                raise UserError(
                    f"its rows are in the order of train_idxs.pth and train_val_idxs.pth, and {why} import them too"
                )
            check_chain(split_file)
            keys, inputs = np.load(self.artifacts.split_indices(dataset, split)), {"split": split_file}
        if len(keys) != n_rows:
            raise UserError(f"it has {n_rows} rows, but {split} of {dataset} has {counted(len(keys), 'label')}")
        return keys, inputs

    # Files that are copied

    def sae(self, file: _File) -> _Done:
        model = load_checkpoint(file.path)
        shape = f"{model.n_latents} latents of {model.n_inputs} features"
        factor, rest = divmod(model.n_latents, model.n_inputs)
        if rest:
            raise UserError(f"it has {shape}, which is no whole expansion factor")
        run = self.run_of(file, factor)
        if run.expansion_factor != factor:
            raise UserError(f"it has {shape}, which is not the expansion factor of {run.config_name}")
        self.check_width(model.n_inputs, run.encoder)
        if self.artifacts.sae(run).is_file():
            raise UserError(
                f"it would never be used, since {self.artifacts.sae(run)} was trained here: import it under another name, "
                f"with --sae {run.config_name}_published, or move that away"
            )
        target = self.artifacts.published_sae(run)
        outcome = self.copy(file, target, run=values(run))
        self.widths[run.encoder] = model.n_inputs
        return outcome, f"SAE of {shape}", target

    def words(self, file: _File) -> _Done:
        target = self.artifacts.words()
        if target.is_file() and file_hash(file.path) == file_hash(target):
            return Outcome.ALREADY_DONE, "words", target
        if target.is_file() and not self.overwrite:
            raise UserError(f"{target} has other words: pass --overwrite to replace it")
        return Outcome.RAN, "words", _copied(file.path, target)  # without a manifest: anybody may edit them

    def names(self, file: _File) -> _Done:
        run = self.run_of(file)
        checkpoint, model = self.published_sae(run)
        try:
            n_names = len(names_in(file.path))
        except (OSError, ValueError, csv.Error) as error:
            raise UserError(f"it is no list of index,name: {first_line(error)}") from error
        if n_names != model.n_latents:
            raise UserError(f"it names {n_names} latents, but the SAE has {model.n_latents}")
        target, ours = self.artifacts.published_names(run), self.artifacts.concept_names(run)
        used = f", but {ours} is used before it" if ours.is_file() else ""
        return self.copy(file, target, inputs={"SAE": checkpoint}), f"names of {n_names} latents{used}", target

    def embeddings(self, file: _File) -> _Done:
        ending = f"_{self.settings.vocabulary}.pth"
        if not file.path.name.endswith(ending):
            raise UserError(f"its name does not end with {ending}, the `vocabulary` in {self.settings.path}")
        if "img_enc_name" not in file.told:
            raise UserError(f"no encoder of {self.settings.path} has this name: name it with --img_enc_name")
        encoder, found, words = self.encoder_of(file), formats.read_matrix(file.path), self.artifacts.words()
        if words.is_file() and len(found) != (n_words := len(read_words(self.settings))):
            raise UserError(f"it has {len(found)} rows, but {words} has {n_words} words: they do not belong together")
        self.check_width(found.shape[1], encoder)
        formats.check_rows(found)
        ours, target = self.artifacts.embeddings(encoder), self.artifacts.published_embeddings(encoder)
        if ours.is_file() and not self.overwrite:
            raise UserError(f"it would replace {ours}, which was made here: pass --overwrite to use the published file")
        outcome = self.copy(file, target, run=values(NamedEncoder(encoder)))
        return outcome, f"embeddings of {counted(len(found), 'word')}", target

    # Files that are converted

    def split(self, *files: _File) -> _Done:
        """The labels and the indices of a probe data set, which several files hold."""
        dataset = self.dataset_of(files[0])
        if self.settings.own_split(dataset, "train_val") == "train_val":
            raise UserError(
                f"the authors' train_val is part of train, but {self.settings.path} names a train_val that {dataset} brings: "
                "leave it out of `probe_datasets`"
            )
        paths: dict[str, dict[str, Path]] = {"indices": {}, "labels": {}}
        for file in files:
            if (first := paths[file.kind].setdefault(file.told["probe_split"], file.path)) != file.path:
                raise UserError(f"{file.path} and {first} were both taken for {dataset}: import their folders one by one")
        indices, labels = ({split: formats.read_integers(path) for split, path in of.items()} for of in paths.values())
        if lacking := [published_name("indices", split) for split in ("train", "train_val") if split not in indices]:
            raise UserError(
                f"there is no {' and no '.join(lacking)} beside them to say which images belong to train: add it, or "
                f"make the split with {PROBE_FEATURES.command('--probe_dataset', dataset)}"
            )
        order = np.concatenate([indices["train"], indices["train_val"]])
        if not np.array_equal(np.sort(order), np.arange(len(order))):
            raise UserError("train_idxs.pth and train_val_idxs.pth do not divide one set of images")
        images: dict[str, ProbeImages] = {}
        if self.settings.probe_datasets[dataset].path.is_dir():
            images = {split: probe_images(self.settings, dataset, split) for split in ("train", "val")}
        own = formats.own_labels(images, indices, labels)
        n_classes = 1 + max(int(found.max()) for found in own.values())
        names = list(images["train"].class_names) if images else [f"class {number}" for number in range(n_classes)]
        sizes = {split: len(rows) for split, rows in (indices | {"val": own["val"]}).items()}
        about: dict[str, Any] = {"class_names": names, "sizes": sizes}
        arrays = {self.artifacts.labels(dataset, split): found for split, found in own.items()}
        arrays |= {self.artifacts.split_indices(dataset, split): found for split, found in indices.items()}
        for split, of_split in images.items():
            if of_split.groups is not None:
                arrays[self.artifacts.groups(dataset, split)] = of_split.groups
                about["group_names"] = list(of_split.group_names)
        target = self.artifacts.probe_split(dataset)

        def write() -> list[Path]:
            for path, array in arrays.items():
                with whole_file(path) as temporary:
                    np.save(temporary, array)
            write_json(target, about)
            return [target, *arrays]

        recipe = {"class names": "images" if images else "numbers"}
        outcome = self.make([file.path for file in files], target, write, settings=recipe)
        said = "" if images else " (numbered: no file of the authors names them, and the images are missing)"
        return outcome, f"labels and split of {dataset}, {len(names)} classes{said}", target

    def features(self, file: _File) -> _Done:
        told, split = file.told | {"img_enc_name": self.encoder_of(file)}, file.told["probe_split"]
        found = formats.read_matrix(file.path)
        about: SAEFeatures | ProbeFeatures
        # --probe_dataset does not make features of the SAE's images those of the probe's.
        if "probe_dataset" in (file.by_name if "sae_dataset" in file.by_name else told):
            about = build(ProbeFeatures, told)
            keys, inputs = self.keys(file, self.dataset_of(file), len(found))
        elif "sae_dataset" in told:
            about, keys, inputs = build(SAEFeatures, told), np.arange(len(found)), {}
        else:
            raise UserError("no folder is the name of a data set of config.py: name it with --probe_dataset or --sae_dataset")
        self.check_width(found.shape[1], about.encoder)
        target, what = self.artifacts.features(about.dataset, about.encoder, about.hook, split), f"{about.dataset} {split}"
        outcome = self.make(
            [file.path], target, partial(formats.write_features, found, keys, target, what), inputs=inputs,
            run=values(about), before=partial(formats.check_rows, found),
        )  # fmt: skip
        return outcome, f"features of {counted(len(found), 'image')}, {what}", target

    def strengths(self, file: _File) -> _Done:
        dataset, run, split = self.dataset_of(file), self.run_of(file), file.told.get("probe_split")
        if split is None:
            raise UserError(f"it must lie in a folder called {', '.join(SPLITS)}, which says what its rows are")
        checkpoint, model = self.published_sae(run)
        found = formats.read_matrix(file.path)
        if found.shape[1] != model.n_latents:
            raise UserError(f"it has {found.shape[1]} concepts, but the SAE {checkpoint} has {model.n_latents}")
        keys, inputs = self.keys(file, dataset, len(found))

        def check() -> None:
            formats.check_rows(found, least=0)
            if manifest_path(self.artifacts.features(dataset, run.encoder, run.hook, split)).is_file():
                _check_sample(found, keys, model, open_features(self.settings, dataset, run.encoder, run.hook, split))

        target, what = self.artifacts.strengths(run, dataset, split), f"{dataset} {split}"
        outcome = self.make(
            [file.path], target, partial(formats.write_strengths, found, keys, target, what), before=check,
            inputs={"SAE": checkpoint} | inputs, run=values(run) | values(ProbeDataset(dataset)) | values(Splits(split)),
        )  # fmt: skip
        return outcome, f"concept strengths of {counted(len(found), 'image')}, {what}", target

    def probe(self, file: _File) -> _Done:
        dataset, run = self.dataset_of(file), self.run_of(file)
        named = flags_of_published_probe(file.told["probe"])
        probe = build(ProbeRun, named | {"probe_dataset": dataset, "probe_on_features": file.told["probe_on_features"]})
        weight, theirs = formats.read_probe(file.path)
        inputs: dict[str, Path] = {}
        if probe.on_features:
            self.check_width(weight.shape[1], run.encoder)
        else:
            inputs["SAE"], model = self.published_sae(run)
            if weight.shape[1] != model.n_latents:
                raise UserError(f"it reads {weight.shape[1]} concepts, but the SAE has {model.n_latents}")
        if self.artifacts.probe_split(dataset).is_file():
            n_classes = len(probe_class_names(self.settings, dataset))
            if len(weight) != n_classes:
                raise UserError(f"it has {len(weight)} classes, but {dataset} has {n_classes}")
        target, accuracies = self.artifacts.probe(run, probe), self.artifacts.probe_accuracies(run, probe)
        data, metrics, said = dict[str, ProbeData](), dict[str, float](), ""

        def load() -> None:
            nonlocal said
            try:
                check_results(self.artifacts.probe_results())
                data.update({split: load_probe_data(self.settings, run, probe, split) for split in SPLITS})
            except UserError as error:
                said = f", not evaluated: {error}"

        def evaluate() -> list[Path]:
            if data:
                metrics.update(record_accuracy(self.settings, run, probe, weight.T.contiguous().to(self.device), data)[0])
            return [accuracies] if data else []

        def write() -> list[Path]:
            save_probe(weight.T, target)
            return [target, *evaluate()]

        outcome = self.make(
            [file.path], target, write, inputs=inputs, before=load, files=partial(self.artifacts.probe_files, run, probe),
            run=values(ImageEncoder(run.encoder, run.hook) if probe.on_features else run) | values(probe),
            metrics=metrics,
        )  # fmt: skip
        if outcome is Outcome.ALREADY_DONE and not accuracies.is_file():  # its inputs or the labels were missing before
            load()
            evaluate()
        if metrics:
            ours = metrics["val_top1"]
            said = f", top-1 {ours:.1%} on val" + ("" if theirs is None else f" ({theirs:.1%} in the file)")
            if theirs is not None and abs(ours - theirs) > FAR_OFF:
                messages.warning(
                    f"{target}: top-1 on val is {ours:.1%} here, and {theirs:.1%} in the authors' file: the labels or the "
                    "probe's inputs may be others, or in another order"
                )
        return outcome, f"probe on {probe.inputs} of {dataset}{said}", target


def _check_sample(found: torch.Tensor, keys: NDArray[np.int64], model: SparseAutoencoder, store: FeatureStore) -> None:
    """Raises UserError if strengths are not what the SAE makes of the features, as a sample of the images shows."""
    _, rows, places = np.intersect1d(keys, store.keys, return_indices=True)
    if not len(rows):
        return
    sample = np.unique(np.linspace(0, len(rows) - 1, COMPARED).astype(np.int64))
    with torch.inference_mode():
        wanted = model.encode(store.gather(places[sample]))
    error = torch.linalg.vector_norm(found[torch.from_numpy(rows[sample])].float() - wanted)
    if error > MOST_DIFFERENT * torch.linalg.vector_norm(wanted):
        raise UserError(
            f"it differs from what its SAE gives for the features {store.folder}: it belongs to another SAE, or its rows "
            "are in another order"
        )


def _copied(path: Path, target: Path) -> Path:
    """Copy a file, whole or not at all, and return where."""
    with whole_file(target) as temporary:
        shutil.copyfile(path, temporary)
    return target


def _width(settings: Settings, encoder: str) -> int | None:
    """The number of features of an encoder, as far as open_clip knows without its weights."""
    import open_clip

    model = settings.encoder(encoder).model
    return None if model.startswith((LOCAL_DIR, HUB)) else (open_clip.get_model_config(model) or {}).get("embed_dim")


IMPORT_PUBLISHED = commands.IMPORT_PUBLISHED.stage(function=import_published)
