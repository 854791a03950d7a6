"""Weights of images under which their class is independent of some concepts (METHOD section 6).

The weight of an image is p(y) / p(y | a): its class y against the strengths a of the concepts. These are the stabilised
weights of Robins, Hernan and Brumback (2000), the ratio p(y) p(a) / p(y, a) that permutation weighting (Arbour, Dimmery and
Sondhi 2021) learns by telling images from images whose class is permuted. Here p(y | a) is a multinomial logistic regression,
and an image's is fitted on the folds that it is not in.
"""

from contextlib import ExitStack, closing
from functools import partial

import numpy as np
import scipy.sparse
import torch
from numpy.typing import NDArray
from torch.nn import functional
from tqdm import tqdm

from dncbm.features.store import FeatureStore
from dncbm.probe.model import ProbeData, linear
from dncbm.probe.solvers import BATCH, CrossEntropy, Progress, minimise, root_mean_square

FOLDS = 5
MOST = 20.0
"""Larger weights are clipped to this."""
PATH_RATIO, PATH_STEPS = 0.5, 14
"""Each lambda is this share of the previous one, and the path ends after this many."""
LEAST_GAIN, PATIENCE = 1e-4, 2
"""It ends earlier after PATIENCE lambdas in a row that raise the log-likelihood per image by no more than LEAST_GAIN."""
MAX_PASSES, TOLERANCE = 300, 1e-5
"""For one lambda."""


def independence_weights(
    data: ProbeData, concepts: NDArray[np.int64], n_classes: int, seed: int, device: torch.device
) -> tuple[torch.Tensor, dict[str, float]]:
    """Weights p(y) / p(y | a) of the images, clipped at MOST and divided by their mean.

    Args:
        data: concept strengths and labels.
        concepts: the concepts a, numbers of columns.
        n_classes: C.
        seed: seed of the folds.
        device: where to fit.

    Returns:
        The weights, one per image, float32; and `clipped`, the share of images whose weight was clipped, and `effective`, the
        effective number of images, (sum w)^2 / sum w^2, as a share of all.
    """
    prior = (data.labels.bincount(minlength=n_classes).double() / len(data)).log()
    own = prior[data.labels]
    ratio = (own - (_held_out_likelihood(data, concepts, prior, seed, device) if len(concepts) else own)).exp()
    clipped = ratio.clamp(max=MOST)
    weights = clipped / clipped.mean()
    about = {
        "clipped": float((ratio > MOST).double().mean()),
        "effective": float(weights.sum() ** 2 / weights.square().sum() / len(weights)),
    }
    return weights.float(), about


def _held_out_likelihood(
    data: ProbeData, concepts: NDArray[np.int64], prior: torch.Tensor, seed: int, device: torch.device
) -> torch.Tensor:
    """log p(y | a) of every image, float64, by the regression of the folds that it is not in. `prior` is log p(y), C.

    The regression has an intercept, and an L1 penalty on all other weights, with strengths divided by their root mean square.
    Lambda falls from where only the intercept is not 0, until images held out are predicted no better; the best counts, or
    log p(y) if none is better.
    """
    assert not isinstance(data.inputs, FeatureStore)
    intercept = scipy.sparse.csr_matrix(np.ones((len(data), 1), dtype=np.float32))
    matrix = scipy.sparse.hstack([data.inputs[:, concepts], intercept], format="csr")
    inputs = ProbeData(matrix, data.labels)
    scale = root_mean_square(inputs, device)
    penalised = torch.arange(inputs.width, device=device) < len(concepts)
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(len(data)) % FOLDS)
    with ExitStack() as stack:
        # Images that are held out have weight 0, so that no fold needs a copy of the strengths.
        used = [(fold != held_out).double() for held_out in range(FOLDS)]
        losses = [stack.enter_context(closing(CrossEntropy(inputs, device, scale, one / one.mean()))) for one in used]
        curvatures = [loss.curvature() for loss in losses]
        start = torch.zeros(inputs.width, len(prior))
        start[-1] = prior.clamp(min=-np.log(2 * len(data)))  # a class without images has the prior 0
        weights = [start.to(device) for _ in losses]
        first = float(losses[0](weights[0])[1][:-1].abs().max()) * start.numel()
        solve = partial(minimise, max_passes=MAX_PASSES, tolerance=TOLERANCE, penalised=penalised)
        best, since = prior[data.labels], 0
        for step in tqdm(range(1, PATH_STEPS + 1), desc="image weights", unit="lambda"):
            sparsity_lambda = first * PATH_RATIO**step
            weights = [
                solve(loss, curvature, Progress.at(weight), sparsity_lambda).weight
                for loss, curvature, weight in zip(losses, curvatures, weights, strict=True)
            ]
            now = _likelihood(inputs, torch.stack(weights) / scale[:, None], fold)
            better = bool(now.mean() > best.mean() + LEAST_GAIN)
            best, since = (now, 0) if better else (best, since + 1)
            if since == PATIENCE:
                break
    return best


@torch.inference_mode()
def _likelihood(data: ProbeData, weights: torch.Tensor, fold: torch.Tensor) -> torch.Tensor:
    """log p(y | inputs) of every image, by the weights of its fold (folds x inputs x C)."""
    folds, width, n_classes = weights.shape
    side_by_side = weights.permute(1, 0, 2).reshape(width, folds * n_classes).contiguous()
    found, of_all = [], fold.to(weights.device)
    for number, (batch, labels) in enumerate(data.batches(BATCH, weights.device)):
        of_images = of_all[number * BATCH : (number + 1) * BATCH]
        logits = linear(batch, side_by_side).reshape(-1, folds, n_classes)
        own = logits[torch.arange(len(labels), device=logits.device), of_images]
        found.append(-functional.cross_entropy(own, labels, reduction="none"))
    return torch.cat(found).cpu().double()
