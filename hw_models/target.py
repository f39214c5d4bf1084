"""Hardware targets by name or from a file: hardware is data."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from pydantic import ValidationError

from hw_models.capabilities import capabilities_of, wrong_key
from hw_models.cost import CostTable
from hw_models.files import parse_yaml, quoted, read_text
from hw_models.function import ARGUMENTS, FunctionTarget, is_function
from hw_models.lut import load_lookup_table
from hw_models.machine import Chip
from hw_models.measured.cache import Notice, warn
from hw_models.measured.timing import Progress
from hw_models.registry import Registry, Row, printable, requires
from hw_models.runtimes.target import MEASURED as RUNTIMES
from hw_models.runtimes.target import load_runtime
from hw_models.tvm_cpu.target import LOCAL, REMOTE, load_cpu
from hw_models.tvm_cpu.target import MEASURED as COMPILED
from hw_models.workload import Workload

# A class to each `model:` that a hardware file may name; its fields are the file's keys.
HARDWARE_MODELS: Registry[type[Chip]] = Registry(
    "hardware model",
    "haq.hardware_models",
    {
        "bismo": ("hw_models.bismo:BismoTarget", "the bit-serial matrix multiplier as HAQ used it"),
        "bismo-overlay": ("hw_models.bismo_overlay:BismoOverlayTarget", "BISMO's overlay with its three stages"),
        "bitfusion": ("hw_models.bitfusion:BitFusionTarget", "the array whose multipliers fuse to any width"),
        "roofline": ("hw_models.roofline:RooflineTarget", "peak operations by pair of widths, and bandwidth: a data sheet"),
    },
    check=requires("model_validate", "model_fields", "provenance", "cost_table"),
)

# The targets that are measured, each with a line about it.
MEASURED = {**COMPILED, **RUNTIMES}

MOST = 64 * 1024  # bytes of a file that describes hardware


class Target(Protocol):
    """Something that prices layers at given bits."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def description(self) -> str:
        """What it is, in a line."""
        ...

    @property
    def provenance(self) -> str:
        """Whether its costs are "estimated" or "measured", and how."""
        ...

    # What measured times depend on is an attribute, `key`, a mapping: a run goes on where it has the same.
    # Whether it computes with activations that have zero points is an attribute, `zero_points`; a target without it doesn't.
    # What it can do is an attribute, `capabilities` (`hw_models.Capabilities`); one without it does whatever it has costs for.

    def cost_table(self, workload: Workload, *, batch: int | None = None) -> CostTable:
        """Price every layer at every pair of widths.

        Args:
            workload: The layers.
            batch: Images at a time; None is the target's own.

        Returns:
            The costs, in seconds, joules and bytes.
        """
        ...


def price(target: Target, workload: Workload, batch: int | None = None, *, full_range: Collection[str] = ()) -> CostTable:
    """Ask a target for its cost table, check what it gives, and leave out what its capabilities don't have.

    Args:
        target: The target, anybody's.
        workload: The layers.
        batch: Images at a time; None is the target's own.
        full_range: Names of layers whose signed integers take the smallest too, -2^(b-1): an accumulator holds less of these.

    Returns:
        The table; what isn't supported is NaN.

    Raises:
        ValueError: Naming the target, if it fails, doesn't take a workload and a batch, or returns anything but a table of
            positive numbers for this workload; naming the layer too, if there are no costs for a pair that capabilities name,
            and for a layer that no pair is left for.
    """
    what = f"hardware target {str(target.name)!r}"
    capabilities = capabilities_of(target)
    table = _checked_table(target, what, workload, batch)
    if capabilities is None:
        return table
    return capabilities.apply_full_range(capabilities.apply(table), full_range)


def _checked_table(target: Target, what: str, workload: Workload, batch: int | None) -> CostTable:
    """Ask a target for its cost table, and check what it gives; see `price`."""
    table: object
    if _is_ours(target):
        table = target.cost_table(workload, batch=batch)
    else:
        table = _foreign_table(target, what, workload, batch)
    if not isinstance(table, CostTable):
        raise ValueError(printable(f"`cost_table` of {what} must return a hw_models.CostTable, not {type(table).__name__}"))
    if table.workload.names != workload.names:
        raise ValueError(printable(f"`cost_table` of {what} must return the table of the workload that it is given"))
    if _is_ours(target):
        return table
    # A copy: a target may go on writing into its table.
    arrays = {name: getattr(table, name) for name in ("latency_s", "energy_j", "storage_bytes", "cycles", "bound")}
    return replace(table, **{name: array.copy() for name, array in arrays.items() if array is not None})


def _foreign_table(target: Target, what: str, workload: Workload, batch: int | None) -> object:
    """Ask somebody else's target for its table; what goes wrong is told in one sentence that names it."""
    try:
        inspect.signature(target.cost_table).bind(workload, batch=batch)
    except (TypeError, ValueError) as error:
        if not inspect.isbuiltin(target.cost_table):
            raise ValueError(printable(f"`cost_table` of {what} must take (workload, *, batch=None): {error}")) from error
    try:
        return target.cost_table(workload, batch=batch)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if isinstance(error, ValueError):
            reason = " ".join(str(error).split())
        raise ValueError(printable(f"`cost_table` of {what} failed: {reason}")) from error


def _is_ours(target: object) -> bool:
    return type(target).__module__.partition(".")[0] == __name__.partition(".")[0]


def target_names() -> tuple[str, ...]:
    """List the targets that ship with the package.

    Returns:
        Names that `load_target` takes, in alphabetical order.
    """
    folder = resources.files("hw_models").joinpath("targets")
    return tuple(sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml")))


def is_compiled(name: str) -> bool:
    """Say whether a name is that of a target whose kernels are compiled, and measured."""
    return name == LOCAL or name.startswith(REMOTE)


def is_measured(name: str) -> bool:
    """Say whether a name is that of a target that is measured."""
    return is_compiled(name) or name in RUNTIMES


def target_rows() -> list[Row]:
    """List every target that can be named, each with where it comes from and a line about it.

    Installed ones are told by their package alone: they aren't imported.

    Returns:
        A row for each, ours first.
    """
    return TARGETS.rows()


def load_target(
    name: str,
    *,
    threads: int | None = None,
    target: str | None = None,
    cold: bool = False,
    progress: Progress | None = None,
    notice: Notice | None = None,
    modules: bool = True,
) -> Target:
    """Load a target by name, from a file, or from an installed package.

    Args:
        name: One of `target_names`, a path to a YAML file, `lut:PATH` for a table of measurements, `cpu` for kernels
            measured on this machine or `rpc:HOST:PORT` on a board, `onnxruntime` or `openvino` for layers as these run them
            on this machine, a name that an installed package offers, or `module:Name` in the current folder: a target, a class
            or function that makes one without arguments, or a function of (layer, w, a) that returns seconds
            (`hw_models.function`).
        threads: Of what is measured; None is one.
        target: What kernels of `cpu` and `rpc:HOST:PORT` are compiled for, as JSON of a TVM target or a processor's name; None
            is this machine's own.
        cold: Whether it is measured with its data out of the caches.
        progress: Told progress(done, total, note) while that is done.
        notice: Told a sentence when measured times can't be trusted; None warns.
        modules: Whether `module:Name` may be imported; False for a name that no person gave.

    Returns:
        The target.

    Raises:
        ValueError: For an unknown name, for options that a target doesn't take, for a wrong file with the key, the value
            and what is accepted, and for a target that lacks something.
        FileNotFoundError: For a file that isn't there.
        ImportError: Saying what to install, or why somebody's module can't be imported.
        ConnectionError: When no board answers.
    """
    if is_compiled(name):
        return replace(load_cpu(name, threads, target), cold=cold, progress=progress, notice=notice or warn)
    if name in RUNTIMES:
        if target is not None:
            raise ValueError(f"target is for kernels that are compiled ({', '.join(COMPILED)}), not for {name}")
        return replace(load_runtime(name, threads), cold=cold, progress=progress, notice=notice or warn)
    options = {"threads": threads is not None, "target": target is not None, "cold": cold}
    if given := [option for option, is_given in options.items() if is_given]:
        raise ValueError(f"{given[0]} is for kernels that are measured ({', '.join(MEASURED)}), not for {name}")
    if name.startswith("lut:"):
        return load_lookup_table(Path(name.removeprefix("lut:")))
    if name.endswith((".yaml", ".yml")) and name not in TARGETS:
        return _parse(_read(Path(name)), name)
    return _made(name, TARGETS.get(name, modules))


def _made(name: str, thing: Any) -> Target:
    """Make a target of what was found by its name.

    Args:
        name: The name.
        thing: A target, a function of (layer, w, a), or a class or function that returns either without arguments.

    Returns:
        The target.

    Raises:
        ValueError: Naming it, if it is none of these.
    """
    lacking = _lacking(thing)
    # A class may have all that a target has, and isn't one.
    if callable(thing) and (lacking or isinstance(thing, type)) and not is_function(thing):
        try:
            thing = thing()
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            if isinstance(error, TypeError):
                reason += f"; a function of {ARGUMENTS} that returns seconds would be a target too"
            raise ValueError(printable(f"hardware target {name!r} can't be made without arguments: {reason}")) from error
        lacking = _lacking(thing)
    if lacking and is_function(thing):
        return FunctionTarget(thing, name)
    if lacking:
        raise ValueError(f"hardware target {name!r} can't be used: it lacks {lacking}")
    made: Target = thing
    return made


_lacking = requires("name", "description", "provenance", "cost_table")


def _shipped(name: str) -> str:
    return resources.files("hw_models").joinpath(f"targets/{name}.yaml").read_text(encoding="utf-8")


def _load_shipped(name: str) -> Target:
    return _parse(_shipped(name), name)


def _describe_shipped(name: str) -> str:
    return str(parse_yaml(_shipped(name))["description"])


# Targets themselves, and classes or functions that make one without arguments.
TARGETS: Registry[Target | Callable[[], Target]] = Registry(
    "hardware target",
    "haq.targets",
    {name: (partial(_load_shipped, name), partial(_describe_shipped, name)) for name in target_names()},
    forms={
        **MEASURED,
        "FILE.yaml": "hardware of your own, described as in those that ship",
        "lut:TABLE.csv": "a table of measurements",
    },
)


def _read(path: Path) -> str:
    if not path.exists():
        raise FileNotFoundError(f"there is no hardware file {path}")
    return read_text(path, MOST)


def _parse(text: str, where: str) -> Target:
    try:
        content = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{where} is not YAML as hardware is described in: {error}") from error
    kind = None
    if isinstance(content, dict):
        kind = content.get("model")
    if not isinstance(kind, str) or kind not in HARDWARE_MODELS:
        accepted = printable(", ".join(HARDWARE_MODELS))
        raise ValueError(f"{where}: key 'model' is {quoted(kind)}; accepted: {accepted}")
    model = HARDWARE_MODELS.get(kind, modules=False)
    try:
        made = model.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{where}: {wrong_key(error, model)}") from error
    return _made(where, made)
