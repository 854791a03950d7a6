"""What a trained bottleneck consists of, wherever it was read from."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray

from dncbm.bottleneck.encoder import EncoderReference, Fingerprint
from dncbm.concepts.naming import ConceptName
from sparse_autoencoder import SparseAutoencoder


@dataclass(frozen=True, eq=False, repr=False)
class Statistics:
    """What the images of a split are like, class by class."""

    split: str
    sizes: NDArray[np.int64]
    """Images of each class, C."""
    recall: NDArray[np.float64]
    """Share of them that the unedited probe predicts right, C; NaN for a class without images."""
    class_strengths: scipy.sparse.csr_matrix
    """Mean concept strengths of each class, C x F."""
    activity: NDArray[np.float64]
    """Share of all images that each concept is active on, F."""
    top_images: NDArray[np.int64]
    """Images that activate each concept most, the strongest first, as indices in the data set's own split, F x N_SHOWN; -1
    fills the row of a concept that fewer images activate."""

    @cached_property
    def mean_strengths(self) -> NDArray[np.float64]:
        """Mean strength of each concept over all images, F."""
        shares = self.sizes / max(int(self.sizes.sum()), 1)
        return np.asarray(self.class_strengths.T @ shares)


@dataclass(frozen=True, eq=False, repr=False)
class Contents:
    """Everything that a bundle holds, on the CPU."""

    sae: SparseAutoencoder
    weight: torch.Tensor
    """The probe's weights, F x C float32."""
    names: list[ConceptName]
    """F."""
    classes: tuple[str, ...]
    """Names of the classes as people write them, C."""
    class_folders: tuple[str, ...]
    """The same as the data set writes them."""
    statistics: Statistics
    encoder: EncoderReference
    about: dict[str, Any]
    """For `config.json`: version of dncbm, data sets, settings, metrics, provenance, and in words the interventions so far."""
    fingerprint: Fingerprint | None
    """None if no bundle has been made of the model yet."""
