"""What the demo found: a short table, summary.json and a sheet of the best-named latents."""

import json
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from dncbm.cli import main
from dncbm.concepts.naming import ABSTAINS, read_names
from dncbm.concepts.sae import describe_metrics, sae_metrics
from dncbm.concepts.strengths import load_concept_strengths
from dncbm.explain.explanations import top_activating
from dncbm.features.datasets.probe import display_name, probe_images
from dncbm.features.encoders import load_encoder
from dncbm.features.stage import probe_class_names
from dncbm.probe.model import ProbeData, evaluate_probe
from dncbm.probe.nec import read_nec
from dncbm.probe.results_table import INPUTS
from dncbm.probe.stage import PROBE, load_probe, load_probe_data
from dncbm.probe.zero_shot import default_templates, majority_accuracy, zero_shot_weight
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import NamedEncoder, ProbeDataset, ProbeFeatures, ProbeRun, Prompts, SAEFeatures, SAERun
from dncbm.runs.manifests import Outcome, read_manifest, write_json
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from dncbm.stages import PIPELINE_COMMANDS
from sparse_autoencoder.declare import setting
from sparse_autoencoder.files import whole_file

N_BEST = 20
"""Names in the table."""
N_TOP = 5
"""Images per name."""
MIN_IMAGES = 5
"""Latents that fewer training images activate are left out: their names only describe one image."""


def best_names(settings: Settings, run: SAERun, dataset: str) -> list[dict[str, object]]:
    """The latents that are most similar to their names, each with the keys of its most activating training images."""
    strengths = load_concept_strengths(settings, run, dataset, "train")
    n_images = np.asarray((strengths.matrix > 0).sum(axis=0)).ravel()
    names = [name for name in read_names(settings, run) if n_images[name.index] >= MIN_IMAGES and name.verdict != ABSTAINS]
    names = sorted(names, key=lambda name: -name.similarity)[:N_BEST]
    tops = top_activating(strengths.matrix, np.array([name.index for name in names]), N_TOP)
    return [
        {
            "index": name.index,
            "name": name.name,
            "similarity": name.similarity,
            "top_keys": [int(strengths.keys[row]) for row in rows],
        }
        for name, rows in zip(names, tops, strict=True)
    ]


def probe_accuracies(
    settings: Settings, run: SAERun, probe: ProbeRun, on_features: ProbeRun, prompts: Prompts
) -> dict[str, float]:
    """Top-1 accuracy on the held-out images of both probes, of class descriptions, and of the majority class."""
    artifacts = Artifacts(settings)
    concepts, features = (load_probe_data(settings, run, p, "val") for p in (probe, on_features))
    class_names = [display_name(name) for name in probe_class_names(settings, probe.dataset)]
    templates = prompts.templates or default_templates(probe.dataset)
    zero_shot = zero_shot_weight(load_encoder(settings, run.encoder, torch.device("cpu")), class_names, templates)
    train_labels = torch.from_numpy(np.load(artifacts.labels(probe.dataset, "train")))

    def top1(weight: torch.Tensor, data: ProbeData) -> float:
        return evaluate_probe(weight, data, 0.0)["top1"]

    return {
        "concepts_top1": top1(load_probe(settings, run, probe), concepts),
        "features_top1": top1(load_probe(settings, run, on_features), features),
        "zero_shot_top1": top1(zero_shot, features),
        "majority_top1": majority_accuracy(train_labels, features.labels),
    }


def stage_seconds(settings: Settings, *declared: Any) -> dict[str, float]:
    """Seconds that each stage up to the probe took, from the manifests."""
    given = {type(one): one for one in declared}
    seconds = {}
    last = [command.name for command in PIPELINE_COMMANDS].index(PROBE.name)
    for command in PIPELINE_COMMANDS[: last + 1]:
        stage = command.load()
        made = stage.outputs(Artifacts(settings), *(given.get(cls) or cls() for cls in stage.takes))
        seconds[stage.name] = round(sum(read_manifest(path)["details"]["seconds"] for path in made), 1)
    return seconds


@dataclass(frozen=True)
class Baseline:
    """The probe on raw features."""

    lr: float = setting(1e-3, "learning rate of the probe on features", flag="features_probe_lr", above=0)


def summarise(
    settings: Settings, run: SAERun, probe: ProbeRun, baseline: Baseline, prompts: Prompts, *, device: str, overwrite: bool
) -> Outcome:
    on_features = replace(probe, on_features=True, lr=baseline.lr)
    artifacts = Artifacts(settings)
    images = probe_images(settings, probe.dataset, "train")
    of_probe = (ProbeDataset(probe.dataset), ProbeFeatures(probe.dataset, run.encoder, run.hook), NamedEncoder(run.encoder))

    names = best_names(settings, run, probe.dataset)
    pictures = [[images.image(key).convert("RGB").resize((96, 96)) for key in name["top_keys"]] for name in names]
    for name in names:
        name["top_images"] = [emoji_name(images.image_name(key)) for key in name.pop("top_keys")]
    summary = {
        "sae": {
            split: {key: metrics[key] for key in ("l0", "explained_variance", "dead_fraction")}
            for split, metrics in sae_metrics(settings, run).items()
        },
        "names": names,
        "probe": probe_accuracies(settings, run, probe, on_features, prompts),
        "nec": read_nec(settings, run, probe.dataset),
        "ncc": read_nec(settings, run, probe.dataset, "ncc"),
        "encoder": {
            key: value
            for key, value in json.loads((settings.path.parent / "run/encoder_report.json").read_text()).items()
            if key.startswith("retrieval")
        },
        "seconds": stage_seconds(settings, run, probe, SAEFeatures(run.encoder, run.hook, run.dataset), *of_probe),
    }
    write_json(artifacts.summary(), summary)
    titles = [f"{name['name']}  {name['similarity']:.2f}" for name in names]
    concept_sheet(titles, pictures, artifacts.concept_sheet())
    print_summary(summary)
    for what, path in (
        ("summary", artifacts.summary()),
        ("the names above with their images", artifacts.concept_sheet()),
        ("all names", artifacts.concept_names(run)),
        ("accuracy with few weights", artifacts.nec_figure(run, probe.dataset)),
        ("SAE", artifacts.sae(run)),
        ("probe", artifacts.probe(run, probe)),
        ("results of every probe", artifacts.probe_results()),
    ):
        print(f"  {what + ':':<36}{path}")
    return Outcome.RAN


def concept_sheet(titles: list[str], images: list[list[Image.Image]], path: Path, columns: int = 4) -> None:
    """Draw one tile per concept into a PNG, `columns` in a row: its title above its images, the strongest first."""
    rows, per_tile = -(-len(titles) // columns), max(len(members) for members in images)
    figure = Figure(figsize=(columns * 2.6, rows * (2.6 / per_tile + 0.42)), layout="constrained")
    tiles = figure.subfigures(rows, columns, squeeze=False, wspace=0.06).flat
    for tile, title, members in zip(tiles, titles, images, strict=False):
        tile.suptitle(textwrap.shorten(title, 34, placeholder="…"), fontsize=9)
        axes = tile.subplots(1, per_tile, squeeze=False)[0]
        for ax in axes:
            ax.axis("off")
        for ax, image in zip(axes, members, strict=False):
            ax.imshow(image)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")


def emoji_name(path: str) -> str:
    """`train/animals_and_nature/1F436_dog_face.jpg` -> `dog face`."""
    return path.rsplit("/", 1)[-1].rsplit(".", 1)[0].split("_", 1)[-1].replace("_", " ")


def print_summary(summary: dict) -> None:
    sae, probe, encoder = summary["sae"], summary["probe"], summary["encoder"]
    print()
    for head, (split, metrics) in zip(("SAE", ""), sae.items(), strict=True):
        print(f"{head:<9}{f'on {split}:':<14}{describe_metrics(metrics, digits=2)}")
    print("Encoder  held-out retrieval R@1/5/10: ", end="")
    print(" / ".join(f"{encoder[f'retrieval_r{k}']:.0%}" for k in (1, 5, 10)))
    print("Probe    top-1 on held-out emoji, 9 categories")
    for key, what in (
        ("concepts_top1", "on concepts"),
        ("features_top1", "on raw features"),
        ("zero_shot_top1", "zero-shot text"),
        ("majority_top1", "majority class"),
    ):
        print(f"           {what:<18}{probe[key]:.1%}")
    for measure, title, shown in (
        ("nec", "weights per category", INPUTS),
        ("ncc", "concepts per emoji", ("concepts", "features")),
    ):
        if curves := summary.get(measure):
            print(f"         {title:<20}" + "".join(f"{number:>6}" for number in curves["concepts"]))
            for on in filter(curves.__contains__, shown):
                print(f"           {INPUTS[on]:<18}", "".join(f"{top1:>6.0%}" for top1 in curves[on].values()))
    print("Names    the best, and what activates them most")
    for name in summary["names"]:
        print(f"  {name['index']:5d} {name['name']:<14}{name['similarity']:.2f}  {'; '.join(name['top_images'])}")
    print(f"Seconds  {', '.join(f'{stage} {seconds:.0f}' for stage, seconds in summary['seconds'].items())}\n")


SUMMARY = Stage(
    name="summary", script="", summary=__doc__ or "", function=summarise, takes=(SAERun, ProbeRun, Baseline, Prompts)
)

if __name__ == "__main__":
    main(SUMMARY)
