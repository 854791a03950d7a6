"""Draw a few explanations of each kind from what the demo made."""

from typing import Any

from dncbm.cli import main
from dncbm.explain.plotting import STAGES
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Drawing, ProbeRun, SAERun
from dncbm.runs.manifests import Outcome
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder.declare import build, values

CHOSEN: dict[str, dict[str, Any]] = {
    "task_agnosticity": {"probe_split": "train", "limit": 3, "probe_dataset": None},
    "meta_clusters": {"probe_split": "train", "limit": 3, "n_clusters": 80},
    "local_explanations": {"probe_split": "val", "limit": 12},
    "global_explanations": {"probe_split": "val"},
}
"""Latents and clusters are explained with the training images, predictions and classes with the held-out ones. With 80
clusters of 1,425 images, most clusters show one thing."""


def explain(settings: Settings, run: SAERun, probe: ProbeRun, drawing: Drawing, *, device: str, overwrite: bool) -> Outcome:
    """Dump and draw every kind of explanation."""
    runs = values(run) | values(probe) | values(drawing)
    for stage in STAGES:
        is_dump = stage.explains not in STAGES
        chosen = CHOSEN[stage.name.removesuffix("_dump" if is_dump else "_plot")]
        flags = runs | chosen | ({} if is_dump else {"limit": None})
        stage.function(settings, *(build(cls, flags) for cls in stage.takes), overwrite=is_dump)
    artifacts = Artifacts(settings)
    print()
    for what, files in (
        ("latents, and what activates them", artifacts.task_agnosticity(run, "train")),
        ("groups of images with similar concepts", artifacts.meta_clusters(run, probe.dataset, "train", 80)),
        ("why an image was classified as it was", artifacts.local_explanations(run, probe, "val")),
        ("what leads a category", artifacts.global_explanations(run, probe, "val")),
    ):
        print(f"{what}: {len(list(files.figures.glob('*.pdf')))} in {files.figures}; {files.contact_sheet.name} shows all")
    return Outcome.RAN


EXPLAIN = Stage(name="explain", script="", summary=__doc__ or "", function=explain, takes=(SAERun, ProbeRun, Drawing))

if __name__ == "__main__":
    main(EXPLAIN)
