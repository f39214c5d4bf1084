"""How robust a classifier is, and whether that number can be believed.

    from haq.assessment import assess
    found = assess(network, images, labels, eps=8 / 255, attacks="standard", mean=..., std=...)
    found.clean, found.worst, found.masked, found.checks

The number is the share of images that no attack fools: the worst case over all attacks, image by image. The checks look for
signs that gradients are masked, in which case attacks that follow them find too little, and the number is an upper bound
(Athalye et al., ICML 2018; Carlini et al., "On Evaluating Adversarial Robustness", 2019).
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import quantizers as Q
from haq.attacks.evaluation_attacks import (
    ATTACK_BUDGETS,
    BLACK,
    NOISE,
    WHITE,
    Classifier,
    EvaluationAttack,
    cross_entropy,
    dlr_loss,
    noise,
    pgd,
    suite,
    zero_gradients,
)
from haq.attacks.threat_model import ThreatModel
from haq.store import npz
from haq.store.files import ROBUSTNESS_SCHEMA, write

BATCH, PIXELS = 125, 1 << 22  # images at a time, and numbers in them: what a backward pass needs is many times as much
SLACK = 0.002  # of the images: what AutoAttack lets a weaker attack find beyond a stronger one
CHANGED = 0.01  # of the images: what more steps, or a larger ball, may change the other way
RUNS, DIFFERENT = 5, 1e-4  # forward passes that are held against each other, and by how much normalised logits may differ
CURVE = (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of eps; `quick` takes every second
DRAWS = 10  # of noise, without bounds
CURVE_IMAGES, CURVE_STEPS = {"quick": 200, "standard": 500, "full": 1000}, 20
_PLAIN = (bool, int, float, str, tuple, Q.Scheme)  # attributes of modules that say how they compute

Given = tuple[Tensor, Tensor, Tensor]  # images, labels, and whether they are classified right


class Check(NamedTuple):
    """One sign of masked gradients that was looked for: what should hold, whether it does, and the figures."""

    name: str
    passed: bool
    figures: str


@dataclass(frozen=True)
class Assessment:
    """What `assess` found. Accuracies are shares, 0..1.

    clean, worst
        accuracy on the images as they are, and on the worst that all attacks together made of them.
    attacks
        accuracy under each single attack.
    checks, curve
        signs of masking; (eps, accuracy under PGD) on the first `curve_images`, until it is no better than chance.
    examples, fooled_by
        (N, C, H, W): for each image the first that fooled the network, or else the last that was tried; and the attack it is
        from: "nothing" where it was wrong to begin with, "" where all failed.
    right
        which images each attack left right, (N,) of bool.
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
        return "upper bound: gradients are masked" if self.masked else "worst case over all attacks"

    def summary(self) -> dict[str, Any]:
        """All but images, for JSON."""
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


def assess(
    network: nn.Module | Classifier,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = 8 / 255,
    norm: str = "linf",
    attacks: str = "standard",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    sources: Mapping[str, nn.Module] | None = None,
    backward: str = "ste",
    requantize: bool = False,
    seed: int = 0,
    folder: Path | None = None,
    on_progress: Callable[[float, float, str], None] = lambda done, total, note: None,
) -> Assessment:
    """Attack a classifier in every way that `attacks` names, and check the outcome for masked gradients.

    network: takes images minus mean, over std, and returns logits; or a `Classifier`, which has that inside.
    images, labels: float (N, C, H, W) in [0, 1], and int64 (N,).
    eps, norm: how far an attacker may go: `linf` or `l2`.
    attacks: quick, standard, full, or names divided by commas (`haq.attacks.evaluation_attacks`).
    sources: networks on the same inputs to transfer attacks from, by name.
    backward: how gradients pass the quantized inputs of layers (`evaluation_attacks.BACKWARD`). `hard` shows masking.
    requantize: the network is given images rounded to 8 bits.
    folder: where every finished attack is kept; the same call goes on from there.
    on_progress: told passes done and in all, and what is being done.

    Raises ValueError for images outside [0, 1], labels that don't fit, an eps on another scale, outputs that are probabilities
    or not finite, and a network that answers the same images differently from pass to pass.
    """
    threat = ThreatModel(eps, norm)

    def classifier(net: nn.Module) -> Classifier:
        return net if isinstance(net, Classifier) else Classifier(net, mean, std, requantize=requantize)

    victim = classifier(network)
    transferred = {name: classifier(source) for name, source in (sources or {}).items()}
    images, labels = images.to(victim.device), labels.to(victim.device)
    classes, spread = _check_input(victim, images, labels)
    plan = suite(attacks, victim, threat, classes, sources=transferred, backward=backward)
    asked = _asked(victim, transferred, images, labels, threat, attacks, backward, seed)
    clean = torch.cat([victim.right(x, y) for x, y in _batches(images, labels)])
    kept = _Kept(folder, asked, images, clean)
    few = min(CURVE_IMAGES.get(attacks, CURVE_IMAGES["standard"]), len(images))
    effort = ATTACK_BUDGETS.get(attacks, ATTACK_BUDGETS["standard"])
    # What is still to be done, in passes back and forth; the curve's are a guess, it ends at chance.
    curve_passes = CURVE_STEPS * few
    factors = CURVE[1::2] if attacks == "quick" else CURVE
    total = sum(attack.passes for attack in plan) * len(images) + (len(factors) + 2) * curve_passes + 3 * effort.steps * few
    progress = _Progress(total, on_progress)
    for attack in plan:
        progress.begin(attack.name, attack.passes * len(images))
        if attack.name not in kept.right:
            kept.add(attack.name, *_attacked(victim, attack, images, labels, clean, threat, seed, progress))
        progress.end()
    first = (images[:few], labels[:few], clean[:few])
    checking = _Checking(victim, threat, backward, classes, seed, progress, kept)
    curve = checking.curve(first, factors, curve_passes)
    right = {attack.name: kept.right[attack.name] for attack in plan}
    worst = torch.stack([clean, *right.values()]).all(0)
    checks = [
        *_compared(plan, right, clean),
        *checking.convergence(first, effort.steps),
        *checking.unbounded(first, curve_passes),
        *checking.monotone(curve),
        *checking.zero_gradients(images, labels, clean),
        checking.deterministic(kept.examples, spread),
    ]
    progress.finish()
    return Assessment(
        threat,
        attacks,
        backward,
        classes,
        seed,
        _share(clean),
        _share(worst),
        {name: _share(mask) for name, mask in right.items()},
        tuple(checks),
        tuple(curve),
        few,
        kept.examples,
        tuple(kept.fooled_by),
        right,
    )


def _check_input(victim: Classifier, images: Tensor, labels: Tensor) -> tuple[int, float]:
    """The number of classes, and how much logits differ from pass to pass. Raises ValueError."""
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images are float (N, C, H, W) in [0, 1], not {images.dtype} {tuple(images.shape)}: divide by 255")
    if len(images) == 0 or labels.shape != images.shape[:1]:
        raise ValueError(f"give as many labels as images, at least one; got {tuple(labels.shape)} and {len(images)} images")
    least, most = float(images.min()), float(images.max())
    if not (least >= 0 and most <= 1):
        raise ValueError(
            f"images reach from {least:.4g} to {most:.4g}; attacks need them in [0, 1]: divide by 255, and give mean and std"
        )
    x = images[: _batch(images)]
    runs = _runs(victim, x)
    logits = runs[0]
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"the network's outputs are logits (images, two classes or more), not {tuple(logits.shape)}")
    if not all(bool(run.isfinite().all()) for run in runs):
        raise ValueError("the network's outputs are not finite")
    classes = logits.shape[1]
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are int64, not {labels.dtype}")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"labels reach from {int(labels.min())} to {int(labels.max())}, the network has {classes} classes")
    if logits.min() >= 0 and bool(((logits.sum(1) - 1).abs() < 1e-5).all()):
        raise ValueError("the network's outputs are probabilities, whose gradients vanish: give it without its softmax")
    spread = _spread(runs)
    if spread > DIFFERENT:
        raise ValueError(
            f"the network answers the same images differently from pass to pass (by {spread:.2g} of its logits' size): take "
            "the randomness out, attacks would have to average over it"
        )
    if not victim(x[:1].clone().requires_grad_()).requires_grad:
        raise ValueError("no gradient passes through the network, not even zeros: something in it detaches its input")
    return classes, spread


@torch.no_grad()
def _runs(victim: Classifier, images: Tensor) -> list[Tensor]:
    return [victim(images) for _ in range(RUNS)]


def _spread(runs: Sequence[Tensor]) -> float:
    """How much logits differ from pass to pass, of their size."""
    scaled = torch.stack([run / torch.linalg.vector_norm(run, dim=1, keepdim=True).clamp_min(1e-12) for run in runs])
    return float((scaled - scaled[0]).norm(dim=2).max())


def _attacked(
    victim: Classifier,
    attack: EvaluationAttack,
    images: Tensor,
    labels: Tensor,
    clean: Tensor,
    threat: ThreatModel,
    seed: int,
    progress: _Progress,
) -> tuple[Tensor, Tensor]:
    """Which images an attack leaves right, (N,), and what it made of all that were right before."""
    right, found = clean.clone(), images.clone()
    base = zlib.crc32(f"{seed} {attack.name}".encode())  # so that what else is run changes nothing
    for number, index in enumerate(_indices(clean, _batch(images))):
        found[index] = attack.run(images[index], labels[index], threat, base + number)
        right[index] = victim.right(found[index], labels[index])
        progress.advance(len(index) / max(int(clean.sum()), 1))
    return right, found


def _compared(plan: Sequence[EvaluationAttack], right: Mapping[str, Tensor], clean: Tensor) -> Iterator[Check]:
    """What attacks of one kind find that stronger ones don't."""

    def left(knows: str) -> tuple[Tensor, str]:
        """Images that no attack of a kind fools, and which of them fools most."""
        names = [attack.name for attack in plan if attack.knows == knows]
        masks = [right[name] for name in names]
        return torch.stack([clean, *masks]).all(0), min(names, key=lambda name: _share(right[name]), default="")

    white, _ = left(WHITE)
    if "fgsm" in right and "pgd" in right:
        once, many = _share(right["fgsm"]), _share(right["pgd"])
        figures = f"{_percent(many)} under pgd, {_percent(once)} under fgsm"
        yield Check("many steps are at least as strong as one", many <= once + SLACK, figures)
    weaker = ((BLACK, "gradients find what black boxes and transfer find"), (NOISE, "gradients find what noise finds"))
    for knows, name in weaker:
        mask, strongest = left(knows)
        if strongest and any(attack.knows == WHITE for attack in plan):
            before, after = _share(white), _share(white & mask)
            figures = f"{_percent(before)} left by gradients, {_percent(after)} by {strongest} and the like as well"
            yield Check(name, before - after <= SLACK + 1e-9, figures)


class _Checking:
    """Attacks that are run for what they say about the others."""

    def __init__(
        self,
        victim: Classifier,
        threat: ThreatModel,
        backward: str,
        classes: int,
        seed: int,
        progress: _Progress,
        kept: _Kept,
    ) -> None:
        self.victim, self.threat, self.backward, self.classes = victim, threat, backward, classes
        self.seed, self.progress, self.kept = seed, progress, kept

    def accuracy(self, given: Given, eps: float, steps: int, *, noisy: bool = False) -> float:
        """Accuracy under PGD, and noise if `noisy`, in another ball or with other steps."""
        images, labels, clean = given
        right, threat = clean.clone(), ThreatModel(eps, self.threat.norm)
        mode = "ste" if self.backward == "twin" else self.backward
        for number, index in enumerate(_indices(clean, _batch(images))):
            x, y = images[index], labels[index]
            with torch.random.fork_rng(), Q.backward_mode(self.victim.network, mode):
                torch.manual_seed(self.seed + number)
                tried = [pgd(self.victim, x, y, threat, steps=steps)]
                tried += [noise(self.victim, x, y, threat, DRAWS)] if noisy else []
            for found in tried:
                right[index] &= self.victim.right(found, y)
        return _share(right)

    def curve(self, given: Given, factors: Sequence[float], passes: float) -> list[tuple[float, float]]:
        """Accuracy against eps, from 0 until it is no better than chance."""
        points = [(0.0, _share(given[2]))]
        for factor in factors:
            eps = min(factor * self.threat.eps, self.everything(given[0]))
            self.progress.begin(f"eps {eps:.3f}", passes)
            value = self.kept.figure(f"curve {factor}", partial(self.accuracy, given, eps, CURVE_STEPS))
            self.progress.end()
            points.append((eps, value))
            if value <= 1 / self.classes or eps == self.everything(given[0]):
                break
        return points

    def everything(self, images: Tensor) -> float:
        """The eps within which any image can become grey."""
        return 0.5 if self.threat.norm == "linf" else 0.5 * math.sqrt(images[0].numel())

    def convergence(self, given: Given, steps: int) -> Iterator[Check]:
        self.progress.begin("twice the steps", 3 * steps * len(given[0]))
        once, twice = (
            self.kept.figure(f"steps {count}", partial(self.accuracy, given, self.threat.eps, count))
            for count in (steps, 2 * steps)
        )
        self.progress.end()
        figures = f"{_percent(once)} after {steps}, {_percent(twice)} after {2 * steps}, of {len(given[0])} images"
        yield Check("twice the steps change nothing", once - twice <= CHANGED + 1e-9, figures)

    def unbounded(self, given: Given, passes: float) -> Iterator[Check]:
        eps, chance = self.everything(given[0]), 1 / self.classes
        self.progress.begin("no bounds", passes)
        value = self.kept.figure("unbounded", partial(self.accuracy, given, eps, CURVE_STEPS, noisy=True))
        self.progress.end()
        yield Check(
            "without bounds it succeeds", value <= chance, f"{_percent(value)} at eps {eps:.3g}, chance {_percent(chance)}"
        )

    def monotone(self, curve: Sequence[tuple[float, float]]) -> Iterator[Check]:
        rises = [(after - before, eps) for (_, before), (eps, after) in itertools.pairwise(curve)]
        most, eps = max(rises)
        figures = "falls throughout" if most <= 0 else f"accuracy rises by {100 * most:.1f} points at eps {eps:.3g}"
        yield Check("more room, more success", most <= CHANGED + 1e-9, figures)

    def zero_gradients(self, images: Tensor, labels: Tensor, clean: Tensor) -> Iterator[Check]:
        """AutoAttack's check: on the DLR loss, which saturates for nobody; with two classes on the cross-entropy."""
        loss = dlr_loss if self.classes >= 3 else cross_entropy
        mode = "ste" if self.backward == "twin" else self.backward
        none = 0
        for index in _indices(clean, _batch(images)):
            with Q.backward_mode(self.victim.network, mode):
                none += int(zero_gradients(self.victim, images[index], labels[index], loss).sum())
        count = max(int(clean.sum()), 1)
        yield Check("no gradient is zero", none == 0, f"{_percent(none / count)} of images without any")

    def deterministic(self, examples: Tensor, spread: float) -> Check:
        """On what attacks made; a network that differs on the images themselves was refused."""
        most = max(spread, _spread(_runs(self.victim, examples[: _batch(examples)])))
        return Check("logits are deterministic", most <= DIFFERENT, f"differ by {most:.1g} over {RUNS} passes")


class _Kept:
    """What is finished: in memory, and in a file of its own for what was asked, without pickle."""

    def __init__(self, folder: Path | None, asked: str, images: Tensor, clean: Tensor) -> None:
        self.path = None if folder is None else folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.npz"
        self.right: dict[str, Tensor] = {}
        self.figures: dict[str, float] = {}
        self.examples, self.fooled_by = images.clone(), ["" if right else "nothing" for right in clean]
        if self.path is not None and self.path.exists():
            try:
                self._read(self.path)
            except (ValueError, OSError, LookupError, EOFError, TypeError) as error:
                raise ValueError(f"{self.path} can't be gone on from ({error}): delete it") from error

    def add(self, name: str, right: Tensor, found: Tensor) -> None:
        for i in range(len(right)):
            if not self.fooled_by[i]:
                # Those that hold keep the last that was tried.
                self.examples[i] = found[i]
                self.fooled_by[i] = "" if right[i] else name
        self.right[name] = right
        self._write()

    def figure(self, name: str, measure: Callable[[], float]) -> float:
        if name not in self.figures:
            self.figures[name] = measure()
            self._write()
        return self.figures[name]

    def _read(self, path: Path) -> None:
        names = {"examples", "fooled_by", "attacks", "right", "figures", "values"}
        file = npz.read(path, names, 2 * self.examples.numel() * self.examples.element_size() + 2**24)
        images, attacks = self.examples, len(file["attacks"])
        expected: dict[str, tuple[str, tuple[int, ...]]] = {
            "examples": ("f", tuple(images.shape)),
            "fooled_by": ("U", (len(images),)),
            "attacks": ("U", (attacks,)),
            "right": ("b", (attacks, len(images))),
            "figures": ("U", (len(file["figures"]),)),
            "values": ("f", (len(file["figures"]),)),
        }
        for name, (kind, shape) in expected.items():
            if (file[name].dtype.kind, file[name].shape) != (kind, shape):
                raise ValueError(f"{name} is {file[name].dtype} of shape {file[name].shape}")
            if kind == "f" and not np.isfinite(file[name]).all():
                raise ValueError(f"{name} has values that are not finite")
        self.examples = torch.tensor(file["examples"]).to(self.examples)
        self.fooled_by = [str(name) for name in file["fooled_by"]]
        self.figures = dict(zip(map(str, file["figures"]), map(float, file["values"]), strict=True))
        for number, name in enumerate(map(str, file["attacks"])):
            self.right[name] = torch.tensor(file["right"][number]).to(self.examples.device)

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        masks = [mask.cpu().numpy() for mask in self.right.values()]
        np.savez(
            file,
            examples=self.examples.cpu().numpy(),
            fooled_by=np.array(self.fooled_by),
            attacks=np.array(list(self.right), dtype=str),
            right=np.array(masks, bool).reshape(len(masks), len(self.fooled_by)),
            figures=np.array(list(self.figures), dtype=str),
            values=np.array(list(self.figures.values()), float),
        )
        write(self.path, file.getvalue())


class _Progress:
    """Passes done, told as attacks go on."""

    def __init__(self, total: float, told: Callable[[float, float, str], None]) -> None:
        self.total, self.told = total, told
        self.done = self.before = self.size = 0.0
        self.note = ""

    def begin(self, note: str, size: float) -> None:
        self.note, self.before, self.size = note, self.done, size
        self.told(self.done, self.total, note)

    def advance(self, share: float) -> None:
        self.done = min(self.done + share * self.size, self.before + self.size)
        self.told(self.done, self.total, self.note)

    def end(self) -> None:
        self.done = self.before + self.size
        self.told(self.done, self.total, self.note)

    def finish(self) -> None:
        self.told(self.total, self.total, "")


def _asked(
    victim: Classifier,
    sources: Mapping[str, Classifier],
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    attacks: str,
    backward: str,
    seed: int,
) -> str:
    """All that the outcome depends on, in words and hashes."""

    def signature(classifier: Classifier) -> str:
        network = classifier.network
        digest = hashlib.sha256(repr(sorted(Q.get_policy(network).items())).encode() if Q.quant_layers(network) else b"")
        for key, tensor in sorted({**classifier.state_dict(), **Q.quantizer_state(network)}.items()):
            digest.update(key.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        # What state_dict doesn't tell: strides, slopes, temperatures, options of schemes.
        for name, module in network.named_modules():
            options = {key: value for key, value in vars(module).items() if isinstance(value, _PLAIN)}
            kept = sorted((key, value) for key, value in options.items() if key != "backward_mode")
            digest.update(repr((name, type(module).__name__, kept)).encode())
        digest.update(repr(classifier.requantize).encode())
        return digest.hexdigest()

    data = hashlib.sha256(images.cpu().contiguous().numpy().tobytes() + labels.cpu().numpy().tobytes()).hexdigest()
    networks = {"": signature(victim)} | {name: signature(source) for name, source in sources.items()}
    return json.dumps([ROBUSTNESS_SCHEMA, networks, data, asdict(threat), attacks, backward, seed, torch.__version__])


def _batch(images: Tensor) -> int:
    """How many images are looked at together."""
    return min(BATCH, max(1, PIXELS // images[0].numel()))


def _indices(mask: Tensor, size: int) -> tuple[Tensor, ...]:
    """Where a mask is true, in batches."""
    where = mask.nonzero()[:, 0]
    return where.split(size) if len(where) else ()


def _batches(images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = _batch(images)
    return zip(images.split(size), labels.split(size), strict=True)


def _share(mask: Tensor) -> float:
    return float(mask.double().mean())


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
