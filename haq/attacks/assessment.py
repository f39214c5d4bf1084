"""How robust a classifier is, and whether that number can be believed.

    from haq.attacks import assess
    found = assess(network, images, labels, eps=8 / 255, attacks="standard", mean=..., std=...)
    found.clean, found.worst, found.masked, found.checks

The number is the share of images that no attack fools: the worst case over all attacks, image by image. The checks look for
signs that gradients are masked, in which case the number is an upper bound; see `haq.attacks.masking`.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantizers as Q
from haq.attacks import masking
from haq.attacks.base import ATTACK_BUDGETS, EvaluationAttack, effort_of
from haq.attacks.batches import batch_size, batches, batches_where, share
from haq.attacks.bookkeeping import FinishedAttacks, OnProgress, PassProgress
from haq.attacks.classifier import Classifier
from haq.attacks.masking import Check, Labelled, MaskingChecks
from haq.attacks.suite import suite
from haq.attacks.threat_model import ThreatModel
from haq.data.labels import class_numbers
from haq.store.files import ROBUSTNESS_SCHEMA
from hw_models.registry import printable

MOST_SEEDS = 2**32
_PLAIN = (bool, int, float, str, tuple, Q.Scheme)  # attributes of modules that say how they compute


@dataclass(frozen=True)
class Assessment:
    """What `assess` found. Accuracies are shares, 0..1.

    Attributes:
        threat: What the attacker might do.
        effort: What was asked for: an effort, or names of attacks.
        backward: How gradients passed quantized inputs.
        classes: How many the network tells apart.
        seed: Of all that is random.
        clean: Accuracy on the images as they are.
        worst: Accuracy on the worst that all attacks together made of them.
        attacks: Accuracy under each single attack.
        checks: Signs of masking that were looked for.
        curve: Pairs of eps and accuracy under PGD on the first `curve_images`, until it is no better than chance.
        curve_images: How many.
        examples: (N, C, H, W): for each image the first that fooled the network, or else the last that was tried.
        fooled_by: The attack that each example is from: "nothing" where it was wrong to begin with, "" where all failed.
        right: Which images each attack left right, (N,) of bool.
    """

    threat: ThreatModel
    effort: str
    backward: str
    classes: int
    seed: int
    clean: float
    worst: float
    attacks: dict[str, float]
    checks: tuple[Check, ...]
    curve: tuple[tuple[float, float], ...]
    curve_images: int
    examples: Tensor = field(repr=False)
    fooled_by: tuple[str, ...] = field(repr=False)
    right: dict[str, Tensor] = field(repr=False)

    @property
    def masked(self) -> bool:
        """Whether any check fails."""
        return not all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        """What the number is, in words."""
        failed = {check.name for check in self.checks if not check.passed}
        if not failed:
            return "worst case over all attacks"
        if masking.FOLLOWED in failed:
            return "upper bound: no attack that was asked for follows gradients"
        if failed == {masking.ENOUGH}:
            return "upper bound: plain PGD finds more than the attacks that were asked for"
        return "upper bound: gradients are masked"

    def summary(self) -> dict[str, Any]:
        """Return all but images, for JSON.

        Returns:
            Plain data by name; sizes are on the scale of images in [0, 1], accuracies are shares.
        """
        left_out = ("examples", "fooled_by", "right", "checks")
        made = {key: value for key, value in self.__dict__.items() if key not in left_out}
        return {
            **made,
            "threat": asdict(self.threat),
            "images": len(self.examples),
            "masked": self.masked,
            "verdict": self.verdict,
            "checks": [check._asdict() for check in self.checks],
        }


def _say_nothing(done: float, total: float, note: str) -> None:
    """Nobody follows the progress."""


@torch.inference_mode(False)
@torch.enable_grad()
def assess(
    network: nn.Module | Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float | str = 8 / 255,
    norm: str = "linf",
    attacks: str = "standard",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    sources: Mapping[str, nn.Module] | None = None,
    backward: str = "ste",
    requantize: bool = False,
    seed: int = 0,
    folder: str | Path | None = None,
    on_progress: OnProgress = _say_nothing,
) -> Assessment:
    """Attack a classifier in every way that `attacks` names, and check the outcome for masked gradients.

    Args:
        network: Takes images minus mean, over std, and returns logits; or a `Classifier`, which has that inside.
        images: Float (N, C, H, W) in [0, 1], which become float32.
        labels: Class numbers, integers of any type, (N,).
        eps: How far an attacker may go: a number, or a text such as "8/255".
        norm: In which norm: `linf` or `l2`.
        attacks: `quick`, `standard`, `full`, names of attacks (`haq.attacks.ATTACKS`), or both, divided by commas.
        mean: Of every channel, on the scale of images in [0, 1].
        std: Of every channel, likewise.
        sources: Networks on the same inputs to transfer attacks from, by name.
        backward: How gradients pass the quantized inputs of layers (`haq.attacks.base.BACKWARD`). `hard` shows masking.
        requantize: Whether the network is given images rounded to 8 bits.
        seed: Of all that is random.
        folder: Where every finished attack is kept; the same call goes on from there.
        on_progress: Told passes done and in all, and what is being done.

    Returns:
        Accuracies, checks, and the worst images.

    Raises:
        TypeError: For a network, images, sources or attacks of another type.
        ValueError: For images outside [0, 1], labels that don't fit, an eps on another scale, outputs that are probabilities
            or not finite, and a network that answers the same images differently from pass to pass.
    """
    threat = ThreatModel(eps, norm)  # type: ignore[arg-type]
    _check_types(network, images, {} if sources is None else sources, seed)
    victim = _classifier(network, mean, std, requantize)
    others = {name: _classifier(source, mean, std, requantize) for name, source in (sources or {}).items()}
    _check_images(images)
    images = images.detach().to(victim.device, torch.float32)
    labels = class_numbers(labels, "`labels`").to(victim.device)
    classes, spread = _check_input(victim, images, labels)
    plan = suite(attacks, victim, threat, classes, sources=others, backward=backward)
    clean = torch.cat([victim.right(x, y) for x, y in batches(images, labels)])
    given = Labelled(images, labels, clean)
    asked = _asked(plan, victim, others, given, threat, attacks, backward, seed)
    if folder is not None:
        folder = Path(folder)
    finished = FinishedAttacks(folder, asked, images, clean)

    effort = effort_of(attacks)
    steps = ATTACK_BUDGETS[effort].steps
    few = min(masking.CURVE_IMAGES[effort], len(images))
    factors: Sequence[float] = masking.CURVE
    if effort == "quick":
        factors = factors[1::2]
    # In passes back and forth; the curve's are a guess, it ends at chance.
    curve_passes = masking.CURVE_STEPS * few
    total = sum(attack.passes for attack in plan) * len(images) + (len(factors) + 2) * curve_passes + 3 * steps * few
    progress = PassProgress(total, on_progress)

    for attack in plan:
        progress.begin(attack.name, attack.passes * len(images))
        if attack.name not in finished.right:
            right, found = run_attack(attack, given, seed, progress)
            finished.add(attack.name, right, found)
        progress.end()

    first = given.first(few)
    checking = MaskingChecks(victim, threat, backward, classes, seed, progress, finished)
    curve = checking.curve(first, factors, curve_passes)
    left = {attack.name: finished.right[attack.name] for attack in plan}
    suite_left = masking.left_right(list(left), left, clean)
    checks = (
        *masking.compare_kinds(plan, left, clean),
        checking.convergence(first, steps),
        checking.enough(suite_left[:few], curve),
        *checking.members(first, suite_left[:few], curve_passes),
        checking.unbounded(first, curve_passes),
        checking.monotone(curve),
        checking.zero_gradients(given),
        checking.deterministic(finished.examples, spread),
    )
    progress.finish()
    return Assessment(
        threat=threat,
        effort=attacks,
        backward=backward,
        classes=classes,
        seed=seed,
        clean=share(clean),
        worst=share(suite_left),
        attacks={name: share(mask) for name, mask in left.items()},
        checks=checks,
        curve=tuple(curve),
        curve_images=few,
        examples=finished.examples.cpu(),
        fooled_by=tuple(finished.fooled_by),
        right={name: mask.cpu() for name, mask in left.items()},
    )


def _classifier(network: nn.Module, mean: Sequence[float], std: Sequence[float], requantize: bool) -> Classifier:
    if isinstance(network, Classifier):
        return network
    return Classifier(network, mean, std, requantize=requantize)


def _check_types(network: object, images: object, sources: object, seed: object) -> None:
    """Raise TypeError, in one sentence, for what is of another type, and ValueError for a seed that is none."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images are a {type(images).__name__}; they must be a torch.Tensor, float (N, C, H, W) in [0, 1]")
    if not isinstance(sources, Mapping):
        raise TypeError(f"sources are a {type(sources).__name__}; they must map names to networks")
    for name, one in {"network": network, **{f"source {name!r}": one for name, one in sources.items()}}.items():
        if not isinstance(one, nn.Module):
            raise TypeError(f"{name} is a {type(one).__name__}; it must be a torch.nn.Module")
    if isinstance(seed, bool) or not isinstance(seed, int) or abs(seed) >= MOST_SEEDS:
        raise ValueError(f"seed is {seed!r}; it must be an integer below {MOST_SEEDS}")


def _check_input(victim: Classifier, images: Tensor, labels: Tensor) -> tuple[int, float]:
    """Return the number of classes, and how much logits differ from pass to pass. Raise ValueError for nonsense."""
    if 0 in images.shape[1:]:
        raise ValueError(f"images of shape {tuple(images.shape)} have no pixels")
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(f"give as many labels as images, at least one; got {tuple(labels.shape)} and {len(images)} images")
    least = float(images.min())
    most = float(images.max())
    if not (least >= 0 and most <= 1):
        raise ValueError(
            f"images reach from {least:.4g} to {most:.4g}; attacks need them in [0, 1]: divide by 255, and give mean and std"
        )
    if victim.channels not in (1, images.shape[1]):
        raise ValueError(
            f"mean and std are of {victim.channels} channels, the images have {images.shape[1]}: give as many, or one"
        )
    x = images[: batch_size(images)]
    runs = _first_answers(victim, x)
    classes = _check_logits(runs)
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels reach from {int(labels.min())} to {int(labels.max())}, the network has {classes} classes")
    if runs[0].min() >= 0 and bool(((runs[0].sum(1) - 1).abs() < 1e-5).all()):
        raise ValueError("the network's outputs are probabilities, whose gradients vanish: give it without its softmax")
    spread = masking.logit_spread(runs)
    if spread > masking.DIFFERENT:
        raise ValueError(
            f"the network answers the same images differently from pass to pass (by {spread:.2g} of its logits' size): take "
            "the randomness out, attacks would have to average over it"
        )
    _check_gradient(victim, x[:1])
    return classes, spread


def _first_answers(victim: Classifier, images: Tensor) -> list[Tensor]:
    """Return the logits of several passes. Raises ValueError for a network that can't take such images."""
    try:
        return masking.repeat(victim, images)
    except ValueError:
        raise
    except Exception as error:  # whatever somebody's network raises
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split()))
        raise ValueError(f"the network can't compute float32 images of shape {tuple(images.shape)} ({reason})") from error


def _check_gradient(victim: Classifier, image: Tensor) -> None:
    image = image.clone().requires_grad_()
    logits = victim(image)
    if not logits.requires_grad:
        raise ValueError("no gradient passes through the network, not even zeros: something in it detaches its input")
    try:
        torch.autograd.grad(logits.sum(), image)
    except RuntimeError as error:
        raise ValueError(f"no gradient passes through the network: {str(error).splitlines()[0]}") from error


def _check_images(images: Tensor) -> None:
    if images.layout != torch.strided or images.is_nested or images.is_meta:
        raise ValueError("images are a sparse, nested or meta tensor; they must be a dense one, with its numbers in memory")
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images are float (N, C, H, W) in [0, 1], not {images.dtype} {tuple(images.shape)}: divide by 255")


def _check_logits(runs: Sequence[Tensor]) -> int:
    """Return the number of classes."""
    logits = runs[0]
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"the network's outputs are logits (images, two classes or more), not {tuple(logits.shape)}")
    if not all(bool(run.isfinite().all()) for run in runs):
        raise ValueError("the network's outputs are not finite")
    return logits.shape[1]


def run_attack(attack: EvaluationAttack, given: Labelled, seed: int, progress: PassProgress) -> tuple[Tensor, Tensor]:
    """Run an attack on all images that are right as they are.

    Args:
        attack: Made for its victim.
        given: The images.
        seed: Of all that is random; what else is run changes nothing.
        progress: What is told.

    Returns:
        Which images the attack leaves right, (N,) of bool, and what it made of all that were right before, (N, C, H, W).
    """
    right = given.clean.clone()
    found = given.images.clone()
    base = zlib.crc32(f"{seed} {attack.name}".encode())
    count = max(int(given.clean.sum()), 1)
    for number, index in enumerate(batches_where(given.clean, given.images)):
        labels = given.labels[index]
        found[index] = attack.run(given.images[index], labels, base + number)
        right[index] = attack.victim.right(found[index], labels)
        progress.advance(len(index) / count)
    return right, found


def _asked(
    plan: Sequence[EvaluationAttack],
    victim: Classifier,
    sources: Mapping[str, Classifier],
    given: Labelled,
    threat: ThreatModel,
    attacks: str,
    backward: str,
    seed: int,
) -> str:
    """Return all that the outcome depends on, in words and hashes."""
    images = given.images.cpu().contiguous().numpy().tobytes()
    data = hashlib.sha256(images + given.labels.cpu().numpy().tobytes()).hexdigest()
    networks = {"": _signature(victim)}
    for name, source in sources.items():
        networks[name] = _signature(source)
    # What somebody else's attack finds may change with its file; ours are told by the schema.
    foreign = {attack.name: attack.code() for attack in plan if not type(attack).__module__.startswith("haq.")}
    asked = [ROBUSTNESS_SCHEMA, networks, data, asdict(threat), attacks, foreign, backward, seed, torch.__version__]
    if victim.device.type != "cpu":
        asked.append(victim.device.type)
    return json.dumps(asked)


def _signature(classifier: Classifier) -> str:
    """Return a hash of all that a classifier's logits depend on."""
    network = classifier.network
    digest = hashlib.sha256()
    if Q.quant_layers(network):
        digest.update(repr(sorted(Q.get_policy(network).items())).encode())
    for key, tensor in sorted({**classifier.state_dict(), **Q.quantizer_state(network)}.items()):
        digest.update(key.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    # What state_dict doesn't tell: strides, slopes, temperatures, options of schemes.
    for name, module in network.named_modules():
        options = {key: value for key, value in vars(module).items() if isinstance(value, _PLAIN)}
        kept = sorted((key, value) for key, value in options.items() if key != "backward_mode")
        digest.update(repr((name, type(module).__name__, kept)).encode())
    digest.update(repr(classifier.requantize).encode())
    return digest.hexdigest()
