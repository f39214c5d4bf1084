"""The folders of runs and sweeps, read without torch and checked: what a report is made of.

Nothing that is read here is ever executed: it is JSON, CSV or safe YAML, and plain data that fits the records below. A file
that doesn't fit is a ValueError of one sentence with its name and the first fault.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TypeVar

from pydantic import ValidationError

from haq.reporting.records import Config, Policy, Problem, Record, Result, Robustness, SweepBegun, SweepDone, share_of
from haq.store import files, history
from haq.store.files import (
    ATTACKED,
    CONFIG,
    HISTORY,
    POLICY,
    PROBLEM,
    PROBLEM_SCHEMA,
    RESULT,
    RESULT_SCHEMA,
    ROBUSTNESS,
    ROBUSTNESS_SCHEMA,
    SWEEP,
    SWEEP_SCHEMA,
)

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
    what = "the file of a sweep"
    begun = _record(SweepBegun, path, SWEEP_SCHEMA, what)
    if begun.finished:
        done = _record(SweepDone, path, SWEEP_SCHEMA, what)
        _check_sweep(done, path)
        return SweepFolder(folder, done, [])
    # The run that measured sensitivities searches nothing.
    begun_runs = sorted(one.parent for one in folder.glob(f"*/{CONFIG}") if one.parent.name != "sensitivity")
    return SweepFolder(folder, begun, [_read_run(one) for one in begun_runs])


def _read_run(folder: Path) -> RunFolder:
    config = _config(folder)
    path = folder / PROBLEM
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {PROBLEM}: a run of this version of haq has one; search again")
    problem = _record(Problem, path, PROBLEM_SCHEMA, "what a run searches")
    if not math.isclose(sum(layer.cost[7][7] for layer in problem.layers), problem.uniform8, rel_tol=1e-6):
        raise ValueError(f"{path}: the costs of the layers at 8 bits don't add up to 'uniform8', {problem.uniform8!r}")
    path = folder / HISTORY
    rows = history.read(path, len(problem.layers)) if path.exists() else []
    path = folder / RESULT
    result = _record(Result, path, RESULT_SCHEMA, "the result of a run") if path.is_file() else None
    if result:
        _check_accuracies(result, path)
    path = folder / ROBUSTNESS / ATTACKED
    robustness = _record(Robustness, path, ROBUSTNESS_SCHEMA, "an evaluation of robustness") if path.is_file() else None
    return RunFolder(
        folder,
        config,
        problem,
        [_tried(row) for row in rows],
        _policy(folder / POLICY, problem),
        result,
        robustness,
    )


def _check_sweep(done: SweepDone, path: Path) -> None:
    keys = [f"{split}_{done.objective}" for split in ("search", "test")]
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
    """Their names depend on the objective, so that no record can name them."""
    keys = [f"{split}_{result.objective}" for split in ("search", "test")]
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


def _config(folder: Path) -> Config:
    content = files.read_config(folder)
    try:
        return Config.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{folder / CONFIG}: {_first(error)}") from error


def _policy(path: Path, problem: Problem) -> list[tuple[int, int]] | None:
    if not path.is_file():
        return None
    layers = _record(Policy, path, POLICY_SCHEMA, "a policy").layers
    if [layer.name for layer in layers] != [layer.name for layer in problem.layers]:
        raise ValueError(f"{path} is not a policy for the layers of {path.with_name(PROBLEM)}")
    return [(layer.weight_bits, layer.activation_bits) for layer in layers]


def _tried(row: list[str]) -> Tried:
    w, a = (tuple(map(int, bits.split("-"))) for bits in row[2:4])
    accuracy, loss, cost = map(float, row[4:7])
    return Tried(row[0], int(row[1]), w, a, accuracy, loss, cost, row[7] == "1")


_Any = TypeVar("_Any", bound=Record)


def _record(kind: type[_Any], path: Path, schema: str, what: str) -> _Any:
    """A file's content, checked: its schema first, so that a newer file is called newer and not broken."""
    content = files.read_json(path, what)
    files.check_schema(path, content.get("schema"), schema, what)
    try:
        # By way of JSON, in which a whole number may stand for a float and a list for a tuple.
        return kind.model_validate_json(json.dumps(content))
    except ValidationError as error:
        raise ValueError(f"{path}: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    """The first fault, in words."""
    first = error.errors(include_url=False)[0]
    key = ".".join(map(str, first["loc"])) or "the file"
    if first["type"] == "missing":
        return f"{key!r} is missing"
    return f"{key!r} is {first['input']!r:.80}: {first['msg'][0].lower()}{first['msg'][1:]}"
