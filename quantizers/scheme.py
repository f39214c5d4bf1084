"""A scheme says how weights and activations become few-bit values; one object serves all layers of a network.

A scheme of one's own is a subclass with four methods, known to `quantize` by the name it gives
itself:

    class Ternary(Q.Scheme, name="ternary"):
        summary = "weights are -1, 0 or +1 times a scale"

        def start(self, layer): ...              # the tensors that a layer holds for it
        def calibrate(self, layer, observer): ...
        def weight(self, layer, bits): ...
        def activation(self, layer, x, bits): ...
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from quantizers.cache import TensorCache
from quantizers.functional import MAX_BITS, WIDE_BITS, WIDTHS, integer_range, relative_error, row_of, sign
from quantizers.observers import Observer
from quantizers.plugins import (
    PluginRow,
    find_installed,
    import_attribute,
    installed,
    is_ours,
    look_into_current_folder,
    names_a_module,
    origin,
    place,
    rows_of,
    unknown,
)

GROUP = "quantizers.schemes"  # of entry points
REQUIRED = ("start", "calibrate", "weight", "activation")
ACTIVATIONS = ("auto", "signed", "unsigned")  # which integers inputs may be
LATER = "later"  # in the metadata of an option that the first releases didn't have


class SchemeLayer(Protocol):
    """What a scheme sees of a quantized layer; the tensors that `Scheme.start` made are its attributes, too."""

    weight: Tensor
    weight_bits: int | None
    activation_bits: int | None
    signed: bool  # whether the input was negative during calibration
    training: bool
    # The only bits that will ever be asked for, where that is known: tensors of other widths may stay as they began.
    only_bits: tuple[int | None, int | None] | None
    cache: TensorCache
    weight_scale: Tensor
    activation_scale: Tensor
    activation_signed: Tensor
    weight_error: Tensor
    activation_error: Tensor

    def quantized_weight(self) -> Tensor:
        """Return the weight as the layer uses it.

        Returns:
            A tensor in the shape of the weight, on the grid of its bits.
        """

    def offset_of_rounding(self, bits: int) -> Tensor | None:
        """Return what is added to the weight's integers after rounding to nearest, at a width.

        Args:
            bits: 1 to 8, or 16.

        Returns:
            Integers in the shape of the weight; None for nothing.
        """


class IntegerWeights(NamedTuple):
    """A layer's weights as integers: codes times scale is what the layer computes with."""

    codes: Tensor  # of the weight's shape, int8; int16 at 16 bits
    scale: Tensor  # float64, (C_out,)
    bits: int  # that the codes take in two's complement; 1 bit stands for -1 and +1


class IntegerActivations(NamedTuple):
    """What enters a layer: integers q, where scale (q - z) is the real value, with `Scheme.zero_point` as z."""

    scale: float
    bits: int
    signed: bool  # whether the integers are; not where there is a zero point
    narrow: bool  # whether -(2^(b-1) - 1) is the smallest signed integer, not -2^(b-1)


class Scheme:
    """The base of all schemes. A scheme has options of its own; what belongs to a layer are tensors that the layer holds.

    Subclasses name themselves (`class Linear(Scheme, name="linear")`), and are then known by that
    name to `quantize`. What a scheme can do is said by its attributes; whoever uses schemes asks
    these, and never which class a scheme is of.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""  # one line, for lists
    known: ClassVar[dict[str, type[Scheme]]] = {}
    # Tensors of the layer that are trained: parameters that aren't in its state_dict, which stays
    # the float network's.
    learned: ClassVar[tuple[str, ...]] = ()
    # The share of the weights' learning rate at which these are to be trained.
    learned_rate: ClassVar[float] = 1.0
    # Tensors of the layer, beside its weight, that the quantized weight depends on; what is learned
    # besides is of the quantized input. None: both depend on any of those that `start` makes.
    of_weight: ClassVar[tuple[str, ...] | None] = None
    # Whether a gradient reaches the layer's float weight.
    trains_weight: ClassVar[bool] = True
    # Whether activations need `calibrate` to have seen the layer's input, at some widths at least
    # (`needs_data_at`).
    needs_data: ClassVar[bool] = True
    # Whether weights, and activations, are integers times a scale: what can be deployed.
    has_integer_weights: ClassVar[bool] = False
    has_integer_activations: ClassVar[bool] = False
    # Whether signed inputs have zero points: what hardware must be able to do
    # (`hw_models.Target.zero_points`).
    has_zero_points: ClassVar[bool] = False
    # Whether signed integers of activations leave out the smallest, -2^(b-1).
    narrow: ClassVar[bool] = True
    # Whether training moves the distance between levels (a step, or the clip that it follows from).
    trains_step: ClassVar[bool] = False
    # Whether `weight` adds the layer's `offset_of_rounding` to the integers that rounding to nearest
    # gives, so that another rounding can be chosen.
    takes_offsets: ClassVar[bool] = False
    # Whether it means little for a network that wasn't trained with it: what its policies are worth
    # untrained says little.
    for_training: ClassVar[bool] = False
    # The smallest width of weights that means something.
    least_bits: ClassVar[int] = 1
    # The widest ones that mean something: 8, or 16 for a scheme whose tensors by width have a row
    # for that as well (`quantizers.functional.WIDTHS`).
    most_weight_bits: ClassVar[int] = MAX_BITS
    most_activation_bits: ClassVar[int] = MAX_BITS
    # What `with_capabilities` can be told, with the option of the scheme that obeys: such as
    # {"per_channel": "per_channel"}.
    choices: ClassVar[Mapping[str, str]] = {}
    # What the scheme does in any case, of the rest: such as {"activations": "unsigned"}.
    habits: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, name: str = "") -> None:
        """Make a subclass known by its name.

        Who writes a scheme of their own on one of ours says themselves whether it has 16 bits.
        """
        if name:
            cls.name = name
            Scheme.known[name] = cls
        if not is_ours(cls):
            for method, most in (("weight", "most_weight_bits"), ("activation", "most_activation_bits")):
                if method in vars(cls) and most not in vars(cls):
                    setattr(cls, most, MAX_BITS)

    @staticmethod
    def named(scheme: str | Scheme, *, modules: bool = True) -> Scheme:
        """Find a scheme by name: a known class, then an installed package's, then `module:Name`.

        Args:
            scheme: The name; or a scheme, which is returned as it is.
            modules: Whether `module:Name` may be imported. False for a name that no person gave,
                such as one from a file.

        Returns:
            The scheme with its default options.

        Raises:
            ValueError: For an unknown name, listing the close ones; for a class that isn't a scheme
                or lacks a method.
            ImportError: For a scheme of somebody else's that can't be imported, with the reason.
        """
        if isinstance(scheme, Scheme):
            return scheme
        found = _scheme_class(str(scheme), modules)
        try:
            return found()
        except TypeError as error:
            raise ValueError(f"scheme {scheme!r} can't be made without options: {error}") from error

    def options(self) -> dict[str, Any]:
        """Return the options that make this scheme again, as plain data: a dataclass's fields.

        Options that were added later are left out where they have their defaults, so that records
        are what they were.

        Returns:
            Options by name.

        Raises:
            ValueError: For a scheme that isn't a dataclass, but holds something: it needs a method
                of its own.
        """
        if dataclasses.is_dataclass(self):
            options = dataclasses.asdict(self)
            for option in dataclasses.fields(self):
                if option.metadata.get(LATER) and options[option.name] == option.default:
                    del options[option.name]
            return options
        if vars(self):
            raise ValueError(
                f"scheme {self.name!r} holds {', '.join(vars(self))}: give it a method `options`, or make it a dataclass"
            )
        return {}

    def record(self) -> dict[str, Any]:
        """Return the name and the options that make this scheme again, as plain data; see `schemes_from_records`.

        Returns:
            `{"name": ..., "options": {...}}`.

        Raises:
            ValueError: For a class without a name of its own, which nobody could find again.
        """
        if Scheme.known.get(self.name) is not type(self):
            raise ValueError(f"class {type(self).__name__} can't be recorded: it has no name of its own (class ..., name=...)")
        return {"name": self.name, "options": self.options()}

    def with_capabilities(
        self,
        *,
        per_channel: bool | None = None,
        power_of_two: bool | None = None,
        activations: str | None = None,
        zero_points: bool | None = None,
    ) -> Scheme:
        """Return this scheme with what hardware makes of it: one that obeys, with all other options as they are.

        None is no wish: the scheme does as it does. Hardware that can do both gives None.

        Args:
            per_channel: Whether weights have one scale per output channel; False: one per tensor.
            power_of_two: Whether all scales are powers of two.
            activations: Which integers inputs are: "signed" always, "unsigned" always (with a layer
                whose input is negative being refused, unless it has a zero point), or "auto", signed
                where calibration saw a negative input. With zero points "signed" means the integers
                of "auto" less 2^(b-1), which are the same values.
            zero_points: Whether signed inputs have zero points.

        Returns:
            The scheme; this one itself where nothing has to change.

        Raises:
            ValueError: Naming the scheme, for what it can't do, and for wishes that exclude each other.
        """
        wishes = {
            "per_channel": per_channel,
            "power_of_two": power_of_two,
            "activations": activations,
            "zero_points": zero_points,
        }
        if activations is not None:
            check_activations(activations)
        changes = {}
        for wish, value in wishes.items():
            if value is None or self._does(wish, value):
                continue
            if wish not in self.choices:
                raise ValueError(f"scheme {self.name!r} can't do {_words(wish, value)}{self._able()}")
            changes[self.choices[wish]] = value
        if not changes:
            return self
        made: Scheme = dataclasses.replace(self, **changes)  # type: ignore[type-var]
        return made

    def _does(self, wish: str, value: Any) -> bool:
        """Say whether the scheme is as `with_capabilities` wishes already."""
        if wish in self.choices:
            return bool(getattr(self, self.choices[wish]) == value)
        if wish == "zero_points":
            return self.has_zero_points == value
        # Hardware that takes both is content with either.
        return value == "auto" or (wish in self.habits and self.habits[wish] == value)

    def _able(self) -> str:
        """Say which built-in schemes can be told more, in the end of a sentence."""
        able = [name for name, kind in Scheme.known.items() if is_ours(kind) and len(kind.choices) > len(self.choices)]
        if not able:
            return ""
        return f"; schemes that can be told more: {', '.join(able)}"

    def check(self, weight_bits: int | None, activation_bits: int | None, signed: bool = False) -> None:
        """Check that widths mean something to the scheme.

        Args:
            weight_bits: 1..8 or 16, or None for float.
            activation_bits: Likewise.
            signed: Whether the layer's input was ever negative.

        Raises:
            ValueError: Naming the scheme and the bits, for widths that mean nothing to it.
        """
        for bits in (weight_bits, activation_bits):
            if bits is not None:
                integer_range(bits, False)
        self.check_widest(weight_bits, activation_bits)
        if weight_bits is not None and weight_bits < self.least_bits:
            amount = f"{weight_bits} bits"
            if weight_bits == 1:
                amount = "1 bit"
            raise ValueError(f"{self.name} has no weights of {amount}: use {self._range_of(self.most_weight_bits)}")

    def check_widest(self, weight_bits: int | None, activation_bits: int | None) -> None:
        """Check that widths aren't above the scheme's widest; whatever `check` lets pass.

        Args:
            weight_bits: 1..8 or 16, or None for float.
            activation_bits: Likewise.

        Raises:
            ValueError: Naming the scheme and the bits, for wider ones.
        """
        if weight_bits is not None and weight_bits > self.most_weight_bits:
            raise ValueError(f"{self.name} has no weights of {weight_bits} bits: use {self._range_of(self.most_weight_bits)}")
        if activation_bits is not None and activation_bits > self.most_activation_bits:
            raise ValueError(f"{self.name} has no inputs of {activation_bits} bits: use 1 to {MAX_BITS}, or float")

    def _range_of(self, most: int) -> str:
        """Say which widths of weights there are."""
        few = f"{self.least_bits} to {MAX_BITS}"
        if most == WIDE_BITS:
            return f"{few}, {WIDE_BITS} or float"
        return f"{few}, or float"

    def needs_data_at(self, weight_bits: int | None, activation_bits: int | None) -> bool:
        """Say whether these widths need calibration data: in most schemes, wherever activations are quantized.

        Args:
            weight_bits: 1 to 8 or 16, or None for float.
            activation_bits: Likewise.

        Returns:
            Whether calibration is needed.
        """
        return self.needs_data and activation_bits is not None

    def needs_moments(self) -> bool:
        """Say whether `calibrate` wants the second moments of the layer's patches (`Observer.moments`).

        Returns:
            False, unless a scheme says otherwise.
        """
        return False

    def start(self, layer: SchemeLayer) -> dict[str, Tensor]:
        """Return the tensors that a layer holds for this scheme, before calibration.

        Row b - 1 of a tensor of MAX_BITS rows is for width b, so that a layer can change its width
        at any time. A scheme that takes 16 bits has one row more for them
        (`quantizers.functional.row_of`), and says so (`most_weight_bits`, `most_activation_bits`).

        Args:
            layer: The layer, whose weight is in float.

        Returns:
            Tensors by the names of the layer's attributes that they become.
        """
        raise NotImplementedError

    def calibrate(self, layer: SchemeLayer, observer: Observer | None) -> None:
        """Set the layer's tensors from its weight and from what its input was like.

        Args:
            layer: The layer.
            observer: What calibration saw of its input; None: nothing is known of it.
        """
        raise NotImplementedError

    def weight(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return the layer's weight as real values on the grid of so many bits, with the gradient that training uses.

        `layer.weight` is to be read once: it may be computed whenever it is read
        (`torch.nn.utils.parametrizations`), and `spectral_norm` goes on with its iteration then.

        Without gradients it must depend on nothing but the weight, the tensors that `start` made, the
        scheme's options, and the layer's `training` and `signed`: as long as these stay the same, it
        is computed once.

        Args:
            layer: The layer.
            bits: 1 to 8, or 16.

        Returns:
            A tensor in the shape of the weight.
        """
        raise NotImplementedError

    def activation(self, layer: SchemeLayer, x: Tensor, bits: int) -> Tensor:
        """Return the layer's input x as real values on the grid of so many bits, likewise.

        Args:
            layer: The layer.
            x: Its input.
            bits: The width, 1..8 or 16.

        Returns:
            Of the shape of x.
        """
        raise NotImplementedError

    def activation_step(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return what the integers of a layer's input are multiplied by, a positive number.

        It is the distance of the input's levels, but for the two of one signed bit, -1 and +1 times
        it.

        Args:
            layer: The layer.
            bits: The width of its input.

        Returns:
            A tensor of one value.
        """
        raise NotImplementedError

    def weight_step(self, layer: SchemeLayer, bits: int) -> Tensor:
        """Return what the integers of a layer's weights are multiplied by.

        Args:
            layer: The layer.
            bits: The width of its weights.

        Returns:
            Positive: one number, or one per output channel.
        """
        raise NotImplementedError

    def has_signed_inputs(self, layer: SchemeLayer, bits: int) -> bool:
        """Say whether the integers of a layer's input are signed: where calibration saw a negative one.

        Args:
            layer: The layer.
            bits: The width of its input.

        Returns:
            Whether they are.
        """
        return layer.signed

    def zero_point(self, layer: SchemeLayer, bits: int) -> int:
        """Return the integer that stands for real 0 in a layer's input: 0, in most schemes.

        Args:
            layer: The layer.
            bits: The width of its input.

        Returns:
            The integer.
        """
        return 0

    def integer_weight_bits(self, bits: int) -> int:
        """Return how many bits the integers of weights of a width take in two's complement.

        Args:
            bits: The width of weights.

        Returns:
            Bits of the integers; one more than the width in some schemes.

        Raises:
            ValueError: Saying why, if there are no such integers, or none of 8 or 16 bits.
        """
        if not self.has_integer_weights:
            raise ValueError(f"weights of scheme {self.name!r} are no multiples of a step")
        return bits

    def integer_weights(self, layer: SchemeLayer) -> IntegerWeights:
        """Return a layer's weights, at its present width, as integers.

        Codes times scale is `layer.quantized_weight()` in float32, bit for bit (up to 2^-22 where
        integers take one bit more than the weights have).

        Args:
            layer: The layer, whose weights aren't in float.

        Returns:
            Codes in the weight's shape, their scale for each channel, and their bits.

        Raises:
            ValueError: With the reason, without the layer's name, where there are no such integers.
        """
        bits = layer.weight_bits
        assert bits is not None
        stored = self.integer_weight_bits(bits)
        with torch.no_grad():
            real = layer.quantized_weight().float()
            rows = real.flatten(1)
            scale = self.weight_step(layer, bits).float().reshape(-1, 1).expand(len(rows), 1)
            if bits == 1:
                codes = sign(rows)
            else:
                codes = (rows / scale).round()
            exact = torch.equal(codes * scale, rows)
            if stored != bits:
                # A formula with odd integers adds in float32, where a product doesn't.
                exact = torch.allclose(codes * scale, rows, rtol=0, atol=2**-22)
        low, high = _twos_complement(stored)
        if not exact or float(codes.min()) < low or float(codes.max()) > high:
            raise ValueError(f"its weights are not integers of {stored} bits times a scale")
        dtype = torch.int8
        if stored > MAX_BITS:
            dtype = torch.int16
        return IntegerWeights(codes.reshape(real.shape).to(dtype), scale[:, 0].double(), stored)

    def integer_activations(self, layer: SchemeLayer) -> IntegerActivations:
        """Return how a layer's input, at its present width, is integers times a scale, with a zero point.

        Args:
            layer: The layer, whose input isn't in float.

        Returns:
            Scale, bits, sign and range of the integers.

        Raises:
            ValueError: With the reason, without the layer's name, where it isn't.
        """
        bits = layer.activation_bits
        assert bits is not None
        if not self.has_integer_activations:
            raise ValueError(f"activations of scheme {self.name!r} are no multiples of a step")
        with torch.no_grad():
            scale = float(self.activation_step(layer, bits).float())
        signed = self.has_signed_inputs(layer, bits)
        return IntegerActivations(scale, bits, signed, self.narrow or not signed)

    def quantization_errors(self, layer: SchemeLayer) -> tuple[Tensor, Tensor]:
        """Return the relative squared errors of a layer's weights and of its input at `WIDTHS`.

        They are of calibration. An input that nothing is known of has 1 everywhere, and so has a width that nothing is known
        of.

        Args:
            layer: The calibrated layer.

        Returns:
            The errors of weights and of the input, two tensors (9,).
        """
        return _by_width(layer.weight_error), _by_width(layer.activation_error)

    def measure_errors(self, layer: SchemeLayer, observer: Observer | None) -> None:
        """Set `weight_error` and `activation_error`, for a scheme whose `start` makes no such tensors.

        Args:
            layer: The layer.
            observer: What calibration saw of its input; None: nothing, and `activation_error` stays.
        """
        for bits in WIDTHS:
            if self.takes(bits, None, layer.signed):
                layer.weight_error[row_of(bits)] = relative_error(layer.weight, self.weight(layer, bits))
        if observer is not None:
            self.measure_activation_errors(layer, observer)

    def measure_activation_errors(self, layer: SchemeLayer, observer: Observer) -> None:
        """Set `activation_error`, at the widths that the scheme has for this input, from calibration data.

        Args:
            layer: The layer.
            observer: What calibration saw of its input.
        """
        sample = observer.sample()
        for bits in WIDTHS:
            if self.takes(None, bits, observer.signed):
                layer.activation_error[row_of(bits)] = relative_error(sample, self.activation(layer, sample, bits))

    def takes(self, weight_bits: int | None, activation_bits: int | None, signed: bool = False) -> bool:
        """Say whether widths mean something in this scheme.

        Args:
            weight_bits: 1..8 or 16, or None for float.
            activation_bits: Likewise.
            signed: Whether the layer's input was ever negative.

        Returns:
            Whether `check` and `check_widest` let them pass.
        """
        try:
            self.check_widest(weight_bits, activation_bits)
            self.check(weight_bits, activation_bits, signed)
        except ValueError:
            return False
        return True

    def storage_overhead_bytes(self, bits: int, weights: int | None = None) -> int:
        """Return the bytes that a layer's weights of a width take beside their integers and scales.

        Args:
            bits: The width, 1..8 or 16.
            weights: How many weights the layer has, where that is known: a codebook has no more
                entries.

        Returns:
            Bytes per layer; nothing, for most schemes.
        """
        return 0


def later_option(default: Any) -> Any:
    """Make an option of a scheme that its first releases didn't have: by keyword, and recorded where it isn't the default."""
    return dataclasses.field(default=default, kw_only=True, metadata={LATER: True})


def check_activations(activations: str) -> None:
    """Raise ValueError, listing what there is, for an unknown kind of integers."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"unknown activations {activations!r}; known: {', '.join(ACTIVATIONS)}")


def refuse_negative(scheme: Scheme, bits: int) -> None:
    """Raise ValueError, naming the scheme and the bits, for an input that is negative where integers have no sign."""
    amount, remedy = f"{bits} bits", ""
    if bits == 1:
        amount = "1 bit"
    elif "zero_points" in scheme.choices:
        remedy = f"give scheme {scheme.name!r} zero points (asymmetric), "
    raise ValueError(
        f"its input is negative in places, which unsigned integers of {amount} aren't: {remedy}leave the input in float, or "
        "choose hardware with signed activations"
    )


def _words(wish: str, value: Any) -> str:
    """Write what `with_capabilities` is told."""
    words = {
        ("per_channel", True): "one scale per output channel of the weights",
        ("per_channel", False): "one scale for all weights of a layer",
        ("power_of_two", True): "scales that are powers of two",
        ("power_of_two", False): "scales that are no powers of two",
        ("zero_points", True): "zero points",
        ("zero_points", False): "without zero points",
    }
    return words.get((wish, value), f"{value} integers for all activations")


def _by_width(errors: Tensor) -> Tensor:
    """Return errors at all of WIDTHS: 1 at those that nothing is known of."""
    missing = len(WIDTHS) - len(errors)
    if not missing:
        return errors
    return torch.cat([errors, errors.new_ones(missing)])


def started(scheme: Scheme, layer: SchemeLayer) -> dict[str, Tensor]:
    """Return the tensors that a scheme makes for a layer, checked.

    Args:
        scheme: The scheme.
        layer: The layer, with nothing of the scheme yet.

    Returns:
        The tensors by name, in a dict of their own.

    Raises:
        ValueError: Naming the scheme and the name, for anything but a dict of tensors with names that the layer doesn't have.
    """
    with failing_as(scheme, "start"):
        tensors: object = scheme.start(layer)
    what = f"`start` of scheme {scheme.name!r}"
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{what} must return a dict of tensors, not {type(tensors).__name__}")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"{what} names a tensor {name!r}: give a name that an attribute can have")
        if hasattr(layer, name):
            raise ValueError(f"{what} names a tensor {name!r}, which the layer has already: give another name")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{what} must return tensors, but {name!r} is {type(tensor).__name__}")
        if name in scheme.learned and not tensor.is_floating_point():
            raise ValueError(f"{what} makes {name!r}, which is learned, as {tensor.dtype}: give floats")
    for name in scheme.learned:
        if name not in tensors:
            raise ValueError(f"scheme {scheme.name!r} learns {name!r}, which its `start` doesn't make")
    return dict(tensors)


@contextmanager
def failing_as(scheme: Scheme, method: str) -> Iterator[None]:
    """Say whose method it is that fails within; ours, and those that say why themselves, are left alone.

    Raises:
        ValueError: Naming the method and the scheme, for whatever else somebody's own raises.
    """
    try:
        yield
    except ValueError:
        raise
    except Exception as error:
        if is_ours(type(scheme)):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"`{method}` of scheme {scheme.name!r} failed: {reason}") from error


def try_out(layer: SchemeLayer, scheme: Scheme, x: Tensor) -> None:
    """Quantize a layer's weight and a sample of its input once each, at the layer's widths, if the scheme isn't ours.

    Args:
        layer: The layer, calibrated.
        scheme: Its scheme.
        x: The sample.

    Raises:
        ValueError: Naming the scheme and what it gave, for anything but finite tensors of the shape, type and device of what
            it was given.
    """
    if is_ours(type(scheme)):
        return
    w, a = layer.weight_bits, layer.activation_bits
    if w is not None and scheme.takes(w, None, layer.signed):
        with failing_as(scheme, "weight"):
            given: object = scheme.weight(layer, w)
        _check_given(scheme, "weight", given, layer.weight)
    if a is not None and scheme.takes(None, a, layer.signed):
        before = x.clone()
        with failing_as(scheme, "activation"):
            given = scheme.activation(layer, x, a)
        _check_given(scheme, "activation", given, before)
        if not torch.equal(x, before):
            raise ValueError(f"`activation` of scheme {scheme.name!r} changes its input in place: change a copy")


def _check_given(scheme: Scheme, method: str, given: object, like: Tensor) -> None:
    what = f"`{method}` of scheme {scheme.name!r} must return"
    if not isinstance(given, Tensor):
        raise ValueError(f"{what} a tensor, not {type(given).__name__}")
    if given.shape != like.shape:
        raise ValueError(f"{what} the shape that it is given, {tuple(like.shape)}, not {tuple(given.shape)}")
    if given.dtype != like.dtype:
        raise ValueError(f"{what} the type that it is given, {like.dtype}, not {given.dtype}")
    if given.device != like.device:
        raise ValueError(f"{what} a tensor on {like.device}, not on {given.device}")
    if not given.isfinite().all():
        raise ValueError(f"{what} finite numbers, not {given[~given.isfinite()][0].item()}")


def tensor_of(layer: SchemeLayer, name: str) -> Tensor:
    """Return a tensor of a layer by name, one of those that `Scheme.start` made."""
    tensor: Tensor = getattr(layer, name)
    return tensor


def _twos_complement(bits: int) -> tuple[int, int]:
    """Return the smallest and the largest integer of so many bits; one bit stands for -1 and +1."""
    if bits == 1:
        return -1, 1
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def scheme_names() -> list[str]:
    """List the names of all schemes that are known or installed; no plug-in is imported.

    Returns:
        The names, our own first.
    """
    return list(dict.fromkeys([*Scheme.known, *(point.name for point in installed(GROUP))]))


def scheme_rows() -> list[PluginRow]:
    """List all schemes that are known or installed, with where they come from and a line each; no plug-in is imported.

    Returns:
        A row for each.
    """
    return rows_of(Scheme.known, GROUP)


def schemes_from_records(records: Mapping[str, Any]) -> dict[str, Scheme]:
    """Make the schemes that `scheme_records` described, by layer.

    Names that come from a file are never imported as modules: a scheme given as `module:Name` must
    have been named before by whoever runs the program.

    Args:
        records: By layer, {"name": the scheme's, "options": {...}}.

    Returns:
        A scheme by layer; layers of equal records share one.

    Raises:
        ValueError: Naming the layer, for anything that is no such record, or options that the
            scheme doesn't have.
        ImportError: For a scheme of an installed package that can't be imported.
    """
    if not isinstance(records, Mapping):
        raise ValueError(f"records of schemes must be given by layer, not as {type(records).__name__}")
    made: dict[str, Scheme] = {}
    shared: dict[str, Scheme] = {}
    for layer, record in records.items():
        key = repr(record)
        if key not in shared:
            try:
                shared[key] = _from_record(record)
            except ValueError as reason:
                raise ValueError(f"layer {layer!r}: {reason}") from reason
        made[layer] = shared[key]
    return made


def _from_record(record: Any) -> Scheme:
    if not isinstance(record, Mapping) or set(record) != {"name", "options"}:
        raise ValueError("the record of a scheme must have a name and options, and nothing else")
    name, options = record["name"], record["options"]
    if not isinstance(name, str) or not isinstance(options, Mapping):
        raise ValueError("the record of a scheme must have a text as name, and options by name")
    found = _scheme_class(name, modules=False)
    try:
        return found(**options)
    except TypeError as error:
        raise ValueError(f"scheme {name!r} doesn't take the options {dict(options)}: {error}") from error


def _scheme_class(name: str, modules: bool) -> type[Scheme]:
    if name in Scheme.known:
        return _checked(Scheme.known[name], name)
    point = find_installed(GROUP, name, "scheme")
    if point is not None:
        return _registered(import_attribute(place(point), f"scheme {name!r} of {origin(point)}"), name)
    if modules and names_a_module(name):
        look_into_current_folder()
        return _registered(import_attribute(name, f"scheme {name!r}"), name)
    raise ValueError(unknown("scheme", name, scheme_names(), modules))


def _registered(found: Any, name: str) -> type[Scheme]:
    """Make a class known under the name by which it was asked for: a file that records the name can be read again."""
    made = _checked(found, name)
    Scheme.known[name] = made
    if not is_ours(made):
        made.name = name
    return made


def _checked(found: Any, name: str) -> type[Scheme]:
    if not isinstance(found, type) or not issubclass(found, Scheme):
        raise ValueError(f"scheme {name!r} can't be used: it is no subclass of quantizers.Scheme")
    lacking = [method for method in REQUIRED if getattr(found, method) is getattr(Scheme, method)]
    if lacking:
        raise ValueError(f"scheme {name!r} can't be used: it lacks {' and '.join(lacking)}")
    return found
