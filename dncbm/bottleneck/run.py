"""From a finished run to the contents of its bottleneck: every part is the stages' own artifact."""

from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dncbm.bottleneck.contents import Contents, Statistics
from dncbm.bottleneck.encoder import EncoderReference
from dncbm.concepts.naming import ConceptName, name_similarities
from dncbm.concepts.sae import load_sae, sae_path
from dncbm.concepts.strengths import ConceptStrengths
from dncbm.explain.dumps.dump import probed_sources_of
from dncbm.explain.dumps.task_agnosticity import N_SHOWN
from dncbm.explain.explanations import mean_strengths, predict, top_activating
from dncbm.features.encoders import check_same_encoder, describe_encoder
from dncbm.features.stage import features_background
from dncbm.flags import config_defaults, flags_of, parsed, resolved, unknown_flag
from dncbm.probe.stage import PROBE
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import ProbeRun, SAERun
from dncbm.runs.errors import UserError
from dncbm.runs.find import find
from dncbm.runs.manifests import manifest_path, read_manifest
from dncbm.runs.settings import Settings
from sparse_autoencoder.declare import build, values

SPLIT = "val"
"""The split that a probe is reported on, and that classes and concepts are described by."""


def run_of_flags(settings: Settings, given: Mapping[str, Any]) -> tuple[SAERun, ProbeRun]:
    """The SAE and the probe that flags mean, as on the command line of a script.

    Raises UserError if a flag is unknown or has a wrong value, or the flags do not say which run is meant.
    """
    known = flags_of(commands.EXPORT)
    for name in given:
        if name not in known:
            raise UserError(f"from_run: {unknown_flag(name, known)}")
    try:
        checked = {name: parsed(known[name], value) for name, value in given.items() if value is not None}
    except ValueError as error:
        raise UserError(f"from_run: {error}") from error
    found = resolved(commands.EXPORT, checked, config_defaults(settings))
    if found["probe_on_features"]:
        raise UserError("probe_on_features: features have no names, so only probes on concepts are concept bottlenecks")
    found = find(settings, PROBE, found, set(checked))
    return build(SAERun, found), build(ProbeRun, found)


def contents_of_run(settings: Settings, run: SAERun, probe: ProbeRun, *, check_encoder: bool) -> Contents:
    """The contents of a run. `check_encoder`: whether to compare the encoder with the one of the features.

    Raises UserError if a part is missing or damaged, or they do not fit together; StaleArtifact if one has changed since.
    """
    artifacts, dataset = Artifacts(settings), probe.dataset
    sources, weight = probed_sources_of(settings, run, probe, SPLIT)
    strengths = sources.strengths()
    labels = sources.labels(strengths)
    texts, n_classes = sources.about_classes(), weight.shape[1]
    sizes = np.bincount(labels, minlength=n_classes)
    right = np.bincount(labels[predict(strengths.matrix, weight, labels).classes == labels], minlength=n_classes)
    statistics = Statistics(
        SPLIT, sizes, np.where(sizes > 0, right / np.maximum(sizes, 1), np.nan),
        mean_strengths(strengths.matrix, labels, n_classes), strengths.matrix.getnnz(axis=0) / len(labels),
        _top_images(strengths),
    )  # fmt: skip
    features = artifacts.features(dataset, run.encoder, run.hook, SPLIT)
    described = describe_encoder(settings, run.encoder) if check_encoder else {}
    extracted = read_manifest(features) if manifest_path(features).is_file() else {"settings": {}, "details": {}}
    if check_encoder:
        check_same_encoder(features, described)
    about_encoder = {
        "weights": described.get("weights") or extracted["settings"].get("weights"), "hook": run.hook,
        "precision": extracted["details"].get("precision"),
        "background": features_background(settings, dataset, run.encoder, run.hook, SPLIT),
    }  # fmt: skip
    made = {"SAE": sae_path(settings, run), "names": artifacts.concept_names_in_use(run), "probe": artifacts.probe(run, probe)}
    recorded = {name: read_manifest(path) for name, path in made.items() if manifest_path(path).is_file()}
    about = {
        "dncbm": version("dncbm"),
        "datasets": {"sae": run.dataset, "probe": dataset},
        "vocabulary": settings.vocabulary,
        "sae": _settings_of(run),
        "probe": _settings_of(probe),
        "metrics": {  # as recorded: measuring an SAE that somebody else trained would take all of its training data
            what.lower(): recorded.get(what, {}).get("details", {}).get("metrics", {}) for what in ("SAE", "probe")
        },
        "provenance": {
            name: {key: manifest[key] for key in ("stage", "inputs", "outputs", "versions", "made") if key in manifest}
            for name, manifest in recorded.items()
        },
        "interventions": [],
    }
    return Contents(
        sae=load_sae(settings, run), weight=weight, names=_with_similarities(settings, run, sources.names),
        classes=tuple(texts["classes"]),
        class_folders=tuple(texts["class_folders"]), statistics=statistics, about=about, fingerprint=None,
        encoder=EncoderReference(run.encoder, settings, run.encoder, about_encoder),
    )  # fmt: skip


def _top_images(strengths: ConceptStrengths) -> NDArray[np.int64]:
    """Indices of the images that activate each concept most, F x N_SHOWN."""
    found = np.full((strengths.matrix.shape[1], N_SHOWN), -1, dtype=np.int64)
    for row, top in zip(found, top_activating(strengths.matrix, np.arange(len(found)), N_SHOWN), strict=True):
        row[: len(top)] = strengths.keys[top]
    return found


def _with_similarities(settings: Settings, run: SAERun, names: list[ConceptName]) -> list[ConceptName]:
    """Names with their similarities; the authors' files omit them, which are then computed if the vocabulary exists."""
    try:
        found = name_similarities(settings, run, names)
    except UserError:
        return names
    return [replace(name, similarity=float(one)) for name, one in zip(names, found, strict=True)]


def _settings_of(run: SAERun | ProbeRun) -> dict[str, Any]:
    """Flag -> value of every setting, without those that name the encoder and the data sets."""
    apart = {"img_enc_name", "hook_points", "sae_dataset", "probe_dataset"}
    return {flag: value for flag, value in values(run).items() if flag not in apart}
