"""The folders of runs and sweeps, read without torch and checked: what a report is made of.

Nothing that is read here is ever executed: it is JSON, CSV or safe YAML, and plain data that fits the records below. A file
that doesn't fit is a ValueError of one sentence with its name and the first fault.
"""

from __future__ import annotations

import csv
import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml
from pydantic import ValidationError

from haq.files import (
    ATTACKED,
    COLUMNS,
    CONFIG,
    HISTORY,
    POLICY,
    PROBLEM,
    PROBLEM_SCHEMA,
    RESULT,
    RESULT_SCHEMA,
    ROBUSTNESS,
    ROBUSTNESS_SCHEMA,
    RUN_SCHEMA,
    SWEEP,
    SWEEP_SCHEMA,
)
from haq.records import Config, Policy, Problem, Record, Result, Robustness, SweepBegun, SweepDone, share_of

POLICY_SCHEMA = "haq-bit-policy"  # quantizers.policy's, which can't be imported without torch


class Tried(NamedTuple):
    """One evaluation, a row of history.csv: accuracy is a share, loss in nats, cost in the metric's unit."""

    solver: str
    evaluation: int
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    accuracy: float
    loss: float
    cost: float
    within_budget: bool


@dataclass(frozen=True)
class RunFolder:
    """A run, finished or not."""

    folder: Path
    config: Config
    problem: Problem
    history: list[Tried]
    policy: list[tuple[int, int]] | None  # (weight bits, activation bits) of each layer: the best so far
    result: Result | None
    robustness: Robustness | None

    @property
    def finished(self) -> bool:
        return self.result is not None

    @property
    def solver(self) -> str:
        return str(self.config.settings.get("solver", ""))

    @cached_property
    def best(self) -> Tried | None:
        """What the run's own solver found within its budget, or its best so far; None if there is none yet."""
        mine = [tried for tried in self.history if tried.within_budget and tried.solver == self.solver]
        if self.policy is not None:
            w, a = zip(*self.policy, strict=True)
            mine = [tried for tried in mine if (tried.weight_bits, tried.activation_bits) == (w, a)] or mine
        return min(mine, key=lambda tried: (-tried.accuracy, tried.loss, tried.cost), default=None)


@dataclass(frozen=True)
class SweepFolder:
    """A sweep, finished or not, and as long as it isn't, the runs that are there."""

    folder: Path
    content: SweepBegun
    runs: list[RunFolder]


def is_finished(source: RunFolder | SweepFolder) -> bool:
    return source.finished if isinstance(source, RunFolder) else source.content.finished


def read(folder: Path) -> RunFolder | SweepFolder:
    """The run or sweep of a folder. Raises FileNotFoundError if it is neither's, ValueError for a file that doesn't fit."""
    if (folder / SWEEP).is_file():
        return _read_sweep(folder)
    if (folder / CONFIG).is_file():
        return _read_run(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give the folder of a run or of a sweep")
    raise FileNotFoundError(f"{folder} is neither the folder of a run (it has no {CONFIG}) nor of a sweep (no {SWEEP})")


def _read_sweep(folder: Path) -> SweepFolder:
    path = folder / SWEEP
    text = _text(path)
    begun = _record(SweepBegun, text, path, SWEEP_SCHEMA)
    if begun.finished:
        done = _record(SweepDone, text, path, SWEEP_SCHEMA)
        _check_sweep(done, path)
        return SweepFolder(folder, done, [])
    # The run that measured sensitivities searches nothing.
    begun_runs = sorted(one.parent for one in folder.glob(f"*/{CONFIG}") if one.parent.name != "sensitivity")
    return SweepFolder(folder, begun, [_read_run(one) for one in begun_runs])


def _read_run(folder: Path) -> RunFolder:
    config = _config(folder / CONFIG)
    path = folder / PROBLEM
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {PROBLEM}: a run of this version of haq has one; search again")
    problem = _record(Problem, _text(path), path, PROBLEM_SCHEMA)
    if not math.isclose(sum(layer.cost[7][7] for layer in problem.layers), problem.uniform8, rel_tol=1e-6):
        raise ValueError(f"{path}: the costs of the layers at 8 bits don't add up to 'uniform8', {problem.uniform8!r}")
    path = folder / RESULT
    result = _record(Result, _text(path), path, RESULT_SCHEMA) if path.is_file() else None
    if result:
        _check_accuracies(result, path)
    path = folder / ROBUSTNESS / ATTACKED
    robustness = _record(Robustness, _text(path), path, ROBUSTNESS_SCHEMA) if path.is_file() else None
    return RunFolder(
        folder,
        config,
        problem,
        _history(folder / HISTORY, len(problem.layers)),
        _policy(folder / POLICY, problem),
        result,
        robustness,
    )


def _check_sweep(done: SweepDone, path: Path) -> None:
    keys = [f"{split}_{done.reward}" for split in ("search", "test")]
    special = done.specialisation.policies.values() if done.specialisation else ()
    try:
        for key in keys:
            share_of(done.of_float, key)
            for target in done.targets.values():
                for row in (*target.uniform, *target.found):
                    row.share(key)
                for row in target.found:
                    row.spread(key)
            for policy in special:
                policy.share(key)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_accuracies(result: Result, path: Path) -> None:
    """Their names depend on the reward, so that no record can name them."""
    keys = [f"{split}_{result.reward}" for split in ("search", "test")]
    try:
        for entry in (result.of_float, result.uniform8, result.found, result.finetuned, *result.rivals.values()):
            for key in keys if entry is not None else ():
                share_of(entry or {}, key)
        for uniform in result.uniform:
            share_of(uniform, keys[0])
            if any(uniform.get(key) is None for key in ("bits", "cost")):
                raise ValueError("an entry of 'uniform' lacks its bits or its cost")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _config(path: Path) -> Config:
    try:
        content = yaml.safe_load(_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    _check_schema(content, path, RUN_SCHEMA)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{path}: {_first(error)}") from error


def _policy(path: Path, problem: Problem) -> list[tuple[int, int]] | None:
    if not path.is_file():
        return None
    layers = _record(Policy, _text(path), path, POLICY_SCHEMA).layers
    if [layer.name for layer in layers] != [layer.name for layer in problem.layers]:
        raise ValueError(f"{path} is not a policy for the layers of {path.with_name(PROBLEM)}")
    return [(layer.weight_bits, layer.activation_bits) for layer in layers]


def _history(path: Path, layers: int) -> list[Tried]:
    """Every evaluation that is whole: a line without its end was being written when the run was killed."""
    if not path.is_file():
        return []
    text = _text(path)
    lines = text[: text.rfind("\n") + 1].splitlines()
    if lines[:1] != [",".join(COLUMNS)]:
        raise ValueError(f"{path} has the columns {' '.join(lines[:1])!r}, not {','.join(COLUMNS)!r}")
    found = []
    for number, row in enumerate(csv.reader(lines[1:]), 2):
        try:
            found.append(_tried(row, layers))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return found


def _tried(row: list[str], layers: int) -> Tried:
    if len(row) != len(COLUMNS):
        raise ValueError(f"{len(row)} columns, not {len(COLUMNS)}")
    cell = dict(zip(COLUMNS, row, strict=True))
    bits = []
    for name in ("weight_bits", "activation_bits"):
        widths = cell[name].split("-")
        if len(widths) != layers or not all(width in "12345678" and len(width) == 1 for width in widths):
            raise ValueError(f"{name} is {cell[name][:80]!r}; it must be {layers} widths from 1 to 8 parted by dashes")
        bits.append(tuple(map(int, widths)))
    accuracy, loss, cost = (_number(cell, name) for name in ("accuracy", "loss", "cost"))
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy is {accuracy}; it must be from 0 to 1")
    if cell["within_budget"] not in ("0", "1"):
        raise ValueError(f"within_budget is {cell['within_budget'][:80]!r}; it must be 0 or 1")
    if not cell["evaluation"].isdecimal():
        raise ValueError(f"evaluation is {cell['evaluation'][:80]!r}; it must be a whole number")
    within = cell["within_budget"] == "1"
    return Tried(cell["solver"], int(cell["evaluation"]), bits[0], bits[1], accuracy, loss, cost, within)


def _number(cell: dict[str, str], name: str) -> float:
    try:
        value = float(cell[name])
    except ValueError:
        value = math.nan
    # A network at too few bits may have an infinite loss.
    if not (value >= 0 and (name == "loss" or value < math.inf)):
        raise ValueError(f"{name} is {cell[name][:80]!r}; it must be a number of at least 0")
    return value


_Any = TypeVar("_Any", bound=Record)


def _record(kind: type[_Any], text: str, path: Path, schema: str) -> _Any:
    """A file's content, checked: its schema first, so that a newer file is called newer and not broken."""
    try:
        _check_schema(json.loads(text), path, schema)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        return kind.model_validate_json(text)
    except ValidationError as error:
        raise ValueError(f"{path}: {_first(error)}") from error


def _check_schema(content: Any, path: Path, known: str) -> None:
    found = content.get("schema") if isinstance(content, dict) else None
    if found != known:
        raise ValueError(
            f"{path} has the schema {found!r:.80}, this version of haq reads {known!r}: make the report with the version that "
            "wrote it"
        )


def _first(error: ValidationError) -> str:
    """The first fault, in words."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"])) or "the file"
    if first["type"] == "missing":
        return f"{key!r} is missing"
    return f"{key!r} is {first['input']!r:.80}: {first['msg'][0].lower()}{first['msg'][1:]}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
