"""The training loop: schedule, log, checkpoints, and a state from which a killed run resumes."""

import csv
import json
import logging
import math
import signal
import time
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sparse_autoencoder.advice import advice_after, advice_before
from sparse_autoencoder.checkpoint import read_safetensors
from sparse_autoencoder.data import (
    Features,
    OwnItems,
    as_features,
    checksum,
    epoch_order,
    geometric_median,
    group_size,
    in_batches,
    part_of,
    resident,
    shuffle_of,
)
from sparse_autoencoder.declare import identity
from sparse_autoencoder.errors import CheckpointError, NonFiniteError
from sparse_autoencoder.files import whole_file, write_safetensors
from sparse_autoencoder.losses import ExtraLoss, RunningVariance, explained_variance
from sparse_autoencoder.metrics import count_dead, measure
from sparse_autoencoder.model import SparseAutoencoder
from sparse_autoencoder.optimizer import Adam
from sparse_autoencoder.parallel import ALONE, Part, Processes
from sparse_autoencoder.plotting import draw_training
from sparse_autoencoder.resampler import resample
from sparse_autoencoder.settings import SHARDS_ABOVE, TrainingSettings, in_todays_words, is_resampling_epoch, learning_rate
from sparse_autoencoder.signals import stopping
from sparse_autoencoder.stepper import LOOK_EVERY, Stepper
from sparse_autoencoder.steps import StepResult, matmul_precision
from sparse_autoencoder.variants import sparsity_to_json
from sparse_autoencoder.workers import Workers

messages = logging.getLogger(__name__)

UNKNOWN = 2**62  # more than any number of items
CENTRE_SAMPLE = 100_000  # the geometric median is taken of at most this many random items


@dataclass(frozen=True)
class TrainingResult:
    """The outcome of training."""

    steps: int
    """Optimiser steps made in total, including those before the run resumed."""
    metrics: dict[str, float]
    """`evaluate` of the final model over the training features; after an early stop, the last row logged."""
    validation: dict[str, float] | None = None
    """`evaluate` of the final model over the validation features, if there are any; None after an early stop."""
    stopped_by: signal.Signals | None = None
    """SIGTERM or SIGINT, if it stopped the run. The state is saved if there is a `state_path`."""
    firing_rates: np.ndarray | None = field(default=None, repr=False, compare=False)
    """Share of the training features that activate each latent of the final model, F float64; None after an early stop."""

    @property
    def stopped_early(self) -> bool:
        """Whether a signal stopped the run."""
        return self.stopped_by is not None


class _State:
    """Everything that the next step depends on, apart from settings and data."""

    COUNTERS = ("items_seen", "window_items", "resampled_after", "longest")

    def __init__(self, model: SparseAutoencoder, adam: Adam, stepper: Stepper, batch_size: int) -> None:
        self.model, self.adam, self.stepper = model, adam, stepper
        self.items_seen = self.window_items = 0
        self.resampled_after = -1  # the epoch after which dead latents were last resampled; -1: none yet
        device = model.tied_bias.device
        self.fired = torch.zeros(model.n_latents, dtype=torch.int64, device=device)
        """How often each latent was active in the `window_items` items since the last resampling."""
        self.unfired = torch.zeros(model.n_latents, dtype=torch.int64, device=device)
        """Items since each latent was last active, in whole batches."""
        self.batch_size = batch_size
        self.longest = LOOK_EVERY * batch_size
        """No latent will have been inactive for more items before the next look at `unfired`."""

    def count(self, result: StepResult, n_items: int) -> None:
        self.items_seen += n_items
        self.window_items += n_items
        self.fired += result.fired
        self.unfired = torch.where(result.fired > 0, 0, self.unfired + n_items)
        if self.adam.steps % LOOK_EVERY == 0:
            self.longest = int(self.unfired.max()) + LOOK_EVERY * self.batch_size

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
        header = {"run": json.dumps(run), "counters": json.dumps(counters)}
        copies = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        write_safetensors(copies, path, header | {"checksum": _checksum(copies, header)})

    def load(self, path: Path, run: dict[str, object]) -> None:
        """Restores a saved state. Raises CheckpointError if the state is damaged, or its run differs from `run`; the message
        names every difference."""
        restart = "delete it to start from scratch"
        try:
            saved, header = read_safetensors(path)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; {restart}") from error
        try:
            saved_run, counters = in_todays_words(dict(json.loads(header["run"]))), json.loads(header["counters"])
            checksum = header["checksum"]
            counters.setdefault("longest", UNKNOWN)  # of versions that did not keep it
            own_counters = {name: int(counters[name]) for name in self.COUNTERS}
            steps, density = int(counters["steps"]), float(counters["density"])
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise CheckpointError(f"{path}: not a training state; {restart}") from error
        if checksum != _checksum(saved, header):
            raise CheckpointError(f"{path}: this training state is damaged (its checksum is wrong); {restart}")
        differences = [
            f"{name} is {run.get(name, 'the default')} now, {saved_run.get(name, 'the default')} there"
            for name in sorted({*run, *saved_run})
            if run.get(name) != saved_run.get(name)
        ]
        if differences:
            raise CheckpointError(
                f"{path}: this training state belongs to another run ({'; '.join(differences)}); use its settings to"
                f" resume it, or {restart}"
            )
        own = self.tensors()
        wrong = sorted(own.keys() ^ saved.keys())
        wrong += [name for name in own if name in saved and not _fits(saved[name], own[name])]
        if wrong:
            raise CheckpointError(f"{path}: not a training state of this model (wrong tensors: {', '.join(wrong)}); {restart}")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        self.adam.steps, self.stepper.density = steps, density
        for name, value in own_counters.items():
            setattr(self, name, value)


def _fits(saved: Tensor, own: Tensor) -> bool:
    """Whether a saved tensor can take the place of one of the run's."""
    return saved.shape == own.shape and saved.dtype == own.dtype and bool(torch.isfinite(saved).all())


def _checksum(tensors: dict[str, Tensor], header: dict[str, str]) -> str:
    """The CRC-32 of a state's tensors and of what its header says: no bit of them may change without notice."""
    found = zlib.crc32((header["run"] + header["counters"]).encode())
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(name.encode(), found))
    return f"{found:08x}"


_MEASURES = ("loss", "l2_loss", "l1_loss", "l0", "explained_variance")
_COUNTS = ("dead", "almost_dead", "items_per_second", "learning_rate", "sparse_step", "resampled")
_WHOLE = tuple(f"{part}_{name}" for part in ("val", "train") for name in (*_MEASURES, "dead_fraction"))
LOG_COLUMNS = ("step", "epoch", *_MEASURES, *_COUNTS, *_WHOLE)


class _Log:
    """Sends each row to the CSV file, the caller's function and the progress bar."""

    def __init__(
        self, path: Path | None, function: Callable[[dict[str, Any], int], None] | None, bar: "tqdm[None]", state: _State
    ) -> None:
        self.path, self.function, self.bar = path, function, bar
        self.last: dict[str, float] = {}
        self.rows = _rows_until(path, state.adam.steps) if path is not None and state.adam.steps else []
        self.time, self.items = time.monotonic(), state.items_seen
        self._write_all()

    def training_row(
        self, state: _State, result: StepResult, x: Tensor, epoch: int, n_items: int, across: Processes
    ) -> dict[str, float]:
        """The row of a step on transformed inputs x, this process's part of a batch of n_items."""
        own_variance = RunningVariance()
        own_variance.add(x)
        variance = own_variance.merged(x.shape[1], across)
        l2 = float(result.l2)
        dead, almost_dead = count_dead(state.fired, state.window_items)
        return {
            "epoch": epoch,
            "loss": float(result.loss),
            "l2_loss": l2,
            "l1_loss": float(result.penalty),
            "l0": float(result.fired.sum()) / n_items,
            "explained_variance": explained_variance(l2 * n_items * x.shape[1], variance),
            "dead": dead,
            "almost_dead": almost_dead,
            "items_per_second": (state.items_seen - self.items) / max(time.monotonic() - self.time, 1e-9),
            "learning_rate": state.adam.lr,
            "sparse_step": float(bool(state.stepper.was_sparse)),
        }

    def write(self, row: dict[str, float], step: int, items_seen: int, density: np.ndarray | None) -> None:
        """Adds a row. `density` (F) is the share of the step's items that activate each latent; None: `finish` follows."""
        self.last, self.time, self.items = row, time.monotonic(), items_seen
        self.rows.append({"step": step, **row})
        if self.path is not None:
            with open(self.path, "a", newline="") as file:
                csv.writer(file).writerow(_line(self.rows[-1]))
        if self.function is not None and density is not None:
            self.function(row | {"feature_density": density}, step)
        self.bar.set_postfix({name: row[name] for name in ("loss", "l2_loss", "l1_loss", "l0", "dead")})

    def finish(self, step: int, epoch: int, whole: dict[str, float], density: np.ndarray) -> None:
        """Adds the final model's figures to the last step's row; a run that was killed just before it may lack that row."""
        if not self.rows or self.rows[-1]["step"] != step:
            self.rows.append({"step": step, "epoch": epoch})
        self.rows[-1].update(whole)
        self._write_all()
        if self.function is not None:
            self.function({**{k: v for k, v in self.rows[-1].items() if k != "step"}, "feature_density": density}, step)

    def _write_all(self) -> None:
        if self.path is None:
            return
        with whole_file(self.path) as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file).writerows([LOG_COLUMNS, *map(_line, self.rows)])


def _line(row: dict[str, float]) -> list[str]:
    return [f"{row[name]:.8g}" if name in row else "" for name in LOG_COLUMNS]


def _rows_until(path: Path, steps: int) -> list[dict[str, float]]:
    """The complete rows of an earlier log up to a step: a killed run may have logged steps after its last state."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            header, *lines = list(csv.reader(file)) or [[]]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, csv.Error):
        header, lines = [], []
    if header != list(LOG_COLUMNS):
        messages.warning("%s is not the log of this run or is damaged: it starts again after step %d", path, steps)
        return []
    rows = []
    for line in lines:
        try:
            row = {name: float(value) for name, value in zip(LOG_COLUMNS, line, strict=True) if value}
        except ValueError:  # a torn row
            continue
        if row.get("step", math.inf) <= steps:
            rows.append(row)
    return rows


def train(
    model: SparseAutoencoder,
    data: Features | Tensor,
    settings: TrainingSettings,
    *,
    validation: Features | Tensor | None = None,
    state_path: Path | None = None,
    state_every: float = 300.0,
    on_checkpoint: Callable[[SparseAutoencoder, int], None] | None = None,
    log: Callable[[dict[str, Any], int], None] | None = None,
    log_path: Path | None = None,
    figure_path: Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    across: Processes = ALONE,
    extra: ExtraLoss | None = None,
) -> TrainingResult:
    """Trains the model in place on N x D features (DN-CBM, section 3.1 and appendix).

    The order of an epoch and the draws of a resampling depend only on the seed, the epoch and the way of shuffling. A run
    that was stopped and resumed therefore ends with the same bits as an uninterrupted one, given the same machine and number
    of threads.

    Args:
        model: a model of D inputs. With the transform "centre", its centre is first fitted to the data.
        data: Features, or a tensor (N x D).
        settings: the schedule.
        validation: features whose mean losses are logged every `val_freq` epochs and at the end.
        state_path: a safetensors file for the state of the run, written every `state_every` seconds, on SIGTERM or
            SIGINT and at the end. If it exists at the start, training resumes from it.
        state_every: seconds between writes of the state.
        on_checkpoint: called with the model and the number of items seen, every `ckpt_freq` items.
        log: called with each row of the log and its step: every `log_every` steps, after each validation and at the end.
            Its `feature_density` (F) is the share of the step's items, at the end of all, that activate each latent.
        log_path: a CSV file for the same rows (training_log.csv).
        figure_path: where to draw the curves and the feature-density histogram at the end (.png, .pdf or .svg), if
            matplotlib is installed.
        device: where to train; the model is moved there.
        progress: whether to show a progress bar.
        across: the processes that train together. All call this with the same arguments, start from the first one's model and
            get the same model and result, those of one process up to rounding. Each reads its own part of the items; the
            first alone writes files, logs and shows progress.
        extra: one more term of the loss of each item. Steps are then dense. The saved state does not say which term it is.

    Raises:
        NonFiniteError: the features or the loss are NaN or infinite. The state on disk is the last good one.
        CheckpointError: the state at `state_path` is damaged or belongs to another run.
        KeyboardInterrupt: Ctrl-C was pressed a second time. The state on disk is the last one saved.
        ValueError: the data has no items, or its items are not D wide.
    """
    device = torch.device(device)
    features = as_features(data)
    held_out = as_features(validation) if validation is not None else None
    if across.rank > 0:
        on_checkpoint = log = log_path = figure_path = None
        progress = False
    warn, say = (messages.warning, messages.info) if across.rank == 0 else (messages.debug, messages.debug)
    if settings.matmul_precision == "high" and device.type != "cuda":
        warn("TF32 needs a CUDA GPU: products stay float32")
    model.to(device)
    betas = (settings.adam_beta_1, settings.adam_beta_2)
    adam = Adam(model, lr=settings.lr, betas=betas, epsilon=settings.adam_epsilon, weight_decay=settings.adam_weight_decay)
    in_groups = shuffle_of(features, model.n_inputs, settings) == "shards"
    group = group_size(settings.batch_size) if in_groups else 0
    if settings.shuffle == "auto" and in_groups:
        say("the features are larger than %d GiB, so an epoch reads them in pieces (shuffle: shards)", SHARDS_ABOVE // 2**30)
    run: dict[str, object] = {
        "n_items": len(features),
        "features": checksum(features) if state_path is not None else "",
        "n_inputs": model.n_inputs,
        "n_latents": model.n_latents,
        "sparsity": sparsity_to_json(model.sparsity),
        "input_transform": model.input_transform,
        **identity(settings),
        "shuffle": "shards" if in_groups else None,  # None: the order of versions that had no such setting
    }
    with ExitStack() as stack:
        stack.enter_context(matmul_precision(settings.matmul_precision, device))
        batch_size = min(settings.batch_size, len(features))
        stepper = Stepper(model, adam, batch_size=batch_size, matmul_precision=settings.matmul_precision, extra=extra)
        stack.callback(stepper.close)
        state = _State(model, adam, stepper, batch_size)
        if state_path is not None and state_path.exists():
            state.load(state_path, run)
        elif model.input_transform == "centre":
            _fit_centre(model, features, settings)
        across.share(model.state_dict().values())
        reader = Workers(1)
        stack.callback(reader.close)
        n_items, own = len(features), across.own(len(features))
        features = resident(_own_items(features, across), device, batch_size, reader)
        held_out = None if held_out is None else resident(_own_items(held_out, across), device, batch_size, reader)
        steps_per_epoch = -(-n_items // batch_size)
        total_steps = settings.epochs * steps_per_epoch
        last_epoch = settings.epochs - 1
        val_epochs, ckpt_items = settings.validation_epochs(n_items), settings.checkpoint_items(n_items)
        shape = {"n_items": n_items, "n_inputs": model.n_inputs, "n_latents": model.n_latents}
        advise = warn if extra is None else messages.debug  # what another term of the loss does, only the caller knows
        for line in advice_before(settings, model.sparsity, validates=held_out is not None, **shape):
            advise(line)
        stop = stack.enter_context(stopping())
        bar = tqdm(total=total_steps, initial=adam.steps, disable=not progress, unit="step", smoothing=0.05)
        stack.callback(bar.close)
        logger = _Log(log_path, log, bar, state)
        losses = _LossCheck(adam, device)
        last_save = time.monotonic()

        def save() -> None:
            losses.check()
            if state_path is not None and across.rank == 0:
                state.save(state_path, run)

        measure_all = partial(
            measure,
            model,
            batch_size=batch_size,
            device=device,
            losses=stepper.losses,
            reader=reader,
            stop=stop,
            across=across,
        )
        last_validation: dict[str, float] | None = None

        def resample_after(epoch: int) -> int | None:
            """Resamples once if due after this epoch, and returns how many latents restart. If a signal stops it, the resumed
            run starts with it."""
            due = is_resampling_epoch(epoch, settings.resample_freq, settings.epochs)
            if not model.sparsity.resamples or not due or state.resampled_after == epoch:
                return None
            losses.check()  # it would spread what is NaN
            restarted = resample(
                model,
                adam,
                features,
                state.fired,
                losses=stepper.losses,
                dataset_size=settings.resample_dataset_size,
                batch_size=batch_size,
                generator=np.random.default_rng([settings.seed, epoch, 1]),
                group=group,
                reader=reader,
                stop=stop,
                across=across,
            )
            if restarted is None:
                return None
            n = len(restarted)
            say("step %d: resampled %d dead latent%s", adam.steps, n, "" if n == 1 else "s")
            state.start_window(epoch)
            return n

        if adam.steps > 0 and adam.steps % steps_per_epoch == 0:
            resample_after(adam.steps // steps_per_epoch - 1)
        while adam.steps < total_steps and not across.agreed(stop()):
            epoch, first = divmod(adam.steps, steps_per_epoch)
            order, bounds = part_of(epoch_order(n_items, settings.seed, epoch, group), batch_size, own)

            def step_name(batch: int, before: int = epoch * steps_per_epoch) -> str:
                return f"step {before + batch + 1}"

            batches = in_batches(
                features,
                order,
                batch_size,
                first=first,
                name=step_name,
                reader=reader,
                device=device,
                group=group,
                bounds=bounds,
            )
            for batch in batches:
                x, _ = model.transform(batch)
                adam.lr = learning_rate(settings, adam.steps, total_steps)
                n = min(batch_size, n_items - adam.steps % steps_per_epoch * batch_size)  # of all processes
                part = Part(n, across) if across.size > 1 else None
                result = stepper(x, model.sparsity.code.dead(state.unfired, state.longest), part)
                losses.add(result.loss)
                state.count(result, n)
                bar.update()

                step = adam.steps
                end_of_epoch = step % steps_per_epoch == 0
                validate = held_out is not None and end_of_epoch and val_epochs > 0 and (epoch + 1) % val_epochs == 0
                row = None
                if step % settings.log_every == 0 or validate or step == total_steps:
                    losses.check()
                    row = logger.training_row(state, result, x, epoch, n, across)
                resampled = resample_after(epoch) if end_of_epoch else None
                if row is not None:
                    if resampled is not None:
                        row["resampled"] = resampled
                    if validate:
                        assert held_out is not None
                        measured = measure_all(held_out)
                        last_validation = measured[0] if measured else None
                        row.update(_named("val", last_validation or {}))
                    final = step == total_steps
                    density = None if final else (result.fired.cpu().double() / n).numpy()
                    logger.write(row, step, state.items_seen, density)
                if on_checkpoint is not None and ckpt_items > 0:
                    before = (state.items_seen - n) // ckpt_items
                    if before != state.items_seen // ckpt_items:
                        losses.check()
                        on_checkpoint(model, state.items_seen)
                if across.agreed(stop()):
                    break
                if time.monotonic() - last_save >= state_every:
                    save()
                    last_save = time.monotonic()
        save()
        measured = validated = None
        if adam.steps == total_steps:
            measured = measure_all(features)
            if held_out is not None and measured is not None:
                ends_validated = val_epochs > 0 and settings.epochs % val_epochs == 0
                validated = (last_validation if ends_validated else None) or (measure_all(held_out) or (None,))[0]
        if measured is None or (held_out is not None and validated is None):
            stopped_by = stop.by or signal.SIGTERM  # it may have reached another process alone
            saved = f"saved its state in {state_path}" if state_path is not None else "saved no state to resume from"
            warn("%s: training stopped after step %d of %d and %s", stopped_by.name, adam.steps, total_steps, saved)
            return TrainingResult(adam.steps, logger.last, stopped_by=stopped_by)
        metrics, fired = measured
        shares = fired.numpy() / n_items
        logger.finish(total_steps, last_epoch, _named("val", validated or {}) | _named("train", metrics), shares)
        if figure_path is not None:
            resamplings = [
                (epoch + 1) * steps_per_epoch
                for epoch in range(settings.epochs if model.sparsity.resamples else 0)
                if is_resampling_epoch(epoch, settings.resample_freq, settings.epochs)
            ]
            try:
                draw_training(logger.rows, shares, figure_path, resamplings)
            except ImportError:
                warn("did not draw %s: matplotlib is not installed", figure_path)
        for line in advice_after(model.sparsity, n_latents=model.n_latents, train=metrics, validation=validated):
            advise(line)
        return TrainingResult(adam.steps, metrics, validated, firing_rates=shares)


def _own_items(features: Features, across: Processes) -> Features:
    return features if across.size == 1 else OwnItems(features, across.own(len(features)))


def _named(part: str, metrics: dict[str, float]) -> dict[str, float]:
    return {f"{part}_{name}": value for name, value in metrics.items()}


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
    model.input_centre.copy_(geometric_median(torch.cat(list(batches)).cpu()))  # mps has no float64
