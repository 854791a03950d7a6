"""A few explanations of each kind, drawn of what the demo made."""

from pathlib import Path

from dncbm import arguments
from dncbm.artifacts import ProbeRun, SAERun
from dncbm.dumps import Selection, global_explanations, local_explanations, meta_clusters, task_agnosticity
from dncbm.plotting import global_explanations as draw_global
from dncbm.plotting import local_explanations as draw_local
from dncbm.plotting import meta_clusters as draw_clusters
from dncbm.plotting import task_agnosticity as draw_latents
from dncbm.plotting.pages import Drawing, plot
from dncbm.settings import Settings

N_CLUSTERS = 80
"""Of 1,425 training images: so many that most groups show one thing."""


def explain(settings: Settings, run: SAERun, probe: ProbeRun, drawing: Drawing) -> dict[str, list[Path]]:
    """Dump and draw: latents and clusters by the training images, predictions and classes by those held out.

    Returns:
        What the figures show -> their PDFs.
    """
    few, all_of_it = Selection(limit=3), Selection()
    latents = task_agnosticity.dump(settings, run, "train", (), few, overwrite=True)
    clusters = meta_clusters.dump(settings, run, probe.dataset, "train", N_CLUSTERS, few, overwrite=True)
    images = local_explanations.dump(settings, run, probe, "val", Selection(limit=12), overwrite=True)
    classes = global_explanations.dump(settings, run, probe, "val", overwrite=True)
    return {
        "latents, and what activates them": plot(
            settings, latents.parent, task_agnosticity, draw_latents.draw, all_of_it, drawing
        ),
        "groups of images with similar concepts": plot(
            settings, clusters.parent, meta_clusters, draw_clusters.draw, all_of_it, drawing
        ),
        "why an image was classified so": plot(
            settings, images.parent, local_explanations, draw_local.draw, all_of_it, drawing
        ),
        "what leads a category": plot(
            settings, classes.parent, global_explanations, draw_global.draw, all_of_it, drawing
        ),
    }


def main() -> None:
    settings, args = arguments.parse(__doc__, arguments.explained, arguments.drawing)
    drawing = arguments.drawing_from(args)
    found = explain(settings, arguments.sae_from(args), arguments.probe_from(args), drawing)
    print()
    for what, pages in found.items():
        print(f"{what}: {len(pages)} in {pages[0].parent}")
        print(f"    first {pages[0].name}; all in index.html")


if __name__ == "__main__":
    arguments.run(main)
