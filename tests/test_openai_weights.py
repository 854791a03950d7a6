"""Weights in OpenAI's own format, against OpenAI's own code (the package clip-anytorch), for the true architectures.

The weights are random: what is held together is the arithmetic of both towers and the tokenizer.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from dncbm.encoders import load_encoder
from dncbm.errors import UserError

CPU = torch.device("cpu")
# image resolution, vision layers, width and patch, context, words, text width, heads and layers, as OpenAI published them
ARCHITECTURES = {
    "RN50": (1024, 224, (3, 4, 6, 3), 64, None, 77, 49408, 512, 8, 12),
    "ViT-B-16": (512, 224, 12, 768, 16, 77, 49408, 512, 8, 12),
}
TEXTS = ["dog", "a photo of a red apple", "The Eiffel Tower, at night!", "naïve café"]


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


def random_model(name: str) -> torch.nn.Module:
    """OpenAI's model with random weights, rounded to half precision as the published ones are, and lively statistics."""
    torch.manual_seed(0)
    model = openais("model").CLIP(*ARCHITECTURES[name])
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):  # as they start, bn3 is zero and a ResNet the identity
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model.eval()


def openai_tokens(texts: list[str]) -> torch.Tensor:
    tokenizer = openais("simple_tokenizer").SimpleTokenizer()
    tokens = torch.zeros(len(texts), 77, dtype=torch.long)
    for row, text in zip(tokens, texts, strict=True):
        ids = [tokenizer.encoder["<|startoftext|>"], *tokenizer.encode(text), tokenizer.encoder["<|endoftext|>"]]
        row[: len(ids)] = torch.tensor(ids)
    return tokens


class Archive(torch.nn.Module):
    """What OpenAI ships: the model's parameters in a scripted module, and three sizes."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        for name, tensor in model.state_dict().items():
            *folders, leaf = name.split(".")
            owner: torch.nn.Module = self
            for folder in folders:
                if not hasattr(owner, folder):
                    owner.add_module(folder, torch.nn.Module())
                owner = getattr(owner, folder)
            owner.register_buffer(leaf, tensor)
        for name, size in (("input_resolution", 224), ("context_length", 77), ("vocab_size", 49408)):
            self.register_buffer(name, torch.tensor(size))


@pytest.mark.parametrize("kind", ["archive", "state dict"])
@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_features_and_words_equal_openais(make_settings, tmp_path: Path, name: str, kind: str) -> None:
    model = random_model(name)
    archive = torch.jit.script(Archive(model))
    if kind == "archive":
        archive.save(str(tmp_path / "openai.pt"))
    else:
        torch.save({key: value.clone() for key, value in archive.state_dict().items()}, tmp_path / "openai.pt")
    encoder = load_encoder(make_settings(encoders={"mine": (name, "openai.pt")}), "mine", CPU)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        features = model.encode_image(images)
        words = torch.nn.functional.normalize(model.encode_text(openai_tokens(TEXTS)), dim=-1)
    scale = features.abs().max().item()
    np.testing.assert_allclose(encoder.encode_images(images), features, atol=5e-4 * scale)
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), words, atol=5e-4)


def test_weights_of_another_architecture_are_refused(make_settings, tmp_path: Path) -> None:
    torch.jit.script(Archive(random_model("ViT-B-16"))).save(str(tmp_path / "openai.pt"))
    with pytest.raises(UserError, match="cannot load the encoder 'mine'"):
        load_encoder(make_settings(encoders={"mine": ("RN50", "openai.pt")}), "mine", CPU)


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"), [("bf16", torch.float32, 3e-2), ("fp32", torch.float32, 0)]
)
def test_precision(make_settings, precision: str, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    settings = make_settings(encoders={"mine": ("ViT-B-32", None)})
    images = torch.randn(2, 3, 224, 224)
    torch.manual_seed(0)
    exact = load_encoder(settings, "mine", CPU).encode_images(images)
    torch.manual_seed(0)
    found = load_encoder(settings, "mine", CPU, precision).encode_images(images)
    assert found.dtype == dtype
    difference = (found - exact).abs().max() / exact.abs().max()
    assert (difference == 0) if tolerance == 0 else (0 < difference < tolerance)
