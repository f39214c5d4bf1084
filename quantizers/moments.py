"""Second moments of what a layer multiplies its weight with: how an error of the weight becomes one of the output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Inputs of one output up to which all their products are kept (float32, 268 MB); beyond it they
# are divided into equal parts, and products between parts are left out.
MOST_INPUTS = 1 << 13
MOST_BYTES = 1 << 30  # of all layers' sums that are held at a time
# Patches per input of an output that there must be before any is left out, and how many in any case; and
# beyond which most are. Of few patches all count: what gains on a share of them could lose on the whole.
ENOUGH = 4
LEAST_PATCHES = 2048  # which all count where weights are rounded by them
LEAST_FOR_SCALES = 256  # likewise where only scales are found by them: one number a channel
PLENTY = 1024
SMALL_PRODUCTS = 3  # so many times longer a number takes in the many small products of groups than in a large one
MANY_POSITIONS = 8  # positions of an image that must remain of it; of images with fewer, some are left out
LARGE = 256  # inputs for which it pays to leave out what follows from symmetry
CHUNK = 1 << 20  # numbers of patches that are unfolded at once
ROWS = 1024  # of a covariance that are computed at once
PRODUCTS = (torch.conv1d, torch.conv2d, F.linear)


class InputMoments:
    """The mean and the covariance of a layer's patches: a forward pre-hook that adds up what batch after batch shows.

    A patch is what one position of the output sees of the input: kernel x channels of the layer's
    group, padding included, as the layer pads (whatever its class does to its input before it
    calls torch's convolution is seen, too). For a weight error dw of one output channel,
    dw^T H dw with H = E[p p^T] is the mean squared error of the output, and dw^T Cov dw with
    Cov = H - E[p] E[p]^T what is left of it once the bias is corrected.

    Unfolding a convolution with k inputs per output costs k / (outputs of a group) times the
    convolution itself. Where that is more than one, every so manyth patch is taken, as soon as
    there have been 4 k of them (and 2048, or 256 for scales alone), and fewer still beyond 1024 k: of
    every so manyth image every so manyth position of the output. A patch counts for those that it
    stands for.

    Sums are taken in float32 of patches from which the first batch's mean is subtracted, so that a
    mean that is large beside the deviation costs no digits.

    Attributes:
        layer: The layer's name, for messages.
        centred: Whether a correction of the bias follows, which takes away the mean of errors:
            `covariance` is Cov then, and H otherwise.
        groups: Convolution groups.
        parts: In how many parts inputs of an output are divided, mostly 1: parts have no more than
            MOST_INPUTS, and the sums of all parts take no more than MOST_BYTES.
        inputs: Inputs of an output in one part.
        patches: How many patches went into the sums.
        images: How many images they are of.
        is_product: False if the layer was called and called neither F.linear nor torch's convolution
            with a weight of its shape, so that nobody knows what its weight is multiplied with.
    """

    def __init__(self, layer: str, module: nn.Module, centred: bool = True, rounds: bool = True) -> None:
        """Have seen nothing yet of a layer.

        Args:
            layer: Its name, for messages.
            module: A Conv1d, Conv2d or Linear.
            centred: Whether a correction of the bias follows.
            rounds: Whether weights are rounded by it, and not only their scales found.
        """
        self.layer, self.centred = layer, centred
        self._least = LEAST_FOR_SCALES
        if rounds:
            self._least = LEAST_PATCHES
        self.is_product = True
        self._shape = tuple(module.weight.shape)  # type: ignore[operator, arg-type]
        self.groups: int = getattr(module, "groups", 1)  # type: ignore[assignment]
        k = math.prod(self._shape[1:])
        most = min(MOST_INPUTS, MOST_BYTES // (4 * self.groups * max(1, k)))
        self.parts = next((parts for parts in range(1, k + 1) if k % parts == 0 and k // parts <= most), max(1, k))
        self.inputs = k // self.parts
        # Sums are symmetric: a quarter of a large one is left out.
        self._half = self.inputs
        if self.inputs >= LARGE:
            self._half = self.inputs // 2
        self.patches = self.images = 0
        self._seen = 0  # patches, those that were left out included
        self._weight = 0  # patches that those in the sums stand for
        self._shift = self._sum = self._squares = torch.empty(0)

    @property
    def bytes(self) -> int:
        """How much memory the sums take."""
        return 4 * self.groups * self.parts * self.inputs**2

    @torch.no_grad()
    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any] | None = None) -> None:
        """Add a batch to the sums.

        Args:
            module: The layer.
            inputs: What it is called with.
            named: And by which keywords.
        """
        operand = self._operand(module, inputs, named or {})
        if operand is None:
            self.is_product = False
            self.images += 1
            return
        count = operand.images * operand.positions
        if not count or not self.inputs:
            return
        self.images += operand.shown
        strides = operand.strides(self._step(count))
        step = math.prod(strides)
        for patches in operand.patches(strides, self._seen, self.groups, CHUNK):
            split = patches.unflatten(2, (self.parts, self.inputs)).transpose(1, 2).flatten(0, 1)
            self.patches += split.shape[1]
            self._weight += step * split.shape[1]
            self._add(split, step)
        self._seen += count

    def _step(self, count: int) -> int:
        """Return of how many patches one is taken, with so many in this batch: unfolding shall cost as much as the layer."""
        k = self.inputs * self.parts
        seen = self._seen + count
        ratio = -(-k * self.groups // self._shape[0])
        if self.groups > 1:
            ratio *= SMALL_PRODUCTS
        return max(1, min(ratio, seen // max(ENOUGH * k, self._least)), seen // (PLENTY * k))

    def _add(self, patches: Tensor, share: int) -> None:
        if self._shift.numel() == 0:
            self._shift = patches.mean(1, keepdim=True)
            self._sum = torch.zeros_like(self._shift, dtype=torch.float64)
            self._squares = patches.new_zeros(len(patches), self.inputs, self.inputs)
        centred = patches - self._shift
        self._sum += share * centred.sum(1, keepdim=True, dtype=torch.float64)
        half = self._half
        self._squares[:, :half].baddbmm_(centred[..., :half].mT, centred, alpha=share)
        if half < self.inputs:
            rest = centred[..., half:]
            self._squares[:, half:, half:].baddbmm_(rest.mT, rest, alpha=share)

    def suffice(self) -> bool:
        """Say whether there were as many patches as inputs of an output, so that every direction can be known."""
        return self.is_product and self.patches >= self.inputs * self.parts

    def mean(self) -> Tensor:
        """Return the mean patch (groups x parts, inputs), in the order of `grouped`, float64."""
        return (self._shift + self._sum / self._weight).squeeze(1)

    def covariance(self) -> Tensor:
        """Return the second moment, Cov or H (`centred`), (groups x parts, inputs, inputs), in the order of `grouped`.

        Raises:
            ValueError: Naming the layer, if nothing is known of it, or if a product is beyond float32.
        """
        if not self.patches:
            raise ValueError(f"layer {self.layer!r} was never called during calibration: calibrate with inputs that reach it")
        moved = self._sum / self._weight
        half = self._half
        made = self._squares / self._weight
        made[:, half:, :half] = made[:, :half, half:].mT
        mean = self.mean()[:, None].to(made.dtype)
        is_finite = True
        # Some rows at a time: all of them in float64 would take twice what the sums take.
        for begin in range(0, self.inputs, ROWS):
            rows = slice(begin, begin + ROWS)
            made[:, rows] -= (moved[..., rows].mT @ moved).to(made.dtype)
            if not self.centred:
                made[:, rows] += mean[..., rows].mT @ mean
            is_finite = is_finite and bool(made[:, rows].isfinite().all())
        if not is_finite:
            raise ValueError(f"layer {self.layer!r}: products of its inputs are beyond {made.dtype}: scale its input down")
        return made

    def grouped(self, weight: Tensor) -> Tensor:
        """Return a weight (..., C_out, C_in / groups, *kernel) as (groups x parts, ..., C_out / groups, inputs).

        Inputs are in the order (*kernel, channel), as are those of `covariance`.
        """
        before = weight.shape[: weight.dim() - len(self._shape)]
        rows = weight.movedim(len(before) + 1, -1)
        rows = rows.reshape(*before, self.groups, self._shape[0] // self.groups, self.parts, self.inputs)
        return rows.movedim((-4, -2), (0, 1)).flatten(0, 1)

    def ungrouped(self, rows: Tensor) -> Tensor:
        """Undo `grouped`."""
        before = rows.shape[1:-2]
        shape = (*before, self._shape[0], *self._shape[2:], self._shape[1])
        split = rows.unflatten(0, (self.groups, self.parts)).movedim((0, 1), (-4, -2))
        return split.reshape(shape).movedim(-1, len(before) + 1).contiguous()

    def _operand(self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> _Operand | None:
        """Return what a layer multiplies its weight with; None if nobody knows."""
        try:
            with _Intercept(self._shape):
                module.forward(*inputs, **named)
        except _Found as found:
            return _Operand(found, self._shape)
        return None


class Passes:
    """Moments of many layers, of as many at a time as memory allows; for the others, images go through the network again."""

    def __init__(
        self,
        moments: Mapping[str, InputMoments],
        batches: object,
        look: Callable[[Mapping[str, InputMoments]], None],
        most_bytes: int = MOST_BYTES,
    ) -> None:
        """Divide moments among passes.

        Args:
            moments: By layer, in the order in which they will be taken.
            batches: What the network is run over.
            look: Runs the network over it, with such pre-hooks, in a pass after the first.
            most_bytes: What the sums may take at a time, unless it is one layer's.

        Raises:
            ValueError: For more than one pass over an iterator, which can be gone through once.
        """
        self._look = look
        self._passes: list[dict[str, InputMoments]] = [{}]
        held = 0
        for name, layer in moments.items():
            held += layer.bytes
            if held > most_bytes and self._passes[-1]:
                self._passes.append({})
                held = layer.bytes
            self._passes[-1][name] = layer
        if len(self._passes) > 1 and isinstance(batches, Iterator):
            total = sum(layer.bytes for layer in moments.values())
            raise ValueError(
                f"the second moments of all layers' inputs take {total / 1e9:.1f} GB, more than the {most_bytes / 1e9:.1f} GB "
                f"that are held at a time, so that images are looked at {len(self._passes)} times: give `calibrate` as a list "
                "of batches, a DataLoader or a Dataset, not an iterator"
            )

    def hooks(self) -> dict[str, InputMoments]:
        """Return the pre-hooks of the pass that is next, or has been last."""
        return self._passes[0]

    def take(self, name: str) -> InputMoments | None:
        """Return a layer's moments, and hold them no longer; None if it has none. A further pass is made if it is due."""
        if len(self._passes) > 1 and name in self._passes[1]:
            self._passes.pop(0)
            self._look(self.hooks())
        return self.hooks().pop(name, None)


class _Found(Exception):
    """What a layer multiplies its weight with."""

    def __init__(self, x: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> None:
        super().__init__()
        self.x, self.stride, self.padding, self.dilation = x, stride, padding, dilation


class _Intercept(TorchFunctionMode):
    """Within a `with`, raises `_Found` where torch is to multiply by a weight of a shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._shape = shape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self._look(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _look(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> None:
        if tuple(weight.shape) == self._shape:
            raise _Found(input.detach(), stride, padding, dilation)


class _Operand:
    """What a layer multiplies its weight with, and where its patches lie.

    Attributes:
        shown: How many images were given.
        images: How many there are to choose from; every row of a Linear's input is one.
        positions: How many patches one of these has.
    """

    def __init__(self, found: _Found, shape: tuple[int, ...]) -> None:
        """Take an input as it is given to torch, and the weight's shape."""
        x, spatial = found.x, len(shape) - 2
        if x.dim() == spatial + 1:
            x = x[None]
        if x.dtype not in (torch.float32, torch.float64):
            x = x.float()
        self.shown = len(x)
        if not spatial:
            x = x.reshape(-1, shape[1])
        self._x, self._kernel = x, shape[2:]
        self._stride, self._dilation = _each(found.stride, spatial), _each(found.dilation, spatial)
        self._padding = _padding(found.padding, self._kernel, self._dilation)
        self._sides = [side + sum(pad) for side, pad in zip(x.shape[2:], self._padding, strict=True)]
        self._outputs = []
        for side, length, jump, step in zip(self._sides, self._kernel, self._stride, self._dilation, strict=True):
            self._outputs.append((side - step * (length - 1) - 1) // jump + 1)
        self.images, self.positions = len(x), math.prod(self._outputs)

    def strides(self, step: int) -> tuple[int, int]:
        """Divide a step among images and positions: of how many images, and of how many positions of these, one is taken.

        That of positions has no factor in common with a row of the output, so that all its columns are
        met.
        """
        of_images = min(math.isqrt(step), self.images)
        of_positions = -(-step // of_images)
        if self.positions < MANY_POSITIONS * of_positions:
            return step, 1
        while math.gcd(of_positions, self._outputs[-1]) > 1:
            of_positions += 1
        return of_images, of_positions

    def patches(self, strides: tuple[int, int], seen: int, groups: int, most: int) -> Iterator[Tensor]:
        """Unfold every so manyth patch.

        Args:
            strides: Of how many images, and of how many positions, one is taken.
            seen: How many patches there were before, so that others are taken than of the last batch.
            groups: The layer's.
            most: How many numbers are unfolded at once, about.

        Yields:
            Patches (groups, patches, inputs), which may lie in the input's memory.
        """
        of_images, of_positions = strides
        x = self._x[seen % of_images :: of_images]
        positions = torch.arange(seen % of_positions, self.positions, of_positions, device=x.device)
        size = x.shape[1] * math.prod(self._kernel)
        if not len(x) or not len(positions):
            return
        for some in x.split(max(1, most // (size * len(positions)))):
            for here in positions.split(max(1, most // size)):
                yield self._unfolded(some, here, groups)

    def _unfolded(self, x: Tensor, positions: Tensor, groups: int) -> Tensor:
        starts, offsets = self._places(positions)
        kernel, channels = len(offsets), x.shape[1] // groups
        if kernel == 1 and not any(map(any, self._padding)):
            if x.dim() == 2:
                flat = x[:, :, None]
            else:
                flat = x.flatten(2)
            if len(positions) < self.positions or list(x.shape[2:]) != self._outputs:
                flat = flat[:, :, starts]
            taken = flat.unflatten(1, (groups, channels)).permute(1, 0, 3, 2)
        elif channels == 1:
            padded = F.pad(x, [amount for pad in reversed(self._padding) for amount in pad]).flatten(2)
            taken = padded[:, :, (starts[:, None] + offsets).flatten()].unflatten(2, (len(starts), kernel)).movedim(0, 1)
        else:
            # Rows of channels are gathered fastest.
            padded = x.new_zeros(len(x), *self._sides, x.shape[1])
            inside = [slice(pad[0], pad[0] + side) for pad, side in zip(self._padding, x.shape[2:], strict=True)]
            place = (slice(None), *inside)
            padded[place] = x.movedim(1, -1)
            images = math.prod(self._sides) * torch.arange(len(x), device=x.device)
            places = images[:, None, None] + starts[:, None] + offsets
            taken = padded.flatten(0, -2)[places.flatten()].view(len(x), len(starts), kernel, groups, channels)
            taken = taken.permute(3, 0, 1, 2, 4)
        return taken.reshape(groups, len(x) * len(starts), kernel * channels)

    def _places(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return where patches begin in a padded image, and where their numbers lie from there."""
        starts, factor = torch.zeros_like(positions), 1
        offsets = torch.zeros_like(positions[:1])
        for dim in reversed(range(len(self._sides))):
            starts = starts + positions % self._outputs[dim] * (self._stride[dim] * factor)
            positions = positions // self._outputs[dim]
            along = factor * self._dilation[dim] * torch.arange(self._kernel[dim], device=positions.device)
            offsets = (along[:, None] + offsets).flatten()
            factor *= self._sides[dim]
        return starts, offsets


def _each(value: Any, sizes: int) -> tuple[int, ...]:
    """Return a number for every spatial dimension."""
    if isinstance(value, int):
        return (value,) * sizes
    given = tuple(value)
    if len(given) == 1:
        return given * sizes
    return given


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return a convolution's padding before and after, for every spatial dimension."""
    if padding == "valid":
        padding = 0
    if padding != "same":
        return [(amount, amount) for amount in _each(padding, len(kernel))]
    made = []
    for length, step in zip(kernel, dilation, strict=True):
        total = step * (length - 1)
        made.append((total // 2, total - total // 2))
    return made
