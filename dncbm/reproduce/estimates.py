"""How long the steps of a plan will take and how much disk space they need, from rates measured on this machine.

Each kind of work runs on a few batches, in the functions of its stage, and is scaled to all images, epochs and passes:

- **features**: a data set's first images, decoded and encoded as in the extraction. After ENCODER_S of an encoder, its
  last rate stands for its other data sets.
- **SAE**: training steps on random numbers, with as many active latents as the SAE will have, and an evaluation. Every
  resampling counts as one that finds dead latents. If an SAE of the same features and shape was trained on such a device,
  its own time counts, unless it is less than half of that: an interrupted training records its last part only.
- **concept strengths**: the SAE and the features if they exist, else random ones.
- **probe**: epochs on random strengths or features of the same shape, validation included.
- **NEC, interventions, `--probe_solver prox`**: passes of the solver. Their number depends on the data, so that of the demo
  is taken: these times are extrapolated, and may be half or twice as long.
- **words, zero-shot, names**: some of the texts and latents.
- **explanations**: the time and size of a finished one of the same kind, scaled by the number of images. Nothing is known
  of one without an example.

Of an SAE that is not trained, and whose type does not say how many latents are active, ACTIVE are assumed.
"""

import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import scipy.sparse
import torch
from PIL import Image
from tqdm import tqdm

from dncbm.concepts.sae import load_sae
from dncbm.concepts.strengths import BATCH, to_csr
from dncbm.concepts.vocabulary import read_words
from dncbm.features.datasets import SHARD_SIZE, BadImage, Encoded, ImageShards, KeyedImage, random_split
from dncbm.features.datasets.probe import HELD_OUT, ProbeImages, ProbeShards, display_name, probe_images
from dncbm.features.datasets.sae import sae_images
from dncbm.features.encoders import Encoder, load_encoder
from dncbm.features.encoding import SMALL_BATCH, default_batch_size, encode_shards
from dncbm.features.stage import open_features, probe_class_names
from dncbm.features.store import FeatureStore
from dncbm.probe.fit import Keep, fit_probe
from dncbm.probe.model import Inputs, ProbeData, evaluate_probe
from dncbm.probe.solvers import CrossEntropy, Progress, minimise
from dncbm.probe.state import StateFile
from dncbm.probe.zero_shot import default_templates
from dncbm.reproduce.plan import Step
from dncbm.runs import commands
from dncbm.runs.artifacts import Artifacts, ExplanationFolder, shard_files
from dncbm.runs.declarations import (
    SPLITS,
    Extraction,
    ImageEncoder,
    Intervention,
    NamedEncoder,
    ProbeFeatures,
    ProbeRun,
    ProbeSchedule,
    Prompts,
    SAEFeatures,
    SAERun,
)
from dncbm.runs.devices import default_cores, default_workers, resolve_device
from dncbm.runs.errors import UserError
from dncbm.runs.manifests import making, read_manifest
from dncbm.runs.settings import Settings
from sparse_autoencoder import DEFAULT_SEED, SparseAutoencoder, train
from sparse_autoencoder.declare import build
from sparse_autoencoder.settings import is_resampling_epoch

T = TypeVar("T")

ACTIVE = 32
"""Active latents per image, where nothing says how many."""
EXTRACTION_S, ENCODER_S = 2.0, 6.0
"""Seconds for which images are read to measure an extraction, and that are spent on the extractions of an encoder."""
ENOUGH_S = 0.3
"""Seconds after which other work counts as measured."""
OPERATIONS = {"cpu": 5e10, "cuda": 5e13}
"""Multiplications of SAE training that are timed."""
EPOCHS, STEPS = 4, 16
"""Epochs of a probe, more if they are short, and the most steps of each."""
PASSES = {"probe": 400, "intervention": 600, "concepts": 700, "features": 2100, "random": 500}
"""Passes of the solver on the demo, the middle of its three data sets: of a probe, an intervention, and NEC on its inputs."""
SAMPLE = 256
"""Images of a tar whose mean size is taken, where nothing says how many it holds."""
SHARD_HEADERS, PART_HEADERS = 1024, 1500
"""Bytes that a shard of features, and a part of strengths, have besides their numbers."""
SAE_ROW, PROBE_ROW, ACCURACY_ROW, SAE_FIGURE, NEC_FILES = 160, 110, 45, 200_000, 52_000
"""Bytes on the demo: rows of logs and of accuracies, and figures."""
UNKNOWN = (UserError, OSError, RuntimeError, MemoryError)
"""What a measurement raises where something is missing or does not work, or memory is too small."""


@dataclass(frozen=True)
class Estimate:
    """What a step is expected to take; None is not known."""

    seconds: float | None
    bytes: int | None
    """Disk space of what it leaves."""


def estimate(settings: Settings, steps: Sequence[Step], device: str) -> dict[str, Estimate]:
    """Estimate steps that are not done, all of each, by measuring on this machine (the module's docstring says how).

    Takes about a minute, and loads each encoder once. Steps that share a rate measure it once. Prints what was measured.

    Args:
        settings: the config.
        steps: the steps, in the order of the plan.
        device: where they will run: auto, cpu, cuda, cuda:N or mps.

    Returns:
        Step name -> its estimate. What cannot be measured, because images are missing or an encoder cannot be loaded, is None.

    Raises UserError if there is no such device.
    """
    if not steps:
        return {}
    where = resolve_device(device)
    estimator, found = _Estimator(settings, where), dict[str, Estimate]()
    for step in tqdm(steps, desc="measuring rates", unit="step", file=sys.stderr):
        with _quiet():
            found[step.name] = estimator.estimate(step)
    passes = ", ".join(f"{name} {n}" for name, n in PASSES.items())
    print(
        f"estimates: rates measured on this machine ({where}, {default_cores()} cores) by a few batches of each kind, "
        f"decoding included, and scaled; NEC, interventions and prox by the demo's number of passes ({passes}), so half or "
        "twice as long is possible; explanations by finished ones",
        file=sys.stderr,
    )
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Print nothing: progress bars and warnings of a measurement would pass for those of a stage."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)


class _UnknownError(Exception):
    """Something is not known."""


@dataclass(frozen=True)
class _Labelled:
    """A probe data set."""

    sizes: Mapping[str, int]
    """Split -> number of images."""
    class_names: Sequence[str]


@dataclass(frozen=True)
class _Line:
    """Seconds that grow with a number of items, of which `largest` were timed."""

    largest: int
    seconds: float
    each: float
    """More seconds per item beyond."""

    def at(self, n: int) -> float:
        return self.seconds + self.each * (n - self.largest)


class _Estimator:
    """Measures what a step needs, once for all steps that need it."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings, self.device, self.artifacts = settings, device, Artifacts(settings)
        self._found: dict[Any, Any] = {}
        self._loaded: _Loaded | None = None
        self._ways: dict[str, tuple[Callable[[Step], float], Callable[[Step], float]]] = {
            commands.SAE_FEATURES.name: (self._features_seconds, self._features_bytes),
            commands.PROBE_FEATURES.name: (self._features_seconds, self._features_bytes),
            commands.SAE.name: (self._sae_seconds, self._sae_bytes),
            commands.VOCABULARY.name: (self._words_seconds, self._words_bytes),
            commands.NAMES.name: (self._names_seconds, self._names_bytes),
            commands.STRENGTHS.name: (self._strengths_seconds, self._strengths_bytes),
            commands.PROBE.name: (self._probe_seconds, self._probe_bytes),
            commands.ZERO_SHOT.name: (self._zero_shot_seconds, self._zero_shot_bytes),
            commands.NEC.name: (self._nec_seconds, lambda _: NEC_FILES),
            commands.INTERVENE.name: (self._intervene_seconds, self._intervene_bytes),
        }
        for kind in (
            commands.TASK_AGNOSTICITY,
            commands.META_CLUSTERS,
            commands.LOCAL_EXPLANATIONS,
            commands.GLOBAL_EXPLANATIONS,
        ):
            dump, plot = kind.commands
            of_kind = partial(self._explanation, kind.name)
            self._ways[dump.name] = (partial(of_kind, _dump_seconds), partial(of_kind, _size_of))
            self._ways[plot.name] = (_not_known, partial(of_kind, _figures_size))

    def estimate(self, step: Step) -> Estimate:
        """Seconds and bytes of a step."""
        if step.stage not in self._ways:
            return Estimate(None, None)
        seconds, n_bytes = (self._or_none(way, step) for way in self._ways[step.stage])
        return Estimate(seconds, None if n_bytes is None else round(n_bytes))

    @staticmethod
    def _or_none(way: Callable[[Step], float], step: Step) -> float | None:
        try:
            return way(step)
        except (_UnknownError, *UNKNOWN):
            return None

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        """What `make` returns, made once for a key. Raises _UnknownError if it fails, without trying again."""
        if key not in self._found:
            try:
                self._found[key] = make()
            except (_UnknownError, *UNKNOWN):
                self._found[key] = _UnknownError
        if self._found[key] is _UnknownError:
            raise _UnknownError
        found: T = self._found[key]
        return found

    def _timed(self, work: Callable[[], object]) -> float:
        """Seconds of some work, finished on the device."""
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _each(self, work: Callable[[int], object], most: int) -> float:
        """Seconds per item of work on n items. n grows until that takes a while, or is `most`."""
        n = 1
        work(n)
        while (seconds := self._timed(partial(work, n))) < ENOUGH_S and n < most:
            n = min(4 * n, most)
        return min(seconds, self._timed(partial(work, n))) / n

    @staticmethod
    def _line(seconds: Callable[[int], float], n: int, most: int) -> _Line:
        """How long work on n items takes: timed, or beyond `most` on the line through a quarter of it and all of it."""
        if n <= most:
            return _Line(n, seconds(n), 0.0)
        fewer = max(most // 4, 1)
        small, large = seconds(fewer), seconds(most)
        return _Line(most, large, max(large - small, 0.0) / (most - fewer))

    # ------------------------------------------------------------------------------------------------ images, encoders

    def _labelled(self, dataset: str) -> _Labelled:
        """A probe data set: as divided already, else as it will be."""

        def make() -> _Labelled:
            try:
                names = probe_class_names(self.settings, dataset)
                sizes = json.loads(self.artifacts.probe_split(dataset).read_text(encoding="utf-8"))["sizes"]
                return _Labelled({split: int(sizes[split]) for split in SPLITS}, names)
            except (UserError, OSError, ValueError, LookupError, TypeError):
                return self._undivided(dataset)

        return self._once(("labelled", dataset), make)

    def _undivided(self, dataset: str) -> _Labelled:
        own_splits = self.settings.probe_dataset(dataset).own_splits
        images = {split: self._probe_images(dataset, split) for split in own_splits}
        sizes = {split: len(found.labels) for split, found in images.items()}
        if "train_val" not in sizes:
            rows = random_split(sizes["train"], DEFAULT_SEED, {"train_val": HELD_OUT})
            sizes |= {split: len(found) for split, found in rows.items()}
        return _Labelled(sizes, images["train"].class_names)

    def _probe_images(self, dataset: str, own_split: str) -> ProbeImages:
        return self._once(("images", dataset, own_split), partial(probe_images, self.settings, dataset, own_split))

    def _shards(self, dataset: str) -> dict[str, ImageShards]:
        """The images of the SAE's data set, or the labelled ones that a probe's are taken from."""
        if dataset in self.settings.sae_datasets:
            return self._once(("shards", dataset), lambda: dict(sae_images(self.settings, dataset)))
        images = self._probe_images(dataset, "train")
        return {"train": ProbeShards(images, np.arange(len(images.labels)))}

    def _sizes(self, features: ImageEncoder, dataset: str) -> dict[str, int]:
        """Number of images of each split: of the encoder's features if they exist, else of the data set."""
        found = {split: self._extracted(features, dataset, split) for split in SPLITS}
        sizes = {split: len(store) for split, store in found.items() if store is not None}
        if len(sizes) == len(SPLITS):
            return sizes
        if dataset in self.settings.sae_datasets:
            shards = self._shards(dataset)
            return self._once(("sizes", dataset), lambda: {split: _n_images(shards[split]) for split in SPLITS}) | sizes
        return {**self._labelled(dataset).sizes, **sizes}

    def _extracted(self, features: ImageEncoder, dataset: str, split: str) -> FeatureStore | None:
        """Finished features, if there are any."""
        try:
            where = (dataset, features.encoder, features.hook, split)
            return self._once(("store", *where), partial(open_features, self.settings, *where))
        except _UnknownError:
            return None

    def _width(self, features: ImageEncoder) -> int:
        """D of an encoder, from whatever features of it exist, else by encoding an image."""

        def make() -> int:
            for dataset in (*self.settings.sae_datasets, *self.settings.probe_datasets):
                if (store := self._extracted(features, dataset, "train")) is not None:
                    return store.width
            return self._encoder(features.encoder).width

        return self._once(("width", features.encoder, features.hook), make)

    def _encoder(self, name: str) -> "_Loaded":
        """An encoder. Only the last one stays in memory."""
        failed = ("encoder", name)
        if self._loaded is None or self._loaded.encoder.name != name:
            self._loaded = None
            if failed in self._found:
                raise _UnknownError
            try:
                self._loaded = self._load(name)
            except UNKNOWN as error:
                self._found[failed] = _UnknownError
                raise _UnknownError from error
        return self._loaded

    def _load(self, name: str) -> "_Loaded":
        import open_clip  # noqa: F401 - takes seconds, once

        start = time.perf_counter()
        encoder = load_encoder(self.settings, name, self.device)
        image = encoder.preprocess(Image.new("RGB", (64, 64)))[None]
        width = int(encoder.encode_images(image).shape[1])
        loading = time.perf_counter() - start
        return _Loaded(encoder, loading, self._timed(lambda: encoder.encode_images(image)), width)

    # -------------------------------------------------------------------------------------------------------- features

    def _features_seconds(self, step: Step) -> float:
        features, dataset = _features_of(step)
        rate = self._extraction(features.encoder, dataset, build(Extraction, step.values))
        sizes = self._sizes(features, dataset).values()
        return self._encoder(features.encoder).loading + sum(rate.startup + n * rate.each for n in sizes)

    def _extraction(self, encoder: str, dataset: str, extraction: Extraction) -> "_Extraction":
        how = (encoder, extraction.batch_size, extraction.precision, extraction.num_workers)

        def make() -> _Extraction:
            spent, last = self._found.get(("spent", how), (0.0, None))
            if last is not None and spent > ENCODER_S:
                return last
            loaded, shards = self._encoder(encoder), self._shards(dataset)["train"]
            start = time.perf_counter()
            found = self._extract(loaded, shards, extraction)
            self._found["spent", how] = (spent + time.perf_counter() - start, found)
            return found

        return self._once(("extraction", dataset, extraction.background, how), make)

    def _extract(self, loaded: "_Loaded", shards: ImageShards, extraction: Extraction) -> "_Extraction":
        """Extract the first images as the stage does, from as many shards at once."""
        on_gpu, batch_size = self.device.type == "cuda", extraction.batch_size or default_batch_size(self.device)
        if not on_gpu and 4 * batch_size * loaded.image_s > EXTRACTION_S:  # else a few batches would take minutes
            batch_size = min(batch_size, SMALL_BATCH)
        n_workers = default_workers(on_gpu) if extraction.num_workers is None else extraction.num_workers
        tower = _Clocked(loaded.encoder.model)
        encoder = replace(loaded.encoder, model=tower, precision=extraction.precision or loaded.encoder.precision)
        start = time.perf_counter()
        beginning = _Beginning(shards, min(len(shards), max(n_workers, 1)), time.monotonic() + EXTRACTION_S)
        how = replace(extraction, batch_size=batch_size, max_bad_fraction=1.0)
        with tempfile.TemporaryDirectory() as folder:
            done = encode_shards(beginning, encoder, Path(folder), how, "")
        end = time.perf_counter()
        warm_up = 1 if len(tower.calls) > 2 else 0
        n = done["images"] - sum(size for _, size in tower.calls[:warm_up])
        return _Extraction(tower.calls[0][0] - start, (end - tower.calls[warm_up][0]) / n)

    def _features_bytes(self, step: Step) -> float:
        features, dataset = _features_of(step)
        sizes, precision = self._sizes(features, dataset), build(Extraction, step.values).precision
        is_half = precision == "fp16" if precision else self.device.type == "cuda"
        key_bytes = 8
        if dataset in self.settings.sae_datasets:
            key_bytes = self._once(("keys", dataset), lambda: _key_bytes(self._shards(dataset)["train"]))
            n_shards = sum(map(len, self._shards(dataset).values()))
        else:
            n_shards = sum(-(-n // SHARD_SIZE) for n in sizes.values())
            key_bytes += 0 if self.artifacts.probe_split(dataset).is_file() else 16  # labels, indices
        each = (2 if is_half else 4) * self._width(features) + key_bytes
        return sum(sizes.values()) * each + n_shards * SHARD_HEADERS

    # ------------------------------------------------------------------------------------------------------------- SAE

    def _sae_seconds(self, step: Step) -> float:
        run, schedule = _sae_of(step), _sae_of(step).training
        sizes = self._sizes(run, run.dataset)
        n, held_out, batch_size = sizes["train"], sizes["train_val"], min(schedule.batch_size, sizes["train"])
        n_steps = schedule.epochs * -(-n // batch_size)
        rate = self._once(("SAE", self._shape(run), batch_size), partial(self._train, run, batch_size))
        validated = held_out * max(_validations(run, n), 1)
        due = sum(is_resampling_epoch(epoch, schedule.resample_freq, schedule.epochs) for epoch in range(schedule.epochs))
        resampled = due * min(schedule.resample_dataset_size, n) if run.sparsity.resamples else 0
        measured = n_steps * rate.step + (n + validated + resampled) * rate.evaluated
        recorded = [own * n_steps for own in self._recorded_steps(run)]
        return max([own for own in recorded if own > measured / 2], default=measured)

    def _shape(self, run: SAERun) -> tuple[Any, ...]:
        """What the time of a step depends on, apart from the batch."""
        return self._width(run), run.expansion_factor, run.sparsity, run.input_transform, run.training.matmul_precision

    def _recorded_steps(self, run: SAERun) -> Iterator[float]:
        """Seconds per step of finished SAEs that differ in their seed and in what costs no time."""

        def shape(of: SAERun) -> tuple[Any, ...]:
            schedule = of.training
            how = (schedule.batch_size, schedule.epochs, schedule.val_freq, schedule.resample_freq, schedule.matmul_precision)
            return of.encoder, of.hook, of.dataset, of.sparsity, of.expansion_factor, of.input_transform, how

        for path in self.artifacts.saes():
            with suppress(UserError, KeyError, TypeError, ValueError):
                made = read_manifest(path)
                details = made["details"]
                if shape(build(SAERun, made["run"])) == shape(run) and details["device"] == str(self.device):
                    yield details["seconds"] / details["steps"]

    def _train(self, run: SAERun, batch_size: int) -> "_Training":
        """Train an SAE for a few steps, and evaluate it."""
        width = self._width(run)
        model, data = self._random_sae(run), torch.randn(2 * batch_size, width)
        work = 2 * batch_size * width * model.n_latents
        n = int(min(max(OPERATIONS.get(self.device.type, OPERATIONS["cpu"]) / work, 2), 300))
        epochs = n + 1  # of two steps
        times: list[float] = []
        # At this rate nothing changes, so that as many latents stay active.
        schedule = replace(
            run.training, lr=1e-12, epochs=epochs, batch_size=batch_size, log_every=n, resample_freq=0, ckpt_freq=0, val_freq=0
        )
        log = lambda *_: times.append(time.perf_counter())  # noqa: E731
        done = train(model, data, schedule, log=log, device=self.device, progress=False)
        if done.stopped_early:
            raise KeyboardInterrupt
        first, second, end = times[0], times[1], times[-1]
        step = (second - first) / n
        return _Training(step, max(end - second - (2 * epochs - 2 * n) * step, 0.0) / len(data))

    def _random_sae(self, run: SAERun) -> SparseAutoencoder:
        """An SAE of a run's shape, of whose latents random inputs activate as many as is expected of the trained one."""
        width = self._width(run)
        model = SparseAutoencoder(
            width, width * run.expansion_factor, sparsity=run.sparsity, input_transform=run.input_transform
        )
        with torch.no_grad():
            model.encoder_weight.normal_(std=width**-0.5, generator=torch.Generator().manual_seed(DEFAULT_SEED))
            model.encoder_bias.zero_()
            pre = model.pre_activations(model.transform(torch.randn(1024, width))[0])
            share = min(self._expected_l0(run), model.n_latents) / model.n_latents
            model.encoder_bias.copy_(-pre.kthvalue(max(round(len(pre) * (1 - share)), 1), dim=0).values)
        return model

    def _expected_l0(self, run: SAERun) -> float:
        """Active latents per image: as trained, as the type says, or ACTIVE."""
        n_latents = self._width(run) * run.expansion_factor
        with suppress(UserError, KeyError, TypeError):
            return float(read_manifest(self.artifacts.sae_in_use(run))["details"]["metrics"]["train_val"]["l0"])
        share = run.sparsity.code.expected_density(n_latents)
        return share * n_latents if share < 1 else min(ACTIVE, n_latents)

    def _sae_bytes(self, step: Step) -> float:
        run, width = _sae_of(step), self._width(_sae_of(step))
        n, n_latents = self._sizes(run, run.dataset)["train"], width * run.expansion_factor
        extra = run.sparsity.code.extra_parameters(n_latents) | run.sparsity.code.extra_buffers(n_latents)
        checkpoint = 4 * (2 * width * n_latents + n_latents + width + sum(tensor.numel() for tensor in extra.values()))
        every, schedule = run.training.checkpoint_items(n), run.training
        n_steps = schedule.epochs * schedule.steps_per_epoch(n)
        kept = 1 + (schedule.epochs * n // every if every else 0)
        return kept * checkpoint + (n_steps // schedule.log_every + _validations(run, n)) * SAE_ROW + SAE_FIGURE

    # ----------------------------------------------------------------------------------------------------------- texts

    def _text_s(self, encoder: str, kind: str, texts: Sequence[str]) -> float:
        """Seconds to embed a text. Those of a kind are about equally long."""

        def make() -> float:
            own = replace(self._encoder(encoder).encoder, precision="fp32")  # as the stages do
            return self._each(lambda n: own.encode_texts(texts[:n]), min(len(texts), SAMPLE))

        return self._once(("texts", encoder, kind), make)

    def _words(self) -> list[str]:
        return self._once("words", partial(read_words, self.settings))

    def _words_seconds(self, step: Step) -> float:
        encoder, words = build(NamedEncoder, step.values).encoder, self._words()
        return len(words) * self._text_s(encoder, "words", words) + self._encoder(encoder).loading

    def _words_bytes(self, step: Step) -> float:
        return 4 * len(self._words()) * self._width(build(ImageEncoder, step.values))

    def _names_seconds(self, step: Step) -> float:
        width, n_words = self._width(_sae_of(step)), len(self._words())

        def make() -> float:
            words = torch.randn(n_words, width)
            return self._each(lambda n: (torch.randn(n, width) @ words.T).max(dim=1), 1024)

        return self._once(("names", width), make) * width * _sae_of(step).expansion_factor

    def _names_bytes(self, step: Step) -> float:
        row = self._word_bytes() + len("1000,,0.123456\n")
        return self._width(_sae_of(step)) * _sae_of(step).expansion_factor * row

    def _word_bytes(self) -> float:
        words = self._words()
        return sum(len(word.encode()) for word in words) / len(words)

    def _zero_shot_seconds(self, step: Step) -> float:
        features, dataset = _features_of(step)
        templates = build(Prompts, step.values).templates or default_templates(dataset)
        names = [display_name(name) for name in self._labelled(dataset).class_names]
        texts = [template.replace("{}", name) for name in names for template in templates]
        sizes, width = self._sizes(features, dataset), self._width(features)

        def evaluated(n: int) -> float:
            data = self._probe_data(self._random_features(n, width), len(names))
            weight = torch.randn(width, len(names), device=self.device)
            return self._timed(lambda: evaluate_probe(weight, data, 0.0))

        n = sum(sizes.values()) + sizes["val"]  # whose classes are counted apart
        line = self._once(("evaluated", n, width, len(names)), lambda: self._line(evaluated, n, 2 * BATCH))
        loading = self._encoder(features.encoder).loading
        return loading + len(texts) * self._text_s(features.encoder, "prompts", texts) + line.at(n)

    def _zero_shot_bytes(self, step: Step) -> float:
        features, dataset = _features_of(step)
        return len(self._labelled(dataset).class_names) * (4 * self._width(features) + ACCURACY_ROW)

    # -------------------------------------------------------------------------------------------------------- strengths

    def _strengths(self, run: SAERun, dataset: str) -> "_Strengths":
        sizes = self._sizes(run, dataset)
        stores = [self._extracted(run, dataset, split) for split in SPLITS]
        try:
            trained = self._once(("SAE in use", run), partial(load_sae, self.settings, run, self.device))
        except _UnknownError:
            trained = None
        found = [store for store in stores if store is not None]
        if trained is not None and len(found) == len(SPLITS):
            return self._once(("strengths", run, dataset), partial(self._encode, trained, found))

        def random() -> _Strengths:
            batch = torch.randn(min(max(sizes.values()), BATCH), self._width(run))
            return self._strengths_of(self._random_sae(run).to(self.device), [batch], [1], self._expected_l0(run))

        return self._once(("random strengths", self._shape(run), self._expected_l0(run)), random)

    def _encode(self, sae: SparseAutoencoder, stores: Sequence[FeatureStore]) -> "_Strengths":
        """Of a trained SAE on features: a batch of each split, spread over it."""
        rows = [np.linspace(0, len(store) - 1, min(len(store), BATCH)).astype(np.int64) for store in stores]
        batches = [store.gather(of) for store, of in zip(stores, rows, strict=True)]
        return self._strengths_of(sae, batches, list(map(len, stores)))

    @torch.inference_mode()
    def _strengths_of(
        self, sae: SparseAutoencoder, batches: Sequence[torch.Tensor], sizes: Sequence[int], l0: float | None = None
    ) -> "_Strengths":
        each = self._each(lambda n: to_csr(sae.encode(batches[0][:n].to(self.device))), len(batches[0]))
        if l0 is None:
            means = [to_csr(sae.encode(x.to(self.device))).nnz / len(x) for x in batches]
            l0 = float(np.average(means, weights=sizes))
        return _Strengths(each, l0)

    def _strengths_seconds(self, step: Step) -> float:
        run, dataset = _sae_of(step), str(step.values["probe_dataset"])
        return sum(self._sizes(run, dataset).values()) * self._strengths(run, dataset).each

    def _strengths_bytes(self, step: Step) -> float:
        run, dataset = _sae_of(step), str(step.values["probe_dataset"])
        sizes = self._sizes(run, dataset)
        n_parts = sum(-(-n // SHARD_SIZE) for n in sizes.values())
        return sum(sizes.values()) * (8 * self._strengths(run, dataset).l0 + 12) + n_parts * PART_HEADERS

    # ------------------------------------------------------------------------------------------------------------ probe

    def _random_strengths(self, n: int, width: int, l0: int) -> scipy.sparse.csr_matrix:
        rng = np.random.default_rng(0)
        indices = np.sort(rng.integers(width, size=(n, l0), dtype=np.int32), axis=1).ravel()
        values = rng.exponential(size=n * l0).astype(np.float32)
        return scipy.sparse.csr_matrix((values, indices, np.arange(n + 1, dtype=np.int32) * l0), shape=(n, width))

    def _random_features(self, n: int, width: int) -> FeatureStore:
        """Features on disk, as the extraction leaves them."""
        dtype = np.float16 if self.device.type == "cuda" else np.float32
        with tempfile.TemporaryDirectory() as name:  # open memory maps keep what is deleted
            folder = Path(name)
            _, keys_file, features_file = shard_files(folder, 0)
            with making(folder, "estimates", {}, {}, overwrite=False) as work:
                np.save(features_file, np.random.default_rng(0).standard_normal((n, width), dtype=np.float32).astype(dtype))
                np.save(keys_file, np.arange(n))
                work.done([keys_file, features_file])
            return FeatureStore(folder, "estimates")

    @staticmethod
    def _probe_data(inputs: Inputs, n_classes: int) -> ProbeData:
        n = len(inputs) if isinstance(inputs, FeatureStore) else inputs.shape[0]
        return ProbeData(inputs, torch.from_numpy(np.random.default_rng(1).integers(n_classes, size=n)))

    def _probe_inputs(self, run: SAERun, dataset: str, on_features: bool) -> tuple[int, Callable[[int], Inputs], Any]:
        """The number of inputs of a probe, random ones, and what they have in common."""
        width = self._width(run)
        if on_features:
            return width, partial(self._random_features, width=width), ("features", width)
        n_latents = width * run.expansion_factor
        l0 = min(max(round(self._strengths(run, dataset).l0), 1), n_latents)
        return n_latents, partial(self._random_strengths, width=n_latents, l0=l0), ("strengths", n_latents, l0)

    def _probe_seconds(self, step: Step) -> float:
        run, probe, schedule = _sae_of(step), build(ProbeRun, step.values), build(ProbeSchedule, step.values)
        if probe.solver == "prox":
            return PASSES["probe"] * self._pass_s(run, probe.dataset, probe.on_features)
        sizes, n_classes = self._sizes(run, probe.dataset), len(self._labelled(probe.dataset).class_names)
        _, inputs, of = self._probe_inputs(run, probe.dataset, probe.on_features)
        held_out = sizes["train_val"] / sizes["train"]

        def epoch(n: int) -> float:
            splits = [self._probe_data(inputs(rows), n_classes) for rows in (n, max(round(held_out * n), 1))]
            times: list[float] = []
            with tempfile.TemporaryDirectory() as folder:
                state = StateFile(Path(folder) / "state.safetensors")
                own = replace(schedule, val_freq=1, ckpt_freq=0)
                keep = Keep(state, own, log=lambda *_: times.append(time.perf_counter()))
                epochs = min(max(EPOCHS, 2 * BATCH // n), 4 * EPOCHS)
                fit_probe(splits[0], splits[1], n_classes, replace(probe, epochs=epochs), self.device, keep)
            return min(last - first for first, last in pairwise(times))

        key = ("epoch", of, n_classes, sizes["train"], sizes["train_val"], probe.batch_size)
        line = self._once(key, lambda: self._line(epoch, sizes["train"], STEPS * probe.batch_size))
        return (probe.epochs + 1) * line.at(sizes["train"])  # the end evaluates all images

    def _pass_s(self, run: SAERun, dataset: str, on_features: bool) -> float:
        """Seconds of a pass of the solver over the training images."""
        n, n_classes = self._sizes(run, dataset)["train"], len(self._labelled(dataset).class_names)
        n_inputs, inputs, of = self._probe_inputs(run, dataset, on_features)

        def one(n: int) -> float:
            times: list[float] = []
            start = Progress.at(torch.zeros(n_inputs, n_classes, device=self.device))
            note = lambda _: times.append(time.perf_counter())  # noqa: E731
            with closing(CrossEntropy(self._probe_data(inputs(n), n_classes), self.device)) as loss:
                even = torch.ones(n_inputs, device=self.device)
                minimise(loss, even, start, 1.0, max_passes=4, tolerance=0.0, on_pass=note)
            return min(last - first for first, last in pairwise(times))

        line = self._once(("pass", of, n, n_classes), lambda: self._line(one, n, BATCH))
        return line.at(n)

    def _probe_bytes(self, step: Step) -> float:
        run, probe, schedule = _sae_of(step), build(ProbeRun, step.values), build(ProbeSchedule, step.values)
        n_classes = len(self._labelled(probe.dataset).class_names)
        n_inputs = self._width(run) * (1 if probe.on_features else run.expansion_factor)
        kept = 1 + (probe.epochs // schedule.ckpt_freq if schedule.ckpt_freq else 0)
        rows = probe.epochs // schedule.val_freq * PROBE_ROW + n_classes * ACCURACY_ROW
        return kept * 4 * n_inputs * n_classes + rows

    def _nec_seconds(self, step: Step) -> float:
        run, dataset = _sae_of(step), str(step.values["probe_dataset"])
        n = sum(self._sizes(run, dataset).values())
        on_concepts, on_features = (self._pass_s(run, dataset, is_on_features) for is_on_features in (False, True))
        passes = (PASSES["concepts"] + PASSES["random"]) * on_concepts + PASSES["features"] * on_features
        return passes + n * self._strengths(run, dataset).each  # random directions are encoded, too

    def _intervene_seconds(self, step: Step) -> float:
        run, probe, edit = _sae_of(step), build(ProbeRun, step.values), build(Intervention, step.values)
        if edit.suggest is not None:
            return self._encoder(run.encoder).loading + self._text_s(run.encoder, "suggestion", [edit.suggest])
        return PASSES["intervention"] * self._pass_s(run, probe.dataset, on_features=False)

    def _intervene_bytes(self, step: Step) -> float:
        edit, n_classes = build(Intervention, step.values), len(self._labelled(str(step.values["probe_dataset"])).class_names)
        if edit.suggest is not None:
            return edit.suggest_n * self._word_bytes()
        return 5 * (n_classes + 7) * ACCURACY_ROW  # five probes; a row for each class, four groups, and three means

    # ----------------------------------------------------------------------------------------------------- explanations

    def _explanation(self, kind: str, what: Callable[[Path], float], step: Step) -> float:
        """What holds of finished dumps of a kind, scaled by the number of images."""
        n, found = self._n_explained(_sae_of(step), step.values), list[float]()
        for folder in self.artifacts.dumps(kind):
            with suppress(UserError, OSError, KeyError, TypeError, ValueError, _UnknownError):
                made = read_manifest(folder)["run"]
                found.append(what(folder) * n / self._n_explained(build(SAERun, made), made))
        if not found:
            raise _UnknownError
        return float(np.median(found))

    def _n_explained(self, run: SAERun, values: Mapping[str, Any]) -> int:
        """Number of images behind an explanation."""
        datasets = values.get("probe_dataset")
        names = [datasets] if isinstance(datasets, str) else datasets or tuple(self.settings.probe_datasets)
        return sum(self._sizes(run, name)[values["probe_split"]] for name in names)


# ---------------------------------------------------------------------------------------------------------------- parts


@dataclass(frozen=True)
class _Loaded:
    """An encoder in memory."""

    encoder: Encoder
    loading: float
    """Seconds until it had encoded its first image."""
    image_s: float
    """Seconds of a second one."""
    width: int
    """D."""


@dataclass(frozen=True)
class _Extraction:
    startup: float
    """Seconds before the first batch is encoded."""
    each: float
    """Seconds per image."""


@dataclass(frozen=True)
class _Training:
    step: float
    """Seconds per step."""
    evaluated: float
    """Seconds per item of an evaluation."""


@dataclass(frozen=True)
class _Strengths:
    each: float
    """Seconds per image."""
    l0: float
    """Active latents per image."""


class _Clocked(torch.nn.Module):
    """An image tower that notes when it is called, and with how many images."""

    def __init__(self, tower: torch.nn.Module) -> None:
        super().__init__()
        self.tower = tower
        self.calls: list[tuple[float, int]] = []

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        self.calls.append((time.perf_counter(), len(images)))
        features: torch.Tensor = self.tower.encode_image(images)  # type: ignore[operator]
        return features


@dataclass(frozen=True)
class _Beginning:
    """The images of the first shards that are read before a deadline, of `time.monotonic`, which all processes share."""

    shards: ImageShards
    n_shards: int
    deadline: float

    def __len__(self) -> int:
        return self.n_shards

    def name(self, shard: int) -> str:
        return self.shards.name(shard)

    def count(self, shard: int) -> int | None:
        return None

    def size(self, shard: int) -> int:
        return self.shards.size(shard)

    def fingerprint(self) -> str:
        return ""

    def state(self, shard: int, bad_keys: Sequence[Any]) -> str:
        return ""

    def read(self, shard: int, on_bad: Callable[[str], None]) -> Iterator[KeyedImage]:
        for number, image in enumerate(self.shards.read(shard, on_bad)):
            if number >= 2 * SMALL_BATCH and time.monotonic() > self.deadline:
                return
            yield image


def _features_of(step: Step) -> tuple[SAEFeatures | ProbeFeatures, str]:
    """The features that a step makes or reads, and the name of their data set."""
    if step.stage == commands.SAE_FEATURES.name:
        of_sae = build(SAEFeatures, step.values)
        return of_sae, of_sae.dataset
    of_probe = build(ProbeFeatures, step.values)
    return of_probe, of_probe.dataset


def _sae_of(step: Step) -> SAERun:
    return build(SAERun, step.values)


def _n_images(shards: ImageShards) -> int:
    """Number of images; of tars without a count, from their sizes and that of the first images.

    Raises _UnknownError if sizes are not known, as of what a command fetches, or nothing is read.
    """
    counts = [shards.count(shard) for shard in range(len(shards))]
    known = sum(count for count in counts if count is not None)
    if None not in counts:
        return known
    loads = [load for _, load in islice(shards.read(0, lambda _: None), SAMPLE)]
    read = sum(map(_size_in_tar, loads))
    if not read or shards.size(0) < read:
        raise _UnknownError
    mean = (shards.size(0) if len(loads) < SAMPLE else read) / len(loads)
    return known + round(sum(shards.size(shard) for shard, count in enumerate(counts) if count is None) / mean)


def _size_in_tar(load: Callable[[], Encoded]) -> int:
    """Bytes that an image takes in a tar: a block of 512, and whole blocks of content; 0 if it cannot be read."""
    with suppress(BadImage):
        encoded = load()
        return 512 * (1 + -(-len(encoded) // 512)) if isinstance(encoded, bytes) else 0
    return 0


def _key_bytes(shards: ImageShards) -> int:
    """Bytes of a key in its array, where each takes as much room as the longest, from the first ones."""
    keys = [key for key, _ in islice(shards.read(0, lambda _: None), SAMPLE)]
    return np.asarray(keys).dtype.itemsize


def _validations(run: SAERun, n: int) -> int:
    """How often an SAE is validated in training on n images."""
    every = run.training.validation_epochs(n)
    return run.training.epochs // every if every else 0


def _not_known(step: Step) -> float:
    raise _UnknownError


def _dump_seconds(folder: Path) -> float:
    """Seconds that a finished dump took."""
    return float(read_manifest(folder)["details"]["seconds"])


def _size_of(folder: Path) -> float:
    """Bytes of the files in a folder."""
    return float(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


def _figures_size(dump: Path) -> float:
    """Bytes of the figures of a dump. Raises _UnknownError if there are none."""
    found = _size_of(ExplanationFolder.at(dump.parent).figures)
    if not found:
        raise _UnknownError
    return found
