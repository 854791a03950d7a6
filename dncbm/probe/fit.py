"""Fitting the linear probe: Adam as in the paper, or proximal steps to exact zeros. Both resume after an interruption."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tqdm import tqdm

from dncbm.features.store import FeatureStore
from dncbm.probe.model import ProbeData, evaluate_probe, linear, probe_loss
from dncbm.probe.solvers import CrossEntropy, Progress, falling_lambdas, largest_lambda, minimise
from dncbm.probe.state import Latest, StateFile
from dncbm.probe.step import SparseAdamStep
from dncbm.runs.declarations import ProbeRun, ProbeSchedule
from dncbm.runs.errors import UserError
from dncbm.runs.results import write_csv
from dncbm.runs.tracking import Log
from sparse_autoencoder.files import whole_file

TOLERANCE = 1e-6
"""A solver stops when ten passes lower the objective by less than this share of it."""
PATH_RATIO, PATH_TOLERANCE, PATH_PASSES = 0.5, 1e-3, 30
"""On the way to its lambda: each lambda is this share of the previous one, and is solved only this well, as a start."""


@dataclass(frozen=True)
class Keep:
    """When and where the training of a probe reports and saves."""

    state: StateFile
    """The state of an unfinished training."""
    schedule: ProbeSchedule = field(default_factory=ProbeSchedule)
    checkpoint: Callable[[int], Path] | None = None
    """Epoch -> path of an intermediate checkpoint."""
    log: Log | None = None
    log_path: Path | None = None
    """CSV of the logged values."""


def initial_weight(n_inputs: int, n_classes: int, seed: int) -> torch.Tensor:
    """nn.Linear's initialisation, inputs x C float32."""
    generator = torch.Generator().manual_seed(seed)
    bound = 1 / n_inputs**0.5
    return (torch.rand(n_classes, n_inputs, generator=generator) * 2 - 1).mul_(bound).T.contiguous()


def fit_probe(
    train: ProbeData, validation: ProbeData, n_classes: int, run: ProbeRun, device: torch.device, keep: Keep
) -> torch.Tensor:
    """Train a probe with Adam on cross-entropy + lambda * mean |W| (METHOD section 4).

    Epoch e visits the rows in the order of `numpy.random.default_rng([seed, e])`, so an interrupted training resumes from
    `keep.state` to the same weights. Ctrl-C and SIGTERM save the state of the last whole epoch.

    Returns:
        inputs x C weights.

    Raises:
        UserError: the loss is NaN or infinite; or the state is damaged or of another training (`StateFile.load`).
    """
    weight = initial_weight(train.width, n_classes, run.seed).to(device).requires_grad_()
    fused = True if device.type == "cuda" else None  # one kernel, which keeps the number of steps on the GPU
    optimizer = torch.optim.Adam([weight], lr=run.lr, fused=fused)
    report, latest, start = _Report(validation, run, keep), Latest(keep.state), 0
    shapes = dict.fromkeys(("weight", "exp_avg", "exp_avg_sq"), weight.shape) | {"step": torch.Size([1])}
    if found := keep.state.load(device, shapes, ("epoch", "log")):
        tensors, about = found
        weight.detach().copy_(tensors.pop("weight"))
        optimizer.state[weight] = tensors | {"step": tensors["step"].reshape(()).to(device if fused else "cpu")}
        report.rows, start = about["log"], about["epoch"]
    with (
        latest.saved_if_interrupted(),
        _trainer(train, weight, optimizer, run) as train_in,
        tqdm(desc=f"probe on {run.inputs}", total=run.epochs, initial=start, unit="epoch") as bar,
    ):
        for epoch in range(start, run.epochs):
            order = np.random.default_rng([run.seed, epoch]).permutation(len(train))
            train_loss = train_in(order) / len(train)
            if not np.isfinite(train_loss):
                raise UserError(f"the probe's loss became NaN or infinite in epoch {epoch}: lower --probe_lr ({run.lr})")
            last = epoch + 1 == run.epochs
            bar.update()
            bar.set_postfix(report.after(epoch + 1, weight.detach(), {"train_loss": train_loss}, last=last))
            moments = optimizer.state[weight]
            state = {"weight": weight, **moments, "step": moments["step"].reshape(1)}
            copies = {name: tensor.detach().clone() for name, tensor in state.items()}  # the next epoch changes them in place
            latest.keep(copies, {"epoch": epoch + 1, "log": list(report.rows)}, last=last)
    report.write()
    return weight.detach()


def fit_prox(
    train: ProbeData, validation: ProbeData, n_classes: int, run: ProbeRun, device: torch.device, keep: Keep
) -> torch.Tensor:
    """Solve the objective of `fit_probe` with proximal steps (`solvers`), which leave exact zeros.

    Lambda halves from where all weights are 0 to `run.sparsity_lambda`; each solution starts at the previous one. An epoch of
    `fit_probe` is a pass over the images here: at most `run.epochs` for each lambda, and fewer if the objective stalls.
    Arguments, result, errors and resumption are those of `fit_probe`.
    """
    report, latest, done, passes = _Report(validation, run, keep), Latest(keep.state), 0, 0
    progress = Progress.at(torch.zeros(train.width, n_classes, device=device))
    shapes = dict.fromkeys(("weight", "previous"), progress.weight.shape)
    if found := keep.state.load(device, shapes, ("progress",)):
        tensors, about = found[0], found[1]["progress"]
        progress = Progress(tensors["weight"], tensors["previous"], about["momentum"], about["objectives"])
        report.rows, done, passes = about["log"], about["step"], about["passes"]
    with (
        latest.saved_if_interrupted(),
        closing(CrossEntropy(train, device)) as loss,
        tqdm(desc=f"probe on {run.inputs}", initial=passes, unit="pass") as bar,
    ):
        curvature = loss.curvature()
        lambdas = falling_lambdas(largest_lambda(loss, n_classes), run.sparsity_lambda, PATH_RATIO)

        def record(now: Progress, step: int, *, last: bool = False) -> None:
            values = {"train_loss": now.objectives[-1], "lambda": lambdas[min(step, len(lambdas) - 1)]}
            values["nonzero"] = float((now.weight != 0).sum())
            bar.set_postfix(report.after(passes, now.weight, values, last=last))
            about = {"step": step, "passes": passes, "momentum": now.momentum, "objectives": now.objectives}
            tensors = {"weight": now.weight, "previous": now.previous}
            latest.keep(tensors, {"progress": about | {"log": list(report.rows)}}, last=last)

        def on_pass(now: Progress, step: int) -> None:
            nonlocal passes
            passes += 1
            if not np.isfinite(now.objectives[-1]):
                raise UserError(f"the probe's loss became NaN or infinite in pass {passes}: check its inputs")
            bar.update()
            record(now, step)

        for step in range(done, len(lambdas)):
            if step > done:
                progress = Progress.at(progress.weight)
            final = step + 1 == len(lambdas)
            most = [min(run.epochs, PATH_PASSES)] * (len(lambdas) - 1 - step) + [run.epochs]
            bar.total = passes + sum(most) - len(progress.objectives)  # at most: a lambda may be solved in fewer
            progress = minimise(
                loss,
                curvature,
                progress,
                lambdas[step],
                max_passes=most[0],
                tolerance=TOLERANCE if final else PATH_TOLERANCE,
                on_pass=partial(on_pass, step=step),
            )
        bar.total = passes
        record(progress, len(lambdas), last=True)
    report.write()
    return progress.weight


@dataclass
class _Report:
    """Evaluates and logs a probe while it is trained."""

    validation: ProbeData
    run: ProbeRun
    keep: Keep
    rows: list[dict[str, float]] = field(default_factory=list)
    """One per evaluation."""

    def after(self, epoch: int, weight: torch.Tensor, values: dict[str, float], *, last: bool) -> dict[str, str]:
        """Do what the schedule asks for after an epoch. Returns the latest evaluation in short, for a progress bar."""
        every = self.keep.schedule
        if last or epoch % every.val_freq == 0:
            coverage = last or (every.coverage_freq > 0 and epoch % every.coverage_freq == 0)
            metrics = evaluate_probe(weight, self.validation, self.run.sparsity_lambda, coverage=coverage)
            if self.rows and self.rows[-1]["epoch"] == epoch:  # fit_prox reports its last pass twice, now as the last
                self.rows.pop()
            self.rows.append({"epoch": epoch} | values | metrics)
            if self.keep.log is not None:
                self.keep.log(self.rows[-1], epoch)
        if self.keep.checkpoint is not None and every.ckpt_freq and epoch % every.ckpt_freq == 0 and not last:
            save_probe(weight, self.keep.checkpoint(epoch))
        if not self.rows:
            return {}
        return {"loss": f"{self.rows[-1]['train_loss']:.3f}", "top1": f"{self.rows[-1]['top1']:.1%}"}

    def write(self) -> None:
        """Write the rows as CSV."""
        if self.keep.log_path is not None:
            columns = list(dict.fromkeys(key for row in self.rows for key in row))
            write_csv(self.keep.log_path, columns, ([row.get(column, "") for column in columns] for row in self.rows))


@contextmanager
def _trainer(
    train: ProbeData, weight: torch.Tensor, optimizer: torch.optim.Adam, run: ProbeRun
) -> Iterator[Callable[[NDArray[np.int64]], float]]:
    """An epoch in a given order, which returns the sum of the losses: compiled for strengths on a CPU, else autograd's."""

    def plain(order: NDArray[np.int64]) -> float:
        summed = torch.zeros((), device=weight.device)
        for batch, labels in train.batches(run.batch_size, weight.device, order):
            optimizer.zero_grad()
            loss = probe_loss(linear(batch, weight), labels, weight, run.sparsity_lambda)
            loss.backward()
            optimizer.step()
            summed += loss.detach() * len(labels)
        return float(summed)  # only now does the host wait for a GPU

    def compiled(order: NDArray[np.int64]) -> float:
        batches = (order[first : first + run.batch_size] for first in range(0, len(order), run.batch_size))
        return sum(step(matrix, rows, train.labels[torch.from_numpy(rows)]) * len(rows) for rows in batches)

    matrix = train.inputs
    if weight.device.type != "cpu" or isinstance(matrix, FeatureStore):
        yield plain
        return
    with closing(SparseAdamStep(weight, optimizer, run.sparsity_lambda)) as step:
        yield compiled


def save_probe(weight: torch.Tensor, path: Path) -> None:
    """Save weights (inputs x C) as the safetensors tensor `weight`, C x inputs, as nn.Linear does."""
    with whole_file(path) as temporary:
        save_file({"weight": weight.T.contiguous().cpu()}, temporary)
