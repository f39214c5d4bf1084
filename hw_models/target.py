"""Hardware targets by name or from a file: hardware is data."""

from __future__ import annotations

import difflib
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import yaml
from pydantic import ValidationError

from hw_models.bismo import BismoTarget
from hw_models.bismo_overlay import BismoOverlayTarget
from hw_models.bitfusion import BitFusionTarget
from hw_models.cost import CostTable
from hw_models.lut import load_lookup_table
from hw_models.tvm_cpu.cache import Notice, warn
from hw_models.tvm_cpu.measure import Progress
from hw_models.tvm_cpu.target import LOCAL, MEASURED, REMOTE, load_cpu
from hw_models.workload import Workload

MODELS: dict[str, type[BismoTarget] | type[BismoOverlayTarget] | type[BitFusionTarget]] = {
    "bismo": BismoTarget,
    "bismo-overlay": BismoOverlayTarget,
    "bitfusion": BitFusionTarget,
}


MOST = 256 * 1024  # bytes of a file that describes hardware


class Target(Protocol):
    """Something that prices layers at given bits."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str: ...

    @property
    def provenance(self) -> str: ...

    def cost_table(self, workload: Workload, *, batch: int | None = None) -> CostTable: ...


def target_names() -> tuple[str, ...]:
    """The targets that ship with the package."""
    folder = resources.files("hw_models").joinpath("targets")
    return tuple(sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml")))


def load_target(
    name: str,
    *,
    threads: int | None = None,
    target: str | None = None,
    cold: bool = False,
    progress: Progress | None = None,
    notice: Notice | None = None,
) -> Target:
    """Load a target by name, from a YAML file by path, or from a table of measurements by `lut:PATH`.

    `cpu` measures kernels on this machine, `rpc:HOST:PORT` on a board. These alone take the options: `threads` (1), `target`
    (JSON of a TVM target or a processor's name; this machine's own), `cold` (times with cold caches), and the callbacks
    `progress(done, total, note)` and `notice(sentence)`.

    Raises ValueError for an unknown name, for options that a target doesn't take, and for a wrong file with the key, the value
    and what is accepted; ImportError saying what to install; ConnectionError when no board answers.
    """
    if name == LOCAL or name.startswith(REMOTE):
        return replace(load_cpu(name, threads, target), cold=cold, progress=progress, notice=notice or warn)
    options = {"threads": threads is not None, "target": target is not None, "cold": cold}
    if given := [option for option, is_given in options.items() if is_given]:
        raise ValueError(f"{given[0]} is for kernels that are measured ({', '.join(MEASURED)}), not for {name}")
    if name.startswith("lut:"):
        return load_lookup_table(Path(name.removeprefix("lut:")))
    if name in target_names():
        return _parse(resources.files("hw_models").joinpath(f"targets/{name}.yaml").read_text(encoding="utf-8"), name)
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"there is no hardware file {path}")
        if path.stat().st_size > MOST:
            raise ValueError(
                f"{path} has {path.stat().st_size:,} bytes and was not read; a hardware file has at most {MOST:,}"
            )
        return _parse(path.read_text(encoding="utf-8"), name)
    known = (*target_names(), *MEASURED)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    raise ValueError(
        f"unknown hardware target {name!r}; did you mean {' or '.join(close) or 'one of these'}? "
        f"Known: {', '.join(known)}, a path to a .yaml file, or lut:TABLE.csv"
    )


def _parse(text: str, where: str) -> Target:
    try:
        content: Any = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply to be hardware") from None
    kind = content.get("model") if isinstance(content, dict) else None
    if kind not in MODELS:
        raise ValueError(f"{where}: key 'model' is {kind!r}; accepted: {', '.join(MODELS)}")
    try:
        return MODELS[kind].model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = ", ".join(MODELS[kind].model_fields)
            raise ValueError(f"{where}: unknown key {key!r}; accepted: {known}") from error
        if first["type"] == "missing":
            raise ValueError(f"{where}: key {key!r} is missing") from error
        raise ValueError(f"{where}: key {key!r} is {first['input']!r}: {first['msg']}") from error
