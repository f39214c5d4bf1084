"""How much the filters of convolutions say the same, and new filters that say something else.

RePr (Prakash, Storer, Florencio, Zhang, "RePr: Improved Training of Convolutional Filters", CVPR 2019,
arXiv 1811.07275) ranks filters by their overlap with the others of their layer, trains for a while
without those of the highest overlap, and brings them back orthogonal to what is there. Here is the
arithmetic of it; the training is `haq.training.repr_method`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

LEAST = 1e-4  # of a vector's length: what is left of one that lies in the span of others


def filter_overlaps(weight: Tensor) -> Tensor:
    """Compute how much each filter of a layer overlaps with the others.

    Filters are flattened and normalised, rows of W^; then P = |W^ W^T - I|, and the overlap of filter f among J is the sum
    of its row of P over J (equations 1 and 2 of RePr). 0: it is orthogonal to all others.

    Args:
        weight: (J, ...), a filter in each row. One of zeros overlaps with nothing.

    Returns:
        Overlaps (J,), float64 on the CPU, from 0 to (J - 1) / J.
    """
    rows = _unit_rows(weight.detach().flatten(1).cpu().double())
    products = (rows @ rows.T).abs()
    products.fill_diagonal_(0)
    return products.sum(1) / len(rows)


def mean_overlap(weights: Mapping[str, Tensor]) -> float:
    """Compute the mean overlap of all filters of some layers, given by name; 0 of none."""
    found = [filter_overlaps(weight) for weight in weights.values()]
    if not found:
        return 0.0
    return torch.cat(found).mean().item()


def overlapping_filters(weights: Mapping[str, Tensor], share: float) -> dict[str, tuple[int, ...]]:
    """Choose the filters of the highest overlap, ranked over all layers together.

    Args:
        weights: Weights (J, ...) of the layers that are ranked, by name.
        share: How many of all filters are chosen, from 0 to below 1; rounded to a whole number.

    Returns:
        Numbers of the filters that are chosen, in rising order, by layer; layers of which none is chosen are left out.
        One filter of every layer, that of the least overlap, never is, so that what follows has something to read; the
        next ones in the ranking are chosen instead. Of equal overlaps the first layer's first filters come first.

    Raises:
        ValueError: For a share outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"share is {share!r}; it must be a share of all filters, from 0 to below 1")
    ranking: list[tuple[float, int, int]] = []
    names = list(weights)
    for layer, name in enumerate(names):
        overlaps = filter_overlaps(weights[name])
        stays = int(overlaps.argmin())
        for number, overlap in enumerate(overlaps.tolist()):
            if number != stays:
                ranking.append((-overlap, layer, number))
    ranking.sort()
    count = round(share * sum(len(weight) for weight in weights.values()))
    chosen: dict[str, list[int]] = {}
    for _, layer, number in ranking[:count]:
        chosen.setdefault(names[layer], []).append(number)
    return {name: tuple(sorted(chosen[name])) for name in names if name in chosen}


def orthogonal_filters(kept: Tensor, old: Tensor, generator: torch.Generator) -> Tensor:
    """Draw new filters that are orthogonal to those that are kept, and each to what it was before.

    They are random in the null space of these, as the QR decomposition of RePr finds it. As long as there is room, they are
    orthogonal to each other, too. Where the filters that are kept leave no direction, as where a layer has more filters than
    each has weights, a new one is random.

    Args:
        kept: The filters that are kept (K, ...).
        old: What the new ones were before they were dropped (n, ...).
        generator: Of what is random, on the CPU.

    Returns:
        New filters, in the shape of `old`, each as long as those that are kept are in the mean (1 if none is, or all are
        zero).
    """
    held = kept.detach().flatten(1).cpu().double()
    before = old.detach().flatten(1).cpu().double()
    basis = _orthonormal_rows(held)
    own: list[Tensor] = []
    for filter_before in before:
        taken = _joined(basis, own)
        span = _joined(taken, _left_of(filter_before, taken))
        if len(span) >= span.shape[1]:  # the other new ones have taken all room that there was
            span = _joined(basis, _left_of(filter_before, basis))
        drawn = torch.randn(span.shape[1], generator=generator, dtype=torch.float64)
        if len(span) < span.shape[1]:
            drawn = _without(_without(drawn, span), span)  # twice, against rounding
        own.append(drawn / drawn.norm())
    lengths = held.norm(dim=1)
    length = 1.0
    if len(lengths) and bool((lengths > 0).any()):
        length = lengths.mean().item()
    if not own:
        return torch.empty_like(old)
    return (length * torch.stack(own)).to(old).reshape(old.shape)


def _unit_rows(rows: Tensor) -> Tensor:
    lengths = rows.norm(dim=1, keepdim=True)
    return rows / torch.where(lengths > 0, lengths, 1.0)


def _orthonormal_rows(rows: Tensor) -> Tensor:
    """Return an orthonormal basis of what rows span."""
    if not len(rows):
        return rows
    _, lengths, directions = torch.linalg.svd(_unit_rows(rows), full_matrices=False)
    return directions[lengths > LEAST * max(1.0, lengths.max().item())]


def _without(vector: Tensor, basis: Tensor) -> Tensor:
    """Return what is left of a vector outside the span of an orthonormal basis."""
    return vector - (basis @ vector) @ basis


def _left_of(vector: Tensor, basis: Tensor) -> list[Tensor]:
    """Return the direction that a vector adds to an orthonormal basis, if it adds one."""
    left = _without(_without(vector, basis), basis)
    length = left.norm()
    if length <= LEAST * vector.norm():
        return []
    return [left / length]


def _joined(basis: Tensor, others: list[Tensor]) -> Tensor:
    if not others:
        return basis
    return torch.cat([basis, torch.stack(others)])
