"""Defensive quantization: a network that doesn't amplify small errors.

Lin, Gan, Han, "Defensive Quantization: When Efficiency Meets Robustness", ICLR 2019, arXiv
1904.08444.

A small perturbation of the input grows from layer to layer; once it exceeds half a quantization
step, rounding makes it larger still. The remedy is a penalty in training that keeps the singular
values of every layer near 1:

    loss = cross entropy + lipschitz_penalty(network, beta)

What to know before relying on it:

- Batch norm can undo it: a convolution before a batch norm may be scaled freely. `folded=True`
  penalizes the two together.
- A reshaped weight of norm 1 isn't a convolution of norm 1: a 3x3 kernel may still expand by up to
  3 (`spectral_norms`).
- The gain was seen at 4 bits. At 2 bits it is small and a large beta costs accuracy; at 1 bit
  nothing is promised.
- Quantized networks hide their gradients. A gain under a single gradient attack is no evidence of
  robustness.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quantizers.calling import Forward, call, count_of, first_sample
from quantizers.copying import evaluating
from quantizers.files import written_beside
from quantizers.layers import QuantLayer, float_class
from quantizers.observers import Output, first_input
from quantizers.policy import QUANTIZABLE

SIZE = 32  # positions per axis that a convolution is measured on where no example says how many it has
BATCH = 128
MANY_LAYERS = 40  # whose names must be printed small


def lipschitz_penalty(
    network: nn.Module,
    beta: float = 3e-4,
    *,
    folded: bool = False,
    norm: str = "reshaped",
    example: Any = None,
    iterations: int = 20,
) -> Tensor:
    """Compute (beta / 2) sum over layers of ||W W^T - I||_F^2, which is 0 where all weights are orthonormal.

    Add it to the loss. W is the weight of a Conv1d, Conv2d or Linear as a matrix, C_out x the rest,
    one per group: the groups of a convolution see different channels, so that they are orthogonal
    already. Of W W^T and W^T W the smaller is taken; for W of m x n, ||W^T W - I||^2 = ||W W^T -
    I||^2 + (n - m), so their gradients are equal, and only the smaller one's value can be 0.

    In quantized networks W is the float weight behind the quantized one: it is what the optimizer
    moves, and values on a grid of few bits can rarely be orthonormal. So a float network and its
    quantized copy have the same penalty.

    Args:
        network: A float or quantized network.
        beta: The strength, from 0.
        folded: Whether to multiply W by gamma / sqrt(variance + eps) of the batch norm that follows
            the layer, as it does at inference. The gradient reaches gamma, too, and W's direction;
            its size only if the norm is frozen (`_scale`). Needs `example`.
        norm: `reshaped` is the above. `conv` is (s^2 - 1)^2 instead, s being the norm of the
            convolution itself on inputs of the example's size; layers that the example doesn't
            reach are left out. Needs `example`.
        example: An input of the network, which is run once; or, in a training loop,
            `Wiring.of(network, input)` made before it.
        iterations: Of power iteration, for `conv`: so many make s slightly too small.

    Returns:
        One number, with its gradient.

    Raises:
        ValueError: For a negative or not finite beta, for a network without such layers, and where
            `example` is missing.
    """
    if not (math.isfinite(beta) and beta >= 0):
        raise ValueError(f"beta must be a number from 0, not {beta!r}")
    if norm not in ("reshaped", "conv"):
        raise ValueError(f"unknown norm {norm!r}; known: reshaped, conv")
    layers = _layers(network)
    wiring = None
    if folded or norm == "conv":
        wiring = _wiring(network, example)
    terms = []
    # Half precision would lose what is left of W W^T - I.
    with torch.autocast(next(iter(layers.values())).weight.device.type, enabled=False):
        for name, layer in layers.items():
            scale = None
            if folded:
                scale = _scale(network, name, wiring)
            if norm == "reshaped":
                gram = _gram(layer, scale)
                terms.append((gram - torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)).square().sum())
            elif wiring is not None and name in wiring.inputs:
                s = operator_norm(layer, wiring.inputs[name], scale=scale, iterations=iterations)
                terms.append((s.square() - 1).square())
    return beta / 2 * torch.stack(terms).sum()


@dataclass(frozen=True)
class Wiring:
    """What a forward pass tells about the layers of a network: it holds for its copies, quantized or not, as well.

    Attributes:
        inputs: The shape of each layer's input, without the batch (the largest one, if the layer is
            called repeatedly).
        calls: How often each layer is called.
        norms: The batch norm that takes a layer's output.
        lone_norms: Batch norms that take anything else.
    """

    inputs: dict[str, tuple[int, ...]]
    calls: dict[str, int]
    norms: dict[str, str]
    lone_norms: tuple[str, ...]

    @classmethod
    def of(cls, network: nn.Module, example: Any, forward: Forward | None = None) -> Wiring:
        """Look at one pass over the first image of a batch, in evaluation mode.

        Args:
            network: The network.
            example: Its inputs, of any structure (`quantizers.calling`).
            forward: What runs the network on them; None: `calling.call`.

        Returns:
            What the pass tells.
        """
        inputs: dict[str, tuple[int, ...]] = {}
        calls: dict[str, int] = {}
        norms: dict[str, str] = {}
        lone: list[str] = []
        made: list[tuple[str, Output]] = []

        def seen(name: str, module: nn.Module, given: Any, result: Tensor) -> None:
            if isinstance(module, _BatchNorm):
                sources = [layer for layer, output in made if output.is_unchanged(given[0])]
                norms.update(dict.fromkeys(sources, name))
                if not sources:
                    lone.append(name)
                return
            shape = tuple(given[0].shape[1:])
            if isinstance(module, nn.Linear):
                shape = shape[-1:]
            inputs[name] = max(shape, inputs.get(name, shape), key=math.prod)
            calls[name] = calls.get(name, 0) + 1
            made.append((name, Output(result)))

        with _watched(network, (*QUANTIZABLE, _BatchNorm), seen):
            (forward or call)(network, first_sample(example, count_of(example)))
        return cls(inputs, calls, norms, tuple(lone))


def operator_norm(
    layer: nn.Module,
    shape: tuple[int, ...],
    *,
    scale: Tensor | None = None,
    iterations: int = 1000,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> Tensor:
    """Compute the largest factor by which a layer without its bias can stretch an input: max ||A x|| / ||x||.

    A is the convolution with its stride, padding and groups, its output channels multiplied by
    `scale`. By power iteration (x <- A^T A x, normalized) until a step gains less than `tolerance`;
    it approaches the norm from below. The gradient is that of <u, A v> with the singular vectors u,
    v held fixed, which is exact where they have converged.

    Args:
        layer: A Conv1d, Conv2d or Linear.
        shape: The input's, without the batch.
        scale: One factor per output channel; None: 1.
        iterations: The most steps, at least one.
        tolerance: The relative gain below which a step is the last.
        seed: Of the input that is started from.

    Returns:
        One number, with its gradient.

    Raises:
        ValueError: For no iterations.
    """
    if iterations < 1:
        raise ValueError(f"power iteration needs at least one iteration, not {iterations!r}")
    weight, learning = cast(Tensor, layer.weight), torch.is_grad_enabled()
    with torch.inference_mode(False):
        if scale is not None and scale.is_inference():
            scale = scale.clone()
        apply = _linear_part(layer, scale)
        start = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        v = start.to(weight.device, weight.dtype)
        v = v / torch.linalg.vector_norm(v)
        # The derivative of a linear map at any point is the map: this graph gives its transpose.
        with torch.enable_grad():
            x = torch.zeros_like(v).requires_grad_()
            y = apply(x)
        before = 0.0
        for _ in range(iterations):
            with torch.no_grad():
                u = apply(v)
                u = u / torch.linalg.vector_norm(u).clamp_min(torch.finfo(u.dtype).tiny)
            (back,) = torch.autograd.grad(y, x, u, retain_graph=True)
            now = float(torch.linalg.vector_norm(back))
            if now == 0:
                break
            v = back / now
            if now - before <= tolerance * now:
                break
            before = now
        with torch.set_grad_enabled(learning):
            return (u * apply(v)).sum()


def spectral_norms(
    network: nn.Module,
    example: Any = None,
    *,
    folded: bool = False,
    iterations: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Compute two norms of every layer: of its reshaped weight (what the penalty keeps near 1) and of the layer itself.

    They are equal for linear and 1x1 layers. A convolution of stride 1 can have up to sqrt(kernel
    height x width) times the norm of its reshaped weight, since it uses each value that often. It
    is measured on inputs of the example's size, from below (`operator_norm`), and only if the
    example reaches it; without an example, on inputs of 32 positions per axis.

    Args:
        network: A float or quantized network.
        example: As in `lipschitz_penalty`; None: convolutions are measured on inputs of SIZE
            positions per axis.
        folded: With the batch norm that follows, as in `lipschitz_penalty`; needs `example`.
        iterations: As in `operator_norm`.
        seed: Likewise.

    Returns:
        The two norms by layer.

    Raises:
        ValueError: For a network without layers, and where `example` is missing.
    """
    layers = _layers(network)
    wiring = None
    if folded or example is not None:
        wiring = _wiring(network, example)
    found = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, layer in layers.items():
            if wiring is not None and name not in wiring.inputs:
                continue
            scale = None
            if folded:
                scale = _scale(network, name, wiring)
            rho = float(torch.linalg.eigvalsh(_gram(layer, scale).double()).max().clamp_min(0).sqrt())
            if layer.weight[0, 0].numel() == 1:  # of a linear layer or a 1x1 convolution
                found[name] = rho, rho
                continue
            shape = (layer.in_channels, *[SIZE] * (layer.weight.dim() - 2))
            if wiring is not None:
                shape = wiring.inputs[name]
            found[name] = rho, float(operator_norm(layer, shape, scale=scale, iterations=iterations, seed=seed))
    return found


def lipschitz_bound(network: nn.Module, example: Any, *, iterations: int = 1000, seed: int = 0) -> float:
    """Compute the product of the norms of all layers and batch norms: how much a chain can stretch a difference at most.

    Meant for chains at inference whose other modules don't stretch: ReLU, ReLU6, average pooling,
    max pooling without overlap, dropout. It is no bound where branches meet (x + f(x) has up to 1 +
    the norm of f; see `ConvexAdd`), with activations steeper than 1 (SiLU, Hardswish), for batch
    norms that compute with the batch's own statistics, nor for rounding, which has no Lipschitz
    constant: it is the float network's. The norms are found from below (`operator_norm`).

    Args:
        network: A float or quantized network.
        example: As in `lipschitz_penalty`.
        iterations: As in `operator_norm`.
        seed: Likewise.

    Returns:
        The bound.

    Raises:
        ValueError: For a network without layers.
    """
    wiring = _wiring(network, example)
    norms = spectral_norms(network, wiring, folded=True, iterations=iterations, seed=seed)
    bound = math.prod(norms[name][1] ** wiring.calls[name] for name in norms)
    for name in wiring.lone_norms:
        bound *= _norm_scale(network, name).detach().abs().max().item()
    return bound


class ConvexAdd(nn.Module):
    """Computes a x + (1 - a) y, in place of the sum of a residual block.

    Its Lipschitz constant is at most the larger of its branches', where a sum's is their sum (Cisse
    et al., "Parseval Networks", ICML 2017).

    a = sigmoid(logit) is between 0 and 1 whatever the optimizer does, and weight decay pulls it to
    1/2. With `learned=False` it stays as it starts.
    """

    logit: Tensor

    def __init__(self, start: float = 0.5, learned: bool = True) -> None:
        """Start with a share of x between 0 and 1, else ValueError; it may be learned."""
        super().__init__()
        if not 0 < start < 1:
            raise ValueError(f"the share of x must be between 0 and 1, not {start!r}")
        logit = torch.tensor(math.log(start / (1 - start)))
        if learned:
            self.logit = nn.Parameter(logit)
        else:
            self.register_buffer("logit", logit)

    @property
    def share(self) -> Tensor:
        """a, the share of x."""
        return self.logit.sigmoid()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Compute the sum. Raises ValueError for branches of different shapes."""
        if x.shape != y.shape:  # broadcasting would repeat a branch, and stretch it
            raise ValueError(f"the branches have different shapes: {tuple(x.shape)} and {tuple(y.shape)}")
        a = self.share
        return a * x + (1 - a) * y


def error_amplification(network: nn.Module, clean: Tensor, perturbed: Tensor) -> dict[str, float]:
    """Measure how far a perturbation has grown at each Conv1d, Conv2d and Linear, in the order in which they are called.

        ||A(x') - A(x)|| / ||A(x)||, averaged over samples (and over calls, if a layer is called repeatedly)

    where A(x) is the layer's output for x. The network is run in evaluation mode. 0 / 0 counts as
    0.

    Args:
        network: A float or quantized network.
        clean: Inputs.
        perturbed: The same, perturbed.

    Returns:
        The distances by layer.

    Raises:
        ValueError: For inputs of different shapes, none, or values that aren't finite, and for a
            network without layers.
    """
    if clean.shape != perturbed.shape:
        raise ValueError(f"clean and perturbed inputs differ in shape: {tuple(clean.shape)} and {tuple(perturbed.shape)}")
    if not len(clean):
        raise ValueError("at least one input is needed")
    if not (clean.isfinite().all() and perturbed.isfinite().all()):
        raise ValueError("the inputs hold values that are not finite")
    _layers(network)
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    pairs = 0

    def seen(name: str, module: nn.Module, given: Any, result: Tensor) -> None:
        # Layers may see more rows than there are images (patches, tokens), but those of an image
        # are adjacent.
        x, y = result.detach().double().reshape(2, pairs, -1)
        size, distance = torch.linalg.vector_norm(x, dim=1), torch.linalg.vector_norm(y - x, dim=1)
        sums[name] = sums.get(name, 0.0) + float(torch.where(distance > 0, distance / size, 0).sum())
        counts[name] = counts.get(name, 0) + pairs

    with _watched(network, QUANTIZABLE, seen):
        for x, y in zip(clean.split(BATCH), perturbed.split(BATCH), strict=True):
            pairs = len(x)
            # Side by side, so that the outputs of one pass need not be kept for the other.
            network(torch.cat([x, y]))
    return {name: total / counts[name] for name, total in sums.items()}


def draw_amplification(results: Mapping[str, Mapping[str, float]], path: str | os.PathLike[str]) -> None:
    """Draw the error amplification of several networks as a PNG; written beside and renamed.

    Args:
        results: What `error_amplification` returned, by the network's label.
        path: The picture.

    Raises:
        ValueError: If there is nothing to draw, or if the networks' layers differ.
    """
    lines = {label: dict(result) for label, result in results.items()}
    names = list(next(iter(lines.values()), {}))
    if not names:
        raise ValueError("there is nothing to draw: give at least one result with at least one layer")
    for label, line in lines.items():
        if list(line) != names:
            raise ValueError(f"the results of {next(iter(lines))!r} and {label!r} are of different layers")

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 0.25 * len(names) + 2), 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label, line in lines.items():
        axes.plot(range(len(names)), list(line.values()), marker="o", markersize=4, label=label)
    font_size = 8
    if len(names) > MANY_LAYERS:
        font_size = 5
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=font_size)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("distance of outputs / size of outputs")
    axes.set_title("How an input's perturbation grows from layer to layer", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    with written_beside(path) as partial:
        figure.savefig(partial, dpi=130, format="png")


def _layers(network: nn.Module) -> dict[str, Any]:
    layers = {name: module for name, module in network.named_modules() if isinstance(module, QUANTIZABLE)}
    if not layers:
        raise ValueError(f"{type(network).__name__} has no Conv1d, Conv2d or Linear layer")
    return layers


def _gram(layer: Any, scale: Tensor | None) -> Tensor:
    """Compute W W^T or W^T W, the smaller one, of each group: (groups, k, k)."""
    weight = layer.weight.flatten(1)
    if weight.dtype != torch.float64:
        weight = weight.float()
    if scale is not None:
        weight = weight * scale[:, None]
    rows = weight.unflatten(0, (getattr(layer, "groups", 1), -1))
    if rows.shape[1] <= rows.shape[2]:
        return rows @ rows.mT
    return rows.mT @ rows


def _linear_part(layer: nn.Module, scale: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return the layer as a float layer without its bias; a subclass with a forward of its own keeps it."""
    kind: Any = type(layer)
    if isinstance(layer, QuantLayer):
        kind = float_class(layer)
    twin = kind.__new__(kind)
    twin.__dict__.update(layer.__dict__, bias=None)

    def apply(x: Tensor) -> Tensor:
        y: Tensor = twin.forward(x)
        if scale is None:
            return y
        return y * scale.view(-1, *[1] * (y.dim() - 2))

    return apply


def _wiring(network: nn.Module, example: Any) -> Wiring:
    if example is None:
        raise ValueError("give `example`, an input of the network: its pass shows input sizes and which norm follows what")
    if not isinstance(example, Wiring):
        return Wiring.of(network, example)
    known = dict(network.named_modules())
    for name in (*example.inputs, *example.norms.values(), *example.lone_norms):
        if name not in known:
            raise ValueError(f"the wiring is of another network: there is no {name!r} in this one")
    return example


def _scale(network: nn.Module, name: str, wiring: Wiring | None) -> Tensor | None:
    """Return what the batch norm that follows a layer multiplies its output channels by.

    While the norm is in training, its variance follows the weight: a weight of twice the size
    changes nothing. If the gradient held the variance fixed, it would shrink the weight step by
    step, to no effect and without end. So the scale is taken as inversely proportional to the size
    of the channel's weight, which leaves its value as it is.
    """
    if wiring is None or name not in wiring.norms:
        return None
    scale = _norm_scale(network, wiring.norms[name])
    if network.get_submodule(wiring.norms[name]).training:
        weight = cast(Tensor, network.get_submodule(name).weight)
        size = torch.linalg.vector_norm(weight.flatten(1), dim=1).clamp_min(torch.finfo(weight.dtype).tiny)
        scale = scale * size.detach() / size
    return scale


def _norm_scale(network: nn.Module, name: str) -> Tensor:
    norm: Any = network.get_submodule(name)
    if norm.running_var is None:
        raise ValueError(f"{name!r} has no running variance, so it can't be folded")
    scale: Tensor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is None:
        return scale
    return norm.weight * scale  # type: ignore[no-any-return]


@contextmanager
def _watched(
    network: nn.Module, kinds: tuple[type[nn.Module], ...], seen: Callable[[str, nn.Module, Any, Tensor], None]
) -> Iterator[None]:
    """Tell `seen` of every call of a module of these kinds, within a `with`; the network is in evaluation mode."""

    def watch(name: str) -> Callable[[nn.Module, Any, Any, Any], None]:
        return lambda module, given, named, result: seen(name, module, (first_input(module, given, named),), result)

    handles = [
        m.register_forward_hook(watch(name), with_kwargs=True) for name, m in network.named_modules() if isinstance(m, kinds)
    ]
    try:
        with evaluating(network), torch.inference_mode(False), torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
