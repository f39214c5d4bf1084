"""Which operations of torch are products, and how many multiply-accumulates they take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

# Parts of the names of operations that multiply matrices or convolve, whatever else they do.
WORDS = frozenset(
    (
        *("mm", "addmm", "bmm", "baddbmm", "addbmm", "sspaddmm", "hspmm", "int8pack", "int4pack", "matmul", "gemm"),
        *("mv", "addmv", "addr", "ger", "dot", "vdot", "linear", "bilinear", "trilinear", "einsum"),
        *("conv", "conv1d", "conv2d", "conv3d", "convolution", "attention", "attn", "cdist", "euclidean"),
    )
)


def base_name(name: str) -> str:
    """Return what an operation is called without its namespace and the mark of writing in place."""
    return name.rpartition("::")[2].rstrip("_")


def is_product(name: str) -> bool:
    """Say whether the name of an operation is that of a product."""
    return not WORDS.isdisjoint(base_name(name).split("_"))


def product_macs(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> int | None:
    """Count the multiply-accumulates of a product.

    The formulas are those of `torch.utils.flop_counter`, half the operations that it counts, and some that it lacks. Of a
    product that neither knows it is the square root of the sizes of two operands and the result, multiplied: right for
    matrices, too much for a batch of them.

    Args:
        func: The operation, as torch dispatches it.
        args: What it was given.
        kwargs: What it was given by name.
        result: What it made.

    Returns:
        The number for the whole batch; None for a product of fewer than two tensors, whose operands can't be seen.
    """
    formula: Any = flop_registry.get(func._overloadpacket)
    if formula is not None:
        return int(formula(*args, **kwargs, out_val=result)) // 2
    operands = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    made = next((t for t in tree_leaves(result) if isinstance(t, Tensor)), None)
    if len(operands) < 2 or made is None:
        return None
    name = base_name(func._schema.name)
    if name in OWN:
        return OWN[name](operands, made, args)
    if name.startswith("_scaled_dot_product"):
        return int(sdpa_flop_count(*(t.shape for t in operands[:3]))) // 2
    if len(operands) > 2 and any(word.startswith("add") for word in name.split("_")):
        operands = operands[1:]  # the first is what the product is added to
    return math.isqrt(max(0, operands[0].numel() * operands[1].numel() * made.numel() - 1)) + 1


def _three(operands: list[Tensor], made: Tensor, args: tuple[Any, ...]) -> int:
    """What nn.Bilinear computes: three tensors, each with further dimensions where the others have theirs."""
    shapes = []
    for tensor, further in zip(operands, args[3:6], strict=False):
        shape = list(tensor.shape)
        for position in further:
            shape.insert(position, 1)
        shapes.append(shape)
    return math.prod(max(sizes) for sizes in zip(*shapes, strict=True))


# Those that `torch.utils.flop_counter` lacks: of the operands, the result and all arguments.
OWN: Mapping[str, Callable[[list[Tensor], Tensor, tuple[Any, ...]], int]] = {
    "mv": lambda operands, made, args: operands[0].numel(),
    "addmv": lambda operands, made, args: operands[1].numel(),
    "dot": lambda operands, made, args: operands[0].numel(),
    "vdot": lambda operands, made, args: operands[0].numel(),
    "addr": lambda operands, made, args: made.numel(),
    "addbmm": lambda operands, made, args: operands[1].numel() * operands[2].shape[-1],
    "conv_tbc": lambda operands, made, args: made.numel() * operands[1].shape[0] * operands[1].shape[1],
    "_trilinear": _three,
    "_cdist_forward": lambda operands, made, args: made.numel() * operands[0].shape[-1],
    "_euclidean_dist": lambda operands, made, args: made.numel() * operands[0].shape[-1],
}
