"""Seconds that kernels take, measured: all kernels of a layer in turn, several rounds, so that drift meets all of them.

The time of a kernel is that of its functions (preparing the activations, then the product), each timed on its own by TVM on
the machine that runs it, and added up round by round.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from shutil import which
from threading import Thread
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hw_models.measured.timing import Say, Timing

if TYPE_CHECKING:
    from hw_models.tvm_cpu.cpu import Cpu
    from hw_models.tvm_cpu.kernel import Kernel

    Names = dict[Kernel, tuple[str, ...]]

BATCH = 16  # kernels compiled as one module
READING_MS = 1  # of one reading at least: as many calls as that takes
KERNEL_S = 0.03  # of all readings of one kernel, within the bounds on their number
ROUNDS = (3, 15)
REFERENCE_ROUNDS = 5
COLD_ROUNDS = 5
# Until an RPC server has to answer a new client. It starts a process for each, and a small board takes its time to import TVM.
ANSWER_S = 60.0
FLUSH_BYTES = 64 << 20  # written before each cold reading; more than the caches of one core and its share of the last


class BuildError(ValueError):
    """A kernel that TVM can't compile for a target."""


def first_line(error: BaseException) -> str:
    """Return what an error of TVM says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return [type(error).__name__, *lines][-1]


class Here:
    """This machine, as a place to run kernels."""

    def device(self) -> Any:
        """Return its processor, as TVM names it."""
        import tvm

        return tvm.cpu(0)

    def use_threads(self, threads: int) -> None:
        """Let kernels compute with so many threads."""
        from hw_models.tvm_cpu.cpu import use_threads

        use_threads(threads)

    def load(self, library: Any, cpu: Cpu) -> Any:
        """Make a compiled module ready to be called."""
        return library.mod

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Do nothing: this machine doesn't go away."""
        yield


class Board:
    """A machine that runs TVM's RPC server (`python -m tvm.exec.rpc_server --port PORT`), connected to while `with` lasts.

    Raises ConnectionError naming host and port when nothing answers there in time, and when the peer goes away.
    """

    def __init__(self, host: str, port: int) -> None:
        """Note where it is."""
        self.host = host
        self.port = port
        self._session: Any = None
        self._loaded = 0

    def __enter__(self) -> Board:
        """Connect."""
        from tvm import rpc

        # TVM waits for an answer for as long as it takes (its `session_timeout` is for the server), so a thread does that.
        answers: SimpleQueue[Any] = SimpleQueue()

        def connect() -> None:
            try:
                answers.put(rpc.connect(self.host, self.port))
            except Exception as error:
                answers.put(error)

        Thread(target=connect, daemon=True).start()
        none = f"no RPC server answers at {self.host}:{self.port}"
        try:
            answer = answers.get(timeout=ANSWER_S)
        except Empty:
            raise ConnectionError(
                f"{none} within {ANSWER_S:g} s: it serves one client at a time and may be busy, or it isn't TVM's"
            ) from None
        if isinstance(answer, Exception):
            raise ConnectionError(f"{none}: {first_line(answer)}") from answer
        self._session = answer
        return self

    def __exit__(self, *_: object) -> None:
        """Let go."""
        self._session = None  # the server takes one peer at a time

    def processor(self) -> str:
        """Ask for the name of its processor, if its TVM was built with LLVM."""
        with self.watched():
            try:
                return str(self._session.get_function("tvm.codegen.llvm.GetHostCPUName")())
            except AttributeError:
                return "unnamed processor"

    def device(self) -> Any:
        """Return its processor, as TVM names it."""
        return self._session.cpu(0)

    def use_threads(self, threads: int) -> None:
        """Let kernels compute with so many threads, if its pool has them: TVM_NUM_THREADS of the server says how many."""
        self._session.get_function("runtime.config_threadpool")(1, threads)

    def load(self, library: Any, cpu: Cpu) -> Any:
        """Link, upload and load a compiled module.

        Raises:
            BuildError: If the kernels can't be linked.
        """
        with tempfile.TemporaryDirectory() as folder:
            # Each has a name of its own: a loader may take a file that it has seen for what it was.
            self._loaded += 1
            path = Path(folder) / f"kernels{self._loaded}.so"
            options = {}
            if linker := cross_compiler(cpu.target.get("mtriple")):
                options["cc"] = linker
            try:
                library.export_library(str(path), **options)
            except Exception as error:
                raise BuildError(f"the kernels for {cpu.target_json} can't be linked: {first_line(error)}") from error
            with self.watched():
                self._session.upload(bytearray(path.read_bytes()), path.name)
                module = self._session.load_module(path.name)
                self._session.remove(path.name)
                return module

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Turn what TVM raises when the peer goes away into a ConnectionError."""
        # TVM raises an InternalError for a closed socket, and for nearly all else.
        try:
            yield
        except AttributeError:
            raise
        except Exception as error:
            raise ConnectionError(
                f"the RPC peer {self.host}:{self.port} failed ({first_line(error)}); "
                "what was measured before is kept, and the same command goes on from there"
            ) from error


def cross_compiler(triple: str | None) -> str | None:
    """Find the compiler that links for an LLVM triple; None for this machine's own.

    Raises ValueError naming what to install.
    """
    from tvm.target import codegen

    if triple is None or triple.split("-")[0] == codegen.llvm_get_system_triple().split("-")[0]:
        return None
    machine, *rest = [part for part in triple.split("-") if part not in ("unknown", "pc")]
    if machine.startswith("armv"):
        machine = "arm"
    name = "-".join([machine, *rest])
    if not which(f"{name}-gcc"):
        raise ValueError(f"linking for {triple} needs {name}-gcc (Debian and Ubuntu: gcc-{name})")
    return f"{name}-gcc"


def measure(
    kernels: Iterable[Kernel],
    cpu: Cpu,
    *,
    say: Say = lambda doing: None,
    session: Board | None = None,
    cold: bool = False,
) -> dict[Kernel, Timing]:
    """Measure the seconds that each kernel takes for one call.

    A reading is as many calls as take 1 ms, and there are 3 to 15 of them, about 30 ms per kernel.

    Args:
        kernels: What to measure.
        cpu: What to compile for.
        say: Told "compiling" and "measuring".
        session: The board to run on; None is this machine.
        cold: Whether every reading is one call with its inputs and weights out of the caches.

    Returns:
        The timing of each kernel.

    Raises:
        BuildError: Naming the kernel that doesn't compile.
        ConnectionError: When the board goes away.
    """
    wanted = list(dict.fromkeys(kernels))
    place = session or Here()
    with place.watched():
        place.use_threads(cpu.threads)
    found: dict[Kernel, Timing] = {}
    for conv in dict.fromkeys(kernel.conv for kernel in wanted):
        group = [kernel for kernel in wanted if kernel.conv == conv]
        say("compiling")
        modules = []
        for start in range(0, len(group), BATCH):
            library, names = _compile(group[start : start + BATCH], cpu)
            modules.append((place.load(library, cpu), names))
        say("measuring")
        with place.watched():
            found |= _time(place, modules, cold)
    return found


def _compile(kernels: Sequence[Kernel], cpu: Cpu) -> tuple[Any, Names]:
    try:
        return _build(kernels, cpu)
    except Exception as error:
        if len(kernels) > 1:
            # Which one was it?
            for kernel in kernels:
                _compile([kernel], cpu)
        kernel = kernels[0]
        raise BuildError(
            f"the kernel {kernel.name} of {kernel.conv} doesn't compile for {cpu.target_json}: {first_line(error)}"
        ) from error


def _build(kernels: Sequence[Kernel], cpu: Cpu) -> tuple[Any, Names]:
    """One module, and the names that each kernel's functions have in it."""
    import tvm

    names: Names = {}
    functions: dict[str, Any] = {}
    for index, kernel in enumerate(kernels):
        own = kernel.functions(f"kernel{index}")
        names[kernel] = tuple(own)
        functions |= {name: function.with_attr("global_symbol", name) for name, function in own.items()}
    return tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(cpu.target)), names


class _Timer:
    """One function of a kernel with its arguments."""

    def __init__(self, place: Here | Board, module: Any, name: str, arguments: list[Any], cold: bool) -> None:
        # TVM calls it once before it starts its clock, and finds out how many calls take so long; from then on it keeps to
        # that number. (Making an evaluator costs more than reading one.) If it was interrupted while it found out, the number
        # is too small for good and all its readings are too long: so there are two, and the faster one is kept.
        self._arguments = arguments
        evaluators = 2
        reading_ms = READING_MS
        flush_bytes = 0
        if cold:
            evaluators = 1
            reading_ms = 0
            flush_bytes = FLUSH_BYTES
        made = [
            module.time_evaluator(
                name,
                place.device(),
                number=1,
                repeat=1,
                min_repeat_ms=reading_ms,
                cache_flush_bytes=flush_bytes,
            )
            for _ in range(evaluators)
        ]
        first = [float(evaluator(*arguments).results[0]) for evaluator in made]
        self._evaluator = made[first.index(min(first))]
        self.reading_s = max(min(first), READING_MS / 1000)

    def read(self) -> float:
        (seconds,) = self._evaluator(*self._arguments).results
        return float(seconds)


def _time(place: Here | Board, modules: list[tuple[Any, Names]], cold: bool) -> dict[Kernel, Timing]:
    timers = _timers(place, modules, cold)
    rounds = {kernel: _rounds(parts, cold) for kernel, parts in timers.items()}
    readings: dict[Kernel, list[float]] = {kernel: [] for kernel in timers}
    for number in range(max(rounds.values())):
        for kernel, parts in timers.items():
            if number < rounds[kernel]:
                readings[kernel].append(sum(timer.read() for timer in parts))
    timings = {}
    for kernel, seconds in readings.items():
        low, median, high = np.percentile(seconds, (25, 50, 75))
        timings[kernel] = Timing(float(median), float(high - low), len(seconds))
    return timings


def _timers(place: Here | Board, modules: list[tuple[Any, Names]], cold: bool) -> dict[Kernel, list[_Timer]]:
    """Make the timers of every kernel's functions."""
    buffers = _Buffers(place.device())
    # `arguments` has the functions in the same order.
    return {
        kernel: [
            _Timer(place, module, function, [buffers.get(*argument) for argument in arguments], cold)
            for function, arguments in zip(functions, kernel.arguments().values(), strict=True)
        ]
        for module, names in modules
        for kernel, functions in names.items()
    }


class Reference:
    """A kernel that is timed again and again, to tell a busy machine by: calling it returns the seconds that it takes now."""

    def __init__(self, kernel: Kernel, cpu: Cpu, session: Board | None = None) -> None:
        """Compile and load it.

        Args:
            kernel: Which one.
            cpu: What to compile for.
            session: The board to run on; None is this machine.
        """
        self._place = session or Here()
        library, names = _compile([kernel], cpu)
        with self._place.watched():
            self._place.use_threads(cpu.threads)
            self._module = self._place.load(library, cpu)
            ((_, self._timers),) = _timers(self._place, [(self._module, names)], cold=False).items()

    def __call__(self) -> float:
        """Time it."""
        with self._place.watched():
            return float(np.median([sum(timer.read() for timer in self._timers) for _ in range(REFERENCE_ROUNDS)]))


def _rounds(timers: list[_Timer], cold: bool) -> int:
    if cold:
        return COLD_ROUNDS
    low, high = ROUNDS
    return min(max(low, int(KERNEL_S / sum(timer.reading_s for timer in timers))), high)


class _Buffers:
    """Inputs and outputs; kernels of a layer share those of the same name and size."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self._made: dict[tuple[str, tuple[int, ...], str], Any] = {}
        self._generator = np.random.default_rng(0)

    def get(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        import tvm

        key = (name, (math.prod(shape),), dtype)  # functions take them flat
        if key not in self._made:
            self._made[key] = tvm.runtime.tensor(self._values(key[1], dtype).reshape(-1), self._device)  # flat, as all of them
        return self._made[key]

    def _values(self, shape: tuple[int, ...], dtype: str) -> NDArray[np.generic]:
        if dtype.startswith("float"):
            # Nowhere near zero: denormal numbers are slow.
            return self._generator.uniform(0.5, 1.5, shape).astype(dtype)
        if dtype in ("int8", "uint8", "uint64"):
            limits = np.iinfo(dtype)
            return self._generator.integers(limits.min, limits.max, shape, dtype, endpoint=True)
        # 32-bit integers may be positions in another buffer.
        return np.zeros(shape, dtype)
