"""Which scheme every layer has, and which widths that leaves to choose from."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

import hw_models
import quantizers as Q
from haq.problem.decision import WidthsAsked
from hw_models import trust
from hw_models.capabilities import capabilities_of, has_zero_points
from hw_models.cost import describe_pairs
from hw_models.storage import FLOAT_BYTES
from hw_models.widths import FLOAT, PLACES, pair_words, place_of

WIDTHS: tuple[int | None, ...] = (
    *range(1, Q.MAX_BITS + 1),
    16,
    None,
)  # in the order of `hw_models.widths`, as policies say them
COMPUTED = ("latency", "energy")  # metrics that are those of integer arithmetic

AnyScheme = str | Q.Scheme | Mapping[str, str | Q.Scheme]
USUAL = WidthsAsked(tuple(range(2, Q.MAX_BITS + 1)), tuple(range(2, Q.MAX_BITS + 1)))
LINEAR = Q.Linear(calibration="output")  # what the name "linear" stands for
PLAIN_LINEAR = Q.Linear()  # and where weights are rounded to nearest and nothing is corrected


def schemes_by_layer(scheme: AnyScheme, names: Sequence[str], linear: Q.Scheme = LINEAR) -> dict[str, Q.Scheme]:
    """Find the scheme of every layer.

    Args:
        scheme: A name or a scheme for all layers, or one by layer; layers that a mapping leaves out have the linear one.
        names: The layers.
        linear: The linear one.

    Returns:
        A scheme by layer; layers that are given the same name share one.

    Raises:
        ValueError: For an unknown scheme or layer, naming the close ones.
        ImportError: For a scheme of somebody else's that can't be imported.
    """
    if not isinstance(scheme, Mapping):
        return dict.fromkeys(names, _named(scheme, linear))
    found: dict[str, Q.Scheme] = dict.fromkeys(names, linear)
    shared: dict[str, Q.Scheme] = {}
    for name, chosen in scheme.items():
        if name not in found:
            close = difflib.get_close_matches(name, names, n=3) or list(names)
            raise ValueError(f"`scheme` names {name!r}, which is no layer of the workload; close: {', '.join(close)}")
        if isinstance(chosen, str):
            if chosen not in shared:
                shared[chosen] = _named(chosen, linear)
            chosen = shared[chosen]
        found[name] = chosen
    return found


def check_rounding(rounding: str, schemes: Mapping[str, Q.Scheme], pinned: Collection[str]) -> None:
    """Raise ValueError for GPTQ where no layer that is searched has a scheme with integers to choose between.

    Args:
        rounding: What is asked for.
        schemes: A scheme by layer.
        pinned: The layers that aren't searched.
    """
    searched = {name: scheme for name, scheme in schemes.items() if name not in pinned}
    if rounding != "gptq" or not searched or any(scheme.takes_offsets for scheme in searched.values()):
        return
    names = ", ".join(dict.fromkeys(scheme.name for scheme in searched.values()))
    raise ValueError(f"rounding 'gptq' means nothing to scheme {names}: choose nearest, or the linear scheme")


def roundings_by_layer(
    rounding: str, schemes: Mapping[str, Q.Scheme], workload: hw_models.Workload, images: int
) -> dict[str, str]:
    """Tell how the weights of every layer are rounded.

    Args:
        rounding: What is asked for, "nearest" or "gptq".
        schemes: A scheme by layer.
        workload: The layers.
        images: How many images there are for calibration.

    Returns:
        A rounding by layer: "nearest" where the scheme has no integers to choose between, and where there are fewer patches
        of the input than GPTQ needs, one for each input of an output.
    """
    found = dict.fromkeys(workload.names, "nearest")
    for layer in workload.layers:
        inputs = layer.in_channels // layer.groups * layer.kernel[0] * layer.kernel[1]
        patches = images * sum(call.positions for call in layer.calls)
        if schemes[layer.name].takes_offsets and patches >= inputs:
            found[layer.name] = rounding
    return found


def linear_for(correction: str | None, rounding: str) -> Q.Scheme:
    """Return the linear scheme that goes with a correction and a rounding."""
    if correction is None and rounding == "nearest":
        return PLAIN_LINEAR
    return LINEAR


def _named(scheme: str | Q.Scheme, linear: Q.Scheme) -> Q.Scheme:
    """Find a scheme by name; within a command, `module:Name` is only imported if it was typed."""
    if scheme == linear.name:
        return linear
    if isinstance(scheme, str) and ":" in scheme and scheme not in Q.Scheme.known:
        trust.allow(scheme, "scheme")
    return Q.Scheme.named(scheme)


def describe_schemes(schemes: Mapping[str, Q.Scheme]) -> str:
    """Write schemes as the option --scheme takes them: the one of most layers, then layer=NAME for each of the others."""
    counts = Counter(scheme.name for scheme in schemes.values())
    main = counts.most_common(1)[0][0]
    others = [f"{name}={scheme.name}" for name, scheme in schemes.items() if scheme.name != main]
    return ",".join([main, *others])


def check_widths(
    schemes: Mapping[str, Q.Scheme], asked: WidthsAsked | None, pinned: Mapping[str, tuple[int | None, int | None]]
) -> None:
    """Raise ValueError, naming scheme, layer and width, if widths that are asked for mean nothing in a layer's scheme.

    Args:
        schemes: A scheme by layer.
        asked: The widths that may be chosen; None: those that are usual.
        pinned: Layer -> (weight width, activation width) that can't be chosen.
    """
    asked = asked or USUAL
    for name, scheme in schemes.items():
        if name in pinned:
            w, a = pinned[name]
            try:
                scheme.check(w, a)
            except ValueError as error:
                raise ValueError(f"layer {name!r} is fixed at {pair_words(w, a)}: {error}") from error
        else:
            _check_range(name, scheme, asked)


def _check_range(name: str, scheme: Q.Scheme, asked: WidthsAsked) -> None:
    """Raise ValueError if a width that is asked for means nothing in a layer's scheme, whatever the other operand has."""
    few = [width for width in WIDTHS if width is not None]
    of_weights = [width for width in few if takes(scheme, width, None)]
    of_inputs = [width for width in few if takes(scheme, None, width)]
    wanted = {"weights": (asked.weights, of_weights), "inputs": (asked.activations, of_inputs)}
    for operand, (chosen, widths) in wanted.items():
        missing = [width for width in chosen if width not in widths and width != FLOAT]
        if missing:
            amount = f"{missing[0]} bits"
            if missing[0] == 1:
                amount = "1 bit"
            raise ValueError(
                f"scheme {scheme.name!r} of layer {name!r} has no {operand} of {amount}: choose --bits {_range_of(widths)}"
            )


def check_metric(schemes: Mapping[str, Q.Scheme], metric: str) -> None:
    """Raise ValueError, naming scheme and layer, if a metric is of integer arithmetic and a layer's scheme has no integers."""
    if metric not in COMPUTED:
        return
    for name, scheme in schemes.items():
        if lacks := lacking_integers(scheme):
            raise ValueError(
                f"scheme {scheme.name!r} of layer {name!r} has no integers for {' and '.join(lacks)}, which {metric} is "
                "counted for: choose --metric storage"
            )


def obeying(schemes: Mapping[str, Q.Scheme], target: hw_models.Target) -> dict[str, Q.Scheme]:
    """Make schemes do what hardware can do, by its capabilities (`hw_models.capabilities`).

    Where weights can't have a scale per channel, they get one per tensor; scales become powers of two where they must be;
    integers of activations get the sign that there is. Unsigned ones on hardware with zero points get these, where a scheme
    has them, so that inputs may be negative.

    Args:
        schemes: A scheme by layer.
        target: The hardware.

    Returns:
        A scheme by layer, those of the same scheme being one again; the same ones where nothing has to change.

    Raises:
        ValueError: For a scheme that can't do that, naming it, the layer, the target and what is lacking.
    """
    capabilities = capabilities_of(target)
    if capabilities is None:
        return dict(schemes)
    made: dict[int, Q.Scheme] = {}
    found = {}
    for name, scheme in schemes.items():
        if id(scheme) not in made:
            try:
                made[id(scheme)] = _obedient(scheme, capabilities, has_zero_points(target))
            except ValueError as error:
                raise ValueError(
                    f"scheme {scheme.name!r} of layer {name!r} can't do what hardware target {target.name!r} needs: {error}"
                ) from error
        found[name] = made[id(scheme)]
    return found


def _obedient(scheme: Q.Scheme, capabilities: hw_models.Capabilities, zero_points: bool) -> Q.Scheme:
    """Return a scheme that obeys capabilities. Raises ValueError if it can't."""
    wishes: dict[str, Any] = {}
    if not capabilities.per_channel_weights:
        wishes["per_channel"] = False
    if capabilities.power_of_two_scales:
        wishes["power_of_two"] = True
    if capabilities.activation_sign != "auto":
        wishes["activations"] = capabilities.activation_sign
    if capabilities.activation_sign == "unsigned" and zero_points and "zero_points" in scheme.choices:
        wishes["zero_points"] = True
    if capabilities.accumulator_bits is not None and _has_longer_integers(scheme):
        raise ValueError("its weights are integers of more bits than their width, for which its accumulators aren't counted")
    if not wishes:
        return scheme
    return scheme.with_capabilities(**wishes)


def _has_longer_integers(scheme: Q.Scheme) -> bool:
    """Say whether a scheme's weights, as integers, take more bits than their width at some width."""
    if not scheme.has_integer_weights:
        return False
    widths = [bits for bits in range(2, Q.MAX_BITS) if takes(scheme, bits, None)]
    return any(scheme.integer_weight_bits(bits) != bits for bits in widths)


def full_range(schemes: Mapping[str, Q.Scheme]) -> frozenset[str]:
    """Name the layers whose signed integers take the smallest too, -2^(b-1): see `hw_models.target.price`."""
    return frozenset(name for name, scheme in schemes.items() if scheme.has_integer_weights and not scheme.narrow)


def check_zero_points(schemes: Mapping[str, Q.Scheme], target: hw_models.Target) -> None:
    """Raise ValueError, naming scheme, layer and target, for inputs with zero points on hardware that has none."""
    if has_zero_points(target):
        return
    for name, scheme in schemes.items():
        if scheme.has_zero_points:
            raise ValueError(
                f"scheme {scheme.name!r} of layer {name!r} gives signed inputs zero points, and hardware target "
                f"{target.name!r} computes without any: choose a target that has them, such as cpu, or scheme linear"
            )


def takes(scheme: Q.Scheme, weight_bits: int | None, activation_bits: int | None, signed: bool = False) -> bool:
    """Say whether a pair of widths means something in a scheme; see `Scheme.check`.

    Args:
        scheme: The scheme.
        weight_bits: 1..8, or None for float.
        activation_bits: Likewise.
        signed: Whether the layer's input was ever negative.

    Returns:
        Whether it does.
    """
    return scheme.takes(weight_bits, activation_bits, signed)


def meaningful_pairs(schemes: Mapping[str, Q.Scheme], signed: Mapping[str, bool]) -> NDArray[np.bool_]:
    """Tell which pairs of widths mean something to each layer's scheme.

    Args:
        schemes: A scheme by layer.
        signed: Layer -> whether its input is ever negative; not, for layers that aren't in it.

    Returns:
        Booleans, shape (layers, 10, 10), as tables of costs.
    """
    rows = []
    for name, scheme in schemes.items():
        is_signed = signed.get(name, False)
        rows.append([[takes(scheme, w, a, is_signed) for a in WIDTHS] for w in WIDTHS])
    return np.array(rows)


def calibration_policy(schemes: Mapping[str, Q.Scheme]) -> Q.BitPolicy:
    """Return the policy at which a network is calibrated: 8 bits, but inputs in float where a scheme may refuse negative ones.

    Calibration finds the scales of all widths, and what inputs are like, whatever the policy.
    """
    pairs: dict[str, tuple[int | None, int | None]] = {}
    for name, scheme in schemes.items():
        pairs[name] = Q.END_BITS
        if not takes(scheme, *Q.END_BITS, signed=True):
            pairs[name] = Q.END_BITS[0], None
    return Q.BitPolicy(pairs)


def check_inputs(
    schemes: Mapping[str, Q.Scheme], signed: Mapping[str, bool], table: hw_models.CostTable, meaningful: NDArray[np.bool_]
) -> None:
    """Raise ValueError, with the scheme's reason, for a layer whose input leaves no pair of widths that the target can do.

    Args:
        schemes: A scheme by layer.
        signed: Layer -> whether its input is ever negative.
        table: The target's costs.
        meaningful: What `meaningful_pairs` tells of these inputs.
    """
    left = meaningful & table.supported
    for index, name in enumerate(table.workload.names):
        if left[index].any() or not signed[name]:
            continue
        for w, a in table.pairs_of(index):
            pair = WIDTHS[place_of(w)], WIDTHS[place_of(a)]
            if not takes(schemes[name], *pair):
                continue
            try:
                schemes[name].check(*pair, signed=True)
            except ValueError as error:
                can = describe_pairs(table.pairs_of(index))
                raise ValueError(
                    f"layer {name!r} has no pair of widths on {table.target}, which can do {can}: {error}"
                ) from error


def overhead_bytes(schemes: Mapping[str, Q.Scheme], workload: hw_models.Workload) -> NDArray[np.float64]:
    """Count what schemes store otherwise than the linear one, which a cost table counts.

    That is what they say of themselves, such as codebooks; weights that are no multiples of a step have no step per channel,
    and those with one step for all channels have that one.

    Args:
        schemes: A scheme by layer.
        workload: The layers.

    Returns:
        Bytes, shape (layers, 10, 1); negative where less is stored.
    """
    rows = []
    for layer in workload.layers:
        scheme = schemes[layer.name]
        steps = 0
        if not scheme.has_integer_weights:
            steps = FLOAT_BYTES * layer.out_channels
        elif getattr(scheme, "per_channel", True) is False:
            steps = FLOAT_BYTES * (layer.out_channels - 1)
        row = [[0.0]] * PLACES
        for place, bits in enumerate(WIDTHS):
            if bits is not None and takes(scheme, bits, None):
                row[place] = [float(scheme.storage_overhead_bytes(bits, layer.weights) - steps)]
        rows.append(row)
    return np.array(rows)


def meaningful_metrics(schemes: Mapping[str, Q.Scheme], metrics: Sequence[str]) -> tuple[str, ...]:
    """Leave out the metrics that are of integer arithmetic, if a layer's scheme has no integers."""
    if all(not lacking_integers(scheme) for scheme in schemes.values()):
        return tuple(metrics)
    return tuple(metric for metric in metrics if metric not in COMPUTED)


def lacking_integers(scheme: Q.Scheme) -> list[str]:
    """List the operands that a scheme has no integers for."""
    operands = {"weights": scheme.has_integer_weights, "activations": scheme.has_integer_activations}
    return [operand for operand, has in operands.items() if not has]


def _range_of(widths: Sequence[int]) -> str:
    few = [width for width in widths if width <= Q.MAX_BITS]
    if not few:
        return "of another scheme"
    return f"within {few[0]}:{few[-1]}"
