"""How sharply the loss bends in each layer's weight and input: average Hessian traces, as HAWQ-V2 takes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import quantizers as Q
from haq.problem.distribution import Categorical, Distribution
from haq.problem.samples import outputs_of, pieces
from quantizers.calling import Forward
from quantizers.observers import first_input

BATCH = 32  # images whose activations are kept for their gradients
DRAWS = 16  # Rademacher vectors for each batch


class Curvature(NamedTuple):
    """Of the loss (nats), in one layer's weight and in its inputs."""

    weight: float  # trace of the mean loss's Hessian in the weight, over the number of its entries
    # By call: trace of the Hessian of an image's loss in its input, over the number of entries that aren't zero, and the
    # squared norm of an image's input; both means over the images.
    inputs: tuple[tuple[float, float], ...]


def curvature(
    network: nn.Module,
    names: Sequence[str],
    images: Iterable[Any],
    *,
    draws: int = DRAWS,
    seed: int = 0,
    distribution: Distribution | None = None,
    forward: Forward | None = None,
) -> dict[str, Curvature]:
    """Average Hessian traces of the layers `names` of a float network, over `images`: batches of inputs.

    The loss is the cross-entropy with the network's own answers p = softmax(outputs), which needs no labels. Where it is taken
    its gradient in the outputs is zero, so its Hessian in anything before them is exactly J^T (diag p - p p^T) J, J being the
    outputs' Jacobian: at a trained network about that of the cross-entropy with the labels, and never negative. With
    diag p - p p^T = L L^T, L = diag sqrt p - p sqrt p^T, its trace is the mean of |J^T L s|^2 over Rademacher vectors s: the
    estimator of Hutchinson (1990) that HAWQ-V2 uses (Dong et al., NeurIPS 2020, section 3.2), drawn at the outputs. One
    backward pass serves all layers, and layers don't disturb each other's estimate.

    Inputs that are exactly zero (after a ReLU, whole channels of them) are left out of the trace and of its average:
    quantized, they stay zero, however much they would matter.

    Of outputs that are no scores of classes the loss is their divergence from what they are, as `distribution` tells it.

    Args:
        network: The float network.
        names: Of its layers.
        images: Batches of inputs, as a loader gives them.
        draws: Vectors for each batch.
        seed: Of the vectors.
        distribution: What outputs say of answers; None: scores of classes.
        forward: Computes outputs of (network, batch), if that takes more than calling the network with the inputs.

    Returns:
        The average traces by layer.
    """
    distribution = distribution or Categorical()
    network = Q.copy_network(network).eval().requires_grad_(False)
    layers = {name: network.get_submodule(name) for name in names}
    weights = [layer.get_parameter("weight").requires_grad_() for layer in layers.values()]
    inputs: list[tuple[tuple[str, int], Tensor]] = []  # of one forward pass: layer and call, and what came in
    calls: dict[str, int] = {}

    def watch(name: str) -> None:
        def before(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            # A copy: this layer's input alone, whoever else reads or overwrites the tensor.
            given = first_input(layer, arguments, named)
            seen = given.clone()
            if not seen.requires_grad:
                seen.requires_grad_()
            calls[name] = calls.get(name, -1) + 1
            inputs.append(((name, calls[name]), seen))
            if arguments:
                return (seen, *arguments[1:]), named
            return (), {key: seen if value is given else value for key, value in named.items()}

        layers[name].register_forward_pre_hook(before, with_kwargs=True)

    for name in layers:
        watch(name)
    generator = torch.Generator().manual_seed(seed)
    of_weight: dict[str, float] = defaultdict(float)
    of_input: dict[tuple[str, int], float] = defaultdict(float)
    power: dict[tuple[str, int], float] = defaultdict(float)
    entries: dict[tuple[str, int], int] = defaultdict(int)
    count = 0
    with torch.enable_grad():
        for part, images_of_part in (piece for batch in images for piece in pieces(batch, BATCH)):
            inputs.clear()
            calls.clear()
            outputs = outputs_of(network, part, forward)
            answers = distribution.differentiated(outputs)
            count += images_of_part
            for key, seen in inputs:
                power[key] += float(seen.detach().double().square().sum())
                entries[key] += int(seen.count_nonzero())
            for drawn in distribution.cotangents(outputs, draws, generator):
                sources = [*weights, *(seen for _, seen in inputs)]
                gradients = torch.autograd.grad(answers, sources, drawn, retain_graph=True, materialize_grads=True)
                for name, gradient in zip(layers, gradients, strict=False):
                    of_weight[name] += float(gradient.double().square().sum()) / draws
                for (key, seen), gradient in zip(inputs, gradients[len(weights) :], strict=True):
                    of_input[key] += float((gradient.double() * (seen != 0)).square().sum()) / draws
    return {
        name: Curvature(
            of_weight[name] / count / weight.numel(),
            tuple((of_input[key] / max(entries[key], 1), power[key] / count) for key in sorted(power) if key[0] == name),
        )
        for name, weight in zip(layers, weights, strict=True)
    }
