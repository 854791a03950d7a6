"""The config: config.py, or the file that $DNCBM_CONFIG names, with every key checked and every path resolved."""

import difflib
import os
import re
import runpy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dncbm.runs.declarations import NAME, NAMED, SPLITS, NamedEncoder
from dncbm.runs.errors import UserError, first_line
from sparse_autoencoder.declare import flags

ROOTS = ("data_dir", "sae_dir", "probe_dir", "vocab_dir", "analysis_dir")
ROOT = Path(__file__).resolve().parents[2]
"""The checkout, which holds the default config.py and scripts/."""
LOCAL_DIR = "local-dir:"
OPEN_CLIP = "openclip:"
PIPE = "pipe"
WEB = ("https", "http")


@dataclass(frozen=True)
class EncoderEntry:
    """How open_clip makes an encoder: a model name with a pretrained tag or file, or a `local-dir:` folder."""

    model: str
    """open_clip's model name, or `local-dir:` and an absolute folder."""
    pretrained: str | None
    """A pretrained tag of open_clip, an absolute checkpoint file, or None (random weights, or a `local-dir:`)."""


@dataclass(frozen=True)
class ProbeSource:
    """Where the images of a probe data set are, and how they are read."""

    path: Path
    reader: str
    """How the folder is laid out; by default the data set's own name, if there is such a reader, else `folder`."""
    splits: Mapping[str, str]
    """Our split -> the data set's own; empty: the reader's. With `train_val`, nothing is held out of `train`."""
    names_reader: bool = False
    """Whether the entry names the reader, which must then exist."""
    license: str | None = None
    """Licence of the images and whom to credit, in words."""

    @property
    def own_splits(self) -> tuple[str, ...]:
        """The splits that the data set itself has."""
        return tuple(split for split in SPLITS if self.own_split(split) == split)

    def own_split(self, split: str) -> str:
        """The data set's own split that one of ours is taken from."""
        return "train" if split == "train_val" and split not in self.splits else split


@dataclass(frozen=True)
class Settings:
    """The contents of a config file, checked, with absolute paths."""

    path: Path
    """The config file itself, to name in errors."""
    data_dir: Path
    sae_dir: Path
    probe_dir: Path
    vocab_dir: Path
    analysis_dir: Path
    vocabulary: str
    sae_datasets: Mapping[str, Mapping[str, tuple[str, ...]] | Path]
    """Name -> split -> patterns of webdataset shards, or name -> folder of images."""
    probe_datasets: Mapping[str, ProbeSource]
    encoders: Mapping[str, EncoderEntry]
    defaults: Mapping[str, Any]
    """Flag name -> value that replaces the flag's default."""

    def encoder(self, name: str) -> EncoderEntry:
        """The entry of an encoder: a name of the table, `openclip:MODEL/PRETRAINED` or `local-dir:FOLDER`.

        Raises:
            UserError: no such name, or a malformed one.
        """
        if name.startswith(LOCAL_DIR) and name not in self.encoders:
            return EncoderEntry(LOCAL_DIR + str(Path(name.removeprefix(LOCAL_DIR)).absolute()), None)
        if name.startswith(OPEN_CLIP) and name not in self.encoders:
            model, slash, pretrained = name.removeprefix(OPEN_CLIP).rpartition("/")
            if not slash or not model or not pretrained:
                raise UserError(f"encoder {name!r}: write openclip:MODEL/PRETRAINED, for example openclip:RN50/openai")
            return EncoderEntry(model, pretrained)
        entry: EncoderEntry = self._entry("encoders", name, "encoder")
        return entry

    def sae_dataset(self, name: str) -> Mapping[str, tuple[str, ...]] | Path:
        """Split -> shard patterns, or the folder, of the SAE's images. Raises UserError if config has no such data set."""
        source: Mapping[str, tuple[str, ...]] | Path = self._entry("sae_datasets", name, "--sae_dataset")
        return source

    def probe_dataset(self, name: str) -> ProbeSource:
        """Where a probe data set is. Raises UserError if config has no such data set or its folder is missing."""
        source: ProbeSource = self._entry("probe_datasets", name, "--probe_dataset")
        if not source.path.is_dir():
            raise UserError(
                f"the folder {source.path} is missing: probe_datasets[{name!r}] in {self.path} names it; put the images there"
            )
        return source

    def own_split(self, dataset: str, split: str) -> str:
        """The own split of a probe data set that one of ours is taken from. Raises UserError if config lacks the data set."""
        source: ProbeSource = self._entry("probe_datasets", dataset, "--probe_dataset")
        return source.own_split(split)

    def _entry(self, key: str, name: str, what: str) -> Any:
        entries = getattr(self, key)
        if name not in entries:
            known = ", ".join(entries) or "nothing"
            raise UserError(f"{what} {name!r} is not in `{key}` of {self.path}, which has: {known}")
        return entries[name]


def public_path(path: Path) -> str:
    """A path as something that is published shows it: without where things lie on this machine."""
    if path.is_relative_to(ROOT):
        return path.relative_to(ROOT).as_posix()
    return f"/path/to/{path.name}" if path.is_absolute() else path.as_posix()


def config_path() -> Path:
    """The config file in use: the one $DNCBM_CONFIG names, else config.py beside the dncbm package."""
    named = os.environ.get("DNCBM_CONFIG")
    path = Path(named).absolute() if named else ROOT / "config.py"
    if path.is_dir():
        raise UserError(f"DNCBM_CONFIG names the folder {path}: name the config file in it, for example {path / 'config.py'}")
    if not path.is_file():
        source = "the environment variable DNCBM_CONFIG names it" if named else "set DNCBM_CONFIG to your config file"
        raise UserError(f"the config file {path} is missing: {source}")
    return path


def load_settings(path: Path | None = None) -> Settings:
    """Read and check a config file.

    Args:
        path: the file; without it, `config_path()`.

    Raises:
        UserError: the file is missing, does not run, or a key is missing, misspelt or of the wrong kind.
    """
    path = (path or config_path()).absolute()
    try:
        names = runpy.run_path(str(path)).items()
        found = {k: v for k, v in names if not k.startswith("_") and not isinstance(v, ModuleType)}
    except (Exception, SystemExit) as error:
        encoding = "; save it as UTF-8" if "codec can't decode" in str(error) else ""
        raise UserError(f"{path} does not run: {type(error).__name__}: {first_line(error)}{encoding}") from error
    return _checked(path, found)


def _checked(path: Path, found: dict[str, Any]) -> Settings:
    keys = (*ROOTS, "vocabulary", "sae_datasets", "probe_datasets", "encoders", "defaults")
    for key in found:
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1)
            raise UserError(f"{path}: unknown key `{key}`" + (f"; did you mean `{near[0]}`?" if near else ""))
    found.setdefault("defaults", {})
    for key in keys:
        if key not in found:
            raise UserError(f"{path}: the key `{key}` is missing; see config.py at the top of the repository")
        wanted: tuple[type, ...] = (str, Path) if key in ROOTS else (str,) if key == "vocabulary" else (dict,)
        if not isinstance(found[key], wanted):
            raise UserError(f"{path}: `{key}` must be a {wanted[0].__name__}, not {found[key]!r}")
    _check_names(path, found)
    for where, text in _paths(found):
        if not str(text) or "\0" in str(text):
            raise UserError(f"{path}: {where} must be a path, not {str(text)!r}")

    base = path.parent
    roots = {key: base / found[key] for key in ROOTS}
    for key, root in roots.items():
        if not root.parent.is_dir():
            value = str(found[key])
            raise UserError(f"the folder {root.parent} is missing: `{key}` in {path} is {value!r}; make it or correct the key")
        if root.exists() and not root.is_dir():
            raise UserError(f"{root} is not a folder: `{key}` in {path} names it; correct the key, or move the file away")
    for name, source in found["sae_datasets"].items():
        if not isinstance(source, str | Path) and (
            not isinstance(source, dict) or set(source) != set(SPLITS) or not all(map(_are_patterns, source.values()))
        ):
            raise UserError(
                f"{path}: sae_datasets[{name!r}] must have the keys {', '.join(SPLITS)}, each a shard pattern or a list of "
                "shard patterns, or be a folder"
            )
        if name in found["probe_datasets"]:
            raise UserError(f"{path}: {name!r} is in sae_datasets and in probe_datasets, so their files would mix: rename one")
    by_folder: dict[str, str] = {}
    for name in found["encoders"]:
        other = by_folder.setdefault(name.replace("/", ""), name)
        if other != name:
            raise UserError(f"{path}: the encoders {other!r} and {name!r} would share a folder: rename one")
    return Settings(
        path=path,
        **roots,
        vocabulary=found["vocabulary"],
        sae_datasets={
            name: {split: tuple(_joined(base, one) for one in _listed(patterns)) for split, patterns in source.items()}
            if isinstance(source, dict)
            else base / source
            for name, source in found["sae_datasets"].items()
        },
        probe_datasets={name: _probe_source(path, name, entry) for name, entry in found["probe_datasets"].items()},
        encoders={name: _encoder_entry(path, name, entry) for name, entry in found["encoders"].items()},
        defaults=found["defaults"],
    )


def _check_names(path: Path, found: Mapping[str, Any]) -> None:
    """Refuse names that are no names of folders: some would lead out of the roots."""
    slashes_too = flags(NamedEncoder)["img_enc_name"].setting.pattern  # encoder_folder takes them out
    names = [("`vocabulary`", found["vocabulary"], NAME)]
    names += [(f"a key of `{key}`", name, NAME) for key in ("sae_datasets", "probe_datasets") for name in found[key]]
    names += [("a key of `encoders`", name, slashes_too) for name in found["encoders"]]
    for what, name, pattern in names:
        if not isinstance(name, str) or not re.fullmatch(pattern, name) or len(os.fsencode(name)) > 100:
            shown = name if not isinstance(name, str) or len(name) <= 100 else f"{name[:60]}..."
            raise UserError(f"{path}: {what} must {NAMED}, not {shown!r}")


def _paths(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every path in a config, and where it stands."""
    yield from ((f"`{key}`", found[key]) for key in ROOTS)
    for key in ("sae_datasets", "probe_datasets"):
        for name, entry in found[key].items():
            where = f"{key}[{name!r}]"
            if isinstance(entry, dict):
                for one, value in entry.items():
                    if one == "license":
                        continue
                    at = f"{where}[{one!r}]"
                    yield from ((at, path) for path in _listed(value) if isinstance(path, str | Path))
            elif isinstance(entry, str | Path):
                yield where, entry


def scheme_of(pattern: str) -> str:
    """How the shards of a pattern are reached: `https`, PIPE, ... by what precedes `://`, or "" for local files."""
    found = re.match(rf"({PIPE}):|([a-z][a-z0-9+.-]*)://", pattern, re.ASCII | re.IGNORECASE)
    return (found[1] or found[2]).lower() if found else ""


def _joined(base: Path, pattern: str) -> str:
    return pattern if scheme_of(pattern) else str(base / pattern)


def _listed(patterns: Any) -> Sequence[Any]:
    """The patterns of a split, which are one or a list."""
    return patterns if isinstance(patterns, list | tuple) else (patterns,)


def _are_patterns(value: Any) -> bool:
    return bool(_listed(value)) and all(isinstance(pattern, str) for pattern in _listed(value))


def _probe_source(path: Path, name: str, entry: Any) -> ProbeSource:
    where = f"{path}: probe_datasets[{name!r}]"
    if isinstance(entry, str | Path):
        entry = {"path": entry}
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str | Path):
        raise UserError(f'{where} must be a folder or {{"path": FOLDER, "reader": NAME, "splits": {{...}}}}, not {entry!r}')
    if unknown := sorted(set(entry) - {"path", "reader", "splits", "license"}):
        raise UserError(f"{where} has the unknown key {unknown[0]!r}; it may have path, reader, splits and license")
    splits, reader = entry.get("splits", {}), entry.get("reader", name)
    complete = isinstance(splits, dict) and (not splits or {"train", "val"} <= set(splits) <= set(SPLITS))
    if not complete or not all(isinstance(own, str) for own in splits.values()):
        raise UserError(f"{where}: splits must name the data set's own train, val and, if it has one, train_val: {splits!r}")
    if splits and splits["train"] == splits.get("train_val"):
        raise UserError(
            f"{where}: train and train_val are the same split, {splits['train']!r}: leave train_val out, and a tenth of train "
            "is held out for it"
        )
    if not isinstance(reader, str):
        raise UserError(f"{where}: reader must be a name, not {reader!r}")
    if not isinstance(license := entry.get("license"), str | None):
        raise UserError(f"{where}: license must be a text, not {license!r}")
    return ProbeSource(path.parent / entry["path"], reader, splits, "reader" in entry, license)


def _encoder_entry(path: Path, name: str, entry: Any) -> EncoderEntry:
    if isinstance(entry, str) and entry.startswith(LOCAL_DIR):
        return EncoderEntry(LOCAL_DIR + str(path.parent / entry.removeprefix(LOCAL_DIR)), None)
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], str | None):
        model, pretrained = entry
        if pretrained and (path.parent / pretrained).is_file():
            pretrained = str(path.parent / pretrained)
        return EncoderEntry(model, pretrained)
    raise UserError(f'{path}: encoders[{name!r}] must be ("MODEL", "PRETRAINED") or "local-dir:FOLDER", not {entry!r}')
