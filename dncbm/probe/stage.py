"""The probe stage: train the linear probe on concept strengths or features, evaluate it, save it, and load it again."""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from dncbm.concepts.strengths import STRENGTHS, finished_strengths, load_concept_strengths, strengths_width
from dncbm.features.stage import PROBE_FEATURES, open_features, probe_class_names, probe_labels
from dncbm.features.store import FeatureStore
from dncbm.probe.fit import Keep, fit_probe, fit_prox, save_probe
from dncbm.probe.model import Inputs, ProbeData, accuracy_of_groups, evaluate_probe, zero_counts
from dncbm.probe.state import StateFile, Terminated
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, ImageEncoder, ProbeRun, ProbeSchedule, SAERun, Tracking
from dncbm.runs.devices import resolve_device
from dncbm.runs.errors import UserError, first_line
from dncbm.runs.manifests import Outcome, check_chain, making, manifest_path
from dncbm.runs.results import check_results, result_row, save_results, write_csv
from dncbm.runs.settings import Settings
from dncbm.runs.tracking import NO_TRACKING, tracker
from sparse_autoencoder.declare import identity, values

MOST_ACTIVE = 0.2
"""An SAE of which an image activates a larger share of the latents is not called sparse."""
messages = logging.getLogger(__name__)


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

    Evaluates it on all three splits and writes its row of `probe_results.csv`. The accuracy to report is that on `val`, the
    data set's own validation or test split.

    Raises UserError if the strengths, the features or the labels are missing or damaged, the row cannot be written, or the
    loss became NaN; StaleArtifact if a probe from other inputs or settings exists.
    """
    artifacts = Artifacts(settings)
    target, state = artifacts.probe(run, probe), artifacts.probe_state(run, probe)
    inputs = {f"{split} {probe.inputs}": _inputs_folder(settings, run, probe, split) for split in SPLITS}
    inputs["split"] = artifacts.probe_split(probe.dataset)

    check_results(artifacts.probe_results())
    shown = values(ImageEncoder(run.encoder, run.hook) if probe.on_features else run) | values(probe)
    files = partial(artifacts.probe_files, run, probe)
    with making(
        target,
        PROBE.name,
        identity(probe),
        inputs,
        overwrite=overwrite,
        run=shown,
        files=files,
        scratch=[state],
        before=partial(resolve_device, device),
    ) as work:
        if not work.needed:
            return work.outcome
        class_names = probe_class_names(settings, probe.dataset)
        data = {split: load_probe_data(settings, run, probe, split) for split in SPLITS}
        torch_device = resolve_device(device)
        if probe.solver == "adam" and probe.batch_size > len(data["train"]):
            messages.warning(
                f"a batch of {probe.batch_size} holds all {len(data['train'])} training images, so that the probe makes only "
                f"{probe.epochs} step{'s' if probe.epochs > 1 else ''}: lower --probe_train_bs or raise --probe_epochs"
            )
        name, group = f"{probe.dataset} {probe.config_name} on {probe.inputs}", f"{probe.dataset} {run.encoder} {run.hook}"
        config = shown | {"classes": len(class_names), "inputs": data["train"].width, "train_images": len(data["train"])}
        with tracker(tracking, "probe", name, config=config, group=group) as log:
            checkpoint = partial(artifacts.probe_intermediate, run, probe)
            unfinished = StateFile.of_work(state, identity(probe), inputs, overwrite)
            keep = Keep(unfinished, schedule or ProbeSchedule(), checkpoint, log, artifacts.probe_log(run, probe))
            fit = fit_probe if probe.solver == "adam" else fit_prox
            try:
                weight = fit(data["train"], data["train_val"], len(class_names), probe, torch_device, keep)
            except Terminated:
                print(f"stopped: the same command resumes from {state}")
                return Outcome.STOPPED
        save_probe(weight, target)
        # Before the probe counts as done: if the row cannot be written now, the next run writes it.
        metrics, accuracies = record_accuracy(settings, run, probe, weight, data)
        said = f"probe on {probe.inputs} of {probe.dataset}, top-1 {metrics['val_top1']:.1%} on val"
        about = {"device": str(torch_device), "classes": len(class_names)}
        work.done([target, accuracies], said, metrics=metrics, **about)
        _warn_of_many_concepts(run, data["train"])
    return work.outcome


def record_accuracy(
    settings: Settings, run: SAERun, probe: ProbeRun, weight: torch.Tensor, data: Mapping[str, ProbeData]
) -> tuple[dict[str, float], Path]:
    """Evaluate a probe (inputs x C) on every split; write the accuracy of classes and groups and its row of the results.

    Returns the metrics and the file of accuracies. Raises UserError if the row cannot be written.
    """
    artifacts = Artifacts(settings)
    metrics: dict[str, float] = dict(zero_counts(weight))
    for split in SPLITS:
        found = evaluate_probe(weight, data[split], probe.sparsity_lambda, coverage=split == "val")
        metrics |= {f"{split}_{key}": value for key, value in found.items()}
    accuracies = artifacts.probe_accuracies(run, probe)
    metrics |= save_accuracies(settings, probe.dataset, weight, data["val"], accuracies)
    save_results(artifacts.probe_results(), probe_row(run, probe, metrics))
    return metrics, accuracies


def _inputs_folder(settings: Settings, run: SAERun, probe: ProbeRun, split: str) -> Path:
    if probe.on_features:
        return open_features(settings, probe.dataset, run.encoder, run.hook, split).folder
    return finished_strengths(settings, run, probe.dataset, split)


def load_probe_data(settings: Settings, run: SAERun, probe: ProbeRun, split: str) -> ProbeData:
    """Inputs and labels of a split: concept strengths, or features for `probe.on_features`.

    Raises UserError if they are missing, damaged or do not fit together; StaleArtifact if what they were made from has changed
    since.
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


def _make_again(dataset: str) -> str:
    return PROBE_FEATURES.command("--probe_dataset", dataset, "--overwrite")


def load_groups(settings: Settings, dataset: str, split: str, keys: NDArray[np.int64]) -> torch.Tensor | None:
    """int64 group of the rows with these keys (indices in the data set's own split); None if it has no groups.

    Raises UserError if the file of groups is damaged.
    """
    path = Artifacts(settings).groups(dataset, settings.own_split(dataset, split))
    if not path.is_file():
        return None
    try:
        groups = np.load(path)
        if groups.ndim != 1 or groups.dtype.kind not in "iu" or not len(groups) or groups.min() < 0:
            raise ValueError("it does not hold numbers of groups")
        return torch.from_numpy(groups.astype(np.int64)[keys])
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}): run {_make_again(dataset)}") from error


def save_accuracies(settings: Settings, dataset: str, weight: torch.Tensor, data: ProbeData, path: Path) -> dict[str, float]:
    """Write the accuracy on `val` of every class, and of every group if there are groups, as a CSV.

    Its columns are kind (`class` or `group`), index, name, images and top1, which is blank for a class or group without
    images. Groups are named by `group_names` in the data set's `split.json`, or numbered.

    Returns:
        The mean and the worst accuracy of each kind, as columns of the results; those without images do not count.

    Raises UserError if `split.json` is damaged.
    """
    kinds = {"class": (data.labels, probe_class_names(settings, dataset))}
    if data.groups is not None:
        kinds["group"] = (data.groups, group_names(settings, dataset, int(data.groups.max()) + 1))
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


def group_names(settings: Settings, dataset: str, least: int) -> list[str]:
    """Names of the groups of a data set, or their numbers. Raises UserError if it names fewer than `least`."""
    path = Artifacts(settings).probe_split(dataset)
    try:
        names = json.loads(path.read_text(encoding="utf-8")).get("group_names") or [str(group) for group in range(least)]
        if not isinstance(names, list) or len(names) < least or not all(isinstance(name, str) for name in names):
            raise ValueError(f"it does not name {least} groups")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {path} ({first_line(error)}): run {_make_again(dataset)}") from error
    return names


def _warn_of_many_concepts(run: SAERun, data: ProbeData) -> None:
    """Warn if the concepts that a probe reads are not sparse: it can be accurate all the same."""
    if isinstance(data.inputs, FeatureStore) or data.inputs.nnz <= MOST_ACTIVE * len(data) * data.width:
        return
    known = list(values(run.sparsity))
    change = "a smaller --k" if "k" in known else f"a larger --{known[0]}" if known else "other settings"
    l0 = data.inputs.nnz / len(data)
    messages.warning(
        f"an image has {l0:.0f} of the {data.width} concepts on average ({l0 / data.width:.0%}), which is not sparse: a probe "
        f"on them can be accurate without their meaning anything; train the SAE with {change}"
    )


def probe_row(run: SAERun, probe: ProbeRun, metrics: Mapping[str, float], **more: str) -> dict[str, str]:
    """A row of the results with the settings of a probe, its metrics, and more columns, which replace those of a probe."""
    described: dict[str, Any] = {"probe_dataset": probe.dataset, "method": "probe", "on": probe.inputs}
    described |= {"encoder": run.encoder, "hook": run.hook, "probe": probe.config_name, "solver": probe.solver}
    described |= {"probe_epochs": probe.epochs, "probe_lambda": probe.sparsity_lambda, "seed": probe.seed}
    if not probe.on_features:
        described |= {"sae_dataset": run.dataset, "sae": run.config_name, "sae_type": run.sparsity.kind}
    if probe.solver == "adam":
        described |= {"probe_lr": probe.lr, "probe_batch_size": probe.batch_size}
    return result_row(described | more, metrics)


def load_probe(settings: Settings, run: SAERun, probe: ProbeRun) -> torch.Tensor:
    """The weights of a trained probe, inputs x C.

    Raises UserError if the probe is missing or damaged, or does not fit the classes or the inputs; StaleArtifact if its inputs
    have changed since.
    """
    path = Artifacts(settings).probe(run, probe)
    if not path.is_file():
        raise PROBE.missing("the probe", path, beside="with these flags")
    check_chain(path)
    try:
        weight = load_file(path)["weight"]
        wanted = (len(probe_class_names(settings, probe.dataset)), _width(settings, run, probe) or weight.shape[-1])
        if tuple(weight.shape) != wanted:
            raise ValueError(f"its weights are {list(weight.shape)}, not {list(wanted)}, classes x {probe.inputs}")
        if weight.dtype != torch.float32 or not bool(torch.isfinite(weight).all()):
            raise ValueError("its weights are not all numbers of type float32")
    except (OSError, SafetensorError, KeyError, ValueError, IndexError) as error:
        again = PROBE.command("--overwrite")
        raise UserError(f"{path} is not the probe ({first_line(error)}): run {again} with the same flags") from error
    return weight.T.contiguous()


def _width(settings: Settings, run: SAERun, probe: ProbeRun) -> int | None:
    """Number of inputs; None if they have been moved away, or concept strengths are damaged, which whoever reads them says."""
    artifacts = Artifacts(settings)
    if probe.on_features:
        folder = artifacts.features(probe.dataset, run.encoder, run.hook, "val")
        is_there = manifest_path(folder).is_file()
        return open_features(settings, probe.dataset, run.encoder, run.hook, "val").width if is_there else None
    folder = artifacts.strengths(run, probe.dataset, "val")
    with suppress(UserError):
        return strengths_width(folder) if manifest_path(folder).is_file() else None
    return None


PROBE = commands.PROBE.stage(
    function=train_linear_probe,
    inputs=(STRENGTHS, PROBE_FEATURES),
    outputs=lambda artifacts, run, probe, *_: [artifacts.probe(run, probe)],
    made=Artifacts.probes,
    makes="probe",
)
