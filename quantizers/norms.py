"""Statistics of norms, taken anew from what a quantized network computes.

Quantized weights and inputs move the mean and the variance of what a batch norm sees. Its running
statistics, taken once more, follow them (Sun et al., "Hybrid 8-bit Floating Point Training and
Inference for Deep Neural Networks", NeurIPS 2019).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from quantizers.batches import Batches, collect, copied
from quantizers.calling import Forward, call
from quantizers.copying import evaluating
from quantizers.correction import distance
from quantizers.network import float_copy
from quantizers.observers import first_input

# Norms whose training mode normalises a batch by its own mean and variance.
ITSELF = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def running_norms(network: nn.Module) -> list[_NormBase]:
    """Return the norms of a network that keep running statistics: batch norms, and instance norms that are told to."""
    norms = [module for module in network.modules() if isinstance(module, _NormBase)]
    return [norm for norm in norms if norm.running_mean is not None]


def is_frozen(norm: _NormBase) -> bool:
    """Say whether a norm's statistics are to stay: it is trained in nothing else either, or its momentum is 0."""
    parameters = list(norm.parameters(recurse=False))
    return norm.momentum == 0 or (bool(parameters) and not any(one.requires_grad for one in parameters))


@torch.inference_mode(False)
def reestimate_norms(
    qnetwork: nn.Module,
    batches: Batches,
    *,
    network: nn.Module | None = None,
    keep_worse: bool = False,
    forward: Forward | None = None,
) -> int:
    """Give norms with running statistics the mean and variance of what they see in the quantized network, in place.

    One norm after the other, in the order in which they are called, and each in a pass of its own
    over all inputs: what a norm sees depends on the new statistics of those before it. Every image
    counts the same, however they are divided into batches. Norms that are frozen (`is_frozen`) keep
    their statistics, and everything is in evaluation mode meanwhile.

    If the outputs are further from the float network's afterwards, on the same inputs
    (`correction.distance`), the statistics are left as they were.

    Args:
        qnetwork: The quantized network.
        batches: Inputs, as `quantize` takes them for calibration; labels play no part.
        network: The float network; None: what `float_copy` makes of the quantized one.
        keep_worse: Whether the new statistics are kept in any case.
        forward: What runs a network on a batch, as in `quantize`.

    Returns:
        How many norms have new statistics; 0 if they weren't kept.

    Raises:
        ValueError: If no norm of the network keeps running statistics that aren't frozen; if a norm
            sees a single value of each channel, so that there is no variance.
    """
    norms = running_norms(qnetwork)
    if not norms:
        raise ValueError(
            "the network has no norms with running statistics, such as batch norms that aren't folded: there is nothing to "
            "re-estimate"
        )
    norms = [norm for norm in norms if not is_frozen(norm)]
    if not norms:
        raise ValueError("all norms of the network are frozen (no parameter requires a gradient, or momentum is 0)")
    inputs = collect(batches, qnetwork, forward)
    if network is None:
        network = float_copy(qnetwork)
    saved = [_tensors(norm) for norm in norms]
    is_kept = False
    with torch.no_grad(), evaluating(qnetwork), evaluating(network):
        before = distance(qnetwork, network, inputs, forward)
        try:
            called = _in_order_of_call(qnetwork, norms, inputs[0], forward)
            for norm in called:
                take_statistics(qnetwork, [norm], map(copied, inputs), forward)
            is_kept = keep_worse or distance(qnetwork, network, inputs, forward) <= before
        finally:
            if not is_kept:
                _restore(norms, saved)
    if not is_kept:
        return 0
    return len(called)


def _tensors(norm: _NormBase) -> list[Tensor]:
    """Return copies of the tensors of a norm's statistics."""
    return [buffer.clone() for buffer in norm.buffers(recurse=False)]


@torch.no_grad()
def _restore(norms: list[_NormBase], saved: list[list[Tensor]]) -> None:
    for norm, tensors in zip(norms, saved, strict=True):
        for buffer, tensor in zip(norm.buffers(recurse=False), tensors, strict=True):
            buffer.copy_(tensor)


def _in_order_of_call(network: nn.Module, norms: list[_NormBase], inputs: Any, forward: Forward | None) -> list[_NormBase]:
    """Return the norms that a network calls, in the order of their first calls."""
    called: dict[_NormBase, None] = {}

    def note(norm: nn.Module, given: tuple[Any, ...]) -> None:
        assert isinstance(norm, _NormBase)
        called.setdefault(norm)

    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        (forward or call)(network, copied(inputs))
    finally:
        for handle in handles:
            handle.remove()
    return list(called)


@torch.no_grad()
def take_statistics(
    network: nn.Module, norms: Iterable[_NormBase], batches: Iterable[Any], forward: Forward | None = None
) -> None:
    """Give some norms the mean and variance of all that they see in one pass, in place.

    While the pass lasts, a norm normalises each batch by that batch's own statistics, as in
    training: what a later one of the norms sees depends on that. Every image counts the same.

    Args:
        network: What the norms are in; every module is in evaluation mode meanwhile.
        norms: The norms.
        batches: Inputs of the network, which are left as they are only if the network leaves them so.
        forward: What runs the network on each of them, as in `quantize`.

    Raises:
        ValueError: If a norm sees a single value of each channel, so that there is no variance.
    """
    with evaluating(network), _gathering(norms) as gathered:
        for inputs in batches:
            (forward or call)(network, inputs)
        for statistics in gathered:
            statistics.finish()


@contextmanager
def _gathering(norms: Iterable[_NormBase]) -> Iterator[list[_Statistics]]:
    gathered = [_Statistics(norm) for norm in norms]
    try:
        yield gathered
    finally:
        for statistics in gathered:
            for hook in statistics.hooks:
                hook.remove()
            statistics.norm.momentum = statistics.momentum
            statistics.norm.eval()


class _Statistics:
    """The mean and variance of all that a norm has seen, batch by batch."""

    def __init__(self, norm: _NormBase) -> None:
        """Look at every input of a norm from now on."""
        self.norm = norm
        self.calls = 0
        self.seen = 0  # values of each channel
        assert norm.running_mean is not None
        self.mean = torch.zeros_like(norm.running_mean, dtype=torch.float64)
        self.squares = torch.zeros_like(self.mean)  # of the distances from the mean, summed
        self.images = 0
        self.momentum = norm.momentum
        self.count = 0  # values of each channel in the batch that the norm is at, if it computes their statistics itself
        self.hooks = [
            norm.register_forward_pre_hook(self.look, with_kwargs=True),
            norm.register_forward_hook(self.note),
        ]

    def look(self, norm: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
        """Add a batch, and let the norm see this batch as it does in training."""
        x = first_input(norm, inputs, named)
        self.calls += 1
        if isinstance(norm, _InstanceNorm):
            # It sees every image by itself, and its statistics are the mean of theirs.
            count = len(x)
            if x.dim() == norm._get_no_batch_dim():
                count = 1
            self.images += count
            norm.momentum = count / self.images
            norm.train()
            return
        count = x.numel() // x.shape[1]
        if x.dtype == torch.float32 and type(norm) in ITSELF and count > 1:
            # In training it computes the batch's statistics, in half the time of two passes over it.
            self.count = count
            self.norm.momentum = 1.0
            norm.train()
            return
        norm.eval()
        of_batch = torch.var_mean(x.float(), [dim for dim in range(x.dim()) if dim != 1], correction=0)
        variance, mean = (values.double() for values in of_batch)
        self._add(mean, variance, count)
        self._set(mean, variance)

    def note(self, norm: nn.Module, inputs: object, output: object) -> None:
        """Take the statistics of a batch that the norm has computed itself."""
        if not self.count:
            return
        count, self.count = self.count, 0
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        variance = self.norm.running_var.double() * ((count - 1) / count)
        self._add(self.norm.running_mean.double(), variance, count)

    def _add(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Add a batch of so many values of each channel."""
        total = self.seen + count
        apart = mean - self.mean
        self.mean += apart * count / total
        self.squares += variance * count + apart.square() * self.seen * count / total
        self.seen = total

    def finish(self) -> None:
        """Give the norm the statistics of everything."""
        if isinstance(self.norm, _InstanceNorm) or not self.calls:
            return
        if self.seen < 2:
            raise ValueError("a batch norm sees one value of each channel, which has no variance: give at least 2 images")
        self._set(self.mean, self.squares / (self.seen - 1))
        if self.norm.num_batches_tracked is not None:
            self.norm.num_batches_tracked.fill_(self.calls)

    def _set(self, mean: Tensor, variance: Tensor) -> None:
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        self.norm.running_mean.copy_(mean)
        self.norm.running_var.copy_(variance)
