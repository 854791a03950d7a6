"""The zero-shot baseline: its weights, and the stage."""

import csv
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dncbm.probe.zero_shot
from dncbm.features.encoders import Encoder
from dncbm.probe.zero_shot import default_templates, evaluate_zero_shot, majority_accuracy, zero_shot_weight
from dncbm.runs.artifacts import Artifacts
from dncbm.runs.declarations import SPLITS, ProbeFeatures, Prompts
from dncbm.runs.errors import StaleArtifact
from dncbm.runs.manifests import Outcome, read_manifest
from dncbm.runs.results import read_results
from dncbm.runs.settings import Settings

CPU = torch.device("cpu")
MINE = ProbeFeatures("mine", "enc", "out")
WORDS = {"a photo of a red fox.": [2.0, 0, 0], "a photo of a cat.": [0, 3.0, 0], "cat": [0, 0, 1.0], "red fox": [0, 1.0, 1.0]}
SIZES = {"train": 12, "train_val": 4, "val": 30}


class Texts:
    """A text tower that knows WORDS."""

    def __init__(self) -> None:
        self.width = 3
        self.asked: list[str] = []
        self.loaded: list[tuple] = []

    def encode_texts(self, texts: list[str]) -> torch.Tensor:
        self.asked += texts
        return torch.nn.functional.normalize(torch.tensor([WORDS[text][: self.width] for text in texts]), dim=-1)

    def load(self, settings: Settings, *how: object) -> "Texts":
        self.loaded.append(how)
        return self


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> Texts:
    tower = Texts()
    monkeypatch.setattr(dncbm.probe.zero_shot, "load_encoder", tower.load)
    monkeypatch.setattr(dncbm.probe.zero_shot, "describe_encoder", lambda settings, name, made: {"encoder": name})
    return tower


def features(split: str) -> np.ndarray:
    return np.random.default_rng(list(SIZES).index(split)).normal(size=(SIZES[split], 3)).astype(np.float32)


LABELS = {split: np.random.default_rng(7).integers(0, 2, n) for split, n in SIZES.items()}


@pytest.fixture
def settings(make_settings: Callable[..., Settings], make_store, write_labels) -> Settings:
    settings = make_settings(probe_datasets={"mine": "images"})
    for split in SIZES:
        make_store(Artifacts(settings).features("mine", "enc", "out", split), [features(split)])
    about = {"class_names": ["/r/red_fox", "cat"], "group_names": ["forest", "home"]}
    write_labels(settings, about, {split: LABELS[split] for split in ("train", "val")}, np.arange(30) % 2)
    return settings


def evaluate(settings: Settings, *templates: str, **options) -> Outcome:
    return evaluate_zero_shot(settings, MINE, Prompts(templates), **{"device": "cpu"} | options)


def test_the_majority_class_is_the_one_of_the_training_labels() -> None:
    assert majority_accuracy(torch.tensor([2, 2, 0, 1]), torch.tensor([2, 0, 0, 0, 2])) == pytest.approx(0.4)


def test_weights_are_mean_descriptions() -> None:
    class Sums(torch.nn.Module):
        def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(tokens, 4).sum(dim=1).float()

    tokens = {"a cat": [0, 1], "the cat": [0, 2], "a dog": [3, 1], "the dog": [3, 2]}
    encoder = Encoder("texts", Sums(), lambda image: image, lambda texts: torch.tensor([tokens[t] for t in texts]), CPU)
    weight = zero_shot_weight(encoder, ["cat", "dog"], ("a {}", "the {}"))
    expected = torch.tensor([[2.0, 1, 1, 0], [0, 1, 1, 2]])
    torch.testing.assert_close(weight.T, expected / 6**0.5)


def test_features_are_classified_by_the_nearest_description(settings: Settings, texts: Texts) -> None:
    assert evaluate_zero_shot(settings, MINE, device="cpu") is Outcome.RAN
    assert texts.asked == ["a photo of a red fox.", "a photo of a cat."]
    assert texts.loaded == [("enc", CPU, "fp32")]
    artifacts = Artifacts(settings)
    labels = {split: LABELS[settings.own_split("mine", split)][: SIZES[split]] for split in SPLITS}
    expected = {split: (features(split)[:, 1] > features(split)[:, 0]) == labels[split] for split in SPLITS}
    (row,) = read_results(artifacts.probe_results())
    described = [row[key] for key in ("probe_dataset", "method", "on", "encoder", "hook", "sae", "seed")]
    assert described == ["mine", "zero_shot", "features", "enc", "out", "", ""]
    for split, right in expected.items():
        assert float(row[f"{split}_top1"]) == pytest.approx(right.mean(), rel=1e-5)
        assert (row[f"{split}_top5"], row[f"{split}_loss"]) == ("1", "")
    assert load_file(artifacts.zero_shot(MINE))["weight"].tolist() == [[1, 0, 0], [0, 1, 0]]
    with artifacts.zero_shot_accuracies(MINE).open(newline="") as file:
        accuracies = list(csv.DictReader(file))
    assert [(line["kind"], line["name"]) for line in accuracies] == [
        ("class", "/r/red_fox"), ("class", "cat"), ("group", "forest"), ("group", "home")
    ]  # fmt: skip
    for line in accuracies:
        members = (LABELS["val"] if line["kind"] == "class" else np.arange(30) % 2) == int(line["index"])
        assert float(line["top1"]) == pytest.approx(expected["val"][members].mean(), rel=1e-5)
    worst = min(float(line["top1"]) for line in accuracies if line["kind"] == "group")
    assert float(row["val_worst_group_top1"]) == pytest.approx(worst, rel=1e-5)
    manifest = read_manifest(artifacts.zero_shot(MINE))
    assert manifest["run"] == {"probe_dataset": "mine", "img_enc_name": "enc", "hook_points": "out"}
    assert manifest["details"]["metrics"]["val_top1"] == pytest.approx(expected["val"].mean())


def test_embeddings_of_several_templates_are_averaged(settings: Settings, texts: Texts) -> None:
    evaluate(settings, "a photo of a {}.", "{}")
    weight = load_file(Artifacts(settings).zero_shot(MINE))["weight"]
    half = 0.5**0.5
    expected = torch.nn.functional.normalize(torch.tensor([[1, half, half], [0, 1, 1]]), dim=1)
    torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize(
    ("template", "name", "text"),
    [
        ("{0} {}", "cat", "{0} cat"),
        ("a {name} of {}", "cat", "a {name} of cat"),
        ("{} } {", "cat", "cat } {"),
        ("{{}", "cat", "{cat"),
        ("a {}", "{} {0} }", "a {} {0} }"),
        ("a {}, large", "bow, tie", "a bow, tie, large"),
        ("{}", "b\udcffd", "b?d"),
    ],
)
def test_only_empty_braces_stand_for_the_class(template: str, name: str, text: str) -> None:
    asked: list[str] = []

    def encode_texts(texts: list[str]) -> torch.Tensor:
        asked.extend(texts)
        return torch.ones(len(texts), 3)

    zero_shot_weight(SimpleNamespace(encode_texts=encode_texts), [name], [template])
    assert asked == [text]
    text.encode()


def test_another_encoder_than_that_of_the_features_is_named(settings: Settings, texts: Texts, refusal) -> None:
    texts.width = 2
    with refusal("2 features", "05_save_probe_features.py", "--overwrite"):
        evaluate(settings)


def test_done_stale_and_refused(settings: Settings, texts: Texts, make_store, refusal) -> None:
    evaluate(settings)
    assert evaluate(settings, device="nonsense") is Outcome.ALREADY_DONE
    assert len(texts.loaded) == 1
    with pytest.raises(StaleArtifact, match="templates was"):
        evaluate(settings, "{}")
    assert evaluate(settings, "{}", overwrite=True) is Outcome.RAN
    assert len(read_results(Artifacts(settings).probe_results())) == 1, "that of the classifier that is there"
    for template in ("a photo", "{} {}"):
        with refusal(repr(template)):
            evaluate(settings, template)
    with refusal("05_save_probe_features.py"):
        evaluate_zero_shot(settings, ProbeFeatures("mine", "other"), device="cpu")
    make_store(Artifacts(settings).features("mine", "enc", "out", "val"), [features("val") + 1])
    with refusal("val features has changed"):
        evaluate(settings, "{}")
    with refusal("--device nonsense"):
        evaluate(settings, "{}", device="nonsense", overwrite=True)


def test_imagenets_templates_are_open_clips() -> None:
    from open_clip import OPENAI_IMAGENET_TEMPLATES

    templates = default_templates("imagenet")
    assert len(templates) == 80
    assert [template.format("cat") for template in templates] == [make("cat") for make in OPENAI_IMAGENET_TEMPLATES]
    assert default_templates("cifar10") == ("a photo of a {}.",)
