"""Which finished output is meant where flags leave it open. Manifests hold every setting; names are never parsed."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dncbm.runs.artifacts import Artifacts
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import manifest_path, read_manifest
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder.declare import build


def find(settings: Settings, stage: Stage, values: Mapping[str, Any], given: Collection[str]) -> dict[str, Any]:
    """The settings of the finished output of a stage that flags mean.

    It is the one that all flags and defaults name, if it exists; else the only one that agrees with the flags given. Data
    sets, the encoder, its hook point and the split are never guessed.

    Args:
        settings: the config.
        stage: whose output is meant.
        values: flag -> value, defaults included.
        given: the flags on the command line.

    Returns:
        Flag -> value of that output.

    Raises:
        UserError: there is none, or more than one.
    """
    artifacts, flags = Artifacts(settings), stage.flags()
    wanted = list(stage.outputs(artifacts, *(build(declared, values) for declared in stage.takes)))
    if wanted and all(path.is_file() or manifest_path(path).is_file() for path in wanted):
        print(f"{stage.name}: {_shown(wanted[0])}")
        return dict(values)
    fixed = [name for name, flag in flags.items() if name in given or flag.setting.in_name == ""]
    found: dict[Path, dict[str, Any]] = {}
    for path in stage.made(artifacts):
        if manifest_path(path).is_file():
            run = read_manifest(path).get("run", {})
            if run and all(run.get(name, values[name]) == values[name] or values[name] is None for name in fixed):
                found[path] = run
    if len(found) == 1:
        ((path, run),) = found.items()
        print(f"{stage.name}: {_shown(path)} (the only one that the flags allow)")
        return dict(values) | run
    if found:
        listed = ", ".join(str(_shown(path)) for path in found)
        raise UserError(f"several outputs of `{stage.name}` agree with the flags: name one by its flags: {listed}")
    raise stage.missing(f"the output of `{stage.name}`", wanted[0])


def _shown(path: Path) -> Path:
    return path.parent if path.name == "data" else path
