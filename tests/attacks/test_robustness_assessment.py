"""An assessment takes the worst case, notices masked gradients, goes on where it was interrupted, and refuses nonsense."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import quantizers as Q
from haq.attacks import base, masking
from haq.attacks.assessment import Assessment, assess
from haq.attacks.base import AttackBudget, EvaluationAttack
from haq.attacks.classifier import Classifier
from haq.attacks.evaluation_attacks import Fold
from haq.attacks.threat_model import ThreatModel
from tests.conftest import brightest, fitted, fitted_network, images, small_network

SHORT = AttackBudget(steps=10, restarts=1, apgd=10, targets=2, queries=60, draws=5)
X = images(80, seed=3)
Y = brightest(X)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Efforts of a few steps, and a curve of four points and ten steps, so that an assessment takes a fraction of a second."""
    for name in base.ATTACK_BUDGETS:
        monkeypatch.setitem(base.ATTACK_BUDGETS, name, SHORT)
    monkeypatch.setattr(masking, "CURVE", (0.5, 1, 4))
    monkeypatch.setattr(masking, "CURVE_STEPS", 10)


@pytest.fixture(scope="module")
def few_bits() -> nn.Module:
    """Four bits for the weights and three for the activations, fitted with them."""
    network = fitted_network()
    return fitted(Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=3), calibrate=images(64)), 40)


def check(found: Assessment, name: str) -> masking.Check:
    (one,) = [one for one in found.checks if name in one.name]
    return one


class Before(nn.Module):
    """A function of the images before a network, or of the logits after it."""

    def __init__(
        self,
        network: nn.Module,
        before: Callable[[Tensor], Tensor] = lambda x: x,
        after: Callable[[Tensor], Tensor] = lambda z: z,
    ) -> None:
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.network(self.before(x)))


class Slope(torch.autograd.Function):
    """The identity, its gradient times a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.factor * gradients[0], None


def backwards(x: Tensor) -> Tensor:
    return Slope.apply(x, -1.0)


def three_levels(x: Tensor) -> Tensor:
    """0, 0.5 and 1, with the straight-through gradient."""
    return Q.fake_quantize(x, x.new_tensor(0.5), 2, False)


def always(z: Tensor) -> Tensor:
    """Class 0, whatever the logits."""
    return 0.001 * z + torch.tensor([9.0, 0, 0, 0])


def test_hard_rounding_is_noticed_and_straight_through_is_not(few_bits: nn.Module) -> None:
    """The true gradient of rounding is zero: the number is stamped an upper bound. With the straight-through one it isn't for
    that reason."""
    found = assess(few_bits, X, Y, eps=0.1, attacks="fgsm,pgd", backward="hard")
    zero = check(found, "no gradient is zero")
    assert not zero.passed
    assert zero.figures == "100.0 % of images without any"
    assert found.masked
    assert found.verdict == "upper bound: gradients are masked"
    assert found.summary()["masked"] is True
    through = assess(few_bits, X, Y, eps=0.1, attacks="fgsm,pgd", backward="ste")
    assert check(through, "no gradient is zero").passed
    assert through.clean == found.clean > 0.8


def test_following_the_true_gradient_finds_thirty_points_too_little(few_bits: nn.Module) -> None:
    """With attacks that follow gradients only, at an eps where half of the images or so are fooled."""
    ste, hard = (assess(few_bits, X, Y, eps=0.12, attacks="fgsm,pgd", backward=mode) for mode in ("ste", "hard"))
    assert ste.worst <= hard.worst - 0.3
    assert hard.worst >= hard.clean - 0.15
    full = assess(few_bits, X, Y, eps=0.12, attacks="full", backward="hard")
    assert full.worst <= ste.worst + 0.05  # `full` attacks through every other mode as well


def loud(x: Tensor) -> Tensor:
    return 1000 * x


@pytest.mark.parametrize("defence", ["loud", "three levels", "three levels, no gradient"])
def test_broken_defences_are_broken(defence: str) -> None:
    """Logits times 1000 hide the cross-entropy's gradient, and images rounded to three levels small changes: at a large eps
    less than 10 % are left, or else, where there is no gradient at all, that is said."""
    network = fitted_network()
    defended = {
        "loud": Before(network, after=loud),
        "three levels": Before(network, before=three_levels),
        "three levels, no gradient": Before(network, before=lambda x: (2 * x).round() / 2),
    }[defence]
    found = assess(defended, X, Y, eps=0.4, attacks="quick")
    if defence == "loud":
        assert found.attacks["fgsm"] > 0.5  # on its own it would pass for robust
    if defence == "three levels, no gradient":
        assert not check(found, "no gradient is zero").passed
        assert found.masked
        assert found.attacks["square"] < found.attacks["fgsm"] - 0.3
    else:
        assert found.worst < 0.1
        assert check(found, "no gradient is zero").passed
    assert found.clean > 0.5


def test_the_number_is_the_worst_case_image_by_image(few_bits: nn.Module) -> None:
    """It is that of the masks' conjunction, not above any single attack's; the examples are those that did it."""
    found = assess(few_bits, X, Y, eps=0.08, attacks="quick", sources={"float": fitted_network()})
    assert list(found.right) == list(found.attacks)
    assert "transfer-float" in found.right
    union = torch.stack(list(found.right.values())).all(0)
    assert found.worst == union.double().mean().item()
    assert found.worst < min(found.attacks.values())
    assert found.attacks == {name: mask.double().mean().item() for name, mask in found.right.items()}
    victim = Classifier(few_bits)
    clean = victim.right(X, Y)
    assert found.clean == clean.double().mean().item()
    assert not any((mask & ~clean).any() for mask in found.right.values())
    assert torch.equal(victim.right(found.examples, Y), union)
    assert found.threat.within(X, found.examples)
    assert torch.equal(found.examples[~clean], X[~clean])
    for i, name in enumerate(found.fooled_by):
        first = next((attack for attack, mask in found.right.items() if not mask[i]), "")
        assert name == (first if clean[i] else "nothing")
    assert len(set(found.fooled_by)) > 3


def test_labels_and_attacks_of_images_that_are_wrong_are_not_counted() -> None:
    """An image that is wrong to begin with stays wrong: no attack turns it right, and nothing is spent on it."""
    given = []

    class Counting(Before):
        def forward(self, x: Tensor) -> Tensor:
            given.append(len(x))
            return super().forward(x)

    found = assess(Classifier(Counting(fitted_network())), X, (Y + 1) % 4, eps=0.1, attacks="pgd")
    wrong = 1 - found.clean
    assert wrong > 0.9
    # Five passes, one with a gradient and one for `clean`; last, five over the examples.
    assert max(given[7:-5]) <= round(80 * found.clean)
    assert found.attacks["pgd"] <= found.clean
    assert found.fooled_by.count("nothing") == round(80 * wrong)


# Eight checks, and for each a situation in which it fails.


def test_a_step_that_beats_many_steps_is_noticed() -> None:
    """The gradient is right on images of 8 bits only, where FGSM looks; elsewhere it points the other way."""
    eight = (X * 255).round() / 255

    def before(x: Tensor) -> Tensor:
        on_grid = bool(((x.detach() * 255).round() / 255 - x.detach()).abs().max() < 1e-6)
        return Slope.apply(x, 1.0 if on_grid else -1.0)

    found = assess(Before(fitted_network(), before), eight, Y, eps=0.1, attacks="fgsm,pgd")
    one = check(found, "many steps are at least as strong as one")
    assert not one.passed
    assert one.figures == f"{100 * found.attacks['pgd']:.1f} % under pgd, {100 * found.attacks['fgsm']:.1f} % under fgsm"
    assert check(assess(fitted_network(), eight, Y, eps=0.1, attacks="fgsm,pgd"), "many steps").passed


@pytest.mark.parametrize(
    ("weaker", "name"),
    [
        ("square", "gradients find what black boxes and transfer find"),
        ("transfer-same", "gradients find what black boxes and transfer find"),
        ("noise", "gradients find what noise finds"),
    ],
)
def test_weak_attacks_that_beat_gradients_are_noticed(weaker: str, name: str) -> None:
    """Gradients that point the wrong way lead away from what square, transfer from the same network, or noise finds."""
    network, sources = fitted_network(), {"same": fitted_network()}
    found = assess(Before(network, backwards), X, Y, eps=0.2, attacks=f"fgsm,pgd,{weaker}", sources=sources)
    assert not check(found, name).passed
    assert weaker in check(found, name).figures
    assert found.masked
    fine = assess(network, X, Y, eps=0.2, attacks=f"fgsm,pgd,{weaker}", sources=sources)
    assert check(fine, name).passed


@pytest.mark.parametrize("attacks", ["noise", "noise,square", "transfer-same"])
def test_what_no_attack_with_gradients_was_asked_of_is_an_upper_bound(attacks: str) -> None:
    """Whatever the other checks say: noise leaves what PGD does not."""
    network = fitted_network()
    found = assess(network, X[:30], Y[:30], eps=0.1, attacks=attacks, sources={"same": network})
    one = check(found, "an attack follows gradients")
    assert not one.passed
    assert one.figures == f"none of {attacks.replace(',', ', ')} does"
    assert found.masked
    assert found.verdict == "upper bound: no attack that was asked for follows gradients"


def test_a_suite_that_plain_pgd_beats_is_an_upper_bound() -> None:
    """The curve goes further within eps than a single step does."""
    found = assess(fitted_network(), X[:30], Y[:30], eps=0.1, attacks="fgsm")
    one = check(found, "the attacks find what plain PGD finds")
    assert not one.passed
    assert min(value for eps, value in found.curve if eps <= 0.1) < found.worst
    assert found.masked
    assert found.verdict == "upper bound: plain PGD finds more than the attacks that were asked for"
    # That a whole suite passes is told by `test_honest_networks_pass_every_check`.


class Vote(nn.Module):
    """Three networks, each of which has a vote, with the gradient of its own sharp softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(fitted_network(seed) for seed in (0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        made = 0
        for member in self.members:
            soft = (4 * member(x)).softmax(1)
            hard = nn.functional.one_hot(soft.argmax(1), 4)
            made = made + hard + soft - soft.detach()
        return made  # type: ignore[return-value]


def test_a_vote_that_hides_its_members_is_noticed() -> None:
    """Where members are sure of their answers their votes have no slope; PGD on the sum of their logits isn't stopped."""
    found = assess(Vote().eval(), X, Y, eps=0.1, attacks="pgd")
    one = check(found, "the attacks find what PGD on its members finds")
    assert not one.passed
    assert found.masked
    alone = assess(fitted_network(), X[:10], Y[:10], eps=0.1, attacks="pgd")
    assert not [one for one in alone.checks if "members" in one.name]


class Broken(torch.autograd.Function):
    """The identity, with NaN in its gradient: at one pixel, or at all of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pixels: int) -> Tensor:
        ctx.pixels = pixels
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        gradient = gradients[0].clone()
        gradient.flatten(1)[:, : ctx.pixels] = math.nan
        return gradient, None


@pytest.mark.parametrize("pixels", [1, 64])
def test_gradients_of_nan_end_no_suite_and_are_noticed(pixels: int) -> None:
    """Attacks leave such pixels where they are, and the number is stamped."""
    network = Before(fitted_network(), before=lambda x: Broken.apply(x, pixels))
    found = assess(network, X[:30], Y[:30], eps=0.1, attacks="fgsm,pgd,apgd-ce")
    assert not check(found, "no gradient is zero").passed
    assert found.masked
    if pixels == 1:
        assert found.worst < found.clean - 0.5


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_may_be_switched_off(mode: Any) -> None:
    with mode():
        found = assess(fitted_network(), X[:20], Y[:20], eps=0.1, attacks="fgsm")
    assert found.summary() == assess(fitted_network(), X[:20], Y[:20], eps=0.1, attacks="fgsm").summary()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_images_become_what_the_network_takes(dtype: torch.dtype) -> None:
    given = X[:20].to(dtype).requires_grad_()
    found = assess(fitted_network(), given, Y[:20], eps=0.1, attacks="fgsm")
    assert found.summary() == assess(fitted_network(), given.float(), Y[:20], eps=0.1, attacks="fgsm").summary()


@pytest.mark.parametrize("eps", ["0.1", " 1e-1", "1E-1", "25.5/255", np.float64(0.1)])
def test_eps_may_be_a_text(eps: Any) -> None:
    found = assess(fitted_network(), X[:20], Y[:20], eps=eps, attacks="fgsm")
    assert found.summary() == assess(fitted_network(), X[:20], Y[:20], eps=0.1, attacks="fgsm").summary()


@pytest.mark.parametrize("size", [(24, 24), (14, 14), (24, 32), (40, 12), (4, 4), (1, 64), (7, 3), (1, 1)])
def test_square_takes_images_of_every_size(size: tuple[int, int]) -> None:
    """In l2 they are laid into squares that the library takes, and come out as they were."""
    x = torch.rand(3, 2, *size)
    fold = Fold.of(x)
    assert fold is not None
    assert torch.equal(fold.open(fold.close(x)), x)
    network = Before(nn.Flatten(), after=lambda z: torch.stack([z.mean(1), 0.5 + 0 * z.mean(1)], 1)).eval()
    found = assess(network, x, (x.mean((1, 2, 3)) < 0.5).long(), eps=0.5, norm="l2", attacks="square")
    assert ThreatModel(0.5, "l2").within(x, found.examples)
    assert Fold.of(torch.rand(1, 1, 28, 28)) is None


class Pocket(nn.Module):
    """Answers 0, but 1 where the mean of an image is close to a value: what overshoots it does not find it."""

    def __init__(self, distance: float, width: float) -> None:
        super().__init__()
        self.distance, self.width = distance, width

    def forward(self, x: Tensor) -> Tensor:
        away = (x.mean((1, 2, 3)) - 0.5 - self.distance).abs()
        return 10 * torch.stack([torch.zeros_like(away), self.width - away], 1)


def grey(count: int = 60) -> tuple[Tensor, Tensor]:
    x = images(count)
    return x - x.mean((1, 2, 3), keepdim=True) + 0.5, torch.zeros(count, dtype=torch.int64)


def test_steps_that_are_too_few_are_noticed() -> None:
    """Steps of eps / 4 jump over what steps of eps / 8 hit."""
    x, y = (part.clamp(0, 1) if part.is_floating_point() else part for part in grey())
    x = 0.4 * (x - 0.5) + 0.5
    found = assess(Pocket(0.06, 0.006), x, y, eps=0.1, attacks="fgsm,pgd")
    one = check(found, "twice the steps change nothing")
    assert not one.passed
    assert one.figures.endswith("of 60 images")
    assert "after 10" in one.figures
    assert "after 20" in one.figures
    assert check(assess(Pocket(0.06, 0.03), x, y, eps=0.1, attacks="fgsm,pgd"), "twice the steps").passed


def test_success_that_falls_with_more_room_is_noticed() -> None:
    """What is found with small steps in a small ball, and missed with large ones in a large ball."""
    x, y = grey()
    x = 0.4 * (x - 0.5) + 0.5
    found = assess(Pocket(0.025, 0.006), x, y, eps=0.1, attacks="fgsm,pgd")
    one = check(found, "more room, more success")
    assert not one.passed
    assert "accuracy rises by" in one.figures
    assert check(assess(fitted_network(), X, Y, eps=0.05, attacks="fgsm"), "more room").passed


def test_robustness_without_bounds_is_noticed() -> None:
    """A network that answers the same to every image, which are all of that class, can't be fooled even where each could
    become grey."""
    found = assess(Before(fitted_network(), after=always), X, torch.zeros_like(Y), eps=0.1, attacks="pgd")
    one = check(found, "without bounds it succeeds")
    assert not one.passed
    assert one.figures == "100.0 % at eps 0.5, chance 25.0 %"
    assert found.worst == 1
    assert found.verdict == "upper bound: gradients are masked"
    assert check(assess(fitted_network(), X, Y, eps=0.1, attacks="pgd"), "without bounds").passed


def test_randomness_off_the_images_is_noticed() -> None:
    """A network that is steady on images of 8 bits, and random on those that attacks make."""
    eight = (X * 255).round() / 255

    def before(x: Tensor) -> Tensor:
        off = ((x.detach() * 255).round() / 255 - x.detach()).flatten(1).abs().amax(1) > 1e-6
        return x + 0.05 * off.view(-1, 1, 1, 1) * torch.randn_like(x)

    found = assess(Before(fitted_network(), before), eight, Y, eps=0.1, attacks="pgd")
    assert not check(found, "logits are deterministic").passed
    steady = check(assess(fitted_network(), eight, Y, eps=0.1, attacks="pgd"), "logits are deterministic")
    assert steady.passed
    assert steady.figures == "differ by 0 over 5 passes"


def test_honest_networks_pass_every_check() -> None:
    """All nine, and the number is called by its name."""
    found = assess(fitted_network(), X, Y, eps=0.1, attacks="quick")
    assert [one.name for one in found.checks if not one.passed] == []
    assert len(found.checks) == 9
    assert not found.masked
    assert found.verdict == "worst case over all attacks"


def test_the_curve_falls_to_chance() -> None:
    """It starts at eps 0 with the accuracy on the images, and ends where it is no better than chance, or all is grey."""
    found = assess(fitted_network(), X, Y, eps=0.1, attacks="fgsm")
    assert found.curve[0] == (0.0, found.clean)
    assert [eps for eps, _ in found.curve] == pytest.approx([0, 0.05, 0.1, 0.4][: len(found.curve)])
    assert found.curve[-1][1] <= 0.25
    assert all(value > 0.25 for _, value in found.curve[:-1])
    never = Before(fitted_network(), after=always)
    wide = assess(never, X, torch.zeros_like(Y), eps=3.9, norm="l2", attacks="fgsm")
    assert wide.curve == ((0, 1), (1.95, 1), (3.9, 1), (4, 1))  # 4 = sqrt(64) / 2, within which any image can become grey


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3])
def test_it_goes_on_where_it_was_interrupted(
    after: int, tmp_path: Path, few_bits: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attacks that are finished aren't run again, and the outcome is that of a run without interruption."""
    ran: list[str] = []
    original = EvaluationAttack.run

    def run(self: EvaluationAttack, *arguments: Any) -> Tensor:
        ran.append(self.name)
        return original(self, *arguments)

    monkeypatch.setattr(EvaluationAttack, "run", run)
    names = ["rfgsm", "pgd", "apgd-ce", "square"]
    options = {"eps": 0.08, "attacks": ",".join(names), "backward": "bpda-soft"}
    whole = assess(few_bits, X, Y, **options)  # type: ignore[arg-type]
    assert ran == names
    ran.clear()

    def stop(done: float, total: float, note: str) -> None:
        if note == names[after]:
            raise Interrupted

    with pytest.raises(Interrupted):
        assess(few_bits, X, Y, folder=tmp_path, on_progress=stop, **options)  # type: ignore[arg-type]
    assert ran == names[:after]
    ran.clear()
    told: list[tuple[float, float, str]] = []
    found = assess(few_bits, X, Y, folder=tmp_path, on_progress=lambda *what: told.append(what), **options)  # type: ignore[arg-type]
    assert ran == names[after:]
    assert found.summary() == whole.summary()
    assert torch.equal(found.examples, whole.examples)
    assert found.fooled_by == whole.fooled_by
    assert all(torch.equal(found.right[name], whole.right[name]) for name in names)
    assert told[-1][0] == told[-1][1]
    ran.clear()
    # All of it is kept, the curve and the checks as well.
    monkeypatch.setattr(masking, "pgd", None)
    assert assess(few_bits, X, Y, folder=tmp_path, **options).summary() == whole.summary()  # type: ignore[arg-type]
    assert ran == []
    assert len(list(tmp_path.iterdir())) == 1


def test_another_question_has_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other images, labels, eps, norm, attacks, seed, bits, normalisation, sources, weights, and networks that differ in a
    number, a stride or an activation only."""
    network = fitted_network()

    class Loud(Before):
        def __init__(self, factor: float) -> None:
            super().__init__(network)
            self.factor = factor
            self.after = lambda z: self.factor * z

    def quantized(bits: int, scheme: str | Q.Scheme = "linear") -> nn.Module:
        return Q.quantize(network, Q.BitPolicy.uniform(network, w=8, a=bits), calibrate=images(16), scheme=scheme)

    leaky, moved = fitted_network(), fitted_network()
    leaky.relu2 = nn.LeakyReLU(0.1)
    moved.classifier.bias.data[0] += 1e-3
    x, y = X[:8], Y[:8]
    monkeypatch.setattr(masking, "CURVE_STEPS", 1)
    monkeypatch.setitem(base.ATTACK_BUDGETS, "standard", SHORT._replace(steps=1))
    calls: list[tuple[nn.Module, Tensor, Tensor, dict[str, Any]]] = [
        (network, x, y, {}),
        (network, x.flip(3), y, {}),
        (network, x, y.flip(0), {}),
        (network, x, y, {"eps": 0.11}),
        (network, x, y, {"norm": "l2"}),
        (network, x, y, {"attacks": "rfgsm"}),
        (network, x, y, {"seed": 1}),
        (network, x, y, {"std": (0.5,)}),
        (network, x, y, {"requantize": True}),
        (network, x, y, {"sources": {"a": leaky}}),
        (leaky, x, y, {}),
        (moved, x, y, {}),
        (Loud(1), x, y, {}),
        (Loud(2), x, y, {}),
        (quantized(4), x, y, {}),
        (quantized(3), x, y, {}),
        (quantized(3), x, y, {"backward": "hard"}),
        (quantized(3, Q.PACT(clip=2.0)), x, y, {}),
        (quantized(3, Q.LSQ()), x, y, {}),
    ]
    for number, (net, inputs, labels, options) in enumerate(calls, 1):
        assess(net, inputs, labels, folder=tmp_path, **{"eps": 0.1, "attacks": "fgsm", **options})
        assert len(list(tmp_path.iterdir())) == number, options
    # The same again, in another order, makes no new ones.
    for net, inputs, labels, options in reversed(calls):
        assess(net, inputs, labels, folder=tmp_path, **{"eps": 0.1, "attacks": "fgsm", **options})
    assert len(list(tmp_path.iterdir())) == len(calls)
    # A classifier isn't copied; what attacks leave on it says nothing.
    victim = Classifier(quantized(4))
    for _ in range(2):
        assess(victim, x, y, folder=tmp_path, eps=0.1, attacks="fgsm")
    assert len(list(tmp_path.iterdir())) == len(calls)


def test_a_damaged_file_is_refused_in_a_sentence(tmp_path: Path) -> None:
    """Truncated, with a flipped byte, empty, of another kind or without some of its entries: named, with what to do."""
    network, options = fitted_network(), {"eps": 0.1, "attacks": "fgsm", "folder": tmp_path}
    whole = assess(network, X, Y, **options)  # type: ignore[arg-type]
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    with np.load(path, allow_pickle=False) as file:
        assert set(file.files) == {"examples", "fooled_by", "attacks", "right", "figures", "values"}
        entries = dict(file)
    assert all(entry.dtype != object for entry in entries.values())
    flipped = bytearray(data)
    flipped[200] ^= 255
    for bad in (data[: len(data) // 2], data[:10], bytes(flipped), b"", b"no archive", b"PK\x03\x04"):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=rf"^{path} can't be gone on from \(.*\): delete it$"):
            assess(network, X, Y, **options)  # type: ignore[arg-type]
    del entries["right"]
    np.savez(path, **entries)
    with pytest.raises(ValueError, match=r"can't be gone on from \(.*right.*\): delete it$"):
        assess(network, X, Y, **options)  # type: ignore[arg-type]
    with path.open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(ValueError, match=r"can't be gone on from \(.*\): delete it$"):
        assess(network, X, Y, **options)  # type: ignore[arg-type]
    path.unlink()
    assert assess(network, X, Y, **options).summary() == whole.summary()  # type: ignore[arg-type]


def random_network() -> nn.Module:
    return Before(small_network(), before=lambda x: torch.nn.functional.dropout(x, 0.1, training=True))


def detached() -> nn.Module:
    return Before(small_network(), before=Tensor.detach)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network": Before(small_network(), after=lambda z: z.softmax(1))}, "the network's outputs are probabilities"),
        ({"network": Before(small_network(), after=lambda z: z / 0)}, "the network's outputs are not finite"),
        ({"network": Before(small_network(), after=lambda z: z[:, :1])}, r"two classes or more\), not \(10, 1\)"),
        ({"network": random_network()}, "answers the same images differently from pass to pass"),
        ({"network": detached()}, "no gradient passes through the network"),
        ({"images": 2 * X[:10]}, r"images reach from 0.02\d+ to 1.9\d+; attacks need them in \[0, 1\]: divide by 255"),
        ({"images": X[:10] - 0.5}, "images reach from -0.4"),
        ({"images": X[:10] * math.nan}, "images reach from nan to nan"),
        ({"images": (255 * X[:10]).byte()}, r"not torch.uint8 \(10, 1, 8, 8\): divide by 255"),
        ({"images": X[:10, 0]}, r"not torch.float32 \(10, 8, 8\)"),
        ({"images": X[:9]}, "give as many labels as images"),
        ({"images": X[:0], "labels": Y[:0]}, "at least one; got"),
        ({"labels": Y[:10] + 3}, "labels reach from 4 to 6, the network has 4 classes"),
        ({"labels": Y[:10] - 4}, "labels reach from -3 to -1"),
        ({"labels": Y[:10].float()}, "`labels` has labels of type torch.float32 .* integers of shape"),
        ({"eps": 8}, r"eps is 8; images are in \[0, 1\], so it is above 0 and at most 1: 8/255, not 8"),
        ({"eps": "8"}, r"eps is '8'; images are in \[0, 1\]"),
        ({"eps": "a lot"}, "eps 'a lot' is not understood: give a fraction such as 8/255"),
        ({"eps": True}, "eps True is not understood"),
        ({"network": Before(small_network(), after=lambda z: (z,))}, "logits .images, two classes or more.*, not a tuple"),  # type: ignore[arg-type,return-value]
        ({"norm": "l0"}, "unknown norm 'l0'; known: linf, l2"),
        ({"attacks": "cw"}, "unknown attack 'cw'"),
        ({"norm": ["l2"]}, "unknown norm .'l2'.; known: linf, l2"),
        ({"attacks": ["pgd"]}, "attacks is .'pgd'.; it must be a text, names divided by commas, such as 'quick'"),
        ({"attacks": None}, "attacks is None; it must be a text"),
        ({"backward": "none"}, "unknown backward mode 'none'"),
        ({"network": None}, "network is a NoneType; it must be a torch.nn.Module"),
        ({"sources": {"a": 3}}, "source 'a' is a int; it must be a torch.nn.Module"),
        ({"sources": [3]}, "sources are a list; they must map names to networks"),
        ({"images": X[:10].numpy()}, "images are a ndarray; they must be a torch.Tensor, float"),
        ({"images": X[:10].to_sparse()}, "images are a sparse, nested or meta tensor; they must be a dense one"),
        ({"images": X[:10, :, :0]}, r"images of shape \(10, 1, 0, 8\) have no pixels"),
        ({"network": small_network().double()}, r"the network can't compute float32 images of shape .* \(RuntimeError: .*\)"),
        ({"mean": (0.5, 0.5, 0.5)}, "mean and std are of 3 channels, the images have 1"),
        ({"mean": ()}, "mean is .*; it must be finite numbers, one for each channel or one for all"),
        ({"std": (math.nan,)}, "std is .nan,.; it must be finite numbers"),
        ({"std": (0.0,)}, "std is .0.0,.; it must be numbers above 0"),
        ({"seed": None}, "seed is None; it must be an integer"),
    ],
)
def test_nonsense_is_refused_in_a_sentence(given: dict[str, Any], message: str) -> None:
    """Before any attack is run."""
    arguments = {"network": small_network(), "images": X[:10], "labels": Y[:10], "attacks": "fgsm", **given}
    with pytest.raises((ValueError, TypeError), match=message) as error:
        assess(arguments.pop("network"), arguments.pop("images"), arguments.pop("labels"), **arguments)
    assert "\n" not in str(error.value)


def test_the_summary_is_json(few_bits: nn.Module) -> None:
    """All but images, as it will be read again."""
    found = assess(few_bits, X[:20], Y[:20], eps=0.1, attacks="fgsm,noise")
    summary = json.loads(json.dumps(found.summary(), allow_nan=False))
    assert summary["threat"] == {"eps": 0.1, "norm": "linf"}
    assert summary["images"] == 20
    assert summary["classes"] == 4
    assert summary["effort"] == "fgsm,noise"
    assert summary["backward"] == "ste"
    assert summary["attacks"] == found.attacks
    assert summary["worst"] == found.worst
    assert [one["name"] for one in summary["checks"]] == [one.name for one in found.checks]
    assert summary["curve"] == [list(point) for point in found.curve]
    assert not {"examples", "right", "fooled_by"} & set(summary)
    assert "examples" not in repr(found)


def test_rounded_images_are_what_the_network_sees() -> None:
    """With `requantize` every input is on the grid of 8 bits; without it those that attacks make aren't. Sources too."""
    for requantize in (True, False):
        off: list[float] = []

        def look(x: Tensor, off: list[float] = off) -> Tensor:
            off.append(float((x.detach() * 255 - (x.detach() * 255).round()).abs().max()))
            return x

        eight = (X[:20] * 255).round() / 255
        networks = [Before(fitted_network(seed), look) for seed in (0, 1)]
        assess(networks[0], eight, Y[:20], eps=0.1, attacks="quick", requantize=requantize, sources={"a": networks[1]})
        assert (max(off) < 1e-3) == requantize


def test_normalisation_is_the_networks() -> None:
    """mean and std given beside a network are those of a `Classifier` that has them."""
    network = fitted_network()
    with torch.no_grad():
        network.stem.weight *= 0.5
    beside = assess(network, X, Y, eps=0.1, attacks="fgsm", mean=(0.0,), std=(0.5,))
    inside = assess(Classifier(network, (0.0,), (0.5,)), X, Y, eps=0.1, attacks="fgsm")
    assert beside.summary() == inside.summary()
    assert beside.summary() == assess(fitted_network(), X, Y, eps=0.1, attacks="fgsm").summary()


@pytest.mark.parametrize("folder", [None, "kept"])
def test_progress_is_told_to_the_end(folder: str | None, tmp_path: Path) -> None:
    """It never goes back or beyond its total, which doesn't change and is reached; every attack is named."""
    told: list[tuple[float, float, str]] = []
    keep = tmp_path / folder if folder else None
    for _ in range(2):
        told.clear()
        assess(
            fitted_network(),
            X,
            Y,
            eps=0.1,
            attacks="quick",
            folder=keep,
            on_progress=lambda done, total, note: told.append((done, total, note)),
        )
        done = [one[0] for one in told]
        assert done == sorted(done)
        assert len({one[1] for one in told}) == 1
        assert done[0] == 0
        assert done[-1] == told[0][1] > 0
        assert max(done) == done[-1]
        assert {"noise", "pgd", "square"} < {one[2] for one in told}
        assert len(set(done)) > 8


def test_what_else_is_run_changes_nothing(few_bits: nn.Module) -> None:
    """An attack finds the same alone as among others, and another seed something else."""
    options = {"eps": 0.08}
    alone = assess(few_bits, X, Y, attacks="pgd", **options)  # type: ignore[arg-type]
    among = assess(few_bits, X, Y, attacks="noise,rfgsm,pgd", **options)  # type: ignore[arg-type]
    assert torch.equal(alone.right["pgd"], among.right["pgd"])
    assert alone.curve == among.curve
    other = assess(few_bits, X, Y, attacks="pgd", seed=1, **options)  # type: ignore[arg-type]
    assert not torch.equal(alone.examples, other.examples)
