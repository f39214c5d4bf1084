"""Signs that gradients are masked, in which case attacks that follow them find too little.

Athalye et al., "Obfuscated Gradients Give a False Sense of Security", ICML 2018; Carlini et al., "On Evaluating Adversarial
Robustness", 2019.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import quantizers as Q
from haq.attacks.base import BLACK, NOISE, WHITE, EvaluationAttack, seeded
from haq.attacks.batches import batch_size, batches_where, share
from haq.attacks.bookkeeping import FinishedAttacks, PassProgress
from haq.attacks.classifier import Classifier, JoinedMembers
from haq.attacks.evaluation_attacks import noise, pgd, training_mode
from haq.attacks.losses import cross_entropy, dlr_loss, zero_gradients
from haq.attacks.threat_model import ThreatModel
from haq.store.units import counted, percent

SLACK = 0.002  # of the images: what AutoAttack lets a weaker attack find beyond a stronger one
CHANGED = 0.01  # of the images: what more steps, or a larger ball, may change the other way
ROUNDING = 1e-9  # of a difference of two shares
RUNS = 5  # forward passes that are held against each other
DIFFERENT = 1e-4  # by how much normalised logits may differ from pass to pass
CURVE = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of eps; `quick` takes every second
CURVE_STEPS = 20
CURVE_IMAGES = {"quick": 200, "standard": 500, "full": 1000}
DRAWS = 10  # of noise, without bounds
STEPS = "steps "  # begins the names of figures of PGD at the eps that is asked for


FOLLOWED = "an attack follows gradients"
ENOUGH = "the attacks find what plain PGD finds"
MEMBERS = "the attacks find what PGD on its members finds"


class Check(NamedTuple):
    """One sign of masked gradients that was looked for: what should hold, whether it does, and the figures."""

    name: str
    passed: bool
    figures: str


class Labelled(NamedTuple):
    """Images with their labels, and whether they are classified right as they are."""

    images: Tensor
    labels: Tensor
    clean: Tensor

    def first(self, count: int) -> Labelled:
        """Return the first of them."""
        return Labelled(self.images[:count], self.labels[:count], self.clean[:count])


def compare_kinds(plan: Sequence[EvaluationAttack], right: Mapping[str, Tensor], clean: Tensor) -> Iterator[Check]:
    """Check that weaker attacks find no more than stronger ones.

    Args:
        plan: The attacks that were run.
        right: Which images each of them left right, by its name, (N,) of bool.
        clean: Which images were right to begin with.

    Yields:
        The checks for which there is something to compare.
    """
    if "fgsm" in right and "pgd" in right:
        once = share(right["fgsm"])
        many = share(right["pgd"])
        figures = f"{percent(many, 1)} under pgd, {percent(once, 1)} under fgsm"
        yield Check("many steps are at least as strong as one", many <= once + SLACK, figures)
    names = {kind: [attack.name for attack in plan if attack.knows == kind] for kind in (WHITE, BLACK, NOISE)}
    if not names[WHITE]:
        yield Check(FOLLOWED, False, f"none of {', '.join(right)} does")
        return
    by_gradients = left_right(names[WHITE], right, clean)
    weaker = {BLACK: "gradients find what black boxes and transfer find", NOISE: "gradients find what noise finds"}
    for kind, sentence in weaker.items():
        if not names[kind]:
            continue
        strongest = min(names[kind], key=lambda name: share(right[name]))
        before = share(by_gradients)
        after = share(by_gradients & left_right(names[kind], right, clean))
        figures = f"{percent(before, 1)} left by gradients, {percent(after, 1)} by {strongest} and the like as well"
        yield Check(sentence, before - after <= SLACK + ROUNDING, figures)


def left_right(names: Sequence[str], right: Mapping[str, Tensor], clean: Tensor) -> Tensor:
    """Return which images none of some attacks fools, (N,) of bool.

    Args:
        names: The attacks.
        right: What each attack leaves, (N,) of bool.
        clean: What is right without attack, likewise.

    Returns:
        (N,) of bool.
    """
    masks = [right[name] for name in names]
    return torch.stack([clean, *masks]).all(0)


@dataclass(frozen=True, eq=False)
class MaskingChecks:
    """Attacks that are run for what they say about the others.

    Attributes:
        victim: The network that is attacked.
        threat: What the attacker may do.
        backward: How gradients pass quantized inputs, one of `base.BACKWARD`.
        classes: How many the victim tells apart.
        seed: Of random starts and noise.
        progress: What is told.
        finished: Where figures are kept.
    """

    victim: Classifier
    threat: ThreatModel
    backward: str
    classes: int
    seed: int
    progress: PassProgress
    finished: FinishedAttacks

    def accuracy(
        self, given: Labelled, eps: float, steps: int, *, noisy: bool = False, model: nn.Module | None = None
    ) -> float:
        """Measure accuracy under PGD in another ball or with other steps.

        Args:
            given: The images.
            eps: The size of the ball.
            steps: Of PGD.
            noisy: Whether noise is tried as well.
            model: What PGD follows the gradients of; None: the victim.

        Returns:
            The share that is left right, 0..1.
        """
        if model is None:
            model = self.victim
        right = given.clean.clone()
        threat = ThreatModel(eps, self.threat.norm)
        mode = training_mode(self.backward)
        for number, index in enumerate(batches_where(given.clean, given.images)):
            x, y = given.images[index], given.labels[index]
            with seeded(self.seed + number, x.device), Q.backward_mode(self.victim.network, mode):
                tried = [pgd(model, x, y, threat, steps=steps)]
                if noisy:
                    tried.append(noise(self.victim, x, y, threat, DRAWS))
            for found in tried:
                right[index] &= self.victim.right(found, y)
        return share(right)

    def curve(self, given: Labelled, factors: Sequence[float], passes: float) -> list[tuple[float, float]]:
        """Measure accuracy against eps, from 0 until it is no better than chance.

        Args:
            given: The images.
            factors: Of eps.
            passes: What a point costs.

        Returns:
            Pairs of eps and accuracy.
        """
        everything = self.everything(given.images)
        points = [(0.0, share(given.clean))]
        for factor in factors:
            eps = min(factor * self.threat.eps, everything)
            self.progress.begin(f"eps {eps:.3f}", passes)
            value = self.finished.figure(f"curve {factor}", partial(self.accuracy, given, eps, CURVE_STEPS))
            self.progress.end()
            points.append((eps, value))
            if value <= 1 / self.classes or eps == everything:
                break
        return points

    def everything(self, images: Tensor) -> float:
        """Return the eps within which any image can become grey."""
        if self.threat.norm == "linf":
            return 0.5
        return 0.5 * math.sqrt(images[0].numel())

    def convergence(self, given: Labelled, steps: int) -> Check:
        """Check that twice the steps find nothing more."""
        self.progress.begin("twice the steps", 3 * steps * len(given.images))
        accuracies = []
        for count in (steps, 2 * steps):
            measure = partial(self.accuracy, given, self.threat.eps, count)
            accuracies.append(self.finished.figure(f"{STEPS}{count}", measure))
        self.progress.end()
        once, twice = accuracies
        images = counted(len(given.images), "images")
        figures = f"{percent(once, 1)} after {steps}, {percent(twice, 1)} after {2 * steps}, of {images}"
        return Check("twice the steps change nothing", once - twice <= CHANGED + ROUNDING, figures)

    def enough(self, suite: Tensor, curve: Sequence[tuple[float, float]]) -> Check:
        """Check that PGD of the curve and of `convergence`, on these images, finds no more than all attacks together.

        Args:
            suite: Which of the first images all attacks left right, (N,) of bool.
            curve: What `curve` found on them.

        Returns:
            The check.
        """
        left = share(suite)
        within = [value for eps, value in curve if eps <= self.threat.eps * (1 + ROUNDING)]
        least = min(*within, *(value for name, value in self.finished.figures.items() if name.startswith(STEPS)))
        figures = (
            f"{percent(left, 1)} left by all attacks, {percent(least, 1)} by plain PGD, of {counted(len(suite), 'images')}"
        )
        return Check(ENOUGH, left - least <= ROUNDING, figures)

    def members(self, given: Labelled, suite: Tensor, passes: float) -> Iterator[Check]:
        """Check that PGD on the sum of all members' logits finds no more, where the network is of several.

        A vote hides its members' gradients: there is none where one member is sure of its answer.

        Args:
            given: The images.
            suite: Which of them all attacks left right, (N,) of bool.
            passes: What it costs.

        Yields:
            The check, for a network of members.
        """
        joined = JoinedMembers.of(self.victim, given.images[:1], self.classes)
        if joined is None:
            return
        self.progress.begin("its members", passes)
        measure = partial(self.accuracy, given, self.threat.eps, CURVE_STEPS, model=joined)
        found = self.finished.figure("members", measure)
        self.progress.end()
        left = share(suite)
        images = counted(len(suite), "images")
        figures = f"{percent(left, 1)} left by all attacks, {percent(found, 1)} by that, of {images}"
        yield Check(MEMBERS, left - found <= ROUNDING, figures)

    def unbounded(self, given: Labelled, passes: float) -> Check:
        """Check that everything can be fooled where any image is allowed; `passes` is what that costs."""
        eps = self.everything(given.images)
        chance = 1 / self.classes
        self.progress.begin("no bounds", passes)
        value = self.finished.figure("unbounded", partial(self.accuracy, given, eps, CURVE_STEPS, noisy=True))
        self.progress.end()
        figures = f"{percent(value, 1)} at eps {eps:.3g}, chance {percent(chance, 1)}"
        return Check("without bounds it succeeds", value <= chance, figures)

    def monotone(self, curve: Sequence[tuple[float, float]]) -> Check:
        """Check that accuracy never rises with eps."""
        changes = [(after - before, eps) for (_, before), (eps, after) in itertools.pairwise(curve)]
        most, eps = max(changes)
        figures = "falls throughout"
        if most > 0:
            figures = f"accuracy rises by {100 * most:.1f} points at eps {eps:.3g}"
        return Check("more room, more success", most <= CHANGED + ROUNDING, figures)

    def zero_gradients(self, given: Labelled) -> Check:
        """Check, as AutoAttack does, that no gradient of the DLR loss is zero everywhere: it saturates for nobody.

        With two classes it is the cross-entropy's. NaN counts as zero.
        """
        loss = dlr_loss if self.classes >= 3 else cross_entropy
        mode = training_mode(self.backward)
        without = 0
        for index in batches_where(given.clean, given.images):
            with Q.backward_mode(self.victim.network, mode):
                zero = zero_gradients(self.victim.logits, given.images[index], given.labels[index], loss)
            without += int(zero.sum())
        count = max(int(given.clean.sum()), 1)
        return Check("no gradient is zero", without == 0, f"{percent(without / count, 1)} of images without any")

    def deterministic(self, examples: Tensor, spread: float) -> Check:
        """Check that logits don't differ from pass to pass.

        Args:
            examples: What attacks made; a network that differs on the images themselves was refused.
            spread: What `logit_spread` was on those.

        Returns:
            The check.
        """
        found = logit_spread(repeat(self.victim, examples[: batch_size(examples)]))
        most = max(spread, found)
        return Check("logits are deterministic", most <= DIFFERENT, f"differ by {most:.1g} over {RUNS} passes")


@torch.no_grad()
def repeat(victim: Classifier, images: Tensor) -> list[Tensor]:
    """Return the logits of several passes over the same images."""
    return [victim(images) for _ in range(RUNS)]


def logit_spread(runs: Sequence[Tensor]) -> float:
    """Return how much logits differ from pass to pass, of their size."""
    scaled = [run / torch.linalg.vector_norm(run, dim=1, keepdim=True).clamp_min(1e-12) for run in runs]
    stacked = torch.stack(scaled)
    return float((stacked - stacked[0]).norm(dim=2).max())
