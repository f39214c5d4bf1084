"""Files of enumerated problems: what every policy of a small network is worth, so that the best of them is known.

An .npz file holds these arrays; nothing in it can be executed.

    meta                        a text, JSON: name, metric, target, bits, float_accuracy, search_images, test_images; decisions
                                (the numbers of the layers that decide together); limits (budgets in the metric's unit, by a
                                name such as the fraction of the way from the cheapest policy to the dearest); layers (the
                                fields of `hw_models.Layer`)
    cost                        (layers, 8, 8): by the bits of weights and of activations, less 1, in the metric's unit
    noise                       (decisions, 2, 8): the relative squared error of weights and of activations, by their bits
    pairs_0, prices_0, ...      of every decision: (options, 2) bits of weights and of activations; (options,) what they cost
    accuracy, loss, kl          (policies,) in C order of the options, on the search images; accuracy is -1 where not known
    accuracy_test, loss_test    the same on the test images
    extra_pairs, extra          (M, decisions, 2) bits and (M, 3) accuracy, loss and kl of further policies, those that
                                sensitivities of single operands ask for

`cost` and `noise` may have the ten places of `hw_models.widths` instead: 16 bits and float.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import hw_models
from haq.problem.decision import WidthsAsked, read_bits, ten_places
from haq.problem.limits import ROUNDING
from haq.store import npz
from haq.store.files import write
from haq.store.units import describe_amount
from hw_models.metrics import METRICS, PEAK
from hw_models.registry import printable
from hw_models.widths import PLACES, WIDTHS, places

FOLDER = Path(__file__).with_name("tables")
MOST_BYTES = 1 << 28  # of a file
MOST_UNPACKED = 1 << 29  # bytes of its arrays in memory
MOST_IMAGES = 10**9
UNKNOWN = -1.0  # the accuracy of a policy that was not evaluated
META = ("name", "metric", "target", "bits", "float_accuracy", "search_images", "test_images", "decisions", "limits", "layers")
ARRAYS = ("meta", "cost", "noise", "accuracy", "loss", "kl", "accuracy_test", "loss_test", "extra_pairs", "extra")
SAME = 1e-6  # relative: sums of costs in another order, or kept in float32
NEAR = 1e-2  # of an image: accuracies kept in float32 are this near to a share of images
SHOWN = 80  # characters of a value in a message

Floats = NDArray[np.float64]


class TableError(ValueError):
    """A file of an enumerated problem can't be used."""


@dataclass(frozen=True, eq=False)
class TableFile:
    """An enumerated problem, as a file holds it.

    Attributes:
        name: What it is called.
        metric: What is limited, one of `hw_models.METRICS`.
        target: The hardware that costs are of.
        widths: Those that may be chosen.
        float_accuracy: The float network's on the search images.
        search_images: How many there are.
        test_images: Likewise.
        limits: Budgets in the metric's unit, by name.
        workload: The layers.
        groups: Of every decision, the layers that it is of.
        cost: Shape (layers, 10, 10); NaN for what the target can't do.
        noise: The relative squared error of weights and of activations, shape (decisions, 2, 10).
        pairs: Of every decision, shape (options, 2).
        prices: Of every decision, shape (options,), in the metric's unit.
        accuracy: Of every policy on the search images, in C order of the options; -1 where it isn't known.
        loss: Likewise, in nats.
        kl: The divergence from the float network's answers, in nats.
        accuracy_test: On the test images.
        loss_test: Likewise.
        extra: Accuracy, loss and divergence of further policies, by the pairs of all decisions.
    """

    name: str
    metric: str
    target: str
    widths: WidthsAsked
    float_accuracy: float
    search_images: int
    test_images: int
    limits: dict[str, float]
    workload: hw_models.Workload
    groups: list[tuple[int, ...]]
    cost: Floats = field(repr=False)
    noise: Floats = field(repr=False)
    pairs: list[NDArray[np.int64]] = field(repr=False)
    prices: list[Floats] = field(repr=False)
    accuracy: Floats = field(repr=False)
    loss: Floats = field(repr=False)
    kl: Floats = field(repr=False)
    accuracy_test: Floats = field(repr=False)
    loss_test: Floats = field(repr=False)
    extra: dict[tuple[tuple[int, int], ...], tuple[float, float, float]] = field(repr=False)

    @property
    def counts(self) -> tuple[int, ...]:
        """Return how many options every decision has."""
        return tuple(len(pairs) for pairs in self.pairs)

    def all_prices(self) -> Floats:
        """Return what every policy costs, shape (policies,)."""
        total = np.zeros(1)
        for prices in self.prices:
            total = np.add.outer(total, prices).reshape(-1)
        return total

    def write(self, path: Path) -> None:
        """Write a file that `read` reads, compressed."""
        bits: Any = self.widths.words
        low, high = self.widths.weights[0], self.widths.weights[-1]
        if high <= hw_models.BITS and self.widths == read_bits((low, high)):
            bits = [low, high]
        meta = {
            "name": self.name,
            "metric": self.metric,
            "target": self.target,
            "bits": bits,
            "float_accuracy": self.float_accuracy,
            "search_images": self.search_images,
            "test_images": self.test_images,
            "decisions": self.groups,
            "limits": self.limits,
            "layers": [dataclasses.asdict(layer) for layer in self.workload.layers],
        }
        arrays: dict[str, Any] = {
            "meta": np.array(json.dumps(meta)),
            "cost": self.cost[:, : hw_models.BITS, : hw_models.BITS],
            "noise": self.noise[:, :, : hw_models.BITS],
            "accuracy": self.accuracy.astype(np.float32),
            "loss": self.loss.astype(np.float32),
            "kl": self.kl.astype(np.float32),
            "accuracy_test": self.accuracy_test.astype(np.float32),
            "loss_test": self.loss_test.astype(np.float32),
            "extra_pairs": np.array(list(self.extra), np.int8).reshape(-1, len(self.groups), 2),
            "extra": np.array(list(self.extra.values()), float).reshape(-1, 3),
        }
        for index, (pairs, prices) in enumerate(zip(self.pairs, self.prices, strict=True)):
            arrays[f"pairs_{index}"] = pairs.astype(np.int8)
            arrays[f"prices_{index}"] = prices
        content = io.BytesIO()
        np.savez_compressed(content, **arrays)
        write(path, content.getvalue())


def shipped() -> list[str]:
    """List the names of the tables that ship with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.npz"))


def find(path: str | os.PathLike[str]) -> Path:
    """Return the file that is meant: the package's own for one of its names, such as "deep", or else the path."""
    if str(path) in shipped():
        return FOLDER / f"{path}.npz"
    return Path(path)


def read(path: str | os.PathLike[str]) -> TableFile:
    """Read an enumerated problem.

    Args:
        path: An .npz file, or the name of one that ships with the package.

    Returns:
        What it holds, checked.

    Raises:
        TableError: A ValueError in one sentence that names the file, the key, and what is expected.
        FileNotFoundError: If there is no such file.
    """
    path = find(path)
    try:
        arrays = npz.read(path, None, MOST_BYTES, MOST_UNPACKED)
    except FileNotFoundError:
        ours = ", ".join(shipped())
        raise FileNotFoundError(
            f"there is no {path}: give the .npz file of an enumerated problem, or one of ours: {ours}"
        ) from None
    except (ValueError, MemoryError) as error:
        reason = printable(" ".join(str(error).split()))
        raise TableError(f"{path} is not the .npz file of an enumerated problem: {reason}") from None
    return _Reader(path, arrays).read()


class _Reader:
    """Makes a table of the arrays of a file, and says what is wrong with them."""

    def __init__(self, path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
        self.path = path
        self.arrays = arrays
        self.meta: dict[str, Any] = {}

    def error(self, key: str, words: str) -> TableError:
        """Make the error of one key."""
        return TableError(printable(f"{self.path} can't be used: `{key}` {words}"))

    def read(self) -> TableFile:
        """Read everything; what depends on the size of something else comes after it."""
        for key in ARRAYS:
            if key not in self.arrays:
                raise self.error(key, f"is missing; an enumerated problem has {', '.join(ARRAYS)}, and pairs_i and prices_i")
        self._read_meta()
        metric = self._text("metric")
        if metric not in METRICS or metric == PEAK:
            known = ", ".join(name for name in METRICS if name != PEAK)
            raise self.error("meta", f"has the metric {metric[:SHOWN]!r}; it must be one of {known}")
        workload = self._workload()
        groups = self._groups(len(workload.layers))
        cost = self._table("cost", "layers", (len(workload.layers),))
        noise = self._noise(len(groups))
        pairs = [self._pairs(index) for index in range(len(groups))]
        self._check_no_more_than(len(groups))
        prices = [self._prices(index, group, pairs[index], cost) for index, group in enumerate(groups)]
        counts = [len(of_decision) for of_decision in pairs]
        accuracy = self._accuracies("accuracy", counts, self._count("search_images"))
        known = accuracy != UNKNOWN
        made = TableFile(
            name=self._text("name"),
            metric=metric,
            target=self._text("target"),
            widths=self._widths(pairs),
            float_accuracy=self._float_accuracy(),
            search_images=self._count("search_images"),
            test_images=self._count("test_images"),
            limits=self._limits(),
            workload=workload,
            groups=groups,
            cost=cost,
            noise=noise,
            pairs=pairs,
            prices=prices,
            accuracy=accuracy,
            loss=self._losses("loss", counts, known),
            kl=self._losses("kl", counts, known),
            accuracy_test=self._accuracies("accuracy_test", counts, self._count("test_images")),
            loss_test=self._losses("loss_test", counts, known),
            extra=self._extra(len(groups)),
        )
        if (made.accuracy_test[known] == UNKNOWN).any():
            raise self.error("accuracy_test", "is -1 for a policy whose `accuracy` is known; it must be known too")
        self._check_limits(made)
        return made

    def _read_meta(self) -> None:
        array = self.arrays["meta"]
        text: str | bytes = ""
        if array.dtype.kind == "U" and array.size == 1:
            text = str(array.reshape(-1)[0])
        elif array.dtype == np.uint8:
            text = array.tobytes()
        try:
            meta = json.loads(text)
        except (ValueError, RecursionError):
            meta = None
        if not isinstance(meta, dict):
            raise self.error("meta", f"is no JSON object; it must be the text of one, with {', '.join(META)}")
        for key in META:
            if key not in meta:
                raise self.error("meta", f"lacks {key!r}; it must have {', '.join(META)}")
        self.meta = meta

    def _wrong(self, key: str, expected: str) -> TableError:
        """Make the error of a key of `meta`."""
        value = " ".join(repr(self.meta[key]).split())
        if len(value) > SHOWN:
            value = f"{value[:SHOWN]}..."
        return self.error("meta", f"has {key} {value}; it must be {expected}")

    def _text(self, key: str) -> str:
        value = self.meta[key]
        if not isinstance(value, str) or not value:
            raise self._wrong(key, "a text")
        return value

    def _count(self, key: str) -> int:
        value = self.meta[key]
        if not _is_size(value, 1) or value > MOST_IMAGES:
            raise self._wrong(key, f"an integer from 1 to {MOST_IMAGES:,}")
        return value

    def _float_accuracy(self) -> float:
        value = _finite(self.meta["float_accuracy"])
        if value is None or not 0 <= value <= 1:
            raise self._wrong("float_accuracy", "a share from 0 to 1")
        return float(_shares(np.array([value]), self._count("search_images"))[0])

    def _limits(self) -> dict[str, float]:
        given = self.meta["limits"]
        if not isinstance(given, dict) or not given:
            raise self._wrong("limits", 'an object with at least one budget, such as {"0.5": 1.2e-3}')
        found = {}
        for key, value in given.items():
            amount = _finite(value)
            if amount is None or amount <= 0:
                raise self._wrong("limits", "an object of positive numbers, in the metric's unit")
            found[key] = amount
        return found

    def _widths(self, pairs: Sequence[NDArray[np.int64]]) -> WidthsAsked:
        given = self.meta["bits"]
        try:
            if isinstance(given, list):
                low, high = given
                given = (int(low), int(high))
            widths = read_bits(given)
        except (TypeError, ValueError):
            raise self._wrong("bits", "the smallest and the largest width, such as [2, 8]") from None
        for index, of_decision in enumerate(pairs):
            # What is pinned has one option, of any width.
            beyond = ~(np.isin(of_decision[:, 0], widths.weights) & np.isin(of_decision[:, 1], widths.activations))
            if len(of_decision) > 1 and beyond.any():
                w, a = of_decision[int(beyond.argmax())]
                raise self.error(
                    f"pairs_{index}", f"has the pair {w}/{a}, which is not within the bits {widths.words} of `meta`"
                )
        return widths

    def _workload(self) -> hw_models.Workload:
        given = self.meta["layers"]
        if not isinstance(given, list) or not given:
            raise self._wrong("layers", "a list of layers, each an object with the fields of hw_models.Layer")
        layers = []
        for index, fields in enumerate(given):
            try:
                layers.append(_layer(fields))
            except ValueError as error:
                raise self.error("meta", f"has a layer {index} {error}") from None
        names = [layer.name for layer in layers]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise self.error("meta", f"has two layers called {twice[:SHOWN]!r}; every layer must have a name of its own")
        return hw_models.Workload(tuple(layers))

    def _groups(self, layers: int) -> list[tuple[int, ...]]:
        given = self.meta["decisions"]
        expected = f"a list of lists, in which each of the {layers} layers, numbered from 0, is once"
        if not isinstance(given, list) or not given or not all(isinstance(group, list) and group for group in given):
            raise self._wrong("decisions", expected)
        numbers = [number for group in given for number in group]
        if any(isinstance(number, bool) or not isinstance(number, int) for number in numbers):
            raise self._wrong("decisions", expected)
        if sorted(numbers) != list(range(layers)):
            raise self._wrong("decisions", expected)
        return [tuple(sorted(group)) for group in given]

    def _numbers(self, key: str) -> Floats:
        """Return an array of numbers."""
        array = self.arrays[key]
        if array.dtype.kind not in "iuf":
            raise self.error(key, f"is an array of {array.dtype}; it must be one of numbers")
        return array.astype(np.float64)

    def _shape(self, key: str, shape: Sequence[int], words: str) -> Floats:
        """Return an array of a shape. Raises TableError for another."""
        array = self._numbers(key)
        if array.shape != tuple(shape):
            raise self.error(key, f"has the shape {array.shape}; it must be {tuple(shape)}, {words}")
        return array

    def _table(self, key: str, words: str, first: tuple[int, ...]) -> Floats:
        """Return what is told by both widths, with all places; what isn't told is NaN."""
        array = self._numbers(key)
        shapes = [(*first, size, size) for size in (hw_models.BITS, PLACES)]
        if array.shape not in shapes:
            raise self.error(
                key, f"has the shape {array.shape}; it must be {shapes[0]}: {words}, and the bits of both operands"
            )
        self._check_finite(key, array)
        complete = np.full(shapes[1], np.nan)
        complete[..., : array.shape[-2], : array.shape[-1]] = array
        return complete

    def _noise(self, decisions: int) -> Floats:
        array = self._numbers("noise")
        shapes = [(decisions, 2, size) for size in (hw_models.BITS, PLACES)]
        if array.shape not in shapes:
            words = f"it must be {shapes[0]}: decisions, weights and activations, and their bits"
            raise self.error("noise", f"has the shape {array.shape}; {words}")
        self._check_finite("noise", array)
        return np.array([[ten_places(row, 0.0) for row in of_decision] for of_decision in array])

    def _check_finite(self, key: str, array: Floats) -> None:
        wrong = ~(np.isfinite(array) & (array >= 0))
        if wrong.any():
            where = np.argwhere(wrong)[0].tolist()
            raise self.error(key, f"is {array[tuple(where)]} at {where}; it must be finite numbers from 0")

    def _pairs(self, index: int) -> NDArray[np.int64]:
        key = f"pairs_{index}"
        if key not in self.arrays or f"prices_{index}" not in self.arrays:
            raise self.error(key, f"or `prices_{index}` is missing; every decision of `meta` must have both")
        array = self.arrays[key]
        if array.dtype.kind not in "iu" or array.ndim != 2 or array.shape[1] != 2 or not len(array):
            raise self.error(key, f"is of {array.dtype} and shape {array.shape}; it must be integers (options, 2)")
        self._check_widths(key, array)
        pairs = array.astype(np.int64)
        if len(np.unique(pairs, axis=0)) < len(pairs):
            raise self.error(key, "has a pair of bits twice; every option must be another")
        return pairs

    def _check_widths(self, key: str, array: NDArray[Any]) -> None:
        wrong = array[~np.isin(array, WIDTHS)]
        if wrong.size:
            raise self.error(key, f"has the width {wrong.reshape(-1)[0]}; widths must be from 1 to 8")

    def _check_no_more_than(self, decisions: int) -> None:
        for key in self.arrays:
            kind, _, number = key.partition("_")
            if kind in ("pairs", "prices") and number.isdecimal() and int(number) >= decisions:
                raise self.error(key, f"is of no decision; `meta` has {decisions}, numbered from 0")

    def _prices(self, index: int, group: tuple[int, ...], pairs: NDArray[np.int64], cost: Floats) -> Floats:
        key = f"prices_{index}"
        given = self._shape(key, (len(pairs),), f"a price for each pair of pairs_{index}")
        found = places(pairs)
        priced: Floats = cost[list(group)].sum(0)[found[:, 0], found[:, 1]]
        if np.isnan(priced).any():
            w, a = pairs[int(np.isnan(priced).argmax())]
            raise self.error(f"pairs_{index}", f"has the pair {w}/{a}, which `cost` has no price for")
        wrong = ~np.isclose(given, priced, rtol=SAME, atol=0)
        if wrong.any():
            option = int(wrong.argmax())
            w, a = pairs[option]
            raise self.error(
                key, f"is {given[option]:g} for the pair {w}/{a}; by `cost` its layers {list(group)} take {priced[option]:g}"
            )
        return priced

    def _by_policy(self, key: str, counts: Sequence[int]) -> Floats:
        array = self._numbers(key)
        policies = math.prod(counts)
        if array.shape not in ((policies,), tuple(counts)):
            words = " x ".join(map(str, counts))
            raise self.error(
                key, f"has the shape {array.shape}; it must be ({policies},), a value per policy ({words} options)"
            )
        return array.reshape(-1)

    def _accuracies(self, key: str, counts: Sequence[int], images: int) -> Floats:
        array = self._by_policy(key, counts)
        wrong = ~((array == UNKNOWN) | ((array >= 0) & (array <= 1)))
        if wrong.any():
            policy = int(wrong.argmax())
            raise self.error(
                key, f"is {array[policy]:g} for policy {policy}; it must be a share from 0 to 1, or -1 where unknown"
            )
        return _shares(array, images)

    def _losses(self, key: str, counts: Sequence[int], known: NDArray[np.bool_]) -> Floats:
        array = self._by_policy(key, counts)
        if np.isnan(array[known]).any():
            policy = int((np.isnan(array) & known).argmax())
            raise self.error(key, f"is NaN for policy {policy}, whose `accuracy` is known; it must be a number")
        return array

    def _extra(self, decisions: int) -> dict[tuple[tuple[int, int], ...], tuple[float, float, float]]:
        pairs = self.arrays["extra_pairs"]
        if pairs.dtype.kind not in "iu" or pairs.ndim != 3 or pairs.shape[1:] != (decisions, 2):
            raise self.error(
                "extra_pairs", f"is of {pairs.dtype} and shape {pairs.shape}; it must be integers (policies, {decisions}, 2)"
            )
        self._check_widths("extra_pairs", pairs)
        values = self._shape("extra", (len(pairs), 3), "accuracy, loss and kl for each of extra_pairs")
        shares = values[:, 0]
        if np.isnan(values).any() or (shares < 0).any() or (shares > 1).any():
            raise self.error("extra", "has a NaN, or an accuracy that is no share; it must be accuracy (0 to 1), loss and kl")
        values[:, 0] = _shares(shares, self._count("search_images"))
        found = {}
        for row, value in zip(pairs.tolist(), values.tolist(), strict=True):
            found[tuple((w, a) for w, a in row)] = (value[0], value[1], value[2])
        return found

    def _check_limits(self, made: TableFile) -> None:
        """Raise TableError for a budget that nothing meets, or within which not everything is known."""
        prices = made.all_prices()
        for key, amount in made.limits.items():
            within = prices <= amount * (1 + ROUNDING)
            what = f"has the limit {key[:SHOWN]!r} of {describe_amount(amount, made.metric)}"
            if not within.any():
                least = describe_amount(float(prices.min()), made.metric)
                raise self.error("meta", f"{what}, which no policy meets; the cheapest takes {least}")
            if (made.accuracy[within] == UNKNOWN).any():
                policy = int((within & (made.accuracy == UNKNOWN)).argmax())
                raise self.error("accuracy", f"is -1 for policy {policy}, but `meta` {what}, within which all must be known")


def _finite(value: Any) -> float | None:
    """Return a finite number as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    if not math.isfinite(number):
        return None
    return number


def _shares(values: Floats, images: int) -> Floats:
    """Return shares of images exactly, where they are some but for float32; otherwise as they are."""
    counted = np.round(values * images)
    known = values >= 0
    if (np.abs(values * images - counted)[known] > NEAR).any():
        return values
    return np.where(known, counted / images, values)


def _layer(given: Any) -> hw_models.Layer:
    """Make a layer of the fields of a file; those that follow from others are left out.

    Raises ValueError, in words that follow "a layer", for what isn't one.
    """
    if not isinstance(given, dict):
        raise ValueError("that is no object; it must have the fields of hw_models.Layer")
    found: dict[str, Any] = {}
    for one in dataclasses.fields(hw_models.Layer):
        if one.name not in given:
            if one.default is dataclasses.MISSING:
                raise ValueError(f"without {one.name!r}")
            continue
        found[one.name] = _field(one.name, given[one.name])
    return hw_models.Layer(**found)


def _field(name: str, value: Any) -> Any:
    """Read one field of a layer. Raises ValueError for a value that it can't have."""
    if name in ("name", "kind", "weight_of", "bias_of"):
        fits = isinstance(value, str)
    elif name in ("bias", "is_1d"):
        fits = isinstance(value, bool)
    elif name in ("in_channels", "out_channels", "groups"):
        fits = _is_size(value, 1)
    elif name == "calls":
        return _calls(value)
    else:
        least = 1
        if name == "padding":
            least = 0
        if isinstance(value, list):
            value = tuple(value)
        fits = isinstance(value, tuple) and len(value) == 2 and all(_is_size(part, least) for part in value)
    if not fits:
        raise ValueError(f"whose {name!r} is {str(value)[:SHOWN]!r}, which it can't be")
    return value


def _calls(value: Any) -> tuple[hw_models.Call, ...]:
    expected = "whose 'calls' are no list of objects with input_size and output_size, two integers each"
    if not isinstance(value, list) or not value:
        raise ValueError(expected)
    calls = []
    for call in value:
        if not isinstance(call, dict) or not {"input_size", "output_size"} <= set(call):
            raise ValueError(expected)
        sizes = [call["input_size"], call["output_size"]]
        for size in sizes:
            if not isinstance(size, list) or len(size) != 2 or not all(_is_size(part, 1) for part in size):
                raise ValueError(expected)
        calls.append(hw_models.Call(tuple(sizes[0]), tuple(sizes[1])))
    return tuple(calls)


def _is_size(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
