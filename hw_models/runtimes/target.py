"""The targets `onnxruntime` and `openvino`: layers cost what the runtime was measured to take for them on this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np

from hw_models.cost import CostTable, check_batch
from hw_models.measured.cache import Notice, TimingCache, warn
from hw_models.measured.processor import processor_features, processor_model
from hw_models.measured.timing import Progress, Say, Timing
from hw_models.measured.trusted import Trusted
from hw_models.runtimes.measure import Reference, copies_of, measure
from hw_models.runtimes.onnxruntime import OnnxRuntime
from hw_models.runtimes.openvino import OpenVino
from hw_models.runtimes.operators import VERSION, WHOLE_FLOAT, Operator, Pair, form_of, weight_bytes
from hw_models.runtimes.runtime import Runtime, possible_pairs
from hw_models.storage import storage_bytes
from hw_models.tvm_cpu.conv import Conv
from hw_models.widths import PLACES, place_of
from hw_models.workload import Workload

RUNTIMES: Mapping[str, Callable[[], Runtime]] = {OnnxRuntime.name: OnnxRuntime, OpenVino.name: OpenVino}
# What these targets are, for a list of them.
MEASURED = {
    OnnxRuntime.name: "layers as ONNX Runtime runs them, measured on this machine: 8/8 and float; linear also 2, 4, 8/float",
    OpenVino.name: "layers as OpenVINO runs them, measured on this machine: 8/8 and float; linear also 2, 4, 8/float",
}


class Shape(NamedTuple):
    """Layers that cost the same."""

    conv: Conv
    form: str


@dataclass(frozen=True)
class RuntimeTarget:
    """A runtime of ONNX models on this machine's processor, one thread by default. Energy is not measured.

    A pair of widths is supported where the runtime computes with both: integers of 8 bits, few-bit weights of linear layers
    with float activations, and float. What it would turn into float first isn't, and neither are fewer bits that run as 8.

    Each distinct layer is measured once, at batch 1 unless told otherwise, as it is within a network: integers in and out,
    without what a session costs, and with its weights as far from the caches as those of this network are. What is in no
    layer has no cost: element-wise operations, pools, and quantizing where float and integers meet, so a policy that goes to
    and fro between these takes longer than its layers together. The times are kept in a cache, and a few of them are checked
    at every start. `progress(done, total, note)` is told of the layers done and of what is being done, `notice` of a cache
    and of times that can't be trusted.
    """

    runtime: Runtime
    processor: str
    features: str
    threads: int = 1
    cold: bool = False
    zero_points: ClassVar[bool] = True
    progress: Progress | None = field(default=None, compare=False)
    notice: Notice = field(default=warn, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        """Give what another process needs: not what shows progress in this one."""
        return {**self.__dict__, "progress": None, "notice": warn}

    @property
    def name(self) -> str:
        """What `load_target` is given."""
        return self.runtime.name

    @property
    def description(self) -> str:
        """The processor and the runtime, and what isn't priced."""
        return (
            f"{self.processor}, layers as {self.runtime.title} {self.runtime.version} runs them, activations unsigned; "
            "element-wise operations, pools and quantizing between float and integers are in no layer and have no cost"
        )

    @property
    def provenance(self) -> str:
        """Say how its costs were measured."""
        threads = "1 thread"
        if self.threads > 1:
            threads = f"{self.threads} threads"
        caches = ""
        if self.cold:
            caches = ", cold caches"
        return f"measured on {self.processor}, {self.runtime.title} {self.runtime.version}, {threads}{caches}"

    @property
    def key(self) -> dict[str, str | int]:
        """All that measured times depend on: they are never used under another key."""
        caches = "warm"
        if self.cold:
            caches = "cold"
        return {
            "processor": self.processor,
            "features": self.features,
            "runtime": self.runtime.title,
            "version": self.runtime.version,
            "threads": self.threads,
            "caches": caches,
            "graphs": VERSION,
        }

    def cost_table(self, workload: Workload, *, batch: int | None = None) -> CostTable:
        """Measure the seconds of every layer at every pair that is computed in these widths (and count bytes).

        Raises ValueError naming a layer that the runtime can't run in float. What was measured up to then is kept.
        """
        images = 1
        if batch is not None:
            images = check_batch(batch)
        timed = self._timings(self._operators(workload, images))
        latency = np.full((len(workload), PLACES, PLACES), np.nan)
        doubtful = []
        for index, layer in enumerate(workload.layers):
            calls = [timed[_shape(layer, call, images)] for call in layer.calls]
            for w, a in calls[0]:
                if all((w, a) in timings for timings in calls):
                    latency[index, place_of(w), place_of(a)] = sum(timings[w, a].median_s for timings in calls)
            if not all(timing.trusted for timings in calls for timing in timings.values()):
                doubtful.append(layer.name)
        provenance = self.provenance
        if doubtful:
            provenance += f", the machine being busy in {len(doubtful)} of {len(workload)} layers"
            self.notice(
                f"the times of {len(doubtful)} of {len(workload)} layers on {self.name} are not trusted ({doubtful[0]!r} is "
                "the first): the machine was busy while they were measured; the next start measures them again"
            )
        return CostTable(
            target=self.name,
            provenance=provenance,
            workload=workload,
            batch=images,
            latency_s=latency,
            energy_j=None,
            storage_bytes=storage_bytes(workload),
        )

    def _operators(self, workload: Workload, images: int) -> dict[Shape, tuple[str, list[Operator]]]:
        """Of every distinct shape, the first layer that has it and the operators that are to be measured."""
        if not len(workload):
            raise ValueError("the workload has no layers, so there is nothing to price")
        weights = sum(layer.own_weights for layer in workload.layers)
        found: dict[Shape, tuple[str, list[Operator]]] = {}
        for layer in workload.layers:
            for call in layer.calls:
                try:
                    shape = _shape(layer, call, images)
                except ValueError as error:
                    raise ValueError(f"{self.name} can't compute layer {layer.name!r}: {error}") from error
                if shape not in found:
                    found[shape] = layer.name, [_operator(shape, pair, weights) for pair in possible_pairs(shape.form)]
        return found

    def _timings(self, wanted: Mapping[Shape, tuple[str, list[Operator]]]) -> dict[Shape, dict[Pair, Timing]]:
        """Return the times of every shape, from the cache or measured now, at the pairs that the runtime computes."""
        found: dict[Shape, dict[Pair, Timing]] = {}
        able: dict[Shape, list[Operator]] = {}
        with self._trusted() as trusted:
            before = {}  # what the cache has of earlier, by shape

            def time(shape: Shape) -> None:
                say = partial(self._say, len(found), len(wanted), wanted[shape][0])
                found[shape] = {operator.pair: timing for operator, timing in trusted.timings(say, able[shape]).items()}

            for shape, (layer, operators) in wanted.items():
                self._say(len(found), len(wanted), layer, "")
                able[shape] = [one for one in operators if trusted.knows(one) or self._computes(layer, one)]
                earlier = [one for one in able[shape] if trusted.from_before(one)]
                if earlier:
                    before[shape] = earlier[0]
                time(shape)
            for shape in trusted.outdated(before, lambda count: partial(self._say, 0, count, "what was measured before")):
                trusted.forget(able[shape])
                time(shape)
            for shape in before:
                trusted.settle(able[shape])
            if trusted.unchecked:
                self.notice(f"the machine is busy: what was measured before on {self.name} could not be checked")
        self._say(len(found), len(wanted), "", "")
        return found

    def _computes(self, layer: str, operator: Operator) -> bool:
        """Say whether the runtime computes a layer at its widths; in float it must."""
        try:
            able = self.runtime.computes(operator)
        except ValueError as error:
            raise ValueError(f"{self.name} can't compute layer {layer!r}: {error}") from error
        if not able and operator.pair == WHOLE_FLOAT:
            raise ValueError(f"{self.name} can't compute layer {layer!r} in float")
        return able

    @contextmanager
    def _trusted(self) -> Iterator[Trusted[Operator]]:
        """What has operators measured, unless they are in the cache."""

        def measured(say: Say, some: list[Operator]) -> Mapping[Operator, Timing]:
            return measure(some, self.runtime, self.threads, say=say, cold=self.cold)

        yield Trusted(TimingCache(self.key, self.notice), str, measured, lambda: Reference(self.runtime, self.threads))

    def _say(self, done: int, total: int, what: str, doing: str) -> None:
        if self.progress:
            self.progress(done, total, f"{doing} {what}".strip())


def load_runtime(name: str, threads: int | None) -> RuntimeTarget:
    """Make a target of a runtime on this machine.

    Args:
        name: One of RUNTIMES.
        threads: Of the runtime; None is one.

    Returns:
        The target. What else there is to say are fields of it.

    Raises:
        ImportError: Saying what to install.
        ValueError: For threads that are no positive integer.
    """
    if threads is None:
        threads = 1
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ValueError(f"threads must be a positive integer, not {threads!r}")
    return RuntimeTarget(RUNTIMES[name](), processor_model(), processor_features(), threads)


def _shape(layer: Any, call: Any, images: int) -> Shape:
    conv = Conv.of(layer, call, images)
    return Shape(conv, form_of(conv, layer.kind == "linear"))


def _operator(shape: Shape, pair: Pair, network_weights: int) -> Operator:
    """Make an operator with as many copies as a network of so many weights wants."""
    operator = Operator(shape.conv, shape.form, pair)
    return replace(operator, copies=copies_of(operator, weight_bytes(network_weights, pair)))
