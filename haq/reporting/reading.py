"""The folders of runs and sweeps, read without torch: what a report is made of.

Nothing that is read here is ever executed, and all of it is checked by `haq.store.records`. A file that doesn't fit is a
ValueError of one sentence with its name and the first fault.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from haq.store import history
from haq.store.files import ATTACKED, CONFIG, HISTORY, POLICY, PROBLEM, RESULT, ROBUSTNESS, SENSITIVITIES, SWEEP
from haq.store.history import HistoryRow
from haq.store.records import (
    ConfigRecord,
    FinishedSweepRecord,
    PolicyRecord,
    ProblemRecord,
    ResultRecord,
    RobustnessRecord,
    SweepRecord,
)
from haq.store.shell import command_line
from hw_models.widths import width_of


@dataclass(frozen=True)
class RunFolder:
    """A run, finished or not.

    Attributes:
        folder: Where it is.
        config: What was asked.
        problem: What is searched.
        history: Every evaluation.
        policy: The best so far, (weight bits, activation bits) of each layer; float is 32.
        result: What was found, once it is finished.
        robustness: What attacks found, if there were any.
    """

    folder: Path
    config: ConfigRecord
    problem: ProblemRecord
    history: list[HistoryRow]
    policy: list[tuple[int, int]] | None
    result: ResultRecord | None
    robustness: RobustnessRecord | None

    @property
    def finished(self) -> bool:
        """Tell whether the search has come to its end."""
        return self.result is not None

    @property
    def solver(self) -> str:
        """Name the run's own solver."""
        return self.config.solver

    @cached_property
    def best(self) -> HistoryRow | None:
        """Return what the run's own solver found within its budget, or its best so far; None if there is none yet."""
        may_be_returned = (self.solver, history.SHARED)
        mine = [row for row in self.history if row.within_budget and row.whole and row.solver in may_be_returned]
        if self.policy is not None:
            weight_bits, activation_bits = zip(*self.policy, strict=True)
            of_policy = [row for row in mine if (row.weight_bits, row.activation_bits) == (weight_bits, activation_bits)]
            mine = of_policy or mine
        return min(mine, key=lambda row: self.problem.rank(row.accuracy, row.loss, row.cost), default=None)


@dataclass(frozen=True)
class SweepFolder:
    """A sweep, finished or not, and as long as it isn't, the runs that are there."""

    folder: Path
    record: SweepRecord
    runs: list[RunFolder]

    @property
    def finished(self) -> bool:
        """Tell whether all searches have come to their end."""
        return self.record.finished


def read_folder(folder: Path) -> RunFolder | SweepFolder:
    """Read the run or sweep of a folder.

    Raises FileNotFoundError if it is neither's, ValueError for a file that doesn't fit.
    """
    if os.path.lexists(folder / SWEEP):
        return _read_sweep(folder)
    if os.path.lexists(folder / CONFIG):
        return _read_run(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give the folder of a run or of a sweep")
    raise FileNotFoundError(f"{folder} is neither the folder of a run (it has no {CONFIG}) nor of a sweep (no {SWEEP})")


def _read_sweep(folder: Path) -> SweepFolder:
    record = SweepRecord.read(folder / SWEEP)
    if isinstance(record, FinishedSweepRecord):
        return SweepFolder(folder, record, [])
    # The run that measured sensitivities searches nothing.
    begun = sorted(path.parent for path in folder.glob(f"*/{CONFIG}") if path.parent.name != SENSITIVITIES)
    return SweepFolder(folder, record, [_read_run(run) for run in begun])


def _read_run(folder: Path) -> RunFolder:
    config = ConfigRecord.read(folder / CONFIG)
    if not os.path.lexists(folder / PROBLEM):
        raise FileNotFoundError(f"{folder} has no {PROBLEM}: a run of this version of haq has one; search again")
    problem = ProblemRecord.read(folder / PROBLEM)
    rows: list[HistoryRow] = []
    if os.path.lexists(folder / HISTORY):
        others = [limit.metric for limit in problem.further]
        rows = history.read(folder / HISTORY, len(problem.layers), history.Limits.of(problem), others)
    policy, result, robustness = None, None, None
    if os.path.lexists(folder / POLICY):
        policy = _read_policy(folder / POLICY, problem)
    if os.path.lexists(folder / RESULT):
        result = ResultRecord.read(folder / RESULT)
        _check_found(folder, result, policy, problem)
    if os.path.lexists(folder / ROBUSTNESS / ATTACKED):
        robustness = RobustnessRecord.read(folder / ROBUSTNESS / ATTACKED)
    return RunFolder(folder, config, problem, rows, policy, result, robustness)


def _check_found(folder: Path, result: ResultRecord, policy: list[tuple[int, int]] | None, problem: ProblemRecord) -> None:
    """Raise ValueError if policy.json has become another policy than the one that was measured in the end."""
    if result.policy is None or policy is None:
        return
    found = result.policy.widths()
    for layer, widths in zip(problem.layers, policy, strict=True):
        if tuple(map(width_of, found.get(layer.name, ()))) != widths:
            again = command_line("python", "-m", "haq.finetune", folder)
            raise ValueError(
                f"{folder / POLICY} is not the policy that {folder / RESULT} was measured of (layer {layer.name[:60]!r} has "
                f"other bits): put {POLICY} back as it was, or use {again}, which measures it"
            )


def _read_policy(path: Path, problem: ProblemRecord) -> list[tuple[int, int]]:
    layers = PolicyRecord.read(path).layers
    if [layer.name for layer in layers] != [layer.name for layer in problem.layers]:
        raise ValueError(f"{path} is not a policy for the layers of {path.with_name(PROBLEM)}")
    problem.check_policy({layer.name: (layer.weight_bits, layer.activation_bits) for layer in layers}, path)
    return [(width_of(layer.weight_bits), width_of(layer.activation_bits)) for layer in layers]
