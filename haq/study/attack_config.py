"""How networks are attacked: the options of `haq robustness`. Importing this needs no torch."""

from __future__ import annotations

import math

from pydantic import field_validator, model_validator

from haq import data
from haq.attacks import ATTACKS
from haq.attacks.base import ATTACK_BUDGETS, BACKWARD, AttackBudget, effort_of
from haq.attacks.suite import check_names
from haq.attacks.threat_model import DEFAULT_EPS, NORMS, ThreatModel, parse_eps
from haq.console.options import setting
from haq.study.config import AnotherScheme, known_schemes

ATTACKER = "The attacker"
COMPARED = "What is compared"

BETA = 2e-3  # of the penalty: fixed before anything was attacked (docs/experiments/defensive_quantization.md)
EPS = {"linf": DEFAULT_EPS, "l2": "0.5"}
LEAST_IMAGES = 10


class AttackConfig(AnotherScheme):
    """How networks are attacked, and which of them: the options of `haq robustness`."""

    attacks: str = setting(
        "standard",
        f"{', '.join(ATTACK_BUDGETS)}, names as `haq list attacks` shows them, or module:Name, divided by commas, such as "
        "fgsm,pgd,square",
        group=ATTACKER,
        metavar="NAME,NAME",
        names=lambda: (*ATTACK_BUDGETS, *ATTACKS.names()),
    )
    eps: str | None = setting(
        None,
        "size of a perturbation of images in [0, 1]",
        group=ATTACKER,
        metavar="SIZE",
        default_words=", ".join(f"{norm}: {eps}" for norm, eps in EPS.items()),
    )
    norm: str = setting(
        "linf", f"in which that is measured: {', '.join(NORMS)}", group=ATTACKER, metavar="NAME", names=lambda: NORMS
    )
    backward: str = setting(
        "ste",
        f"how gradients pass quantized inputs: {', '.join(BACKWARD)}; hard shows masking",
        group=ATTACKER,
        metavar="MODE",
        names=lambda: BACKWARD,
    )
    requantize_input: bool = setting(False, "networks are given images rounded to 8 bits", group=ATTACKER)
    images: int = setting(1000, "of the test split", group=ATTACKER, metavar="N")
    seed: int = setting(0, "of all that is random", group=ATTACKER, metavar="N")
    uniform: str = setting("8", "widths of uniform policies to compare with", group=COMPARED, metavar="BITS,BITS")
    defensive: float = setting(
        BETA,
        "of the penalty in training the found policy once more; 0 leaves that out",
        group=COMPARED,
        metavar="BETA",
    )
    data: str | None = setting(
        None,
        "of a model: a name as `haq list data` shows them, or module:Name",
        group=COMPARED,
        metavar="NAME",
        default_words=data.DEFAULT,
        names=lambda: data.DATASETS.names(),
    )
    scheme: str | None = setting(
        None,
        "of the quantized networks: NAME or NAME,LAYER=NAME, as of haq search",
        group=COMPARED,
        metavar="NAME",
        default_words="the run's own; of a model linear",
        names=lambda: known_schemes(),
    )

    @field_validator("norm")
    @classmethod
    def _check_norm(cls, norm: str) -> str:
        if norm not in NORMS:
            raise ValueError(f"--norm is {norm!r}; known: {', '.join(NORMS)}")
        return norm

    @field_validator("backward")
    @classmethod
    def _check_backward(cls, mode: str) -> str:
        if mode not in BACKWARD:
            raise ValueError(f"--backward is {mode!r}; known: {', '.join(BACKWARD)}")
        return mode

    @model_validator(mode="after")
    def _check_together(self) -> AttackConfig:
        for name, least in (("images", LEAST_IMAGES), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"--{name} is {value}; it must be at least {least}")
        self.widths()
        if not 0 <= self.defensive < math.inf:
            raise ValueError(f"--defensive is {self.defensive}; it must be 0 or above")
        self.threat()
        check_names(self.attacks)
        return self

    def widths(self) -> tuple[int, ...]:
        """Return the widths of the uniform policies. Raises ValueError if they are none."""
        words: list[str] = []
        if self.uniform:
            words = [word.strip() for word in self.uniform.split(",")]
        if not all(word.isdecimal() and int(word) in (*range(1, 9), 16) for word in words):
            raise ValueError(f"--uniform is {self.uniform!r}; give widths from 1 to 8, or 16, such as 8,4,2")
        return tuple(dict.fromkeys(int(word) for word in words))

    def threat(self) -> ThreatModel:
        """Return what the attacker may do. Raises ValueError for an eps that it can't have."""
        most = 1.0
        if self.norm != "linf":
            most = math.inf
        return ThreatModel(parse_eps(self.eps or EPS[self.norm], most), self.norm)

    def budget(self) -> AttackBudget:
        """Return how hard attacks try."""
        return ATTACK_BUDGETS[effort_of(self.attacks)]
