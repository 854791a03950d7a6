"""The training loop: schedule, log, checkpoints, and a state from which a killed run resumes."""

import csv
import json
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sparse_autoencoder.checkpoint import read_safetensors
from sparse_autoencoder.data import Features, as_features, checksum, epoch_order, geometric_median, in_batches, resident
from sparse_autoencoder.declare import check, identity, setting
from sparse_autoencoder.errors import CheckpointError, NonFiniteError
from sparse_autoencoder.files import whole_file, write_safetensors
from sparse_autoencoder.losses import RunningVariance, explained_variance
from sparse_autoencoder.metrics import count_dead, measure
from sparse_autoencoder.model import DEFAULT_SEED, SparseAutoencoder
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.plotting import draw_training
from sparse_autoencoder.resampler import is_resampling_epoch, resample
from sparse_autoencoder.stepper import Stepper
from sparse_autoencoder.steps import StepResult
from sparse_autoencoder.variants import sparsity_to_json
from sparse_autoencoder.workers import Workers

messages = logging.getLogger(__name__)

SEED_HELP = f"seed of the SAE and the probe; part of their names when not {DEFAULT_SEED}"
CENTRE_SAMPLE = 100_000  # the geometric median is taken of at most this many random items


@dataclass(frozen=True)
class TrainingSettings:
    """The training schedule. The defaults are DN-CBM's. Raises ValueError, naming the field, if a value is not allowed."""

    epochs: int = setting(200, "epochs of the SAE", flag="num_epochs", least=1, in_name="_epo{}", place=7)
    batch_size: int = setting(4096, "batch size of the SAE", flag="train_sae_bs", least=1, in_name="_bs{}", place=6)
    lr: float = setting(5e-4, "learning rate of the SAE", above=0, in_name="_lr{}", place=1)
    adam_beta_1: float = setting(0.9, "decay rate of Adam's first moment", least=0, below=1)
    adam_beta_2: float = setting(0.999, "decay rate of Adam's second moment", least=0, below=1)
    adam_epsilon: float = setting(1e-8, "term that Adam adds to the denominator", above=0)
    adam_weight_decay: float = setting(0.0, "L2 penalty that Adam adds to the gradient", least=0)
    resample_freq: int = setting(10, "epochs between resamplings of dead latents; 0: never", least=0, in_name="_rf{}", place=4)
    resample_dataset_size: int = setting(819_200, "items whose losses decide where dead latents restart", least=1)
    val_freq: int = setting(1, "epochs between validations of the SAE; 0: never", least=0, identifies="never")
    ckpt_freq: int = setting(
        0, "training items between checkpoints of the SAE; 0: only the final one", least=0, identifies="never"
    )
    seed: int = setting(DEFAULT_SEED, SEED_HELP, least=0, in_name="_seed{}", place=9, name_default=False)
    log_every: int = setting(100, "steps between rows of the training log", least=1, identifies="never")
    lr_warmup_steps: int = setting(0, "steps over which the learning rate rises from 0, linearly", least=0)
    lr_decay_steps: int = setting(0, "final steps over which the learning rate falls to 0, linearly", least=0)
    bf16: bool = setting(False, "matrix products in bfloat16, for GPUs")

    def __post_init__(self) -> None:
        check(self)


def learning_rate(settings: TrainingSettings, step: int, total_steps: int) -> float:
    """The learning rate of step `step` (from 0) of `total_steps`."""
    warmup = min(1.0, (step + 1) / settings.lr_warmup_steps) if settings.lr_warmup_steps else 1.0
    decay = min(1.0, (total_steps - step) / settings.lr_decay_steps) if settings.lr_decay_steps else 1.0
    return settings.lr * warmup * decay


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of training."""

    steps: int
    """Optimiser steps made in total, including those before the run resumed."""
    stopped_early: bool
    """Whether SIGTERM stopped the run. The state is saved if there is a `state_path`."""
    metrics: dict[str, float]
    """`evaluate` of the final model over the training features; after an early stop, the last row logged."""


class _State:
    """Everything that the next step depends on, apart from settings and data."""

    COUNTERS = ("items_seen", "window_items", "resampled_after")

    def __init__(self, model: SparseAutoencoder, adam: Adam, stepper: Stepper) -> None:
        self.model, self.adam, self.stepper = model, adam, stepper
        self.items_seen = self.window_items = 0
        self.resampled_after = -1  # the epoch after which dead latents were last resampled; -1: none yet
        device = model.tied_bias.device
        self.fired = torch.zeros(model.n_latents, dtype=torch.int64, device=device)
        """How often each latent was active in the `window_items` items since the last resampling."""
        self.unfired = torch.zeros(model.n_latents, dtype=torch.int64, device=device)
        """Items since each latent was last active, in whole batches."""

    def count(self, result: StepResult, n_items: int) -> None:
        self.items_seen += n_items
        self.window_items += n_items
        self.fired += result.fired
        self.unfired = torch.where(result.fired > 0, 0, self.unfired + n_items)

    def start_window(self, epoch: int) -> None:
        self.resampled_after = epoch
        self.window_items = 0
        self.fired.zero_()

    def tensors(self) -> dict[str, Tensor]:
        return {
            **{f"model.{name}": tensor for name, tensor in self.model.state_dict().items()},
            **{f"adam.{name}": tensor for name, tensor in self.adam.moments.items()},
            "fired": self.fired,
            "unfired": self.unfired,
        }

    def save(self, path: Path, run: dict[str, object]) -> None:
        """Writes the state, whole or not at all.
        Raises NonFiniteError if a parameter or moment is NaN or infinite. The previous state stays."""
        tensors = self.tensors()
        bad = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
        if bad:
            raise NonFiniteError(f"step {self.adam.steps}: {', '.join(bad)} hold NaN or infinity")
        own = {name: getattr(self, name) for name in self.COUNTERS}
        counters = {"steps": self.adam.steps, **own, "density": self.stepper.density}
        write_safetensors(tensors, path, {"run": json.dumps(run), "counters": json.dumps(counters)})

    def load(self, path: Path, run: dict[str, object]) -> None:
        """Restores a saved state. Raises CheckpointError if the state is damaged, or its run differs from `run`; the message
        names every difference."""
        saved, header = read_safetensors(path)
        try:
            saved_run, counters = json.loads(header["run"]), json.loads(header["counters"])
            own_counters = {name: int(counters[name]) for name in self.COUNTERS}
            steps, density = int(counters["steps"]), float(counters["density"])
        except (KeyError, ValueError, TypeError) as error:
            raise CheckpointError(f"{path}: not a training state ({error})") from error
        differences = [
            f"{name} is {run.get(name)} now, {saved_run.get(name)} there"
            for name in sorted({*run, *saved_run})
            if run.get(name) != saved_run.get(name)
        ]
        if differences:
            raise CheckpointError(
                f"{path}: this training state belongs to another run ({'; '.join(differences)}); use its settings to"
                " resume it, or delete it to start from scratch"
            )
        own = self.tensors()
        wrong = sorted(own.keys() ^ saved.keys())
        wrong += [name for name in own if name in saved and own[name].shape != saved[name].shape]
        if wrong:
            raise CheckpointError(f"{path}: not a training state of this model (wrong tensors: {', '.join(wrong)})")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        self.adam.steps, self.stepper.density = steps, density
        for name, value in own_counters.items():
            setattr(self, name, value)


_MEASURES = ("loss", "l2_loss", "l1_loss", "l0", "explained_variance")
_COUNTS = ("dead", "almost_dead", "items_per_second", "learning_rate", "sparse_step")
LOG_COLUMNS = ("step", "epoch", *_MEASURES, *_COUNTS, *(f"val_{name}" for name in _MEASURES))


class _Log:
    """Sends each row to the CSV file, the caller's function and the progress bar."""

    def __init__(
        self, path: Path | None, function: Callable[[dict[str, float], int], None] | None, bar: "tqdm[None]", state: _State
    ) -> None:
        self.path, self.function, self.bar = path, function, bar
        self.last: dict[str, float] = {}
        self.rows: list[dict[str, float]] = []
        self.time, self.items = time.monotonic(), state.items_seen
        if path is not None:
            rows = _rows_until(path, state.adam.steps) if state.adam.steps else []
            self.rows = [{name: float(value) for name, value in zip(LOG_COLUMNS, row, strict=True) if value} for row in rows]
            with whole_file(path) as temporary, open(temporary, "w", newline="") as file:
                writer = csv.writer(file)
                writer.writerow(LOG_COLUMNS)
                writer.writerows(rows)

    def training_row(self, state: _State, result: StepResult, x: Tensor, epoch: int) -> dict[str, float]:
        """The row of a step on transformed inputs x (B x D)."""
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
            values = (f"{row[name]:.8g}" if name in row else "" for name in LOG_COLUMNS[1:])
            with open(self.path, "a", newline="") as file:
                csv.writer(file).writerow([step, *values])
        if self.function is not None:
            self.function(row, step)
        self.bar.set_postfix({name: row[name] for name in ("loss", "l2_loss", "l1_loss", "l0", "dead")})


def _rows_until(path: Path, steps: int) -> list[list[str]]:
    """The complete rows of an earlier log up to a step: a killed run may have logged steps after its last state."""
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        rows = list(csv.reader(file))
    if not rows or rows[0] != list(LOG_COLUMNS):
        return []
    return [row for row in rows[1:] if len(row) == len(LOG_COLUMNS) and row[0].isdigit() and int(row[0]) <= steps]


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets instead of ending the process. In threads other than the main one it is never set."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
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

    The order of an epoch and the draws of a resampling depend only on the seed and the epoch. A run that was stopped and
    resumed therefore ends with the same bits as an uninterrupted one, given the same machine and number of threads.

    Args:
        model: a model of D inputs. With the transform "centre", its centre is first fitted to the data.
        data: Features, or a tensor (N x D).
        settings: the schedule.
        validation: features whose mean losses are logged every `val_freq` epochs.
        state_path: a safetensors file for the state of the run, written every `state_every` seconds, on SIGTERM and
            at the end. If it exists at the start, training resumes from it.
        state_every: seconds between writes of the state.
        on_checkpoint: called with the model and the number of items seen, every `ckpt_freq` items.
        log: called with each row of the log and its step: every `log_every` steps and after each validation.
        log_path: a CSV file for the same rows (training_log.csv).
        figure_path: where to draw the curves and the feature-density histogram at the end (.png, .pdf or .svg), if
            matplotlib is installed.
        device: where to train; the model is moved there.
        progress: whether to show a progress bar.

    Raises:
        NonFiniteError: the features or the loss are NaN or infinite. The state on disk is the last good one.
        CheckpointError: the state at `state_path` is damaged or belongs to another run.
        ValueError: the data has no items, or its items are not D wide.
    """
    device = torch.device(device)
    features = as_features(data)
    held_out = as_features(validation) if validation is not None else None
    model.to(device)
    betas = (settings.adam_beta_1, settings.adam_beta_2)
    adam = Adam(model, lr=settings.lr, betas=betas, epsilon=settings.adam_epsilon, weight_decay=settings.adam_weight_decay)
    run: dict[str, object] = {
        "n_items": len(features),
        "features": checksum(features) if state_path is not None else "",
        "n_inputs": model.n_inputs,
        "n_latents": model.n_latents,
        "sparsity": sparsity_to_json(model.sparsity),
        "input_transform": model.input_transform,
        **identity(settings),
    }
    with ExitStack() as stack:
        stepper = Stepper(model, adam, bf16=settings.bf16)
        stack.callback(stepper.close)
        state = _State(model, adam, stepper)
        if state_path is not None and state_path.exists():
            state.load(state_path, run)
        elif model.input_transform == "centre":
            _fit_centre(model, features, settings)
        batch_size = settings.batch_size
        features = resident(features, device, batch_size)
        reader = Workers(1)
        stack.callback(reader.close)
        steps_per_epoch = -(-len(features) // batch_size)
        total_steps = settings.epochs * steps_per_epoch
        stop = stack.enter_context(_sigterm())
        bar = tqdm(total=total_steps, initial=adam.steps, disable=not progress, unit="step", smoothing=0.05)
        stack.callback(bar.close)
        logger = _Log(log_path, log, bar, state)
        losses = _LossCheck(adam, device)
        last_save = time.monotonic()

        def save() -> None:
            losses.check()
            if state_path is not None:
                state.save(state_path, run)

        measure_all = partial(
            measure, model, batch_size=batch_size, device=device, losses=stepper.losses, reader=reader, stop=stop.is_set
        )

        def resample_after(epoch: int) -> None:
            """Resamples once if due after this epoch. If SIGTERM stops it, the resumed run starts with it."""
            due = is_resampling_epoch(epoch, settings.resample_freq, settings.epochs)
            if not model.sparsity.resamples or not due or state.resampled_after == epoch:
                return
            restarted = resample(
                model,
                adam,
                features,
                state.fired,
                losses=stepper.losses,
                dataset_size=settings.resample_dataset_size,
                batch_size=batch_size,
                generator=np.random.default_rng([settings.seed, epoch, 1]),
                reader=reader,
                stop=stop.is_set,
            )
            if restarted is not None:
                messages.info("step %d: resampled %d dead latents", adam.steps, len(restarted))
                state.start_window(epoch)

        if adam.steps > 0 and adam.steps % steps_per_epoch == 0:
            resample_after(adam.steps // steps_per_epoch - 1)
        while adam.steps < total_steps and not stop.is_set():
            epoch, first = divmod(adam.steps, steps_per_epoch)
            order = epoch_order(len(features), settings.seed, epoch)

            def step_name(batch: int, before: int = epoch * steps_per_epoch) -> str:
                return f"step {before + batch + 1}"

            for batch in in_batches(features, order, batch_size, first=first, name=step_name, reader=reader):
                x, _ = model.transform(batch.to(device, non_blocking=True))
                adam.lr = learning_rate(settings, adam.steps, total_steps)
                result = stepper(x, model.sparsity.code.dead(state.unfired))
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
        measured = measure_all(features) if adam.steps == total_steps else None
        if measured is None:
            saved = f"saved its state in {state_path}" if state_path is not None else "saved no state to resume from"
            messages.warning("SIGTERM: training stopped after step %d of %d and %s", adam.steps, total_steps, saved)
            return TrainingResult(adam.steps, True, logger.last)
        metrics, fired = measured
        if figure_path is not None:
            try:
                draw_training(logger.rows, fired.numpy() / len(features), figure_path)
            except ImportError:
                messages.warning("did not draw %s: matplotlib is not installed", figure_path)
        return TrainingResult(adam.steps, False, metrics)


class _LossCheck:
    """Stops training at the first step whose loss is not finite.

    On the CPU it checks every step. On other devices, where reading a loss waits for the device, it checks when `check` is
    called, before anything is logged or saved.
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
