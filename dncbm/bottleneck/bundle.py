"""Bundles: the folder that holds a trained bottleneck, on disk and on the Hugging Face hub.

| file | content |
| --- | --- |
| `config.json` | schema version, encoder, settings, data sets, metrics, provenance, hashes of the other files |
| `sae.safetensors` | the SAE, as `sparse_autoencoder` saves it |
| `probe.safetensors` | `weight` (C x F), and the mean concept strengths of each class as CSR (`class_strengths.*`) |
| `concepts.csv` | index, name, similarity, and the share of images that a concept is active on |
| `classes.json` | the classes with their images and recall |
| `fingerprint.npz` | features of synthetic images, by which the encoder is recognised |
| `README.md` | the model card |
"""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch

from dncbm.bottleneck.card import card
from dncbm.bottleneck.contents import Contents, Statistics
from dncbm.bottleneck.encoder import Fingerprint, bundled_encoder
from dncbm.concepts.naming import names_in
from dncbm.features.hub import quiet_hub, why_not_loaded
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import file_hash, write_json
from dncbm.runs.results import write_csv
from sparse_autoencoder import load_checkpoint, save_checkpoint
from sparse_autoencoder.checkpoint import read_safetensors
from sparse_autoencoder.files import whole_file, write_safetensors

SCHEMA = 1
"""Raise this when an older version could not read what is written."""
LIBRARY = "dncbm"
CONFIG, SAE, PROBE, CONCEPTS, CLASSES, FINGERPRINT, CARD = (
    "config.json", "sae.safetensors", "probe.safetensors", "concepts.csv", "classes.json", "fingerprint.npz", "README.md",
)  # fmt: skip
HASHED = (SAE, PROBE, CONCEPTS, CLASSES, FINGERPRINT)
FILES = (CONFIG, *HASHED, CARD)
CSR = ("data", "indices", "indptr")


# ------------------------------------------------------------------------------------------------------------ writing


def write_bundle(contents: Contents, folder: Path, *, source: str | None = None, license: str | None = None) -> Path:
    """Write a bundle. An older bundle in the folder is replaced; until all is written, the folder is no bundle.

    Args:
        contents: with a fingerprint.
        folder: where; made if it is missing.
        source: what the card says to load; by default the folder.
        license: identifier of the hub for the licence of the weights, for the card.

    Returns the folder. Raises UserError if it holds something else.
    """
    check_target(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).unlink(missing_ok=True)
    save_checkpoint(contents.sae, folder / SAE)
    strengths = contents.statistics.class_strengths
    arrays = {f"class_strengths.{part}": torch.from_numpy(getattr(strengths, part).copy()) for part in CSR}
    about = {"format": "dncbm_probe", "schema_version": str(SCHEMA)}
    write_safetensors({"weight": contents.weight.T.contiguous(), **arrays}, folder / PROBE, about)
    activity = contents.statistics.activity.tolist()
    rows = (
        (n.index, n.name, f"{n.similarity:.6f}", f"{share:.6g}") for n, share in zip(contents.names, activity, strict=True)
    )
    write_csv(folder / CONCEPTS, ("index", "name", "similarity", "activity"), rows)
    write_json(folder / CLASSES, _classes_as_json(contents))
    assert contents.fingerprint is not None
    with whole_file(folder / FINGERPRINT) as temporary:
        np.savez(temporary, features=contents.fingerprint.features)
    with whole_file(folder / CARD) as temporary:
        temporary.write_text(card(contents, source or folder.name, license), encoding="utf-8", errors="backslashreplace")
    encoder = contents.encoder.as_json(folder) | {
        "fingerprint_precision": contents.fingerprint.precision, "preprocessing": contents.fingerprint.preprocessing
    }  # fmt: skip
    config = {"schema": SCHEMA, "library": LIBRARY, "encoder": encoder, "split": contents.statistics.split} | contents.about
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": file_hash(folder / name)} for name in HASHED}
    write_json(folder / CONFIG, config | {"files": files})
    return folder


def check_target(folder: Path) -> None:
    """Raises UserError if a folder holds files that a bundle would replace, but is no bundle."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a folder for the bundle")
    held = [name for name in FILES if (folder / name).exists()]
    if not held:
        return
    try:
        ours = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["library"] == LIBRARY
    except (OSError, ValueError, KeyError, TypeError):
        ours = CONFIG not in held and SAE in held  # a bundle that was interrupted
    if not ours:
        raise UserError(f"{folder} holds {held[0]}, which is of no bundle: name another folder")


def _classes_as_json(contents: Contents) -> list[dict[str, Any]]:
    found = contents.statistics
    return [
        {"index": number, "name": name, "folder": folder, "images": int(size), "recall": float(recall) if size else None}
        for number, (name, folder, size, recall) in enumerate(
            zip(contents.classes, contents.class_folders, found.sizes, found.recall, strict=True)
        )
    ]


# ------------------------------------------------------------------------------------------------------------ reading


def read_bundle(folder: Path, encoder: str | None = None) -> Contents:
    """The contents of a bundle.

    `encoder` says where the encoder is, if not where the bundle says.

    Raises UserError if the folder is no bundle, of a newer version, incomplete, edited or damaged.
    """
    config = _config(folder)
    for name, about in config["files"].items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"the bundle {folder} lacks {name}: {_AGAIN}")
        if path.stat().st_size != about["bytes"] or file_hash(path) != about["sha256"]:
            raise UserError(f"{path} is not the file that the bundle was saved with, but cut off, damaged or edited: {_AGAIN}")
    try:
        return _contents(folder, config, encoder)
    except UserError:
        raise
    except Exception as error:  # a file that fits its hash can still be anything
        raise UserError(f"cannot read the bundle {folder}: {first_line(error)}; {_AGAIN}") from error


_AGAIN = "download or save it again"


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if config["library"] != LIBRARY:
            raise ValueError("it was not written by dncbm")
        schema = int(config["schema"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"{folder} is not a bundle of dncbm ({path.name}: {reason})") from error
    if schema > SCHEMA:
        by = config.get("dncbm", "unknown")
        raise UserError(
            f"{folder} was written by a newer dncbm ({by}; schema {schema}, and this version reads {SCHEMA}): update dncbm"
        )
    try:
        files, parts = config["files"], (config["encoder"], config["datasets"], config["sae"], config["probe"])
        complete = files.keys() == set(HASHED) and all(isinstance(part, dict) for part in parts)
        complete = complete and all(isinstance(about["bytes"], int) and about["sha256"] for about in files.values())
        complete = complete and isinstance(config["interventions"], list) and isinstance(config["datasets"]["probe"], str)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} lacks what a config of a bundle holds ({first_line(error)}): {_AGAIN}") from error
    if not complete:
        raise UserError(f"{path} lacks what a config of a bundle holds: {_AGAIN}")
    return config


def _contents(folder: Path, config: dict[str, Any], encoder: str | None) -> Contents:
    sae = load_checkpoint(folder / SAE).eval().requires_grad_(False)
    tensors, _ = read_safetensors(folder / PROBE)
    weight = tensors["weight"].T.contiguous()
    names = names_in(folder / CONCEPTS)
    with (folder / CONCEPTS).open(newline="", encoding="utf-8") as file:
        activity = np.array([float(row["activity"]) for row in csv.DictReader(file)])
    classes = json.loads((folder / CLASSES).read_text(encoding="utf-8"))
    with np.load(folder / FINGERPRINT, allow_pickle=False) as file:
        features = file["features"]
    data, indices, indptr = (tensors[f"class_strengths.{part}"].numpy() for part in CSR)
    strengths = scipy.sparse.csr_matrix((data, indices, indptr), shape=(len(classes), len(names)))
    strengths.check_format()
    for what, found, wanted in (
        ("concepts of the SAE and names", sae.n_latents, len(names)),
        ("concepts of the probe and names", weight.shape[0], len(names)),
        ("classes of the probe and names", weight.shape[1], len(classes)),
        ("features of the SAE and of the encoder", sae.n_inputs, features.shape[1]),
    ):
        if found != wanted:
            raise ValueError(f"its {what} differ in number, {found} and {wanted}")
    if weight.dtype != torch.float32 or not bool(torch.isfinite(weight).all()):
        raise ValueError("the probe's weights are not all numbers of type float32")
    recall = np.array([np.nan if one["recall"] is None else one["recall"] for one in classes], dtype=np.float64)
    sizes = np.array([one["images"] for one in classes], dtype=np.int64)
    about = {key: value for key, value in config.items() if key not in ("schema", "library", "encoder", "split", "files")}
    kept = config["encoder"]
    return Contents(
        sae=sae, weight=weight, names=names, classes=tuple(one["name"] for one in classes),
        class_folders=tuple(one["folder"] for one in classes), about=about,
        statistics=Statistics(config["split"], sizes, recall, strengths, activity),
        encoder=bundled_encoder(folder / CONFIG, kept, encoder),
        fingerprint=Fingerprint(features, kept["fingerprint_precision"], kept["preprocessing"]),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ the hub


def download(repository: str, *, revision: str | None = None, token: str | None = None) -> Path:
    """The folder of a bundle that is on the hub, in the hub's cache.

    Raises UserError if there is no such repository, or the hub does not answer and the bundle is not in the cache.
    """
    from huggingface_hub import snapshot_download

    try:
        with quiet_hub(uses_hub=True):
            return Path(snapshot_download(repository, revision=revision, token=token, allow_patterns=list(FILES)))
    except Exception as error:
        at = "" if revision is None else f" at {revision}"
        why = why_not_loaded(error, uses_hub=True)
        raise UserError(f"{repository!r} is no folder, and no repository of the hub that can be read{at}: {why}") from error


def upload(folder: Path, repository: str, *, private: bool | None, token: str | None, commit_message: str) -> str:
    """Upload a bundle to a repository of the hub, which is made if it is missing. Returns the commit's address.

    Raises UserError if the hub does not answer or refuses.
    """
    from huggingface_hub import HfApi

    try:
        with quiet_hub(uses_hub=True):
            api = HfApi(token=token)
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=folder, allow_patterns=list(FILES), commit_message=commit_message
            )
    except Exception as error:
        raise UserError(f"cannot upload to {repository!r}: {why_not_loaded(error, True)}") from error
    return str(commit.commit_url)
