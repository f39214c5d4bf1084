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
from typing import Annotated, Any, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from haq.amounts import UNITS
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

POLICY_SCHEMA = "haq-bit-policy"  # quantizers.policy's, which can't be imported without torch

Share = Annotated[float, Field(ge=0, le=1)]
Cost = Annotated[float, Field(ge=0)]
Bits = Annotated[int, Field(ge=1, le=8)]
Count = Annotated[int, Field(ge=0)]
Metric = Annotated[str, Field(pattern=f"^({'|'.join(UNITS)})$")]
Eight = Annotated[list[Cost], Field(min_length=8, max_length=8)]


class Record(BaseModel):
    """Data from a file. What isn't named is left alone, so that an older report reads a newer file of the same schema."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, extra="ignore", populate_by_name=True)


class Hardware(Record):
    name: str
    description: str
    batch: int
    provenance: str


class Layer(Record):
    name: str
    kind: str
    macs: Count
    parameters: Count
    fixed: bool
    cost: Annotated[list[Eight], Field(min_length=8, max_length=8)]  # [weight bits - 1][activation bits - 1]


class Problem(Record):
    """problem.json: what is searched."""

    network: str
    origin: str
    data: str
    images: Count
    target: Hardware
    metric: Metric
    unit: str
    limit: Cost
    uniform8: Annotated[float, Field(gt=0)]
    smallest: Cost
    bits: Annotated[list[Bits], Field(min_length=2, max_length=2)]
    reward: str
    reward_is: str
    float_accuracy: Share = Field(alias="float")
    layers: Annotated[list[Layer], Field(min_length=1)]


class PolicyLayer(Record):
    name: str
    weight_bits: Bits
    activation_bits: Bits


class Policy(Record):
    """policy.json; searched policies have no layer in float."""

    layers: list[PolicyLayer]


class Budget(Record):
    metric: Metric
    limit: Cost
    used: Cost
    fraction: float
    used_fraction: float
    holds: bool


class Check(Record):
    name: str
    passed: bool
    figures: str


class Threat(Record):
    eps: float
    norm: str


class Deployed(Record):
    images: Count
    right: Count
    different: Count
    reason: str | None


class Attacked(Record):
    """One network under attack."""

    what: str = Field("", alias="is")
    clean: Share
    worst: Share
    images: Count
    classes: Annotated[int, Field(ge=1)]
    threat: Threat
    attacks: dict[str, Share | None]
    checks: list[Check]
    curve: list[Annotated[list[float], Field(min_length=2, max_length=2)]]
    curve_images: Count
    masked: bool
    verdict: str
    deployed: Deployed | None = None


class Robustness(Record):
    """robustness.json, as `python -m haq.robustness` writes it."""

    network: str
    data: str
    images: Count
    threat: str
    attacks: str
    backward: str
    requantized_input: bool
    seed: int
    networks: Annotated[dict[str, Attacked], Field(min_length=1)]


Entry = dict[str, float | None]


class Result(Record):
    """result.json: what a finished search found."""

    network: str
    data: str
    target: str
    solver: str
    evaluations: dict[str, Count]
    seed: int
    reward: str
    accuracy_is: str
    cost_is: str
    budget: Budget
    of_float: Entry = Field(alias="float")
    uniform8: Entry
    uniform: list[Entry] = []
    found: Entry
    finetuned: Entry | None
    rivals: dict[str, Entry]
    verified: Attacked | None = None


class SweepRun(Record):
    seed: int
    folder: str
    evaluations: Count
    cost: Cost
    fraction: float


class Judged(Record):
    """A policy of a sweep, with the accuracies of its reward beside its own fields."""

    model_config = ConfigDict(extra="allow")

    cost: Cost
    fraction: float
    pareto: bool

    def share(self, key: str) -> float:
        """An accuracy, 0..1. Raises ValueError if there is none of that name."""
        return _share(self.model_extra or {}, key)


class Uniform(Judged):
    bits: Bits


class Searched(Judged):
    budget: str
    solver: str
    limit: Cost
    runs: Annotated[list[dict[str, Any]], Field(min_length=1)]

    def spread(self, key: str) -> tuple[float, float]:
        """The smallest and the largest accuracy over the seeds."""
        shares = [_share(run, key) for run in self.runs]
        return min(shares), max(shares)


class SweepTarget(Record):
    name: str
    cost_is: str
    kind: str
    uniform8: Cost
    left_out: str
    uniform: list[Uniform]
    found: list[Searched]


class Specialised(Judged):
    cost: Cost = 0.0
    fraction: float = 0.0
    pareto: bool = False
    solver: str
    folder: str
    fractions: dict[str, float]


class Specialisation(Record):
    budget: str
    policies: dict[str, Specialised]


class Asked(Record):
    settings: dict[str, str | int | bool | None]
    hw: list[str]
    budgets: list[str]
    solvers: list[str]
    seeds: int


class SweepBegun(Record):
    """sweep.json while it is searched."""

    finished: bool
    asked: Asked
    versions: dict[str, str]
    command: str | None = None


class SweepDone(SweepBegun):
    """sweep.json in the end."""

    network: str
    data: str
    reward: str
    reward_is: str
    metric: Metric
    accuracy_is: str
    images: dict[str, Count]
    of_float: Entry = Field(alias="float")
    targets: dict[str, SweepTarget]
    specialisation: Specialisation | None


class Config(Record):
    """config.yaml: what was asked. Runs of before the first release have no command."""

    settings: dict[str, str | int | bool | None]
    versions: dict[str, str]
    command: str | None = None


class Tried(NamedTuple):
    """One evaluation, a row of history.csv; accuracy is a share, cost in the metric's unit."""

    solver: str
    evaluation: int
    weight_bits: tuple[int, ...]
    activation_bits: tuple[int, ...]
    accuracy: float
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
        """The best policy so far of the run's own solver within its budget; None if there is none yet."""
        mine = [tried for tried in self.history if tried.within_budget and tried.solver == self.solver]
        return max(mine, key=lambda tried: (tried.accuracy, -tried.cost), default=None)


@dataclass(frozen=True)
class SweepFolder:
    """A sweep, finished or not, and as long as it isn't, the runs that are there."""

    folder: Path
    content: SweepBegun
    runs: list[RunFolder]


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
        return SweepFolder(folder, _record(SweepDone, text, path, SWEEP_SCHEMA), [])
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
        for entry in (result.of_float, result.uniform8, result.found, result.finetuned, *result.rivals.values()):
            for key in (f"search_{result.reward}", f"test_{result.reward}") if entry is not None else ():
                _share(entry or {}, key, path)
        for uniform in result.uniform:
            _share(uniform, f"search_{result.reward}", path)
            if any(uniform.get(key) is None for key in ("bits", "cost")):
                raise ValueError(f"{path}: an entry of 'uniform' lacks its bits or its cost")
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
    accuracy, cost = _number(cell, "accuracy"), _number(cell, "cost")
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy is {accuracy}; it must be from 0 to 1")
    if cell["within_budget"] not in ("0", "1"):
        raise ValueError(f"within_budget is {cell['within_budget'][:80]!r}; it must be 0 or 1")
    if not cell["evaluation"].isdecimal():
        raise ValueError(f"evaluation is {cell['evaluation'][:80]!r}; it must be a whole number")
    return Tried(cell["solver"], int(cell["evaluation"]), bits[0], bits[1], accuracy, cost, cell["within_budget"] == "1")


def _number(cell: dict[str, str], name: str) -> float:
    try:
        value = float(cell[name])
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {cell[name][:80]!r}; it must be a number of at least 0")
    return value


def _share(entry: dict[str, Any], key: str, path: Path | None = None) -> float:
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{f'{path}: ' if path else ''}{key!r} is {value!r:.80}; it must be a share from 0 to 1")
    return float(value)


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
            f"{path} has the schema {found!r:.80}, this version of haq reads {known!r}: make the report with the version of haq "
            "that wrote it"
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
