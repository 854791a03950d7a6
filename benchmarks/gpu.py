"""Measures everything on any CUDA card, in about 8 minutes.

    python benchmarks/gpu.py [--peers] [--parts card rates steps ...] [--quick]

Prints one JSON object. Each part runs in a process of its own with a limit of time. Where something fails, its `error`
stands in place of its figures, and the other parts run on.

`card`: its name and memory, and the versions of its driver, torch, CUDA and Triton.
`rates`: what the card reaches. `fp32`, `tf32` and `bf16` are FLOP/s of the encoder's product (B x D by D x F). `memory` is
bytes/s, read and written, of copying what does not fit in L2. `l2` is bytes/s of rows in random order from a table that
does: the better of `index_select` and `embedding_bag`.
`steps`: for each D and each --matmul_precision, with F = 8192, B = 4096 and a ReLU of 32 active latents, `ms` of a step by
autograd (`dense_eager`), the same in a CUDA graph (`dense_graph`), and the sparse step (`sparse_eager`, `sparse_graph`).
`floor_ms` is the least time by the count of gpu_model.py at the measured rates, `over_floor` is ms / floor_ms. `kernels`
holds the same of each kernel of the sparse step. `peak_mib` is the most device memory that torch held.
`epoch`: seconds of an epoch of `train` on resident float16 features, of as many bare steps, and their ratio.
`extraction`: images/s of stage 1 from tars to finished files, and of the encoder alone on images on the device.
`strengths`: images/s of stage 6, and of the SAE's encoder alone on features on the device.
`probe`: seconds of an epoch at the width of Places365 (8192 concepts, 365 classes) with fewer images: stage 7 on sparse
strengths, and nn.Linear with fused Adam on the same as dense tensors on the device; `places365_s` scales the first to all
1,623,114 images.
`peers` (with --peers): ms of a step of other libraries with TF32 products, as in sae_peers.py, which makes their environment.

--quick runs every line with tiny sizes, without a GPU on the CPU: Triton's interpreter runs the kernels, and no graph is
captured. Its times mean nothing.
"""

import argparse
import gc
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sparse_autoencoder import ReLU, SparseAutoencoder, TopK, TrainingSettings, train
from sparse_autoencoder.graphs import GraphedStep
from sparse_autoencoder.optimizer import Adam, adam_rates
from sparse_autoencoder.settings import MATMUL_PRECISIONS
from sparse_autoencoder.stepper import Stepper
from sparse_autoencoder.steps import StepResult, dense_update, matmul_precision

# What needs Triton, other benchmarks or the rest of the project is imported where it is used: main() first says how Triton is
# to run, and the peers' environment holds only a part.

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PLACES365 = 1_623_114


class Sizes(NamedTuple):
    """How much is computed."""

    widths: tuple[int, ...] = (1024, 768, 512)
    n_latents: int = 8192
    batch: int = 4096
    active: int = 32
    steps: int = 20  # timed in a row
    rounds: int = 5  # of which the least time counts
    epoch_steps: int = 48
    copied: int = 2**30  # bytes
    encoders: tuple[str, ...] = ("RN50", "ViT-B-16", "ViT-L-14")
    images: int = 6144
    encoded: int = 65_536  # feature vectors for the strengths
    probed: int = 131_072
    classes: int = 365


QUICK = Sizes((32,), 32, 8, 4, 1, 1, 4, 2**20, ("ViT-S-32",), 32, 256, 512, 5)


class Figures:
    """Measured figures, a line of JSON each in a file that parts share: [where, figure]."""

    def __init__(self, path: Path, end: float = math.inf) -> None:
        self.path, self.end = path, end

    def add(self, *where: str, way: Callable[[], Any]) -> None:
        """What `way` returns, or why it could not."""
        if time.monotonic() > self.end:
            figure: Any = {"error": "left out: the time of this part was over"}
        else:
            try:
                figure = way()
            except Exception as error:  # whatever is wrong with one thing, the rest is to be measured
                figure = {"error": f"{type(error).__name__}: {error}".split("\n")[0][:500]}
        with open(self.path, "a") as file:
            file.write(json.dumps([where, figure]) + "\n")

    def read(self) -> dict[str, Any]:
        """All figures so far, nested."""
        found: dict[str, Any] = {}
        for line in self.path.read_text().splitlines():
            where, figure = json.loads(line)
            inner = found
            for name in where[:-1]:
                inner = inner.setdefault(name, {})
            inner[where[-1]] = figure
        return found


# ------------------------------------------------------------------------------------------------------------ stopwatch


def synchronize() -> None:
    if ON_GPU:
        torch.cuda.synchronize()


def timed(way: Callable[[], object]) -> float:
    """Seconds between the device's start and end of some work."""
    if not ON_GPU:
        start = time.perf_counter()
        way()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    way()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1000


def seconds(way: Callable[[], object], sizes: Sizes) -> float:
    """Seconds of one call among several in a row, the least of some rounds after one that does not count."""

    def several() -> None:
        for _ in range(sizes.steps):
            way()

    return min([timed(several) for _ in range(sizes.rounds + 1)][1:]) / sizes.steps


def peak_mib(way: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `way` returns, with the most memory of the device that torch held meanwhile."""
    if not ON_GPU:
        return way() | {"peak_mib": None}
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return way() | {"peak_mib": torch.cuda.max_memory_allocated() / 2**20}


# ----------------------------------------------------------------------------------------------------- card and its rates


def card(figures: Figures, sizes: Sizes) -> None:
    def properties() -> dict[str, Any]:
        about = torch.cuda.get_device_properties(DEVICE)
        return {
            "name": about.name,
            "capability": f"{about.major}.{about.minor}",
            "processors": about.multi_processor_count,
            "memory_gib": about.total_memory / 2**30,
            "l2_mib": l2_bytes() / 2**20,
        }

    def driver() -> str:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]

    def triton() -> str:
        import triton

        return str(triton.__version__)

    figures.add("card", "torch", way=lambda: torch.__version__)
    figures.add("card", "cuda", way=lambda: torch.version.cuda)
    figures.add("card", "triton", way=triton)
    if ON_GPU:
        figures.add("card", "device", way=properties)
        figures.add("card", "driver", way=driver)
    else:
        figures.add("card", "device", way=lambda: {"name": "CPU"})


def l2_bytes() -> int:
    return int(getattr(torch.cuda.get_device_properties(DEVICE), "L2_cache_size", 40 * 2**20)) if ON_GPU else 2**20


def rates(figures: Figures, sizes: Sizes) -> None:
    batch, width = sizes.batch, sizes.widths[0]

    def product(precision: str, dtype: torch.dtype) -> float:
        x, weight = (torch.randn(n, width, device=DEVICE, dtype=dtype) for n in (batch, sizes.n_latents))
        out = torch.empty(batch, sizes.n_latents, device=DEVICE, dtype=dtype)
        with matmul_precision(precision, DEVICE):
            return 2 * batch * width * sizes.n_latents / seconds(lambda: torch.mm(x, weight.t(), out=out), sizes)

    def copy() -> float:
        source, target = (torch.empty(sizes.copied, dtype=torch.uint8, device=DEVICE) for _ in range(2))
        return 2 * sizes.copied / seconds(lambda: target.copy_(source), sizes)

    def gather() -> float:
        n_rows = l2_bytes() // 3 // (4 * width)
        table, out = (torch.randn(n_rows, width, device=DEVICE) for _ in range(2))
        order = torch.randperm(n_rows, device=DEVICE)
        bags = torch.randint(n_rows, (batch, sizes.active), device=DEVICE)
        selected = seconds(lambda: torch.index_select(table, 0, order, out=out), sizes)
        summed = seconds(lambda: torch.nn.functional.embedding_bag(bags, table, mode="sum"), sizes)
        return 4 * width * max(2 * n_rows / selected, (bags.numel() + batch) / summed)

    figures.add("rates", "fp32", way=partial(product, "highest", torch.float32))
    figures.add("rates", "tf32", way=partial(product, "high", torch.float32))
    figures.add("rates", "bf16", way=partial(product, "highest", torch.bfloat16))
    figures.add("rates", "memory", way=copy)
    figures.add("rates", "l2", way=gather)


# ---------------------------------------------------------------------------------------------------------------- steps

Update: TypeAlias = Callable[[Tensor, Tensor | None], StepResult]


def batch_and_model(width: int, sizes: Sizes) -> tuple[Tensor, SparseAutoencoder]:
    """A batch, and a ReLU model in which about `active` latents per item are active."""
    import sae_step

    x = torch.randn(sizes.batch, width, generator=torch.Generator().manual_seed(0))
    sae_step.F = sizes.n_latents
    return x.to(DEVICE), sae_step.calibrated(width, sizes.active, ReLU(), x).to(DEVICE)


def in_graph(update: Update, x: Tensor, model: SparseAutoencoder, adam: Adam) -> Update:
    if not ON_GPU:
        return update
    return GraphedStep(update, x, None, [*model.state_dict().values(), *adam.moments.values(), *adam.counts.values()])


def dense_way(width: int, precision: str, graphed: bool, sizes: Sizes) -> Callable[[], object]:
    """A dense step, with what training does for each."""
    x, model = batch_and_model(width, sizes)
    adam = Adam(model, lr=1e-9)
    update: Update = partial(dense_update, model, adam, bf16=precision == "medium")
    if graphed:
        update = in_graph(update, x, model, adam)

    def way() -> None:
        adam.prepare()
        update(x, None)
        adam.count()

    return way


def sparse_way(width: int, precision: str, graphed: bool, sizes: Sizes) -> Callable[[], object]:
    """The sparse step, likewise."""
    from sparse_autoencoder.gpu_step import GpuStep

    x, model = batch_and_model(width, sizes)
    adam = Adam(model, lr=1e-9)
    step = GpuStep(model, adam, sizes.batch, precision=precision)
    update: Update = lambda x, _: step(x)  # noqa: E731
    if graphed:
        update = in_graph(update, x, model, adam)

    def way() -> None:
        step.set_rates(adam_rates(adam))
        update(x, None)
        adam.steps += 1

    return way


def steps(figures: Figures, sizes: Sizes) -> None:
    import gpu_model

    rates = figures.read().get("rates", {})
    known = isinstance(rates, dict) and all(isinstance(rate, float) for rate in rates.values()) and rates
    measured = gpu_model.Card(rates, rates["memory"], rates["l2"], l2_bytes()) if known else None

    def against_floor(found: float, works: "gpu_model.Works") -> dict[str, float | None]:
        floor = gpu_model.total(works, measured) if measured and works else None
        return {"ms": found * 1e3, "floor_ms": floor and floor * 1e3, "over_floor": floor and found / floor}

    def of_step(kind: str, width: int, precision: str, graphed: bool) -> dict[str, Any]:
        make, count = (dense_way, gpu_model.dense) if kind == "dense" else (sparse_way, gpu_model.sparse)
        shape = gpu_model.Shape.even(sizes.batch, width, sizes.n_latents, sizes.active)
        with matmul_precision(precision, DEVICE):
            return against_floor(seconds(make(width, precision, graphed, sizes), sizes), count(shape, precision))

    def of_kernels(width: int, precision: str) -> dict[str, Any]:
        shape = gpu_model.Shape.even(sizes.batch, width, sizes.n_latents, sizes.active)
        works = gpu_model.sparse(shape, precision)
        with matmul_precision(precision, DEVICE):
            found = kernel_seconds(sparse_way(width, precision, False, sizes), sizes.steps)
        named: dict[str, float] = {}
        for kernel, spent in found.items():
            name = name_of(kernel, {work.name for work in works})
            named[name] = named.get(name, 0.0) + spent
        return {name: against_floor(spent, [work for work in works if work.name == name]) for name, spent in named.items()}

    for width in sizes.widths:
        for precision in MATMUL_PRECISIONS:
            where = ("steps", str(width), precision)
            for kind in ("dense", "sparse"):
                for form in ("eager", "graph"):
                    way = partial(of_step, kind, width, precision, form == "graph")
                    figures.add(*where, f"{kind}_{form}", way=partial(peak_mib, way))
            figures.add(*where, "kernels", way=partial(of_kernels, width, precision))


def kernel_seconds(way: Callable[[], object], times: int) -> dict[str, float]:
    """Kernel -> seconds in one call; on a CPU, operator of torch -> seconds."""
    way()
    synchronize()
    with profile(activities=[ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU]) as profiler:
        for _ in range(times):
            way()
        synchronize()
    spent = {
        event.key: (event.self_device_time_total if ON_GPU else event.self_cpu_time_total) / times / 1e6
        for event in profiler.key_averages()
    }
    if not any(spent.values()):
        raise RuntimeError("the profiler saw no kernels")
    return {name: time for name, time in spent.items() if time > 0}


def name_of(kernel: str, names: set[str]) -> str:
    """What the count calls a kernel; else the start of its own name."""
    lower = kernel.lower()
    for known, parts in (
        ("folded bias", ("gemv", "addmv")),
        ("product", ("gemm", "nvjet", "cutlass", "xmma", "splitk", "addmm")),
        ("casts", ("copy_",)),
    ):
        if known in names and any(part in lower for part in parts):
            return known
    return next((name for name in names if kernel.startswith(name)), kernel[:60])


# ------------------------------------------------------------------------------------------------- the rest of the pipeline


def epoch(figures: Figures, sizes: Sizes) -> None:
    width, n = sizes.widths[0], sizes.epoch_steps
    features = torch.randn(n * sizes.batch, width, generator=torch.Generator().manual_seed(0)).half()
    ends: list[float] = []

    def model() -> SparseAutoencoder:
        return SparseAutoencoder(width, sizes.n_latents, sparsity=TopK(sizes.active)).to(DEVICE)

    def log(row: dict[str, Any], step: int) -> None:
        if step % n == 0:  # the row was read from the device, which has thus finished the epoch
            ends.append(time.perf_counter())

    def measured() -> dict[str, float]:
        schedule = TrainingSettings(epochs=3, batch_size=sizes.batch, log_every=n)
        train(model(), features, schedule, log=log, device=DEVICE, progress=False)
        trained, batches = model(), features.to(DEVICE).float().split(sizes.batch)
        stepper = Stepper(trained, Adam(trained, lr=schedule.lr), batch_size=sizes.batch)
        bare = min(timed(lambda: [stepper(batch) for batch in batches]) for _ in range(3))
        stepper.close()
        return {"epoch_s": ends[1] - ends[0], "steps_s": bare, "over_steps": (ends[1] - ends[0]) / bare}

    figures.add("epoch", way=partial(peak_mib, measured))


def extraction(figures: Figures, sizes: Sizes) -> None:
    import open_clip
    from extraction import write_tars
    from PIL import Image

    from dncbm.features.datasets.sae import WebdatasetShards
    from dncbm.features.encoders import Encoder
    from dncbm.features.encoding import default_batch_size, encode_shards
    from dncbm.runs.declarations import Extraction
    from dncbm.runs.manifests import making

    def stage(shards: WebdatasetShards, encoder: Encoder, folder: Path) -> None:
        with making(folder, "benchmark", {}, {"images": shards.fingerprint()}, overwrite=False) as work:
            work.done(folder.glob("*.npy"), **encode_shards(shards, encoder, folder, Extraction(), folder.name))

    def measured(name: str, shards: WebdatasetShards, folder: Path) -> dict[str, float]:
        model, _, preprocess = open_clip.create_model_and_transforms(name, load_weights=False)
        model = model.eval().to(DEVICE, memory_format=torch.channels_last)
        encoder = Encoder(name, model, preprocess, open_clip.get_tokenizer(name), DEVICE, "fp16" if ON_GPU else "fp32")
        batch_size = default_batch_size(DEVICE)
        images = preprocess(Image.new("RGB", (256, 256)))[None].expand(batch_size, -1, -1, -1).to(DEVICE)
        alone = batch_size / seconds(lambda: encoder.encode_images(images), sizes)
        start = time.perf_counter()
        stage(shards, encoder, folder / name)
        whole = sizes.images / (time.perf_counter() - start)
        return {"stage_per_s": whole, "encoder_per_s": alone, "stage_over_encoder": whole / alone}

    with tempfile.TemporaryDirectory() as temporary:
        shards = write_tars(Path(temporary), sizes.images)
        for name in sizes.encoders:
            figures.add("extraction", name, way=partial(peak_mib, partial(measured, name, shards, Path(temporary))))


def strengths(figures: Figures, sizes: Sizes) -> None:
    import strengths as of_cpu

    from dncbm.concepts.strengths import BATCH, encode_store
    from dncbm.features.store import FeatureStore

    of_cpu.D, of_cpu.F, of_cpu.ACTIVE = sizes.widths[0], sizes.n_latents, sizes.active
    sae = of_cpu.calibrated().to(DEVICE)

    def measured(folder: Path) -> dict[str, float]:
        of_cpu.write_features(folder / "features", sizes.encoded)
        store = FeatureStore(folder / "features", "")
        (folder / "warm-up").mkdir()
        encode_store(sae, store, folder / "warm-up", "warm-up", BATCH)
        (folder / "strengths").mkdir()
        start = time.perf_counter()
        l0 = encode_store(sae, store, folder / "strengths", "strengths", BATCH)["l0"]
        whole = sizes.encoded / (time.perf_counter() - start)
        x = torch.randn(min(BATCH, sizes.encoded), sae.n_inputs, device=DEVICE)
        with torch.inference_mode():
            alone = len(x) / seconds(lambda: sae.encode(x), sizes)
        return {"l0": l0, "stage_per_s": whole, "encode_per_s": alone}

    with tempfile.TemporaryDirectory() as temporary:
        figures.add("strengths", way=partial(peak_mib, partial(measured, Path(temporary))))


def probe(figures: Figures, sizes: Sizes) -> None:
    import probe_epoch
    import scipy.sparse

    from dncbm.probe.fit import Keep, fit_probe
    from dncbm.probe.model import ProbeData
    from dncbm.probe.state import StateFile
    from dncbm.runs.declarations import ProbeRun, ProbeSchedule

    probe_epoch.F, probe_epoch.C = sizes.n_latents, sizes.classes
    rng, block = np.random.default_rng(0), sizes.n_latents // sizes.active
    columns = rng.integers(0, block, (sizes.probed, sizes.active)) + np.arange(0, sizes.active * block, block)
    values = rng.exponential(size=columns.size).astype(np.float32)
    starts = np.arange(sizes.probed + 1) * sizes.active
    matrix = scipy.sparse.csr_matrix((values, columns.ravel(), starts), shape=(sizes.probed, sizes.n_latents))
    labels = torch.from_numpy(rng.integers(0, sizes.classes, sizes.probed))
    run = ProbeRun("places365", lr=probe_epoch.LR, batch_size=probe_epoch.BATCH, epochs=3)

    def of_sparse() -> dict[str, float]:
        ends: list[float] = []
        few = ProbeData(matrix[: run.batch_size], labels[: run.batch_size])
        with tempfile.TemporaryDirectory() as temporary:
            log = lambda row, epoch: ends.append(time.perf_counter())  # noqa: E731 - after the metrics, which wait for the device
            keep = Keep(StateFile(Path(temporary) / "state"), ProbeSchedule(val_freq=1), log=log)
            fit_probe(ProbeData(matrix, labels), few, sizes.classes, run, DEVICE, keep)
        found = ends[-1] - ends[-2]
        return {"epoch_s": found, "places365_s": found * PLACES365 / sizes.probed}

    def of_dense() -> dict[str, float]:
        layer, step = probe_epoch.dense_way(fused=True)
        layer.to(DEVICE)
        dense = torch.empty(matrix.shape, device=DEVICE)
        for first in range(0, sizes.probed, 8192):
            dense[first : first + 8192] = torch.from_numpy(matrix[first : first + 8192].toarray())
        wanted = labels.to(DEVICE)

        def once() -> None:
            order = torch.randperm(sizes.probed, device=DEVICE)
            for rows in order.split(run.batch_size):
                step(dense[rows], wanted[rows])

        once()
        return {"epoch_s": min(timed(once) for _ in range(2))}

    figures.add("probe", "sparse", way=partial(peak_mib, of_sparse))
    figures.add("probe", "dense", way=partial(peak_mib, of_dense))


def peers(figures: Figures, sizes: Sizes) -> None:
    from sae_peers import ways

    with matmul_precision("high", DEVICE):
        for name, way in ways(str(DEVICE)).items():
            figures.add("peers", name, way=lambda way=way: seconds(way, sizes) * 1e3)


# ---------------------------------------------------------------------------------------------------------------- parts

PARTS: dict[str, tuple[Callable[[Figures, Sizes], None], float]] = {
    "card": (card, 20),
    "rates": (rates, 20),
    "steps": (steps, 170),
    "epoch": (epoch, 40),
    "extraction": (extraction, 80),
    "strengths": (strengths, 30),
    "probe": (probe, 40),
    "peers": (peers, 120),
}
"""Part -> what measures it, and its seconds."""


def run(part: str, quick: bool, figures: Figures, python: str = sys.executable) -> None:
    """A part in a process of its own: an error of the device ends every later use of it in the same process."""
    limit = PARTS[part][1] * (1 if ON_GPU else 20)
    command = [python, __file__, "--part", part, "--into", str(figures.path), *(["--quick"] if quick else [])]
    environment = dict(os.environ) | ({} if ON_GPU else {"SPARSIFY_DISABLE_TRITON": "1"})  # sparsify has a decoder in Triton
    try:
        done = subprocess.run(command, stdout=sys.stderr, env=environment, timeout=limit + 15)
    except subprocess.TimeoutExpired:
        figures.add(part, "error", way=lambda: f"ended after {limit + 15:.0f} s")
    else:
        if done.returncode:
            figures.add(part, "error", way=lambda: f"exit code {done.returncode}; stderr says why")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that every line runs")
    own = [part for part in PARTS if part != "peers"]
    parser.add_argument("--parts", nargs="+", choices=own, default=own, help="only these; without rates, there are no floors")
    parser.add_argument("--peers", action="store_true", help="also other libraries, which are downloaded first")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not ON_GPU:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported
        if not options.quick:
            parser.error("there is no CUDA GPU: without one, there is only --quick, whose times mean nothing")
    if options.part:
        measure, limit = PARTS[options.part]
        end = time.monotonic() + limit if ON_GPU else math.inf
        measure(Figures(options.into, end), QUICK if options.quick else Sizes())
        return
    with tempfile.TemporaryDirectory() as temporary:
        figures = Figures(Path(temporary) / "figures")
        figures.path.touch()
        start = time.monotonic()
        for part in options.parts:
            run(part, options.quick, figures)
        if options.peers:
            from sae_peers import make_venv

            run("peers", options.quick, figures, str(make_venv(Path(tempfile.gettempdir()) / "sae_peers")))
        figures.add("seconds", way=lambda: time.monotonic() - start)
        print(json.dumps(figures.read(), indent=1))


if __name__ == "__main__":
    main()
