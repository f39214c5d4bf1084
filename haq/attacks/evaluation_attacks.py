"""Attacks on classifiers of images in [0, 1], within a ball around each image: foolbox's and pyautoattack's, and what neither
has (R+FGSM, PGD on the DLR loss and with temperatures, noise of signs), as small subclasses of foolbox's.

    noise               signs at random (L2: directions), as large as the ball; the worst of some draws
    fgsm                one step along the gradient's sign (Goodfellow et al., ICLR 2015); L2: along the gradient
    rfgsm               half of the way at random, then one such step (Tramer et al., ICLR 2018)
    pgd                 many steps, from random starts (Madry et al., ICLR 2018)
    pgd-dlr             the same on the DLR loss, which no scale of the logits changes (Croce and Hein, ICML 2020, section 5)
    pgd-temperature     the same with logits times a temperature of each image's own (Gupta and Ajanthan, AAAI 2022)
    apgd-ce, apgd-dlr, apgd-dlr-targeted     with steps that adapt (Croce and Hein, ICML 2020)
    square              random search without gradients (Andriushchenko et al., ECCV 2020)
    transfer-NAME       what fools another network, tried on this one
    pgd-MODE            `pgd` with another backward pass (`quantizers.BACKWARD`, or `twin`: the float network's gradient)
"""

from __future__ import annotations

import copy
import itertools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq.attacks.threat_model import NORMS, ThreatModel

try:
    with warnings.catch_warnings():
        # foolbox imports a name from where SciPy had it; not ours to mend.
        warnings.simplefilter("ignore", DeprecationWarning)
        import eagerpy
        import foolbox
        from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
        from pyautoattack.square import SquareAttack
except ImportError as error:
    raise ImportError("attacks need foolbox and pyautoattack: pip install 'haq[robustness]'") from error

BACKWARD = (*Q.BACKWARD, "twin")
NAMES = (
    *("noise", "fgsm", "rfgsm", "pgd", "pgd-dlr", "pgd-temperature", "apgd-ce", "apgd-dlr", "apgd-dlr-targeted", "square"),
    *(f"pgd-{mode}" for mode in BACKWARD if mode != "hard"),
)
WHITE, BLACK, NOISE = "white box", "black box", "noise"
LOGITS = 10  # largest logits of an image that temperatures are found from
_silent = logging.Logger("attacks")  # its warnings are checks of ours
_silent.addHandler(logging.NullHandler())


class Classifier(nn.Module):
    """A network with its normalisation inside: takes images (N, C, H, W) in [0, 1], returns logits (N, classes).

    With `requantize` images are first rounded to 8 bits, as a camera or a file would, with the straight-through gradient. The
    network is copied, in evaluation mode and without gradients of its parameters.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
        *,
        requantize: bool = False,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
        self.register_buffer("mean", torch.tensor(mean, device=device).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, device=device).view(1, -1, 1, 1))
        self.requantize, self.memory_format = requantize, memory_format
        self.eval().requires_grad_(False)

    @property
    def quantized(self) -> bool:
        """Whether any input of a layer is rounded."""
        return any(layer.activation_bits is not None for layer in Q.quant_layers(self.network).values())

    @property
    def device(self) -> torch.device:
        return self.mean.device

    def forward(self, x: Tensor) -> Tensor:
        if self.requantize:
            x = Q.fake_quantize(x, x.new_tensor(1 / 255), 8, False)
        x = ((x - self.mean) / self.std).contiguous(memory_format=self.memory_format)
        logits: Tensor = self.network(x)
        return logits

    def twin(self) -> Classifier:
        """The same with the network in float: its weights as they are now, unrounded."""
        made = copy.copy(self)
        made._modules = {"network": Q.float_copy(self.network).eval().requires_grad_(False)}
        return made

    @torch.no_grad()
    def right(self, x: Tensor, labels: Tensor) -> Tensor:
        """Which images are classified as labelled, (N,) of bool."""
        return self(x).argmax(1) == labels


class _Twinned(nn.Module):
    """The logits of one network, to the last bit, with the gradient of another."""

    def __init__(self, network: nn.Module, twin: nn.Module) -> None:
        super().__init__()
        self.network, self.twin = network, twin

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            logits = self.network(x)
        made: Tensor = _Borrowed.apply(logits, self.twin(x))
        return made


class _Borrowed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, lender: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


class AttackBudget(NamedTuple):
    """How hard attacks try. steps and restarts: of PGD. apgd: steps of APGD. targets: classes that its targeted version tries.
    queries: of Square. draws: of noise."""

    steps: int
    restarts: int
    apgd: int
    targets: int
    queries: int
    draws: int


ATTACK_BUDGETS = {
    "quick": AttackBudget(20, 1, 15, 0, 100, 5),
    "standard": AttackBudget(50, 5, 100, 3, 1000, 20),
    "full": AttackBudget(50, 5, 100, 9, 5000, 50),
}


class EvaluationAttack(NamedTuple):
    """An attack: its name, what it knows, what it does to images (N, C, H, W) with labels, and roughly how many passes back
    and forth that takes for each image."""

    name: str
    knows: str
    perturb: Callable[[Tensor, Tensor], Tensor]
    passes: float

    def run(self, images: Tensor, labels: Tensor, threat: ThreatModel, seed: int) -> Tensor:
        """Images that an attacker would show instead, within the ball. The libraries draw from torch's global generator, which
        is seeded for the run and put back. Raises RuntimeError if what comes back isn't allowed."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = self.perturb(images, labels).detach()
        if not threat.within(images, found):
            raise RuntimeError(f"{self.name} left the ball: {threat}")
        return found


def check_names(names: str) -> None:
    """Raise ValueError for what is neither an effort nor names of attacks divided by commas, before anything is loaded; from
    which networks there is something to transfer, `suite` will tell."""
    for name in () if names in ATTACK_BUDGETS else map(str.strip, names.split(",")):
        if name not in NAMES and not name.startswith("transfer-"):
            raise ValueError(
                f"unknown attack {name!r}; known: {', '.join(ATTACK_BUDGETS)}, or some of {', '.join(NAMES)}, transfer-NAME"
            )


def suite(
    names: str,
    victim: Classifier,
    threat: ThreatModel,
    classes: int,
    *,
    sources: Mapping[str, Classifier] | None = None,
    backward: str = "ste",
) -> list[EvaluationAttack]:
    """The attacks of an effort (`ATTACK_BUDGETS`), or of names divided by commas, which take the standard one.

    sources: networks to transfer from, by name. backward: see `BACKWARD`; what a float network doesn't have changes nothing.
    `full` adds PGD with every other backward pass that makes sense for the victim. The targeted DLR loss needs four classes,
    DLR three: in an effort it is left out where there are fewer, asked for by name it raises ValueError.
    """
    if backward not in BACKWARD:
        raise ValueError(f"unknown backward mode {backward!r}; known: {', '.join(BACKWARD)}")
    effort = ATTACK_BUDGETS.get(names, ATTACK_BUDGETS["standard"])
    known = {
        attack.name: attack
        for attack in _catalogue(victim, threat, min(classes - 1, effort.targets), effort, sources or {}, backward)
    }
    needs = {"pgd-dlr": 3, "apgd-dlr": 3, "apgd-dlr-targeted": 4}
    if names in ATTACK_BUDGETS:
        modes = tuple(f"pgd-{mode}" for mode in BACKWARD)
        left_out = {"quick": ("pgd-dlr", "pgd-temperature", *modes), "standard": modes, "full": ()}[names]
        return [one for name, one in known.items() if name not in left_out and classes >= needs.get(name, 2)]
    asked = [name.strip() for name in names.split(",")]
    for name in asked:
        if name not in known:
            raise ValueError(f"unknown attack {name!r}; known: {', '.join(ATTACK_BUDGETS)}, or some of {', '.join(known)}")
        if classes < needs.get(name, 2):
            raise ValueError(f"{name} needs at least {needs[name]} classes, the network has {classes}: use pgd and apgd-ce")
    return [known[name] for name in dict.fromkeys(asked)]


def _catalogue(
    victim: Classifier,
    threat: ThreatModel,
    targets: int,
    effort: AttackBudget,
    sources: Mapping[str, Classifier],
    backward: str,
) -> list[EvaluationAttack]:
    eps, norm, steps = threat.eps, NORMS[threat.norm], effort.steps

    def seen_through(mode: str) -> Callable[[Callable[[nn.Module, Tensor, Tensor], Tensor]], Any]:
        """An attack on the victim, with gradients of a mode."""
        model = _Twinned(victim, victim.twin()) if mode == "twin" else victim

        def bind(perturb: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
            def run(images: Tensor, labels: Tensor) -> Tensor:
                with Q.backward_mode(victim.network, "ste" if mode == "twin" else mode):
                    return perturb(model, images, labels)

            return run

        return bind

    def restarted(restarts: int, **options: Any) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        return lambda model, x, y: pgd(model, x, y, threat, steps=steps, restarts=restarts, **options)

    def apgd(loss: str) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        def run(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            common = {"norm": norm, "eps": eps, "n_iter": effort.apgd, "seed": _drawn(), "device": x.device, "logger": _silent}
            if loss == "dlr-targeted":
                made = APGDAttack_targeted(model, n_target_classes=targets, **common)
            else:
                made = APGDAttack(model, loss=loss, **common)
            found: Tensor = made.perturb(x, y)
            return found

        return run

    def square(x: Tensor, y: Tensor) -> Tensor:
        made = SquareAttack(victim, norm=norm, eps=eps, n_queries=effort.queries, seed=_drawn(), device=x.device)
        with torch.no_grad():
            found: Tensor = made.perturb(x, y)
        return found

    def transfer(source: Classifier) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, y: pgd(source, x, y, threat, steps=steps, restarts=1)

    through = seen_through(backward)
    fast = foolbox.attacks.LinfFastGradientAttack if threat.norm == "linf" else foolbox.attacks.L2FastGradientAttack
    halfway = _LinfHalfway if threat.norm == "linf" else _L2Halfway
    attacks = [
        EvaluationAttack("noise", NOISE, lambda x, y: noise(victim, x, y, threat, effort.draws), 0.4 * effort.draws),
        EvaluationAttack("fgsm", WHITE, through(lambda model, x, y: _foolbox(fast(), model, x, y, eps)), 1),
        EvaluationAttack("rfgsm", WHITE, through(lambda model, x, y: _foolbox(halfway(eps), model, x, y, eps)), 1),
        EvaluationAttack("pgd", WHITE, through(restarted(effort.restarts)), steps * effort.restarts),
        EvaluationAttack("pgd-dlr", WHITE, through(restarted(1, loss=dlr_loss)), steps),
        EvaluationAttack("pgd-temperature", WHITE, through(restarted(1, tempered=True)), steps + LOGITS),
        EvaluationAttack("apgd-ce", WHITE, through(apgd("ce")), effort.apgd),
        EvaluationAttack("apgd-dlr", WHITE, through(apgd("dlr")), effort.apgd),
        EvaluationAttack("square", BLACK, square, 0.4 * effort.queries),
    ]
    if targets:
        attacks.insert(-1, EvaluationAttack("apgd-dlr-targeted", WHITE, through(apgd("dlr-targeted")), effort.apgd * targets))
    attacks += [EvaluationAttack(f"transfer-{name}", BLACK, transfer(source), steps) for name, source in sources.items()]
    if victim.quantized:
        others = [mode for mode in ("ste", "bpda-identity", "bpda-soft", "twin") if mode != backward]
        attacks += [EvaluationAttack(f"pgd-{mode}", WHITE, seen_through(mode)(restarted(1)), 2 * steps) for mode in others]
    return attacks


def pgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    restarts: int = 1,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
    tempered: bool = False,
) -> Tensor:
    """foolbox's PGD with steps of 2.5 eps / steps from random starts; images that are fooled are left alone in later restarts.

    loss: of logits and labels, (N,); default: cross-entropy. tempered: of logits times `temperatures`.
    """
    found, left = images.clone(), torch.arange(len(images), device=images.device)
    kind = _LinfPGD if threat.norm == "linf" else _L2PGD
    for _ in range(restarts):
        if not len(left):
            break
        x, y = images[left], labels[left]
        scale = temperatures(model, x)[:, None] if tempered else 1.0
        attack = kind(loss or cross_entropy, scale, steps)
        found[left] = _foolbox(attack, model, x, y, threat.eps)
        with torch.no_grad():
            left = left[model(found[left]).argmax(1) == y]
    return found


def noise(model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, draws: int) -> Tensor:
    """The worst of some draws of noise that is as large as the ball: signs at random, or directions (L2)."""
    found, left = images.clone(), torch.arange(len(images), device=images.device)
    for _ in range(draws):
        if not len(left):
            break
        drawn = torch.randn_like(images[left])
        if threat.norm == "linf":
            drawn = torch.where(drawn >= 0, 1.0, -1.0)
        else:
            drawn /= torch.linalg.vector_norm(drawn.flatten(1), dim=1).view(-1, 1, 1, 1)
        found[left] = (images[left] + threat.eps * drawn).clamp(0, 1)
        with torch.no_grad():
            left = left[model(found[left]).argmax(1) == labels[left]]
    return found


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each image, (N,), in nats."""
    return F.cross_entropy(logits, labels, reduction="none")


def dlr_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, (N,): -(z_y - max over i != y of z_i) / (z_1 - z_3), z_1 >= z_2 >= z_3 being the largest
    logits (Croce and Hein, ICML 2020, equation 6). Raises ValueError for fewer than three classes."""
    if logits.shape[1] < 3:
        raise ValueError(f"the DLR loss needs at least 3 classes, the logits have {logits.shape[1]}: use the cross-entropy")
    top = logits.topk(3, dim=1).values
    own = logits.gather(1, labels[:, None])[:, 0]
    other = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return -(own - other) / (top[:, 0] - top[:, 2]).clamp_min(1e-12)


def temperatures(model: nn.Module, images: Tensor) -> Tensor:
    """What to multiply each image's logits by for the cross-entropy to have as much curvature as it can, (N,).

    Where a softmax is saturated, or logits are tiny, its gradient vanishes; the decision doesn't depend on such a factor
    ("Hessian norm scaling", Gupta and Ajanthan, AAAI 2022). For a piecewise linear network with the Jacobian J (classes x
    pixels) the Hessian of the loss is beta^2 J^T (diag(p) - p p^T) J, p = softmax(beta z). Its Frobenius norm is
    made as large as it can be on a grid of beta, from 1/100 to 100 over the logits' spread, for the ten largest logits.
    """
    x = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        top = model(x).topk(min(LOGITS, int(model(x[:1]).shape[1])), dim=1).values
        rows = [torch.autograd.grad(top[:, k].sum(), x, retain_graph=True)[0].flatten(1) for k in range(top.shape[1])]
    jacobian, logits = torch.stack(rows, 1).double(), top.detach().double()
    gram = jacobian @ jacobian.mT
    spread = logits.std(1).clamp_min(1e-12)
    grid = torch.logspace(-2, 2, 41, dtype=torch.float64, device=x.device)
    norms = []
    for factor in grid:
        beta = factor / spread
        p = (beta[:, None] * logits).softmax(1)
        curved = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        middle = curved @ gram
        norms.append(beta**4 * (middle @ middle).diagonal(dim1=1, dim2=2).sum(1))
    return (grid[torch.stack(norms).argmax(0)] / spread).to(images.dtype)


def zero_gradients(model: nn.Module, images: Tensor, labels: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Whose loss has a gradient that is zero at every pixel, (N,) of bool."""
    x = images.detach().clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(loss(model(x), labels).sum(), x)
    return gradient.flatten(1).abs().amax(1) == 0


def _drawn() -> int:
    """A seed for a library, from the generator that `Attack.run` seeded."""
    return int(torch.randint(2**31 - 1, ()))


def _foolbox(attack: Any, model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Tensor:
    wrapped = foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device=images.device)
    found: Tensor = attack.run(wrapped, images, foolbox.Misclassification(labels), epsilon=eps)
    return found


class _Losses:
    """foolbox's gradient attacks on another loss."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], scale: Tensor | float, steps: int) -> None:
        super().__init__(steps=steps, rel_stepsize=2.5 / steps, random_start=True)  # type: ignore[call-arg]
        self.loss, self.scale = loss, scale

    def get_loss_fn(self, model: Any, labels: Any) -> Callable[[Any], Any]:
        def loss(inputs: Any) -> Any:
            return eagerpy.astensor(self.loss(self.scale * model(inputs).raw, labels.raw).sum())

        return loss


class _LinfPGD(_Losses, foolbox.attacks.LinfPGD):
    pass


class _L2PGD(_Losses, foolbox.attacks.L2PGD):
    pass


class _Halfway:
    """R+FGSM: eps / 2 at random, then one step of eps / 2."""

    def __init__(self, eps: float) -> None:
        super().__init__(steps=1, abs_stepsize=eps / 2, random_start=True)  # type: ignore[call-arg]

    def get_random_start(self, x0: Any, epsilon: float) -> Any:
        x = x0.raw
        drawn = torch.randn_like(x)
        if isinstance(self, _LinfHalfway):
            drawn = drawn.sign()
        else:
            drawn /= torch.linalg.vector_norm(drawn.flatten(1), dim=1).view(-1, *itertools.repeat(1, x.dim() - 1))
        return eagerpy.astensor(x + epsilon / 2 * drawn)


class _LinfHalfway(_Halfway, foolbox.attacks.LinfPGD):
    pass


class _L2Halfway(_Halfway, foolbox.attacks.L2PGD):
    pass
