"""The training loop: schedule, logging, checkpoints, and a state that survives being killed."""

import csv
import io
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sparse_autoencoder.checkpoint import read_safetensors
from sparse_autoencoder.data import Features, as_features, checksum, epoch_order, geometric_median, in_batches, resident
from sparse_autoencoder.errors import CheckpointError, NonFiniteError
from sparse_autoencoder.files import write_safetensors, written_whole
from sparse_autoencoder.losses import RunningVariance, explained_variance
from sparse_autoencoder.metrics import count_dead, measure
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.plotting import draw_training
from sparse_autoencoder.resampler import is_resampling_epoch, resample
from sparse_autoencoder.sparsity import BatchTopK, ReLU, TopK, code_of, sparsity_to_json
from sparse_autoencoder.stepper import Stepper
from sparse_autoencoder.steps import StepResult
from sparse_autoencoder.workers import Workers

messages = logging.getLogger(__name__)

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
    lr_warmup_steps: int = 0
    """Steps over which the learning rate rises from 0, linearly."""
    lr_decay_steps: int = 0
    """Steps at the end over which it falls to 0, linearly."""
    bf16: bool = False
    """Matrix products in bfloat16 (autocast), for GPUs; on a CPU it rules out the sparse step."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "resample_dataset_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("resample_freq", "val_freq", "ckpt_freq", "seed", "lr", "adam_epsilon", "adam_weight_decay"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("lr_warmup_steps", "lr_decay_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        for name in ("adam_beta_1", "adam_beta_2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must lie in [0, 1), not {getattr(self, name)}")


def learning_rate(settings: TrainingSettings, step: int, total_steps: int) -> float:
    """The learning rate of step `step` (from 0) of total_steps: `lr`, but for the warm-up and the decay if there are."""
    warmup = min(1.0, (step + 1) / settings.lr_warmup_steps) if settings.lr_warmup_steps else 1.0
    decay = min(1.0, (total_steps - step) / settings.lr_decay_steps) if settings.lr_decay_steps else 1.0
    return settings.lr * warmup * decay


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

    def __init__(self, model: SparseAutoencoder, adam: Adam, stepper: Stepper) -> None:
        self.model = model
        self.adam = adam
        self.stepper = stepper
        self.items_seen = 0
        self.window_items = 0
        self.resampled_after = -1
        """The epoch after which dead latents were last restarted."""
        device = model.tied_bias.device
        self.fired = torch.zeros(model.n_latents, dtype=torch.int64, device=device)
        """How often each latent was active since the last resampling, over window_items items."""
        self.unfired = torch.zeros(model.n_latents, dtype=torch.int64, device=device)
        """How many items ago each latent was last active, in whole batches."""

    def count(self, result: StepResult, n_items: int) -> None:
        self.items_seen += n_items
        self.window_items += n_items
        self.fired += result.fired
        self.unfired = torch.where(result.fired > 0, 0, self.unfired + n_items)

    def start_window(self, epoch: int) -> None:
        self.resampled_after = epoch
        self.window_items = 0
        self.fired.zero_()

    def dead(self) -> Tensor | None:
        """The latents (int64) that AuxK is to revive; None for a variant without."""
        code = code_of(self.model.sparsity)
        return (self.unfired >= code.dead_after).nonzero().flatten() if isinstance(code, TopK | BatchTopK) else None

    def tensors(self) -> dict[str, Tensor]:
        return {
            **{f"model.{name}": tensor for name, tensor in self.model.state_dict().items()},
            **{f"adam.{name}": tensor for name, tensor in self.adam.moments.items()},
            "fired": self.fired,
            "unfired": self.unfired,
        }

    def save(self, path: Path, run: dict[str, object]) -> None:
        """Writes the state, whole or not at all.

        Raises:
            NonFiniteError: a parameter or moment is NaN or infinite; what was saved before stays.
        """
        tensors = self.tensors()
        bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise NonFiniteError(f"step {self.adam.steps}: {', '.join(bad)} hold NaN or infinity")
        counters = {
            "steps": self.adam.steps,
            "items_seen": self.items_seen,
            "window_items": self.window_items,
            "resampled_after": self.resampled_after,
            "density": self.stepper.density,
        }
        write_safetensors(tensors, path, {"run": json.dumps(run), "counters": json.dumps(counters)})

    def load(self, path: Path, run: dict[str, object]) -> None:
        """Takes the place that a saved state holds.

        Raises:
            CheckpointError: it is damaged, or of a run that differs in `run`; the message names every difference.
        """
        saved, header = read_safetensors(path)
        try:
            saved_run, counters = json.loads(header["run"]), json.loads(header["counters"])
            steps, items_seen, window = (int(counters[name]) for name in ("steps", "items_seen", "window_items"))
            resampled_after, density = int(counters["resampled_after"]), float(counters["density"])
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
        self.resampled_after = resampled_after
        self.stepper.density = density


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
    "learning_rate",
    "sparse_step",
    "val_loss",
    "val_l2_loss",
    "val_l1_loss",
    "val_l0",
    "val_explained_variance",
)


class _Log:
    """The CSV file, the caller's function and the progress bar: one row for all three."""

    def __init__(
        self,
        path: Path | None,
        function: Callable[[dict[str, float], int], None] | None,
        bar: "tqdm[None]",
        state: _State,
    ) -> None:
        self.path = path
        self.function = function
        self.bar = bar
        self.last: dict[str, float] = {}
        self.rows: list[dict[str, float]] = []
        self.time = time.monotonic()
        self.items = state.items_seen
        if path is not None:
            rows = _rows_until(path, state.adam.steps) if state.adam.steps else []
            self.rows = [
                {name: float(value) for name, value in zip(LOG_COLUMNS, row, strict=True) if value} for row in rows
            ]
            with written_whole(path) as partial, open(partial, "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(LOG_COLUMNS)
                writer.writerows(rows)

    def training_row(self, state: _State, result: StepResult, x: Tensor, epoch: int) -> dict[str, float]:
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
            "items_per_second": (state.items_seen - self.items) / max(time.monotonic() - self.time, 1e-9),
            "learning_rate": state.adam.lr,
            "sparse_step": float(bool(state.stepper.was_sparse)),
        }

    def write(self, row: dict[str, float], step: int, items_seen: int) -> None:
        self.last, self.time, self.items = row, time.monotonic(), items_seen
        self.rows.append({"step": step, **row})
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
    figure_path: Path | None = None,
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
        figure_path: where to draw the curves and the feature-density histogram at the end (.png, .pdf or .svg), if
            matplotlib is installed.
        device: where to train; the model is moved there.
        progress: whether to show a bar.

    Raises:
        NonFiniteError: the features or the loss are NaN or infinite. The state on the disk is from before.
        CheckpointError: the state at `state_path` is damaged or of another run.
        ValueError: there are no items, or they are not D wide.
    """
    device = torch.device(device)
    features = as_features(data)
    held_out = as_features(validation) if validation is not None else None
    model.to(device)
    adam = Adam(
        model,
        lr=settings.lr,
        betas=(settings.adam_beta_1, settings.adam_beta_2),
        epsilon=settings.adam_epsilon,
        weight_decay=settings.adam_weight_decay,
    )
    run: dict[str, object] = {
        "n_items": len(features),
        "features": checksum(features) if state_path is not None else "",
        "n_inputs": model.n_inputs,
        "n_latents": model.n_latents,
        "sparsity": sparsity_to_json(model.sparsity),
        "input_transform": model.input_transform,
        **{name: value for name, value in asdict(settings).items() if name not in NOT_IN_THE_RESULT},
    }
    with ExitStack() as stack:
        stepper = Stepper(model, adam, bf16=settings.bf16)
        stack.callback(stepper.close)
        state = _State(model, adam, stepper)
        if state_path is not None and state_path.exists():
            state.load(state_path, run)
        elif model.input_transform == "centre":
            _fit_centre(model, features, settings)
        features = resident(features, device, settings.batch_size)
        reader = Workers(1)
        stack.callback(reader.close)
        steps_per_epoch = -(-len(features) // settings.batch_size)
        total_steps = settings.epochs * steps_per_epoch
        stop = stack.enter_context(_sigterm())
        bar = stack.enter_context(
            tqdm(total=total_steps, initial=adam.steps, disable=not progress, unit="step", smoothing=0.05)
        )
        logger = _Log(log_path, log, bar, state)
        losses = _LossCheck(adam, device)
        last_save = time.monotonic()

        def save() -> None:
            losses.check()
            if state_path is not None:
                state.save(state_path, run)

        def measure_all(features: Features) -> tuple[dict[str, float], Tensor] | None:
            return measure(
                model,
                features,
                batch_size=settings.batch_size,
                device=device,
                losses=stepper.losses,
                reader=reader,
                stop=stop.is_set,
            )

        def resample_after(epoch: int) -> None:
            """Once, if it is due after that epoch; not if SIGTERM arrives, whereupon a resumed run does it first."""
            due = isinstance(model.sparsity, ReLU) and is_resampling_epoch(
                epoch, settings.resample_freq, settings.epochs
            )
            if not due or state.resampled_after == epoch:
                return
            restarted = resample(
                model,
                adam,
                features,
                state.fired,
                losses=stepper.losses,
                dataset_size=settings.resample_dataset_size,
                batch_size=settings.batch_size,
                generator=np.random.default_rng([settings.seed, epoch, 1]),
                reader=reader,
                stop=stop.is_set,
            )
            if restarted is not None:
                messages.info("step %d: restarted %d dead latents", adam.steps, len(restarted))
                state.start_window(epoch)

        if adam.steps > 0 and adam.steps % steps_per_epoch == 0:
            resample_after(adam.steps // steps_per_epoch - 1)
        while adam.steps < total_steps and not stop.is_set():
            epoch, first = divmod(adam.steps, steps_per_epoch)
            batches = in_batches(
                features,
                epoch_order(len(features), settings.seed, epoch),
                settings.batch_size,
                first=first,
                name=lambda batch, before=epoch * steps_per_epoch: f"step {before + batch + 1}",  # type: ignore[misc]
                reader=reader,
            )
            for batch in batches:
                x, _ = model.transform(batch.to(device, non_blocking=True))
                adam.lr = learning_rate(settings, adam.steps, total_steps)
                result = stepper(x, state.dead())
                losses.add(result.loss)
                state.count(result, len(x))
                bar.update()

                step = adam.steps
                end_of_epoch = step % steps_per_epoch == 0
                validate = held_out is not None and end_of_epoch and settings.val_freq > 0
                validate = validate and (epoch + 1) % settings.val_freq == 0
                row = None
                if step % settings.log_every == 0 or validate or step == total_steps:
                    losses.check()
                    row = logger.training_row(state, result, x, epoch)
                if end_of_epoch:
                    resample_after(epoch)
                if row is not None:
                    if validate:
                        assert held_out is not None
                        measured = measure_all(held_out)
                        row.update({f"val_{name}": value for name, value in (measured[0] if measured else {}).items()})
                    logger.write(row, step, state.items_seen)
                if on_checkpoint is not None and settings.ckpt_freq > 0:
                    before = (state.items_seen - len(x)) // settings.ckpt_freq
                    if before != state.items_seen // settings.ckpt_freq:
                        losses.check()
                        on_checkpoint(model, state.items_seen)
                if stop.is_set():
                    break
                if time.monotonic() - last_save >= state_every:
                    save()
                    last_save = time.monotonic()
        save()
        measured = None
        if adam.steps == total_steps:
            measured = measure_all(features)
        if measured is None:
            saved = f"its state is in {state_path}" if state_path is not None else "without a state to continue from"
            messages.warning("SIGTERM: training stopped after step %d of %d, %s", adam.steps, total_steps, saved)
            return TrainingResult(adam.steps, True, logger.last)
        metrics, fired = measured
        if figure_path is not None:
            try:
                draw_training(logger.rows, fired.numpy() / len(features), figure_path)
            except ImportError:
                messages.warning("no %s: matplotlib is not installed", figure_path)
        return TrainingResult(adam.steps, False, metrics)


class _LossCheck:
    """Stops at the first step whose loss is not finite.

    On the CPU at once; elsewhere when `check` is called, before anything is logged or saved, so that the device need not
    be waited for at every step.
    """

    def __init__(self, adam: Adam, device: torch.device) -> None:
        self.adam = adam
        self.at_once = device.type == "cpu"
        self.pending: list[Tensor] = []

    def add(self, loss: Tensor) -> None:
        self.pending.append(loss)
        if self.at_once:
            self.check()

    def check(self) -> None:
        if not self.pending:
            return
        losses = torch.stack(self.pending).cpu()
        first = self.adam.steps - len(losses) + 1
        self.pending.clear()
        bad = (~torch.isfinite(losses)).nonzero()
        if len(bad):
            i = int(bad[0])
            raise NonFiniteError(f"step {first + i}: the loss is {float(losses[i])}")


@torch.no_grad()
def _fit_centre(model: SparseAutoencoder, features: Features, settings: TrainingSettings) -> None:
    generator = np.random.default_rng([settings.seed, 0, 2])
    sample = generator.choice(len(features), size=min(CENTRE_SAMPLE, len(features)), replace=False)
    batches = in_batches(features, np.sort(sample), settings.batch_size, name=lambda i: f"centring, batch {i}")
    model.input_centre.copy_(geometric_median(torch.cat(list(batches))))
