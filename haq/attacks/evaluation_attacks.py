"""The attacks that an assessment is made of: foolbox's, pyautoattack's, and small subclasses of foolbox's.

These are what neither has: R+FGSM, PGD on the DLR loss and with temperatures; and noise of signs.
`haq.attacks.ATTACKS` names them, and says how another one is added.
"""

from __future__ import annotations

import abc
import itertools
import logging
import math
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import quantizers as Q
from haq.attacks.base import BLACK, NOISE, WHITE, AttackSetup, EvaluationAttack
from haq.attacks.classifier import Classifier, TwinnedClassifier
from haq.attacks.losses import LOGITS, cross_entropy, dlr_loss, temperatures
from haq.attacks.threat_model import NORMS, ThreatModel
from hw_models.extras import install_line

try:
    with warnings.catch_warnings():
        # foolbox imports a name from where SciPy had it; not ours to mend.
        warnings.simplefilter("ignore", DeprecationWarning)
        import eagerpy
        import foolbox
        from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
        from pyautoattack.square import SquareAttack
except ImportError as error:
    raise ImportError(f"attacks need foolbox and pyautoattack: {install_line('robustness')}") from error

Loss = Callable[[Tensor, Tensor], Tensor]  # of logits and labels: a number for each image, (N,)
ALL: tuple[str, ...] = ("quick", "standard", "full")
# What takes part in more than a quick look.
THOROUGH: tuple[str, ...] = ("standard", "full")
# Passes that a draw of noise, or a query, costs: there is no way back.
FORWARD_ONLY = 0.4
_silent = logging.Logger("attacks")  # its warnings are checks of ours
_silent.addHandler(logging.NullHandler())


class Noise(EvaluationAttack):
    """The worst of some draws of noise."""

    knows = NOISE
    efforts = ALL

    @property
    def passes(self) -> float:
        """One forward pass for each draw."""
        return FORWARD_ONLY * self.budget.draws

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the first draw that fools the victim, or else the last."""
        return noise(self.victim, images, labels, self.threat, self.budget.draws)


class WhiteBoxAttack(EvaluationAttack):
    """An attack that follows the victim's gradients, in the setup's backward mode."""

    knows = WHITE

    @property
    def mode(self) -> str:
        """How gradients pass quantized inputs."""
        return self.setup.backward

    @cached_property
    def model(self) -> nn.Module:
        """What the gradients are taken of: the victim, or its logits with the float network's gradient."""
        if self.mode == "twin":
            return TwinnedClassifier(self.victim, self.victim.twin())
        return self.victim

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return what following the gradients makes of images."""
        with Q.backward_mode(self.victim.network, training_mode(self.mode)):
            return self.follow(images, labels)

    @abc.abstractmethod
    def follow(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return what following the gradients of `self.model` makes of images."""


class FGSM(WhiteBoxAttack):
    """One step along the gradient's sign; l2: along the gradient."""

    efforts = ALL

    def follow(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take the step."""
        kinds = {"linf": foolbox.attacks.LinfFastGradientAttack, "l2": foolbox.attacks.L2FastGradientAttack}
        return run_foolbox(kinds[self.threat.norm](), self.model, images, labels, self.threat.eps)


class RFGSM(WhiteBoxAttack):
    """Half of the way at random, then one step of the other half."""

    efforts = ALL

    def follow(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take both steps."""
        kinds = {"linf": _LinfHalfway, "l2": _L2Halfway}
        eps = self.threat.eps
        return run_foolbox(kinds[self.threat.norm](eps), self.model, images, labels, eps)


class PGD(WhiteBoxAttack):
    """Many steps from random starts, on the cross-entropy."""

    efforts = ALL

    @property
    def passes(self) -> float:
        """As many as there are steps, from every start."""
        return self.budget.steps * self.budget.restarts

    def follow(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take the steps; images that are fooled are left alone in later restarts."""
        return pgd(
            self.model,
            images,
            labels,
            self.threat,
            steps=self.budget.steps,
            restarts=self.budget.restarts,
        )


class PGDOnDLR(WhiteBoxAttack):
    """PGD on the DLR loss, which no scale of the logits changes (Croce and Hein, ICML 2020, section 5)."""

    efforts = THOROUGH
    least_classes = 3

    @property
    def passes(self) -> float:
        """As many as there are steps."""
        return self.budget.steps

    def follow(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take the steps."""
        return pgd(self.model, images, labels, self.threat, steps=self.budget.steps, loss=dlr_loss)


class PGDWithTemperatures(WhiteBoxAttack):
    """PGD on the cross-entropy of logits times `temperatures`."""

    efforts = THOROUGH

    @property
    def passes(self) -> float:
        """As many as there are steps, and one for each logit that a temperature is found from."""
        return self.budget.steps + LOGITS

    def follow(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take the steps."""
        return pgd(self.model, images, labels, self.threat, steps=self.budget.steps, tempered=True)


class PGDThrough(WhiteBoxAttack):
    """PGD through a quantized network in the backward mode that its name says, where other attacks go another way."""

    efforts = ("full",)

    @classmethod
    def make(cls, name: str, setup: AttackSetup) -> list[EvaluationAttack]:
        """Make the attack where it isn't `pgd` itself: on a quantized network, in another mode than the setup's."""
        attack = cls(name, setup)
        if not setup.victim.quantized or attack.mode == setup.backward:
            return []
        return [attack]

    @property
    def mode(self) -> str:
        """How gradients pass quantized inputs."""
        return self.name.removeprefix("pgd-")

    @property
    def passes(self) -> float:
        """Twice as many as there are steps: these ways back take longer."""
        return 2 * self.budget.steps

    def follow(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take the steps."""
        return pgd(self.model, images, labels, self.threat, steps=self.budget.steps)


class APGDOnCrossEntropy(WhiteBoxAttack):
    """PGD with steps that adapt, on the cross-entropy."""

    efforts = ALL
    loss = "ce"

    @property
    def passes(self) -> float:
        """As many as there are steps."""
        return self.budget.apgd

    def follow(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take the steps, as pyautoattack does."""
        attack = APGDAttack(self.model, loss=self.loss, **self.options(images))
        found: Tensor = attack.perturb(images, labels)
        return found

    def options(self, images: Tensor) -> dict[str, Any]:
        """Return what every version of APGD is told."""
        return {
            "norm": NORMS[self.threat.norm],
            "eps": self.threat.eps,
            "n_iter": self.budget.apgd,
            "seed": drawn_seed(),
            "device": images.device,
            "logger": _silent,
        }


class APGDOnDLR(APGDOnCrossEntropy):
    """APGD on the DLR loss."""

    least_classes = 3
    loss = "dlr"


class APGDTargeted(APGDOnCrossEntropy):
    """APGD on the targeted DLR loss, towards one wrong class after the other."""

    efforts = THOROUGH
    least_classes = 4

    @classmethod
    def make(cls, name: str, setup: AttackSetup) -> list[EvaluationAttack]:
        """Make the attack, where the budget allows for any target."""
        if not setup.targets:
            return []
        return [cls(name, setup)]

    @property
    def passes(self) -> float:
        """As many as there are steps, for every target."""
        return self.budget.apgd * self.setup.targets

    def follow(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take the steps, as pyautoattack does."""
        attack = APGDAttack_targeted(self.model, n_target_classes=self.setup.targets, **self.options(images))
        found: Tensor = attack.perturb(images, labels)
        return found


class Square(EvaluationAttack):
    """Random search that sees logits only."""

    knows = BLACK
    efforts = ALL

    @property
    def passes(self) -> float:
        """One forward pass for each query."""
        return FORWARD_ONLY * self.budget.queries

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """Search, as pyautoattack does; its l2 version does so on square images of certain sizes only."""
        fold = Fold.of(images) if self.threat.norm == "l2" else None
        if fold is None:
            return self._search(self.victim, images, labels)
        found = self._search(lambda x: self.victim(fold.open(x)), fold.close(images), labels)
        return fold.open(found)

    def _search(self, model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
        attack = SquareAttack(
            model,
            norm=NORMS[self.threat.norm],
            eps=self.threat.eps,
            n_queries=self.budget.queries,
            seed=drawn_seed(),
            device=images.device,
        )
        with torch.no_grad():
            found: Tensor = attack.perturb(images, labels)
        return found


class Fold:
    """Images laid into a square: long ones in strips, one below the other, with grey where nothing is left.

    Distances (l2) are those of the images.
    """

    def __init__(self, size: tuple[int, int], strips: int, side: int) -> None:
        """Keep the sizes.

        Args:
            size: Height and width of the images, upright or not.
            strips: How many the longer side is cut into.
            side: Of the square.
        """
        self.size = size
        self.strips = strips
        self.side = side

    @classmethod
    def of(cls, images: Tensor) -> Fold | None:
        """Choose a fold for images (N, C, H, W), or None if pyautoattack's Square takes them as they are."""
        height, width = images.shape[2:]
        short, long = sorted((height, width))
        strips = max(1, round(math.sqrt(long / short)))
        side = max(short * strips, math.ceil(long / strips))
        while not _takes(side):
            side += 1
        if height == width == side:
            return None
        return cls((height, width), strips, side)

    def close(self, images: Tensor) -> Tensor:
        """Lay images (N, C, H, W) into squares (N, C, side, side)."""
        if self.size[0] > self.size[1]:
            images = images.mT
        rows = images.new_full((*images.shape[:2], self.side, self.side), 0.5)
        for number, strip in enumerate(self._strips(images)):
            top = number * strip.shape[2]
            rows[:, :, top : top + strip.shape[2], : strip.shape[3]] = strip
        return rows

    def open(self, squares: Tensor) -> Tensor:
        """Take images out of squares."""
        short, long = sorted(self.size)
        length = math.ceil(long / self.strips)
        strips = [squares[:, :, number * short : (number + 1) * short, :length] for number in range(self.strips)]
        images = torch.cat(strips, 3)[..., :long]
        if self.size[0] > self.size[1]:
            images = images.mT
        return images.contiguous()

    def _strips(self, images: Tensor) -> tuple[Tensor, ...]:
        return images.split(math.ceil(images.shape[3] / self.strips), 3)


def _takes(side: int) -> bool:
    """Tell whether pyautoattack's Square lays its first squares (l2) within images of a size."""
    square = side // 5
    if square < 2:
        return square == 1
    return (side - 5 * square) // 2 + side // square * square <= side


class Transfer(EvaluationAttack):
    """PGD on another network, tried on the victim."""

    knows = BLACK
    efforts = ALL

    def __init__(self, name: str, setup: AttackSetup, source: Classifier) -> None:
        """Keep what is attacked in the victim's place."""
        super().__init__(name, setup)
        self.source = source

    @classmethod
    def make(cls, name: str, setup: AttackSetup) -> list[EvaluationAttack]:
        """Make an attack for each source, `transfer-NAME`."""
        return [cls(f"{name}-{source}", setup, network) for source, network in setup.sources.items()]

    @property
    def passes(self) -> float:
        """As many as there are steps."""
        return self.budget.steps

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """Take the steps on the source."""
        return pgd(self.source, images, labels, self.threat, steps=self.budget.steps)


def training_mode(mode: str) -> str:
    """Return the mode of `quantizers.BACKWARD` in which a network computes: of `twin`, whose gradient isn't used, any."""
    return "ste" if mode == "twin" else mode


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    restarts: int = 1,
    loss: Loss = cross_entropy,
    tempered: bool = False,
) -> Tensor:
    """Run foolbox's PGD with steps of 2.5 eps / steps from random starts.

    Args:
        model: Takes images, returns logits (N, classes).
        images: In [0, 1], float (N, C, H, W).
        labels: int64 (N,).
        threat: How far images may be moved.
        steps: From every start.
        restarts: Starts; images that are fooled are left alone in later ones.
        loss: What is raised.
        tempered: Whether it is of logits times `temperatures`.

    Returns:
        Images of the same shape.
    """
    kinds = {"linf": _LinfPGD, "l2": _L2PGD}
    found = images.clone()
    left = torch.arange(len(images), device=images.device)
    for _ in range(restarts):
        if not len(left):
            break
        x, y = images[left], labels[left]
        scale: Tensor | float = 1.0
        if tempered:
            scale = temperatures(model, x)[:, None]
        attack = kinds[threat.norm](loss, scale, steps)
        found[left] = run_foolbox(attack, model, x, y, threat.eps)
        with torch.no_grad():
            left = left[model(found[left]).argmax(1) == y]
    return found


def noise(model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, draws: int) -> Tensor:
    """Draw noise that is as large as the ball: signs at random, or directions (l2).

    Args:
        model: Takes images, returns logits (N, classes).
        images: In [0, 1], float (N, C, H, W).
        labels: int64 (N,).
        threat: How large the noise is.
        draws: At most; an image that is fooled keeps its noise.

    Returns:
        Images of the same shape.
    """
    found = images.clone()
    left = torch.arange(len(images), device=images.device)
    for _ in range(draws):
        if not len(left):
            break
        drawn = gaussian(images[left])
        if threat.norm == "linf":
            drawn = torch.where(drawn >= 0, 1.0, -1.0)
        else:
            drawn /= torch.linalg.vector_norm(drawn.flatten(1), dim=1).view(-1, 1, 1, 1)
        found[left] = (images[left] + threat.eps * drawn).clamp(0, 1)
        with torch.no_grad():
            left = left[model(found[left]).argmax(1) == labels[left]]
    return found


def gaussian(like: Tensor) -> Tensor:
    """Draw normal numbers in the shape of a tensor; on the CPU, so that they are the same on every device."""
    return torch.randn_like(like, device="cpu").to(like.device)


def drawn_seed() -> int:
    """Draw a seed for a library from the generator that `EvaluationAttack.run` seeded."""
    return int(torch.randint(2**31 - 1, ()))


def run_foolbox(attack: Any, model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    """Run an attack of foolbox's.

    Args:
        attack: One of `foolbox.attacks`, or a subclass.
        model: Takes images, returns logits (N, classes); it is put in evaluation mode.
        images: In [0, 1], float (N, C, H, W).
        labels: int64 (N,).
        eps: How far images may be moved.

    Returns:
        Images of the same shape.
    """
    wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device=images.device)
    found: Tensor = attack.run(wrapped, images, foolbox.Misclassification(labels), epsilon=eps)
    return found


class _StartingAlike:
    """foolbox's gradient attacks, which draw where the images are, from the same random starts on every device."""

    def get_random_start(self, x0: Any, epsilon: float) -> Any:
        start = super().get_random_start(eagerpy.astensor(x0.raw.cpu()), epsilon)  # type: ignore[misc]
        return eagerpy.astensor(start.raw.to(x0.raw.device))


class _OnLoss(_StartingAlike):
    """foolbox's gradient attacks on another loss."""

    def __init__(self, loss: Loss, scale: Tensor | float, steps: int) -> None:
        super().__init__(steps=steps, rel_stepsize=2.5 / steps, random_start=True)  # type: ignore[call-arg]
        self.loss = loss
        self.scale = scale

    def get_loss_fn(self, model: Any, labels: Any) -> Callable[[Any], Any]:
        def loss(inputs: Any) -> Any:
            return eagerpy.astensor(self.loss(self.scale * model(inputs).raw, labels.raw).sum())

        return loss


class _LinfPGD(_OnLoss, foolbox.attacks.LinfPGD):
    pass


class _L2PGD(_OnLoss, foolbox.attacks.L2PGD):
    pass


class _Halfway:
    """R+FGSM: eps / 2 at random, then one step of eps / 2."""

    def __init__(self, eps: float) -> None:
        super().__init__(steps=1, abs_stepsize=eps / 2, random_start=True)  # type: ignore[call-arg]

    def get_random_start(self, x0: Any, epsilon: float) -> Any:
        x = x0.raw
        return eagerpy.astensor(x + epsilon / 2 * self.unit(gaussian(x)))

    def unit(self, drawn: Tensor) -> Tensor:
        """What is drawn, of size 1 in the norm."""
        raise NotImplementedError


class _LinfHalfway(_Halfway, foolbox.attacks.LinfPGD):
    def unit(self, drawn: Tensor) -> Tensor:
        return drawn.sign()


class _L2Halfway(_Halfway, foolbox.attacks.L2PGD):
    def unit(self, drawn: Tensor) -> Tensor:
        return drawn / torch.linalg.vector_norm(drawn.flatten(1), dim=1).view(-1, *itertools.repeat(1, drawn.dim() - 1))
