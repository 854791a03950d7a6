"""The linear probe: no bias, sparse on concept strengths or dense on features; fit, evaluate, save, and log the results.

What it computes is in `probe_model`; the names of that module are importable from here too.
"""

import csv
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional
from tqdm import tqdm

from dncbm.artifacts import Artifacts, ProbeRun, SAERun
from dncbm.concepts import load_concept_strengths
from dncbm.devices import resolve_device
from dncbm.encoders import Encoder
from dncbm.errors import UserError
from dncbm.features import FeatureStore, open_features, probe_class_names, probe_labels
from dncbm.manifests import Outcome, Recipe, begin, fingerprint, finish, whole_file
from dncbm.probe_model import (
    COVERAGES,
    ZERO_TOLERANCES,
    Inputs,
    ProbeData,
    SparseRows,
    accuracy_of_groups,
    coverage_counts,
    evaluate_probe,
    linear,
    probe_loss,
    zero_counts,
)
from dncbm.probe_step import SparseAdamStep
from dncbm.results import append_result, result_row
from dncbm.settings import SPLITS, Settings
from dncbm.solvers import Progress, cross_entropy_of, falling_lambdas, largest_lambda, minimise
from dncbm.tracking import NO_TRACKING, Log, Tracking, tracker

__all__ = [
    "COVERAGES",
    "ZERO_TOLERANCES",
    "ProbeData",
    "ProbeSchedule",
    "SparseRows",
    "append_result",
    "coverage_counts",
    "evaluate_probe",
    "fit_probe",
    "fit_prox",
    "initial_weight",
    "linear",
    "load_groups",
    "load_probe",
    "load_probe_data",
    "majority_accuracy",
    "probe_loss",
    "save_accuracies",
    "save_probe",
    "train_linear_probe",
    "zero_counts",
    "zero_shot_weight",
]

STATE_EVERY_S = 60.0
"""How often the state of an unfinished training is saved."""
PAPER_SETTINGS = {
    "imagenet": (1e-3, 1.0),
    "cifar10": (1e-3, 1.0),
    "cifar100": (1e-2, 1.0),
    "places365": (1e-2, 0.1),
    "waterbirds100": (0.1, 10.0),
}
"""Probe dataset -> the paper's learning rate and lambda (METHOD section 4); 200 epochs in batches of 512."""
TOLERANCE = 1e-6
"""A solver has ended when ten passes lower the objective by less than this share of it."""
PATH_RATIO, PATH_TOLERANCE, PATH_PASSES = 0.5, 1e-3, 30
"""On the way to its lambda: each is this share of the one before, and only a good start for the next."""


@dataclass(frozen=True)
class ProbeSchedule:
    """When a training reports and saves; none of it changes the probe."""

    val_freq: int = 1
    """Evaluate on train_val every so many epochs."""
    coverage_freq: int = 50
    """Count image-wise coverage on train_val every so many epochs; 0: only at the end."""
    ckpt_freq: int = 0
    """Keep a checkpoint every so many epochs; 0: only the final one."""


# ----------------------------------------------------------------------------------------------------------------- fit


def initial_weight(n_inputs: int, n_classes: int, seed: int) -> torch.Tensor:
    """nn.Linear's initialisation, inputs x C float32."""
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / n_inputs**0.5
    return (torch.rand(n_classes, n_inputs, generator=generator) * 2 - 1).mul_(bound).T.contiguous()


def fit_probe(
    train: ProbeData,
    validation: ProbeData,
    n_classes: int,
    run: ProbeRun,
    *,
    schedule: ProbeSchedule,
    device: torch.device,
    state_path: Path,
    checkpoint_path: Callable[[int], Path] | None = None,
    log: Log | None = None,
    log_path: Path | None = None,
) -> torch.Tensor:
    """Train a probe with Adam on cross-entropy + lambda * mean |W| (METHOD section 4).

    Epoch e visits the rows in the order of `numpy.random.default_rng([seed, e])`, so training that was interrupted goes on
    from `state_path` to the same weights.

    Args:
        train: what it is fitted on.
        validation: what it is evaluated on while it trains.
        n_classes: C.
        run: learning rate, batch size, epochs, lambda and seed.
        schedule: when to evaluate and save.
        device: where it runs.
        state_path: the state of an unfinished training; removed by the caller when the probe is saved.
        checkpoint_path: epoch -> path, for `schedule.ckpt_freq`.
        log: takes values and the epoch.
        log_path: a CSV of the values.

    Returns:
        inputs x C weights.

    Raises:
        UserError: the loss is NaN or infinite.
    """
    weight = initial_weight(train.width, n_classes, run.seed).to(device).requires_grad_()
    optimizer = torch.optim.Adam([weight], lr=run.lr)
    report = Report(validation, run, schedule, log, checkpoint_path)
    start = _load_state(state_path, weight, optimizer, report.rows)
    saved_at = time.monotonic()
    with (
        _stepper(train, weight, optimizer, run.sparsity_lambda, device) as step,
        tqdm(desc=f"probe on {run.inputs}", total=run.epochs, initial=start, unit="epoch") as bar,
    ):
        for epoch in range(start, run.epochs):
            order = np.random.default_rng([run.seed, epoch]).permutation(len(train))
            summed = torch.zeros((), device=device)  # read once an epoch: reading it makes a GPU wait
            for first in range(0, len(train), run.batch_size):
                chosen = order[first : first + run.batch_size]
                summed += step(chosen) * len(chosen)
            train_loss = float(summed) / len(train)
            if not np.isfinite(train_loss):
                raise UserError(
                    f"the probe's loss became NaN or infinite in epoch {epoch}: lower --probe_lr ({run.lr})"
                )
            last = epoch + 1 == run.epochs
            bar.update()
            bar.set_postfix(report.after(epoch + 1, weight.detach(), {"train_loss": train_loss}, last=last))
            if last or time.monotonic() - saved_at > STATE_EVERY_S:
                _save_state(state_path, weight, optimizer, report.rows, epoch + 1)
                saved_at = time.monotonic()
    if log_path is not None:
        _write_log(log_path, report.rows)
    return weight.detach()


def fit_prox(
    train: ProbeData,
    validation: ProbeData,
    n_classes: int,
    run: ProbeRun,
    *,
    schedule: ProbeSchedule,
    device: torch.device,
    state_path: Path,
    checkpoint_path: Callable[[int], Path] | None = None,
    log: Log | None = None,
    log_path: Path | None = None,
) -> torch.Tensor:
    """Solve the objective of `fit_probe` with proximal steps (`solvers`), so that weights are true zeros.

    Lambda falls to `run.sparsity_lambda` from where all weights are 0, halving, each time starting at the weights before. What
    `fit_probe` calls an epoch is a pass over the images; at most `run.epochs` are made for each lambda, and fewer where the
    objective no longer falls. Arguments, result and resumption are those of `fit_probe`.
    """
    report = Report(validation, run, schedule, log, checkpoint_path)
    with cross_entropy_of(train, device) as loss:
        curvature = loss.curvature()
        zero = torch.zeros(train.width, n_classes, device=device)
        lambdas = falling_lambdas(largest_lambda(loss, n_classes), run.sparsity_lambda, PATH_RATIO)
        done, passes, progress = _load_prox(state_path, report.rows, device) or (0, 0, Progress.at(zero))
        saved_at = time.monotonic()
        with tqdm(desc=f"probe on {run.inputs}", initial=passes, unit="pass") as bar:

            def values(now: Progress, step: int) -> dict[str, float]:
                return {
                    "train_loss": now.objectives[-1],
                    "lambda": lambdas[min(step, len(lambdas) - 1)],
                    "nonzero": float((now.weight != 0).sum()),
                }

            def on_pass(now: Progress, step: int) -> None:
                nonlocal passes, saved_at
                passes += 1
                if not np.isfinite(now.objectives[-1]):
                    raise UserError(f"the probe's loss became NaN or infinite in pass {passes}: look at its inputs")
                bar.update()
                bar.set_postfix(report.after(passes, now.weight, values(now, step), last=False))
                if time.monotonic() - saved_at > STATE_EVERY_S:
                    _save_prox(state_path, step, passes, now, report.rows)
                    saved_at = time.monotonic()

            for step in range(done, len(lambdas)):
                final = step + 1 == len(lambdas)
                if step > done:
                    progress = Progress.at(progress.weight)
                progress = minimise(
                    loss,
                    curvature,
                    progress,
                    lambdas[step],
                    max_passes=run.epochs if final else min(run.epochs, PATH_PASSES),
                    tolerance=TOLERANCE if final else PATH_TOLERANCE,
                    on_pass=partial(on_pass, step=step),
                )
            report.after(passes, progress.weight, values(progress, len(lambdas)), last=True)
            _save_prox(state_path, len(lambdas), passes, progress, report.rows)
    if log_path is not None:
        _write_log(log_path, report.rows)
    return progress.weight


def _save_prox(path: Path, step: int, passes: int, progress: Progress, rows: list[dict[str, float]]) -> None:
    kept = {
        "step": step,
        "passes": passes,
        "momentum": progress.momentum,
        "objectives": progress.objectives,
        "log": rows,
    }
    with whole_file(path) as temporary:
        tensors = {"weight": progress.weight.clone(), "previous": progress.previous.clone()}
        save_file(tensors, temporary, metadata={"progress": json.dumps(kept)})


def _load_prox(path: Path, rows: list[dict[str, float]], device: torch.device) -> tuple[int, int, Progress] | None:
    """Which lambda an interrupted path was at, its passes until then, and where it was; None if there is none."""
    if not path.is_file():
        return None
    with safe_open(path, framework="pt") as file:
        kept = json.loads(file.metadata()["progress"])
        weight, previous = (file.get_tensor(name).to(device) for name in ("weight", "previous"))
    rows += kept["log"]
    return kept["step"], kept["passes"], Progress(weight, previous, kept["momentum"], kept["objectives"])


@dataclass
class Report:
    """What is measured, logged and kept while a probe is trained."""

    validation: ProbeData
    run: ProbeRun
    schedule: ProbeSchedule
    log: Log | None
    checkpoint_path: Callable[[int], Path] | None
    rows: list[dict[str, float]] = field(default_factory=list)
    """A row for each evaluation."""

    def after(self, epoch: int, weight: torch.Tensor, values: dict[str, float], *, last: bool) -> dict[str, str]:
        """What the schedule asks for after so many epochs. Returns the latest evaluation in short, for a progress bar."""
        every = self.schedule
        if last or epoch % every.val_freq == 0:
            coverage = last or (every.coverage_freq > 0 and epoch % every.coverage_freq == 0)
            metrics = evaluate_probe(weight, self.validation, self.run.sparsity_lambda, coverage=coverage)
            if self.rows and self.rows[-1]["epoch"] == epoch:  # the end was known only after its report
                self.rows.pop()
            self.rows.append({"epoch": epoch} | values | metrics)
            if self.log is not None:
                self.log(self.rows[-1], epoch)
        if self.checkpoint_path is not None and every.ckpt_freq and epoch % every.ckpt_freq == 0 and not last:
            save_probe(weight, self.checkpoint_path(epoch))
        if not self.rows:
            return {}
        return {"loss": f"{self.rows[-1]['train_loss']:.3f}", "top1": f"{self.rows[-1]['top1']:.1%}"}


@contextmanager
def _stepper(
    train: ProbeData, weight: torch.Tensor, optimizer: torch.optim.Adam, sparsity_lambda: float, device: torch.device
) -> Iterator[Callable[[NDArray[np.int64]], torch.Tensor | float]]:
    """A training step on some rows, which returns their loss: compiled for strengths on a CPU, else torch's own."""

    def plain(rows: NDArray[np.int64]) -> torch.Tensor:
        batch, labels = train.batch(rows, device)
        optimizer.zero_grad()
        loss = probe_loss(linear(batch, weight), labels, weight, sparsity_lambda)
        loss.backward()
        optimizer.step()
        return loss.detach()

    matrix = train.inputs
    if device.type != "cpu" or isinstance(matrix, FeatureStore):
        yield plain
        return
    step = SparseAdamStep(weight, optimizer, sparsity_lambda)
    try:
        yield lambda rows: step(matrix, rows, train.labels[torch.from_numpy(rows)])
    finally:
        step.close()


def _save_state(
    path: Path, weight: torch.Tensor, optimizer: torch.optim.Adam, rows: list[dict[str, float]], epoch: int
) -> None:
    moments = optimizer.state[weight]
    tensors = {"weight": weight.detach(), "step": moments["step"].reshape(1).clone()}
    tensors |= {"exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"]}
    with whole_file(path) as temporary:
        save_file(tensors, temporary, metadata={"epoch": str(epoch), "log": json.dumps(rows)})


def _load_state(path: Path, weight: torch.Tensor, optimizer: torch.optim.Adam, rows: list[dict[str, float]]) -> int:
    """Bring everything to where an interrupted training was; returns the epoch to go on with."""
    if not path.is_file():
        return 0
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key).to(weight.device) for key in file.keys()}  # noqa: SIM118 (not a dict)
    with torch.no_grad():
        weight.copy_(tensors["weight"])
    optimizer.state[weight] = {
        "step": tensors["step"].reshape(()).cpu(),
        "exp_avg": tensors["exp_avg"],
        "exp_avg_sq": tensors["exp_avg_sq"],
    }
    rows += json.loads(metadata["log"])
    return int(metadata["epoch"])


def _write_log(path: Path, rows: list[dict[str, float]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


# --------------------------------------------------------------------------------------------------------------- stage


def train_linear_probe(
    settings: Settings,
    run: SAERun,
    probe: ProbeRun,
    *,
    schedule: ProbeSchedule | None = None,
    device: str = "auto",
    tracking: Tracking = NO_TRACKING,
    overwrite: bool = False,
) -> Outcome:
    """Stage 7: train the linear probe on concept strengths, or with `probe.on_features` the baseline on features.

    Evaluates it on all three splits (`val` is the dataset's own validation or test split, the number to report) and appends
    a row to `probe_results.csv`.

    Raises:
        UserError: no strengths, features or labels; the loss became NaN.
        StaleArtifact: there is a probe from other inputs or settings.
    """
    artifacts = Artifacts(settings)
    target, state = artifacts.probe(run, probe), artifacts.probe_state(run, probe)
    data, inputs = {}, {}
    for split in SPLITS:
        data[split] = load_probe_data(settings, run, probe, split)
        inputs[f"{split} {probe.inputs}"] = fingerprint(_inputs_folder(artifacts, run, probe, split))
    inputs["split"] = fingerprint(artifacts.probe_split(probe.dataset))
    class_names = probe_class_names(settings, probe.dataset)
    recipe = Recipe("probe", _identifying(probe), inputs)

    def remove() -> None:
        for path in target.parent.glob(f"on_{probe.inputs}_*"):
            path.unlink()

    outcome = begin(target, recipe, overwrite=overwrite, remove=remove)
    if outcome is not Outcome.RAN:
        return outcome
    torch_device = resolve_device(device)
    with tracker(tracking, "probe", f"{probe.dataset} {probe.config_name} on {probe.inputs}") as log:
        weight = (fit_probe if probe.solver == "adam" else fit_prox)(
            data["train"],
            data["train_val"],
            len(class_names),
            probe,
            schedule=schedule or ProbeSchedule(),
            device=torch_device,
            state_path=state,
            checkpoint_path=lambda epoch: artifacts.probe_intermediate(run, probe, epoch),
            log=log,
            log_path=artifacts.probe_log(run, probe),
        )
    metrics: dict[str, float] = dict(zero_counts(weight))
    for split in SPLITS:
        found = evaluate_probe(weight, data[split], probe.sparsity_lambda, coverage=split == "val")
        metrics |= {f"{split}_{key}": value for key, value in found.items()}
    accuracies = artifacts.probe_accuracies(run, probe)
    metrics |= save_accuracies(settings, probe.dataset, weight, data["val"], accuracies)
    save_probe(weight, target)
    # Before the probe counts as done: a row that cannot be appended is appended by the next run.
    append_result(artifacts.probe_results(), _result_row(run, probe, metrics))
    finish(
        target,
        recipe,
        [target, accuracies],
        {"metrics": metrics, "device": str(torch_device), "classes": len(class_names)},
    )
    state.unlink(missing_ok=True)
    print(f"probe on {probe.inputs} of {probe.dataset}: top-1 {metrics['val_top1']:.1%} on val: {target}")
    return Outcome.RAN


def _identifying(probe: ProbeRun) -> dict[str, Any]:
    """The settings of a probe that its solver reads."""
    unread = ("solver",) if probe.solver == "adam" else ("lr", "batch_size", "seed")
    return {key: value for key, value in asdict(probe).items() if key not in unread}


def _inputs_folder(artifacts: Artifacts, run: SAERun, probe: ProbeRun, split: str) -> Path:
    if probe.on_features:
        return artifacts.features(probe.dataset, run.encoder, run.hook, split)
    return artifacts.strengths(run, probe.dataset, split)


def load_probe_data(settings: Settings, run: SAERun, probe: ProbeRun, split: str) -> ProbeData:
    """Inputs and labels of a split: concept strengths, or features for `probe.on_features`.

    Raises:
        UserError: they are not there.
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
    """int64 group of the rows with these keys (indices in the dataset's own split); None where there are no groups."""
    path = Artifacts(settings).groups(dataset, "val" if split == "val" else "train")
    return torch.from_numpy(np.load(path)[keys]) if path.is_file() else None


def save_accuracies(
    settings: Settings, dataset: str, weight: torch.Tensor, data: ProbeData, path: Path
) -> dict[str, float]:
    """Write the accuracy on `val` of every class, and of every group where there are groups, as a CSV.

    Its columns are kind (`class` or `group`), index, name, images and top1, which is blank where there is no image. Names of
    groups are those of `group_names` beside the class names, where they are there.

    Returns:
        The mean and the worst of each kind, as in the results.
    """
    named: dict[str, list[str]] = json.loads(Artifacts(settings).probe_split(dataset).read_text(encoding="utf-8"))
    kinds = {"class": (data.labels, named["class_names"])}
    if data.groups is not None:
        n_groups = int(data.groups.max()) + 1
        kinds["group"] = (data.groups, named.get("group_names") or [str(group) for group in range(n_groups)])
    found: dict[str, float] = {}
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "index", "name", "images", "top1"])
        for kind, (membership, names) in kinds.items():
            images, right = accuracy_of_groups(weight, data, membership, len(names))
            shares = right / images  # NaN where there is none
            for index, name in enumerate(names):
                top1 = f"{float(shares[index]):.6g}" if images[index] else ""
                writer.writerow([kind, index, name, int(images[index]), top1])
            shares = shares[images > 0]
            found |= {f"val_mean_{kind}_top1": float(shares.mean()), f"val_worst_{kind}_top1": float(shares.min())}
    return found


def _result_row(run: SAERun, probe: ProbeRun, metrics: dict[str, float]) -> dict[str, Any]:
    by_adam = probe.solver == "adam"
    described = {
        "probe_dataset": probe.dataset,
        "method": "probe",
        "on": probe.inputs,
        "encoder": run.encoder,
        "hook": run.hook,
        "sae_dataset": run.dataset,
        "sae": run.config_name,
        "probe": probe.config_name,
        "solver": probe.solver,
        "probe_lr": probe.lr if by_adam else "",
        "probe_batch_size": probe.batch_size if by_adam else "",
        "probe_epochs": probe.epochs,
        "probe_lambda": probe.sparsity_lambda,
        "seed": probe.seed,
    }
    return result_row(described, metrics)


def save_probe(weight: torch.Tensor, path: Path) -> None:
    """Save weights (inputs x C) as the safetensors tensor `weight`, C x inputs, as nn.Linear keeps them."""
    with whole_file(path) as temporary:
        save_file({"weight": weight.T.contiguous().cpu()}, temporary)


def load_probe(settings: Settings, run: SAERun, probe: ProbeRun) -> torch.Tensor:
    """The weights of a trained probe, inputs x C. Raises UserError if there is none, or it is malformed."""
    path = Artifacts(settings).probe(run, probe)
    if not path.is_file():
        raise UserError(f"no probe {path}: train it with `python scripts/07_train_linear_probe.py` and these flags")
    try:
        return load_file(path)["weight"].T.contiguous()
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path} is not a probe: {error}; remove it and train again") from error


# ----------------------------------------------------------------------------------------------------------- baselines


def zero_shot_weight(encoder: Encoder, class_names: Sequence[str], templates: Sequence[str]) -> torch.Tensor:
    """Weights that classify features by their nearest class description, D x C: the mean of the normalised embeddings.

    Args:
        encoder: whose text tower embeds the descriptions.
        class_names: as people write them.
        templates: each with a `{}` for the class name.
    """
    texts = [template.format(name) for name in class_names for template in templates]
    embeddings = encoder.encode_texts(texts).reshape(len(class_names), len(templates), -1)
    return functional.normalize(embeddings.mean(dim=1), dim=-1).T.contiguous()


def majority_accuracy(train_labels: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy of always answering the most frequent training class (a fraction)."""
    return float((labels == train_labels.bincount().argmax()).double().mean())
