"""What attacks raise: losses of logits, and what makes their gradients usable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LOGITS = 10  # the largest logits of an image, from which its temperature is found


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of each image, (N,), in nats."""
    return F.cross_entropy(logits, labels, reduction="none")


def dlr_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the difference of logits ratio of each image, (N,).

    -(z_y - max over i != y of z_i) / (z_1 - z_3), z_1 >= z_2 >= z_3 being the largest logits (Croce and Hein, ICML 2020,
    equation 6).

    Raises:
        ValueError: For fewer than three classes.
    """
    if logits.shape[1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, the logits have {logits.shape[1]}: use the cross-entropy")
    top = logits.topk(3, dim=1).values
    own = logits.gather(1, labels[:, None])[:, 0]
    other = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return -(own - other) / (top[:, 0] - top[:, 2]).clamp_min(1e-12)


def temperatures(model: nn.Module, images: Tensor) -> Tensor:
    """Find what to multiply each image's logits by for the cross-entropy to have as much curvature as it can.

    Where a softmax is saturated, or logits are tiny, its gradient vanishes; the decision doesn't depend on such a factor
    ("Hessian norm scaling", Gupta and Ajanthan, AAAI 2022). For a piecewise linear network with the Jacobian J (classes x
    pixels) the Hessian of the loss is beta^2 J^T (diag(p) - p p^T) J, p = softmax(beta z). Its Frobenius norm is
    made as large as it can be on a grid of beta, from 1/100 to 100 over the logits' spread, for the ten largest logits.

    Returns:
        Factors, (N,).
    """
    x = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        top = model(x).topk(min(LOGITS, int(model(x[:1]).shape[1])), dim=1).values
        rows = [torch.autograd.grad(top[:, k].sum(), x, retain_graph=True)[0].flatten(1) for k in range(top.shape[1])]
    jacobian = torch.stack(rows, 1).double()
    logits = top.detach().double()
    gram = jacobian @ jacobian.mT
    spread = logits.std(1).clamp_min(1e-12)
    grid = torch.logspace(-2, 2, 41, dtype=torch.float64, device=x.device)
    norms = []
    for factor in grid:
        beta = factor / spread
        p = (beta[:, None] * logits).softmax(1)
        curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        middle = curvature @ gram
        norms.append(beta**4 * (middle @ middle).diagonal(dim1=1, dim2=2).sum(1))
    return (grid[torch.stack(norms).argmax(0)] / spread).to(images.dtype)


def zero_gradients(
    model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Tell whose loss has a gradient that is zero at every pixel, or NaN at any.

    Args:
        model: Takes images, returns logits (N, classes).
        images: Float (N, C, H, W).
        labels: int64 (N,).
        loss: Of logits and labels, (N,).

    Returns:
        (N,) of bool.
    """
    x = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(model(x), labels).sum(), x)
    return ~(gradient.flatten(1).abs().amax(1) > 0)
