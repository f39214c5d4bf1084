"""Seconds that a runtime takes for a layer within a network, measured so that layers can be added up.

A session costs some microseconds whatever is in it, and in a network every layer reads weights that others have driven out of
the caches since its last turn. So a graph holds a layer several times, with weights of its own each time, together about as
many bytes as the weights of the network: a call of the graph, less a call of one that does nearly nothing, is shared out
among the copies. Sessions of the same layer are read in turn, several rounds, so that drift meets all of them.

With one thread the time of the process is taken, which others on the machine don't add to; with more, the time on the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import numpy as np

from hw_models.measured.timing import Say, Timing
from hw_models.runtimes.operators import INTEGER, WHOLE_FLOAT, Operator
from hw_models.runtimes.runtime import Call, Runtime
from hw_models.tvm_cpu.conv import Conv

READING_S = 0.001  # of one reading at least: as many calls as that takes
OPERATOR_S = 0.03  # of all readings of one operator, within the bounds on their number
ROUNDS = (3, 15)
COLD_ROUNDS = 5
REFERENCE_ROUNDS = 5
FLUSH_BYTES = 64 << 20  # written before each cold reading; more than the caches of one core and its share of the last
COPIES = (2, 96)
# Bytes of all copies' weights, at least and at most: below, all caches hold them, and above, none does.
FOOTPRINT = (1 << 16, 1 << 26)
FINE_S = 1e-6  # a clock of the process that is no finer than that is not taken
EMPTY = Operator(Conv(1, 1, (1, 1), (1, 1)), "linear", WHOLE_FLOAT)
REFERENCE = Operator(Conv(32, 32, (16, 16), (16, 16), (3, 3), padding=(1, 1)), "conv", INTEGER, copies=8)
LEAST_S = 1e-9  # of a layer: two readings may differ by more than a tiny layer takes


def copies_of(operator: Operator, network_bytes: int) -> int:
    """Say how often a layer stands in its graph.

    Args:
        operator: The layer at its pair of widths.
        network_bytes: Bytes that the weights of the whole network have at this pair.

    Returns:
        So many that their weights take as many bytes, rounded up to a power of two; 2 to 96.
    """
    low, high = FOOTPRINT
    footprint = low
    while footprint < min(network_bytes, high):
        footprint *= 2
    fewest, most = COPIES
    return min(max(fewest, -(-footprint // operator.weight_bytes)), most)


def measure(
    operators: Iterable[Operator],
    runtime: Runtime,
    threads: int,
    *,
    say: Say = lambda doing: None,
    cold: bool = False,
) -> dict[Operator, Timing]:
    """Measure the seconds that a runtime takes for each layer.

    Args:
        operators: The layers.
        runtime: What runs them.
        threads: Of the runtime.
        say: Told "loading" and "measuring".
        cold: Whether every reading is one call of the graph with all caches full of something else.

    Returns:
        The timing of each operator.
    """
    wanted = list(dict.fromkeys(operators))
    found: dict[Operator, Timing] = {}
    for layer in dict.fromkeys((operator.conv, operator.form) for operator in wanted):
        group = [operator for operator in wanted if (operator.conv, operator.form) == layer]
        say("loading")
        empty = _Reader(runtime.load(EMPTY, threads), threads, cold)
        readers = {operator: _Reader(runtime.load(operator, threads), threads, cold) for operator in group}
        say("measuring")
        nothing: list[float] = []
        seconds: dict[Operator, list[float]] = {operator: [] for operator in group}
        for number in range(max(reader.rounds for reader in readers.values())):
            nothing.append(empty.read())
            for operator, reader in readers.items():
                if number < reader.rounds:
                    seconds[operator].append(reader.read())
        for operator, values in seconds.items():
            found[operator] = _timing(np.array(values), min(nothing), operator.copies)
    return found


def _timing(values: np.ndarray, nothing: float, copies: int) -> Timing:
    """Share a graph's time, less that of an empty one, out among the copies."""
    low, median, high = np.percentile((values - nothing) / copies, (25, 50, 75))
    return Timing(max(float(median), LEAST_S), float(high - low), len(values))


class Reference:
    """A layer that is timed again and again, to tell a busy machine by: calling it returns the seconds that it takes now."""

    def __init__(self, runtime: Runtime, threads: int) -> None:
        """Load it.

        Args:
            runtime: What runs it.
            threads: Of the runtime.
        """
        self._reader = _Reader(runtime.load(REFERENCE, threads), threads, cold=False)

    def __call__(self) -> float:
        """Time it."""
        return float(np.median([self._reader.read() for _ in range(REFERENCE_ROUNDS)]))


class _Reader:
    """A graph that is called and timed."""

    def __init__(self, call: Call, threads: int, cold: bool) -> None:
        self._call = call
        self._clock = clock_of(threads)
        self._cold = cold
        self._calls = 1
        self.rounds = COLD_ROUNDS
        call()  # what is made at the first call only
        once = max(min(self.read(), self.read()), FINE_S)
        if not cold:
            self._calls = max(1, round(READING_S / once))
            low, high = ROUNDS
            self.rounds = min(max(low, int(OPERATOR_S / (self._calls * once))), high)

    def read(self) -> float:
        """Return the seconds of one call."""
        if self._cold:
            _flush()
        else:
            self._call()  # what ran before has the caches
        start = self._clock()
        for _ in range(self._calls):
            self._call()
        return (self._clock() - start) / self._calls


def clock_of(threads: int) -> Callable[[], float]:
    """Choose the clock that measures so many threads."""
    if threads == 1 and time.get_clock_info("process_time").resolution <= FINE_S:
        return time.process_time
    return time.perf_counter


_waste: dict[str, np.ndarray] = {}


def _flush() -> None:
    """Fill the caches with something else."""
    if not _waste:
        _waste["bytes"] = np.zeros(FLUSH_BYTES, np.uint8)
    _waste["bytes"] += 1
