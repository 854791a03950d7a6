"""Which latents of two decoders point the same way: one-to-one matches, what chance gives, and decoders that share a start."""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.stats import poisson
from torch.nn.functional import normalize

from dncbm.concepts.evidence.name_test import mean_and_root
from dncbm.runs.errors import UserError

SHARED_START = 1e-6
"""Two decoders share a start if as many equal indices as they have are less likely than this by chance."""
_ROUNDING = 1e-6
"""Rows of unit norm that are no further than this from their mean are at it."""


@dataclass(frozen=True, eq=False)
class Matches:
    """One-to-one matches of n latents with those of another decoder.

    Where the other has fewer, some latents are left without a partner: their cosine counts as 0.
    """

    partner: NDArray[np.int64]
    """Row of the partner, n; -1 where there is none."""
    cosine: NDArray[np.float64]
    """Cosine with the partner, n."""


def centred(directions: torch.Tensor) -> torch.Tensor:
    """Directions (n x D, unit rows) less their mean, of unit norm. One that is the mean becomes 0.

    Latents that share a large mean have large cosines, whatever else they are.
    """
    apart = directions - directions.mean(dim=0)
    norms = apart.norm(dim=1, keepdim=True)
    return torch.where(norms > _ROUNDING, apart / norms, 0.0)


def match(first: torch.Tensor, second: torch.Tensor) -> Matches:
    """Pair the rows of n x D and m x D directions of unit norm so that the sum of their cosines is the largest possible.

    This is the assignment problem, which scipy solves exactly (Crouse 2016). Takes about 16 n m bytes of memory.

    Raises UserError if there is not enough memory.
    """
    partner, cosine = np.full(len(first), -1), np.zeros(len(first))
    try:
        cost = (first @ second.T).neg_().cpu().numpy()
        rows, columns = linear_sum_assignment(cost)
    except (MemoryError, torch.cuda.OutOfMemoryError) as error:
        needed = 16 * len(first) * len(second) / 1e9
        raise UserError(
            f"matching {len(first)} latents with {len(second)} takes about {needed:,.1f} GB of memory: use a machine or a "
            "device that has more"
        ) from error
    partner[rows], cosine[rows] = columns, -cost[rows, columns].astype(np.float64)
    return Matches(partner, cosine)


def random_like(directions: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """As many random directions of unit norm as there are rows, with their mean and their covariance (n x D).

    They are the same on every device.
    """
    mean, root = mean_and_root(directions.detach().cpu().double())
    normal = torch.from_numpy(rng.standard_normal((len(directions), len(mean))))
    drawn = normalize(mean + normal @ root, dim=1).to(directions.dtype)  # on the CPU, since mps has no float64
    return drawn.to(directions.device)


def n_own_index(first: torch.Tensor, second: torch.Tensor) -> int:
    """How many latents of one decoder are nearest to the latent of their own index in another, once centred.

    Both are F x D, with unit rows.
    """
    other = centred(second)
    # In pieces, so that this never takes more memory than a match.
    nearest = torch.cat([(part @ other.T).argmax(dim=1) for part in centred(first).split(1024)])
    return int((nearest == torch.arange(len(first), device=nearest.device)).sum())


def share_start(n_own: int, n_groups: int = 1) -> bool:
    """Whether two decoders with this many equal indices (`n_own_index`) share a start.

    With separate starts the order of latents is arbitrary: whichever of F latents is nearest, it has any index with a
    probability of 1 / F. So about one latent has its own index, by Poisson's law. Decoders that were copied, or trained from
    the same initial weights, keep the order of these weights.

    Args:
        n_own: number of equal indices.
        n_groups: number of groups of latents within which alone the order is arbitrary, the prefixes of a Matryoshka SAE.
            About one latent of each group has its own index, or fewer.
    """
    return bool(poisson.sf(n_own - 1, n_groups) < SHARED_START)
