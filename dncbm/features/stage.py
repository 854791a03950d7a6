"""The two stages that make features: of the SAE's images, and of the images that a probe classifies."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dncbm.features.datasets import ImageShards, counted, least_to_divide, random_split
from dncbm.features.datasets.probe import HELD_OUT, ProbeImages, ProbeShards, probe_images
from dncbm.features.datasets.sae import sae_images
from dncbm.features.encoders import Encoder, describe_encoder, load_encoder
from dncbm.features.encoding import are_from, changed_shards, drop_damaged_records, encode_part, extracted, missing_shards
from dncbm.features.store import ARRAYS, FeatureStore
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts, shard_files
from dncbm.runs.declarations import SPLITS, Extraction, Partition, ProbeFeatures, SAEFeatures, Splits
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import StaleArtifact, UserError, first_line
from dncbm.runs.manifests import Outcome, check_chain, making, manifest_path, read_manifest, text_hash, verifying, write_json
from dncbm.runs.partitions import UNDIVIDED, Part, Tally, part_of
from dncbm.runs.ranks import Ranks, device_name, joined
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder import DEFAULT_SEED
from sparse_autoencoder.declare import values
from sparse_autoencoder.files import whole_file

Features = SAEFeatures | ProbeFeatures


def save_sae_features(
    settings: Settings, features: SAEFeatures, extraction: Extraction, partition: Partition = UNDIVIDED,
    *, device: str = "auto", overwrite: bool = False,
) -> Outcome:  # fmt: skip
    """Stage 1: features of the images that the SAE is trained on, every split (METHOD section 1).

    A worker of a partition encodes its part; whichever finds all parts there writes the manifest, for the others the outcome
    is PART.

    Raises UserError if there is no such data set, shards or encoder, too many images are bad, features are NaN, or shards to
    merge are missing; StaleArtifact if there are features from other images or another encoder.
    """
    with joined() as ranks:
        part = ranks.first_makes(partial(part_of, partition))
        sources = ranks.first_makes(partial(sae_images, settings, features.dataset))
        overwrite = overwrite and not part.merges  # which makes nothing, and so must not remove anything
        return _save(SAE_FEATURES, settings, features, sources, {}, extraction, part, ranks, device, overwrite)


def save_probe_features(
    settings: Settings, features: ProbeFeatures, splits: Splits, extraction: Extraction, partition: Partition = UNDIVIDED,
    *, device: str = "auto", overwrite: bool = False,
) -> Outcome:  # fmt: skip
    """Stage 5: labels, split and features of a probe data set. Workers of a partition divide the features, as in stage 1.

    Raises UserError if there is no such data set or encoder, too many images are bad, features are NaN, or shards to merge
    are missing; StaleArtifact if there are labels or features from other images or another encoder.
    """
    dataset = features.dataset
    with joined() as ranks:
        part = ranks.first_makes(partial(part_of, partition))
        overwrite = overwrite and not part.merges  # which makes nothing, and so must not remove anything
        images, indices = ranks.first_makes(partial(_probe_split, settings, dataset, overwrite))
        sources: dict[str, ImageShards] = {
            split: ProbeShards(images[settings.own_split(dataset, split)], indices[split]) for split in splits.names
        }
        # Labels are read by the features' keys: other labels or another split make features stale, of whatever encoder.
        labels = {"split": Artifacts(settings).probe_split(dataset)}
        return _save(PROBE_FEATURES, settings, features, sources, labels, extraction, part, ranks, device, overwrite)


def _probe_split(
    settings: Settings, dataset: str, overwrite: bool
) -> tuple[dict[str, ProbeImages], dict[str, NDArray[np.int64]]]:
    """The images of a probe data set by own split, and the indices of each of our splits; saved together with the labels."""
    images = {split: probe_images(settings, dataset, split) for split in settings.probe_dataset(dataset).own_splits}
    artifacts = Artifacts(settings)
    indices = {split: np.arange(len(found.labels)) for split, found in images.items()}
    if "train_val" not in images:
        # 10 % as in DN-CBM's code. The split does not follow --seed: runs of several seeds are compared on the same images.
        indices |= random_split(len(images["train"].labels), DEFAULT_SEED, {"train_val": HELD_OUT})
    if empty := [split for split in SPLITS if not len(indices[split])]:
        n = counted(len(images["train"].labels), "image")
        raise UserError(
            f"no images for {empty[0]}: the train split of {dataset} has {n}, and at least {least_to_divide(HELD_OUT)} are "
            f"needed to hold a tenth out; probe_datasets[{dataset!r}] in {settings.path} names the folder"
        )
    split_file = artifacts.probe_split(dataset)
    hashes = {f"{split} images of {dataset}": labels_hash(found) for split, found in images.items()}
    with making(split_file, PROBE_FEATURES.name, {"seed": DEFAULT_SEED}, hashes, overwrite=overwrite, waits=True) as work:
        if work.needed:
            for note in dict.fromkeys(note for found in images.values() for note in found.notes):
                logging.getLogger(__name__).warning(note)
            arrays = {artifacts.labels(dataset, split): found.labels for split, found in images.items()}
            arrays |= {artifacts.split_indices(dataset, split): indices[split] for split in ("train", "train_val")}
            groups = {artifacts.groups(dataset, split): found.groups for split, found in images.items()}
            arrays |= {path: group for path, group in groups.items() if group is not None}
            for path, array in arrays.items():
                with whole_file(path) as temporary:
                    np.save(temporary, array)
            names: dict[str, Any] = {"class_names": images["train"].class_names}
            if images["train"].group_names:
                names["group_names"] = images["train"].group_names
            write_json(split_file, names | {"sizes": {split: len(indices[split]) for split in SPLITS}})
            work.done([split_file, *arrays])
    if work.outcome is Outcome.PROVIDED and artifacts.split_indices(dataset, "train").is_file():
        indices |= _given_indices(settings, dataset, images)
    return images, indices


def _given_indices(settings: Settings, dataset: str, images: Mapping[str, ProbeImages]) -> dict[str, NDArray[np.int64]]:
    """The indices of a split that was supplied or imported.

    Raises UserError if they are damaged, or the images have other labels than the split.
    """
    artifacts = Artifacts(settings)
    for own_split, found in images.items():
        path = artifacts.labels(dataset, own_split)
        if path.is_file() and not np.array_equal(_whole_numbers(path), found.labels):
            raise UserError(
                f"the images of {dataset} ({own_split}) have other labels than {path}, which was supplied: they are other "
                "images, or in another order; put back those that it was made from, or pass --overwrite to divide them again"
            )
    given = {split: _whole_numbers(artifacts.split_indices(dataset, split)) for split in ("train", "train_val")}
    for split, rows in given.items():
        n = len(images[settings.own_split(dataset, split)].labels)
        if not len(rows) or not 0 <= rows.min() <= rows.max() < n or len(np.unique(rows)) < len(rows):
            raise UserError(
                f"{artifacts.split_indices(dataset, split)} must hold distinct indices of the {counted(n, 'image')}: put the "
                "right file there, or pass --overwrite to divide them again"
            )
    return given


def _whole_numbers(path: Path) -> NDArray[np.int64]:
    """A supplied array of int64. Raises UserError if it is missing or damaged."""
    try:
        found: NDArray[np.int64] = np.load(path)
        if found.ndim != 1 or found.dtype != np.int64:
            raise ValueError(f"it holds {found.dtype} of the shape {found.shape}")
    except Exception as error:  # a damaged file can raise anything
        raise UserError(
            f"cannot read {path}: {first_line(error)}; put the right file there, or pass --overwrite to divide the images "
            "again"
        ) from error
    return found


def labels_hash(images: ProbeImages) -> str:
    """Hash of what the labels are: which image has which. An image that was replaced or repaired keeps its label."""
    names = images.image_names
    if names is None:
        found = images.content_hash
    else:
        lines = (f"{name} {label}" for name, label in zip(names, images.labels.tolist(), strict=True))
        found = text_hash((*images.class_names, *lines))
    return found if images.groups is None or names is None else text_hash([found, *map(str, images.groups)])


def _save(
    stage: Stage, settings: Settings, features: Features, sources: Mapping[str, ImageShards], labels: Mapping[str, Path],
    extraction: Extraction, part: Part, ranks: Ranks, device: str, overwrite: bool,
) -> Outcome:  # fmt: skip
    folders = _folders(Artifacts(settings), features, sources)
    described = ranks.first_makes(partial(describe_encoder, settings, features.encoder, folders))
    described |= {"hook": features.hook, "precision": extraction.precision or "the device's"}
    if extraction.background != "none":
        described["background"] = extraction.background
    tally = Tally(part)
    encoder: Encoder | None = None
    said: Counter[str] = Counter()

    def check_device() -> None:
        if not part.merges:
            resolve_device(device_name(device, ranks))

    def load() -> Encoder:
        where = resolve_device(device_name(device, ranks))
        return load_encoder(settings, features.encoder, where, extraction.precision)

    for folder, (split, shards) in zip(folders, sources.items(), strict=True):
        title = f"{features.dataset} {split}"
        ranks.first_makes(partial(_compare_parts, shards, folder, title, overwrite))
        make = partial(
            making, folder, stage.name, described, {f"{split} images of {features.dataset}": shards.fingerprint(), **labels},
            overwrite=overwrite, run=values(features) | values(extraction), parts_hold=partial(are_from, shards, folder),
            before=check_device, shared=part.is_shared,
        )  # fmt: skip
        with ranks.first(make) as work:
            if not work.needed:
                continue
            tally.made()
            if ranks.first_makes(partial(missing_shards, shards, folder, part)):
                encoder = encoder or ranks.after_first(load)  # which may download the weights
                encode_part(shards, encoder, folder, extraction, title, ranks, part)
            if part.is_shared and (missing := ranks.first_makes(partial(missing_shards, shards, folder))):
                tally.missing(title, len(shards), [shards.name(shard) for shard in missing], says=ranks.rank == 0)
                continue
            details = ranks.first_makes(partial(extracted, shards, folder, extraction.max_bad_fraction))
            work.done(folder.glob(ARRAYS), f"{counted(details['images'], 'image')} of {title}", **details)
            said.update(details["warnings"] | {TRANSPARENT: details["transparent"], "": details["images"]})
    if ranks.rank == 0:
        _warn_of(said, extraction.background, features.dataset)
    return ranks.first_makes(tally.end)


TRANSPARENT = "transparent"


def _compare_parts(shards: ImageShards, folder: Path, title: str, overwrite: bool) -> None:
    """With --verify, compare the images with those that features were made from; with --overwrite, drop what is damaged.

    Raises StaleArtifact if images of finished features have changed and `overwrite` is off.
    """
    if overwrite:
        drop_damaged_records(folder)
    changed = changed_shards(shards, folder) if verifying() else []
    if changed and not overwrite and manifest_path(folder).is_file():
        more = f" and of {counted(len(changed) - 1, 'other shard')}" if len(changed) > 1 else ""
        raise StaleArtifact(
            f"{folder} was made from other images ({title}: images of {shards.name(changed[0])}{more} have changed): pass "
            "--overwrite to read them again, or move it away",
            [f"images of {shards.name(shard)} have changed" for shard in changed],
        )
    for shard in changed:  # it is read again
        shard_files(folder, shard)[-1].unlink(missing_ok=True)


def _warn_of(said: Counter[str], background: str, dataset: str) -> None:
    """Say once what was noticed of the images of a run: transparency, and PIL's warnings by kind."""
    log, total = logging.getLogger(__name__), said.pop("", 0)
    if (n := said.pop(TRANSPARENT, 0)) and background == "none":
        log.warning(
            f"{n} of {counted(total, 'image')} of {dataset} {'has' if n == 1 else 'have'} transparent pixels, whose hidden "
            "colours the encoder has seen: pass --background white or black to put a colour behind them"
        )
    if kinds := ", ".join(f"{n} times {kind!r}" for kind, n in said.most_common(5) if n):
        log.warning(f"PIL warned of images of {dataset}: {kinds}{', and of other things' if len(said) > 5 else ''}")


def _folders(artifacts: Artifacts, features: Features, splits: Iterable[str]) -> list[Path]:
    return [artifacts.features(features.dataset, features.encoder, features.hook, split) for split in splits]


SAE_FEATURES = commands.SAE_FEATURES.stage(
    function=save_sae_features,
    outputs=lambda artifacts, features, *_: _folders(artifacts, features, SPLITS),
    makes="the features",
)
PROBE_FEATURES = commands.PROBE_FEATURES.stage(
    function=save_probe_features,
    outputs=lambda artifacts, features, splits, *_: _folders(artifacts, features, splits.names),
    makes="the features",
)


# ---------------------------------------------------------------------------------------------- finished outputs


def open_features(settings: Settings, dataset: str, encoder: str, hook: str, split: str) -> FeatureStore:
    """The finished features of a split.

    Raises UserError, naming the command that makes them, if there are none or they are damaged; StaleArtifact if the labels or
    the split have changed since.
    """
    is_sae = dataset in settings.sae_datasets
    stage, flag = (SAE_FEATURES, "--sae_dataset") if is_sae else (PROBE_FEATURES, "--probe_dataset")
    made_by = stage.command("--img_enc_name", encoder, flag, dataset)
    return FeatureStore(Artifacts(settings).features(dataset, encoder, hook, split), made_by)


def are_extracted(settings: Settings, images: ProbeImages, dataset: str, encoder: str, hook: str, split: str) -> bool:
    """Whether images of an own split are those that the features of a split were extracted from, as far as that is known."""
    artifacts = Artifacts(settings)
    folder, indices_file = artifacts.features(dataset, encoder, hook, split), artifacts.split_indices(dataset, split)
    if not manifest_path(folder).is_file():
        return True
    indices = np.load(indices_file) if indices_file.is_file() else np.arange(len(images.labels))
    recorded = read_manifest(folder)["inputs"].get(f"{split} images of {dataset}")
    return recorded in (None, ProbeShards(images, indices).fingerprint())


def features_background(settings: Settings, dataset: str, encoder: str, hook: str, split: str) -> str:
    """The background behind transparent images of which the features of a split were made; `none` if there are none."""
    folder = Artifacts(settings).features(dataset, encoder, hook, split)
    made: dict[str, Any] = read_manifest(folder) if manifest_path(folder).is_file() else {"settings": {}}
    return str(made["settings"].get("background", "none"))


def images_print(settings: Settings, dataset: str, encoder: str, hook: str, split: str) -> str:
    """Fingerprint of the images that the features of a split were extracted from, as far as it is known, and of what is behind
    transparent ones."""
    folder = Artifacts(settings).features(dataset, encoder, hook, split)
    inputs = read_manifest(folder)["inputs"] if manifest_path(folder).is_file() else {}
    background = features_background(settings, dataset, encoder, hook, split)
    return f"{inputs.get(f'{split} images of {dataset}', '')} {background}"


def probe_labels(settings: Settings, dataset: str, split: str, keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels (int64) of the rows with these keys, which are indices in the data set's own split.

    Raises UserError if the labels are missing, damaged, of other classes or of fewer images; StaleArtifact if edited.
    """
    path = Artifacts(settings).labels(dataset, settings.own_split(dataset, split))
    if not path.is_file():
        raise PROBE_FEATURES.missing("the labels", path, "--probe_dataset", dataset)
    n_classes = len(probe_class_names(settings, dataset))
    again = PROBE_FEATURES.command("--probe_dataset", dataset, "--overwrite --verify")
    try:
        labels = np.load(path)
        if labels.ndim != 1 or labels.dtype != np.int64:
            raise ValueError(f"int64 labels of images were expected, not {labels.dtype} of the shape {labels.shape}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < n_classes:
            raise ValueError(f"there are {n_classes} classes, and labels from {labels.min()} to {labels.max()}")
        if len(keys) and not 0 <= keys.min() <= keys.max() < len(labels):
            raise ValueError(f"it has {len(labels)} labels, and features or strengths of the image {keys.max()}")
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"cannot use the labels {path}: {first_line(error)}; run {again}") from error
    found: NDArray[np.int64] = labels[keys]
    return found


def probe_class_names(settings: Settings, dataset: str) -> list[str]:
    """Class names of a probe data set, in label order.

    Raises UserError if its split was not made or is damaged; StaleArtifact if it was edited.
    """
    path = Artifacts(settings).probe_split(dataset)
    if not path.is_file():
        raise PROBE_FEATURES.missing("the class names", path, "--probe_dataset", dataset)
    read_manifest(path)
    check_chain(path)
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["class_names"]
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError("`class_names` is no list of names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        again = PROBE_FEATURES.command("--probe_dataset", dataset, "--overwrite --verify")
        raise UserError(f"cannot read the class names {path}: {first_line(error)}; run {again}") from error
    return names
