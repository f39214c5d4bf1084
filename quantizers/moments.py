"""Second moments of what a layer multiplies its weight with: how an error of the weight becomes one of the output."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

# Inputs of one output up to which all their products are kept (float32, 268 MB); beyond it they
# are divided into equal parts, and products between parts are left out.
MOST_INPUTS = 1 << 13
ENOUGH = 4  # patches per input of an output, before any position is left out
CHUNK = 1 << 21  # numbers of patches that are unfolded at once
PRODUCTS = (torch.conv1d, torch.conv2d, F.linear)


class InputMoments:
    """The mean and the covariance of a layer's patches: a forward pre-hook that adds up what batch after batch shows.

    A patch is what one position of the output sees of the input: kernel x channels of the layer's
    group, padding included, as the layer pads (whatever its class does to its input before it
    calls torch's convolution is seen, too). For a weight error dw of one output channel,
    dw^T H dw with H = E[p p^T] is the mean squared error of the output, and dw^T Cov dw with
    Cov = H - E[p] E[p]^T what is left of it once the bias is corrected.

    Unfolding a convolution with k inputs per output costs k / (outputs of a group) times the
    convolution itself. Where that is more than one, every so manyth position of the output is
    taken, as soon as there have been 4 k patches: a stride that shares no factor with the output's
    size, so that all rows and columns are met. A patch counts for those that it stands for.

    Sums are taken in float32 of patches from which the first batch's mean is subtracted, so that a
    mean that is large beside the deviation costs no digits.

    Attributes:
        layer: The layer's name, for messages.
        groups: Convolution groups.
        parts: In how many parts inputs of an output are divided (`MOST_INPUTS`), mostly 1.
        inputs: Inputs of an output in one part.
        patches: How many patches went into the sums.
        images: How many images they are of.
    """

    def __init__(self, layer: str, module: nn.Module) -> None:
        """Have seen nothing yet of a Conv1d, Conv2d or Linear, which has its name for messages."""
        self.layer = layer
        self._shape = tuple(module.weight.shape)  # type: ignore[operator, arg-type]
        self.groups: int = getattr(module, "groups", 1)  # type: ignore[assignment]
        k = math.prod(self._shape[1:])
        self.parts = next(parts for parts in range(1, k + 1) if k % parts == 0 and k // parts <= MOST_INPUTS)
        self.inputs = k // self.parts
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

        Raises:
            ValueError: Naming the layer, if its class doesn't multiply by its weight as we know it.
        """
        operand = self._operand(module, inputs, named or {})
        rows, positions = operand.rows, operand.positions
        if rows.numel() == 0 or operand.count == 0:
            return
        self.images += operand.images
        step = self._step(operand.count, positions)
        chosen = torch.arange(-self._seen % step, operand.count, step, device=rows.device)
        self._seen += operand.count
        self._weight += step * len(chosen)
        self.patches += len(chosen)
        for some in chosen.split(max(1, CHUNK // (self.groups * self.parts * self.inputs))):
            self._add(self._patches(operand, some), step)

    def _step(self, count: int, positions: int) -> int:
        """Return the distance of the positions that are taken of `count`, so that unfolding costs as much as the layer."""
        k = self.inputs * self.parts
        ratio = -(-k * self.groups // self._shape[0])
        step = max(1, min(ratio, (self._seen + count) // (ENOUGH * k)))
        while math.gcd(step, positions) > 1:
            step += 1
        return step

    def _patches(self, operand: _Operand, chosen: Tensor) -> Tensor:
        """Return patches (groups x parts, patches, inputs) at some positions, in float32 or better."""
        if operand.offsets is None:
            taken = operand.rows[chosen]
        else:
            taken = operand.rows[(operand.starts(chosen)[:, None] + operand.offsets).flatten()]
        if taken.dtype not in (torch.float32, torch.float64):
            taken = taken.float()
        kernel = math.prod(self._shape[2:])
        taken = taken.view(len(chosen), kernel, self.groups, self._shape[1]).permute(2, 0, 1, 3)
        split = taken.reshape(self.groups, len(chosen), self.parts, self.inputs)
        return split.transpose(1, 2).reshape(-1, len(chosen), self.inputs)

    def _add(self, patches: Tensor, share: int) -> None:
        if self._shift.numel() == 0:
            self._shift = patches.mean(1, keepdim=True)
            self._sum = torch.zeros_like(self._shift, dtype=torch.float64)
            self._squares = patches.new_zeros(len(patches), self.inputs, self.inputs)
        centred = patches.sub_(self._shift)
        self._sum += share * centred.sum(1, keepdim=True, dtype=torch.float64)
        self._squares.baddbmm_(centred.mT, centred, alpha=share)

    def mean(self) -> Tensor:
        """Return the mean patch (groups x parts, inputs), in the order of `grouped`, float64."""
        return (self._shift + self._sum / self._weight).squeeze(1)

    def covariance(self, centred: bool = True) -> Tensor:
        """Return E[p p^T] - E[p] E[p]^T (groups x parts, inputs, inputs), in the order of `grouped`.

        Args:
            centred: Whether a correction of the bias follows; False: E[p p^T].

        Raises:
            ValueError: Naming the layer, if nothing was seen of it, or if a product is beyond float32.
        """
        if not self.patches:
            raise ValueError(f"layer {self.layer!r} was never called during calibration: calibrate with inputs that reach it")
        moved = self._sum / self._weight
        made = self._squares / self._weight
        made -= (moved.mT @ moved).to(made.dtype)
        if not centred:
            mean = self.mean()[:, None].to(made.dtype)
            made += mean.mT @ mean
        if not made.isfinite().all():
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

    def _operand(self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> _Operand:
        try:
            with _Intercept(self._shape):
                module.forward(*inputs, **named)
        except _Found as found:
            return _Operand(found, self._shape)
        raise ValueError(
            f"layer {self.layer!r} of class {type(module).__name__} calls neither F.linear nor torch's convolution with a weight "
            f"of its shape {self._shape}, so that nobody knows what its weight is multiplied with"
        )


class _Found(Exception):  # noqa: N818  (it ends a forward pass early, and is no error)
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
    """Where the patches of an input lie.

    Attributes:
        rows: The input's positions, padding included, as rows of channels.
        images: How many images.
        positions: How many patches an image has.
        count: How many patches there are.
        offsets: The rows of a patch, from its first one; None where a patch is one row.
    """

    offsets: Tensor | None

    def __init__(self, found: _Found, shape: tuple[int, ...]) -> None:
        if len(shape) == 2:
            x = found.x
            self.rows = x.reshape(-1, shape[1])
            self.images = 1
            if x.dim() > 1:
                self.images = len(x)
            self.count = len(self.rows)
            self.positions = max(1, self.count // max(1, self.images))
            self.offsets = None
        else:
            self._unfold(found, shape)

    def _unfold(self, found: _Found, shape: tuple[int, ...]) -> None:
        x, sizes = found.x, len(shape) - 2
        if x.dim() == sizes + 1:
            x = x[None]
        kernel, stride, dilation = shape[2:], _each(found.stride, sizes), _each(found.dilation, sizes)
        x = F.pad(x, _padding(found.padding, kernel, dilation))
        sides = x.shape[2:]
        outputs = [
            (side - step * (length - 1) - 1) // jump + 1
            for side, step, length, jump in zip(sides, dilation, kernel, stride, strict=True)
        ]
        self.images, self.positions = len(x), math.prod(outputs)
        self.count = self.images * self.positions
        self.rows = x.movedim(1, -1).reshape(-1, x.shape[1])
        self.offsets = None
        if kernel != (1,) * sizes or outputs != list(sides):
            self._sides, self._outputs, self._stride = sides, outputs, stride
            self.offsets = torch.zeros(1, dtype=torch.long, device=x.device)
            for side, length, step in zip(sides, kernel, dilation, strict=True):
                along = step * torch.arange(length, device=x.device)
                self.offsets = (self.offsets[:, None] * side + along).flatten()

    def starts(self, chosen: Tensor) -> Tensor:
        """Return the first row of the patches at some positions."""
        image, position = chosen // self.positions, chosen % self.positions
        row, factor = image * math.prod(self._sides), 1
        for side, count, jump in zip(reversed(self._sides), reversed(self._outputs), reversed(self._stride), strict=True):
            row = row + position % count * (jump * factor)
            position, factor = position // count, factor * side
        return row


def _each(value: Any, sizes: int) -> tuple[int, ...]:
    """Return a number for every spatial dimension."""
    if isinstance(value, int):
        return (value,) * sizes
    given = tuple(value)
    if len(given) == 1:
        return given * sizes
    return given


def _padding(padding: Any, kernel: tuple[int, ...], dilation: tuple[int, ...]) -> list[int]:
    """Return a convolution's padding as F.pad takes it: the last dimension first, before and after."""
    if padding == "valid":
        padding = 0
    made = []
    if padding == "same":
        for length, step in zip(reversed(kernel), reversed(dilation), strict=True):
            total = step * (length - 1)
            made += [total // 2, total - total // 2]
        return made
    for amount in reversed(_each(padding, len(kernel))):
        made += [amount, amount]
    return made
