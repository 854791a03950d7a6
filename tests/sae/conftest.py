from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sparse_autoencoder import ReLU, SparseAutoencoder

FIXTURES = Path(__file__).parent.parent / "fixtures"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are fastest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def reference() -> dict[str, Tensor]:
    """Tensors made with the authors' code."""
    return load_file(FIXTURES / "sae_reference.safetensors")


@pytest.fixture
def reference_model(reference: dict[str, Tensor]) -> SparseAutoencoder:
    """The authors' model before its first step."""
    model = SparseAutoencoder(16, 64, sparsity=ReLU(l1_coeff=3e-4))
    with torch.no_grad():
        for name in ("tied_bias", "encoder_weight", "encoder_bias"):
            getattr(model, name).copy_(reference[f"init.{name}"])
        model.decoder_weight.copy_(reference["init.decoder_weight"].t())
    return model


@pytest.fixture
def features() -> Tensor:
    """600 x 12 items, each a sum of a few of 30 directions, not centred."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(30, 12, generator=generator), dim=1)
    strengths = torch.rand(600, 30, generator=generator) * (torch.rand(600, 30, generator=generator) < 0.1)
    return strengths @ directions + 0.05 * torch.randn(600, 12, generator=generator) + 0.3
