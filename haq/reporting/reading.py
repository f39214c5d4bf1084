"""The folders of runs and sweeps, read without torch: what a report is made of.

Nothing that is read here is ever executed, and all of it is checked by `haq.store.records`. A file that doesn't fit is a
ValueError of one sentence with its name and the first fault.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from haq.store import history
from haq.store.files import ATTACKED, CONFIG, HISTORY, POLICY, PROBLEM, RESULT, ROBUSTNESS, SENSITIVITIES, SWEEP
from haq.store.history import HistoryRow
from haq.store.records import (
    ChannelsRecord,
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
        keep: The share of channels that it keeps, by group; groups that keep all aren't named.
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
    keep: Mapping[str, float] = field(default_factory=dict)

    @property
    def channels(self) -> ChannelsRecord | None:
        """Return what is left of every layer; None where all channels are kept, and until the search has come to its end."""
        if self.result is None:
            return None
        return self.result.channels

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
            kept: tuple[float, ...] = ()
            if self.problem.pruning is not None:
                kept = self.problem.pruning.kept(self.keep)
            wanted = (weight_bits, activation_bits, kept)
            of_policy = [row for row in mine if (row.weight_bits, row.activation_bits, row.keep) == wanted]
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
        limits = history.Limits.of(problem)
        rows = history.read(folder / HISTORY, len(problem.layers), limits, others, problem.group_count)
    policy, result, robustness = None, None, None
    keep: dict[str, float] = {}
    if os.path.lexists(folder / POLICY):
        policy, keep = _read_policy(folder / POLICY, problem)
    if os.path.lexists(folder / RESULT):
        result = ResultRecord.read(folder / RESULT)
        _check_found(folder, result, policy, keep, problem)
    if os.path.lexists(folder / ROBUSTNESS / ATTACKED):
        robustness = RobustnessRecord.read(folder / ROBUSTNESS / ATTACKED)
    _check_channels(folder, result, problem)
    return RunFolder(folder, config, problem, rows, policy, result, robustness, keep)


def _check_found(
    folder: Path,
    result: ResultRecord,
    policy: list[tuple[int, int]] | None,
    keep: Mapping[str, float],
    problem: ProblemRecord,
) -> None:
    """Raise ValueError if policy.json has become another policy than the one that was measured in the end."""
    if result.policy is None or policy is None:
        return
    found = result.policy.widths()
    differing = [f"group {name[:60]!r} keeps other channels" for name in _differing(result.policy.kept, keep)]
    for layer, widths in zip(problem.layers, policy, strict=True):
        if tuple(map(width_of, found.get(layer.name, ()))) != widths:
            differing.insert(0, f"layer {layer.name[:60]!r} has other bits")
            break
    if differing:
        again = command_line("python", "-m", "haq.finetune", folder)
        raise ValueError(
            f"{folder / POLICY} is not the policy that {folder / RESULT} was measured of ({differing[0]}): put {POLICY} back "
            f"as it was, or use {again}, which measures it"
        )


def _differing(one: Mapping[str, float], other: Mapping[str, float]) -> list[str]:
    """List the groups of which two policies keep different shares."""
    return [name for name in dict.fromkeys((*one, *other)) if one.get(name) != other.get(name)]


def _check_channels(folder: Path, result: ResultRecord | None, problem: ProblemRecord) -> None:
    """Raise ValueError if what is left of layers is told of others than are searched."""
    if result is None or result.channels is None:
        return
    if [layer.name for layer in result.channels.layers] != [layer.name for layer in problem.layers]:
        raise ValueError(f"{folder / RESULT} has 'channels' of other layers than {folder / PROBLEM}")


def _read_policy(path: Path, problem: ProblemRecord) -> tuple[list[tuple[int, int]], dict[str, float]]:
    record = PolicyRecord.read(path)
    layers = record.layers
    if [layer.name for layer in layers] != [layer.name for layer in problem.layers]:
        raise ValueError(f"{path} is not a policy for the layers of {path.with_name(PROBLEM)}")
    problem.check_policy({layer.name: (layer.weight_bits, layer.activation_bits) for layer in layers}, path)
    problem.check_keep(record.kept, path)
    return [(width_of(layer.weight_bits), width_of(layer.activation_bits)) for layer in layers], record.kept
