"""Which SAE, probe or explanation is meant where no flag says so: the preset's, or the only one there is. It is said aloud."""

from pathlib import Path
from typing import TypeVar

from dncbm.artifacts import Artifacts, ProbeRun, SAERun
from dncbm.errors import UserError
from dncbm.settings import Settings

Run = TypeVar("Run", SAERun, ProbeRun)


def find_sae(settings: Settings, preset: SAERun, which: str) -> SAERun:
    """The SAE of the preset, else the only one on the same features.

    Args:
        settings: the config.
        preset: the run that no flag changed.
        which: what the preset is, in words.

    Raises:
        UserError: the preset's was not trained, and none or several others were.
    """
    artifacts = Artifacts(settings)
    folder = artifacts.sae(preset).parent.parent.parent
    found = artifacts.sae_runs(preset)
    chosen, reason = _choose("SAE", preset, found, which, folder, "02_train_sae_img.py")
    print(f"SAE: {chosen.config_name} ({reason})")
    return chosen


def find_probe(settings: Settings, run: SAERun, preset: ProbeRun, which: str) -> ProbeRun:
    """The probe of the preset on an SAE's strengths, else the only one of the same data set. Raises as `find_sae`."""
    artifacts = Artifacts(settings)
    folder = artifacts.probe(run, preset).parent.parent.parent
    found = artifacts.probe_runs(run, preset)
    chosen, reason = _choose("probe", preset, found, which, folder, "07_train_linear_probe.py")
    print(f"probe: {chosen.config_name} ({reason})")
    return chosen


def find_explanation(settings: Settings, wanted: Path, script: str, *, any_sae: bool, any_last: bool) -> Path:
    """The folder of an explanation that was computed: `wanted`, else the only one like it.

    Args:
        settings: the config.
        wanted: its folder by the flags and presets.
        script: the script that computes it.
        any_sae: no flag names the SAE.
        any_last: no flag names the probe, or the number of clusters.

    Raises:
        UserError: `wanted` was not computed, and none or several like it were.
    """
    artifacts = Artifacts(settings)
    found = artifacts.explanations_like(wanted, any_sae=any_sae, any_last=any_last)
    if wanted in found:
        return wanted
    if len(found) == 1:
        print(f"drawn from the only one computed: {artifacts.dump(found[0])}")
        return found[0]
    place = wanted.parent if any_last else wanted
    others = f", or name one of {', '.join(map(str, found))} by its flags" if found else ""
    raise UserError(
        f"nothing to draw in {place}: run `python scripts/visualization/{script}` with the same flags{others}"
    )


def _choose(kind: str, preset: Run, found: list[Run], which: str, folder: Path, script: str) -> tuple[Run, str]:
    if preset.config_name in [run.config_name for run in found]:
        return preset, which
    if len(found) == 1:
        return found[0], f"the only one there; {which} would be {preset.config_name}"
    if found:
        advice = f"there are {', '.join(run.config_name for run in found)}: name one by its flags"
    else:
        advice = f"train it with `python scripts/{script}`"
    raise UserError(f"no {kind} {preset.config_name} ({which}) in {folder}: {advice}")
