"""Functions of each value as ONNX operators of opset 17."""

from __future__ import annotations

import math
from typing import Any

from haq.deployment.nodes import Node

# What one operator without attributes computes.
PLAIN = {
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "hardswish": "HardSwish",
    "erf": "Erf",
    "exp": "Exp",
    "log": "Log",
    "abs": "Abs",
    "sqrt": "Sqrt",
    "reciprocal": "Reciprocal",
    "sin": "Sin",
    "cos": "Cos",
    "atan": "Atan",
    "sinh": "Sinh",
    "cosh": "Cosh",
    "asinh": "Asinh",
    "selu": "Selu",
}


def write_function(writer: Any, node: Node, source: str) -> None:
    """Write a function of each value.

    Args:
        writer: The `onnx_nodes.GraphWriter`.
        node: A node of kind "function".
        source: The name of the tensor that it is applied to.

    Raises:
        ValueError: Naming the layer and the function, for one that isn't known.
    """
    if node.function in PLAIN:
        writer.op(PLAIN[node.function], [source], node.name)
        return
    write = WRITERS.get(node.function)
    if write is None:
        raise ValueError(f"layer {node.module!r} can't be deployed: ONNX files have no function {node.function!r}")
    write(_Steps(writer, node), source)


class _Steps:
    """Writes the operators of one function; what they make in between has the node's name with a number."""

    def __init__(self, writer: Any, node: Node) -> None:
        self.writer = writer
        self.given = node.arguments
        self.name = node.name
        self.count = 0

    def __call__(self, kind: str, *inputs: str | float, **attributes: Any) -> str:
        """Write an operator in between; numbers among its inputs become constants."""
        self.count += 1
        return self._op(kind, inputs, f"{self.name}:{self.count}", attributes)

    def last(self, kind: str, *inputs: str | float, **attributes: Any) -> None:
        """Write the operator that makes the result."""
        self._op(kind, inputs, self.name, attributes)

    def _op(self, kind: str, inputs: tuple[str | float, ...], made: str, attributes: dict[str, Any]) -> str:
        names = []
        for given in inputs:
            if not isinstance(given, str):
                given = self.writer.constant(f"float_{given:.9g}", given)
            names.append(given)
        result: str = self.writer.op(kind, names, made, **attributes)
        return result

    def number(self, key: str, default: float) -> float:
        """Return an argument of the function."""
        value = self.given.get(key)
        if value is None:
            return default
        return float(value)


def _silu(steps: _Steps, x: str) -> None:
    steps.last("Mul", x, steps("Sigmoid", x))


def _hardsigmoid(steps: _Steps, x: str) -> None:
    steps.last("HardSigmoid", x, alpha=1 / 6, beta=0.5)


def _gelu(steps: _Steps, x: str) -> None:
    if steps.given.get("approximate") == "tanh":
        cube = steps("Mul", steps("Mul", steps("Mul", x, x), x), 0.044715)
        bent = steps("Tanh", steps("Mul", steps("Add", x, cube), math.sqrt(2 / math.pi)))
    else:
        bent = steps("Erf", steps("Mul", x, math.sqrt(0.5)))
    steps.last("Mul", steps("Mul", x, 0.5), steps("Add", bent, 1.0))


def _elu(steps: _Steps, x: str) -> None:
    factor, stretch = steps.number("scale", 1.0), steps.number("input_scale", 1.0)
    alpha = steps.number("alpha", 1.0)
    if (factor, stretch) == (1.0, 1.0):
        steps.last("Elu", x, alpha=alpha)
        return
    # scale (max(0, x) + min(0, alpha (exp(input_scale x) - 1)))
    negative = steps("Min", steps("Elu", steps("Mul", x, stretch), alpha=alpha), 0.0)
    steps.last("Mul", steps("Add", steps("Relu", x), negative), factor)


def _celu(steps: _Steps, x: str) -> None:
    steps.last("Celu", x, alpha=steps.number("alpha", 1.0))


def _softplus(steps: _Steps, x: str) -> None:
    beta = steps.number("beta", 1.0)
    steps.last("Mul", steps("Softplus", steps("Mul", x, beta)), 1 / beta)


def _mish(steps: _Steps, x: str) -> None:
    steps.last("Mul", x, steps("Tanh", steps("Softplus", x)))


def _log_sigmoid(steps: _Steps, x: str) -> None:
    steps.last("Neg", steps("Softplus", steps("Neg", x)))


def _expm1(steps: _Steps, x: str) -> None:
    steps.last("Sub", steps("Exp", x), 1.0)


def _log1p(steps: _Steps, x: str) -> None:
    steps.last("Log", steps("Add", x, 1.0))


def _square(steps: _Steps, x: str) -> None:
    steps.last("Mul", x, x)


def _rsqrt(steps: _Steps, x: str) -> None:
    steps.last("Reciprocal", steps("Sqrt", x))


def _pow(steps: _Steps, x: str) -> None:
    steps.last("Pow", x, steps.number("exponent", 1.0))


def _hardshrink(steps: _Steps, x: str) -> None:
    steps.last("Shrink", x, lambd=steps.number("lambd", 0.5))


def _softshrink(steps: _Steps, x: str) -> None:
    bound = steps.number("lambd", 0.5)
    steps.last("Shrink", x, lambd=bound, bias=bound)


def _threshold(steps: _Steps, x: str) -> None:
    steps.last("Where", steps("Greater", x, steps.number("threshold", 0.0)), x, steps.number("value", 0.0))


WRITERS = {
    "silu": _silu,
    "hardsigmoid": _hardsigmoid,
    "gelu": _gelu,
    "elu": _elu,
    "celu": _celu,
    "softplus": _softplus,
    "mish": _mish,
    "log_sigmoid": _log_sigmoid,
    "expm1": _expm1,
    "log1p": _log1p,
    "square": _square,
    "rsqrt": _rsqrt,
    "pow": _pow,
    "hardshrink": _hardshrink,
    "softshrink": _softshrink,
    "threshold": _threshold,
}
