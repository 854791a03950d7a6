"""How long the steps of a plan take and how much they leave on the disk: rates are measured on this machine and scaled.

Each kind of work runs for a moment in the functions of its stage, on the first images of a data set or on random numbers.
"""

import logging
import math
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from io import StringIO
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from tqdm import tqdm

from dncbm.concepts.strengths import to_csr
from dncbm.concepts.vocabulary import read_words
from dncbm.features.datasets.probe import display_name
from dncbm.features.encoders import Encoder
from dncbm.features.encoding import SMALL_BATCH, encode_shards
from dncbm.features.store import FeatureStore
from dncbm.probe.fit import Keep, fit_probe
from dncbm.probe.model import ProbeData
from dncbm.probe.nec_table import INPUTS
from dncbm.probe.solvers import BATCH, CrossEntropy, Progress, minimise
from dncbm.probe.state import StateFile
from dncbm.probe.zero_shot import default_templates
from dncbm.reproduce import sizes
from dncbm.reproduce.plan import Step
from dncbm.reproduce.sizes import UNKNOWN, Known, loaded
from dncbm.runs import commands
from dncbm.runs.artifacts import shard_files
from dncbm.runs.declarations import Extraction, ProbeRun, SAERun
from dncbm.runs.devices import default_cores, resolve_device
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import making
from dncbm.runs.settings import Settings
from sparse_autoencoder import DEFAULT_SEED, SparseAutoencoder, train
from sparse_autoencoder.declare import build

Way = Callable[[Known, Step], float]
Seconds = Callable[[float], float]
"""Seconds of work on a number of items."""
ACTIVE = 32
"""Active latents per image for which times count where nothing says how many there will be."""
ENOUGH_S, EXTRACTION_S, READ = 0.15, 1.0, 3
"""Seconds after which work counts as measured, and an extraction; data sets that an encoder reads: others are like them."""
OPERATIONS = {"cpu": 2e10, "cuda": 5e13}
"""Multiplications of SAE training that are timed."""
FEW, MANY = 25, 100
"""Numbers of classes from which larger ones are extrapolated."""
PASSES = {
    "probe": 400, "intervention": 600,
    "concepts": 1050, "named": 1050, "features": 2400, "random": 1150, "untrained": 1450, "shuffled": 350,
}  # fmt: skip
"""Passes of the solver on the demo, the middle of its three data sets: of a probe, an intervention, and NEC on its inputs."""


@dataclass(frozen=True)
class Estimate:
    """What a step is expected to take; None is not known."""

    seconds: float | None
    bytes: int | None
    """Disk space of its outputs."""


def estimate(settings: Settings, steps: Sequence[Step], device: str) -> dict[str, Estimate]:
    """Step name -> its estimate, as if nothing of it were done; `steps` stand in the order of the plan.

    Takes up to about a minute, and loads each encoder once. What cannot be measured, because images are missing or an encoder
    cannot be loaded, is None. Raises UserError if there is no such device.
    """
    known, found = Known(settings, resolve_device(device)), dict[str, Estimate]()
    bar, before = tqdm(steps, desc="measuring rates", unit="step", file=sys.stderr), logging.root.manager.disable
    logging.disable(logging.CRITICAL)  # warnings and progress bars would pass for those of a stage
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            for step in bar:
                values: list[float | None] = [None, None]
                for i, way in enumerate(WAYS.get(step.stage, ())):
                    with suppress(*UNKNOWN):
                        values[i] = None if way is None else way(known, step)
                found[step.name] = Estimate(values[0], None if values[1] is None else round(values[1]))
    finally:
        logging.disable(before)
        loaded.cache_clear()
    return found


def how_measured(device: str) -> str:
    """What the times of `estimate` are based on, in a sentence."""
    return (
        f"timed on this machine ({resolve_device(device)}, {default_cores()} cores) and scaled; an SAE that is not trained "
        f"counts with {ACTIVE} active latents; NEC, interventions and prox, by the demo's passes, may take half or twice that"
    )


def _rate(known: Known, work: Callable[[int], object], most: int) -> Seconds:
    """Time work on n items, where n grows until that takes a while, or is `most`."""

    def timed(n: int) -> float:
        start = time.perf_counter()
        work(n)
        if known.device.type == "cuda":
            torch.cuda.synchronize(known.device)
        return time.perf_counter() - start

    timed(1)  # the first call is slower
    n, one = 1, timed(1)
    took = one
    while took < ENOUGH_S and n < most:
        n = min(2 * n, most)
        took = timed(n)
    each = max(took - one, 0.0) / (n - 1) if n > 1 else one
    return lambda n: max(one - each, 0.0) + n * each


class _EnoughError(Exception):
    """Enough images are encoded."""


@dataclass(frozen=True)
class _Clocked(Encoder):
    """An encoder that notes when it is called, and with how many images, until it has taken EXTRACTION_S."""

    calls: list[tuple[float, int]] = field(default_factory=list)

    def encode_images(self, images: torch.Tensor) -> torch.Tensor:
        self.calls.append((time.perf_counter(), len(images)))
        if len(self.calls) > 3 and self.calls[-1][0] - self.calls[0][0] > EXTRACTION_S:
            raise _EnoughError
        return super().encode_images(images)


@cache
def _extraction(known: Known, encoder: str, dataset: str, extraction: Extraction) -> Seconds:
    """Extract the first images as the stage does; in small batches on a CPU, where the size hardly counts."""
    so_far: list[Seconds] = known.rates.setdefault((encoder, extraction), [])
    if len(so_far) >= READ:
        return so_far[-1]
    of, shards = loaded(known, encoder)[0], sizes.train_shards(known, dataset)
    clocked = _Clocked(**vars(of) | {"precision": extraction.precision or of.precision})
    how = extraction if known.device.type == "cuda" else replace(extraction, batch_size=SMALL_BATCH)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, suppress(_EnoughError):
        encode_shards(shards, clocked, Path(folder), how, "")
        clocked.calls.append((time.perf_counter(), 0))
    times, numbers = zip(*clocked.calls, strict=True)
    warm_up = 1 if len(times) > 3 else 0
    each = (times[-1] - times[warm_up]) / sum(numbers[warm_up:-1])
    so_far.append(lambda n: times[0] - start + n * each)
    return so_far[-1]


def _features_seconds(known: Known, step: Step) -> float:
    encoder = sizes.encoder_of(step).encoder
    rate = _extraction(known, encoder, sizes.dataset_of(step), build(Extraction, step.values))
    return loaded(known, encoder)[1] + sum(map(rate, sizes.counts(known, step).values()))


def _random_sae(run: SAERun, width: int, active: int) -> SparseAutoencoder:
    """An SAE of a run's shape, of whose latents each random input activates about as many as is asked for."""
    model = SparseAutoencoder(width, width * run.expansion_factor, sparsity=run.sparsity, input_transform=run.input_transform)
    with torch.no_grad():
        model.encoder_weight.normal_(std=width**-0.5, generator=torch.Generator().manual_seed(DEFAULT_SEED))
        pre = model.pre_activations(model.transform(torch.randn(1024, width))[0])
        rank = round(len(pre) * (1 - min(active / model.n_latents, 1)))
        model.encoder_bias.sub_(pre.kthvalue(max(rank, 1), dim=0).values)
    return model


def _active(known: Known, step: Step) -> int:
    try:
        return max(round(sizes.l0(known, step)), 1)
    except UserError:
        return min(ACTIVE, sizes.n_latents(known, step))


@cache
def _training_step(known: Known, run: SAERun, width: int, active: int, batch_size: int) -> float:
    """Seconds of a step, without those at the start of a training."""
    work = batch_size * width**2 * run.expansion_factor
    n = int(min(max(OPERATIONS.get(known.device.type, OPERATIONS["cpu"]) / work, 1), 200))
    per_epoch, times = min(n, 8), list[float]()
    schedule = replace(run.training, epochs=2 * n // per_epoch + 1, batch_size=batch_size, log_every=n)
    log = lambda *_: times.append(time.perf_counter())  # noqa: E731
    model, data = _random_sae(run, width, active), torch.randn(per_epoch * batch_size, width)
    if train(model, data, schedule, log=log, device=known.device, progress=False).stopped_early:
        raise KeyboardInterrupt
    return (times[1] - times[0]) / n


@cache
def _encoding(known: Known, run: SAERun, width: int, active: int) -> Seconds:
    """Of the active latents of images."""
    model, x = _random_sae(run, width, active).to(known.device), torch.randn(BATCH, width)
    with torch.inference_mode():
        return _rate(known, lambda n: to_csr(model.encode(x[:n].to(known.device))), BATCH)


def _shape(known: Known, step: Step) -> tuple[SAERun, int, int]:
    """What the time of an SAE depends on, apart from the batch. Names and seeds do not count."""
    run = build(SAERun, step.values)
    own = SAERun(sparsity=run.sparsity, expansion_factor=run.expansion_factor, input_transform=run.input_transform)
    how = replace(own.training, lr=1e-12, resample_freq=0, ckpt_freq=0, val_freq=0)  # as many latents stay active
    how = replace(how, matmul_precision=run.training.matmul_precision)
    return replace(own, training=how), sizes.width(known, sizes.encoder_of(step)), _active(known, step)


def _sae_seconds(known: Known, step: Step) -> float:
    """Training alone, without evaluations and resamplings."""
    schedule, n = build(SAERun, step.values).training, sizes.counts(known, step)["train"]
    one = _training_step(known, *_shape(known, step), min(schedule.batch_size, n))
    return schedule.epochs * schedule.steps_per_epoch(n) * one


def _strengths_seconds(known: Known, step: Step) -> float:
    return _encoding(known, *_shape(known, step))(sum(sizes.counts(known, step).values()))


def _text_seconds(known: Known, step: Step, texts: Sequence[str]) -> float:
    """Loading an encoder and embedding texts, of which the first are timed; in fp32, as the stages do."""
    encoder, loading, _ = loaded(known, sizes.encoder_of(step).encoder)
    own = replace(encoder, precision="fp32")
    return loading + _rate(known, lambda n: own.encode_texts(texts[:n]), min(len(texts), 256))(len(texts))


def _zero_shot_seconds(known: Known, step: Step) -> float:
    """The evaluation counts as a pass of a solver."""
    templates = step.values["templates"] or default_templates(sizes.dataset_of(step))
    names = map(display_name, sizes.labelled(known, sizes.dataset_of(step))[1])
    texts = [template.replace("{}", name) for name in names for template in templates]
    return _text_seconds(known, step, texts) + _fit_seconds(known, step, True, 1)


def _random_data(width: int, active: int, n: int, n_classes: int) -> ProbeData:
    """Concept strengths or, with no active latents, features, which are on the disk as the extraction leaves them."""
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(n_classes, size=n))
    if active:
        columns = np.sort(rng.integers(width, size=(n, active), dtype=np.int32), axis=1).ravel()
        values, rows = rng.exponential(size=n * active).astype(np.float32), np.arange(n + 1, dtype=np.int32) * active
        return ProbeData(scipy.sparse.csr_matrix((values, columns, rows), shape=(n, width)), labels)
    with tempfile.TemporaryDirectory() as name:  # open memory maps keep what is deleted
        _, keys_file, features_file = shard_files(Path(name), 0)
        with making(Path(name), "estimates", {}, {}, overwrite=False) as work:
            np.save(keys_file, np.arange(n))
            np.save(features_file, rng.standard_normal((n, width), dtype=np.float32))
            work.done([keys_file, features_file])
        return ProbeData(FeatureStore(Path(name), "estimates"), labels)


@cache
def _fit(known: Known, inputs: tuple[int, int], n_classes: int, rows: int, batch_size: int) -> Seconds:
    """Of epochs of Adam, with a ninth as many images for validation; or, without a batch size, of passes of the solver."""
    data, validation = (_random_data(*inputs, n, n_classes) for n in (rows, max(rows // 9, 1)))

    def adam(epochs: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            keep, run = Keep(StateFile(Path(folder) / "state.safetensors")), ProbeRun(epochs=epochs, batch_size=batch_size)
            fit_probe(data, validation, n_classes, run, known.device, keep)

    if batch_size:
        return _rate(known, adam, 256)
    start, even = torch.zeros(inputs[0], n_classes), torch.ones(inputs[0])
    with closing(CrossEntropy(data, known.device)) as loss:
        begin = Progress.at(start.to(known.device))
        solve = partial(minimise, loss, even.to(known.device), begin, 1.0, tolerance=-math.inf)
        return _rate(known, lambda n: solve(max_passes=n), 256)


def _fit_seconds(known: Known, step: Step, on_features: bool, passes: int, batch_size: int = 0) -> float:
    """Seconds of passes, or of epochs, which are timed on some images and, if there are many, on fewer classes."""
    n, n_classes = sizes.counts(known, step)["train"], len(sizes.labelled(known, sizes.dataset_of(step))[1])
    width = sizes.width(known, sizes.encoder_of(step))
    inputs = (width, 0) if on_features else (sizes.n_latents(known, step), _active(known, step))
    rows, timed = min(n, BATCH), [n_classes] if n_classes <= MANY else [FEW, MANY]
    seconds = [n / rows * _fit(known, inputs, c, rows, batch_size)(passes) for c in timed]
    return seconds[-1] + max(seconds[-1] - seconds[0], 0.0) / (MANY - FEW) * (n_classes - timed[-1])


def _probe_seconds(known: Known, step: Step) -> float:
    probe = build(ProbeRun, step.values)
    passes, batch_size = (PASSES["probe"], 0) if probe.solver == "prox" else (probe.epochs, probe.batch_size)
    return _fit_seconds(known, step, probe.on_features, passes, batch_size)


def _nec_seconds(known: Known, step: Step) -> float:
    return sum(_fit_seconds(known, step, on == "features", PASSES[on]) for on in INPUTS)


def _intervene_seconds(known: Known, step: Step) -> float:
    if (text := step.values["suggest"]) is not None:
        return _text_seconds(known, step, [text])
    return _fit_seconds(known, step, False, PASSES["intervention"])


WAYS: dict[str, tuple[Way, Way | None]] = {
    commands.SAE_FEATURES.name: (_features_seconds, sizes.features_bytes),
    commands.PROBE_FEATURES.name: (_features_seconds, sizes.features_bytes),
    commands.SAE.name: (_sae_seconds, sizes.sae_bytes),
    commands.VOCABULARY.name: (lambda known, step: _text_seconds(known, step, read_words(known.settings)), sizes.words_bytes),
    commands.STRENGTHS.name: (_strengths_seconds, sizes.strengths_bytes),
    commands.PROBE.name: (_probe_seconds, sizes.probe_bytes),
    commands.ZERO_SHOT.name: (_zero_shot_seconds, None),
    commands.NEC.name: (_nec_seconds, None),
    commands.INTERVENE.name: (_intervene_seconds, None),
}
"""Stage -> seconds and bytes of a step. Names take no time worth measuring, and figures what the data makes of them."""
