"""The probe stage: train the linear probe on concept strengths or features, evaluate it, save it, and load it again."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from dncbm.concepts.strengths import STRENGTHS, finished_strengths, load_concept_strengths
from dncbm.features.stage import PROBE_FEATURES, open_features, probe_class_names, probe_labels
from dncbm.probe.fit import Keep, fit_probe, fit_prox, save_probe
from dncbm.probe.model import Inputs, ProbeData, accuracy_of_groups, evaluate_probe, zero_counts
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, ImageEncoder, ProbeRun, ProbeSchedule, SAERun, Tracking
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import Outcome, check_chain, making
from dncbm.runs.results import append_result, result_row, write_csv
from dncbm.runs.settings import Settings
from dncbm.runs.stage import Stage
from dncbm.runs.tracking import NO_TRACKING, tracker
from sparse_autoencoder.declare import identity, values


def train_linear_probe(
    settings: Settings,
    run: SAERun,
    probe: ProbeRun,
    schedule: ProbeSchedule | None = None,
    tracking: Tracking = NO_TRACKING,
    *,
    device: str = "auto",
    overwrite: bool = False,
) -> Outcome:
    """Stage 7: train the linear probe on concept strengths, or with `probe.on_features` the baseline on features.

    Evaluates it on all three splits and appends a row to `probe_results.csv`. The accuracy to report is that on `val`, the
    data set's own validation or test split.

    Raises UserError if the strengths, the features or the labels are missing, or the loss became NaN; StaleArtifact if a
    probe from other inputs or settings exists.
    """
    artifacts = Artifacts(settings)
    target, state = artifacts.probe(run, probe), artifacts.probe_state(run, probe)
    inputs = {f"{split} {probe.inputs}": _inputs_folder(settings, run, probe, split) for split in SPLITS}
    inputs["split"] = artifacts.probe_split(probe.dataset)

    def remove() -> None:
        for path in artifacts.probe_files(run, probe):
            path.unlink()

    shown = values(ImageEncoder(run.encoder, run.hook) if probe.on_features else run) | values(probe)
    with making(target, PROBE.name, identity(probe), inputs, overwrite=overwrite, run=shown, remove=remove) as work:
        if not work.needed:
            return work.outcome
        class_names = probe_class_names(settings, probe.dataset)
        data = {split: load_probe_data(settings, run, probe, split) for split in SPLITS}
        torch_device = resolve_device(device)
        with tracker(tracking, "probe", f"{probe.dataset} {probe.config_name} on {probe.inputs}") as log:
            checkpoint = partial(artifacts.probe_intermediate, run, probe)
            keep = Keep(state, schedule or ProbeSchedule(), checkpoint, log, artifacts.probe_log(run, probe))
            fit = fit_probe if probe.solver == "adam" else fit_prox
            weight = fit(data["train"], data["train_val"], len(class_names), probe, torch_device, keep)
        metrics: dict[str, float] = dict(zero_counts(weight))
        for split in SPLITS:
            found = evaluate_probe(weight, data[split], probe.sparsity_lambda, coverage=split == "val")
            metrics |= {f"{split}_{key}": value for key, value in found.items()}
        accuracies = artifacts.probe_accuracies(run, probe)
        metrics |= save_accuracies(settings, probe.dataset, weight, data["val"], accuracies)
        save_probe(weight, target)
        # Before the probe counts as done: if the row cannot be appended now, the next run appends it.
        append_result(artifacts.probe_results(), _result_row(run, probe, metrics))
        said = f"probe on {probe.inputs} of {probe.dataset}, top-1 {metrics['val_top1']:.1%} on val"
        about = {"device": str(torch_device), "classes": len(class_names)}
        work.done([target, accuracies], said, metrics=metrics, **about)
    state.unlink(missing_ok=True)
    return work.outcome


def _inputs_folder(settings: Settings, run: SAERun, probe: ProbeRun, split: str) -> Path:
    if probe.on_features:
        return open_features(settings, probe.dataset, run.encoder, run.hook, split).folder
    return finished_strengths(settings, run, probe.dataset, split)


def load_probe_data(settings: Settings, run: SAERun, probe: ProbeRun, split: str) -> ProbeData:
    """Inputs and labels of a split: concept strengths, or features for `probe.on_features`.

    Raises UserError if they are missing; StaleArtifact if what the strengths were made from has changed since.
    """
    inputs: Inputs
    if probe.on_features:
        inputs = open_features(settings, probe.dataset, run.encoder, run.hook, split)
        keys = inputs.keys
    else:
        strengths = load_concept_strengths(settings, run, probe.dataset, split)
        inputs, keys = strengths.matrix, strengths.keys
    labels = torch.from_numpy(probe_labels(settings, probe.dataset, split, keys))
    return ProbeData(inputs, labels, load_groups(settings, probe.dataset, split, keys))


def load_groups(settings: Settings, dataset: str, split: str, keys: NDArray[np.int64]) -> torch.Tensor | None:
    """int64 group of the rows with these keys (indices in the data set's own split); None if it has no groups."""
    path = Artifacts(settings).groups(dataset, settings.own_split(dataset, split))
    return torch.from_numpy(np.load(path)[keys]) if path.is_file() else None


def save_accuracies(settings: Settings, dataset: str, weight: torch.Tensor, data: ProbeData, path: Path) -> dict[str, float]:
    """Write the accuracy on `val` of every class, and of every group if there are groups, as a CSV.

    Its columns are kind (`class` or `group`), index, name, images and top1, which is blank for a class or group without
    images. Groups are named by `group_names` in the data set's `split.json`, or numbered.

    Returns:
        The mean and the worst accuracy of each kind, as columns of the results; those without images do not count.
    """
    named: dict[str, list[str]] = json.loads(Artifacts(settings).probe_split(dataset).read_text(encoding="utf-8"))
    kinds = {"class": (data.labels, named["class_names"])}
    if data.groups is not None:
        n_groups = int(data.groups.max()) + 1
        kinds["group"] = (data.groups, named.get("group_names") or [str(group) for group in range(n_groups)])
    rows: list[tuple[Any, ...]] = []
    found: dict[str, float] = {}
    for kind, (membership, names) in kinds.items():
        images, right = accuracy_of_groups(weight, data, membership, len(names))
        shares = right / images  # NaN without images
        for index, (name, n, share) in enumerate(zip(names, images.tolist(), shares.tolist(), strict=True)):
            rows.append((kind, index, name, n, f"{share:.6g}" if n else ""))
        shares = shares[images > 0]
        found |= {f"val_mean_{kind}_top1": float(shares.mean()), f"val_worst_{kind}_top1": float(shares.min())}
    write_csv(path, ("kind", "index", "name", "images", "top1"), rows)
    return found


def _result_row(run: SAERun, probe: ProbeRun, metrics: dict[str, float]) -> dict[str, Any]:
    described: dict[str, Any] = {"probe_dataset": probe.dataset, "method": "probe", "on": probe.inputs}
    described |= {"encoder": run.encoder, "hook": run.hook, "probe": probe.config_name, "solver": probe.solver}
    described |= {"probe_epochs": probe.epochs, "probe_lambda": probe.sparsity_lambda, "seed": probe.seed}
    if not probe.on_features:
        described |= {"sae_dataset": run.dataset, "sae": run.config_name}
    if probe.solver == "adam":
        described |= {"probe_lr": probe.lr, "probe_batch_size": probe.batch_size}
    return result_row(described, metrics)


def load_probe(settings: Settings, run: SAERun, probe: ProbeRun) -> torch.Tensor:
    """The weights of a trained probe, inputs x C.

    Raises UserError if the probe is missing or malformed; StaleArtifact if its inputs have changed since.
    """
    path = Artifacts(settings).probe(run, probe)
    if not path.is_file():
        raise PROBE.missing("the probe", path, "with these flags")
    check_chain(path)
    try:
        return load_file(path)["weight"].T.contiguous()
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path} is not a probe: {error}; remove it and train again") from error


PROBE = Stage(
    name="probe",
    script="07_train_linear_probe.py",
    summary="Train and evaluate the sparse linear probe on concept strengths, or with --probe_on_features the baseline.",
    function=train_linear_probe,
    takes=(SAERun, ProbeRun, ProbeSchedule, Tracking),
    trains=(ProbeRun,),
    inputs=(STRENGTHS, PROBE_FEATURES),
    outputs=lambda artifacts, run, probe, *_: [artifacts.probe(run, probe)],
    made=Artifacts.probes,
)
