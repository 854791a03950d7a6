"""How large the work of a plan is: images, classes, features, active latents, and bytes of what its steps leave.

Bytes are those of the outputs that manifests list, as in `record.bytes_of`. What cannot be found out, because images are
missing or an encoder cannot be loaded, raises one of UNKNOWN.
"""

import json
import time
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from dncbm.concepts.sae import load_sae
from dncbm.concepts.vocabulary import read_words
from dncbm.features.datasets import ImageShards, random_split
from dncbm.features.datasets.probe import HELD_OUT, ProbeImages, ProbeShards, probe_images
from dncbm.features.datasets.sae import sae_images
from dncbm.features.encoders import Encoder, load_encoder
from dncbm.features.stage import open_features, probe_class_names
from dncbm.features.store import FeatureStore
from dncbm.reproduce.plan import Step
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, Extraction, ImageEncoder, SAERun
from dncbm.runs.errors import UserError
from dncbm.runs.settings import Settings
from sparse_autoencoder import DEFAULT_SEED
from sparse_autoencoder.declare import build

UNKNOWN = (UserError, OSError, RuntimeError, MemoryError)
"""What is raised where something is missing or does not work, or memory is too small."""
SAMPLE = 1024
"""Images whose active latents are counted."""
INDEX_BYTES, KEY_BYTES = 8, 36
"""Of what tells an image: in a probe data set, and in tars as img2dataset writes them, with nine characters."""


@dataclass(frozen=True, eq=False)
class Known:
    """A config, and the device of its steps. Functions of it compute once what takes time."""

    settings: Settings
    device: torch.device
    rates: dict[Hashable, list[Any]] = field(default_factory=dict)
    """Encoder and settings -> the rates of extraction from its data sets so far."""


def dataset_of(step: Step) -> str:
    """The data set whose images a step is about."""
    is_of_sae = step.stage in (commands.SAE_FEATURES.name, commands.SAE.name)
    return str(step.values["sae_dataset" if is_of_sae else "probe_dataset"])


def encoder_of(step: Step) -> ImageEncoder:
    """The encoder that a step runs, or whose features it reads."""
    return build(ImageEncoder, step.values)


@cache
def labelled(known: Known, dataset: str) -> tuple[dict[str, int], Sequence[str]]:
    """Split -> number of images, and names of classes: as a probe data set was divided, or else as it will be."""
    with suppress(UserError, OSError, ValueError, LookupError, TypeError):
        names = probe_class_names(known.settings, dataset)
        sizes = json.loads(Artifacts(known.settings).probe_split(dataset).read_text(encoding="utf-8"))["sizes"]
        return {split: int(sizes[split]) for split in SPLITS}, names
    images = {split: _own_images(known, dataset, split) for split in known.settings.probe_dataset(dataset).own_splits}
    sizes = {split: len(found.labels) for split, found in images.items()}
    if "train_val" not in sizes:
        rows = random_split(sizes["train"], DEFAULT_SEED, {"train_val": HELD_OUT})
        sizes |= {split: len(found) for split, found in rows.items()}
    return sizes, images["train"].class_names


@cache
def _own_images(known: Known, dataset: str, own_split: str) -> ProbeImages:
    return probe_images(known.settings, dataset, own_split)


@cache
def train_shards(known: Known, dataset: str) -> ImageShards:
    """Training images of the SAE's data set, or the labelled ones that a probe's are taken from."""
    if dataset in known.settings.sae_datasets:
        return sae_images(known.settings, dataset)["train"]
    images = _own_images(known, dataset, "train")
    return ProbeShards(images, np.arange(len(images.labels)))


@cache
def _unlabelled(known: Known, dataset: str) -> dict[str, int]:
    """Split -> number of images of an SAE's data set. Tars without a count are like the first, which is read."""
    splits, per_byte = sae_images(known.settings, dataset), 0.0
    counts = {split: [shards.count(shard) for shard in range(len(shards))] for split, shards in splits.items()}
    if any(None in of_split for of_split in counts.values()):
        first = splits["train"]
        per_byte = sum(1 for _ in first.read(0, lambda _: None)) / max(first.size(0), 1)
        if not per_byte:
            raise UserError(f"{first.name(0)} has no images")
    return {
        split: sum(round(shards.size(i) * per_byte) if n is None else n for i, n in enumerate(counts[split]))
        for split, shards in splits.items()
    }


@cache
def _stores(known: Known, of: ImageEncoder, dataset: str) -> dict[str, FeatureStore]:
    """Split -> its finished features, of those that exist."""
    found = {}
    for split in SPLITS:
        with suppress(UserError):
            found[split] = open_features(known.settings, dataset, of.encoder, of.hook, split)
    return found


def counts(known: Known, step: Step) -> dict[str, int]:
    """Split -> number of images: of the encoder's features where they exist, else of the data set."""
    dataset = dataset_of(step)
    found = {split: len(store) for split, store in _stores(known, encoder_of(step), dataset).items()}
    if len(found) == len(SPLITS):
        return found
    is_of_sae = dataset in known.settings.sae_datasets
    return (_unlabelled(known, dataset) if is_of_sae else labelled(known, dataset)[0]) | found


@lru_cache(maxsize=1)
def loaded(known: Known, name: str) -> tuple[Encoder, float, int]:
    """An encoder, seconds of loading it, and D. Only the last one stays in memory: plans go through encoders one by one."""
    import open_clip  # noqa: F401 - takes seconds, once

    start = time.perf_counter()
    encoder = load_encoder(known.settings, name, known.device)
    features = encoder.encode_images(encoder.preprocess(Image.new("RGB", (64, 64)))[None])
    return encoder, time.perf_counter() - start, int(features.shape[1])


@cache
def width(known: Known, of: ImageEncoder) -> int:
    """D of an encoder, from whatever features of it exist, else by encoding an image."""
    for dataset in (*known.settings.sae_datasets, *known.settings.probe_datasets):
        for store in _stores(known, of, dataset).values():
            return store.width
    return loaded(known, of.encoder)[2]


def n_latents(known: Known, step: Step) -> int:
    """F of a step's SAE."""
    return width(known, encoder_of(step)) * build(SAERun, step.values).expansion_factor


@cache
@torch.inference_mode()
def _trained_l0(known: Known, run: SAERun, dataset: str) -> float:
    """Mean number of active latents of the trained SAE, on a sample of the data set or, before it has features, of its own."""
    sae = load_sae(known.settings, run)
    of = ImageEncoder(run.encoder, run.hook)
    found = _stores(known, of, dataset) or _stores(known, of, run.dataset)
    means = []
    for store in found.values():
        rows = np.linspace(0, len(store) - 1, min(len(store), SAMPLE)).astype(np.int64)
        means.append(float((sae.encode(store.gather(rows)) > 0).sum()) / len(rows))
    if not means:
        raise UserError("there are no features to encode")
    return float(np.average(means, weights=list(map(len, found.values()))))


def l0(known: Known, step: Step) -> float:
    """Active latents per image: of the trained SAE, else what its type says; raises UserError if that says nothing."""
    run = build(SAERun, step.values)
    with suppress(UserError):
        return _trained_l0(known, run, dataset_of(step))
    share = run.sparsity.code.expected_density(n_latents(known, step))
    if share == 1:
        raise UserError("the type of this SAE does not say how many latents are active")
    return share * n_latents(known, step)


def features_bytes(known: Known, step: Step) -> float:
    """Bytes of the outputs of a step that makes features. So it is with the next ones; tables and lists are not counted."""
    precision = build(Extraction, step.values).precision or ("fp16" if known.device.type == "cuda" else "fp32")
    each = (2 if precision == "fp16" else 4) * width(known, encoder_of(step))
    each += KEY_BYTES if dataset_of(step) in known.settings.sae_datasets else INDEX_BYTES
    return sum(counts(known, step).values()) * each


def sae_bytes(known: Known, step: Step) -> float:
    n_inputs, n_outputs = width(known, encoder_of(step)), n_latents(known, step)
    return 4 * (2 * n_inputs * n_outputs + n_inputs + n_outputs)


def words_bytes(known: Known, step: Step) -> float:
    return 4 * len(read_words(known.settings)) * width(known, encoder_of(step))


def strengths_bytes(known: Known, step: Step) -> float:
    """Values and columns of active latents; a row pointer and a key per image."""
    return sum(counts(known, step).values()) * (8 * l0(known, step) + 4 + 8)


def probe_bytes(known: Known, step: Step) -> float:
    n_inputs = width(known, encoder_of(step)) if step.values["probe_on_features"] else n_latents(known, step)
    return 4 * n_inputs * len(labelled(known, dataset_of(step))[1])
