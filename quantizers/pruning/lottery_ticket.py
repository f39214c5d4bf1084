"""Masks of single weights by magnitude, as the lottery ticket hypothesis finds its tickets.

Frankle and Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", ICLR
2019, arXiv 1803.03635: a network is trained, the weights of the smallest magnitude are masked, those
that survive are put back to what they were in the beginning, and so on. Here are the masks; the
training is `haq.training.lottery_ticket`.

A mask is a tensor of bools in the shape of its weight: True where the weight survives.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quantizers.policy import QUANTIZABLE

LAYER, NETWORK = "layer", "network"
Masks = dict[str, Tensor]


def maskable_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the weights that masks are of, those of convolutions and linear layers, by name, in the order of the modules.

    Biases and norms aren't masked, and a weight that several layers share is listed once.
    """
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in network.named_modules():
        weight = module._parameters.get("weight")
        if isinstance(module, QUANTIZABLE) and weight is not None and id(weight) not in seen:
            seen.add(id(weight))
            found[f"{name}.weight".removeprefix(".")] = weight
    return found


def magnitude_masks(
    weights: Mapping[str, Tensor],
    share: float,
    masks: Mapping[str, Tensor] | None = None,
    *,
    across: str = LAYER,
    shares: Mapping[str, float] | None = None,
) -> Masks:
    """Mask a share of the weights that survive: those of the smallest magnitude.

    What was masked before stays masked. After r rounds (1 - share)^r of the weights survive, within rounding.

    Args:
        weights: The trained weights by name.
        share: How many of the surviving weights are masked, from 0 to below 1; rounded to a whole number.
        masks: Those of the round before; None: everything survives.
        across: `layer`: so many of every weight tensor. `network`: so many in all, whichever are the smallest.
        shares: Other shares, by name of a weight. Such weights are masked by themselves, as with `layer`.

    Returns:
        The masks by name. Of equal magnitudes the first is masked first.

    Raises:
        ValueError: For a share outside [0, 1), another `across`, a share of an unknown weight, and masks of other weights.
    """
    own = dict(shares or {})
    for value in (share, *own.values()):
        if not 0 <= value < 1:
            raise ValueError(f"share is {value!r}; it must be a share of the weights, from 0 to below 1")
    if across not in (LAYER, NETWORK):
        raise ValueError(f"across is {across!r}; it must be {LAYER} or {NETWORK}")
    for name in own:
        if name not in weights:
            raise ValueError(f"there is no weight {name!r} to mask a share of; there are {', '.join(weights)}")
    before = _checked_masks(weights, masks)
    groups: list[tuple[list[str], float]] = [([name], own.get(name, share)) for name in weights]
    if across == NETWORK:
        groups = [([name], part) for name, part in own.items()]
        groups.append(([name for name in weights if name not in own], share))
    made: Masks = {}
    for names, part in groups:
        made.update(_smallest_masked(names, weights, before, part))
    return {name: made[name] for name in weights}


def _checked_masks(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None) -> Masks:
    if masks is None:
        return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
    if set(masks) != set(weights) or any(masks[name].shape != weight.shape for name, weight in weights.items()):
        raise ValueError("the masks are of other weights: there must be one for every weight, of its shape")
    return {name: mask.bool() for name, mask in masks.items()}


def _smallest_masked(names: list[str], weights: Mapping[str, Tensor], before: Masks, share: float) -> Masks:
    """Mask a share of the survivors of some weights, taken together."""
    if not names:
        return {}
    survive = torch.cat([before[name].flatten() for name in names])
    sizes = torch.cat([weights[name].detach().abs().flatten() for name in names])
    alive = survive.nonzero().flatten()
    gone = round(share * len(alive))
    order = sizes[alive].argsort(stable=True)
    survive[alive[order[:gone]]] = False
    parts = survive.split([before[name].numel() for name in names])
    return {name: part.view_as(before[name]).clone() for name, part in zip(names, parts, strict=True)}


def mask_density(masks: Mapping[str, Tensor]) -> float:
    """Return which share of the weights survives, from 0 to 1; 1 where there are no masks."""
    count = sum(mask.numel() for mask in masks.values())
    if not count:
        return 1.0
    return sum(int(mask.sum()) for mask in masks.values()) / count


def shuffled_masks(masks: Mapping[str, Tensor], generator: torch.Generator) -> Masks:
    """Return masks with as many survivors in each weight, at random places: what a ticket is held against.

    Args:
        masks: Masks by name.
        generator: Of what is random, on the CPU.

    Returns:
        The masks by name.
    """
    made: Masks = {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        made[name] = mask.flatten()[order].view_as(mask)
    return made
