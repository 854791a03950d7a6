"""Comparison with tensors from the authors' own code."""

import numpy as np
import torch
from torch import Tensor
from torch.testing import assert_close

from sparse_autoencoder import SparseAutoencoder, load_checkpoint
from sparse_autoencoder.losses import item_losses
from sparse_autoencoder.optimizer import Adam, project_decoder_gradient
from sparse_autoencoder.resampler import resampled_encoder_rows, sampling_probability
from sparse_autoencoder.steps import dense_step
from tests.sae.conftest import FIXTURES

TOLERANCE = {"rtol": 2e-5, "atol": 2e-7}


def test_forward_and_loss(reference_model: SparseAutoencoder, reference: dict[str, Tensor]) -> None:
    x = reference["batches"][0]
    latents, reconstruction = reference_model(x)
    assert_close(latents, reference["step0.latents"], rtol=2e-5, atol=1e-6)
    assert_close(reconstruction, reference["step0.reconstruction"], rtol=2e-5, atol=1e-6)
    losses = item_losses(reference_model, x)
    assert_close(losses.l2 + losses.penalty, reference["step0.loss_per_item"], rtol=2e-5, atol=1e-6)


def test_gradients(reference_model: SparseAutoencoder, reference: dict[str, Tensor]) -> None:
    losses = item_losses(reference_model, reference["batches"][0])
    (losses.l2 + losses.penalty).mean().backward()
    for name in ("tied_bias", "encoder_weight", "encoder_bias"):
        assert_close(getattr(reference_model, name).grad, reference[f"step0.grad.{name}"], **TOLERANCE)
    decoder = reference_model.decoder_weight
    projected = project_decoder_gradient(decoder.grad, decoder.detach())
    assert_close(projected.t(), reference["step0.grad.decoder_weight_projected"], **TOLERANCE)


def assert_parameters(model: SparseAutoencoder, reference: dict[str, Tensor], prefix: str) -> None:
    for name in ("tied_bias", "encoder_weight", "encoder_bias"):
        assert_close(getattr(model, name).detach(), reference[f"{prefix}.{name}"], rtol=2e-5, atol=2e-6)
    assert_close(model.decoder_weight.detach().t(), reference[f"{prefix}.decoder_weight"], rtol=2e-5, atol=2e-6)


def test_five_steps(reference_model: SparseAutoencoder, reference: dict[str, Tensor]) -> None:
    adam = Adam(reference_model, lr=5e-4)
    losses = []
    for i, x in enumerate(reference["batches"]):
        losses.append(dense_step(reference_model, adam, x).loss)
        if i == 0:
            assert_parameters(reference_model, reference, "after_step0")
    assert_parameters(reference_model, reference, "final")
    assert_close(torch.stack(losses), reference["loss_per_step"], rtol=2e-5, atol=1e-6)


def test_resampling(reference: dict[str, Tensor]) -> None:
    probability = sampling_probability(reference["step0.loss_per_item"])
    assert_close(probability.float(), reference["resample.sampling_probability"], rtol=2e-5, atol=1e-8)
    rows = resampled_encoder_rows(
        reference["resample.inputs"], reference["final.encoder_weight"], reference["resample.fired"] > 0
    )
    assert_close(rows, reference["resample.encoder_rows"], **TOLERANCE)
    assert len(rows) == int((reference["resample.fired"] == 0).sum())


def test_published_checkpoint() -> None:
    from safetensors.torch import load_file

    expected = load_file(FIXTURES / "published_format_outputs.safetensors")
    model = load_checkpoint(FIXTURES / "published_format_sparse_autoencoder_final.pt")
    latents, reconstruction = model(expected["x"])
    assert_close(latents, expected["latents"], rtol=2e-5, atol=1e-6)
    assert_close(reconstruction, expected["reconstruction"], rtol=2e-5, atol=1e-6)
    norms = np.linalg.norm(model.dictionary.numpy(), axis=1)
    np.testing.assert_allclose(norms, 1, rtol=1e-6)
