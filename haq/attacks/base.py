"""What every attack is: a class that says what it knows, what it costs and what it does to images.

Importing this imports neither torch nor foolbox.
"""

from __future__ import annotations

import abc
import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from haq.attacks.classifier import Classifier
    from haq.attacks.threat_model import ThreatModel

WHITE = "white box"
BLACK = "black box"
NOISE = "noise"
KNOWLEDGE = (WHITE, BLACK, NOISE)
# How gradients pass the quantized inputs of layers: those of `quantizers.BACKWARD`, or the float network's gradient.
BACKWARD = ("ste", "bpda-identity", "bpda-soft", "hard", "twin")


class AttackBudget(NamedTuple):
    """How hard attacks try."""

    steps: int  # of PGD
    restarts: int  # of PGD
    apgd: int  # steps of APGD
    targets: int  # classes that the targeted version of APGD tries
    queries: int  # of Square
    draws: int  # of noise


ATTACK_BUDGETS = {
    "quick": AttackBudget(steps=20, restarts=1, apgd=15, targets=0, queries=100, draws=5),
    "standard": AttackBudget(steps=50, restarts=5, apgd=100, targets=3, queries=1000, draws=20),
    "full": AttackBudget(steps=50, restarts=5, apgd=100, targets=9, queries=5000, draws=50),
}
DEFAULT_EFFORT = "standard"  # of attacks that are asked for by name


@dataclass(frozen=True, eq=False)
class AttackSetup:
    """What an attack is made for.

    Attributes:
        victim: The network that is attacked; it takes images in [0, 1].
        threat: What the attacker may do.
        budget: How hard the attack may try.
        classes: How many the victim tells apart.
        sources: Other networks on the same images, by name.
        backward: How gradients pass the victim's quantized inputs, one of `BACKWARD`.
    """

    victim: Classifier
    threat: ThreatModel
    budget: AttackBudget
    classes: int
    sources: Mapping[str, Classifier] = field(default_factory=dict)
    backward: str = "ste"

    @property
    def targets(self) -> int:
        """How many wrong classes a targeted attack tries."""
        return min(self.classes - 1, self.budget.targets)


class EvaluationAttack(abc.ABC):
    """An attack: subclass it, say what it knows and costs, and write `perturb`.

    Attributes:
        knows: `WHITE` (weights and gradients), `BLACK` (logits, or nothing), or `NOISE`. Where a black box or noise finds
            more than all white boxes, gradients are masked, and an assessment says so.
        efforts: The efforts that include the attack: some of `quick`, `standard` and `full`; none: only asked for by name.
        least_classes: How many classes a network must have.
        name: What it was asked for as, and is called in results.
        setup: What it is made for.
    """

    knows: ClassVar[str] = WHITE
    efforts: ClassVar[tuple[str, ...]] = ()
    least_classes: ClassVar[int] = 2

    def __init_subclass__(cls) -> None:
        """Refuse what an assessment could make nothing of.

        Raises:
            ValueError: For another kind of knowledge, or an unknown effort.
        """
        if cls.knows not in KNOWLEDGE:
            raise ValueError(f"{cls.__name__}.knows is {cls.knows!r}; it must be one of {', '.join(KNOWLEDGE)}")
        if isinstance(cls.efforts, str) or not set(cls.efforts) <= set(ATTACK_BUDGETS):
            raise ValueError(
                f"{cls.__name__}.efforts is {cls.efforts!r}; it must be a tuple of some of {', '.join(ATTACK_BUDGETS)}"
            )

    def __init__(self, name: str, setup: AttackSetup) -> None:
        """Keep what the attack is called and made for.

        Args:
            name: What results call it.
            setup: What it attacks, what the attacker may do, and how hard it may try.
        """
        self.name = name
        self.setup = setup

    @classmethod
    def make(cls, name: str, setup: AttackSetup) -> list[EvaluationAttack]:
        """Make the attack for a victim.

        Args:
            name: What it is asked for as.
            setup: What it is made for.

        Returns:
            The attack; nothing where it makes no sense, several where there are several ways, with names of their own.
        """
        return [cls(name, setup)]

    @classmethod
    def code(cls) -> str:
        """Return a hash of the file that the class is from: what the attack finds may depend on all of it.

        Returns:
            SHA-256 in hexadecimal digits; the module's name for a class that is in no file.
        """
        try:
            file = inspect.getsourcefile(cls)
        except TypeError:
            file = None
        if file is None or not Path(file).is_file():
            return cls.__module__
        return hashlib.sha256(Path(file).read_bytes()).hexdigest()

    @property
    def victim(self) -> Classifier:
        """The network that is attacked."""
        return self.setup.victim

    @property
    def threat(self) -> ThreatModel:
        """What the attacker may do."""
        return self.setup.threat

    @property
    def budget(self) -> AttackBudget:
        """How hard the attack may try."""
        return self.setup.budget

    @property
    def passes(self) -> float:
        """What the attack costs, roughly: passes back and forth for each image."""
        return 1.0

    @abc.abstractmethod
    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return images that the victim should take for something else.

        What is random is drawn from torch's global generator, which `run` seeds: the CPU's, so that it is the same on every
        device (`torch.randn(images.shape).to(images.device)`).

        Args:
            images: In [0, 1], float (N, C, H, W). They must be left as they are.
            labels: Their classes, int64 (N,).

        Returns:
            Images of the same shape, in [0, 1] and within `self.threat` of those given.
        """

    def run(self, images: Tensor, labels: Tensor, seed: int) -> Tensor:
        """Return images that an attacker would show instead, the same ones for a seed.

        torch's global generator is seeded for the run and put back, as the libraries draw from it.

        Args:
            images: In [0, 1], float (N, C, H, W).
            labels: Their classes, int64 (N,).
            seed: Of all that is random.

        Returns:
            Images of the same shape.

        Raises:
            RuntimeError: For images that the threat model doesn't allow, which are a mistake of the attack's.
        """
        with seeded(seed, images.device):
            found = self.perturb(images, labels).detach()
        if found.shape != images.shape:
            shapes = f"{tuple(found.shape)} for images of {tuple(images.shape)}"
            raise RuntimeError(f"{self.name} returned images of another shape: {shapes}")
        if not self.threat.within(images, found):
            raise RuntimeError(f"{self.name} left the ball: {self.threat}")
        return found


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch's global generators within, and put them back afterwards: the CPU's, and those of a device.

    Args:
        seed: The seed.
        device: Where something may be drawn beside the CPU.
    """
    import torch

    others = []
    if device.type == "cuda":
        others = [device]
    with torch.random.fork_rng(others):
        torch.manual_seed(seed)
        yield


def effort_of(names: str) -> str:
    """Return the effort that is named among attacks divided by commas, or the standard one.

    Raises:
        ValueError: For two of them.
    """
    asked = [name for name in split_names(names) if name in ATTACK_BUDGETS]
    if len(asked) > 1:
        raise ValueError(f"attacks {names!r} name the efforts {' and '.join(asked)}: choose one")
    return asked[0] if asked else DEFAULT_EFFORT


def split_names(names: str) -> list[str]:
    """Split names divided by commas, and leave out what is said twice. Raises TypeError for anything but a text."""
    if not isinstance(names, str):
        raise TypeError(f"attacks is {names!r}; it must be a text, names divided by commas, such as 'quick' or 'pgd,square'")
    return list(dict.fromkeys(name.strip() for name in names.split(",")))
