"""The JSON manifest beside each artifact, which says where it came from, and `making`, the one way to make an artifact.

An artifact is a file or a folder. Its manifest holds its recipe (stage, settings, fingerprints of the inputs), every setting
of the run, the size and hash of what was written, and, for people, versions, time and counts.
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dncbm.runs.errors import StaleArtifact, UserError, first_line
from dncbm.runs.locks import PATIENCE_S, lock_path, locked, remove_left_locks, turn
from sparse_autoencoder.files import remove_leftovers, whole_file
from sparse_autoencoder.settings import in_todays_words

IMPORTED = "import_published"
"""The stage whose artifacts others have made. The stages that would make them use them as they are."""
ALIGNED = "align_names"
"""The stage of an SAE that is another one's copy, fine-tuned towards its names."""
PACKAGES = ("torch", "open_clip_torch", "webdataset", "numpy", "scipy", "dncbm", "sparse_autoencoder")


class Outcome(Enum):
    """What a stage did."""

    RAN = "ran"
    ALREADY_DONE = "already done"
    PROVIDED = "provided"
    """The user supplied the artifact (one of the paper's published files): it is used as it is."""
    STOPPED = "stopped"
    """The stage was asked to stop (SIGTERM) and saved its state; the same command resumes."""
    PART = "part done"
    """A worker has done its part of an artifact, and other parts are still missing."""


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
    files: Callable[[], Iterable[Path]] | None = None,
    scratch: Iterable[Path] = (),
    parts_hold: Callable[[], bool] = lambda: False,
    before: Callable[[], object] = lambda: None,
    again: bool = False,
    shared: bool = False,
    waits: bool = False,
) -> Iterator[Work]:
    """Make an artifact unless it exists already, made from the same settings and inputs.

    Nothing has to be loaded to find out. The block does the work if `work.needed` and ends with `work.done(...)`, after which
    the manifest is written. The parts of a block that raises or does not finish stay for the next run. Meanwhile no other
    process can make the same artifact, unless both share it.

    Args:
        artifact: file or folder.
        stage: the stage's name.
        settings: the settings that the result depends on.
        inputs: name -> an artifact, whose own inputs are checked too (`check_chain`), or a fingerprint.
        overwrite: replace an artifact made from other settings or inputs, or damaged, instead of refusing.
        run: flag -> value of every setting of the run, by which the artifact can be found.
        files: returns everything that making the artifact leaves, which is removed before it is made from something else; by
            default the file, or what is in the folder.
        scratch: the state of unfinished work, removed as soon as the artifact is finished.
        parts_hold: whether the parts of an interrupted run stay valid although the inputs have changed, because each part
            records what it was made from.
        before: called if there is work, before anything is removed; it may raise what would end the work.
        again: make it even if it is finished and whole.
        shared: let other processes that pass this, too, make other parts of the artifact meanwhile, from the same settings and
            inputs. They begin and finish one after another. Whichever finds all parts there ends with `work.done(...)`.
        waits: wait for another process that makes the artifact, instead of refusing. It takes seconds to make.

    Raises:
        StaleArtifact: the artifact exists, finished or not, but was made from other settings or inputs, or was edited, and
            `overwrite` is off; or an input was made from something that has changed since.
        UserError: an input is missing or damaged; a manifest cannot be read, and `overwrite` is off; another process makes
            the artifact; or, if shared, others make it from other settings or inputs.
    """
    sources = {name: source for name, source in inputs.items() if isinstance(source, Path)}
    for source in sources.values():
        check_chain(source)
    prints = {name: source if isinstance(source, str) else fingerprint(source) for name, source in inputs.items()}
    # Through JSON, so that it compares with a recipe that was read: tuples become lists.
    recipe = json.loads(json.dumps({"stage": stage, "settings": dict(settings), "inputs": prints}))
    unfinished, scratch = unfinished_path(artifact), tuple(scratch)
    if not again and _is_done(artifact, recipe):  # asked without the lock, which a read-only folder does not allow
        print(f"already done: {artifact}")
        with suppress(OSError, UserError):  # what a process left that was killed after it had finished
            for path in (unfinished, *scratch):
                path.unlink(missing_ok=True)
            remove_left_locks(artifact)
        yield Work(Outcome.ALREADY_DONE)
        return
    before()
    with ExitStack() as held:
        with turn(artifact) if shared else nullcontext():
            lock = held.enter_context(locked(artifact, shared=shared, patience=PATIENCE_S if waits else 0))
            work = Work(_begin(artifact, recipe, overwrite, again, files, parts_hold, lock.take_alone))
            lock.share_again()
        yield work
        if not (work.needed and work.outputs):
            return
        with turn(artifact) if shared else nullcontext():
            if shared and not _is_begun(artifact, recipe):
                if not _is_done(artifact, recipe):
                    raise UserError(
                        f"{artifact} was removed, or begun again from other inputs or settings, while this worker made its "
                        "part: rerun the command that you want"
                    )
                print(f"another worker has finished it: {artifact}")
                return
            _finish(artifact, recipe, sources, run or {}, work)
            for path in (unfinished, *scratch):
                path.unlink(missing_ok=True)
    if work.message:
        print(f"{work.message}: {artifact}")


def _finish(
    artifact: Path, recipe: Mapping[str, Any], sources: Mapping[str, Path], run: Mapping[str, Any], work: Work
) -> None:
    """Write the manifest. Raises UserError if an output vanishes meanwhile."""
    manifest, begun = manifest_path(artifact), time.time()
    with suppress(FileNotFoundError):  # without locks, another worker may finish at the same time
        begun = unfinished_path(artifact).stat().st_mtime
    try:
        outputs = {
            os.path.relpath(path, manifest.parent): {"bytes": path.stat().st_size, "sha256": file_hash(path)}
            for path in work.outputs
        }
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename} was removed while {artifact} was finished: run the same command again, which makes it"
        ) from error
    made = {
        **recipe,
        "run": dict(run),
        "sources": {name: os.path.relpath(path, manifest.parent) for name, path in sources.items()},
        "outputs": outputs,
        "details": work.details | {"seconds": round(time.time() - begun, 1)},
        "versions": package_versions(),
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    write_json(manifest, made)


def _is_begun(artifact: Path, recipe: Mapping[str, Any]) -> bool:
    """Whether an artifact is unfinished and was last begun from this recipe."""
    try:
        return not _differences(_read(unfinished_path(artifact)), recipe)
    except UserError:
        return False


def _is_done(artifact: Path, recipe: dict[str, Any]) -> bool:
    """Whether an artifact is finished, made from this recipe, and whole."""
    if not manifest_path(artifact).is_file():
        return False
    try:
        made = read_manifest(artifact)
    except UserError:
        return False
    return not _differences(made, recipe) and not any(_damaged(manifest_path(artifact), made))


def _begin(
    artifact: Path,
    recipe: dict[str, Any],
    overwrite: bool,
    again: bool,
    files: Callable[[], Iterable[Path]] | None,
    parts_hold: Callable[[], bool],
    take_alone: Callable[[], None],
) -> Outcome:
    """Prepare to make an artifact and save its recipe, which the manifest replaces at the end.

    `take_alone` is called before something is replaced that other workers may be making.
    """
    finished, unfinished = manifest_path(artifact), unfinished_path(artifact)
    found = finished if finished.is_file() else unfinished if unfinished.is_file() else None
    made: dict[str, Any] | None = None
    try:
        made = None if found is None else _read(found)
    except UserError as error:
        if not overwrite:
            raise UserError(f"{error}; pass --overwrite to make {artifact} again, or delete the file") from error
    if found is None:
        take_alone()  # somebody may have removed the folder of workers that are still at work
        if artifact.is_file() and not overwrite:
            print(f"using the file supplied: {artifact}")
            return Outcome.PROVIDED
    elif made is not None and found == finished and made["stage"] == IMPORTED != recipe["stage"] and not overwrite:
        check_chain(artifact)
        print(f"using what was imported: {artifact}")
        return Outcome.PROVIDED
    elif made is None or _differences(made, recipe):
        differences = [] if made is None else _differences(made, recipe)
        if made and found == unfinished and made["settings"] == recipe["settings"] and parts_hold():
            take_alone()
            write_json(unfinished, recipe)
            return Outcome.RAN
        # An unfinished run that failed at once has nothing to lose.
        if not overwrite and (found == finished or any(_parts(artifact, files))):
            assert made is not None  # one that cannot be read was refused above
            what = "was made from" if found == finished else "is unfinished and was begun with"
            raise StaleArtifact(
                f"{artifact} {what} other inputs or settings ({'; '.join(differences)}): "
                f"pass --overwrite to replace it, or move it away{_to_keep(made, recipe)}",
                differences,
            )
        take_alone()
        # The old recipe stays until all is removed: if that is interrupted, the rest does not pass for parts of the new one.
        os.replace(found, unfinished)
        for path in _parts(artifact, files):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
    elif found == finished:
        missing, changed = _damaged(finished, made)
        if changed and not overwrite:
            raise _changed(artifact, changed[0], "pass --overwrite to make it again")
        if not missing and not changed and not again:  # another process has just finished it
            return Outcome.ALREADY_DONE
        take_alone()
        for path in changed:  # or a stage would take it for a finished part
            path.unlink()
    _remove_leftovers(artifact)
    finished.unlink(missing_ok=True)
    write_json(unfinished, recipe)
    return Outcome.RAN


def _differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One phrase for each setting or input in which two recipes differ."""

    def differing(part: str) -> list[str]:
        keys = made[part].keys() | wanted[part].keys()
        return sorted(key for key in keys if made[part].get(key) != wanted[part].get(key))

    def phrase(key: str) -> str:
        was, now = made["settings"].get(key), wanted["settings"].get(key)
        if not isinstance(was, dict) or not isinstance(now, dict):
            was, now = ("the default" if value is None else repr(value) for value in (was, now))
            return f"{key} was {was}, now {now}"
        return f"{key} of {', '.join(sorted(k for k in was.keys() | now.keys() if was.get(k) != now.get(k)))} changed"

    def change(key: str) -> str:
        return "is left out" if key not in wanted["inputs"] else "is new" if key not in made["inputs"] else "has changed"

    return [*map(phrase, differing("settings")), *(f"{key} {change(key)}" for key in differing("inputs"))]


def _to_keep(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The flags with which an artifact stays as it is, if flags alone differ."""
    was, now, run = made["settings"], wanted["settings"], made.get("run", {})
    differing = [key for key in was.keys() | now.keys() if was.get(key) != now.get(key)]
    known = all(type(run.get(key)) in (str, int, float) and was.get(key, run[key]) == run[key] for key in differing)
    if made["inputs"] != wanted["inputs"] or not known:
        return ""
    told = " ".join(f"--{key} {shlex.quote(str(run[key]))}" for key in sorted(differing))
    return told and f"; to keep it, add {told}"


def _parts(artifact: Path, files: Callable[[], Iterable[Path]] | None) -> list[Path]:
    """What exists of an artifact, apart from its recipe."""
    found = files() if files is not None else artifact.iterdir() if artifact.is_dir() else [artifact]
    kept = (unfinished_path(artifact), lock_path(artifact))
    return [path for path in list(found) if path not in kept and path.exists()]


def _remove_leftovers(artifact: Path) -> None:
    """Remove the temporary files of killed processes from an artifact's folder, and from those in a folder artifact."""
    if not artifact.is_dir():
        remove_leftovers(artifact.parent)
        return
    for folder, _, _ in os.walk(artifact):
        remove_leftovers(Path(folder))


# --------------------------------------------------------------------------------------------------------- checking

ALWAYS_HASHED = 1 << 20
"""Files up to this many bytes are always compared by their hashes: names, for example, which people edit."""
_hashing = False


@contextmanager
def verifying_hashes() -> Iterator[None]:
    """In this block, large files too are compared with their manifests by their hashes, not only by their sizes."""
    global _hashing
    before, _hashing = _hashing, True
    try:
        yield
    finally:
        _hashing = before


def verifying() -> bool:
    """Whether the contents of all files are compared, not only the sizes of large ones."""
    return _hashing


def check_chain(artifact: Path) -> None:
    """Compare an artifact and everything it was made from with their manifests.

    The artifact's own files must exist, in the recorded sizes; small files, and if `verifying` all, with the recorded
    hashes. An input that was moved away is not compared: nothing is known to have changed.

    Raises:
        StaleArtifact: a file has changed since it was made, or since the artifact was made from it.
        UserError: a file of the artifact is missing, or a manifest cannot be read.
    """
    _check_chain(artifact, set())


def _check_chain(artifact: Path, checked: set[Path]) -> None:
    manifest = manifest_path(artifact)
    if artifact in checked or not manifest.is_file():
        return
    made = read_manifest(artifact)
    missing, changed = _damaged(manifest, made)
    if missing and not checked:
        raise UserError(f"{missing[0]} is missing: {how_made_again(made)}")
    checked.add(artifact)
    if changed:
        raise _changed(artifact, changed[0], how_made_again(made))
    for name, place in made["sources"].items():
        source = Path(os.path.normpath(manifest.parent / place))
        if not manifest_path(source).is_file() and not source.is_file():
            continue
        _check_chain(source, checked)
        if fingerprint(source) != made["inputs"][name]:
            raise StaleArtifact(
                f"{artifact} is out of date: {name} ({source}) has changed since it was made; {how_made_again(made)}",
                [f"{name} has changed"],
            )


def _damaged(manifest: Path, made: Mapping[str, Any]) -> tuple[list[Path], list[Path]]:
    """The files of a finished artifact that are missing, and those that are not what was written; foreign parts count too."""
    missing, changed = [], []
    outputs = {manifest.parent / name: output for name, output in made["outputs"].items()}
    for path, output in outputs.items():
        try:
            size = path.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            missing.append(path)
            continue
        hashed = _hashing or size <= ALWAYS_HASHED
        if size != output["bytes"] or (hashed and _hash_of(path) != output["sha256"]):
            changed.append(path)
    if manifest.name == MANIFEST:
        changed += sorted(path for path in manifest.parent.iterdir() if _PART.fullmatch(path.name) and path not in outputs)
    return missing, changed


def _changed(artifact: Path, path: Path, again: str) -> StaleArtifact:
    keep = "" if artifact.is_dir() else f", or remove {manifest_path(artifact)} to use the file as it is"
    return StaleArtifact(f"{path} has changed since it was made: {again}{keep}", [f"{path.name} has changed"])


def how_made_again(made: Mapping[str, Any]) -> str:
    """For messages: what to do so that an artifact with this manifest is made again."""
    stage = made["stage"]
    if stage == IMPORTED:
        return "import it again with `python scripts/12_import_published.py FOLDER --overwrite`"
    if stage == ALIGNED:
        told = {"sae": made["details"].get("copy_of"), ALIGNED: made["settings"].get(ALIGNED)}
        told |= {flag: made["run"].get(flag) for flag in ("img_enc_name", "sae_dataset")}
        said = " ".join(f"--{flag} {shlex.quote(str(value))}" for flag, value in told.items())
        return f"make it again with `python scripts/04_assign_names.py {said} --overwrite`"
    return f"make it again with `python scripts/run_pipeline.py --from {stage} --to {stage} --overwrite` and the same flags"


# -------------------------------------------------------------------------------------------- manifests, fingerprints


MANIFEST = "manifest.json"
_PART = re.compile(r"\d+(\.keys)?\.np[yz]")
"""The numbered files of a folder artifact, whose readers take all that are there."""


def manifest_path(artifact: Path) -> Path:
    """`manifest.json` inside a folder artifact (its name has no file suffix), `<file>.manifest.json` beside a file."""
    if artifact.suffix in (".safetensors", ".npy", ".csv", ".json", ".pt", ".pth"):
        return artifact.with_name(f"{artifact.name}.{MANIFEST}")
    return artifact / MANIFEST


def unfinished_path(artifact: Path) -> Path:
    """The recipe of an artifact that is being made; its manifest replaces it."""
    return manifest_path(artifact).with_suffix(".unfinished")


def read_manifest(artifact: Path) -> dict[str, Any]:
    """The manifest of an artifact. Raises UserError if it is missing or damaged."""
    return _read(manifest_path(artifact))


def read_recipe(artifact: Path) -> dict[str, Any]:
    """Stage, settings and inputs of an artifact, finished or not. Raises UserError if they are missing or damaged."""
    finished = manifest_path(artifact)
    return _read(finished if finished.is_file() else unfinished_path(artifact))


def _read(path: Path) -> dict[str, Any]:
    """A manifest, or the recipe of an unfinished artifact. Raises UserError if it is neither."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        is_sound = _is_recipe(loaded) and (path.suffix == ".unfinished" or _is_manifest(loaded))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read the manifest {path}: {first_line(error)}") from error
    if not is_sound:
        raise UserError(f"cannot read the manifest {path}: it lacks what a manifest holds")
    found: dict[str, Any] = loaded | {"settings": in_todays_words(loaded["settings"])}
    return found


def _is_recipe(loaded: Any) -> bool:
    if not isinstance(loaded, dict) or not isinstance(loaded.get("stage"), str):
        return False
    return all(isinstance(loaded.get(part), dict) for part in ("settings", "inputs"))


def _is_manifest(loaded: dict[str, Any]) -> bool:
    """Whether a recipe is followed by what was made; outputs lie beside their manifest, since changed ones are removed."""
    parts = [loaded.setdefault(part, {}) for part in ("run", "sources", "outputs", "details")]
    if not all(isinstance(part, dict) for part in parts) or not loaded["sources"].keys() <= loaded["inputs"].keys():
        return False
    if not all(isinstance(place, str) for place in loaded["sources"].values()):
        return False
    return bool(loaded["outputs"]) and all(
        isinstance(about, dict)
        and isinstance(about.get("bytes"), int)
        and isinstance(about.get("sha256"), str)
        and not os.path.isabs(name)
        and ".." not in Path(name).parts
        for name, about in loaded["outputs"].items()
    )


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


def _hash_of(path: Path) -> str:
    """The hash of a file, computed once per command as long as the file stays the same."""
    stat = path.stat()
    return _hash_of_version(path, stat.st_size, stat.st_mtime_ns)


@cache
def _hash_of_version(path: Path, size: int, time_ns: int) -> str:
    return file_hash(path)


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
