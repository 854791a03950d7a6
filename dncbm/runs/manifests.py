"""The JSON manifest beside each artifact, which says where it came from, and `making`, the one way to make an artifact.

An artifact is a file or a folder. Its manifest holds its recipe (stage, settings, fingerprints of the inputs), every setting
of the run, the size and hash of what was written, and, for people, versions, time and counts.
"""

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dncbm.runs.errors import StaleArtifact, UserError
from sparse_autoencoder.files import whole_file

PACKAGES = ("torch", "open_clip_torch", "webdataset", "numpy", "scipy", "dncbm", "sparse_autoencoder")


class Outcome(Enum):
    """What a stage did."""

    RAN = "ran"
    ALREADY_DONE = "already done"
    PROVIDED = "provided"
    """The user supplied the artifact (one of the paper's published files): it is used as it is."""
    STOPPED = "stopped"
    """The stage was asked to stop (SIGTERM) and saved its state; the same command resumes."""


# ----------------------------------------------------------------------------------------------------------- making


@dataclass
class Work:
    """What `making` yields: whether an artifact must be made, and what its manifest records."""

    outcome: Outcome
    outputs: list[Path] = field(default_factory=list)
    """The files that were written; without any, the artifact stays unfinished."""
    message: str = ""
    """Printed before the artifact's path."""
    details: dict[str, Any] = field(default_factory=dict)
    """Counts, metrics and the like."""

    @property
    def needed(self) -> bool:
        """Whether there is work to do."""
        return self.outcome is Outcome.RAN

    def done(self, outputs: Iterable[Path], message: str = "", **details: Any) -> None:
        """Record that the artifact is complete."""
        self.outputs, self.message, self.details = sorted(outputs), message, details


@contextmanager
def making(
    artifact: Path,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path | str],
    *,
    overwrite: bool,
    run: Mapping[str, Any] | None = None,
    remove: Callable[[], None] | None = None,
    parts_hold: Callable[[], bool] = lambda: False,
) -> Iterator[Work]:
    """Make an artifact unless it exists already, made from the same settings and inputs.

    Nothing has to be loaded to find out. The block does the work if `work.needed` and ends with `work.done(...)`, after which
    the manifest is written. The parts of a block that raises or does not finish stay for the next run.

    Args:
        artifact: file or folder.
        stage: the stage's name.
        settings: the settings that the result depends on.
        inputs: name -> an artifact, whose own inputs are checked too (`check_chain`), or a fingerprint.
        overwrite: replace an artifact made from other settings or inputs instead of refusing.
        run: flag -> value of every setting of the run, by which the artifact can be found.
        remove: clears the old artifact away; by default the file or folder itself is removed.
        parts_hold: whether the parts of an interrupted run stay valid although the inputs have changed, because each part
            records what it was made from.

    Raises:
        StaleArtifact: the artifact exists, finished or not, but was made from other settings or inputs, or was edited, and
            `overwrite` is off; or an input was made from something that has changed since.
    """
    sources = {name: source for name, source in inputs.items() if isinstance(source, Path)}
    for source in sources.values():
        check_chain(source)
    prints = {name: source if isinstance(source, str) else fingerprint(source) for name, source in inputs.items()}
    # Through JSON, so that it compares with a recipe that was read: tuples become lists.
    recipe = json.loads(json.dumps({"stage": stage, "settings": dict(settings), "inputs": prints}))
    work = Work(_begin(artifact, recipe, overwrite, remove or (lambda: _remove(artifact)), remove is not None, parts_hold))
    yield work
    if not (work.needed and work.outputs):
        return
    manifest, unfinished = manifest_path(artifact), unfinished_path(artifact)
    made = recipe | {
        "run": dict(run or {}),
        "sources": {name: os.path.relpath(path, manifest.parent) for name, path in sources.items()},
        "outputs": {
            os.path.relpath(path, manifest.parent): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
            for path in work.outputs
        },
        "details": work.details | {"seconds": round(time.time() - unfinished.stat().st_mtime, 1)},
        "versions": package_versions(),
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(manifest, made)
    unfinished.unlink(missing_ok=True)
    if work.message:
        print(f"{work.message}: {artifact}")


def _begin(
    artifact: Path,
    recipe: dict[str, Any],
    overwrite: bool,
    remove: Callable[[], None],
    has_parts_elsewhere: bool,
    parts_hold: Callable[[], bool],
) -> Outcome:
    """Decide whether an artifact has to be made; if so, save its recipe, which the manifest replaces at the end."""
    finished, unfinished = manifest_path(artifact), unfinished_path(artifact)
    found = finished if finished.is_file() else unfinished if unfinished.is_file() else None
    if found is None:
        if artifact.is_file() and not overwrite:
            print(f"using the file supplied: {artifact}")
            return Outcome.PROVIDED
    elif differences := _differences(_read(found), recipe):
        if found == unfinished and _read(found)["settings"] == recipe["settings"] and parts_hold():
            write_json(unfinished, recipe)
            return Outcome.RAN
        if not overwrite and (found == finished or has_parts_elsewhere or _has_parts(artifact)):
            raise StaleArtifact(
                f"{artifact} was made from other inputs or settings ({'; '.join(differences)}): "
                "pass --overwrite to replace it, or move it away",
                differences,
            )
        remove()
    elif found == finished and _is_intact(finished, overwrite):
        print(f"already done: {artifact}")
        return Outcome.ALREADY_DONE
    finished.unlink(missing_ok=True)
    write_json(unfinished, recipe)
    return Outcome.RAN


def _differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One phrase for each setting or input in which two recipes differ."""

    def differing(part: str) -> list[str]:
        keys = made.get(part, {}).keys() | wanted[part].keys()
        return sorted(key for key in keys if made.get(part, {}).get(key) != wanted[part].get(key))

    settings = [f"{k} was {made['settings'].get(k)!r}, now {wanted['settings'].get(k)!r}" for k in differing("settings")]
    return settings + [f"{key} has changed" for key in differing("inputs")]


def _is_intact(manifest: Path, overwrite: bool) -> bool:
    """Whether every output exists in its recorded size; an edited one is removed only if `overwrite` says so."""
    sizes = {manifest.parent / name: output["bytes"] for name, output in _read(manifest)["outputs"].items()}
    changed = [path for path, size in sizes.items() if path.is_file() and path.stat().st_size != size]
    if changed and not overwrite:
        raise StaleArtifact(
            f"{changed[0]} has changed since it was made: pass --overwrite to make it again, or remove {manifest} to use it "
            "as it is",
            [f"{path.name} has changed" for path in changed],
        )
    for path in changed:  # or a stage would take it for a finished part
        path.unlink()
    return all(path.is_file() for path in sizes)


def _has_parts(artifact: Path) -> bool:
    """Whether an unfinished run left something to lose; a run that failed at once did not."""
    if artifact.is_dir():
        return any(path != unfinished_path(artifact) for path in artifact.iterdir())
    return artifact.exists()


def _remove(artifact: Path) -> None:
    if artifact.is_dir():
        shutil.rmtree(artifact)
        return
    for path in (artifact, manifest_path(artifact), unfinished_path(artifact)):
        path.unlink(missing_ok=True)


def check_chain(artifact: Path) -> None:
    """Compare an artifact's manifest, and those of everything it was made from, with what exists now.

    An input that was moved away is not compared: nothing is known to have changed.

    Raises StaleArtifact if an input has changed since the artifact was made from it.
    """
    if not manifest_path(artifact).is_file():
        return
    manifest = read_manifest(artifact)
    for name, place in manifest.get("sources", {}).items():
        source = Path(os.path.normpath(manifest_path(artifact).parent / place))
        if not manifest_path(source).is_file() and not source.is_file():
            continue
        check_chain(source)
        if fingerprint(source) != manifest["inputs"][name]:
            raise StaleArtifact(
                f"{artifact} is out of date: {name} ({source}) has changed since it was made; make it again with `python "
                f"scripts/run_pipeline.py --from {manifest['stage']} --to {manifest['stage']} --overwrite` and the same flags",
                [f"{name} has changed"],
            )


# -------------------------------------------------------------------------------------------- manifests, fingerprints


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


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with whole_file(path) as temporary:
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        # Names that are not UTF-8 hold lone surrogates, which JSON reads back from their escapes.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def fingerprint(artifact: Path) -> str:
    """Hash of an artifact's contents: from its manifest if it has one, else by reading the file."""
    if manifest_path(artifact).is_file():
        outputs = read_manifest(artifact)["outputs"]
        return text_hash(f"{name} {outputs[name]['sha256']}" for name in sorted(outputs))
    if not artifact.is_file():
        raise UserError(f"the input {artifact} is missing: run the stage that makes it, or put the file there")
    # Words are known by their content, whatever the vocabulary is called.
    content = file_hash(artifact)
    return content if artifact.suffix == ".txt" else text_hash([f"{artifact.name} {content}"])


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


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
