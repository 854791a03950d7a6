"""The linear probe: no bias, sparse on concept strengths or dense on features; fit, evaluate, save, and log the results.

A batch of inputs is a `SparseRows` (concept strengths) or a dense tensor (features); `linear` multiplies either with the
weights. Weights are kept input-major (inputs x C), the layout a sparse product reads.
"""

import csv
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import scipy.sparse
import torch
from filelock import FileLock
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
from dncbm.settings import SPLITS, Settings
from dncbm.tracking import NO_TRACKING, Log, Tracking, tracker

ZERO_TOLERANCES = (0.0, 1e-9, 1e-6, 1e-3, 1e-1)
COVERAGES = (0.90, 0.95, 0.99)
STATE_EVERY_S = 60.0
"""How often the state of an unfinished training is saved."""


class SparseRows(NamedTuple):
    """Some rows of a CSR matrix, as tensors."""

    indices: torch.Tensor
    """int64, the columns of the entries."""
    offsets: torch.Tensor
    """int64, where each row begins."""
    values: torch.Tensor
    """float32."""


Inputs: TypeAlias = scipy.sparse.csr_matrix | FeatureStore
Batch: TypeAlias = SparseRows | torch.Tensor


@dataclass(frozen=True)
class ProbeData:
    """Inputs and labels of one split."""

    inputs: Inputs
    labels: torch.Tensor
    """int64, one for each row."""

    def batch(self, rows: NDArray[np.int64], device: torch.device) -> tuple[Batch, torch.Tensor]:
        """The inputs and labels of some rows."""
        labels = self.labels[torch.from_numpy(rows)].to(device)
        if isinstance(self.inputs, FeatureStore):
            return self.inputs.gather(rows).to(device), labels
        part = self.inputs[rows]
        sparse = SparseRows(
            torch.from_numpy(part.indices.astype(np.int64)).to(device),
            torch.from_numpy(part.indptr[:-1].astype(np.int64)).to(device),
            torch.from_numpy(part.data).to(device),
        )
        return sparse, labels

    def batches(self, batch_size: int, device: torch.device) -> Iterator[tuple[Batch, torch.Tensor]]:
        """All rows in order."""
        for start in range(0, len(self), batch_size):
            yield self.batch(np.arange(start, min(start + batch_size, len(self))), device)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def width(self) -> int:
        """Number of inputs: F concepts or D features."""
        return self.inputs.width if isinstance(self.inputs, FeatureStore) else int(self.inputs.shape[1])


@dataclass(frozen=True)
class ProbeSchedule:
    """When a training reports and saves; none of it changes the probe."""

    val_freq: int = 1
    """Evaluate on train_val every so many epochs."""
    coverage_freq: int = 50
    """Count image-wise coverage on train_val every so many epochs; 0: only at the end."""
    ckpt_freq: int = 0
    """Keep a checkpoint every so many epochs; 0: only the final one."""


# ------------------------------------------------------------------------------------------------------------- formulas


def linear(batch: Batch, weight: torch.Tensor) -> torch.Tensor:
    """Logits, rows x C.

    Args:
        batch: rows of the inputs, sparse or dense.
        weight: inputs x C.
    """
    if isinstance(batch, torch.Tensor):
        return batch @ weight
    return functional.embedding_bag(
        batch.indices, weight, batch.offsets, mode="sum", per_sample_weights=batch.values, include_last_offset=False
    )


def probe_loss(
    logits: torch.Tensor, labels: torch.Tensor, weight: torch.Tensor, sparsity_lambda: float
) -> torch.Tensor:
    """Cross-entropy + lambda * mean |W|, the mean over all C x inputs weights (METHOD section 4)."""
    return functional.cross_entropy(logits, labels) + sparsity_lambda * weight.abs().mean()


def zero_counts(weight: torch.Tensor) -> dict[str, int]:
    """Number of weights with |w| <= tolerance, for each tolerance."""
    return {f"zeros_{tolerance:g}": int((weight.abs() <= tolerance).sum()) for tolerance in ZERO_TOLERANCES}


def coverage_counts(batch: Batch, weight: torch.Tensor, *, absolute: bool) -> torch.Tensor:
    """How many concepts, taken greedily by contribution, reach each share of the predicted logit (METHOD section 4).

    The contribution of concept f to the predicted class c is z_f * W[f, c]. What is to be covered is the sum of the positive
    contributions, or with `absolute` the sum of the contributions' absolute values. (The authors' code reports a zero-based
    index, one less than this count.)

    Args:
        batch: rows of the inputs.
        weight: inputs x C.
        absolute: cover the absolute value.

    Returns:
        rows x len(COVERAGES), int64; 0 for a row with nothing to cover.
    """
    predicted = linear(batch, weight).argmax(dim=1)
    contributions = _contributions(batch, weight, predicted)
    contributions = contributions.abs() if absolute else contributions.clamp(min=0)
    reached = contributions.sort(dim=1, descending=True).values.double().cumsum(dim=1)
    shares = torch.tensor(COVERAGES, dtype=torch.float64, device=reached.device)
    wanted = reached[:, -1:] * shares if reached.shape[1] else reached.new_zeros(len(reached), len(shares))
    return torch.stack([(reached < wanted[:, [i]]).sum(dim=1) + (wanted[:, i] > 0) for i in range(len(shares))], dim=1)


def _contributions(batch: Batch, weight: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Contributions to one class a row, padded with zeros: rows x the most entries of a row."""
    if isinstance(batch, torch.Tensor):
        return batch * weight.T[classes]
    n_rows = len(batch.offsets)
    ends = torch.cat([batch.offsets[1:], torch.tensor([len(batch.indices)], device=batch.offsets.device)])
    lengths = ends - batch.offsets
    row = torch.repeat_interleave(torch.arange(n_rows, device=lengths.device), lengths)
    slot = torch.arange(len(batch.indices), device=lengths.device) - batch.offsets[row]
    padded = batch.values.new_zeros(n_rows, int(lengths.max()) if n_rows else 0)
    padded[row, slot] = batch.values * weight[batch.indices, classes[row]]
    return padded


@torch.inference_mode()
def evaluate_probe(
    weight: torch.Tensor, data: ProbeData, sparsity_lambda: float, *, coverage: bool = False, batch_size: int = 4096
) -> dict[str, float]:
    """Loss, cross-entropy, top-1 and top-5 accuracy (fractions) of a probe, and, if asked, its mean image-wise coverage."""
    n_classes = weight.shape[1]
    ce = top1 = top5 = 0.0
    covered = torch.zeros(2, len(COVERAGES), dtype=torch.float64)
    for batch, labels in data.batches(batch_size, weight.device):
        logits = linear(batch, weight)
        ce += float(functional.cross_entropy(logits, labels, reduction="sum"))
        ranked = logits.topk(min(5, n_classes), dim=1).indices == labels[:, None]
        top1 += float(ranked[:, 0].sum())
        top5 += float(ranked.any(dim=1).sum())
        if coverage:
            for i, absolute in enumerate((False, True)):
                covered[i] += coverage_counts(batch, weight, absolute=absolute).sum(dim=0).cpu()
    n = len(data)
    metrics = {
        "loss": ce / n + sparsity_lambda * float(weight.abs().mean()),
        "ce": ce / n,
        "top1": top1 / n,
        "top5": top5 / n,
    }
    if coverage:
        for i, kind in enumerate(("positive", "absolute")):
            metrics |= {
                f"coverage_{kind}_{share:.0%}": float(count) / n
                for share, count in zip(COVERAGES, covered[i], strict=True)
            }
    return metrics


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
    rows: list[dict[str, float]] = []
    start = _load_state(state_path, weight, optimizer, rows)
    saved_at = time.monotonic()
    with tqdm(desc=f"probe on {run.inputs}", total=run.epochs, initial=start, unit="epoch") as bar:
        for epoch in range(start, run.epochs):
            order = np.random.default_rng([run.seed, epoch]).permutation(len(train))
            summed = torch.zeros((), device=device)  # read once an epoch: reading it makes a GPU wait
            for first in range(0, len(train), run.batch_size):
                batch, labels = train.batch(order[first : first + run.batch_size], device)
                optimizer.zero_grad()
                loss = probe_loss(linear(batch, weight), labels, weight, run.sparsity_lambda)
                loss.backward()
                optimizer.step()
                summed += loss.detach() * len(labels)
            train_loss = float(summed) / len(train)
            if not np.isfinite(train_loss):
                raise UserError(
                    f"the probe's loss became NaN or infinite in epoch {epoch}: lower --probe_lr ({run.lr})"
                )
            bar.update()
            last = epoch + 1 == run.epochs
            if last or (epoch + 1) % schedule.val_freq == 0:
                coverage = last or (schedule.coverage_freq > 0 and (epoch + 1) % schedule.coverage_freq == 0)
                metrics = evaluate_probe(weight.detach(), validation, run.sparsity_lambda, coverage=coverage)
                rows.append({"epoch": epoch + 1, "train_loss": train_loss} | metrics)
                bar.set_postfix(loss=f"{train_loss:.3f}", top1=f"{metrics['top1']:.1%}")
                if log is not None:
                    log(rows[-1], epoch + 1)
            if (
                checkpoint_path is not None
                and schedule.ckpt_freq
                and (epoch + 1) % schedule.ckpt_freq == 0
                and not last
            ):
                save_probe(weight.detach(), checkpoint_path(epoch + 1))
            if last or time.monotonic() - saved_at > STATE_EVERY_S:
                _save_state(state_path, weight, optimizer, rows, epoch + 1)
                saved_at = time.monotonic()
    if log_path is not None:
        _write_log(log_path, rows)
    return weight.detach()


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
    recipe = Recipe("probe", asdict(probe), inputs)

    def remove() -> None:
        for path in target.parent.glob(f"on_{probe.inputs}_*"):
            path.unlink()

    outcome = begin(target, recipe, overwrite=overwrite, remove=remove)
    if outcome is not Outcome.RAN:
        return outcome
    torch_device = resolve_device(device)
    with tracker(tracking, "probe", f"{probe.dataset} {probe.config_name} on {probe.inputs}") as log:
        weight = fit_probe(
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
    save_probe(weight, target)
    # Before the probe counts as done: a row that cannot be appended is appended by the next run.
    append_result(artifacts.probe_results(), _result_row(run, probe, metrics))
    finish(target, recipe, [target], {"metrics": metrics, "device": str(torch_device), "classes": len(class_names)})
    state.unlink(missing_ok=True)
    print(f"probe on {probe.inputs} of {probe.dataset}: top-1 {metrics['val_top1']:.1%} on val: {target}")
    return Outcome.RAN


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
    return ProbeData(inputs, torch.from_numpy(probe_labels(settings, probe.dataset, split, keys)))


def _result_row(run: SAERun, probe: ProbeRun, metrics: dict[str, float]) -> dict[str, Any]:
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "probe_dataset": probe.dataset,
        "on": probe.inputs,
        "encoder": run.encoder,
        "hook": run.hook,
        "sae_dataset": run.dataset,
        "sae": run.config_name,
        "probe": probe.config_name,
        "seed": probe.seed,
        **{key: f"{value:.6g}" for key, value in metrics.items()},
    }


def append_result(path: Path, row: dict[str, Any]) -> None:
    """Append a row to a CSV under a lock, so that jobs of a cluster can share the file. The header is that of the first row.

    Raises:
        UserError: the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        is_new = not path.is_file() or path.stat().st_size == 0
        if not is_new:
            with path.open(newline="", encoding="utf-8") as file:
                header = next(csv.reader(file))
            if header != list(row):
                raise UserError(f"{path} has other columns than this version writes: move it away and run again")
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)


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


def zero_shot_weight(encoder: Encoder, class_names: list[str], templates: tuple[str, ...]) -> torch.Tensor:
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
