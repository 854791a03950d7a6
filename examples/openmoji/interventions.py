"""Remove background concepts from probes that were trained on emoji with telling backgrounds, with three seeds.

    DNCBM_CONFIG=examples/openmoji/config.py python examples/openmoji/interventions.py

Each seed trains an SAE and a probe of its own. What is removed is chosen in two ways: by text, the concepts nearest to
descriptions of the two backgrounds; and by place, the concepts that tell the backgrounds of training images of one class
apart, which takes group labels.
"""

import csv
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.metrics import roc_auc_score

from dncbm import assign_names, read_names, save_concept_strengths, save_probe_features, train_linear_probe, train_sae
from dncbm.cli import main
from dncbm.concepts.lists import list_of
from dncbm.probe.intervention_stage import edit_name, factors_asked, measure_intervention, suggest_concepts
from dncbm.probe.stage import load_probe_data
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Extraction, Intervention, ProbeFeatures, ProbeRun, SAERun, Splits
from dncbm.runs.manifests import Outcome
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from sparse_autoencoder.declare import build, values
from sparse_autoencoder.files import whole_file

DATASET = "openmoji_backgrounds"
SEEDS = (49, 50, 51)
TEXTS = ("a green meadow with trees", "the blue sea with waves")
"""What is drawn behind the emoji."""
NEAREST = 15
"""Concepts taken for each text."""
APART = 0.1
"""How far the area under the ROC curve must be from 0.5 for a concept to tell the places apart."""


def interventions(settings: Settings, run: SAERun, probe: ProbeRun, *, device: str, overwrite: bool) -> Outcome:
    """Train, remove, refit, and compare, for every seed."""
    probe = replace(probe, dataset=DATASET, solver="prox")
    save_probe_features(
        settings, ProbeFeatures(DATASET, run.encoder, run.hook), Splits(), Extraction(), device=device, overwrite=overwrite
    )
    found: dict[str, dict[str, list[dict[str, float]]]] = {way: defaultdict(list) for way in ("text", "place")}
    for seed in SEEDS:
        seeded = build(SAERun, values(run) | {"seed": seed})
        own = build(ProbeRun, values(probe) | {"seed": seed})
        train_sae(settings, seeded, device=device, overwrite=overwrite)
        assign_names(settings, seeded, device=device, overwrite=overwrite)
        save_concept_strengths(settings, seeded, own, Splits(), device=device, overwrite=overwrite)
        train_linear_probe(settings, seeded, own, device=device, overwrite=overwrite)
        lists = {"text": concepts_by_text(settings, seeded, device), "place": concepts_by_place(settings, seeded)}
        for way, path in lists.items():
            edit = Intervention(remove=path, reweight=True)
            measure_intervention(settings, seeded, own, edit, device=device, overwrite=overwrite)
            name = edit_name(edit, factors_asked(edit, read_names(settings, seeded)))
            for row, figures in read_rows(Artifacts(settings).intervention(seeded, own, name)).items():
                found[way][row].append(figures)
    for way, rows in found.items():
        print(f"\nconcepts chosen by {way}\n\n{table(rows)}")
    return Outcome.RAN


def concepts_by_text(settings: Settings, run: SAERun, device: str) -> Path:
    """A list of the concepts nearest to the descriptions of the backgrounds."""
    artifacts = Artifacts(settings)
    for text in TEXTS:
        suggest_concepts(settings, run, text, NEAREST, device=device, overwrite=True)
    lists = [artifacts.suggested_concepts(run, text) for text in TEXTS]
    path = artifacts.suggested_concepts(run, "backgrounds")
    with whole_file(path) as temporary:
        temporary.write_text("\n".join(one.read_text(encoding="utf-8") for one in lists), encoding="utf-8")
    return path


def concepts_by_place(settings: Settings, run: SAERun) -> Path:
    """A list of the concepts that tell land from water among training images of the same class."""
    data = load_probe_data(settings, run, ProbeRun(DATASET), "train")
    strengths, labels, places = data.inputs.toarray(), data.labels.numpy(), data.groups.numpy() % 2
    areas = np.mean(
        [[roc_auc_score(places[labels == of], column) for column in strengths[labels == of].T] for of in np.unique(labels)],
        axis=0,
    )
    path = Artifacts(settings).suggested_concepts(run, "tell places apart")
    chosen = np.flatnonzero(abs(areas - 0.5) >= APART).tolist()
    with whole_file(path) as temporary:
        temporary.write_text(list_of(chosen, read_names(settings, run), "concepts that tell places apart"), encoding="utf-8")
    return path


def read_rows(path: Path) -> dict[str, dict[str, float]]:
    """Row of an intervention -> accuracy overall, of every group, and of the worst."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if line["kind"] in ("overall", "group", "worst_group"):
                found[line["row"]][line["name"] or line["kind"].replace("_", " ")] = float(line["top1"])
    return found


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """Percent: the mean over seeds, and the seeds in parentheses."""
    columns = list(next(iter(found.values()))[0])
    lines = [f"| top-1 on val, % (seeds {', '.join(map(str, SEEDS))}) | " + " | ".join(columns) + " |"]
    lines.append("| --- |" + " --- |" * len(columns))
    for row, seeds in found.items():
        cells = []
        for column in columns:
            each = [100 * figures[column] for figures in seeds]
            cells.append(f"{np.mean(each):.1f} ({', '.join(f'{one:.1f}' for one in each)})")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


INTERVENTIONS = Stage(name="interventions", script="", summary=__doc__ or "", function=interventions, takes=(SAERun, ProbeRun))

if __name__ == "__main__":
    main(INTERVENTIONS)
