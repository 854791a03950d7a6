"""JumpReLU's jump and step, with the pseudo-derivatives by which its thresholds learn."""

from typing import Any

import torch
from torch import Tensor


def _in_window(pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    return ((pre - threshold).abs() < bandwidth / 2).to(pre.dtype)


class Jump(torch.autograd.Function):
    """pre * H(pre - threshold), and the pseudo-derivative -threshold/bandwidth in the window around the threshold."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold, pre, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        window = _in_window(pre, threshold, ctx.bandwidth)
        by_threshold = -(gradients[0] * window).sum(dim=0) * threshold / ctx.bandwidth
        return torch.where(pre > threshold, gradients[0], 0), by_threshold, None


class Step(torch.autograd.Function):
    """H(pre - threshold), and its pseudo-derivative by the threshold, -1/bandwidth in the window around it."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        pre, threshold = ctx.saved_tensors
        return None, -(gradients[0] * _in_window(pre, threshold, ctx.bandwidth)).sum(dim=0) / ctx.bandwidth, None
