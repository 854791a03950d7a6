import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dncbm.zero_shot
from dncbm.artifacts import Artifacts
from dncbm.errors import StaleArtifact
from dncbm.manifests import Outcome, Recipe, begin, finish, write_json
from dncbm.results import read_results
from dncbm.settings import Settings
from dncbm.zero_shot import default_templates, evaluate_zero_shot

WORDS = {
    "a photo of a red fox.": [2.0, 0, 0],
    "a photo of a cat.": [0, 3.0, 0],
    "cat": [0, 0, 1.0],
    "red fox": [0, 1.0, 1.0],
}
SIZES = {"train": 12, "train_val": 4, "val": 30}


class Texts:
    """A text tower that knows WORDS."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        self.asked += texts
        return torch.nn.functional.normalize(torch.tensor([WORDS[text] for text in texts]), dim=-1)


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Texts:
    tower = Texts()
    monkeypatch.setattr(dncbm.zero_shot, "load_encoder", lambda settings, name, device, precision: tower)
    monkeypatch.setattr(dncbm.zero_shot, "describe_encoder", lambda settings, name: {"encoder": name})
    return tower


def features(split: str) -> np.ndarray:
    return np.random.default_rng(list(SIZES).index(split)).normal(size=(SIZES[split], 3)).astype(np.float32)


LABELS = {split: np.random.default_rng(7).integers(0, 2, n) for split, n in SIZES.items()}


@pytest.fixture
def settings(make_settings: Callable[..., Settings], make_store) -> Settings:
    settings = make_settings(probe_datasets={"mine": "images"})
    artifacts = Artifacts(settings)
    for split in SIZES:
        make_store(artifacts.features("mine", "enc", "out", split), [features(split)])
    recipe = Recipe("probe_split")
    begin(artifacts.probe_split("mine"), recipe, overwrite=True)
    write_json(artifacts.probe_split("mine"), {"class_names": ["/r/red_fox", "cat"], "group_names": ["forest", "home"]})
    for split in ("train", "val"):
        np.save(artifacts.labels("mine", split), LABELS[split])
    np.save(artifacts.groups("mine", "val"), np.arange(30) % 2)
    finish(artifacts.probe_split("mine"), recipe, [artifacts.probe_split("mine")])
    return settings


def evaluate(settings: Settings, **options) -> Outcome:
    return evaluate_zero_shot(settings, "enc", "out", "mine", device="cpu", **options)


def test_features_are_classified_by_the_nearest_description(settings: Settings, texts: Texts) -> None:
    assert evaluate(settings) is Outcome.RAN
    assert texts.asked == ["a photo of a red fox.", "a photo of a cat."]
    artifacts = Artifacts(settings)
    expected = {split: (features(split)[:, 1] > features(split)[:, 0]) == LABELS[split] for split in ("train", "val")}
    (row,) = read_results(artifacts.probe_results())
    assert (row["method"], row["on"], row["encoder"], row["sae"], row["seed"]) == (
        "zero_shot",
        "features",
        "enc",
        "",
        "",
    )
    for split, right in expected.items():
        assert float(row[f"{split}_top1"]) == pytest.approx(right.mean(), rel=1e-5)
        assert (row[f"{split}_top5"], row[f"{split}_loss"]) == ("1", "")
    assert load_file(artifacts.zero_shot("mine", "enc", "out"))["weight"].tolist() == [[1, 0, 0], [0, 1, 0]]
    with artifacts.zero_shot_accuracies("mine", "enc", "out").open(newline="") as file:
        accuracies = list(csv.DictReader(file))
    assert [(line["kind"], line["name"]) for line in accuracies] == [
        ("class", "/r/red_fox"), ("class", "cat"), ("group", "forest"), ("group", "home")
    ]  # fmt: skip
    for line in accuracies:
        members = (LABELS["val"] if line["kind"] == "class" else np.arange(30) % 2) == int(line["index"])
        assert float(line["top1"]) == pytest.approx(expected["val"][members].mean(), rel=1e-5)
    worst = min(float(line["top1"]) for line in accuracies if line["kind"] == "group")
    assert float(row["val_worst_group_top1"]) == pytest.approx(worst, rel=1e-5)


def test_embeddings_of_several_templates_are_averaged(settings: Settings, texts: Texts) -> None:
    evaluate(settings, templates=("a photo of a {}.", "{}"))
    weight = load_file(Artifacts(settings).zero_shot("mine", "enc", "out"))["weight"]
    half = 0.5**0.5
    expected = torch.nn.functional.normalize(torch.tensor([[1, half, half], [0, 1, 1]]), dim=1)
    torch.testing.assert_close(weight, expected)


def test_done_stale_and_refused(settings: Settings, texts: Texts, refusal) -> None:
    evaluate(settings)
    assert evaluate(settings) is Outcome.ALREADY_DONE
    with pytest.raises(StaleArtifact, match="templates was"):
        evaluate(settings, templates=("{}",))
    assert evaluate(settings, templates=("{}",), overwrite=True) is Outcome.RAN
    assert len(read_results(Artifacts(settings).probe_results())) == 2
    for template in ("a photo", "{} {}"):
        with refusal(repr(template)):
            evaluate(settings, templates=(template,))
    with refusal("05_save_probe_features.py"):
        evaluate_zero_shot(settings, "other", "out", "mine", device="cpu")


def test_imagenets_templates_are_open_clips() -> None:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    templates = default_templates("imagenet")
    assert len(templates) == 80
    assert [template.format("cat") for template in templates] == [make("cat") for make in OPENAI_IMAGENET_TEMPLATES]
    assert default_templates("cifar10") == ("a photo of a {}.",)


def test_no_results_are_named(settings: Settings, tmp_path: Path, refusal) -> None:
    with refusal(Artifacts(settings).probe_results()):
        read_results(Artifacts(settings).probe_results())
