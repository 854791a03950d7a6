"""Measures what the extraction of features costs beyond decoding and encoding, and that its memory stays bounded.

    python benchmarks/extraction.py [--quick]

Prints one JSON object. `efficiency` is (seconds to decode and preprocess all images alone + seconds to encode them alone) /
(seconds of the stage that does both, from tars to finished files with their manifest, without loading the encoder).
The three are measured in turn on the same images, so that other load on the machine affects them alike; the median of the
rounds' ratios is printed. `one_shard_speedup` is the time that one worker takes to decode a single shard, divided by the time
that as many workers as cores take, each time for a whole stage with an encoder that costs nothing.
`peak_rss_ratio_8n_over_n` compares the peak memory of two fresh processes that extract 8n and n images, the encoder included:
the peak of the main process plus that of a decoding process.

JPEG images of 256 pixels, as img2dataset writes them; the encoder of the embedded default where it is built
(`examples/openmoji/build.py`), else a small ViT of open_clip with random weights; the CPU.
"""

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import dncbm  # noqa: F401  before torch, whose threads it asks not to spin

# isort: split
import numpy as np
import torch
from PIL import Image

from dncbm.features.datasets import open_image, to_rgb
from dncbm.features.datasets.sae import WebdatasetShards
from dncbm.features.encoders import Encoder, load_encoder
from dncbm.features.encoding import encode_shards
from dncbm.features.store import ARRAYS
from dncbm.runs.declarations import Extraction
from dncbm.runs.devices import default_cores, keep_freed_memory
from dncbm.runs.manifests import making
from dncbm.runs.settings import load_settings

EXAMPLE = Path(__file__).parent.parent / "examples" / "openmoji"
CPU = torch.device("cpu")
EXTRACTION = Extraction(batch_size=32, num_workers=1)
SHARD = 128


def the_encoder() -> Encoder:
    """The embedded default's, or one of about its size."""
    if (EXAMPLE / "run" / "clip" / "open_clip_config.json").is_file():
        return load_encoder(load_settings(EXAMPLE / "config.py"), "openmoji_clip", CPU)
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms("ViT-S-32", load_weights=False)
    return Encoder("ViT-S-32, random", model.eval(), preprocess, open_clip.get_tokenizer("ViT-S-32"), CPU)


class FreeTower(torch.nn.Module):
    """An image tower that costs nothing."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images[:, :, 0, 0]


def write_tars(folder: Path, n_images: int, shard: int = SHARD) -> WebdatasetShards:
    """Shards of JPEGs: smooth colours with some grain, 64 different ones over and over."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(64):
        smooth = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((256, 256), Image.Resampling.BICUBIC)
        grainy = np.clip(np.asarray(smooth) + rng.normal(0, 12, (256, 256, 3)), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(grainy).save(buffer, "jpeg", quality=95)
        encoded.append(buffer.getvalue())
    paths: list[Path] = []
    for first in range(0, n_images, shard):
        paths.append(folder / f"{len(paths):05d}.tar")
        with tarfile.open(paths[-1], "w") as tar:
            for number in range(first, min(first + shard, n_images)):
                member = tarfile.TarInfo(f"{number:09d}.jpg")
                member.size = len(encoded[number % 64])
                tar.addfile(member, io.BytesIO(encoded[number % 64]))
    return WebdatasetShards(tuple(paths))


def stage(shards: WebdatasetShards, encoder: Encoder, folder: Path, extraction: Extraction = EXTRACTION) -> int:
    """Stage 1 for one split. Returns the number of images."""
    with making(folder, "sae_features", {}, {"images": shards.fingerprint()}, overwrite=False) as work:
        details = encode_shards(shards, encoder, folder, extraction, folder.name)
        work.done(folder.glob(ARRAYS), **details)
    return int(details["images"])


def efficiency(n_images: int, rounds: int) -> dict[str, float]:
    """The parts alone and the stage, in turn."""
    encoder = the_encoder()
    seconds: dict[str, list[float]] = {"decode": [], "encode": [], "stage": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = write_tars(folder, n_images)
        stage(WebdatasetShards(shards.paths[:1]), encoder, folder / "warm-up")
        for number in range(rounds):
            start = time.perf_counter()
            loads = (load for i in range(len(shards)) for _, load in shards.read(i, print))
            images = [encoder.preprocess(to_rgb(open_image(load()))[0]) for load in loads]
            seconds["decode"].append(time.perf_counter() - start)
            batches = [torch.stack(images[first : first + 32]) for first in range(0, len(images), 32)]
            del images
            start = time.perf_counter()
            for batch in batches:
                encoder.encode_images(batch)
            seconds["encode"].append(time.perf_counter() - start)
            del batches
            start = time.perf_counter()
            n_encoded = stage(shards, encoder, folder / f"round {number}")
            seconds["stage"].append(time.perf_counter() - start)
            assert n_encoded == n_images
    ratios = [(d + e) / s for d, e, s in zip(*seconds.values(), strict=True)]
    return {
        "efficiency": round(statistics.median(ratios), 3),
        "efficiency_lowest": round(min(ratios), 3),
        "efficiency_highest": round(max(ratios), 3),
        **{f"{part}_s": round(statistics.median(values), 2) for part, values in seconds.items()},
    }


def one_shard_speedup(n_images: int, rounds: int) -> float:
    """How much faster all cores decode a shard than one, the median of the rounds."""
    encoder = replace(the_encoder(), model=FreeTower())
    ratios = []
    with tempfile.TemporaryDirectory() as name:
        shards = write_tars(Path(name), n_images, n_images)
        for number in range(rounds):
            seconds = []
            for n_workers in (1, default_cores()):
                start = time.perf_counter()
                extraction = replace(EXTRACTION, num_workers=n_workers)
                stage(shards, encoder, Path(name) / f"round {number} of {n_workers}", extraction)
                seconds.append(time.perf_counter() - start)
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def peak_rss(n_images: int) -> int:
    """Peak memory in MiB of extracting this many images, measured in a process of its own."""
    command = [sys.executable, __file__, "--peak_rss_of", str(n_images)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return int(done.stdout.split()[-1])


def print_peak_rss(n_images: int) -> None:
    """In that process."""
    with tempfile.TemporaryDirectory() as name:
        stage(write_tars(Path(name), n_images), the_encoder(), Path(name) / f"{n_images} images")
    status = Path("/proc/self/status").read_text()  # getrusage would count what this process was started from
    own = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    print((own + resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) // 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds: about a minute")
    parser.add_argument("--peak_rss_of", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep_freed_memory()
    if args.peak_rss_of:
        print_peak_rss(args.peak_rss_of)
        return
    n_images, rounds, n = (1024, 3, 128) if args.quick else (2048, 5, 1024)
    of_n, of_8n = peak_rss(n), peak_rss(8 * n)
    found = efficiency(n_images, rounds)
    found["one_shard_speedup"] = round(one_shard_speedup(n_images, rounds), 2)
    print(
        json.dumps(
            {
                **found,
                "peak_rss_ratio_8n_over_n": round(of_8n / of_n, 3),
                "peak_rss_n_mib": of_n,
                "peak_rss_8n_mib": of_8n,
                "n": n,
                "images": n_images,
                "rounds": rounds,
                "encoder": the_encoder().name,
                "threads": torch.get_num_threads(),
                "cpus": os.cpu_count(),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
