"""Random directions: each is active on as many images as asked for. (tests/probe/test_controls.py has one share for all.)"""

import numpy as np
import torch

from dncbm.concepts.evidence.random_directions import decoder_like, random_sae
from dncbm.concepts.strengths import encode_in_memory
from sparse_autoencoder import SparseAutoencoder


def test_each_direction_has_a_share_of_its_own(make_store, tmp_path) -> None:
    store = make_store(tmp_path / "store", [np.random.default_rng(0).normal(size=(500, 6)).astype(np.float32)])
    shares = np.array([0.0, 0.002, 0.3, 0.998, 1.0])
    found = encode_in_memory(random_sae(SparseAutoencoder(6, 5), store, shares, seed=3), store)
    assert (found.toarray() > 1e-6).sum(axis=0).tolist() == [0, 1, 150, 499, 499]
    together = [
        encode_in_memory(random_sae(SparseAutoencoder(6, 5), store, of, seed=3), store) for of in (0.3, np.full(5, 0.3))
    ]
    assert (together[0] != together[1]).nnz == 0


def test_directions_like_the_decoder_have_its_mean_and_covariance_and_leave_dead_latents_alone() -> None:
    sae = SparseAutoencoder(4, 4000, seed=0)
    scaled = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([3, 1, 1, 0.1]) + 2
    with torch.no_grad():
        sae.decoder_weight.copy_(scaled)
    live = np.arange(4000) < 3000
    own, found = torch.nn.functional.normalize(sae.dictionary, dim=1).numpy(), decoder_like(sae, live, seed=3).numpy()
    np.testing.assert_allclose(found[~live], own[~live], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(found[live].mean(axis=0), own[live].mean(axis=0), atol=0.1)
    assert not np.allclose(found[live], own[live], atol=0.1)
    assert np.array_equal(found, decoder_like(sae, live, seed=3).numpy())
    assert not np.array_equal(found, decoder_like(sae, live, seed=4).numpy())
