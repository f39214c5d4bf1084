"""How much quantization changes a layer's output, and what that does to the network's answers, by a few backward passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import quantizers as Q
from haq.problem.distribution import Categorical, Distribution
from haq.problem.samples import outputs_of, pieces
from haq.solvers.hessian import BATCH
from quantizers.calling import Forward

FEW_BITS = range(1, Q.MAX_BITS + 1)
DRAWS = 1  # vectors, and backward passes, for each batch


class _Call:
    """One call of a layer: what it was called with, and its output."""

    def __init__(self, name: str, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.name = name
        # Copies: whoever else reads a tensor may overwrite it.
        self.inputs, self.named = tree_map_only(Tensor, lambda x: x.detach().clone(), (inputs, named))
        self.output: Tensor

    def end(self, output: Tensor) -> Tensor:
        """Keep the output; returns a copy, which what follows may overwrite."""
        if torch.is_grad_enabled() and not output.requires_grad:
            output.requires_grad_()
        self.output = output
        return output.clone()


def gradient_increases(
    network: nn.Module,
    qnetwork: nn.Module,
    names: Sequence[str],
    images: Iterable[Any],
    *,
    widths: Sequence[int] = FEW_BITS,
    draws: int = DRAWS,
    seed: int = 0,
    distribution: Distribution | None = None,
    forward: Forward | None = None,
) -> dict[str, NDArray[np.float64]]:
    """Estimate what quantizing one operand of one layer costs, for all layers and widths in the same backward pass.

    The score of ModelOpt's auto_quantize (NVIDIA): to second order, the divergence KL(p || q) of the outputs is
    1/2 d^T (diag p - p p^T) d, d being their change. With L L^T = diag p - p p^T as in `hessian.curvature` and a Rademacher
    vector s, that is 1/2 E[(s^T L^T d)^2], and s^T L^T d = sum_i g_i dy_i for a change dy of one layer's output, g = J^T L s
    being what a backward pass gives there. No labels are needed, and the layer's output is changed as it really is: with its
    correction, and its rounding.

    Args:
        network: The float network.
        qnetwork: The quantized one; its bits are in the end what they were.
        names: Of the layers.
        images: Batches of inputs, as a loader gives them. A layer's output is taken to go through them in its first dimension.
        widths: The widths of operands, of `quantizers.WIDTHS`.
        draws: Vectors for each batch.
        seed: Of the vectors.
        distribution: What outputs say of answers, by which their divergence is told; None: scores of classes.
        forward: Computes outputs of (network, batch), if that takes more than calling the network with the inputs.

    Returns:
        By layer, nats of shape (2, widths): its weight (0) or its input (1) alone at each width; NaN for a width that its
        scheme doesn't have.
    """
    distribution = distribution or Categorical()
    network = Q.copy_network(network).eval().requires_grad_(False)
    qlayers = Q.quant_layers(qnetwork)
    policy = Q.get_policy(qnetwork)
    calls: list[_Call] = []
    for name in names:
        _watch(network.get_submodule(name), name, calls)
    generator = torch.Generator().manual_seed(seed)
    total = {name: np.zeros((2, len(widths))) for name in names}
    count = 0
    try:
        for part, images_of_part in (piece for batch in images for piece in pieces(batch, BATCH)):
            calls.clear()
            with torch.enable_grad():
                outputs = outputs_of(network, part, forward)
            count += images_of_part
            gradients = _gradients(distribution, outputs, calls, draws, generator)
            with torch.no_grad():
                for name in names:
                    own = [index for index, call in enumerate(calls) if call.name == name]
                    of_calls, of_gradients = [calls[i] for i in own], [gradients[i] for i in own]
                    _add(total[name], qlayers[name], widths, of_calls, of_gradients, images_of_part)
    finally:
        Q.set_policy(qnetwork, policy)
    return {name: 0.5 * squares / (count * draws) for name, squares in total.items()}


def remaining_errors(
    network: nn.Module,
    qnetwork: nn.Module,
    names: Sequence[str],
    images: Iterable[Any],
    forward: Forward | None = None,
    *,
    widths: Sequence[int] = FEW_BITS,
) -> dict[str, NDArray[np.float64]]:
    """Tell what correction and rounding leave of the error that rounded weights make in their layer's output.

    Args:
        network: The float network.
        qnetwork: The quantized one; its bits are in the end what they were.
        names: Of the layers.
        images: Batches of inputs, as a loader gives them.
        forward: Computes outputs of (network, batch), if that takes more than calling the network with the inputs.
        widths: The widths of weights, of `quantizers.WIDTHS`.

    Returns:
        By layer, shares of shape (widths,): the squared error of its outputs, weights alone being quantized at each width,
        over the same where they are rounded to nearest and biases are as they were; 1 where there is no error.
    """
    network = Q.copy_network(network).eval()
    plain = Q.copy_network(qnetwork)
    policy = Q.get_policy(qnetwork)
    found, before = Q.quant_layers(qnetwork), Q.quant_layers(plain)
    if all(layer.bias_shift is None and layer.weight_offset is None for layer in before.values()):
        return {name: np.ones(len(widths)) for name in names}
    for layer in before.values():
        layer.bias_shift = layer.weight_offset = None
    calls: list[_Call] = []
    for name in names:
        _watch(network.get_submodule(name), name, calls)
    errors = {name: np.zeros((2, len(widths))) for name in names}
    try:
        for part, _ in (piece for batch in images for piece in pieces(batch, BATCH)):
            calls.clear()
            with torch.no_grad():
                outputs_of(network, part, forward)
                for call in calls:
                    for row, layer in enumerate((found[call.name], before[call.name])):
                        errors[call.name][row] += _squared_errors(layer, widths, call)
    finally:
        Q.set_policy(qnetwork, policy)
    shares = {name: np.ones(len(widths)) for name in names}
    for name, (left, plainly) in errors.items():
        np.divide(left, plainly, out=shares[name], where=plainly > 0)
    return shares


def _squared_errors(layer: Q.layers.QuantLayer, widths: Sequence[int], call: _Call) -> list[float]:
    """Return the squared error of the output of one call at every width of the weights; 0 for a width that there isn't."""
    errors = []
    for bits in widths:
        error = 0.0
        if layer.scheme.takes(bits, None, layer.signed):
            layer.weight_bits, layer.activation_bits = bits, None
            error = float((layer(*call.inputs, **call.named) - call.output).square().sum(dtype=torch.float64))
        errors.append(error)
    return errors


def _watch(layer: nn.Module, name: str, calls: list[_Call]) -> None:
    """Add every call of a layer to a list."""
    begun: list[_Call] = []

    def before(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        begun.append(_Call(name, inputs, named))

    def after(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        call = begun.pop()
        calls.append(call)
        return call.end(output)

    layer.register_forward_pre_hook(before, with_kwargs=True)
    layer.register_forward_hook(after)


def _gradients(
    distribution: Distribution, outputs: Any, calls: list[_Call], draws: int, generator: torch.Generator
) -> list[Tensor]:
    """Return what backward passes give at the output of every call, each (draws, ...)."""
    sources = [call.output for call in calls]
    answers = distribution.differentiated(outputs)
    passes = [
        torch.autograd.grad(answers, sources, drawn, retain_graph=True, materialize_grads=True)
        for drawn in distribution.cotangents(outputs, draws, generator)
    ]
    return [torch.stack(of_call) for of_call in zip(*passes, strict=True)]


def _add(
    total: NDArray[np.float64],
    layer: Q.layers.QuantLayer,
    widths: Sequence[int],
    calls: list[_Call],
    gradients: list[Tensor],
    images: int,
) -> None:
    """Add the squares of (sum_i g_i dy_i) over some images, at every width of each operand, to a layer's total."""
    for operand in (0, 1):
        for place, bits in enumerate(widths):
            pair: tuple[int | None, int | None] = (bits, None)
            if operand == 1:
                pair = (None, bits)
            if not layer.scheme.takes(pair[0], pair[1], layer.signed):
                total[operand, place] = np.nan
                continue
            layer.weight_bits, layer.activation_bits = pair
            summed: Tensor | float = 0.0
            for call, gradient in zip(calls, gradients, strict=True):
                change = layer(*call.inputs, **call.named) - call.output.detach()
                # One change of the weight changes all calls of an image together.
                product = (gradient * change).reshape(len(gradient), images, -1)
                summed = summed + product.sum(2, dtype=torch.float64)
            squares = torch.as_tensor(summed).square().sum()
            if not squares.isfinite():
                squares = squares.new_tensor(torch.inf)
            total[operand, place] += float(squares)
