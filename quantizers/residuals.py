"""Quantizers of 8 bits where tensors meet: at the operands of additions, and at the inputs of average pools.

Layers quantize what they read. What two branches add up, and what a pool averages, stays in float,
unless it has a quantizer of its own. Runtimes that compute additions and pools in integers (ONNX
Runtime's QLinearAdd and QLinearGlobalAveragePool, XNNPACK, TensorRT) want one there.

`insert_residual_quantizers` puts them into a float network, where they do nothing until `quantize`
calibrates them. Every module whose own code adds or averages is rewritten by torch.fx, with the
modules that it calls left as they are: names, parameters and hooks stay the same.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from quantizers.batches import Batches, batches_of, called, copied, prepared
from quantizers.calling import Forward, count_of, inputs_of, leaves, map_tensors, samples
from quantizers.copying import copy_network, evaluating
from quantizers.functional import (
    MAX_BITS,
    blocks,
    blockwise,
    differentiated,
    followed,
    integer_range,
    relative_error,
    result_like,
)
from quantizers.layers import QuantLayer
from quantizers.left_in_float import close_fast_paths
from quantizers.observers import Observer, first_input, observe
from quantizers.policy import QUANTIZABLE
from quantizers.scheme import Scheme

BITS = MAX_BITS
KEY = "residual_quantizers"  # under which name a module has its quantizers
PREFIX = "of_"  # before a tensor's name: a module of torch may not be called like a method of a dictionary
EXAMPLES = 2  # samples by which a network is looked at: with one, what is broadcast over the batch has the batch's shape

# Functions of torch and of tensors, without underscores, that add two tensors.
ADDITIONS = {"add", "iadd", "radd"}
POOLS = {"avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"}
COVERS = 2.0  # how many times its own squared error a tensor's grid may leave that is also a layer's
CONSTANTS = (bool, int, float, str, type(None))  # arguments whose value a module's code may look at


class ResidualQuantizer(nn.Module):
    """Quantizes a tensor to 8 bits, per tensor: x^ = s (clamp(round(x / s) + z, low, high) - z).

    That is `torch.fake_quantize_per_tensor_affine`, whose gradient is straight-through (Bengio et
    al. 2013, arXiv 1308.3432): it passes where low <= round(x / s) + z <= high, and is zero elsewhere.
    Until it is calibrated it does nothing.

    Attributes:
        calibrated: Whether it quantizes.
        scale: The real value of 1, a float32.
        zero_point: The integer that stands for real 0 (Jacob et al., CVPR 2018, section 2.1).
        low: The smallest integer.
        high: The largest.
        in_operations: Whether it computes in simple operations, for writers of files that don't know torch's function.
    """

    in_operations = False

    def __init__(self) -> None:
        """Do nothing as yet."""
        super().__init__()
        self.calibrated = False
        self.scale, self.zero_point, self.low, self.high = 1.0, 0, 0, 2**BITS - 1

    def set_grid(self, grid: ResidualGrid) -> None:
        """Quantize to a grid from now on.

        Args:
            grid: Scale, zero point, and the lowest and highest integer.
        """
        self.scale, self.zero_point, self.low, self.high = grid
        self.calibrated = True

    @property
    def grid(self) -> ResidualGrid:
        """Return the grid."""
        return ResidualGrid(self.scale, self.zero_point, self.low, self.high)

    def forward(self, x: Tensor) -> Tensor:
        """Return the nearest values on the grid, in x's type; NaN stays NaN."""
        if not self.calibrated:
            return x
        if isinstance(x, fx.Proxy):
            return self._by_torch(x)
        values = x
        if x.dtype in (torch.float16, torch.bfloat16):
            values = x.float()
        if self.in_operations:
            low, high = self.low - self.zero_point, self.high - self.zero_point
            made = (values * self._inverse()).round().clamp(low, high) * self.scale
        elif values.dtype == torch.float32 and not differentiated(x) and not followed(x):
            made = self._in_pieces(values)
        else:
            made = self._by_torch(values)
            # Torch makes integers of NaN. Whoever trains would not be told.
            if not followed(x) and bool(x.isnan().any()):
                made = torch.where(x.isnan(), values, made)
        if made.dtype != x.dtype:
            made = made.to(x.dtype)
        return made

    def _by_torch(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, self.low, self.high)

    def _in_pieces(self, x: Tensor) -> Tensor:
        """Compute the same, a few times as fast: torch's function writes down for a gradient what was clipped."""
        inverse = self._inverse()
        low, high = self.low - self.zero_point, self.high - self.zero_point
        if not blockwise(x):
            return (x * inverse).round_().clamp_(low, high).mul_(self.scale)
        made = result_like(x, reuse=True)
        for source, target in blocks(x, made):
            torch.mul(source, inverse, out=target).round_().clamp_(low, high).mul_(self.scale)
        return made

    def _inverse(self) -> float:
        """Return 1 / scale in float32, by which torch's function multiplies."""
        return float(np.float32(1) / np.float32(self.scale))

    def extra_repr(self) -> str:
        """Show the grid."""
        if not self.calibrated:
            return "float"
        return f"scale={self.scale:.4g}, zero_point={self.zero_point}, low={self.low}, high={self.high}"


class ResidualGrid(NamedTuple):
    """What values are rounded to: scale * (integer - zero_point), integers from `low` to `high`."""

    scale: float
    zero_point: int
    low: int
    high: int


class ResidualQuantizers(nn.ModuleDict):
    """The residual quantizers of one module, by what its code calls the tensors that they quantize."""


def residual_quantizers(network: nn.Module) -> dict[str, ResidualQuantizer]:
    """Return the residual quantizers of a network by name, in the order of its modules.

    Args:
        network: The network.

    Returns:
        Quantizers by their dotted module names.
    """
    return {name: module for name, module in network.named_modules() if isinstance(module, ResidualQuantizer)}


def insert_residual_quantizers(
    network: nn.Module,
    example: Batches | None = None,
    *,
    places: Mapping[str, Any] | None = None,
    forward: Forward | None = None,
) -> nn.Module:
    """Make a copy of a float network with quantizers at the operands of additions and the inputs of average pools.

    Every tensor gets one, and whoever reads the tensor reads what the quantizer makes of it. Additions
    are of two tensors that the network computes, of one shape, or of maps and one value per channel
    or per place. Pools are torch's, and means over height and width. The quantizers do nothing until
    `quantize` calibrates them. Names of modules, parameters and buffers stay as they are.

    Args:
        network: A float network; it is left alone.
        example: Inputs as `quantize` takes them for calibration; the first two samples are looked at.
        places: In place of an example: what `residual_places` returned for the same network.
        forward: What runs the network on a batch, as in `quantize`.

    Returns:
        The copy, in the mode of the network. It computes the same.

    Raises:
        ValueError: In a sentence that names the network and the module, if torch.fx can't follow its
            code, or if the code reads a tensor after it was changed in place; for a network that has
            such quantizers already; for places that are of another network.
    """
    if residual_quantizers(network):
        raise ValueError("the network has residual quantizers already: give the network without them")
    if (example is None) == (places is None):
        raise ValueError("give `example` (inputs) or `places` (of residual_places), one of the two")
    made = copy_network(network)
    close_fast_paths(made)
    if places is not None:
        _put_back(made, places)
        return made
    assert example is not None
    batch = _example(made, example, forward)

    def run() -> Any:
        return called(made, copied(batch), forward)

    with evaluating(made), torch.no_grad():
        expected = map_tensors(run(), torch.clone)
        looked = _Look(made)
        with looked:
            run()
        finder = _Finder(made, looked)
        for owner, names in finder.places().items():
            _rewrite(owner, finder.graph(owner), looked.constants(owner), names)
        _check_same(made, expected, run)
    return made


def add_residual_quantizers(qnetwork: nn.Module, calibrate: Batches, *, forward: Forward | None = None) -> nn.Module:
    """Make a copy of a quantized network with residual quantizers, which it was made and trained without.

    Args:
        qnetwork: What `quantize` made, at its bits; it is left alone.
        calibrate: Inputs that set the scales, as `quantize` takes them.
        forward: What runs the network on a batch, as in `quantize`.

    Returns:
        The copy, whose residual quantizers are calibrated on what the quantized layers compute.

    Raises:
        ValueError: As `insert_residual_quantizers`.
    """
    batches = list(batches_of(calibrate, qnetwork))
    made = insert_residual_quantizers(qnetwork, batches, forward=forward)
    layers = {name: module for name, module in made.named_modules() if isinstance(module, QuantLayer)}
    quantizers: dict[str, nn.Module] = dict(residual_quantizers(made))
    first = FirstReaders(quantizers, layers)
    observers = observe(made, {**layers, **quantizers}, batches, also=(first.hooks(),), forward=forward)
    calibrate_residuals(made, observers, layers, first.found)
    return made


def residual_places(network: nn.Module) -> dict[str, Any]:
    """Describe where a network has residual quantizers, as plain data for `insert_residual_quantizers`.

    Args:
        network: A network with residual quantizers.

    Returns:
        By the name of a module: `tensors`, what its code calls the tensors that have one, and
        `arguments`, what it was called with beside tensors.
    """
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, _Rewritten):
            tensors = [key.removeprefix(PREFIX) for key in module._modules[KEY]]  # type: ignore[union-attr]
            found[name] = {"tensors": tensors, "arguments": dict(module.residual_code.arguments)}
    return found


def _put_back(network: nn.Module, places: Mapping[str, Any]) -> None:
    """Insert quantizers, in place, where `residual_places` says that they were. Raises ValueError if they can't be there."""
    modules = dict(network.named_modules())
    with evaluating(network):
        for name, place in places.items():
            try:
                owner, names, arguments = modules[name], list(place["tensors"]), dict(place["arguments"])
                graph = _traced(owner, arguments)
            except Exception as error:  # whatever a module's code raises when it is called with something that is no tensor
                raise ValueError(_refusal(network, modules.get(name, network), error)) from error
            if not names or not set(names) <= {node.name for node in graph.nodes if node.op != "output"}:
                raise ValueError(
                    f"residual quantizers are of another network: module {name[:80]!r} of {type(network).__name__} has no "
                    f"tensors {', '.join(map(str, names))[:80]}"
                )
            _rewrite(owner, graph, arguments, names)


def remove_residual_quantizers(network: nn.Module) -> None:
    """Turn a network with residual quantizers, in place, into what it was without them.

    Args:
        network: The network; one without them stays as it is.
    """
    for module in list(network.modules()):
        if isinstance(module, _Rewritten):
            del module._modules[KEY]
            del module.residual_code
            module.__class__ = plain_class(module)  # type: ignore[assignment]


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before its code was rewritten; its class, if it wasn't."""
    if not isinstance(module, _Rewritten):
        return type(module)
    kind: type[nn.Module] = type(module).__mro__[2]
    return kind


class FirstReaders:
    """Finds, in a pass in which residual quantizers do nothing, the layers that read their tensors as they are.

    Attributes:
        found: The first such layer by the quantizer's name.
    """

    def __init__(self, quantizers: Iterable[str], layers: Iterable[str]) -> None:
        """Take the names of quantizers and of layers."""
        self.found: dict[str, str] = {}
        self._quantizers, self._layers = tuple(quantizers), tuple(layers)
        self._tensors: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}  # that quantizers saw, with their version

    def hooks(self) -> dict[str, Callable[..., None]]:
        """Return pre-hooks, with keywords, for all of them by name."""
        hooks: dict[str, Callable[..., None]] = {name: functools.partial(self._note, name) for name in self._quantizers}
        if hooks:
            hooks |= {name: functools.partial(self._look, name) for name in self._layers}
        return hooks

    def _note(self, name: str, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        x: Tensor = first_input(module, inputs, named)
        if not x.is_inference():
            self._tensors[id(x)] = weakref.ref(x), x._version, name

    def _look(self, name: str, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        x: Tensor = first_input(module, inputs, named)
        if id(x) not in self._tensors or x.is_inference():
            return
        seen, version, quantizer = self._tensors[id(x)]
        if x is seen() and x._version == version:
            self.found.setdefault(quantizer, name)


def calibrate_residuals(
    network: nn.Module,
    observers: Mapping[str, Observer],
    layers: Mapping[str, QuantLayer],
    readers: Mapping[str, str],
) -> None:
    """Give the residual quantizers of a network their grids.

    It is that of the smallest squared error, unless the schemes' `calibration` is `max` or
    `percentile`: unsigned where no value was negative, else with a zero point; symmetric where the
    schemes' integers are always signed, or their scales powers of two, as hardware wants it that has
    no others. Where a layer reads the tensor, and its scheme has a grid of 8 bits that was found from
    data and stays as it is in training, that is taken unless its squared error is more than `COVERS`
    times as large: at 8 bits the layer then finds its input quantized already.

    Args:
        network: The network.
        observers: What calibration saw of the quantizers' inputs, by name.
        layers: The calibrated layers, by name.
        readers: The layer that reads a quantizer's tensor, by the quantizer's name (`FirstReaders`).

    Raises:
        ValueError: Naming it, for a quantizer that calibration didn't reach.
    """
    rule = _Rule.of([layer.scheme for layer in layers.values()])
    for name, quantizer in residual_quantizers(network).items():
        observer = observers[name]
        if not observer.values:
            raise ValueError(
                f"residual quantizer {name!r} was never reached during calibration, so it has no scale: give `calibrate` "
                "inputs that reach it"
            )
        quantizer.set_grid(rule.grid(observer))
        shared = None
        if name in readers:
            shared = _grid_of_layer(layers[readers[name]])
        if shared is None:
            continue
        own, sample = quantizer.grid, observer.sample()
        most = COVERS * relative_error(sample, quantizer(sample))
        quantizer.set_grid(shared)
        if relative_error(sample, quantizer(sample)) > most:
            quantizer.set_grid(own)


def _grid_of_layer(layer: QuantLayer) -> ResidualGrid | None:
    """Return the grid of a layer's input at 8 bits; None if it has none, or training changes it."""
    scheme = layer.scheme
    if scheme.learned or "activation_scale" not in layer.state_names or not scheme.has_integer_activations:
        return None
    if not scheme.takes(None, BITS, layer.signed):
        return None
    scale = float(scheme.activation_step(layer, BITS))
    low, high = integer_range(BITS, scheme.has_signed_inputs(layer, BITS))
    return ResidualGrid(scale, scheme.zero_point(layer, BITS), low, high)


class _Rule(NamedTuple):
    """How grids of values are found: as the schemes of the layers find theirs."""

    calibration: str
    is_signed: bool
    power_of_two: bool

    @classmethod
    def of(cls, schemes: Iterable[Scheme]) -> _Rule:
        """Take the rule of some layers' schemes."""
        calibration, is_signed, power_of_two = "mse", False, False
        for scheme in schemes:
            if getattr(scheme, "calibration", "") in ("max", "percentile"):
                calibration = scheme.calibration  # type: ignore[attr-defined]
            is_signed = is_signed or _option(scheme, "activations") == "signed"
            power_of_two = power_of_two or _option(scheme, "power_of_two") is True
        return cls(calibration, is_signed, power_of_two)

    def grid(self, observer: Observer) -> ResidualGrid:
        """Return the grid for what was seen."""
        signed = observer.signed or self.is_signed
        symmetric = self.is_signed or self.power_of_two
        assert observer.histogram is not None
        grids = observer.histogram.grids(
            observer.low,
            observer.high,
            self.calibration,
            signed=signed,
            asymmetric=not symmetric,
            power_of_two=self.power_of_two,
        )
        scale, zero_point = float(grids.scales[BITS - 1]), int(grids.zero_points[BITS - 1])
        if signed and symmetric:
            return ResidualGrid(scale, 0, *integer_range(BITS, True, narrow=False))
        return ResidualGrid(scale, zero_point, *integer_range(BITS, False))


def _option(scheme: Scheme, choice: str) -> object:
    """Return what a scheme has for a choice that hardware makes; None if it has no such choice."""
    return getattr(scheme, scheme.choices.get(choice, ""), None)


def residual_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the grids of a network's residual quantizers as tensors: a part of `quantizer_state`."""
    state = {}
    for name, quantizer in residual_quantizers(network).items():
        if quantizer.calibrated:
            for key, value in quantizer.grid._asdict().items():
                state[f"{name}.{key}"] = torch.tensor(value)
    return state


def read_residual_state(network: nn.Module, state: Mapping[str, Tensor]) -> dict[ResidualQuantizer, ResidualGrid]:
    """Read from a quantizer state what `residual_state` returned.

    Args:
        network: The network.
        state: The state; it has all that is expected here.

    Returns:
        The grid of every residual quantizer.

    Raises:
        ValueError: For what is no grid of 8 bits.
    """
    found = {}
    for name, quantizer in residual_quantizers(network).items():
        values = {}
        for key in ResidualGrid._fields:
            tensor = state[f"{name}.{key}"]
            if not isinstance(tensor, Tensor) or tensor.numel() != 1:
                raise ValueError(f"the quantizer state is damaged: {name}.{key} is no number")
            values[key] = tensor.item()
        scale = float(values.pop("scale"))
        zero_point, low, high = (int(value) for value in values.values())
        ends = [integer_range(BITS, False), integer_range(BITS, True), integer_range(BITS, True, narrow=False)]
        if not 0 < scale < float("inf") or (low, high) not in ends or not low <= zero_point <= high:
            raise ValueError(
                f"the quantizer state is damaged: {name} has scale {scale}, zero point {zero_point}, {low}..{high}"
            )
        found[quantizer] = ResidualGrid(scale, zero_point, low, high)
    return found


def _example(network: nn.Module, example: Batches, forward: Forward | None) -> Any:
    """Return the first samples of an example, as the network is run on them."""
    batch = next(iter(batches_of(example, network)), None)
    if batch is None:
        raise ValueError("residual quantizers are put where tensors meet in a pass over an example: give at least one sample")
    batch = prepared(batch, network, forward)
    inputs = batch
    if forward is not None:
        inputs = inputs_of(batch, network)
    few = map_tensors(samples(batch, count_of(inputs), 0, EXAMPLES), torch.clone)
    try:
        with evaluating(network), torch.no_grad():
            called(network, copied(few), forward)
    except ValueError:  # a network that takes batches of one size only
        return batch
    return few


class _Call(NamedTuple):
    """The first call of a module in a pass: who called it, and its arguments by name."""

    caller: nn.Module | None
    given: dict[str, Any]


class _Look(TorchFunctionMode):
    """Within a `with`, finds the modules whose own code adds or averages, and how modules are called.

    Attributes:
        owners: These modules, in the order in which they are met.
        calls: The first call of every module.
        counts: How often each was called.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.owners: dict[nn.Module, None] = {}
        self.calls: dict[nn.Module, _Call] = {}
        self.counts: dict[nn.Module, int] = {}
        self._network = network
        self._running: list[nn.Module] = []
        self._handles: list[Any] = []

    def __enter__(self) -> _Look:
        for module in self._network.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                self._handles.append(module.register_forward_pre_hook(self._begin, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._end, always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        for handle in self._handles:
            handle.remove()

    def constants(self, module: nn.Module) -> dict[str, Any]:
        """Return the arguments of a module's call whose value its code may look at, by name."""
        return {name: value for name, value in self.calls[module].given.items() if type(value) in CONSTANTS}

    def _begin(self, module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if module not in self.calls:
            caller = None
            if self._running:
                caller = self._running[-1]
            self.calls[module] = _Call(caller, _bound(module, inputs, named))
        self.counts[module] = self.counts.get(module, 0) + 1
        self._running.append(module)

    def _end(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._running.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").strip("_")
        # What layers do to their inputs and weights is theirs.
        of_layer = any(isinstance(module, QUANTIZABLE) for module in self._running)
        if self._running and not of_layer and _meeting(name, args, kwargs or {}):
            self.owners[self._running[-1]] = None
        return func(*args, **(kwargs or {}))


def _bound(module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by the names that the module's code has for them, defaults included."""
    try:
        bound = inspect.signature(module.forward).bind(*inputs, **named)
    except (TypeError, ValueError):
        return {}
    bound.apply_defaults()
    return dict(bound.arguments)


def _meeting(name: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the places, among a function's arguments, of tensors that want a quantizer; nothing for other functions.

    Args:
        name: The function's name, without underscores around it.
        args: Its arguments.
        named: Those by name.

    Returns:
        Places in `args`.
    """
    if name in ADDITIONS and len(args) >= 2 and _are_added(*args[:2]):
        return 0, 1
    if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        return ()
    if name in POOLS or (name == "mean" and _is_pool(args[0], args, named)):
        return (0,)
    return ()


def _are_added(one: Any, other: Any) -> bool:
    """Say whether these are two tensors of one shape, or a map (N, C, H, W) and one value per channel or per place."""
    for tensor in (one, other):
        if not isinstance(tensor, Tensor) or isinstance(tensor, nn.Parameter) or not tensor.is_floating_point():
            return False
    if one.dim() < 2 or one.dim() != other.dim():
        return False
    if one.shape == other.shape:
        return True
    large, small = one.shape, other.shape
    if small.numel() > large.numel():
        large, small = small, large
    per_channel = (*large[:2], *[1] * (len(large) - 2))
    per_place = (large[0], 1, *large[2:])
    return len(large) == 4 and tuple(small) in (per_channel, per_place)


def _is_pool(x: Tensor, args: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Say whether a mean is over height, width or both of maps, over the length of (N, C, L), or over tokens (N, L, C)."""
    dims = named.get("dim", named.get("axis"))
    if len(args) > 1:
        dims = args[1]
    if isinstance(dims, int):
        dims = [dims]
    if not isinstance(dims, list | tuple) or not all(isinstance(dim, int) for dim in dims):
        return False
    over = {dim % x.dim() for dim in dims}
    if x.dim() == 4 and over == {2, 3}:
        return True
    # With their dimension kept, means over one are parts of norms.
    keeps = named.get("keepdim", len(args) > 2 and args[2])
    first = {3: 1, 4: 2}.get(x.dim(), x.dim())
    return len(over) == 1 and min(over) >= first and not keeps


class _OwnCode(fx.Tracer):
    """Follows the code of one module; the modules that it calls aren't looked into."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


class _Values(fx.Interpreter):
    """Runs a module's code, and notes which of its tensors want a quantizer.

    Attributes:
        wanting: The nodes of these tensors.
    """

    def __init__(self, module: nn.Module, graph: fx.Graph) -> None:
        super().__init__(module, graph=graph)
        self.wanting: dict[fx.Node, None] = {}
        self._constant: set[fx.Node] = set()

    def run_node(self, node: fx.Node) -> Any:
        if node.op == "get_attr" or (node.op != "placeholder" and node.op != "call_module" and self._reads_constants(node)):
            self._constant.add(node)
        if node.op in ("call_function", "call_method"):
            args, named = self.fetch_args_kwargs_from_env(node)
            name = getattr(node.target, "__name__", str(node.target)).strip("_")
            operands = [node.args[place] for place in _meeting(name, args, named)]
            if all(isinstance(one, fx.Node) and one not in self._constant for one in operands):
                self.wanting.update(dict.fromkeys(operands))  # type: ignore[arg-type]
        return super().run_node(node)

    def _reads_constants(self, node: fx.Node) -> bool:
        return all(given in self._constant for given in node.all_input_nodes)


@dataclass
class _Finder:
    """Finds where quantizers go: for every module, the names of nodes in the graph of its code."""

    network: nn.Module
    looked: _Look
    graphs: dict[nn.Module, fx.Graph] = field(default_factory=dict)

    def places(self) -> dict[nn.Module, list[str]]:
        found: dict[nn.Module, dict[str, None]] = {}
        for owner in self.looked.owners:
            values = _Values(owner, self.graph(owner))
            values.run(*self._given(owner))
            found[owner] = dict.fromkeys(node.name for node in values.wanting)
        todo = [(owner, name) for owner, names in found.items() for name in names]
        while todo:
            owner, name = todo.pop()
            caller, outer = self._read_outside(owner, name, found)
            if caller is None:
                continue
            del found[owner][name]
            if outer not in found.setdefault(caller, {}):
                found[caller][outer] = None
                todo.append((caller, outer))
        return {owner: list(names) for owner, names in found.items() if names}

    def graph(self, module: nn.Module) -> fx.Graph:
        """Return the graph of a module's code in evaluation mode. Raises ValueError if torch.fx can't follow it."""
        if module not in self.graphs:
            try:
                self.graphs[module] = _traced(module, self.looked.constants(module))
            except Exception as error:  # whatever a module's code raises when it is called with something that is no tensor
                raise ValueError(_refusal(self.network, module, error)) from error
        return self.graphs[module]

    def _given(self, module: nn.Module) -> list[Any]:
        """Return what a module was called with, for the inputs of its graph."""
        given = self.looked.calls[module].given
        inputs = [node for node in self.graph(module).nodes if node.op == "placeholder"]
        return [given[str(node.target).lstrip("*")] for node in inputs]

    def _read_outside(self, owner: nn.Module, name: str, found: Mapping[nn.Module, Iterable[str]]) -> tuple[Any, str]:
        """Find who calls a module with a tensor that others read too: there it gets its quantizer.

        Args:
            owner: The module.
            name: What its code calls the tensor.
            found: The tensors that have a quantizer.

        Returns:
            The outer module, and what its code calls the tensor; (None, "") if nobody else reads it.
        """
        while True:
            call = self.looked.calls[owner]
            node = next(node for node in self.graph(owner).nodes if node.name == name)
            if node.op != "placeholder" or call.caller is None or self.looked.counts[owner] > 1:
                return None, ""
            tensor = self._argument(call.caller, owner, str(node.target))
            if tensor is None:
                return None, ""
            if len(tensor.users) > 1 or tensor.name in found.get(call.caller, ()):
                return call.caller, tensor.name
            owner, name = call.caller, tensor.name

    def _argument(self, caller: nn.Module, module: nn.Module, name: str) -> fx.Node | None:
        """Return what a module's caller gives as one of its arguments; None if that can't be told."""
        try:
            graph = self.graph(caller)
        except ValueError:
            return None
        for node in graph.nodes:
            if node.op == "call_module" and caller.get_submodule(str(node.target)) is module:
                given = _bound(module, node.args, node.kwargs).get(name)
                if isinstance(given, fx.Node):
                    return given
        return None


def _traced(module: nn.Module, constants: Mapping[str, Any]) -> fx.Graph:
    """Follow a module's code in the mode that it has, at the given values of arguments that are no tensors."""
    graph = _OwnCode().trace(module, concrete_args=dict(constants))
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    names = list(inspect.signature(module.forward).parameters)
    for node, name in zip(inputs, names, strict=True):
        # Torch numbers those that have a value.
        if not str(node.target).startswith("*"):
            node.target = name
    return graph


def _refusal(network: nn.Module, module: nn.Module, reason: object) -> str:
    names = {other: name for name, other in network.named_modules()}
    what = f"module {names[module]!r} ({type(module).__name__})"
    if module is network:
        what = "its own code"
    words = " ".join(str(reason).split())[:200]
    return (
        f"{plain_class(network).__name__} can't have residual quantizers, since torch.fx can't follow {what}: {words}; "
        "leave residuals in float"
    )


class _Code(NamedTuple):
    """The code of a module, rewritten: source of a function `forward(self, ...)`, and what it refers to.

    Modules of Python among it are held by their names, since they can't be pickled.
    """

    source: str
    known: dict[str, Any]
    imported: dict[str, str]


@functools.cache
def _compiled(source: str) -> Any:
    return compile(source, "<residual quantizers>", "exec")


def _function(code: _Code) -> Callable[..., Any]:
    namespace = dict(code.known)
    namespace.update({name: importlib.import_module(path) for name, path in code.imported.items()})
    exec(_compiled(code.source), namespace)
    made: Callable[..., Any] = namespace["forward"]
    return made


class _RewrittenCode:
    """The code of a module in both modes. Copies of the module share it, since it never changes.

    Attributes:
        arguments: The values of arguments that are no tensors, for which it is.
    """

    def __init__(self, evaluating: _Code, training: _Code, arguments: Mapping[str, Any]) -> None:
        self.arguments = dict(arguments)
        self._codes = {False: evaluating, True: training}
        self._compile()

    def _compile(self) -> None:
        # At once: nothing can be compiled while the compiler of torch follows the module.
        self._functions = {mode: _function(code) for mode, code in self._codes.items()}

    def function(self, training: bool) -> Callable[..., Any]:
        """Return the code in a mode, a function of the module and its arguments."""
        return self._functions[training]

    def __getstate__(self) -> dict[str, Any]:
        return {"arguments": self.arguments, "_codes": self._codes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._compile()

    def __deepcopy__(self, memo: Any) -> _RewrittenCode:
        return self


class _Rewritten(nn.Module):
    """A module whose own code reads some tensors through quantizers.

    Attributes:
        residual_code: Its code.
    """

    residual_code: _RewrittenCode

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copy and pickle by the plain class, since nobody finds the rewritten one by its name."""
        inherited = getattr(super(), "__getstate__", self.__dict__.copy)  # object has one from Python 3.11 on
        return _empty_module, (plain_class(self),), inherited()


def _empty_module(kind: type[nn.Module]) -> nn.Module:
    made = _rewritten_class(kind)
    return made.__new__(made)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _rewritten_class(kind: type[nn.Module]) -> type[nn.Module]:
    """Return the class of modules of a class whose code was rewritten."""
    if kind in _CLASSES:
        return _CLASSES[kind]

    # Whoever asks for its signature, to call it, sees that of the module's own code.
    @functools.wraps(kind.forward)
    def forward(self: Any, *inputs: Any, **named: Any) -> Any:
        return self.residual_code.function(self.training)(self, *inputs, **named)

    content = {"__doc__": f"{kind.__name__} with residual quantizers.", "forward": forward}
    # By the same name, which messages tell.
    _CLASSES[kind] = type(kind.__name__, (_Rewritten, kind), content)
    return _CLASSES[kind]


def _rewrite(owner: nn.Module, graph: fx.Graph, arguments: Mapping[str, Any], names: list[str]) -> None:
    """Put quantizers behind tensors in a module's code.

    Args:
        owner: The module.
        graph: Its code in evaluation mode.
        arguments: The values of its arguments that are no tensors.
        names: What its code calls the tensors.
    """
    quantizers = ResidualQuantizers({f"{PREFIX}{name}": ResidualQuantizer() for name in names})
    quantizers.train(owner.training)
    evaluating = _written(graph, names)
    training = evaluating
    before = owner.training
    other = ""
    try:
        owner.training = True
        of_training = _traced(owner, arguments)
        if set(names) <= {node.name for node in of_training.nodes}:
            training = _written(of_training, names)
        else:
            other = "in training it adds or averages other tensors"
    except Exception as error:  # whatever torch.fx can't follow in training alone
        other = f"torch.fx can't follow it in training ({' '.join(str(error).split())[:200]})"
    finally:
        owner.training = before
    if other:
        warnings.warn(
            f"{type(owner).__name__} with residual quantizers trains with its code of evaluation: {other}", stacklevel=2
        )
    owner.add_module(KEY, quantizers)
    owner.residual_code = _RewrittenCode(evaluating, training, arguments)  # type: ignore[assignment]
    owner.__class__ = _rewritten_class(type(owner))


def _written(graph: fx.Graph, names: list[str]) -> _Code:
    """Return the code of a graph in which quantizers follow the nodes of some names."""
    last_input = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph.nodes):
        if node.name not in names:
            continue
        behind = node
        if node.op == "placeholder":
            behind = last_input
        with graph.inserting_after(behind):
            quantized = graph.call_module(f"{KEY}.{PREFIX}{node.name}", (node,))
        node.replace_all_uses_with(quantized, delete_user_cb=lambda user, own=quantized: user is not own)
    code = graph.python_code("self")
    imported = {name: value.__name__ for name, value in code.globals.items() if inspect.ismodule(value)}
    known = {name: value for name, value in code.globals.items() if name not in imported}
    return _Code(code.src, known, imported)


def _check_same(network: nn.Module, expected: Any, run: Callable[[], Any]) -> None:
    """Raise ValueError unless a network with quantizers computes what it did without: also with copies behind them all."""
    name = plain_class(network).__name__
    refused = f"{name} can't have residual quantizers, since {{}}; leave residuals in float"
    if not _are_equal(expected, run()):
        raise ValueError(refused.format("what torch.fx makes of its code gives something else"))
    quantizers = residual_quantizers(network).values()
    handles = [quantizer.register_forward_hook(lambda module, given, made: made.clone()) for quantizer in quantizers]
    try:
        if not _are_equal(expected, run()):
            raise ValueError(refused.format("it reads a tensor after a module that was given it has changed it in place"))
    finally:
        for handle in handles:
            handle.remove()


def _are_equal(expected: Any, outputs: Any) -> bool:
    pairs = list(zip(leaves(expected), leaves(outputs), strict=False))
    if len(leaves(expected)) != len(leaves(outputs)):
        return False
    return all(one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True) for one, other in pairs)
