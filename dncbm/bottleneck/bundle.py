"""Bundles: the folder that holds a trained bottleneck, on disk and on the Hugging Face hub.

| file | content |
| --- | --- |
| `config.json` | schema version, encoder, settings, data sets, metrics, provenance, hashes of the other files |
| `sae.safetensors` | the SAE, as `sparse_autoencoder` saves it |
| `probe.safetensors` | `weight` (C x F), the mean concept strengths of each class as CSR (`class_strengths.*`), `top_images` |
| `concepts.csv` | index, name, similarity, the share of images that a concept is active on, the name's verdict if tested |
| `classes.json` | the classes with their images and recall |
| `fingerprint.npz` | features of synthetic images, by which the encoder is recognised |
| `README.md` | the model card |
"""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch

from dncbm.bottleneck.card import LIBRARY, card
from dncbm.bottleneck.contents import Contents, Statistics
from dncbm.bottleneck.encoder import IMAGES, TOLERANCES, Fingerprint, bundled_encoder
from dncbm.concepts.naming import names_in
from dncbm.features.hub import hub_answers, quiet_hub, why_not_loaded
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import file_hash, write_json
from dncbm.runs.results import write_csv
from sparse_autoencoder import load_checkpoint, save_checkpoint
from sparse_autoencoder.checkpoint import read_safetensors
from sparse_autoencoder.files import whole_file, write_safetensors

SCHEMA = 1
"""Raise this when an older version could not read what is written."""
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
        source: the repository of the hub that the card says to load; by default the folder's name.
        license: identifier of the hub for the licence of the weights, for the card.

    Returns the folder. Raises UserError if it holds something else.
    """
    check_target(folder)
    text = card(contents, source or folder.absolute().name, license)
    head = {"schema": SCHEMA, "library": LIBRARY}
    write_json(folder / CONFIG, head)  # marks the folder as ours, and lists no files yet
    save_checkpoint(contents.sae, folder / SAE)
    strengths = contents.statistics.class_strengths
    arrays = {f"class_strengths.{part}": torch.from_numpy(getattr(strengths, part).copy()) for part in CSR}
    arrays["top_images"] = torch.from_numpy(contents.statistics.top_images)
    about = {"format": "dncbm_probe", "schema_version": str(SCHEMA)}
    write_safetensors({"weight": contents.weight.T.contiguous(), **arrays}, folder / PROBE, about)
    activity = contents.statistics.activity.tolist()
    similarities = ("" if math.isnan(name.similarity) else f"{name.similarity:.6f}" for name in contents.names)
    rows = ((n.index, n.name, *more, n.verdict) for n, *more in zip(contents.names, similarities, activity, strict=True))
    write_csv(folder / CONCEPTS, ("index", "name", "similarity", "activity", "verdict"), rows)
    write_json(folder / CLASSES, _classes_as_json(contents))
    assert contents.fingerprint is not None
    with whole_file(folder / FINGERPRINT) as temporary:
        np.savez(temporary, features=contents.fingerprint.features)
    with whole_file(folder / CARD) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")
    encoder = contents.encoder.as_json(folder if source is None else None) | {
        "fingerprint_precision": contents.fingerprint.precision, "preprocessing": contents.fingerprint.preprocessing
    }  # fmt: skip
    config = head | {"encoder": encoder, "split": contents.statistics.split} | contents.about
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
        ours = False
    if not ours:
        raise UserError(f"{folder} holds {held[0]} and is no bundle: name another folder")


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
        reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
        raise UserError(f"cannot read the bundle {folder}: {reason}; {_AGAIN}") from error


_AGAIN = "download or save it again"
_MISSING = object()
_NEEDED: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("dncbm", "split", "vocabulary", "datasets.sae", "datasets.probe"), str),
    **dict.fromkeys(("encoder.name", "encoder.model", "encoder.background", "encoder.fingerprint_precision"), str),
    **dict.fromkeys(("files", "sae", "probe", "metrics.sae", "metrics.probe", "encoder.preprocessing"), dict),
    "encoder.pretrained": (str, type(None)),
    "interventions": list,
}
"""What is read of `config.json`, and its type."""


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise UserError(f"{folder} is not a bundle of dncbm: it has no {path.name}")
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
    if "files" not in config:
        raise UserError(f"the bundle {folder} was not saved completely: {_AGAIN}")
    for key, kind in _NEEDED.items():
        value: Any = config
        for part in key.split("."):
            value = value.get(part, _MISSING) if isinstance(value, dict) else _MISSING
        if not isinstance(value, kind):
            wrong = "lacks" if value is _MISSING else "has a wrong value of"
            raise UserError(f"{path} {wrong} {key!r}, which a bundle needs: {_AGAIN}")
    files = config["files"]
    if files.keys() != set(HASHED) or not all(
        isinstance(one, dict) and {"bytes", "sha256"} <= one.keys() for one in files.values()
    ):
        raise UserError(f"{path} does not list the files of a bundle: {_AGAIN}")
    if (precision := config["encoder"]["fingerprint_precision"]) not in TOLERANCES:
        raise UserError(f"{path} has the unknown precision {precision!r}: {_AGAIN}")
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
    for what, found, wanted in (
        ("concepts of the SAE and names", sae.n_latents, len(names)),
        ("concepts of the probe and names", weight.shape[0], len(names)),
        ("classes of the probe and names", weight.shape[1], len(classes)),
        ("concepts with images and names", len(tensors["top_images"]), len(names)),
        ("features of the SAE and of the encoder", (IMAGES, sae.n_inputs), features.shape),
    ):
        if found != wanted:
            raise ValueError(f"its {what} differ in number, {found} and {wanted}")
    if weight.dtype != torch.float32 or not bool(torch.isfinite(weight).all()):
        raise ValueError("the probe's weights are not all numbers of type float32")
    data, indices, indptr = (tensors[f"class_strengths.{part}"].numpy() for part in CSR)
    strengths = scipy.sparse.csr_matrix((data, indices, indptr), shape=(len(classes), len(names)))
    strengths.check_format()
    recall = np.array([np.nan if one["recall"] is None else one["recall"] for one in classes], dtype=np.float64)
    sizes = np.array([one["images"] for one in classes], dtype=np.int64)
    about = {key: value for key, value in config.items() if key not in ("schema", "library", "encoder", "split", "files")}
    kept = config["encoder"]
    return Contents(
        sae=sae, weight=weight, names=names, classes=tuple(one["name"] for one in classes),
        class_folders=tuple(one["folder"] for one in classes), about=about,
        statistics=Statistics(config["split"], sizes, recall, strengths, activity, tensors["top_images"].numpy()),
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
        why = _refused(error) or why_not_loaded(error, uses_hub=True)
        at = "" if revision is None else f" at {revision!r}"
        raise UserError(f"{repository!r} is no folder, and no repository of the hub that can be read{at}: {why}") from error


def upload(folder: Path, repository: str, *, private: bool | None, token: str | None, commit_message: str) -> str:
    """Upload a bundle to a repository of the hub, which is made if it is missing. Returns the commit's address.

    Raises UserError if the hub does not answer or refuses.
    """
    from huggingface_hub import HfApi, constants

    try:
        with quiet_hub(uses_hub=True):
            api = HfApi(token=token)
            api.create_repo(repository, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repository, folder_path=folder, allow_patterns=list(FILES), commit_message=commit_message
            )
    except Exception as error:
        why = _refused(error) or first_line(error)
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set"
        elif not hub_answers():
            why = f"the hub {constants.ENDPOINT} does not answer"
        raise UserError(f"cannot upload to {repository!r}: {why}") from error
    return str(commit.commit_url)


def _refused(error: Exception) -> str | None:
    """What the hub means and what to do, if it has refused: its library says so in several lines."""
    from huggingface_hub.utils import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

    if isinstance(error, GatedRepoError):
        return "accept its conditions on its page, and pass token= or run `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has none of this name that you may see: correct the name, or pass token= or run `hf auth login`"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such branch, tag or commit"
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status in (401, 403):
        return f"the hub refuses the access ({status}): pass a token= that allows it, or run `hf auth login`"
    return None
