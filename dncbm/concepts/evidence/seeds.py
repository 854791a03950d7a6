"""Which SAEs differ from another only in their seed, and the commands that train those that are missing."""

import logging
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from dncbm.concepts.naming import NAMES
from dncbm.concepts.sae import SAE
from dncbm.runs.artifacts import Artifacts, aligned_suffix
from dncbm.runs.declarations import SAERun, Seeds
from dncbm.runs.errors import UserError
from dncbm.runs.find import TELLING, changed_flags
from dncbm.runs.manifests import ALIGNED, manifest_path, read_manifest
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import build, flags, identity, values

SEEDED = {"seed", "shuffle"}
"""Settings in which SAEs may differ: the seed, and how images are shuffled, which it draws."""
messages = logging.getLogger(__name__)


def runs_to_compare(settings: Settings, run: SAERun, seeds: Seeds) -> dict[int, SAERun]:
    """Seed -> SAE, for the SAEs that differ from that of `run` only in their seed; by default all that are trained.

    Raises UserError, with the commands that train them, if there is no other, one that is asked for is missing or differs in
    more, or a seed is given twice.
    """
    artifacts, own = Artifacts(settings), run.training.seed
    if len(set(seeds.seeds)) < len(seeds.seeds):
        raise UserError(f"--seeds {listed(seeds.seeds)} names a seed twice: give each seed once")
    asked = {seed: _with_seed(run, seed) for seed in sorted(seeds.seeds) if seed != own}
    if seeds.seeds and not asked:
        raise UserError(f"--seeds {own} is the SAE itself: add the seeds to compare it with")
    if absent := [seed for seed, other in asked.items() if not artifacts.sae_in_use(other).is_file()]:
        what = f"the SAE of seed {absent[0]} is" if len(absent) == 1 else f"the SAEs of the seeds {listed(absent)} are"
        raise UserError(f"{what} missing: run {training_commands(settings, run, absent)}, or change --seeds")
    found = asked or {other.training.seed: other for other in _trained(artifacts, run)}
    for seed, other in list(found.items()):
        if differing := _differing(artifacts.sae_in_use(run), artifacts.sae_in_use(other)):
            said = f"the SAE of seed {seed} differs in other settings, too ({', '.join(differing)})"
            if asked:
                again = training_commands(settings, run, [seed], "--overwrite")
                raise UserError(f"{said}: make it again with {again}, or change --seeds")
            messages.warning("%s; left out", said)
            del found[seed]
    if not found:
        raise UserError(
            f"there is no SAE that differs from {artifacts.sae_in_use(run)} only in its seed: train at least one more, with "
            + training_commands(settings, run, [unused_seed([own])])
        )
    return dict(sorted(found.items()))


def listed(seeds: Iterable[int]) -> str:
    """Seeds as a message writes them."""
    return ", ".join(map(str, seeds))


def unused_seed(seeds: Collection[int]) -> int:
    """A seed that is none of these, for an example."""
    most = flags(SAERun)["seed"].setting.most
    later = max(seeds) + 1
    return later if most is None or later <= most else min(set(range(len(seeds) + 1)) - set(seeds))


def _with_seed(run: SAERun, seed: int) -> SAERun:
    return replace(run, training=replace(run.training, seed=seed))


def _trained(artifacts: Artifacts, run: SAERun) -> Iterable[SAERun]:
    """The runs of other seeds whose SAEs have a manifest, since names are not parsed; a damaged one is passed over."""
    for path in sorted(artifacts.saes()):
        if not manifest_path(path).is_file():
            continue
        try:
            seed = _recorded(path).training.seed
        except Exception as error:  # whatever a damaged manifest holds
            reason = str(error) if isinstance(error, UserError) else f"{manifest_path(path)} describes no SAE: {error!r}"
            messages.warning("%s; passed over", reason)
            continue
        other = _with_seed(run, seed)
        if seed != run.training.seed and artifacts.sae_in_use(other) == path:
            yield other


def _recorded(path: Path) -> SAERun:
    return build(SAERun, read_manifest(path)["run"])


def _differing(first: Path, second: Path) -> list[str]:
    """The settings, except the seed, in which two SAEs differ, as far as their manifests tell."""
    if not all(manifest_path(path).is_file() for path in (first, second)):
        return []
    one, other = _trained_with(first), _trained_with(second)
    return sorted(key for key in (one.keys() | other.keys()) - SEEDED if one.get(key) != other.get(key))


def _trained_with(path: Path) -> Mapping[str, Any]:
    """The settings that an SAE depends on. Manifests of imported ones hold them only as flags."""
    made = read_manifest(path)
    found: Mapping[str, Any] = made["settings"] if made["stage"] in (SAE.name, ALIGNED) else identity(_recorded(path))
    return found


def training_commands(settings: Settings, run: SAERun, seeds: Iterable[int], *more: str) -> str:
    """The commands that make the SAEs of these seeds, with the flags of a run that are not the defaults of config.py."""
    stage, aligned = SAE, list[str]()
    path = Artifacts(settings).sae_in_use(run)
    if manifest_path(path).is_file() and (made := read_manifest(path))["stage"] == ALIGNED:
        strength = made["settings"][ALIGNED]
        stage, aligned = NAMES, ["--align_names", str(strength)]
        run = replace(run, suffix=run.suffix.removesuffix(aligned_suffix(strength)))
    told = values(run)
    words = changed_flags(settings, told, [name for name in TELLING if name in told and name != "seed"])
    return ", then ".join(stage.command(*map(shlex.quote, words), "--seed", str(seed), *aligned, *more) for seed in seeds)
