"""Discover-then-Name concept bottlenecks: from any CLIP-like image encoder to an interpretable classifier.

Eight rooms, each importing only those before it: `runs` (what a run is and where it lies), `features` (images to features),
`concepts` (features to named concepts), `probe` (concept strengths to predictions), `explain` (predictions to figures),
`browser` (a run as a folder of pages), `bottleneck` (the result as one object) and `reproduce` (all of it, for many encoders,
data sets, settings and seeds).
`stages` lists the stages in order; `cli` makes command lines of them.

What most people import is here. A stage is a function of the config and of declarations, for example

    settings = load_settings()
    run = SAERun(encoder="clip_ViT-B/16")
    train_sae(settings, run, device="cuda")
    names = read_names(settings, run)
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Read when torch is imported. OpenMP threads that wait for work would otherwise spin on cores that other processes need,
# our own that decode images among them: many times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if TYPE_CHECKING:
    from dncbm.bottleneck.export import export_model
    from dncbm.bottleneck.model import ConceptBottleneckModel
    from dncbm.browser.stage import write_browser
    from dncbm.concepts.alignment import align_names
    from dncbm.concepts.evidence.images import name_evidence, read_evidence
    from dncbm.concepts.evidence.stability import read_stability, seed_stability
    from dncbm.concepts.naming import assign_names, read_name_tests, read_names
    from dncbm.concepts.sae import load_sae, train_sae
    from dncbm.concepts.strengths import load_concept_strengths, save_concept_strengths
    from dncbm.concepts.vocabulary import load_vocabulary, save_vocabulary_embeddings
    from dncbm.explain.report.stage import write_report
    from dncbm.features.encoders import load_encoder
    from dncbm.features.stage import open_features, save_probe_features, save_sae_features
    from dncbm.probe.compact import measure_compact, read_compact
    from dncbm.probe.intervention_stage import measure_intervention
    from dncbm.probe.nec import accuracy_at_nec
    from dncbm.probe.stage import load_probe, load_probe_data, train_linear_probe
    from dncbm.probe.zero_shot import evaluate_zero_shot
    from dncbm.runs.artifacts import Artifacts
    from dncbm.runs.declarations import (
        Alignment,
        Browse,
        Compact,
        Evidence,
        Explained,
        Export,
        Extraction,
        Grid,
        Intervention,
        NamedEncoder,
        Naming,
        Partition,
        ProbeDataset,
        ProbeFeatures,
        ProbeRun,
        Report,
        SAEFeatures,
        SAERun,
        Seeds,
        Splits,
    )
    from dncbm.runs.errors import StaleArtifact, UserError
    from dncbm.runs.settings import Settings, load_settings
    from dncbm.stages import STAGES

__version__ = "1.0.0"

__all__ = [  # noqa: RUF022 - by meaning
    # the result as one object
    "ConceptBottleneckModel",
    # the config, paths, errors
    "Artifacts", "Settings", "StaleArtifact", "UserError", "load_settings",
    # declarations: what a run is
    "Alignment", "Browse", "Compact", "Evidence", "Explained", "Export", "Extraction", "Grid", "Intervention", "NamedEncoder",
    "Naming", "Partition", "ProbeDataset", "ProbeFeatures", "ProbeRun", "Report", "SAEFeatures", "SAERun", "Seeds", "Splits",
    # stages, in order
    "STAGES", "save_sae_features", "train_sae", "save_vocabulary_embeddings", "assign_names", "save_probe_features",
    "save_concept_strengths", "train_linear_probe", "evaluate_zero_shot", "accuracy_at_nec", "export_model",
    "measure_intervention", "name_evidence", "align_names", "measure_compact", "seed_stability", "write_report",
    "write_browser",
    # what they made
    "load_concept_strengths", "load_encoder", "load_probe", "load_probe_data", "load_sae", "load_vocabulary",
    "open_features", "read_compact", "read_evidence", "read_name_tests", "read_names", "read_stability",
]  # fmt: skip

# Imported when they are used: most need torch, which takes seconds, and `--help` needs none of them.
_MODULES = {
    "ConceptBottleneckModel": "dncbm.bottleneck.model",
    "export_model": "dncbm.bottleneck.export",
    "measure_intervention": "dncbm.probe.intervention_stage",
    "align_names": "dncbm.concepts.alignment",
    **dict.fromkeys(("name_evidence", "read_evidence"), "dncbm.concepts.evidence.images"),
    **dict.fromkeys(("read_stability", "seed_stability"), "dncbm.concepts.evidence.stability"),
    **dict.fromkeys(("assign_names", "read_name_tests", "read_names"), "dncbm.concepts.naming"),
    **dict.fromkeys(("measure_compact", "read_compact"), "dncbm.probe.compact"),
    "write_report": "dncbm.explain.report.stage",
    "write_browser": "dncbm.browser.stage",
    **dict.fromkeys(("load_sae", "train_sae"), "dncbm.concepts.sae"),
    **dict.fromkeys(("load_concept_strengths", "save_concept_strengths"), "dncbm.concepts.strengths"),
    **dict.fromkeys(("load_vocabulary", "save_vocabulary_embeddings"), "dncbm.concepts.vocabulary"),
    "load_encoder": "dncbm.features.encoders",
    **dict.fromkeys(("open_features", "save_probe_features", "save_sae_features"), "dncbm.features.stage"),
    "accuracy_at_nec": "dncbm.probe.nec",
    **dict.fromkeys(("load_probe", "load_probe_data", "train_linear_probe"), "dncbm.probe.stage"),
    "evaluate_zero_shot": "dncbm.probe.zero_shot",
    "Artifacts": "dncbm.runs.artifacts",
    **dict.fromkeys(
        (
            "Alignment",
            "Browse",
            "Compact",
            "Evidence",
            "Explained",
            "Export",
            "Extraction",
            "Grid",
            "Intervention",
            "NamedEncoder",
            "Naming",
            "Partition",
            "ProbeDataset",
            "ProbeFeatures",
            "ProbeRun",
            "Report",
            "SAEFeatures",
            "SAERun",
            "Seeds",
            "Splits",
        ),
        "dncbm.runs.declarations",
    ),
    **dict.fromkeys(("StaleArtifact", "UserError"), "dncbm.runs.errors"),
    **dict.fromkeys(("Settings", "load_settings"), "dncbm.runs.settings"),
    "STAGES": "dncbm.stages",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value
