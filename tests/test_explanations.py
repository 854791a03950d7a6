import numpy as np
import scipy.sparse
from hypothesis import given
from hypothesis import strategies as st

from dncbm.explanations import top_activating


def by_brute_force(dense: np.ndarray, latent: int, k: int) -> list[int]:
    """Images by falling strength, the lower row first where two are equal, those that activate not at all left out."""
    rows = sorted(range(len(dense)), key=lambda row: (-dense[row, latent], row))
    return [row for row in rows if dense[row, latent] > 0][:k]


@given(
    n_images=st.integers(1, 12),
    n_latents=st.integers(1, 6),
    k=st.integers(1, 15),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_top_images_are_the_strongest(n_images: int, n_latents: int, k: int, seed: int, data: st.DataObject) -> None:
    dense = np.random.default_rng(seed).integers(0, 4, (n_images, n_latents)).astype(np.float32)  # many ties and zeros
    latents = np.array(data.draw(st.lists(st.integers(0, n_latents - 1), min_size=1, max_size=8)))
    tops = top_activating(scipy.sparse.csr_matrix(dense), latents, k)
    assert [list(top) for top in tops] == [by_brute_force(dense, latent, k) for latent in latents]


def test_zeros_that_are_stored_are_zeros() -> None:
    strengths = scipy.sparse.csr_matrix(
        (np.array([0.0, 2.0, 0.0], np.float32), np.array([0, 0, 0]), np.array([0, 1, 2, 3])), shape=(3, 2)
    )
    assert strengths.nnz == 3
    assert [list(top) for top in top_activating(strengths, np.array([0, 1]), 3)] == [[1], []]


def test_the_strengths_are_left_as_they_are() -> None:
    strengths = scipy.sparse.random(20, 5, 0.4, format="csr", random_state=0, dtype=np.float32)
    before = strengths.copy()
    top_activating(strengths, np.arange(5), 3)
    assert (strengths != before).nnz == 0
    np.testing.assert_array_equal(strengths.indices, before.indices)
