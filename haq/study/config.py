"""What a search is asked to do: the options of the command and what stands in config.yaml."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from haq import data, networks
from haq.attacks.threat_model import DEFAULT_EPS, parse_eps
from haq.problem import OBJECTIVES
from haq.problem.sensitivity import check_kind
from haq.solvers import SOLVERS
from haq.solvers.base import check_env


@dataclass(frozen=True)
class SearchConfig:
    """What a search is asked to do: the options of `python -m haq.search`."""

    network: str = networks.DEFAULT
    data: str = data.DEFAULT
    hw: str = "edge"
    metric: str = "latency"
    budget: str = "0.5"
    bits: str = "2:8"
    solver: str = "ddpg"
    evaluations: int = 200
    env: str = "plan"
    ahead: int = 1
    seed: int = 0
    finetune_epochs: int = 12
    finetune_steps: int = 0
    objective: str = "accuracy"
    scheme: str = "linear"
    eps: str = DEFAULT_EPS  # of the attack of objective accuracy+robust
    sensitivity_kind: str = "loss"
    sensitivity: str | None = None
    threads: int | None = None
    target: str | None = None
    cold: bool | None = None

    def __post_init__(self) -> None:
        if self.solver not in SOLVERS:
            SOLVERS.get(self.solver)
        check_env(self.env)
        attacked = OBJECTIVES.get(self.objective).attacked
        check_kind(self.sensitivity_kind)
        for name, least in (("evaluations", 1), ("ahead", 1), ("seed", 0), ("finetune_epochs", 0), ("finetune_steps", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"--{name.replace('_', '-')} is {value!r}; it must be an integer of at least {least}")
        self.bit_range()
        parse_eps(self.eps)
        if not attacked and self.eps != DEFAULT_EPS:
            raise ValueError(
                f"--eps {self.eps} is of an attack: it goes with --objective accuracy+robust, not {self.objective}"
            )

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> SearchConfig:
        """Settings from a file. Raises ValueError for a name that there isn't, and for a value of the wrong type."""
        kinds = get_type_hints(cls)
        for name, value in content.items():
            if name not in kinds:
                raise ValueError(
                    f"unknown setting {name[:40]!r}: it may be of a newer version of haq; known: {', '.join(kinds)}"
                )
            if not isinstance(value, kinds[name]) or (isinstance(value, bool) and name != "cold"):
                wanted = {str: "text", int: "an integer"}.get(kinds[name], str(kinds[name]))
                raise ValueError(f"setting {name!r} is {str(value)[:40]!r}, a {type(value).__name__}; it must be {wanted}")
        return cls(**content)

    def files(self) -> dict[str, Path]:
        """The files and folders of the user's own that are named, by setting."""
        found = {}
        network = Path(self.network.rpartition("@")[2])
        if "@" in self.network or network.suffix in networks.CHECKPOINT_ENDINGS:
            found["network"] = network
        if self.data.startswith(("imagefolder:", "images:")):
            found["data"] = Path(self.data.partition(":")[2])
        if self.hw.startswith("lut:") or self.hw.endswith((".yaml", ".yml")):
            found["hw"] = Path(self.hw.removeprefix("lut:"))
        return found

    def bit_range(self) -> tuple[int, int]:
        """Smallest and largest width. Raises ValueError if that isn't what `bits` says."""
        if not (match := re.fullmatch(r"([1-8]):([1-8])", str(self.bits))) or match[1] > match[2]:
            raise ValueError(f"--bits is {self.bits!r}; it must be SMALLEST:LARGEST within 1:8, such as 2:8")
        return int(match[1]), int(match[2])

    def options(self) -> list[str]:
        """Return the options that ask for this, word by word; those that are as they come are left out."""
        words = []
        for one in fields(self):
            value = getattr(self, one.name)
            # Sensitivities that are given bring their kind along.
            brought = one.name == "sensitivity_kind" and self.sensitivity is not None
            if value != one.default and not brought:
                words.append(f"--{one.name.replace('_', '-')}")
                if value is not True:
                    words.append(str(value))
        return words

    def words(self) -> list[str]:
        """Return the command that asks for this, word by word."""
        return ["python", "-m", "haq.search", *self.options()]

    def command(self) -> str:
        """Return the command that asks for this, as it can be typed."""
        return shlex.join(self.words())
