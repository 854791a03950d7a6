"""The browser of a large run: how long making it takes, how big it is, and how fast its pages are.

    python benchmarks/browser.py [--quick] [--keep FOLDER]

Makes up 8192 latents with names, four data sets of 36,500 images each (JPEGs of 500 x 375 pixels) with 50 active latents per
image, and a probe with 365 classes. Prints one JSON object. `make_s`: the seconds that stage 16 takes in a process of its own,
of which `make_thumbnails_s` are those of the images; `make_again_s`: those of making it again, when thumbnails are kept;
`make_peak_rss_mib`; `folder_mb`, of which `thumbnails_mb`, and `files`.

The other figures are of the pages, opened from file:// in headless Chromium, each in seconds from the click to the view:
`first_view_s`, the start page in a new browser; `concepts_s`, the list of all concepts, then; `concept_median_s` and
`concept_worst_s` of random concepts, all of whose images are decoded; `image_first_s`, an image with all weights to load, and
`image_median_s`, further ones; `search_median_s`, one key stroke; `edit_median_s`, one move of a slider; `accuracy_s`, the
accuracy of all images of the split without the concept that is active most often. `memory_mib`: the memory of the process of
the page after all this (proportional set size), `memory_collected_mib` the same once garbage is collected, which Chromium puts
off, of which `memory_images_mib` are decoded images, which it drops when memory is short; `memory_empty_mib`: an empty page.
Chromium is driven through its debugging pipe, since with Playwright the page would also hold a record of all responses.
"""

import argparse
import io
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
import torch
from PIL import Image

from dncbm.browser import stage, thumbnails
from dncbm.concepts.naming import ConceptName, write_names
from dncbm.concepts.strengths import write_part
from dncbm.features.datasets.probe import ProbeShards, probe_images
from dncbm.probe.fit import save_probe
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import Browse, Explained, ProbeRun, SAERun
from dncbm.runs.manifests import making, manifest_path, write_json
from dncbm.runs.settings import Settings, load_settings
from sparse_autoencoder import SparseAutoencoder, save_checkpoint
from sparse_autoencoder.declare import values

D, ACTIVE, KINDS, PER_KIND, PHOTOS = 1024, 50, 400, 90, 500
RUN = SAERun(encoder="made_up", dataset="photos")
CHROMIUM = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
Sizes = dict[str, int]


# ------------------------------------------------------------------------------------------------------ a made-up run


def photo(rng: np.random.Generator) -> bytes:
    """A JPEG of 500 x 375 pixels with structure at every scale, as photographs have."""
    pixels = np.full((375, 500, 3), 128.0)
    for scale in (2, 4, 8, 16, 32, 64, 128):
        noise = Image.fromarray(rng.integers(0, 256, (375 // scale + 2, 500 // scale + 2, 3), dtype=np.uint8))
        pixels += (np.asarray(noise.resize((500, 375), Image.Resampling.BICUBIC), dtype=float) - 128) * (scale / 128) ** 0.5
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def write_images(root: Path, sizes: Sizes) -> None:
    """Links to PHOTOS different files; the classes are folders."""
    rng = np.random.default_rng(0)
    (root / "originals").mkdir(parents=True)
    originals = [root / "originals" / f"{number}.jpg" for number in range(PHOTOS)]
    for path in originals:
        path.write_bytes(photo(rng))
    for dataset in range(sizes["datasets"]):
        for index in range(sizes["images"]):
            of_class = f"class {index * sizes['classes'] // sizes['images']:03d}"
            for split, n in (("val", sizes["images"]), ("train", sizes["classes"])):
                folder = root / f"d{dataset}" / split / (of_class if split == "val" else f"class {index:03d}")
                if index < n:
                    folder.mkdir(parents=True, exist_ok=True)
                    os.link(originals[(index * 7 + dataset) % PHOTOS], folder / f"{index:06d}.jpg")


def strengths(sizes: Sizes, seed: int) -> scipy.sparse.csr_matrix:
    """Strengths of images of KINDS kinds; a kind has PER_KIND concepts, and each of its images ACTIVE of them."""
    rng, n = np.random.default_rng(seed), sizes["images"]
    kinds = np.stack([np.random.default_rng(kind).choice(sizes["latents"], PER_KIND, replace=False) for kind in range(KINDS)])
    columns = kinds[rng.integers(0, KINDS, n)[:, None], rng.random((n, PER_KIND)).argsort(axis=1)[:, :ACTIVE]]
    data = rng.exponential(size=n * ACTIVE).astype(np.float32)
    return scipy.sparse.csr_matrix((data, columns.ravel(), np.arange(0, n * ACTIVE + 1, ACTIVE)), shape=(n, sizes["latents"]))


def make(path: Path, write: Callable[[], object], run: dict[str, Any], inputs: dict[str, str] | None = None) -> None:
    """Make an artifact with its manifest, as a stage would."""
    with making(path, "benchmark", {}, inputs or {}, overwrite=True, run=run) as work:
        write()
        work.done([path] if path.is_file() else path.glob("0*"))


def write_dataset(settings: Settings, dataset: str, z: scipy.sparse.csr_matrix) -> None:
    """The split, the manifest of the features, and the strengths of a data set."""
    artifacts, images = Artifacts(settings), probe_images(settings, dataset, "val")
    split, features = artifacts.probe_split(dataset), artifacts.features(dataset, RUN.encoder, RUN.hook, "val")
    make(split, lambda: write_json(split, {"class_names": list(images.class_names)}), {})
    np.save(artifacts.labels(dataset, "val"), images.labels)
    keys, folder = np.arange(z.shape[0]), artifacts.strengths(RUN, dataset, "val")
    of_images = {f"val images of {dataset}": ProbeShards(images, keys).fingerprint()}
    make(features, lambda: np.save(features / "00000.npy", np.zeros(1)), {}, of_images)
    make(folder, lambda: write_part(folder / "00000.npz", z, keys), values(RUN))


def write_run(root: Path, sizes: Sizes) -> Settings:
    """A config, and the artifacts of all stages that the browser reads, with their manifests."""
    datasets = {f"d{number}": f"d{number}" for number in range(sizes["datasets"])}
    config = {name: name for name in ("data_dir", "sae_dir", "probe_dir", "vocab_dir", "analysis_dir")}
    lines = [f"{key} = {value!r}" for key, value in config.items()]
    lines += ["vocabulary = 'words'", "sae_datasets = {'photos': 'originals'}", f"probe_datasets = {datasets!r}"]
    (root / "config.py").write_text("\n".join([*lines, "encoders = {'made_up': ('RN50-quickgelu', 'openai')}\n"]))
    settings = load_settings(root / "config.py")
    artifacts, rng, f = Artifacts(settings), np.random.default_rng(1), sizes["latents"]
    probe = ProbeRun("d0")
    sae, names = artifacts.sae(RUN), artifacts.concept_names(RUN)
    make(sae, lambda: save_checkpoint(SparseAutoencoder(D, f, seed=1), sae), values(RUN))
    of_latents = [ConceptName(i, f"word {i * 7 % (f - f // 5)}", float(rng.random() / 2)) for i in range(f)]
    make(names, lambda: write_names(names, of_latents), values(RUN))
    for number, dataset in enumerate(datasets):
        write_dataset(settings, dataset, strengths(sizes, number))
    weight = torch.from_numpy((rng.normal(size=(f, sizes["classes"])) / 10).astype(np.float32))
    path = artifacts.probe(RUN, probe)
    make(path, lambda: save_probe(weight, path), values(RUN) | values(probe))
    return settings


# ------------------------------------------------------------------------------------------------------------- making


def measure_making(config: Path, folder: Path) -> dict[str, float]:
    in_thumbnails, write = [0.0], thumbnails.write_thumbnails

    def timed(*args: Any, **more: Any) -> Any:
        start = time.perf_counter()
        found = write(*args, **more)
        in_thumbnails[0] += time.perf_counter() - start
        return found

    stage.write_thumbnails = timed  # type: ignore[attr-defined]
    start = time.perf_counter()
    stage.write_browser(load_settings(config), RUN, ProbeRun("d0"), Explained(), Browse(folder), device="cpu", overwrite=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"s": time.perf_counter() - start, "thumbnails_s": in_thumbnails[0], "peak_rss_mib": peak}


def made(config: Path, folder: Path) -> dict[str, float]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_making, config, folder).result()


# ---------------------------------------------------------------------------------------------------------- the pages


def memory_mib(of: str, field: str = "Pss") -> float:
    """Proportional set size of the largest renderer of the Chromium whose command line holds a text."""
    found = [0.0]
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().decode(errors="replace")
            if "--type=renderer" in line and of in line:
                found.append(int(re.findall(rf"^{field}:\s+(\d+)", (process / "smaps_rollup").read_text(), re.M)[0]) / 1024)
        except OSError:  # it has ended
            continue
    return max(found)


class Tab:
    """A page of a headless Chromium that is driven through its debugging pipe.

    Playwright would have the page record all that it loads, which counts as its memory.
    """

    def __init__(self, profile: str) -> None:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        (reads, self._to), (self._answers, writes) = os.pipe(), os.pipe()
        command = f'exec "$@" 3<&{reads} 4>&{writes}'
        options = ["--headless", "--remote-debugging-pipe", f"--user-data-dir={profile}", *CHROMIUM, "about:blank"]
        started = ["sh", "-c", command, "sh", str(program), *options]
        self._process = subprocess.Popen(started, pass_fds=(reads, writes), stderr=subprocess.DEVNULL)
        os.close(reads)
        os.close(writes)
        self._received, self._sent, self._session = b"", 0, {}
        pages = [one for one in self.send("Target.getTargets")["targetInfos"] if one["type"] == "page"]
        attached = self.send("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = {"sessionId": attached["sessionId"]}

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the debugging protocol and wait for its answer."""
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params, **self._session}
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._received:
                more = os.read(self._answers, 1 << 16)
                if not more:
                    raise RuntimeError("Chromium has ended")
                self._received += more
            line, _, self._received = self._received.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._sent:  # others are events
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                found: dict[str, Any] = answer["result"]
                return found

    def run(self, function: str, *args: Any) -> Any:
        """What a JavaScript function returns, or its promise fulfils."""
        code = f"({function})({', '.join(map(json.dumps, args))})"
        found = self.send("Runtime.evaluate", expression=code, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{code[:200]}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def close(self) -> None:
        self.send("Browser.close")
        self._process.wait()


def measure_pages(folder: Path, sizes: Sizes) -> dict[str, float]:
    draw = random.Random(0)

    def seconds(hash_: str) -> float:
        """From the change of the address until the view and all of its images are there."""
        start = time.perf_counter()
        tab.run(GO, hash_)
        tab.run(DECODED)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        tab = Tab(profile)
        found: dict[str, float] = {"memory_empty_mib": memory_mib(profile)}
        start = time.perf_counter()
        tab.send("Page.navigate", url=(folder / "index.html").as_uri())
        tab.run(SHOWN)
        found["first_view_s"] = time.perf_counter() - start
        found["concepts_s"] = seconds("#/concepts")
        strokes = [tab.run(STROKE, "input[type=search]", "word 12"[:n]) for n in range(1, 8)]
        found["search_median_s"] = statistics.median(strokes) / 1000
        tab.run(DECODED)  # what was found is looked at before the next click
        times = [seconds(f"#/concept/{draw.randrange(sizes['latents'])}") for _ in range(40)]
        found |= {"concept_median_s": statistics.median(times), "concept_worst_s": max(times)}
        found["image_first_s"] = seconds("#/image/0/0")
        times = [seconds(f"#/image/0/{draw.randrange(sizes['images'])}") for _ in range(40)]
        found["image_median_s"] = statistics.median(times)
        moves = [tab.run(STROKE, "input[type=range]", str(n / 10)) for n in range(10)]
        found["edit_median_s"] = statistics.median(moves) / 1000
        found["accuracy_s"] = tab.run(ACCURACY) / 1000
        found["memory_mib"] = memory_mib(profile)
        tab.send("HeapProfiler.collectGarbage")
        found |= {"memory_collected_mib": memory_mib(profile), "memory_images_mib": memory_mib(profile, "Pss_Shmem")}
        tab.close()
    return found


SHOWN = """() => new Promise((done) => {
  const look = () => (document.getElementById('content')?.dataset.shown ? done() : setTimeout(look, 1));
  look();
})"""
GO = """(hash) => new Promise((done) => {
  location.hash = hash;
  const look = () => (document.getElementById('content').dataset.shown === hash ? done() : setTimeout(look, 1));
  look();
})"""
"""Go to a view and wait until it is shown."""
DECODED = """async () => {
  const urls = new Set([...document.querySelectorAll('.picture')].map((one) => one.style.backgroundImage.slice(5, -2)));
  urls.delete('');
  await Promise.all([...urls].map((url) => { const image = new Image(); image.src = url; return image.decode(); }));
}"""
"""Wait until the images of a view are decoded."""
STROKE = """(found, value) => {
  const element = document.querySelector(found);
  const start = performance.now();
  element.value = value;
  element.dispatchEvent(new Event('input', {bubbles: true}));
  return new Promise((done) => requestAnimationFrame(() => setTimeout(() => done(performance.now() - start))));
}"""
ACCURACY = """async () => {
  const concepts = await ofRun(0, 'concepts');
  let most = 0;
  for (let f = 0; f < concepts.labels.length; f++) {
    if (concepts.activity.row(f)[0] > concepts.activity.row(most)[0]) most = f;
  }
  const start = performance.now();
  await accuracyWith(currentRoute(), new Map([[most, 0]]), () => {}, new AbortController().signal);
  return performance.now() - start;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2,048 latents, two data sets of 3,650 images")
    parser.add_argument("--keep", type=Path, help="folder in which the site stays")
    args = parser.parse_args()
    sizes = {"latents": 8192, "datasets": 4, "images": 36_500, "classes": 365}
    if args.quick:
        sizes |= {"latents": 2048, "datasets": 2, "images": 3650}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        write_images(root, sizes)
        settings, folder = write_run(root, sizes), (args.keep or root / "site").absolute()
        first = made(settings.path, folder)
        manifest_path(folder).unlink()
        again = made(settings.path, folder)
        files = [path for path in folder.rglob("*") if path.is_file()]
        megabytes = {name: sum(path.stat().st_size for path in chosen) / 1e6 for name, chosen in {
            "folder_mb": files, "thumbnails_mb": [path for path in files if "thumbnails" in path.parts]}.items()}  # fmt: skip
        result = sizes | {f"make_{name}": value for name, value in first.items()} | {"make_again_s": again["s"]} | megabytes
        result |= {"files": len(files)} | measure_pages(folder, sizes)
    print(json.dumps({key: round(value, 4) for key, value in result.items()}, indent=2))


if __name__ == "__main__":
    main()
