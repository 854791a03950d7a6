"""What explains a latent or a prediction, as numbers; drawing is left to others."""

import numpy as np
import scipy.sparse
from numpy.typing import NDArray


def top_activating(strengths: scipy.sparse.csr_matrix, latents: NDArray[np.int64], k: int) -> list[NDArray[np.int64]]:
    """The images that activate each latent most (METHOD section 5), strongest first; never one with zero activation.

    Args:
        strengths: images x F.
        latents: which latents.
        k: at most so many images for each.

    Returns:
        For each latent the row numbers of its images, possibly fewer than k; ties go to the lower row.
    """
    columns = strengths[:, latents].tocsc()
    columns.sort_indices()
    tops = []
    for start, end in zip(columns.indptr, columns.indptr[1:], strict=False):
        values, rows = columns.data[start:end], columns.indices[start:end].astype(np.int64)
        order = np.argsort(-values, kind="stable")
        tops.append(rows[order][values[order] > 0][:k])
    return tops
