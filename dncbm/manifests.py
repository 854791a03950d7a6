"""Files that appear whole or not at all, and the JSON manifest beside each artifact that says where it came from.

An artifact is a file or a folder. Its manifest holds its recipe (stage, settings, fingerprints of the inputs), the size and
hash of what was written, and, for people, versions, seed, time and counts. A stage asks `begin` whether there is work to do.
"""

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dncbm.errors import StaleArtifact, UserError

_UMASK = os.umask(0)  # the only way to read it is to set it
os.umask(_UMASK)

PACKAGES = ("torch", "open_clip_torch", "webdataset", "numpy", "scipy", "dncbm", "sparse_autoencoder")


class Outcome(Enum):
    """What a stage did."""

    RAN = "ran"
    ALREADY_DONE = "already done"
    PROVIDED = "provided"
    """The artifact was put there by hand (the paper's published files): it is used as it is."""
    STOPPED = "stopped"
    """The stage was asked to stop (SIGTERM) and saved where it was; the same command goes on."""


@dataclass(frozen=True)
class Recipe:
    """What an artifact is made from; two artifacts of the same recipe are interchangeable."""

    stage: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    """Input name -> fingerprint."""

    def as_json(self) -> dict[str, Any]:
        plain = {"stage": self.stage, "settings": dict(self.settings), "inputs": dict(self.inputs)}
        loaded: dict[str, Any] = json.loads(json.dumps(plain))  # tuples become lists, as they are when read back
        return loaded


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; when the block ends well, flush it to disk and rename it to `path`.

    When the block raises (full disk, interrupt), the temporary file is removed and `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix is kept, because numpy and others append theirs to a name that lacks it.
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_UMASK)  # mkstemp makes files only the owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with whole_file(path) as temporary:
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        # Names that are not UTF-8 hold lone surrogates; a backslash before them makes what JSON reads as the same.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def text_hash(lines: Iterable[str]) -> str:
    """SHA-256 of lines of text."""
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode(errors="surrogateescape") + b"\n")  # file names need not be UTF-8
    return digest.hexdigest()


def manifest_path(artifact: Path) -> Path:
    """`manifest.json` inside a folder artifact (its name has no file suffix), `<file>.manifest.json` beside a file."""
    if artifact.suffix in (".safetensors", ".npy", ".csv", ".json", ".pt", ".pth"):
        return artifact.with_name(artifact.name + ".manifest.json")
    return artifact / "manifest.json"


def unfinished_path(artifact: Path) -> Path:
    """The recipe of an artifact that is being made; its manifest replaces it."""
    return manifest_path(artifact).with_suffix(".unfinished")


def read_manifest(artifact: Path) -> dict[str, Any]:
    """The manifest of an artifact. Raises UserError if it is missing or unreadable."""
    return _read(manifest_path(artifact))


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return loaded
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the manifest {path}: {error}") from error


def fingerprint(artifact: Path) -> str:
    """Hash of an artifact's contents: from its manifest where it has one, else by reading the file."""
    if manifest_path(artifact).is_file():
        outputs = read_manifest(artifact)["outputs"]
        return text_hash(f"{name} {outputs[name]['sha256']}" for name in sorted(outputs))
    return text_hash([f"{artifact.name} {file_hash(artifact)}"])


def begin(
    artifact: Path,
    recipe: Recipe,
    *,
    overwrite: bool,
    remove: Callable[[], None] | None = None,
    parts_hold: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Ask whether an artifact has to be made, and lay down the recipe of one that has to.

    Args:
        artifact: file or folder.
        recipe: what it would be made from now.
        overwrite: replace what was made from another recipe, instead of refusing.
        remove: how to clear the old artifact away; by default the file or folder itself is removed.
        parts_hold: whether the parts that an interrupted run left may stay although its inputs have changed since, because
            each says what it was made from.

    Returns:
        ALREADY_DONE; PROVIDED for a file that came without a manifest; RAN when there is work to do (parts that an
        interrupted run of the same recipe left stay).

    Raises:
        StaleArtifact: it is there, finished or not, from another recipe, or was changed since, and `overwrite` is off.
    """
    finished, unfinished = manifest_path(artifact), unfinished_path(artifact)
    found = finished if finished.is_file() else unfinished if unfinished.is_file() else None
    if found is None:
        if artifact.is_file() and not overwrite:
            print(f"used as it was put there: {artifact}")
            return Outcome.PROVIDED
    elif differences := recipe_differences(_read(found), recipe.as_json()):
        if found == unfinished and _read(found)["settings"] == recipe.as_json()["settings"] and parts_hold():
            write_json(unfinished, recipe.as_json())
            return Outcome.RAN
        if not overwrite and (found == finished or remove is not None or _has_parts(artifact)):
            raise StaleArtifact(
                f"{artifact} was made from other inputs or settings ({'; '.join(differences)}): "
                "pass --overwrite to replace it, or move it away",
                differences,
            )
        (remove or (lambda: _remove(artifact)))()
    elif found == finished and _is_intact(finished, overwrite):
        print(f"already done: {artifact}")
        return Outcome.ALREADY_DONE
    finished.unlink(missing_ok=True)
    write_json(unfinished, recipe.as_json())
    return Outcome.RAN


def _is_intact(manifest: Path, overwrite: bool) -> bool:
    """Whether every output of a manifest is there in its size; an edited one is removed only if `overwrite` says so."""
    sizes = {manifest.parent / name: output["bytes"] for name, output in _read(manifest)["outputs"].items()}
    changed = [path for path, size in sizes.items() if path.is_file() and path.stat().st_size != size]
    if changed and not overwrite:
        raise StaleArtifact(
            f"{changed[0]} has changed since it was made: pass --overwrite to make it again, or to use it as it is, "
            f"remove {manifest}",
            [f"{path.name} has changed" for path in changed],
        )
    for path in changed:  # or a stage would take it for a finished part
        path.unlink()
    return all(path.is_file() for path in sizes)


def finish(artifact: Path, recipe: Recipe, outputs: Iterable[Path], details: Mapping[str, Any] | None = None) -> None:
    """Write the manifest of an artifact that is now complete.

    Args:
        artifact: file or folder.
        recipe: what it was made from.
        outputs: the files it consists of.
        details: what else to tell a reader (counts, metrics, device); the seconds since `begin` are added.
    """
    folder = manifest_path(artifact).parent
    began = unfinished_path(artifact).stat().st_mtime
    manifest = recipe.as_json() | {
        "outputs": {
            os.path.relpath(path, folder): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
            for path in sorted(outputs)
        },
        "details": {**(details or {}), "seconds": round(time.time() - began, 1)},
        "versions": package_versions(),
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(manifest_path(artifact), manifest)
    unfinished_path(artifact).unlink(missing_ok=True)


def recipe_differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One phrase for each setting or input in which two recipes differ."""
    differences = []
    for part in ("settings", "inputs"):
        old, new = made.get(part, {}), wanted[part]
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                if part == "inputs":
                    differences.append(f"{key} has changed")
                else:
                    differences.append(f"{key} was {old.get(key)!r}, now {new.get(key)!r}")
    return differences


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _has_parts(artifact: Path) -> bool:
    """Whether a run that did not finish left something to lose: one that failed at once did not."""
    if artifact.is_dir():
        return any(path != unfinished_path(artifact) for path in artifact.iterdir())
    return artifact.exists()


def _remove(artifact: Path) -> None:
    if artifact.is_dir():
        shutil.rmtree(artifact)
    else:
        artifact.unlink(missing_ok=True)
        manifest_path(artifact).unlink(missing_ok=True)
        unfinished_path(artifact).unlink(missing_ok=True)
