"""Loads config.py (or the file that $DNCBM_CONFIG names), checks every key, and resolves its paths."""

import difflib
import os
import runpy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from dncbm.errors import UserError

ROOTS = ("data_dir", "sae_dir", "probe_dir", "vocab_dir", "analysis_dir")
SPLITS = ("train", "train_val", "val")
LOCAL_DIR = "local-dir:"
OPEN_CLIP = "openclip:"


@dataclass(frozen=True)
class EncoderEntry:
    """How open_clip makes an encoder: a model name with a pretrained tag or file, or a `local-dir:` folder."""

    model: str
    """open_clip's model name, or `local-dir:` and an absolute folder."""
    pretrained: str | None
    """A pretrained tag of open_clip, an absolute checkpoint file, or None (random weights, or a `local-dir:`)."""


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
    sae_datasets: Mapping[str, Mapping[str, str] | Path]
    """Name -> split -> webdataset shard pattern, or name -> folder of images."""
    probe_datasets: Mapping[str, Path]
    encoders: Mapping[str, EncoderEntry]
    defaults: Mapping[str, Any]
    """Flag name -> value that replaces the flag's default."""

    def encoder(self, name: str) -> EncoderEntry:
        """The entry of an encoder: a name of the table, `openclip:MODEL/PRETRAINED` or `local-dir:FOLDER`.

        Raises:
            UserError: no such name, or a malformed one.
        """
        if name in self.encoders:
            return self.encoders[name]
        if name.startswith(LOCAL_DIR):
            return EncoderEntry(LOCAL_DIR + str(Path(name.removeprefix(LOCAL_DIR)).absolute()), None)
        if name.startswith(OPEN_CLIP):
            model, slash, pretrained = name.removeprefix(OPEN_CLIP).rpartition("/")
            if not slash or not model or not pretrained:
                raise UserError(f"encoder {name!r}: write openclip:MODEL/PRETRAINED, for example openclip:RN50/openai")
            return EncoderEntry(model, pretrained)
        raise self._unknown("encoder", name, self.encoders, "encoders")

    def sae_dataset(self, name: str) -> Mapping[str, str] | Path:
        """Split -> shard pattern, or the folder, of a dataset for the SAE. Raises UserError if config has no such dataset."""
        if name not in self.sae_datasets:
            raise self._unknown("--sae_dataset", name, self.sae_datasets, "sae_datasets")
        return self.sae_datasets[name]

    def probe_dataset(self, name: str) -> Path:
        """Folder of a probe dataset. Raises UserError if config has no such dataset or the folder is not there."""
        if name not in self.probe_datasets:
            raise self._unknown("--probe_dataset", name, self.probe_datasets, "probe_datasets")
        folder = self.probe_datasets[name]
        if not folder.is_dir():
            raise UserError(
                f"no folder {folder}: probe_datasets[{name!r}] in {self.path} names it; put the images there"
            )
        return folder

    def _unknown(self, what: str, name: str, known: Mapping[str, Any], key: str) -> UserError:
        return UserError(
            f"{what} {name!r} is not in `{key}` of {self.path}, which has: {', '.join(known) or 'nothing'}"
        )


def config_path() -> Path:
    """The config file in use: the one $DNCBM_CONFIG names, else config.py beside the dncbm package."""
    named = os.environ.get("DNCBM_CONFIG")
    path = Path(named).absolute() if named else Path(__file__).resolve().parent.parent / "config.py"
    if not path.is_file():
        source = "the environment variable DNCBM_CONFIG names it" if named else "set DNCBM_CONFIG to your config file"
        raise UserError(f"no config file {path}: {source}")
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
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(f"{path} does not run: {type(error).__name__}: {reason}") from error
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

    base = path.parent
    roots = {key: base / found[key] for key in ROOTS}
    for key, root in roots.items():
        if not root.parent.is_dir():
            raise UserError(
                f"no folder {root.parent}: `{key}` in {path} is {str(found[key])!r}; make it or correct the key"
            )
    for name, source in found["sae_datasets"].items():
        if not isinstance(source, str | Path) and (
            not isinstance(source, dict)
            or set(source) != set(SPLITS)
            or not all(isinstance(p, str) for p in source.values())
        ):
            raise UserError(
                f"{path}: sae_datasets[{name!r}] needs the keys {', '.join(SPLITS)}, each a shard pattern, or is a folder"
            )
        if name in found["probe_datasets"]:
            raise UserError(
                f"{path}: {name!r} is in sae_datasets and probe_datasets, whose files would mix: rename one"
            )
    for name, folder in found["probe_datasets"].items():
        if not isinstance(folder, str | Path):
            raise UserError(f"{path}: probe_datasets[{name!r}] must be a folder, not {folder!r}")
    by_folder: dict[str, str] = {}
    for name in found["encoders"]:
        other = by_folder.setdefault(name.replace("/", ""), name)
        if other != name:
            raise UserError(f"{path}: the files of the encoders {other!r} and {name!r} would have one name: rename one")
    return Settings(
        path=path,
        **roots,
        vocabulary=found["vocabulary"],
        sae_datasets={
            name: {split: str(base / pattern) for split, pattern in source.items()}
            if isinstance(source, dict)
            else base / source
            for name, source in found["sae_datasets"].items()
        },
        probe_datasets={name: base / folder for name, folder in found["probe_datasets"].items()},
        encoders={name: _encoder_entry(path, name, entry) for name, entry in found["encoders"].items()},
        defaults=found["defaults"],
    )


def _encoder_entry(path: Path, name: str, entry: Any) -> EncoderEntry:
    if isinstance(entry, str) and entry.startswith(LOCAL_DIR):
        return EncoderEntry(LOCAL_DIR + str(path.parent / entry.removeprefix(LOCAL_DIR)), None)
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], str | None):
        model, pretrained = entry
        if pretrained and (path.parent / pretrained).is_file():
            pretrained = str(path.parent / pretrained)
        return EncoderEntry(model, pretrained)
    raise UserError(
        f'{path}: encoders[{name!r}] must be ("MODEL", "PRETRAINED") or "local-dir:FOLDER", not {entry!r}',
    )
