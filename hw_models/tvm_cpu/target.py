"""The targets `cpu` and `rpc:HOST:PORT`: layers cost what their fastest kernels were measured to take."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from hw_models.cost import CostTable, check_batch
from hw_models.extras import install_line
from hw_models.measured.cache import Notice, TimingCache, warn
from hw_models.measured.processor import kept_processors, processor_model
from hw_models.measured.timing import Progress, Say, Timing
from hw_models.measured.trusted import Trusted
from hw_models.storage import BITS, storage_bytes
from hw_models.tvm_cpu.choose import Choice, Pair, choose, uncovered
from hw_models.tvm_cpu.conv import Conv
from hw_models.tvm_cpu.measure import Board, Reference, measure
from hw_models.workload import Workload

if TYPE_CHECKING:
    from hw_models.tvm_cpu.cpu import Cpu
    from hw_models.tvm_cpu.kernel import Kernel

REFERENCE_CONV = Conv(32, 32, (16, 16), (16, 16), (3, 3), padding=(1, 1))  # what a busy machine is told by
LOCAL = "cpu"
REMOTE = "rpc:"
# What these targets are, for a list of them.
MEASURED = {
    LOCAL: "kernels compiled with TVM and measured on this machine",
    "rpc:HOST:PORT": "the same, on a board that runs TVM's RPC server",
}
# Instructions that a program dies of where they are missing; the rest of LLVM's features only tune.
VECTOR = ("avx", "sse", "fma", "f16c", "bmi", "popcnt", "gfni", "amx", "dotprod", "i8mm", "sve", "sme")


@dataclass(frozen=True)
class CpuTarget:
    """A processor on which kernels are measured, one thread by default. Energy is not measured.

    Each distinct layer shape is measured once, at batch 1 unless told otherwise, and a cell of the cost table is the time of
    the fastest kernel for those bits or wider, so latency never falls with more bits. Activations are taken as unsigned;
    those with a zero point are, but for the number that the kernel's sums begin at. The times are kept in a cache, layer by
    layer, and a few of them are checked at every start. `progress(done, total, note)` is told of the shapes done and of what
    is being done, `notice` of a cache and of times that can't be trusted.
    """

    cpu: Cpu
    processor: str
    features: str
    board: tuple[str, int] | None = None
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
        if self.board is None:
            return LOCAL
        return f"{REMOTE}{self.board[0]}:{self.board[1]}"

    @property
    def description(self) -> str:
        """The processor and the compiler."""
        return f"{self.processor}, kernels compiled with TVM {_tvm_version()} for {self.cpu.target_json}"

    @property
    def provenance(self) -> str:
        """Say how its costs were measured."""
        threads = "1 thread"
        if self.cpu.threads > 1:
            threads = f"{self.cpu.threads} threads"
        caches = ""
        if self.cold:
            caches = ", cold caches"
        return f"measured on {self.processor}, {threads}, TVM {_tvm_version()}, unsigned activations{caches}"

    @property
    def key(self) -> dict[str, str | int]:
        """All that measured times depend on: they are never used under another key."""
        from hw_models.tvm_cpu import kernels

        caches = "warm"
        if self.cold:
            caches = "cold"
        return {
            "processor": self.processor,
            "features": self.features,
            "target": self.cpu.target_json,
            "threads": self.cpu.threads,
            "caches": caches,
            "TVM": _tvm_version(),
            "kernels": kernels.VERSION,
        }

    def cost_table(self, workload: Workload, *, batch: int | None = None) -> CostTable:
        """Measure the seconds of every layer at every pair of bits (and count bytes, as on any target).

        Raises ValueError naming all layers that no kernel covers, with the reason, before anything is compiled; BuildError
        (a ValueError) naming a kernel that can't be compiled; ConnectionError when the board goes away. What was measured
        up to then is kept.
        """
        images = 1
        if batch is not None:
            images = check_batch(batch)
        with kept_processors():
            chosen = self.choices(workload, batch=images)
        latency = np.zeros((len(workload), BITS, BITS))
        doubtful = []
        for index, layer in enumerate(workload.layers):
            choices = [chosen[Conv.of(layer, call, images)] for call in layer.calls]
            for pairs in choices:
                for (w, a), choice in pairs.items():
                    latency[index, w - 1, a - 1] += choice.timing.median_s
            if not all(choice.timing.trusted for pairs in choices for choice in pairs.values()):
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

    def choices(self, workload: Workload, *, batch: int = 1) -> dict[Conv, dict[Pair, Choice]]:
        """Find the fastest kernel of every distinct layer shape at each (weight bits, activation bits)."""
        candidates = self._candidates(workload, batch)
        chosen: dict[Conv, dict[Pair, Choice]] = {}
        with self._trusted() as trusted:
            before = {}  # what the cache has of earlier, by shape
            for conv, (layer, kernels) in candidates.items():
                before[conv] = [kernel for kernel in kernels if trusted.from_before(kernel)]
                say = partial(self._say, len(chosen), len(candidates), layer)
                say("")
                chosen[conv] = choose(kernels, partial(trusted.timings, say))
            kept = {conv: chosen[conv][BITS, BITS].kernel for conv, some in before.items() if some}
            for conv in trusted.outdated(kept, lambda count: partial(self._say, 0, count, "what was measured before")):
                layer, kernels = candidates[conv]
                trusted.forget(kernels)
                say = partial(self._say, len(chosen), len(candidates), layer)
                chosen[conv] = choose(kernels, partial(trusted.timings, say))
            for some in before.values():
                trusted.settle(some)
            if trusted.unchecked:
                self.notice(f"the machine is busy: what was measured before on {self.name} could not be checked")
        self._say(len(chosen), len(candidates), "", "")
        return chosen

    def fastest(self, wanted: Iterable[tuple[Conv, int, int, bool]]) -> dict[tuple[Conv, int, int, bool], Choice]:
        """Find the fastest kernel for layers whose bits are settled.

        They are given as (sizes, weight bits, activation bits, signed activations). Signs change next to nothing in a kernel,
        so as in the cost table those for unsigned activations are measured, and the one of the same name is taken; they are
        measured themselves where there is none.
        """
        from hw_models.tvm_cpu import kernels

        distinct = list(dict.fromkeys(wanted))
        chosen: dict[tuple[Conv, int, int, bool], Choice] = {}
        with self._trusted() as trusted:
            timings = trusted.timings
            for layer in distinct:
                say = partial(self._say, len(chosen), len(distinct), "kernels")
                say("choosing")
                timed = timings(say, kernels.candidates(*layer[:3], False, self.cpu))
                named = {kernel.name: timing for kernel, timing in timed.items()}
                able = kernels.candidates(*layer, self.cpu)
                if not all(kernel.name in named for kernel in able):
                    named = {kernel.name: timing for kernel, timing in timings(say, able).items()}
                best = min(able, key=lambda kernel: named[kernel.name].median_s)
                chosen[layer] = Choice(best, named[best.name])
        self._say(len(distinct), len(distinct), "", "")
        return chosen

    def _say(self, done: int, total: int, what: str, doing: str) -> None:
        if self.progress:
            self.progress(done, total, f"{doing} {what}".strip())

    @contextmanager
    def _trusted(self) -> Iterator[Trusted[Kernel]]:
        """What has kernels measured, unless they are in the cache."""
        from hw_models.tvm_cpu import kernels

        with ExitStack() as stack:

            @cache
            def session() -> Board | None:
                """The board, connected to when there is something to measure."""
                if self.board is None:
                    return None
                return stack.enter_context(Board(*self.board))

            def measured(say: Say, some: list[Kernel]) -> Mapping[Kernel, Timing]:
                return measure(some, self.cpu, say=say, session=session(), cold=self.cold)

            def reference() -> Callable[[], float]:
                kernel = kernels.candidates(REFERENCE_CONV, BITS, BITS, False, self.cpu)[0]
                return Reference(kernel, self.cpu, session())

            yield Trusted(TimingCache(self.key, self.notice), _text, measured, reference)

    def _candidates(self, workload: Workload, batch: int) -> dict[Conv, tuple[str, Sequence[Kernel]]]:
        """Of every distinct shape, the first layer that has it and all kernels that may be the fastest for some bits."""
        from hw_models.tvm_cpu import kernels

        if not len(workload):
            raise ValueError("the workload has no layers, so there is nothing to price")
        found: dict[Conv, tuple[str, Sequence[Kernel]]] = {}
        refused: dict[str, str] = {}
        for layer in workload.layers:
            try:
                for conv in dict.fromkeys(Conv.of(layer, call, batch) for call in layer.calls):
                    if conv not in found:
                        pairs = np.ndindex(BITS, BITS)
                        lists = [kernels.candidates(conv, w + 1, a + 1, False, self.cpu) for w, a in pairs]
                        distinct = list(dict.fromkeys(kernel for some in lists for kernel in some))
                        if holes := uncovered(distinct):
                            raise ValueError(f"no kernel for w{holes[0][0]}/a{holes[0][1]}")
                        found[conv] = layer.name, distinct
            except ValueError as error:
                refused[layer.name] = str(error)
        if refused:
            reasons = "; ".join(f"{name!r} ({reason})" for name, reason in refused.items())
            raise ValueError(f"{self.name} can't compute {len(refused)} of {len(workload)} layers: {reasons}")
        return found


def load_cpu(name: str, threads: int | None, target: str | None) -> CpuTarget:
    """Make a target of this machine's processor, or of a board's.

    Args:
        name: `cpu` or `rpc:HOST:PORT`.
        threads: Of the kernels; None is one.
        target: What to compile for, as JSON of a TVM target or a processor's name; None is this machine's own.

    Returns:
        The target. What else there is to say are fields of it.

    Raises:
        ImportError: Saying what to install.
        ValueError: For a target that TVM refuses, or that this machine can't run.
        ConnectionError: When no board answers.
    """
    if importlib.util.find_spec("tvm") is None:
        raise ImportError(f"the target {name} needs TVM: {install_line('tvm')}")
    from hw_models.tvm_cpu.cpu import Cpu

    if threads is None:
        threads = 1
    cpu = Cpu.host(threads) if target is None else Cpu.of(target, threads)
    if name == LOCAL:
        if target is not None:
            check_runs_here(cpu.target, target)
        return CpuTarget(cpu, processor_name(), _features())
    host, port = parse_address(name)
    if target is None:
        raise ValueError(f'{name} needs --target, such as \'{{"kind": "llvm", "mtriple": "aarch64-linux-gnu"}}\'')
    with Board(host, port) as peer:
        processor = f"{peer.processor()} at {host}:{port}"
    return CpuTarget(cpu, processor, "", (host, port))


def parse_address(name: str) -> tuple[str, int]:
    """Return host and port of "rpc:HOST:PORT". Raises ValueError quoting what isn't one."""
    match = re.fullmatch(r"rpc:(.+):([0-9]{1,5})", name)
    if not match or not 0 < int(match[2]) < 65536:
        raise ValueError(f"{name!r} is not the address of a board: give rpc:HOST:PORT, such as rpc:192.168.1.20:9090")
    return match[1], int(match[2])


def check_runs_here(target: dict[str, Any], text: str) -> None:
    """Raise ValueError for a target whose code would die of an illegal instruction on this machine."""
    import tvm
    from tvm.target import codegen

    here = codegen.llvm_get_system_triple()
    there = target.get("mtriple", "")
    if there and there.split("-")[0] != here.split("-")[0]:
        raise ValueError(f"this machine ({here}) can't run the target {text!r}: measure on such a one by --hw rpc:HOST:PORT")
    lacking = {name for name, has in _host_features().items() if not has}
    wanted = codegen.llvm_get_cpu_features(tvm.target.Target(target))
    if missing := sorted(name for name in wanted & lacking if name.startswith(VECTOR)):
        raise ValueError(f"this machine can't run the target {text!r}: it has no {', '.join(missing)}")


def processor_name() -> str:
    """Return what this machine's processor calls itself, and what LLVM calls it: virtual machines hide the former."""
    import tvm

    return f"{processor_model()} ({tvm.get_global_func('tvm.codegen.llvm.GetHostCPUName')()})"


def _host_features() -> dict[str, bool]:
    import tvm

    return {str(name): bool(has) for name, has in tvm.get_global_func("tvm.codegen.llvm.GetHostCPUFeatures")().items()}


def _features() -> str:
    """A fingerprint of the instructions that this machine has."""
    has = sorted(name for name, present in _host_features().items() if present)
    return hashlib.sha256(" ".join(has).encode()).hexdigest()[:16]


def _tvm_version() -> str:
    import tvm

    return str(tvm.__version__)


def _text(kernel: Kernel) -> str:
    """What names a kernel in the cache."""
    sizes = json.dumps(astuple(kernel.conv), separators=(",", ":"))
    signs = "unsigned"
    if kernel.signed:
        signs = "signed"
    return f"{kernel.name} w{kernel.w_bits}a{kernel.a_bits} {signs} {sizes} {kernel.key}"
