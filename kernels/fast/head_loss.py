"""Cross-entropy of a head without the memory that autograd would take."""

import torch
from torch import Tensor

from .cpu import linear


class HeadLoss(torch.autograd.Function):
    """F.cross_entropy(hidden @ weight.T, targets, reduction="none"), [M], with the gradient of the logits
    (softmax - one-hot) made in the forward pass: this takes two [M, V] tensors instead of four, and
    the backward pass is two products. It computes in fp32 under autocast, too."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            logits = linear(hidden, weight)  # [M, V]
        gradient, own = logits.softmax(1), logits.gather(1, targets[:, None])
        # The log-sum-exp is taken from the most probable token, whose share never rounds to 0.
        lse = logits.amax(1) - gradient.amax(1).log()  # [M]
        gradient.scatter_add_(1, targets[:, None], -torch.ones_like(own))
        ctx.save_for_backward(hidden, weight, gradient)
        return lse - own[:, 0]

    @staticmethod
    def backward(ctx, scale: Tensor):
        hidden, weight, gradient = ctx.saved_tensors
        of_hidden = linear(gradient, weight.t()) * scale[:, None]
        return of_hidden, linear(gradient.t(), hidden.t() * scale), None
