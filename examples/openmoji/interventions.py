"""Remove background concepts from probes that were trained on emoji with telling backgrounds, with three seeds.

    DNCBM_CONFIG=examples/openmoji/config.py python examples/openmoji/interventions.py

Each seed trains an SAE and a probe of its own. What is removed is chosen by text alone: the concepts nearest to the
descriptions of the two backgrounds.
"""

import csv
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np

from dncbm import assign_names, read_names, save_concept_strengths, save_probe_features, train_linear_probe, train_sae
from dncbm.cli import main
from dncbm.probe.intervention_stage import edit_name, factors_asked, measure_intervention, suggest_concepts
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


def interventions(settings: Settings, run: SAERun, probe: ProbeRun, *, device: str, overwrite: bool) -> Outcome:
    """Train, remove, refit, and compare, for every seed."""
    probe = replace(probe, dataset=DATASET)
    save_probe_features(
        settings, ProbeFeatures(DATASET, run.encoder, run.hook), Splits(), Extraction(), device=device, overwrite=overwrite
    )
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    for seed in SEEDS:
        seeded = build(SAERun, values(run) | {"seed": seed})
        own = build(ProbeRun, values(probe) | {"seed": seed})
        train_sae(settings, seeded, device=device, overwrite=overwrite)
        assign_names(settings, seeded, device=device, overwrite=overwrite)
        save_concept_strengths(settings, seeded, own, Splits(), device=device, overwrite=overwrite)
        train_linear_probe(settings, seeded, own, device=device, overwrite=overwrite)
        edit = Intervention(remove=background_concepts(settings, seeded, device), reweight=True)
        measure_intervention(settings, seeded, own, edit, device=device, overwrite=overwrite)
        name = edit_name(edit, factors_asked(edit, read_names(settings, seeded)))
        for row, figures in read_rows(Artifacts(settings).intervention(seeded, own, name)).items():
            found[row].append(figures)
    print("\n" + table(found))
    return Outcome.RAN


def background_concepts(settings: Settings, run: SAERun, device: str) -> Path:
    """A list of the concepts nearest to the descriptions of the backgrounds."""
    artifacts = Artifacts(settings)
    for text in TEXTS:
        suggest_concepts(settings, run, text, NEAREST, device=device, overwrite=True)
    lists = [artifacts.suggested_concepts(run, text) for text in TEXTS]
    path = artifacts.suggested_concepts(run, "backgrounds")
    with whole_file(path) as temporary:
        temporary.write_text("\n".join(one.read_text(encoding="utf-8") for one in lists), encoding="utf-8")
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
