"""What stands in the files of a run or a sweep: a typed record for each, with the one reader and the one writer.

    config.yaml        ConfigRecord         what was asked
    problem.json       ProblemRecord        what is searched
    policy.json        PolicyRecord         a width for every operand; in all other files too
    result.json        ResultRecord         what a finished search found
    sweep.json         SweepRecord          what a sweep was asked; FinishedSweepRecord, with what it found
    sensitivity.json   SensitivityRecord    what is known of single operands
    robustness.json    RobustnessRecord     what attacks found
    AGENT.safetensors  AgentRecord          what a pretrained agent is, in the header

`Record.read(path)` refuses what doesn't fit in one sentence with the file, the key, its value and what would be accepted;
`record.write(path)` writes beside and renames. Torch isn't needed, and nothing that is read is executed. The lists and
mappings of a file are bounded, so that a hostile one can't ask for more memory than a few times its own size.
"""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError, field_validator, model_validator

from haq.store import files
from haq.store.files import kind_of, quoted
from haq.store.units import (
    NOTHING,
    PERCENT,
    counted,
    describe_amount,
    held_against,
    kind_of_cost,
    metric_words,
    plotted,
    show,
    show_error,
    worst_of,
)
from hw_models.registry import join_words
from hw_models.storage import BITS
from hw_models.widths import ACCEPTED, FLOAT, PLACES, pair_words, place_of, read_pair, width_of, width_words

MOST = 10_000  # entries of a list or a mapping; of policies, layers
MOST_SEARCHES = 100_000
MOST_UNITS, MOST_HIDDEN = 4096, 8  # of a pretrained agent's networks: of a hidden layer, and such layers
POLICY_SCHEMA, POLICY_VERSION = "haq-bit-policy", 1
KEEP_VERSION = 2  # of policies that keep a part of some channels
SPLITS = ("search", "test")
ROBUST = "+robust"  # behind the name of an objective whose inputs are attacked too
WORST_CASE = "worst-case "  # before its title
SAME = 1e-6  # the relative difference of two costs that are the same but for rounding
# Under which keys files hold costs, by metric. Those of a target's metrics are in every file, others where they are limited.
COST_KEYS = {
    "latency": "latency_s",
    "energy": "energy_j",
    "storage": "storage_bytes",
    "bops": "bops",
    "average_weight_bits": "average_weight_bits",
    "memory_traffic": "memory_traffic_bytes",
    "peak_memory": "peak_memory_bytes",
}
OF_TARGETS = ("latency", "energy", "storage")
WRITTEN_WIDTHS = (*range(1, BITS + 1), 16)  # of what isn't float, which files write as null
UNIFORM_8 = "uniform 8 bits"  # the reference of budgets, unless files say another

Share = Annotated[float, Field(ge=0, le=1)]
KeptShare = Annotated[float, Field(gt=0, lt=1)]  # of channels; a share of 1 is written as none
Cost = Annotated[float, Field(ge=0)]
AnyWidth = Annotated[int, Field(ge=1, le=FLOAT)]  # of a range; float is 32
UniformWidths = int | str  # one for both operands, "float" or a pair such as "4/8"
Count = Annotated[int, Field(ge=0)]
Metric = Literal["latency", "energy", "storage", "bops", "average_weight_bits", "memory_traffic", "peak_memory"]
# By width: 1 to 8 bits, and 16 bits and float where there are any. Null where the target can't do it, or nothing is known.
ByWidth = Annotated[list[Cost | None], Field(min_length=BITS, max_length=PLACES)]
CostTable = Annotated[list[ByWidth], Field(min_length=BITS, max_length=PLACES)]
Settings = Annotated[dict[str, Any], Field(max_length=MOST)]
Texts = Annotated[dict[str, str], Field(max_length=MOST)]
Names = Annotated[list[str], Field(max_length=MOST)]
Counts = Annotated[dict[str, Count], Field(max_length=MOST)]
Shares = Annotated[dict[str, Share | None], Field(max_length=MOST)]
Values = Annotated[dict[str, float | None], Field(max_length=MOST)]


def share_key(split: str, objective: str) -> str:
    """Name the key under which files hold the value of an objective on a split: "search_accuracy"."""
    return f"{split}_{objective}"


def error_key(key: str) -> str:
    """Name the key under which files hold the standard error of the value under another key."""
    return f"{key}_error"


def paired_key(key: str, other: str) -> str:
    """Name the key under which files hold the paired standard error of a value's difference from another row's.

    Args:
        key: The key of the value.
        other: The other row: "float" or "found".

    Returns:
        Such as "test_accuracy_from_float_error".
    """
    return error_key(f"{key}_from_{other}")


def short_reference(words: str) -> str:
    """Name a reference in a word or two, for an axis or the row of a table: "uniform 8 bits", or "the reference"."""
    if words.startswith("uniform "):
        return words
    return "the reference"


def span_words(widths: Sequence[int | None]) -> str:
    """Write a set of widths, smallest first: "2 to 8, 16 and float"."""
    few = [width for width in map(width_of, widths) if width <= BITS]
    parts = [width_words(width) for width in widths]
    if len(few) > 2 and few == list(range(few[0], few[-1] + 1)):
        parts = [f"{few[0]} to {few[-1]}", *parts[len(few) :]]
    return join_words(parts)


def objective_title(objective: str) -> str:
    """Name an objective in a word or two, as pages and tables call it."""
    if objective.endswith(ROBUST):
        return f"{WORST_CASE}{objective.removesuffix(ROBUST)}"
    return objective


_Record = TypeVar("_Record", bound="Record")
_File = TypeVar("_File", bound="FileRecord")


class Record(BaseModel):
    """Data from a file, checked. What isn't named is left alone: a later release may write more with the same schema."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False, extra="ignore", populate_by_name=True)

    WHAT: ClassVar[str] = "a record"  # what it is, in messages

    @classmethod
    def from_dict(cls: type[_Record], content: Mapping[str, Any], source: str | os.PathLike[str] = "the record") -> _Record:
        """Check plain data, as it stands in a file.

        Args:
            content: The data; those of a whole file with their schema.
            source: Where they are from, for messages.

        Returns:
            The record.

        Raises:
            ValueError: With the first fault, or for data of an earlier or later version.
        """
        cls._check_schema(content, Path(source))
        try:
            return cls._checked(content)
        except ValidationError as error:
            raise ValueError(f"{source} is not {cls.WHAT}: {describe_fault(error)}") from error
        except RecursionError:
            raise ValueError(f"{source} is not {cls.WHAT}: it is nested too deeply") from None
        except ValueError as error:  # a whole number of thousands of digits
            raise ValueError(f"{source} is not {cls.WHAT}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data, as it stands in the file; what was not given is left out."""
        return self.model_dump(by_alias=True, exclude_unset=True)

    @classmethod
    def _check_schema(cls, content: Mapping[str, Any], source: Path) -> None:
        """Raise ValueError for data of another version; a record within a file has none of its own."""

    @classmethod
    def _checked(cls: type[_Record], content: Mapping[str, Any]) -> _Record:
        # By way of JSON, in which a whole number may stand for a float and a list for a tuple.
        return cls.model_validate_json(json.dumps(content))


class FileRecord(Record):
    """A record that is a file of its own, which says its schema first."""

    SCHEMA: ClassVar[str]
    REMEDY: ClassVar[str]  # what to do about a file of an earlier version

    @classmethod
    def read(cls: type[_File], path: Path) -> _File:
        """Read a file.

        Args:
            path: The file; never read beyond the size that one of ours can have.

        Returns:
            What stands in it.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: With the first fault, if it is anything else, or of an earlier or later version.
        """
        return cls.from_dict(files.read_json(path, cls.WHAT), path)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data, as it stands in the file: its schema first."""
        return {"schema": self.SCHEMA, **super().to_dict()}

    def write(self, path: Path) -> None:
        """Write the file beside its place and rename it."""
        files.write(path, self.text())

    def text(self) -> str:
        """Return the text of the file."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n"

    @classmethod
    def _check_schema(cls, content: Mapping[str, Any], source: Path) -> None:
        files.check_schema(source, content.get("schema"), cls.SCHEMA, cls.WHAT, cls.REMEDY)


class JudgingRecord(Record):
    """What policies are judged by, beside the other fields of a record. The defaults are those of accuracy.

    Attributes:
        objective: Its name, under which files hold values.
        objective_title_is: What sentences and axes call it, if that isn't its name.
        objective_unit: "%" for shares, 0 to 1; or what is shown behind a value.
        higher_is_better: Its direction.
        counts_samples: Whether the value is the share of samples that are answered rightly, which chance moves as it does
            counts.
        samples_are: What samples are called, several of them.
    """

    if TYPE_CHECKING:
        objective: str  # where it stands in a file is told by each record
    objective_title_is: str = ""
    objective_unit: str = PERCENT
    higher_is_better: bool = True
    counts_samples: bool = True
    samples_are: str = "images"

    @property
    def objective_title(self) -> str:
        """Name the objective in a word or two."""
        return self.objective_title_is or objective_title(self.objective)

    @property
    def plain(self) -> ObjectiveRecord:
        """Return the record of the same objective without attacks: itself, if there are none."""
        fields = {name: getattr(self, name) for name in JudgingRecord.model_fields}
        fields["objective_title_is"] = self.objective_title.removeprefix(WORST_CASE)
        return ObjectiveRecord(objective=self.objective.removesuffix(ROBUST), **fields)

    @property
    def worst(self) -> float:
        """Return the value of a network whose outputs aren't finite; files have null for one that is infinite."""
        return worst_of(self.objective_unit, self.higher_is_better)

    def value(self, row: Measurement | JudgedRecord, split: str) -> float:
        """Return the objective's value in what was measured on a split.

        Args:
            row: What was measured.
            split: "search" or "test".

        Returns:
            The value, a share for the unit "%"; an infinite one of a network whose outputs weren't finite.

        Raises:
            ValueError: If there is none, or one that can't be.
        """
        return self.checked(row.entry(split, self.objective), share_key(split, self.objective))

    def checked(self, value: Any, key: str) -> float:
        """Return a value as a file has it, once it can be one of the objective.

        Raises:
            ValueError: Naming its key, if it can't be one.
        """
        if value is None and math.isinf(self.worst):
            return self.worst
        accepted, least, most = "a number", -math.inf, math.inf
        if self.objective_unit == PERCENT:
            accepted, least, most = "a share from 0 to 1", 0.0, 1.0
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise ValueError(f"{key!r} is {quoted(value)}; it must be {accepted}")
        return float(value)

    def score(self, value: float) -> float:
        """Return a number that is larger for a better value."""
        if self.higher_is_better:
            return value
        return -value

    def show(self, value: float | None, digits: int = 2) -> str:
        """Write a value with its unit; see `haq.store.units.show`."""
        return show(value, self.objective_unit, digits)

    def held_against(self, value: float, other: float) -> str:
        """Say how far a value is from another; see `haq.store.units.held_against`."""
        return held_against(value, other, self.objective_unit, self.higher_is_better)

    def difference(self, value: float, other: float, error: float | None, than: str) -> str:
        """Say how far a value is from another on the same samples, and how sure that is: "0.42 ± 0.11 points below float".

        Args:
            value: The value.
            other: What it is held against.
            error: The paired standard error of their difference; None where it isn't known.
            than: What the other value is of.

        Returns:
            The words, with "than" behind them. A difference below its standard error is called none.
        """
        words = self.held_against(value, other)
        if not error or not math.isfinite(value) or not math.isfinite(other):
            return f"{words} {than}"
        shown = show_error(error, self.objective_unit)
        number, space, rest = words.partition(" ")
        if not number[0].isdigit():
            unit = self.objective_unit
            if unit == PERCENT:
                unit = "points"
            return f"{words} {than} (± {shown} {unit}".rstrip() + ")"
        said = f"{number} ± {shown}{space}{rest} {than}"
        if abs(value - other) < error:
            said += " (no difference)"
        return said

    def on_axis(self, words: str) -> str:
        """Write the title of an axis of values: words, the unit, and the direction if it isn't the usual one."""
        parts = [words]
        if self.objective_unit:
            parts.append(self.objective_unit)
        if not self.higher_is_better:
            parts.append("lower is better")
        return ", ".join(parts)

    def plotted(self, value: float) -> float:
        """Return a value as it is drawn: shares in percent."""
        return plotted(value, self.objective_unit)


class ObjectiveRecord(JudgingRecord):
    """What policies are judged by, alone."""

    objective: str

    @classmethod
    def of(cls, objective: Any, samples_are: str = "images") -> ObjectiveRecord:
        """Make the record of a `haq.Objective`; `samples_are` is what the samples that it judges are called."""
        return cls(
            objective=objective.name,
            objective_title_is=objective.title,
            objective_unit=objective.unit,
            higher_is_better=objective.higher_is_better,
            counts_samples=objective.takes_scores and objective.unit == PERCENT,
            samples_are=samples_are,
        )

    def differences(self) -> dict[str, Any]:
        """Return what isn't as it is for accuracy: the fields that files have beside the objective's name."""
        found = self.model_dump(exclude_defaults=True, exclude={"objective"})
        if self.objective_title_is == objective_title(self.objective):
            del found["objective_title_is"]
        return found


class Measurement(RootModel[Values]):
    """What one network was measured to give and what it costs: values by split and objective, costs by metric."""

    model_config = ConfigDict(frozen=True, strict=True, allow_inf_nan=False)

    def has(self, split: str, objective: str) -> bool:
        """Tell whether an objective was measured on a split."""
        return self.root.get(share_key(split, objective)) is not None

    def entry(self, split: str, objective: str) -> Any:
        """Return what the file has of an objective on a split; ValueError if there is no such key."""
        return _entry_of(self.root, share_key(split, objective))

    def error(self, split: str, objective: str) -> float | None:
        """Return the standard error of a value, where it is known."""
        return _error_of(self.root, share_key(split, objective))

    def paired_error(self, split: str, objective: str, other: str) -> float | None:
        """Return the paired standard error of the difference of two rows, where it is known.

        Args:
            split: "search" or "test".
            objective: The objective's name.
            other: The other row: "float" or "found".

        Returns:
            The error, in the objective's unit; None where files don't tell.
        """
        return _paired_error_of(self.root, split, objective, other)

    def cost(self, metric: str) -> float | None:
        """Return the latency (s), energy (J) or storage (bytes); None where the target doesn't tell."""
        return self.root.get(COST_KEYS[metric])


class ConfigRecord(FileRecord):
    """config.yaml: what a run was asked for, and what it belongs to.

    Its `settings` are the fields of `haq.study.config.SearchConfig`.
    """

    SCHEMA = files.RUN_SCHEMA
    WHAT = "the configuration of a run"
    REMEDY = "search again"

    command: str | None = None
    settings: Settings
    signature: Texts = {}
    versions: Texts = {}
    searches: Count = 0  # that share what they try, in the sweep that it is of

    @classmethod
    def read(cls, path: Path) -> ConfigRecord:
        """Read a file; as `FileRecord.read`, for YAML."""
        if not os.path.lexists(path):
            raise FileNotFoundError(f"{path.parent} is not the folder of a run: it has no {path.name}")
        return cls.from_dict(files.read_yaml(path, cls.WHAT), path)

    def text(self) -> str:
        """Return the text of the file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False)

    @property
    def solver(self) -> str:
        """Name the run's own solver."""
        return str(self.settings["solver"])

    @property
    def evaluations(self) -> int:
        """Return how many policies the solver may evaluate."""
        return int(self.settings.get("evaluations", 0))

    @property
    def objective(self) -> str:
        """Name what policies are judged by."""
        return str(self.settings.get("objective", "accuracy"))

    @model_validator(mode="after")
    def _check_settings(self) -> ConfigRecord:
        check_plain(self.settings)
        for name in ("network", "data", "hw", "metric", "budget", "solver"):
            value = self.settings.get(name)
            if not isinstance(value, str):
                raise ValueError(f"setting {name!r} is {quoted(value)}; it must be text")
        # A run says how many; settings alone need not, and what is proposed is taken then.
        evaluations = self.settings.get("evaluations", 0)
        if isinstance(evaluations, bool) or not isinstance(evaluations, int):
            raise ValueError(f"setting 'evaluations' is {quoted(evaluations)}; it must be an integer")
        return self

    @classmethod
    def _checked(cls, content: Mapping[str, Any]) -> ConfigRecord:
        return cls.model_validate(dict(content))


class TargetRecord(Record):
    """The hardware that a problem is priced on."""

    name: str
    description: str
    batch: int
    provenance: str


class LayerRecord(Record):
    """A layer with its costs, in the metric's unit, by weight width and activation width; null where there is none."""

    name: str
    kind: str
    macs: Count
    parameters: Count
    fixed: bool
    cost: CostTable

    @field_validator("cost")
    @classmethod
    def _check_shape(cls, cost: list[list[float | None]]) -> list[list[float | None]]:
        lengths = {len(cost), *map(len, cost)}
        if lengths not in ({BITS}, {PLACES}):
            raise ValueError(f"'cost' of a layer must have {BITS} or {PLACES} rows, of as many costs each")
        return cost

    def cost_at(self, w: int | None, a: int | None) -> float | None:
        """Return what the layer costs at a pair of widths, float being None or 32; None if the target can't do it."""
        row, column = place_of(w), place_of(a)
        if max(row, column) >= len(self.cost):
            return None
        return self.cost[row][column]


class LimitRecord(Record):
    """A limit on one metric, and what there can be of it, in the metric's unit."""

    metric: Metric
    unit: str
    amount: Cost
    reference: Cost  # what the policy takes that fractions are of
    smallest: Cost
    largest: Cost


class GoalRecord(Record):
    """What is looked for, where that isn't the best policy within the budget.

    Attributes:
        kind: "cheapest" of those whose value is good enough; or "tradeoff", the most of value x (cost / target)^exponent.
        words: What is looked for, in words.
        least: The worst value that is good enough, on the search split.
        max_drop: How much worse than float that is, a share where values are shares; None if `least` was given itself.
        alpha: The exponent within the target.
        beta: The exponent beyond it.
        target: In the metric's unit.
    """

    kind: Literal["cheapest", "tradeoff"]
    words: str = Field(alias="is")
    least: float | None = None
    max_drop: float | None = None
    alpha: float | None = None
    beta: float | None = None
    target: Cost | None = None

    @model_validator(mode="after")
    def _check_kind(self) -> GoalRecord:
        needed: tuple[str, ...] = ("alpha", "beta", "target")
        if self.kind == "cheapest":
            needed = ("least",)
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"'goal.{name}' is missing, which a goal of kind {self.kind!r} has")
        return self


class WidthsRecord(Record):
    """The widths that a solver may choose; null is float."""

    weights: Annotated[list[int | None], Field(min_length=1, max_length=PLACES)]
    activations: Annotated[list[int | None], Field(min_length=1, max_length=PLACES)]

    @field_validator("weights", "activations")
    @classmethod
    def _check_widths(cls, widths: list[int | None]) -> list[int | None]:
        for width in widths:
            width_of(width)
        return widths


class GroupRecord(Record):
    """A group of channels that may be pruned.

    Attributes:
        name: Its name, that of the first layer whose outputs these channels are.
        channels: How many there are.
        shares: Those that may be kept.
        layers: The layers whose outputs they are.
    """

    name: str
    channels: Annotated[int, Field(ge=1)]
    shares: Annotated[list[Annotated[float, Field(gt=0, le=1)]], Field(min_length=1, max_length=MOST)]
    layers: Names


class PruningRecord(Record):
    """Which channels may be pruned, where they are searched together with widths.

    Attributes:
        criterion: By which it is chosen which of a group's channels are kept.
        groups: The groups that are searched, in the order in which a history tells what is kept of them.
        fixed: Groups that keep all of their channels, with the reason.
    """

    criterion: str
    groups: Annotated[list[GroupRecord], Field(min_length=1, max_length=MOST)]
    fixed: Texts = {}

    @property
    def words(self) -> str:
        """Say what may be chosen."""
        shares = sorted({share for group in self.groups for share in group.shares})
        channels = sum(group.channels for group in self.groups)
        words = (
            f"{shares_words(shares)} of the channels of {counted(len(self.groups), 'groups')} ({channels:,} channels), "
            f"chosen by {self.criterion}"
        )
        if self.fixed:
            words += f"; {len(self.fixed)} groups keep all of theirs"
        return words

    def kept(self, keep: Mapping[str, float]) -> tuple[float, ...]:
        """Return what a policy keeps of each group, as a row of a history tells it."""
        return tuple(keep.get(group.name, 1.0) for group in self.groups)

    @field_validator("groups")
    @classmethod
    def _check_names(cls, groups: list[GroupRecord]) -> list[GroupRecord]:
        seen: set[str] = set()
        for group in groups:
            if group.name in seen:
                raise ValueError(f"group {group.name[:80]!r} of channels is named twice")
            seen.add(group.name)
        return groups


class LayerChannels(Record):
    """What is left of a layer: channels that it reads and writes, operations and parameters, and what it costs then."""

    name: str
    inputs: Count
    of_inputs: Count
    outputs: Count
    of_outputs: Count
    macs: Count
    parameters: Count
    cost: Cost | None  # in the metric's unit

    @property
    def outputs_words(self) -> str:
        """Write how many of its output channels are kept: "12/16"."""
        return f"{self.outputs}/{self.of_outputs}"


class ChannelsRecord(Record):
    """What a policy keeps of a network's channels.

    Attributes:
        criterion: By which it was chosen which they are.
        kept: How many channels are kept, of all groups that were searched together.
        of_channels: How many there are in them.
        groups: How many groups were searched.
        pruned: How many of these lost channels.
        macs: Multiply-accumulates of the smaller network, per image.
        of_macs: Those of the whole one.
        parameters: Weights and biases of the smaller network's layers.
        of_parameters: Those of the whole one.
        layers: What is left of every layer, in order.
    """

    criterion: str
    kept: Count
    of_channels: Count
    groups: Count
    pruned: Count
    macs: Count
    of_macs: Count
    parameters: Count
    of_parameters: Count
    layers: Annotated[list[LayerChannels], Field(max_length=MOST)]

    @property
    def words(self) -> str:
        """Say it in a sentence, without a full stop."""
        groups = counted(self.groups, "groups")
        parts = [f"{self.kept:,} of {counted(self.of_channels, 'channels')} kept ({self.pruned} of {groups} pruned)"]
        if self.pruned:
            parts[0] += f", chosen by {self.criterion}"
        parts.append(f"{self.macs / 1e6:.4g} of {self.of_macs / 1e6:.4g} M MACs")
        parts.append(f"{self.parameters:,} of {self.of_parameters:,} parameters")
        return ", ".join(parts)

    @property
    def short(self) -> str:
        """Say how many channels are kept: "312 of 512"."""
        return f"{self.kept:,} of {self.of_channels:,}"


def shares_words(shares: Sequence[float]) -> str:
    """Write shares of channels, the smallest first: "0.25, 0.5 or 1", and of a whole range "0.25 to 1 in eighths"."""
    eighths = [8 * share for share in shares]
    if len(shares) > 2 and eighths == [eighths[0] + step for step in range(len(shares))] and eighths[0].is_integer():
        return f"{shares[0]:g} to {shares[-1]:g} in eighths"
    return join_words([f"{share:.4g}" for share in shares], "or")


class ProblemRecord(FileRecord, JudgingRecord):
    """problem.json: what is searched, enough to price every policy without loading anything. Costs are in the unit."""

    SCHEMA = files.PROBLEM_SCHEMA
    WHAT = "what a run searches"
    REMEDY = "search again"

    network: str
    origin: str
    data: str
    images: Count  # samples
    target: TargetRecord
    metric: Metric
    unit: str
    limit: Cost | None  # of the metric; null where nothing limits it
    uniform8: Annotated[float, Field(gt=0)]  # what the reference takes, of which a limit can be a fraction
    smallest: Cost
    bits: Annotated[list[AnyWidth], Field(min_length=2, max_length=2)]
    objective: str
    objective_is: str  # what it measures, in words
    of_float: float | None = Field(alias="float")
    layers: Annotated[list[LayerRecord], Field(min_length=1, max_length=MOST)]
    widths: WidthsRecord | None = None  # where they aren't all of `bits`
    reference: str = UNIFORM_8
    reference_policy: PolicyRecord | None = None  # where it isn't that
    limits: Annotated[list[LimitRecord], Field(max_length=len(COST_KEYS))] = []  # all of them, where there are others
    goal: GoalRecord | None = None  # where it isn't the best policy within the budget
    pruning: PruningRecord | None = None  # where channels are searched too

    @property
    def group_count(self) -> int:
        """Return how many groups of channels a history tells of; 0 where none are pruned."""
        if self.pruning is None:
            return 0
        return len(self.pruning.groups)

    def check_keep(self, keep: Mapping[str, float], source: Path) -> None:
        """Raise ValueError, naming the file that a policy is from and the group, for channels that can't be pruned here."""
        groups = {}
        if self.pruning is not None:
            groups = {group.name: group.shares for group in self.pruning.groups}
        for name, share in keep.items():
            if name not in groups:
                raise ValueError(
                    f"{source} keeps {share:.4g} of group {name[:80]!r} of channels, which isn't searched according to "
                    f"{source.with_name(files.PROBLEM)}"
                )
            if share not in groups[name]:
                raise ValueError(
                    f"{source} keeps {share:.4g} of group {name[:80]!r} of channels; according to "
                    f"{source.with_name(files.PROBLEM)} it can be {shares_words(groups[name])}"
                )

    def check_policy(self, policy: Mapping[str, tuple[int | None, int | None]], source: Path) -> None:
        """Raise ValueError, naming the file that a policy is from and the layer, for widths that the target can't do."""
        for layer in self.layers:
            if layer.name not in policy:
                raise ValueError(f"{source} is not a policy for the layers of {source.with_name(files.PROBLEM)}")
            pair = policy[layer.name]
            if layer.cost_at(*pair) is None:
                raise ValueError(
                    f"{source} has layer {layer.name[:80]!r} at {pair_words(*pair)} (weights/activations), which has no cost "
                    f"in {source.with_name(files.PROBLEM)}: {self.target.name} can't do it"
                )

    @property
    def samples_words(self) -> str:
        """Say on how many samples policies are judged; nothing of an objective that is given none."""
        if not self.images:
            return ""
        return f"{self.images:,} {self.samples_are}"

    @property
    def float_value(self) -> float:
        """Return the objective's value of the float network."""
        return self.checked(self.of_float, "float")

    @property
    def cost_kind(self) -> str:
        """Say whether costs are estimated, measured, or counted, as bytes are on every target."""
        return kind_of_cost(self.metric, self.target.provenance)

    @property
    def further(self) -> list[LimitRecord]:
        """Return the limits on further metrics than the main one, in the order of a history's columns."""
        return [limit for limit in self.limits if limit.metric != self.metric]

    @property
    def is_cheapest(self) -> bool:
        """Tell whether the cheapest policy of some value is looked for."""
        return self.goal is not None and self.goal.kind == "cheapest"

    @property
    def before(self) -> list[tuple[int | None, int | None]]:
        """Return the widths of every layer in the reference, in order; float is None."""
        if self.reference_policy is None:
            return [(BITS, BITS)] * len(self.layers)
        widths = self.reference_policy.widths()
        return [widths[layer.name] for layer in self.layers]

    @property
    def before_words(self) -> str:
        """Write the widths that every layer has in the reference, such as 8/8; or "reference" if they differ."""
        pairs = {pair_words(w, a) for w, a in self.before}
        if len(pairs) == 1:
            return next(iter(pairs))
        return "reference"

    @property
    def at_before(self) -> str:
        """Say in words what policies are held against: "at 8/8 bits"."""
        if self.reference == UNIFORM_8:
            return "at 8/8 bits"
        return f"with {self.reference}"

    @property
    def verdicts(self) -> dict[bool, str]:
        """Say what a policy is that may be chosen (True), and one that may not."""
        if self.is_cheapest:
            return {True: "good enough", False: "not good enough"}
        return {True: "within", False: "above"}

    @property
    def choice_words(self) -> str:
        """Say which widths may be chosen: "2 to 8"."""
        if self.widths is None:
            return f"{self.bits[0]} to {self.bits[1]}"
        weights, activations = map(span_words, (self.widths.weights, self.widths.activations))
        if weights == activations:
            return weights
        return f"{weights} for weights, {activations} for activations"

    @property
    def limit_words(self) -> str:
        """Say what limits policies, as a sentence goes on: "839 us of latency and 40 kB of storage"; or nothing."""
        parts = []
        if self.limit is not None:
            parts.append(f"{describe_amount(self.limit, self.metric)} of {metric_words(self.metric)}")
        parts += [f"{describe_amount(limit.amount, limit.metric)} of {metric_words(limit.metric)}" for limit in self.further]
        return join_words(parts)

    @property
    def goal_words(self) -> str:
        """Say what is looked for: "the best" or another goal."""
        if self.goal is None:
            return "the best"
        return self.goal.words

    @property
    def is_tradeoff(self) -> bool:
        """Tell whether the most of value and cost in one number is looked for."""
        return self.goal is not None and self.goal.kind == "tradeoff"

    def rank(self, value: float, loss: float, cost: float) -> tuple[float, float, float]:
        """Order policies that may be chosen, better ones first, by what is looked for.

        Args:
            value: The objective's value.
            loss: The loss.
            cost: The cost, in the metric's unit.

        Returns:
            What sorts them.
        """
        if self.goal is None:
            return -self.score(value), loss, cost
        if self.is_cheapest:
            return cost, -self.score(value), loss
        return -self.traded(value, cost), loss, cost

    def traded(self, value: float, cost: float) -> float:
        """Return value x (cost / target)^exponent, MnasNet's objective (Tan et al., CVPR 2019, equation 2)."""
        goal = self.goal
        assert goal is not None
        assert goal.target is not None
        if not goal.target or not cost or not math.isfinite(cost):
            return -math.inf
        exponent = goal.beta
        if cost <= goal.target:
            exponent = goal.alpha
        assert exponent is not None
        return float(value * (cost / goal.target) ** exponent)

    @model_validator(mode="after")
    def _check_sum(self) -> ProblemRecord:
        total = 0.0
        for layer, (w, a) in zip(self.layers, self._checked_reference(), strict=True):
            total += layer.cost_at(w, a) or 0.0
        if not math.isclose(total, self.uniform8, rel_tol=1e-6):
            at = "at 8 bits"
            if self.reference_policy is not None:
                at = "in 'reference_policy'"
            raise ValueError(f"the costs of the layers {at} don't add up to 'uniform8', {self.uniform8!r}")
        self.checked(self.of_float, "float")
        return self

    @model_validator(mode="after")
    def _check_limits(self) -> ProblemRecord:
        named = [limit.metric for limit in self.limits]
        if len(set(named)) < len(named):
            raise ValueError("'limits' limit a metric twice")
        amounts = {limit.metric: limit.amount for limit in self.limits}
        if self.limits and amounts.get(self.metric) != self.limit:
            raise ValueError(
                f"'limits' limit {self.metric} to {amounts.get(self.metric)!r}; it must be 'limit', {self.limit!r}"
            )
        if self.limit is None and self.goal is None and not self.limits:
            raise ValueError(
                "'limit' is null; it must be a number, unless other metrics are limited, or there is another goal"
            )
        return self

    def _checked_reference(self) -> list[tuple[int | None, int | None]]:
        """Return `before`, once the reference is known to be of the layers."""
        if self.reference_policy is not None:
            names = [layer.name for layer in self.reference_policy.layers]
            if names != [layer.name for layer in self.layers]:
                raise ValueError("'reference_policy' is of other layers than 'layers'")
        return self.before


class LayerWidths(Record):
    """The widths of one layer; null leaves an operand in float."""

    name: str
    weight_bits: Any
    activation_bits: Any

    @model_validator(mode="after")
    def _check_widths(self) -> LayerWidths:
        for width in (self.weight_bits, self.activation_bits):
            if width is None:
                continue
            if isinstance(width, bool) or not isinstance(width, int) or width not in WRITTEN_WIDTHS:
                raise ValueError(
                    f"layer {self.name[:80]!r}: bits must be an integer from 1 to {BITS}, 16, or null for float, "
                    f"not {quoted(width)}"
                )
        return self


class PolicyRecord(FileRecord):
    """A policy, in the one encoding that it has in every file: that of `quantizers.BitPolicy.to_dict`."""

    SCHEMA = POLICY_SCHEMA
    WHAT = "a bit policy"
    REMEDY = "search again"

    schema_name: Literal["haq-bit-policy"] = Field(alias="schema")
    version: Literal[1, 2]
    keep: Annotated[dict[str, KeptShare], Field(min_length=1, max_length=MOST)] | None = None  # by group of channels
    layers: Annotated[list[LayerWidths], Field(max_length=MOST)]

    @classmethod
    def of(cls, policy: Mapping[str, tuple[int | None, int | None]]) -> PolicyRecord:
        """Make the record of a policy (layer name -> widths), such as a `quantizers.BitPolicy`, with what that keeps."""
        layers = [
            {"name": name, "weight_bits": weight_bits, "activation_bits": activation_bits}
            for name, (weight_bits, activation_bits) in policy.items()
        ]
        content: dict[str, Any] = {"schema": POLICY_SCHEMA, "version": POLICY_VERSION}
        keep = getattr(policy, "keep", None)
        if keep:
            content |= {"version": KEEP_VERSION, "keep": dict(keep)}
        return cls.from_dict({**content, "layers": layers}, "the policy")

    def widths(self) -> dict[str, tuple[int | None, int | None]]:
        """Return (weight bits, activation bits) by layer, in order."""
        return {layer.name: (layer.weight_bits, layer.activation_bits) for layer in self.layers}

    @property
    def kept(self) -> dict[str, float]:
        """Return the share of channels that is kept, by group; groups that keep all aren't named."""
        return dict(self.keep or {})

    def text(self) -> str:
        """Return the text of policy.json, a line for each layer."""
        rows = ",\n".join(f"    {json.dumps(layer.to_dict())}" for layer in self.layers)
        keep = ""
        if self.keep:
            keep = f'  "keep": {json.dumps(self.keep)},\n'
        head = f'  "schema": "{POLICY_SCHEMA}",\n  "version": {self.version},\n{keep}'
        return f'{{\n{head}  "layers": [\n{rows}\n  ]\n}}\n'

    @model_validator(mode="after")
    def _check_keep(self) -> PolicyRecord:
        if ("keep" in self.model_fields_set) != (self.keep is not None) or bool(self.keep) != (self.version == KEEP_VERSION):
            raise ValueError(f"'keep' belongs to version {KEEP_VERSION}, and to no other")
        return self

    @field_validator("layers")
    @classmethod
    def _check_names(cls, layers: list[LayerWidths]) -> list[LayerWidths]:
        seen: set[str] = set()
        for layer in layers:
            if layer.name in seen:
                raise ValueError(f"layer {layer.name[:80]!r} is named twice")
            seen.add(layer.name)
        return layers

    @classmethod
    def _check_schema(cls, content: Mapping[str, Any], source: Path) -> None:
        if content.get("schema") != POLICY_SCHEMA:
            raise ValueError(
                f"{source} is not {cls.WHAT}: its schema is {quoted(content.get('schema'))}, not {POLICY_SCHEMA!r}"
            )
        version = content.get("version")
        if version in (POLICY_VERSION, KEEP_VERSION) and not isinstance(version, bool):
            return
        remedy = ""
        if isinstance(version, int) and version > KEEP_VERSION:
            remedy = ": it was made by a newer version of haq, upgrade to read it"
        raise ValueError(
            f"{source} has version {quoted(version)}; this release reads versions {POLICY_VERSION} and {KEEP_VERSION}{remedy}"
        )


class CheckRecord(Record):
    """A sign of masked gradients that was looked for."""

    name: str
    passed: bool
    figures: str


class ThreatRecord(Record):
    """How far an attacker may go."""

    eps: float
    norm: str


class DeployedRecord(Record):
    """How a network's integer program answers its worst images; the reason if there is no such program."""

    images: Count
    right: Count
    different: Count
    reason: str | None


class AttackedRecord(Record):
    """One network under attack: accuracies are shares."""

    note: str = Field("", alias="is")  # how the network was made
    threat: ThreatRecord
    effort: str = ""
    backward: str = ""
    classes: Annotated[int, Field(ge=1)]
    seed: int = 0
    clean: Share
    worst: Share
    attacks: Shares
    curve: Annotated[list[tuple[float, float]], Field(max_length=MOST)]  # eps, accuracy under PGD
    curve_images: Count
    images: Count
    masked: bool
    verdict: str
    checks: Annotated[list[CheckRecord], Field(max_length=MOST)]
    deployed: DeployedRecord | None = None


class RobustnessRecord(FileRecord):
    """robustness.json: networks under attack, by name."""

    SCHEMA = files.ROBUSTNESS_SCHEMA
    WHAT = "an evaluation of robustness"
    REMEDY = "attack again"

    source: str = ""
    network: str
    data: str
    images: Count
    threat: str
    attacks: str
    backward: str
    requantized_input: bool
    seed: int
    networks: Annotated[dict[str, AttackedRecord], Field(min_length=1, max_length=MOST)]
    left_out: Annotated[dict[str, str], Field(max_length=MOST)] = {}  # what could not be compared, with the reason


class BudgetRecord(Record):
    """The budget of a search and what was used of it, in the metric's unit and as fractions of the reference.

    Limit and fraction are null of a metric that nothing limits, such as one that is only lessened.
    """

    metric: Metric
    unit: str
    limit: Cost | None
    used: Cost
    fraction: Cost | None
    used_fraction: Cost
    holds: bool

    @model_validator(mode="after")
    def _check_sense(self) -> BudgetRecord:
        if self.limit is None or self.fraction is None:
            if self.limit is not None or self.fraction is not None or not self.holds:
                raise ValueError("'budget.limit' and 'budget.fraction' must both be null, or neither, and what has none holds")
            return self
        if self.holds != (self.used <= self.limit) and not math.isclose(self.used, self.limit, rel_tol=SAME):
            raise ValueError(f"'budget.holds' is {self.holds}, with {self.used!r} used of a limit of {self.limit!r}")
        if not math.isclose(self.fraction * self.used, self.used_fraction * self.limit, rel_tol=SAME):
            raise ValueError(
                f"'budget.fraction' is {self.fraction!r} and 'budget.used_fraction' {self.used_fraction!r}; they must be as "
                f"'limit' to 'used', {self.limit!r} to {self.used!r}"
            )
        return self


class JudgedRecord(Record):
    """A record with values of the objective beside its own fields."""

    model_config = ConfigDict(extra="allow")

    def entry(self, split: str, objective: str) -> Any:
        """Return what the file has of an objective on a split; ValueError if there is no such key."""
        return _entry_of(self.model_extra or {}, share_key(split, objective))

    def error(self, split: str, objective: str) -> float | None:
        """Return the standard error of a value, where it is known."""
        return _error_of(self.model_extra or {}, share_key(split, objective))

    def paired_error(self, split: str, objective: str, other: str) -> float | None:
        """Return the paired standard error of the difference of two rows, where it is known.

        Args:
            split: "search" or "test".
            objective: The objective's name.
            other: The other row: "float" or "found".

        Returns:
            The error, in the objective's unit; None where files don't tell.
        """
        return _paired_error_of(self.model_extra or {}, split, objective, other)


class UniformResult(JudgedRecord):
    """A uniform policy that the policy found is held against, with its share on the search split."""

    bits: UniformWidths
    cost: Cost

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, bits: int | str) -> int | str:
        return _uniform_widths(bits)


class ReachedRecord(JudgingRecord):
    """How what was found, the cheapest of its value, stands to the value that it must have.

    Attributes:
        least: The worst value that is good enough.
        max_drop: How much worse than float that is on the search split, a share where values are shares; None if the value
            itself was given.
        search: The value on the search split, by which it was chosen.
        search_error: The standard error of its difference from float, or of itself where a value was asked for; None where it
            isn't known.
        search_holds: Whether it is good enough there.
        test: The value on the test split, which the search hasn't seen.
        test_least: What would be good enough there: as much below float on the test split.
        test_error: As `search_error`, on the test split.
        test_holds: Whether it is good enough there.
        paired: Whether errors are of differences by sample; those of two independent values are larger.
    """

    objective: str
    paired: bool = False
    least: float
    max_drop: float | None = None
    search: float | None
    search_error: float | None = None
    search_holds: bool
    test: float | None
    test_least: float | None
    test_error: float | None = None
    test_holds: bool

    def certainty(self, split: str, value: float) -> str:
        """Say whether what was found is good enough on a split, and whether that is certain.

        Args:
            split: "search" or "test".
            value: The value there.

        Returns:
            "holds", "holds, but within its standard error", "MISSED by less than its standard error" or "MISSED".
        """
        holds, error = getattr(self, f"{split}_holds"), getattr(self, f"{split}_error")
        least = self.least
        if split == "test" and self.test_least is not None:
            least = self.test_least
        margin = self.score(value) - self.score(least)
        within = bool(error) and abs(margin) < error
        if holds and within:
            return "holds, but within its standard error"
        if holds:
            return "holds"
        if within:
            return "MISSED by less than its standard error"
        return "MISSED"


class ChoiceRecord(JudgingRecord):
    """Which policy a search returned, the best on the search split or another, and why (`haq.solvers.choice`).

    Attributes:
        best_policy: The policy that is best on the search split.
        best: Its value there.
        chosen: The value there of the policy that was returned.
        is_best: Whether that is the same policy.
        below: How much worse the returned one is than the best, by what was looked for (of a trade-off its value), on all
            samples that the choice was made by; negative if it is better on all of them.
        error: The paired standard error of that.
        best_divergence: How far the best is from the float network's outputs, on these samples; None where nobody knows.
        chosen_divergence: Likewise the returned one.
        divergence_unit: What these are in.
        compared: How many policies were within one paired standard error of the best, which is one of them.
        finalists: How many were judged again; 0 if none were.
        confirmed: On how many further samples.
        confirmed_best: The value of the best on these.
        confirmed_chosen: The value of the returned one on these.
    """

    objective: str
    best_policy: PolicyRecord
    best: float | None
    chosen: float | None
    is_best: bool
    below: float = 0.0
    error: Annotated[float, Field(ge=0)] = 0.0
    best_divergence: float | None = None
    chosen_divergence: float | None = None
    divergence_unit: str = "nats"
    compared: Count = 1
    finalists: Count = 0
    confirmed: Count = 0
    confirmed_best: float | None = None
    confirmed_chosen: float | None = None

    @property
    def words(self) -> str:
        """Say what was chosen, and why."""
        best, chosen = (self.checked(getattr(self, name), name) for name in ("best", "chosen"))
        parts = [f"best on the search split: {self.show(best)}{self._divergence_words(self.best_divergence)}"]
        if self.confirmed:
            parts[0] += f", {self.show(self.confirmed_best)} on {self.confirmed:,} further {self.samples_are}"
        if self.is_best:
            parts.append(f"chosen: the same{self._why_same()}")
            return "; ".join(parts)
        found = f"chosen: {self.show(chosen)}{self._divergence_words(self.chosen_divergence)}"
        if self.confirmed:
            found += f", {self.show(self.confirmed_chosen)} on the further {self.samples_are}"
        return "; ".join([*parts, found + self._why_other()])

    @property
    def _among(self) -> str:
        """Say which policies could have been chosen."""
        judged = ""
        if self.confirmed:
            judged = f"of {self.finalists} that were judged again "
        if self.compared == 1:
            return f"{judged}no other is within one standard error".lstrip()
        return f"{judged}{self.compared} are within one standard error"

    def _why_same(self) -> str:
        """Say why the best itself was chosen, where there was a choice."""
        if self.compared == 1:
            return f" ({self._among})"
        return f", with the best rank by value, divergence and loss ({self._among})"

    def _why_other(self) -> str:
        """Say why another policy than the best was chosen."""
        if self.compared == 1 and self.confirmed:
            return f", better on all of them ({self._among})"
        within = ""
        if self.below > 0:
            within = f", {self._amount(self.below)} ± {self._amount(self.error)}{self._points} below the best"
        return f"{within}, with the best rank by value, divergence and loss ({self._among})"

    def _amount(self, difference: float) -> str:
        return show_error(difference, self.objective_unit)

    @property
    def _points(self) -> str:
        if self.objective_unit == PERCENT:
            return " points"
        return f" {self.objective_unit}".rstrip()

    def _divergence_words(self, divergence: float | None) -> str:
        """Write how far a policy is from float, in brackets."""
        if divergence is None:
            return ""
        return f" ({divergence:.4g} {self.divergence_unit}".rstrip() + " from float)"

    @model_validator(mode="after")
    def _check_values(self) -> ChoiceRecord:
        self.checked(self.best, "best")
        self.checked(self.chosen, "chosen")
        return self


class AnswersRecord(Record):
    """Which test samples networks answer rightly: a bit each, so that runs can be held against each other sample by sample.

    Attributes:
        count: The number of samples.
        found: Of what was found: bits in the order of the samples, the first one highest, written in base64.
        finetuned: Of the same, fine-tuned; None if it wasn't.
    """

    count: Count
    found: str
    finetuned: str | None = None

    @property
    def last(self) -> int:
        """Return the bits of what was measured last, as a whole number."""
        return _bits_of(self.finetuned or self.found)

    @model_validator(mode="after")
    def _check_bits(self) -> AnswersRecord:
        for text in filter(None, (self.found, self.finetuned)):
            try:
                length = len(base64.b64decode(text, validate=True))
            except ValueError:
                raise ValueError("'answers' holds what is no base64") from None
            if length != -(-self.count // 8):
                raise ValueError(
                    f"'answers' holds {length} bytes; of {self.count} samples there must be {-(-self.count // 8)}"
                )
        return self

    def paired_error(self, other: AnswersRecord) -> float | None:
        """Tell the standard error of the difference of two shares, paired by sample; None if samples aren't the same."""
        count = self.count
        if count != other.count or count < 2:
            return None
        mine, others = self.last, other.last
        more, fewer = (mine & ~others).bit_count(), (others & ~mine).bit_count()
        return math.sqrt(max(more + fewer - (more - fewer) ** 2 / count, 0.0) / (count - 1) / count)


def _bits_of(text: str) -> int:
    return int.from_bytes(base64.b64decode(text), "big")


class TuningRecord(JudgingRecord):
    """How a fine-tuning was judged on samples of the train split that it held out."""

    images: Count  # samples
    epochs: Count
    kept: Count  # the epoch whose network was kept; 0: the network before
    diverged: bool = False
    stopped: Count | None = None  # the epoch after which it ended early, since epochs came no nearer to the float network
    before: float | None
    best: float | None
    before_error: float | None = None  # the standard error, where it doesn't follow from a share
    best_error: float | None = None
    earlier: float | None = None  # of the network that was fine-tuned earlier, where that one was kept
    objective: str = "agreement"  # what it was judged by

    @model_validator(mode="after")
    def _check_values(self) -> TuningRecord:
        self.checked(self.before, "before")
        self.checked(self.best, "best")
        if self.earlier is not None:
            self.checked(self.earlier, "earlier")
        return self


# What the network is called that stands below the one that was found, by the method that made it.
FINETUNED = {"train": "fine-tuned", "ptq": "after ptq"}


class ReconstructionRecord(JudgingRecord):
    """How a reconstruction (post-training quantization of one policy) was judged on samples of the train split, held out."""

    images: Count  # samples
    calibration_images: Count
    seed: Count
    seconds: Annotated[float, Field(ge=0)]
    kept: bool  # whether what was found is kept, and not the network before
    before: float | None
    after: float | None
    before_error: float | None = None  # the standard error, where it doesn't follow from a share
    after_error: float | None = None
    divergence_before: float  # in `divergence_unit`
    divergence_after: float
    divergence_unit: str = "nats"
    earlier: float | None = None  # of the network that was fine-tuned earlier, where that one was kept
    objective: str = "agreement"  # what it was judged by

    @model_validator(mode="after")
    def _check_values(self) -> ReconstructionRecord:
        self.checked(self.before, "before")
        self.checked(self.after, "after")
        if self.earlier is not None:
            self.checked(self.earlier, "earlier")
        return self


class SharedRecord(Record):
    """What searches of a sweep shared that learn from each other's trials.

    Attributes:
        solver: Theirs.
        seed: Theirs.
        searches: How many they are.
        evaluations: How many policies were evaluated, by all together.
        alone: How many one that is alone may evaluate.
        known: How many trials of earlier searches they were given.
    """

    solver: str
    seed: int
    searches: Count
    evaluations: Count
    alone: Count
    known: Count = 0

    @property
    def words(self) -> str:
        """Say it in a sentence, without a full stop."""
        given = ""
        if self.known:
            given = f", and {counted(self.known, 'trials')} of earlier searches"
        return (
            f"{self.solver}, seed {self.seed}: {self.searches} searches shared {counted(self.evaluations, 'evaluations')}"
            f"{given}; one alone may evaluate {self.alone:,}"
        )


class RacingRecord(Record):
    """How many evaluations of a search ended early, since a part of the samples told that the policy can't be chosen."""

    evaluations: Count
    cut: Count
    images: Count  # that were looked at, all evaluations together
    of_images: Count  # that there would have been

    @property
    def words(self) -> str:
        """Say it."""
        share = self.images / max(self.of_images, 1)
        return (
            f"{self.cut:,} of {counted(self.evaluations, 'evaluations')} ended early, as soon as it was clear that the "
            f"policy can't be chosen: {100 * share:.0f} % of the work was done"
        )


class ContributionRecord(Record):
    """How much of a search came from an agent's actor (`haq.solvers.agents.Contribution`)."""

    agent: str
    choices: Count  # after the first policies
    proposed: Count  # of these, by the actor
    changed: Count  # of these, neighbours of what the actor proposed
    best: Count  # the best policies
    best_proposed: Count
    best_changed: Count

    @property
    def words(self) -> str:
        """Say it."""
        if not self.choices:
            return f"the actor of {self.agent} proposed nothing: there were first policies alone"
        return (
            f"of {self.choices:,} policies that were chosen after the first ones the actor of {self.agent} proposed "
            f"{self.proposed:,} ({100 * self.proposed / self.choices:.0f} %), and {self.changed:,} are neighbours of what it "
            f"proposed; of the {self.best} best it proposed {self.best_proposed}, and {self.best_changed} are such neighbours"
        )


class ResultRecord(FileRecord, JudgingRecord):
    """result.json: what a finished search found. Costs are in seconds, joules and bytes, shares from 0 to 1."""

    SCHEMA = files.RESULT_SCHEMA
    WHAT = "the result of a run"
    REMEDY = "search again"

    network: str
    data: str
    target: str
    solver: str
    evaluations: Counts  # by solver
    saturated_actions: Annotated[dict[str, float], Field(max_length=MOST)] = {}  # the share at a bound, by agent
    contribution: ContributionRecord | None = None  # of the agent, if the solver is one
    seed: int
    scheme: str = "linear"
    residuals: Literal[8] | None = None  # the bits of what additions and average pools take; None for float
    objective: str
    objective_is: str
    finetune_steps: Count = 0
    sensitivity_kind: str = "loss"
    accuracy_is: str
    cost_is: str
    budget: BudgetRecord
    of_float: Measurement = Field(alias="float")
    uniform8: Measurement  # the reference
    uniform: Annotated[list[UniformResult], Field(max_length=MOST)] = []
    policy: PolicyRecord | None = None  # what was found, as policy.json had it then
    found: Measurement
    finetuned: Measurement | None
    finetuned_scheme: str | None = None  # if that isn't the run's own
    finetuned_by: Literal["train", "ptq"] = "train"
    tuning: TuningRecord | None = None
    reconstruction: ReconstructionRecord | None = None
    rivals: Annotated[dict[str, Measurement], Field(max_length=MOST)]
    rival_policies: Annotated[dict[str, PolicyRecord], Field(max_length=MOST)] = {}
    verified: AttackedRecord | None = None
    reference: str = UNIFORM_8
    budgets: Annotated[list[BudgetRecord], Field(max_length=len(COST_KEYS))] = []  # all of them, where there are others
    goal: GoalRecord | None = None  # where it isn't the best policy within the budget
    reached: ReachedRecord | None = None  # of the cheapest policy
    shared: SharedRecord | None = None  # of a search that is one of several in a sweep
    choice: ChoiceRecord | None = None  # why this policy; earlier versions returned the best on the search split
    answers: AnswersRecord | None = None  # on the test split, of shares
    racing: RacingRecord | None = None  # where evaluations ended early
    channels: ChannelsRecord | None = None  # where channels were searched too
    bits_only: Names = []  # rivals that searched no channels, beside a solver that did

    def found_by(self, solver: str) -> str:
        """Name the row of what a solver found in a table."""
        if solver in self.bits_only:
            return f"found by {solver} (bits only)"
        return f"found by {solver}"

    @property
    def all_budgets(self) -> list[BudgetRecord]:
        """Return the budget of every metric that is limited, or lessened, the main one first."""
        return self.budgets or [self.budget]

    @property
    def reached_words(self) -> str:
        """Say how far from float what was found is on both splits."""
        parts = []
        for split in SPLITS:
            value, of_float = (self.value(row, split) for row in (self.found, self.of_float))
            error = self.found.paired_error(split, self.objective, "float")
            parts.append(f"{split}: {self.difference(value, of_float, error, 'float')}")
        return ", ".join(parts)

    @property
    def last(self) -> Measurement:
        """Return what was measured last of what was found: fine-tuned, if it was."""
        return self.finetuned or self.found

    @model_validator(mode="after")
    def _check_shares(self) -> ResultRecord:
        measured = [self.of_float, self.uniform8, self.found, *self.rivals.values()]
        if self.finetuned is not None:
            measured.append(self.finetuned)
        for split in SPLITS:
            for measurement in measured:
                self.value(measurement, split)
        for uniform in self.uniform:
            self.value(uniform, "search")
        return self

    @model_validator(mode="after")
    def _check_costs(self) -> ResultRecord:
        if self.budgets and self.budgets[0] != self.budget:
            raise ValueError("the first of 'budgets' isn't 'budget'")
        for budget in self.all_budgets:
            self._check_budget(budget)
        return self

    def _check_budget(self, budget: BudgetRecord) -> None:
        used, of_all = self.found.cost(budget.metric), self.uniform8.cost(budget.metric)
        key = COST_KEYS[budget.metric]
        if used is not None and not math.isclose(used, budget.used, rel_tol=SAME):
            raise ValueError(f"'budget.used' is {budget.used!r}; it must be 'found.{key}', {used!r}")
        if of_all is None or budget.limit is None or budget.fraction is None:
            return
        if not math.isclose(budget.fraction * of_all, budget.limit, rel_tol=SAME):
            raise ValueError(
                f"'budget.fraction' is {budget.fraction!r} and 'budget.limit' {budget.limit!r}, which isn't that fraction of "
                f"'uniform8.{key}', {of_all!r}"
            )


class AskedRecord(Record):
    """What a sweep was asked for: settings of all its runs, and what varies from run to run."""

    settings: Settings
    hw: Names
    budgets: Names
    max_drops: Names = []
    solvers: Names
    seeds: int

    @model_validator(mode="after")
    def _check_settings(self) -> AskedRecord:
        check_plain(self.settings)
        return self


class SweepRecord(FileRecord):
    """sweep.json: what a sweep was asked for. `read` gives a `FinishedSweepRecord` of one that is finished."""

    SCHEMA = files.SWEEP_SCHEMA
    WHAT = "the file of a sweep"
    REMEDY = "sweep again"

    finished: bool
    command: str | None = None
    asked: AskedRecord
    signature: Texts
    versions: Texts

    @classmethod
    def from_dict(cls, content: Mapping[str, Any], source: str | os.PathLike[str] = "the record") -> SweepRecord:
        """Check plain data; as `FileRecord.from_dict`."""
        kind = cls
        if content.get("finished") is True:
            kind = FinishedSweepRecord
        return super(SweepRecord, kind).from_dict(content, source)


class SweepPolicy(JudgedRecord):
    """A policy, or the mean of several, at its cost on a target: in the metric's unit, and as a fraction of uniform 8 bits."""

    cost: Cost
    fraction: float
    pareto: bool  # nothing costs less and is better


class SweepUniform(SweepPolicy):
    """A uniform policy."""

    bits: UniformWidths

    @field_validator("bits")
    @classmethod
    def _check_bits(cls, bits: int | str) -> int | str:
        return _uniform_widths(bits)


class SeedRecord(JudgedRecord):
    """One search of a sweep."""

    seed: int
    folder: str
    evaluations: Count
    cost: Cost
    fraction: float
    policy: PolicyRecord


class SweepFound(SweepPolicy):
    """What a solver found within a budget, or that loses at most so much: means over its seeds."""

    budget: str  # nothing where the cheapest was looked for
    max_drop: str = ""
    solver: str
    limit: Cost | None
    runs: Annotated[list[SeedRecord], Field(min_length=1, max_length=MOST_SEARCHES)]

    @property
    def asked(self) -> str:
        """Say what was asked for: a budget, or the drop that was allowed."""
        if self.max_drop:
            return f"drop {self.max_drop}"
        return self.budget

    @property
    def asked_words(self) -> str:
        """Say it in a sentence: "budget 0.5", "drop 0.5"."""
        if self.max_drop:
            return self.asked
        return f"budget {self.budget}"

    def spread(self, split: str, objective: str, unknown: float = 0.0) -> tuple[float, float]:
        """Return the smallest and the largest value over the seeds.

        Args:
            split: "search" or "test".
            objective: Its name.
            unknown: The value where the file has null.

        Returns:
            Both.
        """
        values = []
        for run in self.runs:
            value = run.entry(split, objective)
            if value is None:
                value = unknown
            values.append(float(value))
        return min(values), max(values)


class FrontMember(Record):
    """A policy that no other one is as good as in every respect and better in one.

    Attributes:
        called: Who found it, for what was asked, or which uniform policy it is.
        folder: Of its search; nothing for a uniform policy.
        value: Of the objective, on the test split.
        costs: In the units of the front's metrics.
    """

    called: str
    folder: str = ""
    value: float
    costs: Annotated[list[Cost], Field(min_length=1, max_length=MOST)]


class FrontRecord(Record):
    """What can't be had better in one respect without being worse in another: the test value, and costs by one or two metrics.

    Attributes:
        metrics: By which policies cost.
        reference: The point that the hypervolume is of: a value, then costs.
        hypervolume: The part of the box between that point and the best of all (no cost; the value by itself) that the front
            is better than; costs in parts of the reference point's.
        of: How many policies were compared.
        policies: The front, the cheapest first.
    """

    metrics: Annotated[list[Metric], Field(min_length=1, max_length=MOST)]
    reference: Annotated[list[float], Field(min_length=2, max_length=MOST)]
    hypervolume: Cost
    of: Count
    policies: Annotated[list[FrontMember], Field(max_length=MOST_SEARCHES)]


class SweepTarget(Record):
    """What was found on one target."""

    name: str
    cost_is: str
    kind: str
    uniform8: Cost  # the reference
    reference: str = UNIFORM_8
    least_fraction: float = 0.0
    unreachable: Names = []
    left_out: str
    uniform: Annotated[list[SweepUniform], Field(max_length=MOST)]
    found: Annotated[list[SweepFound], Field(max_length=MOST_SEARCHES)]
    fronts: Annotated[list[FrontRecord], Field(max_length=MOST)] = []
    missed: Names = []  # searches that found nothing good enough

    @property
    def reference_short(self) -> str:
        """Name the reference in a word or two."""
        return short_reference(self.reference)


class SpecialisedPolicy(JudgedRecord):
    """The best policy found for one target, with its cost on each, as a fraction of uniform 8 bits there.

    It is None where the target can't do one of the policy's pairs of widths.
    """

    folder: str
    solver: str
    fractions: Annotated[dict[str, float | None], Field(max_length=MOST)]

    def fraction_words(self, target: str) -> str:
        """Write its cost on a target; a dash where that can't do it."""
        fraction = self.fractions[target]
        if fraction is None:
            return NOTHING
        return f"{fraction:.3f}"


class SpecialisationRecord(Record):
    """HAQ's table: policies found for one target, run on another."""

    budget: str
    policies: Annotated[dict[str, SpecialisedPolicy], Field(max_length=MOST)]


class SharedSensitivities(Record):
    """The sensitivities that the searches of a sweep share."""

    kind: str
    known: Count
    file: str


class FinishedSweepRecord(SweepRecord, JudgingRecord):
    """sweep.json in the end."""

    network: str
    data: str
    objective: str
    objective_is: str
    metric: Metric
    unit: str = ""
    accuracy_is: str
    images: Counts
    of_float: Measurement = Field(alias="float")
    sensitivities: SharedSensitivities | None = None
    shared: Annotated[list[SharedRecord], Field(max_length=MOST_SEARCHES)] = []
    targets: Annotated[dict[str, SweepTarget], Field(max_length=MOST)]
    specialisation: SpecialisationRecord | None

    @property
    def found(self) -> list[SweepFound]:
        """Return what was found, on all targets."""
        return [found for target in self.targets.values() for found in target.found]

    def spread(self, found: SweepFound, split: str) -> tuple[float, float]:
        """Return the smallest and the largest value over the seeds of what a solver found."""
        return found.spread(split, self.objective, self.worst)

    @model_validator(mode="after")
    def _check_shares(self) -> FinishedSweepRecord:
        for split in SPLITS:
            if not self.images.get(split):
                raise ValueError(f"'images' says nothing of the {split} split; it must be a number above 0")
            self.value(self.of_float, split)
            for row in self._judged():
                self.value(row, split)
        return self

    def _judged(self) -> Iterable[JudgedRecord]:
        for target in self.targets.values():
            yield from target.uniform
            for found in target.found:
                yield found
                yield from found.runs
        if self.specialisation is not None:
            yield from self.specialisation.policies.values()


class DecisionIncreases(Record):
    """The increases of the loss (nats) by lowering one operand of a decision's layers, by width; null where unknown."""

    layers: Names
    weights: ByWidth
    activations: ByWidth

    @field_validator("weights", "activations")
    @classmethod
    def _check_length(cls, increases: list[float | None]) -> list[float | None]:
        if len(increases) not in (BITS, PLACES):
            raise ValueError(f"there are {len(increases)} increases of an operand; there must be {BITS} or {PLACES}, by width")
        return increases


class SensitivityRecord(FileRecord):
    """sensitivity.json: how much the loss increases when one operand of one layer is given fewer bits."""

    SCHEMA = files.SENSITIVITY_SCHEMA
    WHAT = "a file of sensitivities"
    REMEDY = "measure them anew, without --sensitivity"

    kind: str
    unit: str = "nats"
    signature: Texts
    bits: Annotated[list[AnyWidth], Field(min_length=2, max_length=2)]
    base: PolicyRecord
    loss_increases: Annotated[list[DecisionIncreases], Field(max_length=MOST)]


class AgentRecord(Record):
    """What the header of a pretrained agent's file says of it; `haq.solvers.agent_file` reads the networks beside it.

    Attributes:
        kind: The algorithm, which is the name of the solver that it can start.
        features: What it observes, by name and in this order.
        hidden: The sizes of its networks' hidden layers.
        trained_on: The problems that it was trained on.
        episodes: How many it played in training.
        seed: What everything random came from in training.
    """

    WHAT = "the header of a pretrained agent"

    kind: Literal["ddpg", "td3", "sac"]
    features: Annotated[list[str], Field(min_length=1, max_length=MOST)]
    hidden: Annotated[list[Annotated[int, Field(ge=1, le=MOST_UNITS)]], Field(min_length=1, max_length=MOST_HIDDEN)]
    trained_on: Names
    episodes: Count
    seed: Count


def _uniform_widths(bits: int | str) -> int | str:
    """Return the widths of a uniform policy themselves. Raises ValueError unless they are a width, or a pair of them."""
    if isinstance(bits, str):
        read_pair(bits)
    elif bits not in WRITTEN_WIDTHS:
        raise ValueError(f"'bits' of a uniform policy is {quoted(bits)}; it must be {ACCEPTED}, or a pair such as '4/8'")
    return bits


def check_plain(settings: Mapping[str, Any]) -> None:
    """Raise ValueError unless settings are text, numbers, true, false or nothing."""
    for name, value in settings.items():
        if value is not None and not isinstance(value, (str, int, float)):
            raise ValueError(
                f"'settings' has a {kind_of(value)} for {quoted(name)}; it must be text, a number, true, false or nothing"
            )


def describe_fault(error: ValidationError) -> str:
    """Say the first fault of some data in one sentence: the key, its value, and what would be accepted."""
    first = error.errors(include_url=False)[0]
    kind = first["type"]
    if kind == "value_error":
        return str(first["ctx"]["error"])  # of our own checks, which name the key themselves
    if kind == "json_invalid":
        return "it is nested too deeply"
    key = quoted(".".join(map(str, first["loc"])))
    if kind == "missing":
        return f"{key} is missing"
    if kind in ("too_short", "too_long"):
        context = first["ctx"]
        words = f"at least {context.get('min_length')}"
        if kind == "too_long":
            words = f"at most {context['max_length']}"
        return f"{key} has {context['actual_length']} entries; it must have {words}"
    wanted = _WANTED.get(kind)
    if wanted is None:
        wanted = first["msg"].replace("Input should be", "it must be")
        wanted = f"{wanted[0].lower()}{wanted[1:]}"
    return f"{key} is {quoted(first['input'])}; {wanted}"


_WANTED = {
    "string_type": "it must be text",
    "bool_type": "it must be true or false",
    "int_type": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "float_type": "it must be a number",
    "finite_number": "it must be a finite number",
    "list_type": "it must be a list",
    "tuple_type": "it must be a list",
    "dict_type": "it must be a mapping",
    "model_type": "it must be a mapping",
}


def _entry_of(values: Mapping[str, Any], key: str) -> Any:
    if key not in values:
        raise ValueError(f"{key!r} is missing")
    return values[key]


def _error_of(values: Mapping[str, Any], key: str) -> float | None:
    return _number_of(values, error_key(key))


def _paired_error_of(values: Mapping[str, Any], split: str, objective: str, other: str) -> float | None:
    """Return the paired standard error of a difference, where a row has it; see `Measurement.paired_error`."""
    return _number_of(values, paired_key(share_key(split, objective), other))


def _number_of(values: Mapping[str, Any], key: str) -> float | None:
    """Return a standard error; None where there is none, or anything else."""
    error = values.get(key)
    if isinstance(error, bool) or not isinstance(error, (int, float)) or error < 0:
        return None
    return float(error)
