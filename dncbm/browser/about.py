"""What a site says about itself and its runs: settings, figures, what the report says, and how everything was made."""

import json
import logging
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dncbm.browser.concepts import N_PARTS
from dncbm.browser.shown import (
    CLASSES_PER_CHUNK,
    CONCEPTS_PER_CHUNK,
    IMAGES_PER_CHUNK,
    Kept,
    ShownRun,
    weight_rows,
    with_strengths,
)
from dncbm.concepts.evidence.images import evidence_datasets
from dncbm.concepts.evidence.prediction import FDR
from dncbm.concepts.sae import SAE_SPLITS, sae_metrics, sae_path
from dncbm.explain.report.claims import STABLE
from dncbm.explain.report.document import listed, percent, points
from dncbm.explain.report.probe import ProbeFound, read_probed, rows_of_probe
from dncbm.explain.report.provenance import HASH, artifacts_made, changed_and_same, written_time
from dncbm.explain.report.sae import FIGURES, shown_metric
from dncbm.explain.report.stage import CLAIMS, Reported, read_claims
from dncbm.explain.report.ways import ON_FEATURES, Ways
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Browse, Explained, ProbeRun, SAERun
from dncbm.runs.errors import StaleArtifact, UserError
from dncbm.runs.manifests import check_chain, file_hash, fingerprint, manifest_path, package_versions, read_manifest, text_hash
from dncbm.runs.settings import ROOT, Settings, public_path
from dncbm.runs.stage import Command

INDIRECT = (", train", ", train_val")
"""How the artifacts end that reach a report through the SAE and the probe alone."""
RESULTS = "results of the probe and its baselines"
Made = Mapping[str, tuple[Path, Mapping[str, Any]]]


# ------------------------------------------------------------------------------------------------------------ a run


def about_run(
    settings: Settings, shown: ShownRun, probe: ProbeRun, split: str, kept: Sequence[Kept], label: str, folder_of_report: Path
) -> dict[str, Any]:
    """What a site says about a run: `Run` of types.d.ts.

    Args:
        settings: the config.
        shown: the run.
        probe: its probe, which need not exist.
        split: the split of the images.
        kept: the images of each data set.
        label: what tells the run from others.
        folder_of_report: where its report is, if there is one.

    Raises UserError if a manifest, the claims of the report or the results of probes are damaged.
    """
    run = shown.run
    probed, unmeasured = _probed(settings, shown)
    made = artifacts_made(settings, run, probe, probed.baseline if probed else None)
    reported = read_claims(folder_of_report)
    newer = [] if reported is None else _newer(made, rows_of_probe(settings, run, probe), reported.made)
    claims = None if reported is None or newer else reported
    active = [np.bincount(one.indices, minlength=shown.n_latents) for one in shown.strengths if one is not None]
    verdicts = Counter(name.verdict for name in shown.names or () if name.verdict)
    return {
        "name": run.config_name, "label": label, "n_latents": shown.n_latents,
        "has_strengths": [one is not None for one in shown.strengths],
        "n_silent": int((np.sum(active, axis=0) == 0).sum()) if active else None,
        "has_names": shown.names is not None, "verdicts": dict(verdicts), "has_probe": shown.weight is not None,
        "figures": [*_figures_of_sae(settings, run), *_figures_of_probe(settings, run, probe, probed)],
        "settings": [*_settings("SAE", run), *(_settings("probe", shown.probe) if shown.probe else ())],
        "provenance": [
            [title, written_time(found["made"]), fingerprint(path)[:HASH]] for title, (path, found) in made.items()
        ],
        "claims": None if claims is None else [
            {"text": one.text, "criterion": one.criterion, "status": one.status, "rests_on": one.rests_on}
            for one in claims.claims
        ],
        "claims_made": "" if claims is None else f"{claims.made.astimezone(timezone.utc):%Y-%m-%d %H:%M}",
        "missing": [
            *_missing_names(settings, shown, probe), *_missing_strengths(settings, shown, probe, split, kept),
            *unmeasured, *_missing_probe(settings, shown, probe, probed),
            *_missing_report(settings, run, probe, reported, newer),
        ],
        "commands": {
            name: _command(settings, run, probe, command)
            for name, command in (("names", commands.NAMES), ("probe", commands.PROBE), ("intervene", commands.INTERVENE))
        },
        "weight_rows": 1 if shown.weight is None else weight_rows(*shown.weight.shape),
    }  # fmt: skip


def _probed(settings: Settings, shown: ShownRun) -> tuple[ProbeFound | None, list[dict[str, str]]]:
    """The figures of the probe, which are of val whatever is shown; and what to say if they cannot be measured."""
    if shown.probe is None:
        return None, []
    try:
        return read_probed(settings, shown.run, shown.probe, "cpu"), []
    except UserError as error:
        logging.getLogger(__name__).warning(f"the accuracy of the probe on val is left out: {error}")
    what = "The accuracy of the probe on val is left out: what it is measured on is missing, damaged or out of date."
    return None, [_lack(settings, shown.run, shown.probe, what, commands.STRENGTHS)]


def _newer(made: Made, rows: Sequence[Mapping[str, str]], than: datetime) -> list[str]:
    """What a report rests on and was made after it: artifacts, and rows of the results."""
    times = [(title, found["made"]) for title, (_, found) in made.items() if not title.endswith(INDIRECT)]
    newer = list[str]()
    for title, time in [*times, *((RESULTS, row["time"]) for row in rows)]:
        with suppress(ValueError, TypeError):  # an artifact of others may not say when it was made
            if datetime.fromisoformat(str(time)) > than:
                newer.append(title)
    return list(dict.fromkeys(newer))


def _figures_of_sae(settings: Settings, run: SAERun) -> Iterator[tuple[str, str]]:
    """What training recorded; nothing is measured."""
    path = sae_path(settings, run)
    recorded = read_manifest(path)["details"].get("metrics", {}) if manifest_path(path).is_file() else {}
    if set(recorded) == set(SAE_SPLITS):
        metrics = sae_metrics(settings, run)
        for key, title in FIGURES.items():
            said = [f"{shown_metric(key, metrics[split][key])} on {split}" for split in SAE_SPLITS]
            yield title[0].upper() + title[1:], ", ".join(said)


def _figures_of_probe(
    settings: Settings, run: SAERun, probe: ProbeRun, found: ProbeFound | None
) -> Iterator[tuple[str, str]]:  # fmt: skip
    if found is None:
        return
    yield "Top-1 on val, probe on concepts", percent(found.probed.top1)
    if found.probed.features is not None and found.probed.difference is not None:
        mean, low, high = map(points, found.probed.difference)
        yield "Top-1 on val, probe on raw features", percent(found.probed.features)
        yield "Concepts less raw features, in points, with the 95 % interval", f"{mean} ({low} to {high})"
    for row in rows_of_probe(settings, run, probe):
        if row["method"] == "zero_shot" and row["val_top1"]:
            yield "Top-1 on val, zero-shot", percent(float(row["val_top1"]))


def _settings(what: str, run: SAERun | ProbeRun) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Tables of the settings of a run, those that are not the defaults first."""
    titles = (f"Settings of the {what} that differ from the defaults", f"Settings of the {what} that are the defaults")
    for title, found in zip(titles, changed_and_same(run), strict=True):
        if found:
            yield title, [(flag, str(value)) for flag, value in found.items()]


# ------------------------------------------------------------------------------------------------- what was not run


def _lack(settings: Settings, run: SAERun, probe: ProbeRun, what: str, command: Command, *more: str) -> dict[str, str]:
    """What a site lacks, and the command that makes it."""
    return {"what": what, "command": _command(settings, run, probe, command, *more)}


def _command(settings: Settings, run: SAERun, probe: ProbeRun, command: Command, *more: str) -> str:
    """A command line that means this run, with the config if it is not the default one."""
    text = Ways(settings, run, probe).command(command, *more).text
    return text if settings.path == ROOT / "config.py" else f"DNCBM_CONFIG={shlex.quote(public_path(settings.path))} {text}"


def _missing_names(settings: Settings, shown: ShownRun, probe: ProbeRun) -> Iterator[dict[str, str]]:
    """Of names, their evidence and their stability."""
    run, artifacts = shown.run, Artifacts(settings)
    lack = partial(_lack, settings, run, probe)
    if shown.names is None:
        yield lack("Latents have no names.", commands.NAMES)
    elif shown.tests is None:
        yield lack("The names were not tested.", commands.NAMES, "--overwrite")
    changed = {one: _changed(artifacts.name_evidence(run, one)) for one in evidence_datasets(settings, run)}
    if shown.tests is not None and not changed:  # else the same command makes both
        yield lack("The names were not tested on held-out images.", commands.NAMES)
    elif shown.tests is not None and all(changed.values()):
        dataset, why = next(iter(changed.items()))
        of = () if dataset == run.dataset else ("--evidence_dataset", shlex.quote(dataset))
        yield lack(f"What held-out images say about names is out of date and left out: {why}.", commands.NAMES, *of)
    stability = artifacts.seed_stability(run)
    if not manifest_path(stability).is_file():
        what = "Stability was not measured, which takes an SAE that differs only in its seed (stage 2 with another --seed)."
        yield lack(what, commands.SEED_STABILITY)
    elif why := _changed(stability):
        yield lack(f"Stability is out of date and left out: {why}.", commands.SEED_STABILITY, "--overwrite")


def _missing_strengths(
    settings: Settings, shown: ShownRun, probe: ProbeRun, split: str, kept: Sequence[Kept]
) -> Iterator[dict[str, str]]:
    there, with_images = with_strengths(settings, shown.run, split), [one.dataset for one in kept]
    without = [one for one, strengths in zip(with_images, shown.strengths, strict=True) if strengths is None]
    for dataset in dict.fromkeys([*without, *(one for one in (*there, probe.dataset) if one not in with_images)]):
        what = f"The concept strengths of {dataset} are of no images." if dataset in there else (
            f"There are no concept strengths of {dataset}."
        )  # fmt: skip
        yield _lack(settings, shown.run, replace(probe, dataset=dataset), what, commands.STRENGTHS)


def _missing_probe(
    settings: Settings, shown: ShownRun, probe: ProbeRun, found: ProbeFound | None
) -> Iterator[dict[str, str]]:  # fmt: skip
    """Of the probe and its baselines."""
    run = shown.run
    lack = partial(_lack, settings, run, probe)
    if not Artifacts(settings).probe(run, probe).is_file():
        yield lack(f"No probe classifies {probe.dataset} by these concepts.", commands.PROBE)
    elif found is not None:
        if found.probed.features is None:
            yield lack("There is no probe on raw features to compare with.", commands.PROBE, ON_FEATURES)
        if not found.has_zero_shot:
            yield lack("The zero-shot baseline was not measured.", commands.ZERO_SHOT)


def _missing_report(
    settings: Settings, run: SAERun, probe: ProbeRun, reported: Reported | None, newer: Sequence[str]
) -> Iterator[dict[str, str]]:
    if reported is None:
        yield _lack(settings, run, probe, "There is no report of what this run supports.", commands.REPORT)
    elif newer:
        what = f"The report is left out: it is older than {listed(newer)}."
        yield _lack(settings, run, probe, what, commands.REPORT)


def _changed(path: Path) -> str:
    """What has changed since an artifact was made; blank: nothing. Raises UserError if it is damaged."""
    try:
        check_chain(path)
    except StaleArtifact as error:
        return listed(error.differences)
    return ""


def optional_inputs(settings: Settings, run: SAERun, probe: ProbeRun) -> dict[str, Path | str]:
    """What a site shows of a run if it exists and is up to date: an artifact, or the hash of a file without a manifest.

    Raises UserError if one of them is damaged.
    """
    artifacts = Artifacts(settings)
    paths = {f"evidence from images of {one}": artifacts.name_evidence(run, one) for one in evidence_datasets(settings, run)}
    if manifest_path(stability := artifacts.seed_stability(run)).is_file():
        paths["stability over seeds"] = stability
    found: dict[str, Path | str] = {title: path for title, path in paths.items() if not _changed(path)}
    if rows := rows_of_probe(settings, run, probe):
        found[RESULTS] = text_hash(json.dumps(row, sort_keys=True) for row in rows)
    if (claims := artifacts.report(run, probe) / CLAIMS).is_file():
        found["report"] = file_hash(claims)
    return found


# ---------------------------------------------------------------------------------------------------------- the site


def about_site(
    settings: Settings, run: SAERun, probe: ProbeRun, explained: Explained, kept: Sequence[Kept],
    runs: Sequence[Mapping[str, Any]], thumbnails: Sequence[Mapping[str, int] | str], matches: Sequence[tuple[int, int]],
    command: str, report: str | None,
) -> dict[str, Any]:  # fmt: skip
    """What a site says about itself: `Site` of types.d.ts.

    Args:
        settings: the config.
        run: the SAE of its first run.
        probe: its probe, which need not exist.
        explained: the split of the images.
        kept: the images of each data set.
        runs: what it says about each run (`about_run`).
        thumbnails: of each data set, `Thumbnails` of types.d.ts, or why there are none.
        matches: numbers of the runs that were compared.
        command: the command line that makes it again (`command_again`).
        report: path of the report in its folder, if it has one.
    """
    probed = next((d for d, one in enumerate(kept) if one.dataset == probe.dataset), None)
    if not any(one["has_probe"] for one in runs):
        probed = None
    return {
        "title": f"Concepts of {run.encoder}", "lead": _lead(run, probe, runs),
        "made": f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M}", "command": command, "versions": package_versions(),
        "encoder": run.encoder, "sae_dataset": run.dataset, "split": explained.split,
        "datasets": [_dataset(settings, one, of_one) for one, of_one in zip(kept, thumbnails, strict=True)],
        "probed": probed, "classes": [] if probed is None else list(kept[probed].classes),
        "groups": [] if probed is None else list(kept[probed].group_names), "runs": list(runs), "report": report,
        "per_chunk": {"concepts": CONCEPTS_PER_CHUNK, "classes": CLASSES_PER_CHUNK, "images": IMAGES_PER_CHUNK},
        "range_parts": N_PARTS, "criteria": {"cosine": STABLE, "fdr": FDR}, "matches": [list(pair) for pair in matches],
    }  # fmt: skip


def _lead(run: SAERun, probe: ProbeRun, runs: Sequence[Mapping[str, Any]]) -> str:
    """What a site is, in one sentence."""
    latents = f"{runs[0]['n_latents']:,} latents" if len(runs) == 1 else "latents"
    divides = "A sparse autoencoder divides" if len(runs) == 1 else f"{len(runs)} sparse autoencoders each divide"
    about_latents = (
        f"{divides} what the image encoder {run.encoder} sees into {latents}, learned from the images of {run.dataset}"
    )
    parts = list[str]()
    if any(one["has_names"] for one in runs):
        parts.append("each latent is a concept, named after the word nearest to it")
    if any(one["has_probe"] for one in runs):
        parts.append(f"a linear probe classifies the images of {probe.dataset} by their concepts")
    return "; ".join(filter(None, (about_latents, ", and ".join(parts)))) + "."


def _dataset(settings: Settings, kept: Kept, thumbnails: Mapping[str, int] | str) -> dict[str, Any]:
    sheets, why = (None, thumbnails) if isinstance(thumbnails, str) else (dict(thumbnails), "")
    return {
        "name": kept.dataset, "n": len(kept.keys), "of": kept.n_split, "thumbnails": sheets, "no_thumbnails": why,
        "license": settings.probe_datasets[kept.dataset].license,
    }  # fmt: skip


def command_again(settings: Settings, run: SAERun, probe: ProbeRun, explained: Explained, browse: Browse) -> str:
    """The command line that makes a site again."""
    more = ["--probe_split", explained.split]
    more += ["--browser_folder", shlex.quote(public_path(browse.output))] if browse.output else []
    more += ["--beside", *map(shlex.quote, browse.beside)] if browse.beside else []
    return _command(settings, run, probe, commands.BROWSE, *more)
