"""Runs side by side: which SAEs are meant, what they are called, and which of their concepts are the same."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dncbm.browser.shown import ShownRun
from dncbm.concepts.evidence.matching import centred, match
from dncbm.concepts.sae import SAE, firing_rates
from dncbm.explain.report.ways import Ways
from dncbm.features.encoders import check_same_encoder
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts, aligned_suffix, strength_in
from dncbm.runs.declarations import NamedSAE, ProbeRun, SAEFeatures, SAERun
from dncbm.runs.errors import UserError
from dncbm.runs.find import TELLING, find
from dncbm.runs.manifests import manifest_path, read_manifest
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import Flag, build, flags, values

BY_NAME = "sae"
"""The flag that names a run."""
IN_WORDS = {
    "l1_coeff": "L1 coefficient", "l0_coeff": "L0 coefficient", "save_suffix": "suffix", "num_epochs": "epochs",
    "train_sae_bs": "batch size", "lr": "learning rate", "resample_freq": "resampling frequency",
}  # fmt: skip
"""What flags are called in labels, where that is not their own name."""


def runs_beside(settings: Settings, run: SAERun, probe: ProbeRun, beside: Sequence[str]) -> list[tuple[SAERun, ProbeRun]]:
    """The runs to show beside another.

    Args:
        settings: the config.
        run: the SAE that they are shown beside.
        probe: its probe.
        beside: for each other SAE `FLAG=VALUE[,FLAG=VALUE...]`, the settings in which it differs, or `sae=NAME`.

    Returns:
        Each SAE with the probe of the same settings, which need not exist. A flag `--seed` is that of the SAE and of the
        probe, so the probe has the SAE's seed.

    Raises UserError if a text is malformed, names an SAE that does not exist, has other features or is named already, or a
    manifest is damaged.
    """
    artifacts, found = Artifacts(settings), list[tuple[SAERun, ProbeRun]]()
    own = artifacts.sae_in_use(run)
    named = {own: "the SAE itself"}
    for text in beside:
        try:
            other = _other(settings, run, probe, _asked(text))
            path = artifacts.sae_in_use(other)
            check_same_encoder(own, path)
        except UserError as error:
            raise UserError(f"--beside {text}: {error}") from error
        if path in named:
            raise UserError(f"--beside {text}: {path} is {named[path]}: name each other SAE once, by what its name shows")
        named[path] = f"that of --beside {text}"
        found.append((other, _probe_of(run, probe, other)))
    return found


def _asked(text: str) -> dict[str, Any]:
    """Flag -> value of one text. Raises UserError if it is malformed."""
    known: dict[str, Flag] = {**flags(NamedSAE), **flags(SAERun)}
    asked, telling = dict[str, Any](), (*TELLING, BY_NAME)
    for part in text.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise UserError("write FLAG=VALUE,FLAG=VALUE or sae=NAME, for example seed=50")
        if name in asked:
            raise UserError(f"{name} is given twice: one SAE has one value, and another SAE is another word")
        if name not in telling:
            near = difflib.get_close_matches(name, telling, n=1)
            raise UserError(f"{name!r} is no flag that tells SAEs apart" + (f"; did you mean {near[0]}?" if near else ""))
        try:
            asked[name] = known[name].parse(value)
        except ValueError as error:
            raise UserError(f"{name} {error}") from error
    if BY_NAME in asked and len(asked) > 1:
        raise UserError("sae=NAME stands for all flags: leave the others out")
    return asked


def _other(settings: Settings, run: SAERun, probe: ProbeRun, asked: dict[str, Any]) -> SAERun:
    """The SAE that differs from a run in these settings, as its manifest records it. Raises UserError as `runs_beside`."""
    own, artifacts = values(run), Artifacts(settings)
    shared = [name for name in flags(SAEFeatures) if asked.get(name, own[name]) != own[name]]
    if shared:
        raise UserError(
            f"{shared[0]} differs: runs are compared on the same images and features; make a browser of each, with other flags"
        )
    if BY_NAME in asked:
        return build(SAERun, own | _telling(find(settings, SAE, own | asked, [BY_NAME])))
    known, usual = flags(SAERun), settings.defaults
    defaults = {name: flag.parse(str(usual[name])) for name, flag in known.items() if usual.get(name) is not None}
    other = build(SAERun, defaults | own | asked)
    path = artifacts.sae_in_use(other)
    if not path.is_file():
        raise UserError(f"there is no such SAE ({path}): train it with {_training(settings, other, probe)}")
    recorded = _telling(read_manifest(path)["run"]) if manifest_path(path).is_file() else {}
    differing = [name for name in asked if recorded.get(name, asked[name]) != asked[name]]
    if differing:
        name = differing[0]
        raise UserError(f"{path} was trained with --{name} {recorded[name]}: name it as sae={other.config_name}")
    as_recorded = build(SAERun, values(other) | recorded)
    return as_recorded if artifacts.sae_in_use(as_recorded) == path else other


def _telling(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Of the settings of a run, those that tell SAEs apart."""
    return {name: recorded[name] for name in TELLING if name in recorded}


def _training(settings: Settings, run: SAERun, probe: ProbeRun) -> str:
    """The command line that trains an SAE, or fine-tunes a copy of one towards its names."""
    command, more = commands.SAE, list[str]()
    if strength := strength_in(run.suffix):
        command, more = commands.NAMES, ["--align_names", strength]
        run = replace(run, suffix=run.suffix.removesuffix(aligned_suffix(float(strength))))
    return f"`{Ways(settings, run, replace(probe, seed=run.training.seed)).command(command, *more).text}`"


def _probe_of(run: SAERun, probe: ProbeRun, other: SAERun) -> ProbeRun:
    """The probe of the same settings on another SAE."""
    if other.training.seed == run.training.seed:
        return probe
    return replace(probe, seed=other.training.seed)


def labels_of(runs: Sequence[SAERun]) -> list[str]:
    """What tells each SAE from the others, `seed 50` or `topk, k 32`; of a single one, its encoder."""
    if len(runs) == 1:
        return [runs[0].encoder]
    shown = {name: about for name, about in flags(SAERun).items() if about.setting.in_name or about.variants}
    found = [{name: value for name, value in values(run).items() if name in shown} for run in runs]
    telling = [name for name in shown if len({str(one.get(name)) for one in found}) > 1]
    return [", ".join(_told(name, one[name]) for name in telling if name in one) for one in found]


def _told(name: str, value: Any) -> str:
    if name == "sae_type":
        return str(value)
    words = IN_WORDS.get(name, name.replace("_", " "))
    if value == "":
        return f"no {words}"
    return f"{words} {value:g}" if isinstance(value, float) else f"{words} {value}"


def matched(settings: Settings, first: ShownRun, second: ShownRun) -> dict[str, Any]:
    """The one-to-one matches of the live concepts of two runs, as `match_<a>_<b>` holds them (METHOD section 8).

    The sum of the cosines of the decoders' columns, centred over live latents, is the largest possible. Where it is not known
    which latents are live, all count. Takes about 16 F^2 bytes of memory.

    Raises UserError if firing rates are damaged or there is not enough memory.
    """
    live = [_live(settings, one) for one in (first, second)]
    pairs = match(*(centred(one.dictionary[index]) for one, index in zip((first, second), live, strict=True)))
    partner, cosine = np.full(first.n_latents, -1, np.int32), np.full(first.n_latents, np.nan, np.float32)
    has_partner = pairs.partner >= 0
    rows = live[0].numpy()[has_partner]
    partner[rows] = live[1].numpy()[pairs.partner[has_partner]]
    cosine[rows] = pairs.cosine[has_partner]
    return {"partner": partner, "cosine": cosine}


def _live(settings: Settings, shown: ShownRun) -> torch.Tensor:
    """The indices of the live latents; of all if it is not known which are live."""
    rates = firing_rates(settings, shown.run)
    return torch.arange(shown.n_latents) if rates is None else torch.from_numpy(np.flatnonzero(rates > 0))
