"""What stands in the files of runs and sweeps, as far as a report shows it: records that check what they are given."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from haq.store.units import UNITS

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
    objective: str
    objective_is: str
    float_accuracy: Share = Field(alias="float")
    layers: Annotated[list[Layer], Field(min_length=1)]


class PolicyLayer(Record):
    name: str
    weight_bits: Bits
    activation_bits: Bits


class Policy(Record):
    """policy.json; searched policies have no layer in float."""

    version: Annotated[int, Field(ge=1, le=1)]

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


class ThreatModel(Record):
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
    threat: ThreatModel
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
    objective: str
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
    """A policy of a sweep, with the accuracies of its objective beside its own fields."""

    model_config = ConfigDict(extra="allow")

    cost: Cost
    fraction: float
    pareto: bool

    def share(self, key: str) -> float:
        """An accuracy, 0..1. Raises ValueError if there is none of that name."""
        return share_of(self.model_extra or {}, key)


class Uniform(Judged):
    bits: Bits


class Searched(Judged):
    budget: str
    solver: str
    limit: Cost
    runs: Annotated[list[dict[str, Any]], Field(min_length=1)]

    def spread(self, key: str) -> tuple[float, float]:
        """The smallest and the largest accuracy over the seeds."""
        shares = [share_of(run, key) for run in self.runs]
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
    objective: str
    objective_is: str
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


def share_of(entry: dict[str, Any], key: str) -> float:
    """An accuracy of an entry, 0..1. Raises ValueError if there is none of that name."""
    value = entry.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ValueError(f"{key!r} is {value!r:.80}; it must be a share from 0 to 1")
    return float(value)
