"""The training loop: schedule, logging, checkpoints, and a state that survives being killed."""

import csv
import io
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sparse_autoencoder.checkpoint import read_safetensors
from sparse_autoencoder.data import Features, as_features, epoch_order, geometric_median, in_batches
from sparse_autoencoder.errors import CheckpointError, NonFiniteError
from sparse_autoencoder.files import written_whole
from sparse_autoencoder.losses import RunningVariance, explained_variance
from sparse_autoencoder.metrics import count_dead, measure
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.resampler import is_resampling_epoch, resample
from sparse_autoencoder.sparsity import sparsity_to_json
from sparse_autoencoder.steps import StepResult, dense_step

CENTRE_SAMPLE = 100_000
"""The geometric median is taken of at most this many random items."""


@dataclass(frozen=True)
class TrainingSettings:
    """How to train; the defaults are DN-CBM's."""

    epochs: int = 200
    batch_size: int = 4096
    lr: float = 5e-4
    adam_beta_1: float = 0.9
    adam_beta_2: float = 0.999
    adam_epsilon: float = 1e-8
    adam_weight_decay: float = 0.0
    resample_freq: int = 10
    """Epochs between resamplings of dead latents; 0: never."""
    resample_dataset_size: int = 819_200
    """Items whose loss is computed to choose the new starts."""
    val_freq: int = 1
    """Epochs between validations; 0: never."""
    ckpt_freq: int = 0
    """Training items between checkpoints; 0: none before the end."""
    seed: int = 49
    """Of the order of the items and of resampling."""
    log_every: int = 100
    """Steps between rows of the log and updates of the progress bar."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "resample_dataset_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("resample_freq", "val_freq", "ckpt_freq", "seed", "lr", "adam_epsilon", "adam_weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("adam_beta_1", "adam_beta_2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}")


NOT_IN_THE_RESULT = ("val_freq", "ckpt_freq", "log_every")
"""Settings that a resumed run may change: they say what is reported, not what is computed."""


@dataclass(frozen=True)
class TrainingResult:
    """How training ended."""

    steps: int
    """Optimiser steps made in all, those before a resumption included."""
    stopped_early: bool
    """SIGTERM arrived: the state is saved (if there is a state_path), the model is not finished."""
    metrics: dict[str, float]
    """`evaluate` of the final model over the training features; the last row logged, if stopped early."""


class _State:
    """Everything that the next step depends on, beside settings and data."""

    def __init__(self, model: SparseAutoencoder, adam: Adam) -> None:
        self.model = model
        self.adam = adam
        self.items_seen = 0
        self.window_items = 0
        device = model.tied_bias.device
        self.fired = torch.zeros(model.n_latents, dtype=torch.int64, device=device)
        """How often each latent was active since the last resampling."""

    def count(self, result: StepResult, n_items: int) -> None:
        self.items_seen += n_items
        self.window_items += n_items
        self.fired += result.fired

    def start_window(self) -> None:
        self.window_items = 0
        self.fired.zero_()

    def tensors(self) -> dict[str, Tensor]:
        return {
            **{f"model.{name}": tensor for name, tensor in self.model.state_dict().items()},
            **{f"adam.{name}": tensor for name, tensor in self.adam.moments.items()},
            "fired": self.fired,
        }

    def save(self, path: Path, run: dict[str, object]) -> None:
        counters = {"steps": self.adam.steps, "items_seen": self.items_seen, "window_items": self.window_items}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors().items()}
        with written_whole(path) as partial:
            save_file(tensors, partial, {"run": json.dumps(run), "counters": json.dumps(counters)})

    def load(self, path: Path, run: dict[str, object]) -> None:
        """Takes the place that a saved state holds.

        Raises:
            CheckpointError: it is damaged, or of a run that differs in `run`; the message names every difference.
        """
        saved, header = read_safetensors(path)
        try:
            saved_run, counters = json.loads(header["run"]), json.loads(header["counters"])
            steps, items_seen, window = (int(counters[name]) for name in ("steps", "items_seen", "window_items"))
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: not a training state ({error})") from error
        differences = [
            f"{name} is {run.get(name)} now, {saved_run.get(name)} there"
            for name in sorted({*run, *saved_run})
            if run.get(name) != saved_run.get(name)
        ]
        if differences:
            raise CheckpointError(
                f"{path}: the training state there is of another run ({'; '.join(differences)}); train with its"
                " settings to continue it, or delete it to start anew"
            )
        own = self.tensors()
        wrong = [name for name in sorted({*own, *saved}) if name not in own or name not in saved]
        wrong += [name for name in own if name in saved and own[name].shape != saved[name].shape]
        if wrong:
            raise CheckpointError(f"{path}: not a training state of this model (wrong tensors: {', '.join(wrong)})")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        self.adam.steps = steps
        self.items_seen = items_seen
        self.window_items = window


LOG_COLUMNS = (
    "step",
    "epoch",
    "loss",
    "l2_loss",
    "l1_loss",
    "l0",
    "explained_variance",
    "dead",
    "almost_dead",
    "items_per_second",
    "val_loss",
    "val_l2_loss",
    "val_l1_loss",
    "val_l0",
    "val_explained_variance",
)


class _Log:
    """The CSV file, the caller's function and the progress bar: one row for all three."""

    def __init__(
        self, path: Path | None, function: Callable[[dict[str, float], int], None] | None, bar: "tqdm[None]", steps: int
    ) -> None:
        self.path = path
        self.function = function
        self.bar = bar
        self.last: dict[str, float] = {}
        if path is not None:
            rows = _rows_until(path, steps) if steps else []
            with written_whole(path) as partial, open(partial, "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(LOG_COLUMNS)
                writer.writerows(rows)

    def write(self, row: dict[str, float], step: int) -> None:
        self.last = row
        if self.path is not None:
            line = io.StringIO()
            csv.writer(line).writerow([step, *(_shown(row.get(name)) for name in LOG_COLUMNS[1:])])
            with open(self.path, "a", newline="") as file:
                file.write(line.getvalue())
        if self.function is not None:
            self.function(row, step)
        self.bar.set_postfix(
            loss=f"{row['loss']:.4g}",
            l2=f"{row['l2_loss']:.4g}",
            l1=f"{row['l1_loss']:.4g}",
            l0=f"{row['l0']:.1f}",
            dead=int(row["dead"]),
            items_s=f"{row['items_per_second']:.0f}",
        )


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.8g}"


def _rows_until(path: Path, steps: int) -> list[list[str]]:
    """The complete rows of an earlier log up to that step: a killed run may have logged more than its state holds."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    if not rows or rows[0] != list(LOG_COLUMNS):
        return []
    return [row for row in rows[1:] if len(row) == len(LOG_COLUMNS) and row[0].isdigit() and int(row[0]) <= steps]


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets, in place of ending the process, while the block runs (in the main thread only)."""
    event = threading.Event()

    def handle(signum: int, frame: FrameType | None) -> None:
        event.set()

    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


def train(
    model: SparseAutoencoder,
    data: Features | Tensor,
    settings: TrainingSettings,
    *,
    validation: Features | Tensor | None = None,
    state_path: Path | None = None,
    state_every: float = 300.0,
    on_checkpoint: Callable[[SparseAutoencoder, int], None] | None = None,
    log: Callable[[dict[str, float], int], None] | None = None,
    log_path: Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> TrainingResult:
    """Trains the model in place on N x D features (DN-CBM, section 3.1 and appendix).

    The order of an epoch and the draws of a resampling follow from the seed and the epoch alone, so a run that was
    stopped and continued ends with the same bits as one that was not, on the same machine with the same number of
    threads.

    Args:
        model: a model of D inputs; with the transform "centre", its centre is fitted to the data first.
        data: Features, or a tensor (N x D).
        settings: the schedule.
        validation: features whose mean losses are logged every `val_freq` epochs.
        state_path: a safetensors file that holds the state of the run, written every `state_every` seconds, on
            SIGTERM and at the end. If it is there at the start, training continues from it.
        on_checkpoint: called with the model and the items seen, every `ckpt_freq` items.
        log: called with a row of the log and its step, every `log_every` steps and at the end of an epoch with
        validation.
        log_path: a CSV file of the same rows (training_log.csv).
        device: where to train; the model is moved there.
        progress: whether to show a bar.

    Raises:
        NonFiniteError: the features or the loss are NaN or infinite. The state on the disk is from before.
        CheckpointError: the state at `state_path` is damaged or of another run.
        ValueError: there are no items, or they are not D wide.
    """
    features = as_features(data)
    held_out = as_features(validation) if validation is not None else None
    device = torch.device(device)
    model.to(device)
    adam = Adam(
        model,
        lr=settings.lr,
        betas=(settings.adam_beta_1, settings.adam_beta_2),
        epsilon=settings.adam_epsilon,
        weight_decay=settings.adam_weight_decay,
    )
    state = _State(model, adam)
    run: dict[str, object] = {
        "n_items": len(features),
        "n_inputs": model.n_inputs,
        "n_latents": model.n_latents,
        "sparsity": sparsity_to_json(model.sparsity),
        "input_transform": model.input_transform,
        **{name: value for name, value in asdict(settings).items() if name not in NOT_IN_THE_RESULT},
    }
    if state_path is not None and state_path.exists():
        state.load(state_path, run)
    elif model.input_transform == "centre":
        _fit_centre(model, features, settings)

    n = len(features)
    steps_per_epoch = -(-n // settings.batch_size)
    total_steps = settings.epochs * steps_per_epoch
    bar = tqdm(total=total_steps, initial=adam.steps, disable=not progress, unit="step", smoothing=0.05)
    with _sigterm() as stop, bar:
        logger = _Log(log_path, log, bar, adam.steps)

        def save() -> None:
            if state_path is not None:
                state.save(state_path, run)

        last_save = last_log = time.monotonic()
        items_at_log = state.items_seen
        while adam.steps < total_steps and not stop.is_set():
            epoch, first = divmod(adam.steps, steps_per_epoch)
            epoch_start = epoch * steps_per_epoch
            batches = in_batches(
                features,
                epoch_order(n, settings.seed, epoch),
                settings.batch_size,
                first=first,
                name=lambda batch, start=epoch_start: f"step {start + batch + 1}",  # type: ignore[misc]
            )
            for batch in batches:
                x, _ = model.transform(batch.to(device))
                result = dense_step(model, adam, x)
                step = adam.steps
                if not torch.isfinite(result.loss):
                    raise NonFiniteError(f"step {step}: the loss is {float(result.loss)}")
                before = state.items_seen
                state.count(result, len(x))
                bar.update()

                end_of_epoch = step % steps_per_epoch == 0
                validate = end_of_epoch and settings.val_freq > 0 and (epoch + 1) % settings.val_freq == 0
                validate = validate and held_out is not None
                row = None
                if step % settings.log_every == 0 or validate or step == total_steps:
                    now = time.monotonic()
                    row = _training_row(state, result, x, epoch)
                    row["items_per_second"] = (state.items_seen - items_at_log) / max(now - last_log, 1e-9)
                if end_of_epoch and is_resampling_epoch(epoch, settings.resample_freq, settings.epochs):
                    resample(
                        model,
                        adam,
                        features,
                        state.fired,
                        dataset_size=settings.resample_dataset_size,
                        batch_size=settings.batch_size,
                        generator=np.random.default_rng([settings.seed, epoch, 1]),
                    )
                    state.start_window()
                if row is not None:
                    if validate:
                        assert held_out is not None
                        measured = measure(
                            model, held_out, batch_size=settings.batch_size, device=device, stop=stop.is_set
                        )
                        row.update({f"val_{name}": value for name, value in (measured[0] if measured else {}).items()})
                    logger.write(row, step)
                    last_log, items_at_log = time.monotonic(), state.items_seen
                freq = settings.ckpt_freq
                if on_checkpoint is not None and freq and before // freq != state.items_seen // freq:
                    on_checkpoint(model, state.items_seen)
                if stop.is_set():
                    break
                if time.monotonic() - last_save >= state_every:
                    save()
                    last_save = time.monotonic()
        save()
        finished = adam.steps == total_steps
        measured = None
        if finished:
            measured = measure(model, features, batch_size=settings.batch_size, device=device, stop=stop.is_set)
    if measured is None:
        return TrainingResult(adam.steps, True, logger.last)
    return TrainingResult(adam.steps, False, measured[0])


def _training_row(state: _State, result: StepResult, x: Tensor, epoch: int) -> dict[str, float]:
    """A row of the log, from a step on transformed inputs x (B x D)."""
    variance = RunningVariance()
    variance.add(x)
    l2 = float(result.l2)
    dead, almost_dead = count_dead(state.fired, state.window_items)
    return {
        "epoch": epoch,
        "loss": float(result.loss),
        "l2_loss": l2,
        "l1_loss": float(result.penalty),
        "l0": float(result.fired.sum()) / len(x),
        "explained_variance": explained_variance(l2 * x.numel(), variance.total),
        "dead": dead,
        "almost_dead": almost_dead,
    }


@torch.no_grad()
def _fit_centre(model: SparseAutoencoder, features: Features, settings: TrainingSettings) -> None:
    generator = np.random.default_rng([settings.seed, 0, 2])
    sample = generator.choice(len(features), size=min(CENTRE_SAMPLE, len(features)), replace=False)
    batches = in_batches(features, np.sort(sample), settings.batch_size, name=lambda i: f"centring, batch {i}")
    model.input_centre.copy_(geometric_median(torch.cat(list(batches))))
