"""What a piece of hardware can do and what it can't, whatever it costs.

The key `capabilities:` of any hardware file, and the attribute `capabilities` of any target:

    capabilities:
      pairs: [8/8, 4/8, 4/4]              # weights/activations; or `weights: [4, 8]` and `activations: [8, 16]`
      kinds:
        depthwise: [8/8]
      layers:
        first: {weights: [8], activations: [8, 16]}
        head.classifier: [float]
      per_channel_weights: false          # one scale per layer
      zero_points: false
      activation_sign: unsigned           # auto, signed or unsigned integers
      power_of_two_scales: true
      accumulator_bits: 24
      on_overflow: wider                  # or refuse
      overflow_cost: 2.0                  # times the latency and energy

The most specific rule says which pairs a layer has: its own name before `first` and `last`, these before its kind, the kind
before what is said of all layers. A rule that gives pairs, or widths of both operands, replaces the more general ones; one
that gives the widths of one operand leaves those of the general pairs that have them. What no rule says anything of is left to
the target's costs. `first` and `last` are places in the workload, whatever layers are called.

Kinds are those of `Layer.kinds`: `conv` (more than one input channel per output and a kernel of more than 1x1), `pointwise`,
`depthwise`, `grouped`, `linear`; `conv1d` is any Conv1d, and one that is depthwise, pointwise or grouped obeys the rules of
both kinds. `matmul`, a product of two activations, is accepted; no layer of a workload is one yet.

Accumulators. One output of a layer is a sum of K = C_in / groups k_h k_w products of a weight and an activation. Integer
weights of w bits are symmetric, |q| <= 2^(w-1) - 1 (one bit: -1 and +1), unsigned activations of a bits are at most 2^a - 1,
signed ones 2^(a-1) - 1 (one bit: 1) in magnitude. So

    |sum| <= K max|q_w| max|q_a|

and an accumulator in two's complement needs the bits of that number and one for its sign. This is the bound by data type of
Colbert et al., "A2Q: Accumulator-Aware Quantization with Guaranteed Overflow Avoidance" (ICCV 2023, section 3), with the
largest integers themselves where theirs has the next powers of two. The bias isn't in it, and a pair with an operand in float
has no integers to sum.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from hw_models.cost import CostTable, describe_pairs
from hw_models.files import quoted
from hw_models.registry import printable
from hw_models.widths import FLOAT, PLACES, WIDTHS, at_places, pair_words, place_of, read_pair, read_widths, width_words
from hw_models.workload import Layer, Workload

KINDS = ("conv", "depthwise", "pointwise", "grouped", "linear", "conv1d", "matmul")
FIRST, LAST = "first", "last"
SIGNED, UNSIGNED = "signed", "unsigned"
MOST_ACCUMULATOR_BITS = 1024

Bools = NDArray[np.bool_]
Pairs = tuple[tuple[int, int], ...]


class Allowed(NamedTuple):
    """Which pairs of widths a layer has, two arrays (10, 10)."""

    supported: Bools
    promised: Bools  # of these, the ones that a rule names itself


class Rule(BaseModel):
    """Which pairs of widths there are: `pairs`, or `weights` and `activations` with every pair of the two; float is 32."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    pairs: Pairs | None = None
    weights: tuple[int, ...] | None = None
    activations: tuple[int, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _read_list(cls, value: Any) -> Any:
        """Take a list of pairs, or one, for the pairs."""
        if isinstance(value, str | list | tuple):
            return {"pairs": value}
        if not isinstance(value, Mapping | Rule):
            raise ValueError("give a list of pairs of widths, such as [8/8, 4/8], or a mapping with weights and activations")
        return value

    @field_validator("pairs", mode="before")
    @classmethod
    def _read_pairs(cls, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",")]
        if not isinstance(value, list | tuple):
            raise ValueError("give a list of pairs of widths, weights/activations, such as [8/8, 4/8]")
        if not value:
            raise ValueError("a set of pairs can't be empty: give some, such as [8/8, 4/8]")
        return tuple(sorted({read_pair(part) for part in value}))

    @field_validator("weights", "activations", mode="before")
    @classmethod
    def _read_widths(cls, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, str) and value in (SIGNED, UNSIGNED, "auto"):
            raise ValueError(f"these are widths, such as [4, 8]; of integers' signs say activation_sign: {value}")
        return read_widths(value)

    @model_validator(mode="after")
    def _check_forms(self) -> Rule:
        operand = None
        if self.weights is not None:
            operand = "weights"
        elif self.activations is not None:
            operand = "activations"
        if self.pairs is not None and operand is not None:
            raise ValueError(f"pairs and {operand} both say which widths there are: give one of the two")
        if type(self) is Rule and self.pairs is None and operand is None:
            raise ValueError("a rule must say something: give pairs such as [8/8, 4/8], or weights and activations")
        return self

    @property
    def words(self) -> str:
        """Write the widths: "4/4, 4/8, 8/8", "weights 4, 8 with any activations"; empty where nothing is said."""
        if self.pairs is not None:
            return describe_pairs(self.pairs)
        if self.weights is None and self.activations is None:
            return ""
        return f"{_operand_words('weights', self.weights)} with {_operand_words('activations', self.activations)}"

    def narrow(self, general: Allowed) -> Allowed:
        """Apply this rule to what the more general ones leave.

        Args:
            general: What the more general rules leave.

        Returns:
            What this rule leaves of it, or says in its place.
        """
        if self.pairs is not None:
            return _all_promised(_marked(self.pairs))
        of_weights, of_activations = _operand(self.weights), _operand(self.activations)
        both = of_weights[:, None] & of_activations
        if self.weights is not None and self.activations is not None:
            return _all_promised(both)
        return Allowed(general.supported & both, general.promised & both)


class Capabilities(Rule):
    """What hardware can do: every field is a key of its file below `capabilities:`; see the module.

    Attributes:
        pairs: The pairs of widths that all layers have, unless `kinds` or `layers` says otherwise; None: whatever the target
            has costs for.
        weights: The widths of weights instead, in every pair with `activations`.
        activations: The widths of activations.
        kinds: Rules by kind of layer.
        layers: Rules by name of layer, and for `first` and `last`.
        per_channel_weights: Whether the weights of every output channel can have a scale of their own.
        zero_points: Whether it takes zero points of activations off its sums; None: the target's own attribute says it.
        activation_sign: Whether integers of activations are all `signed`, all `unsigned`, or, with `auto`, as the data are.
        power_of_two_scales: Whether scales must be powers of two.
        accumulator_bits: The width of its sums; None: they never overflow.
        on_overflow: Whether a pair whose sums can overflow is refused, or computed by a wider unit.
        overflow_cost: What latency and energy are multiplied by in the wider unit.
    """

    kinds: dict[str, Rule] = Field(default_factory=dict)
    layers: dict[str, Rule] = Field(default_factory=dict)
    per_channel_weights: bool = True
    zero_points: bool | None = None
    activation_sign: Literal["auto", "signed", "unsigned"] = "auto"
    power_of_two_scales: bool = False
    accumulator_bits: int | None = Field(default=None, gt=1, le=MOST_ACCUMULATOR_BITS)
    on_overflow: Literal["refuse", "wider"] = "refuse"
    overflow_cost: float | None = Field(default=None, ge=1, le=1000, allow_inf_nan=False)

    def __str__(self) -> str:
        """Say on one line what it can do."""
        parts = [self.words or "whatever it has costs for"]
        parts += [f"{name}: {rule.words}" for name, rule in (*self.kinds.items(), *self.layers.items())]
        if not self.per_channel_weights:
            parts.append("one scale for all weights of a layer")
        if self.power_of_two_scales:
            parts.append("scales that are powers of two")
        if self.zero_points is not None:
            parts.append({True: "zero points", False: "no zero points"}[self.zero_points])
        if self.activation_sign != "auto":
            parts.append(f"{self.activation_sign} activations")
        if self.accumulator_bits is not None:
            overflow = "sums that can overflow refused"
            if self.on_overflow == "wider":
                overflow = f"sums that can overflow at {self.overflow_cost:g} times the cost"
            parts.append(f"accumulators of {self.accumulator_bits} bits, {overflow}")
        return "; ".join(parts)

    @field_validator("kinds", mode="before")
    @classmethod
    def _check_kinds(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            for kind in value:
                if kind not in KINDS:
                    raise ValueError(f"{quoted(kind)} is no kind of layer; known: {', '.join(KINDS)}")
        return value

    @model_validator(mode="after")
    def _check_conflicts(self) -> Capabilities:
        if self.accumulator_bits is None and ({"on_overflow", "overflow_cost"} & self.model_fields_set):
            raise ValueError("on_overflow and overflow_cost mean nothing without accumulator_bits: give that too")
        if self.on_overflow == "wider" and self.overflow_cost is None:
            raise ValueError(
                "on_overflow is wider, but not what that costs: give overflow_cost, such as 2.0 for twice as much"
            )
        if self.on_overflow == "refuse" and self.overflow_cost is not None:
            raise ValueError("overflow_cost is what the wider unit costs, and on_overflow is refuse: give one of the two")
        everything = self.narrow(_EVERYTHING)
        for kind, rule in self.kinds.items():
            if not rule.narrow(everything).supported.any():
                raise ValueError(f"kinds.{kind} leaves none of the pairs that all layers have: give pairs of its own")
        return self

    def supported(self, workload: Workload) -> Bools:
        """Tell which pairs of widths each layer has.

        Args:
            workload: The layers.

        Returns:
            Booleans, shape (layers, 10, 10), indexed as a cost table; a pair that no rule says anything of is supported.

        Raises:
            ValueError: For a rule of a layer that the workload doesn't have, naming the close ones, for `first` and `last`
                that say different things of a network's only layer, and for a layer that no pair is left for, saying why.
        """
        return np.array([allowed.supported for allowed in self._allowed(workload)])

    def promised(self, workload: Workload) -> Bools:
        """Tell which of the `supported` pairs a rule names: the target must have costs for these.

        Args:
            workload: The layers.

        Returns:
            Booleans, shape (layers, 10, 10), indexed as a cost table.

        Raises:
            ValueError: As `supported` does.
        """
        return np.array([allowed.promised for allowed in self._allowed(workload)])

    def apply(self, table: CostTable) -> CostTable:
        """Take out of a cost table what isn't supported, and give pairs of the wider unit their price; once.

        Args:
            table: The target's costs.

        Returns:
            The table, with `within` set to these capabilities; the same one if it was.

        Raises:
            ValueError: Naming the target, as `supported` does; for a pair that a rule names and that has no cost, and for a
                layer of which no supported pair has one.
        """
        if table.within == self:
            return table
        try:
            supported = self._checked(table)
        except ValueError as error:
            raise ValueError(printable(f"hardware target {table.target!r}: {error}")) from error
        factors = np.ones(supported.shape)
        if self.on_overflow == "wider":
            for index, layer in enumerate(table.workload.layers):
                factors[index] = self._factors(self.overflows(layer))
        return replace(_scaled(table, supported, factors), within=self)

    def apply_full_range(self, table: CostTable, names: Collection[str]) -> CostTable:
        """Do the same with pairs that overflow only because integers reach to -2^(b-1).

        Args:
            table: The target's costs, within these capabilities.
            names: The layers whose signed integers take the smallest, too.

        Returns:
            The table.

        Raises:
            ValueError: Naming the target, for a layer that no pair is left for.
        """
        supported, factors = table.supported.copy(), np.ones(table.supported.shape)
        for index, layer in enumerate(table.workload.layers):
            if layer.name not in names:
                continue
            further = self.overflows(layer, full_range=True) & ~self.overflows(layer)
            factors[index] = self._factors(further)
            if self.on_overflow == "refuse":
                supported[index] &= ~further
            if not supported[index].any():
                raise ValueError(
                    f"hardware target {table.target!r}: layer {layer.name!r} has no pair of widths: with integers down to "
                    f"-2^(b-1), its sums can overflow {self.accumulator_bits} bits at {_words(table.supported[index])}"
                )
        if np.array_equal(supported, table.supported) and (factors == 1).all():
            return table
        return _scaled(table, supported, factors)

    def _checked(self, table: CostTable) -> Bools:
        """Return what is supported. Raises ValueError for a table that lacks a cost; see `apply`."""
        names = table.workload.names
        missing = self.promised(table.workload) & ~table.supported
        if missing.any():
            layer, w, a = np.argwhere(missing)[0]
            raise ValueError(
                f"no finite, positive cost for layer {names[layer]!r} at {pair_words(*at_places([w, a]))}, which its "
                "capabilities call supported"
            )
        supported = self.supported(table.workload)
        for name, able, priced in zip(names, supported, table.supported, strict=True):
            if not (able & priced).any():
                raise ValueError(
                    f"layer {name!r} has no pair of widths: its capabilities have {_words(able)}, and its costs "
                    f"{_words(priced)}"
                )
        return supported

    def _factors(self, overflowing: Bools) -> NDArray[np.float64]:
        """Return what costs are multiplied by, given the pairs whose sums can overflow, of the same shape."""
        cost = 1.0
        if self.on_overflow == "wider" and self.overflow_cost is not None:
            cost = self.overflow_cost
        return np.where(overflowing, cost, 1.0)

    def overflows(self, layer: Layer, *, full_range: bool = False) -> Bools:
        """Tell at which pairs of widths a layer's sums can leave the accumulators.

        Args:
            layer: The layer.
            full_range: Whether signed integers take the smallest too, -2^(b-1).

        Returns:
            Booleans, shape (10, 10); all False without `accumulator_bits`. The module has the formula.
        """
        found = np.zeros((PLACES, PLACES), bool)
        if self.accumulator_bits is None:
            return found
        for row, w in enumerate(WIDTHS):
            for column, a in enumerate(WIDTHS):
                if FLOAT not in (w, a):
                    found[row, column] = self._needs(layer, w, a, full_range) > self.accumulator_bits
        return found

    def _needs(self, layer: Layer, w: int, a: int, full_range: bool) -> int:
        """Return the bits that accumulators need; a signed activation with a zero point is an unsigned one less that."""
        is_signed = self.activation_sign == SIGNED and not self.zero_points
        return accumulator_bits(layer, w, a, signed=is_signed, full_range=full_range)

    def _allowed(self, workload: Workload) -> list[Allowed]:
        """List what every layer has."""
        names = workload.names
        for name in self.layers:
            if name not in (FIRST, LAST, *names):
                close = difflib.get_close_matches(name, names, n=3) or list(names[:3])
                raise ValueError(
                    f"capabilities name {quoted(name)}, which is no layer of the workload; close: {', '.join(close)}"
                )
        found = []
        for index, layer in enumerate(workload.layers):
            allowed = self._rules(layer, index, len(workload))
            found.append(self._within_accumulators(layer, allowed))
        return found

    def _rules(self, layer: Layer, index: int, count: int) -> Allowed:
        """Apply the rules to a layer, the most general first."""
        allowed = self.narrow(_EVERYTHING)
        of_kinds = [self.kinds[kind].narrow(allowed) for kind in layer.kinds if kind in self.kinds]
        if of_kinds:
            allowed = of_kinds[0]
            for other in of_kinds[1:]:
                allowed = Allowed(allowed.supported & other.supported, allowed.promised & other.promised)
        ends = [end for end, place in ((FIRST, 0), (LAST, count - 1)) if end in self.layers and index == place]
        named = self.layers.get(layer.name)
        if layer.name in (FIRST, LAST):
            named = None  # a place, whatever a layer is called
        of_ends = [self.layers[end].narrow(allowed) for end in ends]
        if len(of_ends) == 2 and named is None and not np.array_equal(of_ends[0].supported, of_ends[1].supported):
            raise ValueError(
                f"the network's only layer {layer.name!r} is both its first and its last, of which capabilities say different "
                f"things, {_words(of_ends[0].supported)} and {_words(of_ends[1].supported)}: name the layer itself"
            )
        if of_ends:
            allowed = of_ends[0]
        if named is not None:
            allowed = named.narrow(allowed)
        return allowed

    def _within_accumulators(self, layer: Layer, allowed: Allowed) -> Allowed:
        """Leave out the pairs whose sums can overflow, unless a wider unit has them. Raises ValueError if none is left."""
        if not allowed.supported.any():
            raise ValueError(
                f"layer {layer.name!r} ({', '.join(layer.kinds)}) has no pair of widths: its rules in the capabilities have "
                "none in common with the more general ones; give pairs there, or both weights and activations"
            )
        if self.on_overflow == "wider" or self.accumulator_bits is None:
            return allowed
        fits = ~self.overflows(layer)
        left = Allowed(allowed.supported & fits, allowed.promised & fits)
        if not left.supported.any():
            needs = {pair: self._needs(layer, *pair, False) for pair in _pairs(allowed.supported)}
            w, a = min(needs, key=lambda pair: needs[pair])
            raise ValueError(
                f"layer {layer.name!r} has no pair of widths: its sums of {_products(layer):,} products need accumulators of "
                f"{needs[w, a]} bits at {pair_words(w, a)}, the least of {_words(allowed.supported)}, and there are "
                f"{self.accumulator_bits}; on_overflow: wider would price them"
            )
        return left


def accumulator_bits(layer: Layer, w: int, a: int, *, signed: bool = False, full_range: bool = False) -> int:
    """Return the bits of an accumulator in which a layer's sums can't overflow; see the module for the bound.

    Args:
        layer: The layer.
        w: Bits of weights, 1 to 8 or 16.
        a: Bits of activations, likewise.
        signed: Whether activations are signed integers.
        full_range: Whether signed integers take the smallest too, -2^(b-1).

    Returns:
        Bits, with the one of the sign.
    """
    largest = _products(layer) * _magnitude(w, True, full_range) * _magnitude(a, signed, full_range)
    return largest.bit_length() + 1


def capabilities_of(target: object) -> Capabilities | None:
    """Return the capabilities of a target, with its attribute `zero_points` if they leave that out.

    Returns None for a target that says nothing of any. Raises ValueError, naming the target, for an attribute `capabilities`
    that is neither `Capabilities` nor a mapping of its keys.
    """
    given = getattr(target, "capabilities", None)
    if given is None:
        return None
    if not isinstance(given, Capabilities):
        given = _read(given, f"`capabilities` of hardware target {str(getattr(target, 'name', target))!r}")
    if given.zero_points is None:
        given = given.model_copy(update={"zero_points": getattr(target, "zero_points", False) is True})
    return given


def within(target: object, table: CostTable) -> CostTable:
    """Return a target's cost table within its capabilities. Raises ValueError as `Capabilities.apply` does."""
    found = capabilities_of(target)
    if found is None:
        return table
    return found.apply(table)


def has_zero_points(target: object) -> bool:
    """Say whether a target computes with activations that have zero points."""
    found = capabilities_of(target)
    if found is not None:
        return found.zero_points is True
    return getattr(target, "zero_points", False) is True


def _read(given: object, what: str) -> Capabilities:
    """Make capabilities of a mapping. Raises ValueError for anything else."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} must be hw_models.Capabilities, or a mapping of its keys, not {type(given).__name__}")
    try:
        return Capabilities.model_validate(dict(given))
    except ValidationError as error:
        raise ValueError(f"{what}: {wrong_key(error, Capabilities)}") from error


def wrong_key(error: ValidationError, model: type[BaseModel]) -> str:
    """Say in a sentence which key is wrong in what was read for a model, and what is accepted.

    Args:
        error: What pydantic says; the first of its errors is told.
        model: What was read.

    Returns:
        The sentence, without the file.
    """
    first = error.errors()[0]
    place = first["loc"]
    key = quoted(".".join(map(str, place)))
    if first["type"] == "extra_forbidden":
        accepted = model
        for part in place[:-1]:
            accepted = _model_at(accepted, str(part))
        return f"unknown key {key}; accepted: {', '.join(accepted.model_fields)}"
    if first["type"] == "missing":
        return f"key {key} is missing"
    if not place:
        return str(first["ctx"]["error"])
    reason = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and isinstance(first["input"], dict | list | tuple):
        return f"key {key}: {reason}"
    return f"key {key} is {quoted(first['input'])}: {reason}"


def _model_at(model: type[BaseModel], key: str) -> type[BaseModel]:
    """Return the model that is read below a key."""
    if key == "capabilities":
        return Capabilities
    if issubclass(model, Capabilities):
        return Rule
    return model


def _scaled(table: CostTable, supported: Bools, factors: NDArray[np.float64]) -> CostTable:
    """Return a cost table without what isn't supported, and with latency, energy and cycles times factors."""
    cycles = table.cycles
    if cycles is not None and (factors > 1).any():
        cycles = np.ceil(cycles * factors).astype(cycles.dtype)
    costs = {"latency_s": table.latency_s, "energy_j": table.energy_j}
    scaled = {name: np.where(supported, cost * factors, np.nan) for name, cost in costs.items() if cost is not None}
    stored = np.where(supported, table.storage_bytes, np.nan)
    return replace(table, storage_bytes=stored, cycles=cycles, **scaled)  # type: ignore[arg-type]


def _products(layer: Layer) -> int:
    """Count the products that one output of a layer sums."""
    return layer.in_channels // layer.groups * layer.kernel[0] * layer.kernel[1]


def _magnitude(bits: int, signed: bool, full_range: bool) -> int:
    """Return the largest magnitude of integers of so many bits."""
    if bits == 1:
        return 1
    if not signed:
        return 2**bits - 1
    if full_range:
        return 2 ** (bits - 1)
    return 2 ** (bits - 1) - 1


def _marked(pairs: Pairs) -> Bools:
    marked = np.zeros((PLACES, PLACES), bool)
    for w, a in pairs:
        marked[place_of(w), place_of(a)] = True
    return marked


def _operand(widths: tuple[int, ...] | None) -> Bools:
    """Mark the places of widths, all of them for None; shape (10,)."""
    if widths is None:
        return np.ones(PLACES, bool)
    return np.isin(WIDTHS, widths)


def _operand_words(operand: str, widths: tuple[int, ...] | None) -> str:
    """Write the widths of an operand."""
    if widths is None:
        return f"any {operand}"
    return f"{operand} {', '.join(map(width_words, widths))}"


def _all_promised(supported: Bools) -> Allowed:
    return Allowed(supported, supported)


def _pairs(marked: Bools) -> list[tuple[int, int]]:
    """List the pairs that are marked in an array (10, 10)."""
    return [(WIDTHS[row], WIDTHS[column]) for row, column in np.argwhere(marked)]


def _words(marked: Bools) -> str:
    """Write the pairs that are marked, for a message."""
    return describe_pairs(_pairs(marked)) or "none"


_EVERYTHING = Allowed(np.ones((PLACES, PLACES), bool), np.zeros((PLACES, PLACES), bool))
