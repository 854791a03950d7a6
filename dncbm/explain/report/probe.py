"""The linear probe of a run beside its baselines and the published figures."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dncbm.explain.report.document import Block, Name, Section, Table, percent, points, said
from dncbm.explain.report.findings import Probed, independent_difference, mean_interval
from dncbm.probe.model import ProbeData, linear, true_class_ranks
from dncbm.probe.results_table import (
    OF_SAE,
    Cell,
    in_order,
    marker,
    our_cells,
    published_cells,
    published_figures,
    source_notes,
)
from dncbm.probe.stage import load_probe, load_probe_data
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import ProbeRun, SAERun
from dncbm.runs.devices import resolve_device
from dncbm.runs.manifests import check_chain, manifest_path, read_manifest
from dncbm.runs.results import read_results
from dncbm.runs.settings import Settings

BATCH = 4096
Row = Mapping[str, str]


@dataclass(frozen=True)
class ProbeFound:
    """The probe, and the cells of the table."""

    probed: Probed
    cells: Sequence[Cell]
    has_zero_shot: bool
    baseline: ProbeRun | None = None
    """The probe on raw features, if its settings are known."""


def read_probed(settings: Settings, run: SAERun, probe: ProbeRun, device: str) -> ProbeFound | None:
    """The probe's accuracy and its difference to the probe on raw features; None if it was not trained here.

    Of several probes on raw features, the one with the best top-1 on train_val counts. The difference is of the same images
    where both probes and their inputs still exist, else of independent ones.

    Raises UserError if a file is damaged; StaleArtifact if what the probe was made from has changed since.
    """
    path = Artifacts(settings).probe(run, probe)
    if not manifest_path(path).is_file():
        return None
    check_chain(path)
    top1 = read_manifest(path)["details"].get("metrics", {}).get("val_top1")
    correct = _correct(settings, run, probe, device, needed=top1 is None)
    top1 = float(correct.double().mean()) if top1 is None and correct is not None else float(top1)
    n = _images(Artifacts(settings).probe_accuracies(run, probe)) if correct is None else len(correct)
    rows = rows_of_probe(settings, run, probe)
    baseline = _baseline(rows)
    cells = [cell for cell in published_cells(published_figures(), run.encoder) if cell.dataset == probe.dataset]
    cells += our_cells(rows, run.encoder)
    has_zero_shot = any(row["method"] == "zero_shot" for row in rows)
    if baseline is None:
        return ProbeFound(Probed(top1, n), cells, has_zero_shot)
    features, known = float(baseline["val_top1"]), _probe_of(baseline)
    others = _correct(settings, run, known, device) if known is not None and correct is not None else None
    if correct is not None and others is not None:
        difference = mean_interval((correct.double() - others.double()).numpy())
    else:
        difference = independent_difference(top1, features, n)
    return ProbeFound(Probed(top1, n, features, difference, others is not None), cells, has_zero_shot, known)


def _correct(settings: Settings, run: SAERun, probe: ProbeRun, device: str, needed: bool = False) -> torch.Tensor | None:
    """Whether a probe classifies each image of val correctly; None if it or its inputs are missing, unless they are needed."""
    artifacts = Artifacts(settings)
    of_val = artifacts.features(probe.dataset, run.encoder, run.hook, "val")
    inputs = of_val if probe.on_features else artifacts.strengths(run, probe.dataset, "val")
    if not needed and not all(manifest_path(path).is_file() for path in (artifacts.probe(run, probe), inputs)):
        return None
    data = load_probe_data(settings, run, probe, "val")
    return is_right(load_probe(settings, run, probe).to(resolve_device(device)), data)


def _images(accuracies: Path) -> int:
    """The images of val, by the accuracies of each class that lie beside a probe; 0 if an older version wrote none."""
    if not accuracies.is_file():
        return 0
    with accuracies.open(newline="", encoding="utf-8") as file:
        return sum(int(row["images"]) for row in csv.DictReader(file) if row["kind"] == "class")


@torch.inference_mode()
def is_right(weight: torch.Tensor, data: ProbeData) -> torch.Tensor:
    """Whether a probe (inputs x C) classifies each image correctly, bool on the CPU."""
    batches = data.batches(BATCH, weight.device)
    return torch.cat([(true_class_ranks(linear(batch, weight), labels) == 0) for batch, labels in batches]).cpu()


def rows_of_probe(settings: Settings, run: SAERun, probe: ProbeRun) -> list[Row]:
    """The rows of the results that are of this probe, or of baselines on the same data. Raises as `read_results`."""
    path = Artifacts(settings).probe_results()
    if not path.is_file():
        return []

    def belongs(row: Row) -> bool:
        if (row["probe_dataset"], row["encoder"], row["hook"]) != (probe.dataset, run.encoder, run.hook):
            return False
        if row["method"] == "probe" and row["on"] == "concepts":
            return (row["sae_dataset"], row["sae"], row["probe"]) == (run.dataset, run.config_name, probe.config_name)
        return row["method"] in ("probe", "zero_shot")

    return [row for row in read_results(path) if belongs(row)]


def _baseline(rows: Sequence[Row]) -> Row | None:
    """The row of the probe on raw features that is best on train_val."""
    known = [row for row in rows if (row["method"], row["on"]) == ("probe", "features") and row["val_top1"]]
    return max(known, key=lambda row: float(row["train_val_top1"] or "-inf"), default=None)


def _probe_of(row: Row) -> ProbeRun | None:
    """The probe that a row of the results is of; None if its settings are not all in the row."""
    given = {"epochs": row["probe_epochs"], "sparsity_lambda": row["probe_lambda"], "seed": row["seed"]}
    given |= {"lr": row["probe_lr"], "batch_size": row["probe_batch_size"]} if row["solver"] == "adam" else {}
    try:
        numbers = {name: float(text) if name in ("lr", "sparsity_lambda") else int(text) for name, text in given.items()}
    except ValueError:
        return None
    probe = ProbeRun(row["probe_dataset"], on_features=True, solver=row["solver"], **numbers)  # type: ignore[arg-type]
    return probe if probe.config_name == row["probe"] else None


# ---------------------------------------------------------------------------------------------------------- showing


def probe_section(found: ProbeFound, probe: ProbeRun, majority: float | None, absent: Sequence[Block]) -> Section:
    """The table of accuracies, and the difference to raw features. `absent` are notes on what was not run."""
    probed, sources = found.probed, published_figures()["sources"]
    blocks: list[Block] = [
        said("Top-1 on ", f"the {probed.images:,} images of " if probed.images else "", "val of ", Name(probe.dataset),
             ". Published figures are of the same encoder and data set; where there are none, we know of none."),
    ]  # fmt: skip
    rows = [
        (Name(cell.title), "this run" if cell.ours else "published", cell.text("\u00b1"), _source(cell))
        for cell in in_order(found.cells)
    ]
    if majority is not None:
        rows.append((Name("Commonest class"), "this run", f"{100 * majority:.1f}", ""))
    if rows:
        blocks.append(Table("Top-1, %", ("method", "by", "top-1", "settings or source"), tuple(rows), numbers=False))
    cited = ((cell.method, cell.source) for cell in found.cells if not cell.ours)
    if notes := [line.strip() for line in source_notes(cited, sources)]:
        blocks.append(said("Sources: ", " ".join(notes)))
    if probed.difference is not None and probed.features is not None:
        how = (
            "on the same images"
            if probed.paired
            else "as if on different images, since the inputs of the probes are not all there"
        )
        low, high = (points(end) for end in probed.difference[1:])
        blocks.append(
            said(
                f"Concepts {percent(probed.top1)}, raw features {percent(probed.features)}: a difference of "
                f"{points(probed.difference.mean)} points, 95\u00a0% interval {low} to {high}, {how}."
            )
        )
    return Section("probe", "Classification", (*blocks, *absent))


def _source(cell: Cell) -> str:
    """The source of a published figure, or the settings of a baseline; those of the run itself stand above."""
    if not cell.ours:
        return f"[{marker(cell.source)}]"
    return "" if cell.method in OF_SAE.values() else cell.source.partition(", ")[2]  # without the hook point
