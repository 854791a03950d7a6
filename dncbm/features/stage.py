"""The two stages that make features: of the SAE's images, and of the images that a probe classifies."""

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dncbm.features.datasets import ImageShards, random_split
from dncbm.features.datasets.probe import ProbeImages, ProbeShards, probe_images
from dncbm.features.datasets.sae import sae_images
from dncbm.features.encoders import Encoder, describe_encoder, load_encoder
from dncbm.features.encoding import are_from, encode_shards
from dncbm.features.store import ARRAYS, FeatureStore
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, Extraction, ProbeFeatures, SAEFeatures, Splits
from dncbm.runs.devices import resolve_device
from dncbm.runs.manifests import Outcome, making, read_manifest, write_json
from dncbm.runs.ranks import Ranks, device_name, joined
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder import DEFAULT_SEED
from sparse_autoencoder.declare import values
from sparse_autoencoder.files import whole_file

Features = SAEFeatures | ProbeFeatures


def save_sae_features(
    settings: Settings, features: SAEFeatures, extraction: Extraction, *, device: str = "auto", overwrite: bool = False
) -> Outcome:
    """Stage 1: features of the images that the SAE is trained on, every split (METHOD section 1).

    Raises UserError if there is no such data set, shards or encoder, too many images are bad, or features are NaN;
    StaleArtifact if there are features from other images or another encoder.
    """
    with joined() as ranks:
        sources = ranks.first_makes(partial(sae_images, settings, features.dataset))
        return _save(SAE_FEATURES, settings, features, sources, extraction, ranks, device, overwrite)


def save_probe_features(
    settings: Settings, features: ProbeFeatures, splits: Splits, extraction: Extraction,
    *, device: str = "auto", overwrite: bool = False,
) -> Outcome:  # fmt: skip
    """Stage 5: labels, split and features of a probe data set.

    Raises UserError if there is no such data set or encoder, too many images are bad, or features are NaN; StaleArtifact if
    there are labels or features from other images or another encoder.
    """
    dataset = features.dataset
    with joined() as ranks:
        images, indices = ranks.first_makes(partial(_probe_split, settings, dataset, overwrite))
        sources: dict[str, ImageShards] = {
            split: ProbeShards(images[settings.own_split(dataset, split)], indices[split]) for split in splits.names
        }
        return _save(PROBE_FEATURES, settings, features, sources, extraction, ranks, device, overwrite)


def _probe_split(
    settings: Settings, dataset: str, overwrite: bool
) -> tuple[dict[str, ProbeImages], dict[str, NDArray[np.int64]]]:
    """The images of a probe data set by own split, and the indices of each of our splits; saved together with the labels."""
    images = {split: probe_images(settings, dataset, split) for split in settings.probe_dataset(dataset).own_splits}
    artifacts = Artifacts(settings)
    indices = {split: np.arange(len(found.labels)) for split, found in images.items()}
    if "train_val" not in images:
        # 10 % as in DN-CBM's code. The split does not follow --seed: runs of several seeds are compared on the same images.
        indices |= random_split(len(images["train"].labels), DEFAULT_SEED, {"train_val": 0.1})
    split_file = artifacts.probe_split(dataset)
    hashes = {f"{split} images of {dataset}": found.content_hash for split, found in images.items()}
    with making(split_file, "probe_split", {"seed": DEFAULT_SEED}, hashes, overwrite=overwrite) as work:
        if work.needed:
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
    return images, indices


def _save(
    stage: Stage, settings: Settings, features: Features, sources: Mapping[str, ImageShards], extraction: Extraction,
    ranks: Ranks, device: str, overwrite: bool,
) -> Outcome:  # fmt: skip
    described = ranks.first_makes(partial(describe_encoder, settings, features.encoder))
    described |= {"hook": features.hook, "precision": extraction.precision or "the device's"}
    outcome = Outcome.ALREADY_DONE
    encoder: Encoder | None = None

    def load() -> Encoder:
        where = resolve_device(device_name(device, ranks))
        return load_encoder(settings, features.encoder, where, extraction.precision)

    for split, shards in sources.items():
        (folder,) = _folders(Artifacts(settings), features, [split])
        title = f"{features.dataset} {split}"
        make = partial(
            making, folder, stage.name, described, {f"{split} images of {features.dataset}": shards.fingerprint()},
            overwrite=overwrite, run=values(features) | values(extraction), parts_hold=partial(are_from, shards, folder),
        )  # fmt: skip
        with ranks.first(make) as work:
            if not work.needed:
                continue
            outcome = Outcome.RAN
            if encoder is None:
                encoder = load() if ranks.rank == 0 else None  # the first downloads the weights, or fails, for all
                ranks.wait()
                encoder = encoder or load()
            details = encode_shards(shards, encoder, folder, extraction, title, ranks)
            work.done(folder.glob(ARRAYS), f"{details['images']} images of {title}", **details)
    return outcome


def _folders(artifacts: Artifacts, features: Features, splits: Iterable[str]) -> list[Path]:
    return [artifacts.features(features.dataset, features.encoder, features.hook, split) for split in splits]


SAE_FEATURES = Stage(
    name="sae_features", script="01_save_cc3m_features.py",
    summary="Extract the features of the images that the SAE is trained on.",
    function=save_sae_features, takes=(SAEFeatures, Extraction), several_processes=True,
    outputs=lambda artifacts, features, _: _folders(artifacts, features, SPLITS),
)  # fmt: skip
PROBE_FEATURES = Stage(
    name="probe_features", script="05_save_probe_features.py",
    summary="Extract the labels, the split and the features of the images that the probe classifies.",
    function=save_probe_features, takes=(ProbeFeatures, Splits, Extraction), several_processes=True,
    outputs=lambda artifacts, features, splits, _: _folders(artifacts, features, splits.names),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------- finished outputs


def open_features(settings: Settings, dataset: str, encoder: str, hook: str, split: str) -> FeatureStore:
    """The finished features of a split. Raises UserError, naming the command that makes them, if there are none."""
    is_sae = dataset in settings.sae_datasets
    stage, flag = (SAE_FEATURES, "--sae_dataset") if is_sae else (PROBE_FEATURES, "--probe_dataset")
    made_by = stage.command("--img_enc_name", encoder, flag, dataset)
    return FeatureStore(Artifacts(settings).features(dataset, encoder, hook, split), made_by)


def probe_labels(settings: Settings, dataset: str, split: str, keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Labels (int64) of the rows with these keys, which are indices in the data set's own split.

    Raises UserError if the labels are missing.
    """
    path = Artifacts(settings).labels(dataset, settings.own_split(dataset, split))
    if not path.is_file():
        raise PROBE_FEATURES.missing("the labels", path, "--probe_dataset", dataset)
    return np.load(path)[keys]


def probe_class_names(settings: Settings, dataset: str) -> list[str]:
    """Class names of a probe data set, in label order. Raises UserError if its split was not made."""
    path = Artifacts(settings).probe_split(dataset)
    if not path.is_file():
        raise PROBE_FEATURES.missing("the class names", path, "--probe_dataset", dataset)
    read_manifest(path)
    return json.loads(path.read_text(encoding="utf-8"))["class_names"]
