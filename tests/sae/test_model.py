import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sparse_autoencoder import SparseAutoencoder, evaluate
from sparse_autoencoder.data import geometric_median


def test_initialisation_counts_the_authors_leading_axis() -> None:
    d, f = 64, 512
    model = SparseAutoencoder(d, f)
    weight, bias = model.encoder_weight.detach(), model.encoder_bias.detach()
    assert weight.abs().max() <= math.sqrt(6 / (f * d))
    assert_close(weight.std(), torch.tensor(math.sqrt(6 / (f * d)) / math.sqrt(3)), rtol=0.02, atol=0)
    assert bias.abs().max() <= 1 / math.sqrt(f)
    assert float(bias.std()) == pytest.approx(1 / math.sqrt(f) / math.sqrt(3), rel=0.1)
    assert not model.tied_bias.any()
    assert_close(model.decoder_weight.norm(dim=1), torch.ones(f))


def test_seed_fixes_the_initial_weights() -> None:
    first, again, other = (SparseAutoencoder(8, 16, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.encoder_weight, again.encoder_weight)
    assert torch.equal(first.decoder_weight, again.decoder_weight)
    assert not torch.equal(first.decoder_weight, other.decoder_weight)


@pytest.mark.parametrize("transform", ["none", "centre", "unit_norm"])
def test_transform_is_undone(transform: str, features: Tensor) -> None:
    """Transforming by hand, applying a plain model and undoing the transform by hand gives the same result."""
    model = SparseAutoencoder(12, 40, input_transform=transform)
    plain = SparseAutoencoder(12, 40)
    if transform == "centre":
        model.input_centre.copy_(torch.linspace(-1, 1, 12))
        latents, expected = plain(features - torch.linspace(-1, 1, 12))
        expected = expected + torch.linspace(-1, 1, 12)
    elif transform == "unit_norm":
        norm = features.norm(dim=1, keepdim=True)
        latents, expected = plain(features / norm)
        expected = expected * norm
        assert_close(model.decode(latents), plain.decode(latents))
        assert_close(model.decode(latents, norm), expected)
    else:
        latents, expected = plain(features)
    output = model(features)
    assert_close(output.latents, latents)
    assert_close(output.reconstruction, expected)
    assert_close(model.encode(features), latents)


def test_unit_norm_leaves_a_zero_input_alone() -> None:
    model = SparseAutoencoder(4, 8, input_transform="unit_norm")
    assert torch.isfinite(model(torch.zeros(2, 4)).reconstruction).all()


def test_geometric_median_minimises_the_summed_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 3, generator=generator) + torch.tensor([1.0, 2, 3])
    x[:20] += 100
    median = geometric_median(x)

    def cost(point: Tensor) -> float:
        return float((x.double() - point.double()).norm(dim=1).sum())

    best = cost(median)
    for _ in range(50):
        assert best <= cost(median + 0.01 * torch.randn(3, generator=generator)) + 1e-6
    assert best < cost(x.mean(dim=0))


def test_geometric_median_of_identical_points() -> None:
    assert_close(geometric_median(torch.ones(5, 3)), torch.ones(3))


def test_wrong_shapes_are_refused() -> None:
    model = SparseAutoencoder(4, 8)
    with pytest.raises(ValueError, match="B x 4, not 3 x 5"):
        model.encode(torch.zeros(3, 5))
    with pytest.raises(ValueError, match="at least 1"):
        SparseAutoencoder(0, 8)
    with pytest.raises(ValueError, match="input_transform"):
        SparseAutoencoder(4, 8, input_transform="whiten")


@pytest.mark.parametrize("batch_size", [7, 600, 4096])
def test_evaluate_against_numpy(batch_size: int, features: Tensor) -> None:
    model = SparseAutoencoder(12, 40)
    with torch.no_grad():
        model.encoder_bias.sub_(0.1)
        model.encoder_weight.mul_(4)
        model.encoder_bias[:5] = -9
    x, w, d = (t.detach().double().numpy() for t in (features, model.encoder_weight, model.decoder_weight))
    z = np.maximum(x @ w.T + model.encoder_bias.detach().numpy(), 0)
    error = (z @ d - x) ** 2
    got = evaluate(model, features, batch_size=batch_size)
    l2, l1 = error.mean(), 3e-5 * z.sum(axis=1).mean()
    expected = {
        "loss": l2 + l1,
        "l2_loss": l2,
        "l1_loss": l1,
        "l0": (z > 0).sum(axis=1).mean(),
        "explained_variance": 1 - error.sum() / ((x - x.mean(axis=0)) ** 2).sum(),
        "dead_fraction": (z > 0).any(axis=0).__invert__().mean(),
    }
    assert got == pytest.approx(expected, rel=1e-5)
    assert expected["dead_fraction"] >= 5 / 40
