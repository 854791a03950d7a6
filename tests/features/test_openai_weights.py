"""OpenAI's models against OpenAI's own code (the package clip-anytorch).

The true architectures are compared by their parameters, heads and activations, without memory for weights; the features and
embeddings are compared on smaller architectures with random weights.
"""

import importlib.util
import json
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import nn

from dncbm.features.encoders import load_encoder
from dncbm.runs.settings import load_settings

pytestmark = pytest.mark.slow

CPU, META = torch.device("cpu"), torch.device("meta")
REPOSITORY = Path(__file__).parents[2]
# width of the embedding, image resolution, vision layers, width and patch, context, words, text width, heads and layers
TRUE = {
    "clip_RN50": (1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12),
    "clip_ViT-B/16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
    "clip_ViT-L/14": (768, 224, 24, 1024, 14, 77, 49408, 768, 12, 12),
}
SMALL = {"resnet": (32, 64, (1, 2, 1, 1), 16, None, 77, 49408, 128, 2, 2), "vit": (32, 64, 2, 128, 16, 77, 49408, 128, 2, 2)}
TEXTS = ["dog", "a photo of a red apple", "The Eiffel Tower, at night!", "naïve café"]


@cache
def openais(module: str) -> ModuleType:
    """A module of OpenAI's package, without the package's own import, which needs an old setuptools."""
    package = importlib.util.find_spec("clip")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0]) / f"{module}.py"
    spec = importlib.util.spec_from_file_location(f"openais_{module}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def on_meta(monkeypatch) -> None:
    """open_clip makes models without memory for their weights, and loads none."""
    create = open_clip.create_model_and_transforms

    def without_weights(model: str, force_quick_gelu: bool, **_: object) -> Any:
        return create(model, pretrained=None, force_quick_gelu=force_quick_gelu, device=META)

    monkeypatch.setattr(open_clip, "create_model_and_transforms", without_weights)


def described(model: nn.Module) -> tuple[object, ...]:
    """Names and shapes of the parameters, heads of the attention layers, number of QuickGELU and GELU activations."""
    kinds = [type(module).__name__ for module in model.modules()]
    heads = [module.num_heads for module in model.modules() if hasattr(module, "num_heads")]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return shapes, heads, kinds.count("QuickGELU"), kinds.count("GELU")


@pytest.mark.usefixtures("on_meta")
@pytest.mark.parametrize("name", list(TRUE))
def test_the_encoders_of_the_config_are_openais(name: str) -> None:
    """With OpenAI's activations, also for the open_clip models that have others by default."""
    with META:
        openai = openais("model").CLIP(*TRUE[name])
    for alias in (name, f"openclip:{name.removeprefix('clip_').replace('/', '-')}/openai"):
        with META:
            encoder = load_encoder(load_settings(REPOSITORY / "config.py"), alias, META)
            features = encoder.encode_images(torch.empty(2, 3, 224, 224))
        assert described(encoder.model) == described(openai)
        assert features.shape == (2, TRUE[name][0])
        assert features.dtype == torch.float32


@pytest.mark.usefixtures("on_meta")
def test_other_weights_keep_their_activation(make_settings) -> None:
    with META:
        encoder = load_encoder(make_settings(), "openclip:ViT-B-32/laion2b_s34b_b79k", META)
    assert described(encoder.model)[2:] == (0, 24)


def random_model(name: str) -> nn.Module:
    """OpenAI's model with random weights, rounded to half precision as the published ones are, and lively statistics."""
    torch.manual_seed(0)
    model = openais("model").CLIP(*SMALL[name])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):  # as they start, bn3 is zero and a ResNet the identity
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        for parameter in model.parameters():
            parameter.copy_((parameter * 2).half())
    return model.eval()


def openai_tokens(texts: list[str]) -> torch.Tensor:
    tokenizer = openais("simple_tokenizer").SimpleTokenizer()
    tokens = torch.zeros(len(texts), 77, dtype=torch.long)
    for row, text in zip(tokens, texts, strict=True):
        ids = [tokenizer.encoder["<|startoftext|>"], *tokenizer.encode(text), tokenizer.encoder["<|endoftext|>"]]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


class Archive(nn.Module):
    """The file that OpenAI ships: the model's parameters in a scripted module, and three sizes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for name, tensor in model.state_dict().items():
            *folders, leaf = name.split(".")
            owner: nn.Module = self
            for folder in folders:
                if not hasattr(owner, folder):
                    owner.add_module(folder, nn.Module())
                owner = getattr(owner, folder)
            owner.register_buffer(leaf, tensor)
        for name, size in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
            self.register_buffer(name, torch.tensor(size))


@pytest.fixture
def configs(tmp_path: Path) -> None:
    """Tells open_clip of the small models; nothing in their configs asks for QuickGELU."""
    (tmp_path / "configs").mkdir()
    for name, (embed_dim, size, layers, width, patch, context, words, text_width, heads, text_layers) in SMALL.items():
        config = {
            "embed_dim": embed_dim,
            "vision_cfg": {"image_size": size, "layers": layers, "width": width, "patch_size": patch},
            "text_cfg": {
                "context_length": context,
                "vocab_size": words,
                "width": text_width,
                "heads": heads,
                "layers": text_layers,
            },
        }
        (tmp_path / f"configs/{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "configs")


@pytest.mark.usefixtures("configs")
@pytest.mark.parametrize("kind", ["archive", "state dict"])
@pytest.mark.parametrize("name", list(SMALL))
def test_features_and_words_equal_openais(make_settings, tmp_path: Path, name: str, kind: str) -> None:
    model = random_model(name)
    archive = torch.jit.script(Archive(model))
    if kind == "archive":
        archive.save(str(tmp_path / "openai.pt"))
    else:
        torch.save({key: value.clone() for key, value in archive.state_dict().items()}, tmp_path / "openai.pt")
    encoder = load_encoder(make_settings(encoders={"mine": (name, "openai.pt")}), "mine", CPU)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        features = model.encode_image(images)
        words = nn.functional.normalize(model.encode_text(openai_tokens(TEXTS)), dim=-1)
    scale = features.abs().max().item()
    np.testing.assert_allclose(encoder.encode_images(images), features, atol=1e-5 * scale)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), words, atol=1e-5)


@pytest.mark.usefixtures("configs")
def test_weights_of_another_architecture_are_refused(make_settings, tmp_path: Path, refusal) -> None:
    torch.jit.script(Archive(random_model("vit"))).save(str(tmp_path / "openai.pt"))
    with refusal("cannot load the encoder 'mine'", "(resnet, "):
        load_encoder(make_settings(encoders={"mine": ("resnet", "openai.pt")}), "mine", CPU)
