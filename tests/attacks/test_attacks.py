"""Attacks find what can be found: closed forms on linear networks, certificates, and always within the ball."""

from __future__ import annotations

import copy
import math
import random
import re
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq.attacks import base
from haq.attacks.base import AttackBudget, AttackSetup, EvaluationAttack
from haq.attacks.classifier import Classifier, TwinnedClassifier
from haq.attacks.evaluation_attacks import noise, pgd
from haq.attacks.losses import cross_entropy, dlr_loss, temperatures
from haq.attacks.suite import suite
from haq.attacks.threat_model import ThreatModel
from tests.conftest import brightest, fitted_network, images, small_network

TINY = AttackBudget(steps=3, restarts=2, apgd=4, targets=2, queries=5, draws=2)
NORMS = ("linf", "l2")


def linear_network(seed: int = 0, classes: int = 2) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))


def margins(network: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The label's logit less the largest other."""
    with torch.no_grad():
        logits = network(x)
    own = logits.gather(1, labels[:, None])[:, 0]
    return own - logits.scatter(1, labels[:, None], -math.inf).amax(1)


def answers(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network(x).argmax(1)


def attack(
    name: str,
    victim: Classifier,
    threat: ThreatModel,
    x: Tensor,
    labels: Tensor,
    *,
    sources: Mapping[str, Classifier] | None = None,
    backward: str = "ste",
    seed: int = 0,
) -> Tensor:
    classes = victim(x[:1]).shape[1]
    (one,) = suite(name, victim, threat, classes, sources=sources, backward=backward)
    return one.run(x, labels, seed)


def quantized(network: nn.Module, bits: int = 2) -> nn.Module:
    return Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=bits), calibrate=images(32))


@pytest.mark.parametrize("name", ["fgsm", "pgd", "pgd-temperature"])
def test_linear_networks_lose_the_closed_form(name: str) -> None:
    """With two classes and w the difference of their weights the margin falls by eps ||w||_1 exactly, in the middle of [0, 1];
    at its borders by that of the pixels that can still move."""
    network, threat = linear_network(), ThreatModel(0.1)
    victim, labels = Classifier(network), torch.arange(2).repeat(10)
    w = (network[1].weight[0] - network[1].weight[1]).detach().view(1, 8, 8)
    middle, everywhere = 0.3 + 0.4 * images(20), images(20, seed=1)
    found = attack(name, victim, threat, middle, labels)
    fall = margins(network, middle, labels) - margins(network, found, labels)
    torch.testing.assert_close(fall, (0.1 * w.abs().sum()).expand(20), rtol=1e-4, atol=1e-5)

    everywhere[:, :, :4] = everywhere[:, :, :4].round()
    sign = torch.where(labels == 0, -1.0, 1.0).view(-1, 1, 1, 1) * w.sign()
    best = (everywhere + 0.1 * sign).clamp(0, 1)
    torch.testing.assert_close(attack(name, victim, threat, everywhere, labels), best, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "close"), [("fgsm", 1e-5), ("pgd", 0.03), ("pgd-temperature", 0.03)])
def test_linear_networks_lose_the_closed_form_in_l2(name: str, close: float) -> None:
    """The margin falls by eps ||w||_2, and never by more. Fifty steps of eps / 20 leave a little of the random start."""
    network, threat = linear_network(), ThreatModel(0.25, "l2")
    x, labels = 0.3 + 0.4 * images(20), torch.arange(2).repeat(10)
    w = (network[1].weight[0] - network[1].weight[1]).detach()
    found = attack(name, Classifier(network), threat, x, labels)
    fall = (margins(network, x, labels) - margins(network, found, labels)) / (0.25 * w.norm())
    assert fall.min() > 1 - close
    assert fall.max() < 1 + 1e-4


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", ["fgsm", "pgd", "apgd-ce"])
def test_linear_networks_are_fooled_where_they_can_be(name: str, norm: str) -> None:
    """By all images whose margin is below eps times the dual norm of w, and by no others."""
    network = linear_network()
    x = 0.3 + 0.4 * images(200)
    labels = answers(network, x)
    w = (network[1].weight[0] - network[1].weight[1]).detach()
    size = w.abs().sum() if norm == "linf" else w.norm()
    margin = margins(network, x, labels)
    threat = ThreatModel(float(margin.median() / size), norm)
    found = attack(name, Classifier(network), threat, x, labels)
    clear = (margin / (threat.eps * size) - 1).abs() > (0.03 if norm == "l2" else 1e-3)
    fooled = answers(network, found) != labels
    assert torch.equal(fooled[clear], (margin < threat.eps * size)[clear])
    assert 80 < fooled.sum() < 120


@settings(max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    eps=st.floats(1e-3, 1),
    norm=st.sampled_from(NORMS),
    bits=st.sampled_from([None, 1, 2, 4]),
    requantize=st.booleans(),
)
def test_every_attack_stays_within_the_ball(seed: int, eps: float, norm: str, bits: int | None, requantize: bool) -> None:
    """All of `full`, on networks and images at random, with an eps from tiny to as large as can be: the images that come back
    are within eps and [0, 1] to 1e-6."""
    network, x = small_network(seed), images(6, seed)
    x[0], x[1] = x[0].round(), 0.5
    if bits is not None:
        network = Q.quantize(network, Q.BitPolicy.uniform(network, w=max(2, bits), a=bits), calibrate=images(16, seed))
    threat = ThreatModel(eps if norm == "linf" else 8 * eps, norm)
    victim = Classifier(network, requantize=requantize)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(base.ATTACK_BUDGETS, "full", TINY)
        plan = suite("full", victim, threat, 4, sources={"other": Classifier(small_network(seed + 1))})
    assert len(plan) == (11 if bits is None else 14)
    for one in plan:
        labels = torch.randint(4, (6,), generator=torch.Generator().manual_seed(seed))
        found = one.perturb(x.clone(), labels).detach().double()  # before `Attack.run` looks at it
        change = (found - x.double()).flatten(1)
        size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
        assert size.max() <= threat.eps + 1e-6, one.name
        assert found.min() >= -1e-6, one.name
        assert found.max() <= 1 + 1e-6, one.name
        assert threat.within(x, found)


class Shift(EvaluationAttack):
    """Every pixel moves by so much."""

    by = 0.0

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        return images + self.by


def shifted(by: float, threat: ThreatModel, x: Tensor, labels: Tensor) -> Tensor:
    stub = Shift("stub", AttackSetup(Classifier(linear_network()), threat, TINY, 2))
    stub.by = by
    return stub.run(x, labels, 0)


def test_what_leaves_the_ball_is_not_taken() -> None:
    """An attack that returns images outside of the ball or of [0, 1], or no numbers, is a mistake that is told."""
    x, labels = torch.full((2, 1, 8, 8), 0.95), torch.zeros(2, dtype=torch.int64)
    for shift in (-0.1 - 2e-6, math.nan):
        with pytest.raises(RuntimeError, match="stub left the ball: linf, eps 25.5/255"):
            shifted(shift, ThreatModel(0.1), x, labels)
    with pytest.raises(RuntimeError, match="stub left the ball: l2, eps 8"):
        shifted(0.06, ThreatModel(8, "l2"), x, labels)
    fine = shifted(-0.1, ThreatModel(0.1), x, labels)
    assert torch.equal(fine, x - 0.1)


def test_images_of_another_shape_are_not_taken() -> None:
    """They would be compared by broadcasting, and be called allowed."""

    class Whole(EvaluationAttack):
        def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
            return images[:1]

    x, labels = torch.full((2, 1, 8, 8), 0.5), torch.zeros(2, dtype=torch.int64)
    whole = Whole("whole", AttackSetup(Classifier(linear_network()), ThreatModel(0.1), TINY, 2))
    with pytest.raises(RuntimeError, match=r"whole returned images of another shape: \(1, 1, 8, 8\) for images of \(2, "):
        whole.run(x, labels, 0)


class Chain(nn.Sequential):
    """Linear layers of spectral norm 1 with a ReLU between them: how bright each quarter is, in another order. The logits
    move by as much as an image does, at most, and their differences by sqrt(2) of it, which is reached."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(64, 4, bias=False), nn.ReLU(), nn.Linear(4, 4, bias=False))
        quarters = torch.eye(4).view(4, 2, 2).repeat_interleave(4, 1).repeat_interleave(4, 2)
        self[1].weight.data = quarters.flatten(1) / 4
        self[3].weight.data = torch.eye(4)[[2, 0, 3, 1]]


def test_no_attack_breaks_a_certificate(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image whose margin is above sqrt(2) Lip eps can't be fooled in L2 by anything; of those clearly below all are."""
    monkeypatch.setitem(base.ATTACK_BUDGETS, "full", AttackBudget(10, 2, 20, 3, 100, 10))
    network, x = Chain(), 0.3 + 0.4 * images(100)
    labels = answers(network, x)
    bound = Q.lipschitz_bound(network, x[:1])
    assert bound == pytest.approx(1, rel=1e-3)
    margin = margins(network, x, labels)
    eps = float(margin.median()) / (math.sqrt(2) * bound)
    need, threat = math.sqrt(2) * bound * eps, ThreatModel(eps, "l2")
    fooled = {}
    for one in suite("full", Classifier(network), threat, 4, sources={"other": Classifier(fitted_network())}):
        fooled[one.name] = answers(network, one.run(x, labels, 0)) != labels
    union = torch.stack(list(fooled.values())).any(0)
    assert not union[margin > 1.002 * need].any()
    assert union[margin < 0.9 * need].all()
    assert (margin < 0.9 * need).sum() > 30
    for name in ("pgd", "apgd-ce", "square", "transfer-other"):
        assert fooled[name].any(), name


def test_the_dlr_loss_is_worked_out_by_hand() -> None:
    """-(z_y - max z_i) / (z_1 - z_3), and the same for any scale and shift of the logits."""
    logits = torch.tensor([3.0, 1.0, 0.0, -2.0]).repeat(4, 1)
    values = dlr_loss(logits, torch.arange(4))
    torch.testing.assert_close(values, torch.tensor([-2 / 3, 2 / 3, 1, 5 / 3]))
    for changed in (1000 * logits, 1e-3 * logits, logits + 17, logits[:, [2, 0, 3, 1]]):
        labels = torch.tensor([1, 3, 0, 2]) if torch.equal(changed, logits[:, [2, 0, 3, 1]]) else torch.arange(4)
        torch.testing.assert_close(dlr_loss(changed, labels), values, rtol=1e-4, atol=1e-5)
    assert dlr_loss(torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64)).item() == 0
    with pytest.raises(ValueError, match="the DLR loss needs at least 3 classes, the logits have 2: use the cross-entropy"):
        dlr_loss(logits[:, :2], torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("norm", NORMS)
def test_rfgsm_is_half_of_the_way_at_random_and_half_along_the_gradient(norm: str) -> None:
    """x' = x + eps / 2 of a random sign or direction, then eps / 2 along the sign or direction of the gradient at x'."""
    network, threat = small_network(), ThreatModel(0.05, norm)
    x, labels = 0.3 + 0.4 * images(5), torch.tensor([0, 1, 2, 3, 0])
    found = attack("rfgsm", Classifier(network), threat, x, labels, seed=11)

    def unit(change: Tensor) -> Tensor:
        return change.sign() if norm == "linf" else change / change.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        half = x + 0.025 * unit(torch.randn_like(x))
    inputs = half.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(cross_entropy(network(inputs), labels).sum(), inputs)
    torch.testing.assert_close(found, half + 0.025 * unit(gradient), rtol=0, atol=1e-6)
    assert (threat.sizes(half - x) - 0.025).abs().max() < 1e-6


@pytest.mark.parametrize("norm", NORMS)
def test_noise_is_as_large_as_the_ball(norm: str) -> None:
    """Each draw that is shown has the size of the ball, signs in linf; more fool more, and who is fooled is left alone."""
    network, threat = Chain(), ThreatModel(0.2 if norm == "linf" else 0.8, norm)
    x = 0.4 + 0.2 * images(60)
    labels = answers(network, x)
    kept = []
    for draws in (1, 10, 100):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found = noise(network, x, labels, threat, draws)
        torch.testing.assert_close(threat.sizes(found - x), torch.full((60,), threat.eps), rtol=1e-5, atol=1e-6)
        if norm == "linf":
            torch.testing.assert_close((found - x).abs(), torch.full_like(x, 0.2))
        kept.append((answers(network, found) != labels, found))
    (once, first), _, (often, last) = kept
    assert once.sum() < often.sum()
    assert once.any()
    assert torch.equal(last[once], first[once])


def hessian_norms(network: nn.Module, x: Tensor, betas: Tensor) -> Tensor:
    """The Frobenius norm of the Hessian of the cross-entropy of beta times the logits, by autograd."""
    label = torch.zeros(1, dtype=torch.int64)

    def loss(beta: Tensor) -> Tensor:
        hessian = torch.autograd.functional.hessian(lambda x: F.cross_entropy(beta * network(x), label), x)
        return hessian.norm()

    return torch.stack([loss(beta) for beta in betas])


@pytest.mark.parametrize("scale", [1.0, 1000.0, 1e-3])
def test_temperatures_are_those_of_the_most_curvature(scale: float) -> None:
    """Of the grid around the logits' spread, the one where a Hessian by brute force has the largest norm."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).double()
    drawn = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).double()
    network[1].weight.data, network[1].bias.data = scale * drawn[:, :4], 0.3 * scale * drawn[:, 4]
    x = torch.rand(3, 1, 2, 2, generator=torch.Generator().manual_seed(1)).double()
    found = temperatures(network, x)
    for image, temperature in zip(x.split(1), found, strict=True):
        grid = torch.logspace(-2, 2, 41, dtype=torch.float64) / network(image).detach().std()
        norms = hessian_norms(network, image, grid)
        best = int(norms.argmax())
        assert 0 < best < 40
        assert temperature.item() == pytest.approx(grid[best].item(), rel=1e-9)


def test_temperatures_make_saturated_networks_attackable_again() -> None:
    """With logits times 1000 the cross-entropy has no gradient; with temperatures as much as before is found."""
    network = fitted_network()
    x = images(60)
    labels = answers(network, x)

    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return 1000 * self.network(x)

    threat = ThreatModel(0.2)
    sure = margins(network, x, labels) > 0.5  # times 1000 so much that exp(-margin) is zero
    assert sure.sum() > 40
    fooled = {
        (net, name): answers(network, attack(name, Classifier(net), threat, x, labels))[sure] != labels[sure]
        for net in (network, Loud())
        for name in ("pgd", "pgd-temperature")
    }
    before, tempered, loud, mended = [float(mask.double().mean()) for mask in fooled.values()]
    assert loud < before - 0.3
    assert tempered >= before - 0.05
    assert mended >= tempered - 0.05


def test_the_same_seed_gives_the_same_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was drawn before, and another seed others. The global generators go on as if nothing had been."""
    monkeypatch.setitem(base.ATTACK_BUDGETS, "full", TINY)
    network, x, threat = quantized(fitted_network(), 4), images(6), ThreatModel(0.4)
    labels = answers(network, x)
    plan = suite("full", Classifier(network), threat, 4, sources={"other": Classifier(fitted_network(1))})
    state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    first = [one.run(x, labels, 3) for one in plan]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))
    assert random.getstate() == python_state
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(99)
        second = [one.run(x, labels, 3) for one in plan]
    others = [one.run(x, labels, 4) for one in plan]
    for one, a, b, c in zip(plan, first, second, others, strict=True):
        assert torch.equal(a, b), one.name
        if one.name != "fgsm":
            assert not torch.equal(a, c), one.name


def test_the_users_network_and_images_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parameters, gradients, their flags, the training mode and the backward mode are as they were; so are the images."""
    monkeypatch.setitem(base.ATTACK_BUDGETS, "full", TINY)
    network = quantized(small_network()).train()
    network.stem.weight.requires_grad_(False)
    x, labels, threat = images(4), torch.arange(4), ThreatModel(0.1)
    network(x).sum().backward()
    before = copy.deepcopy(network.state_dict())
    gradients = {name: p.grad if p.grad is None else p.grad.clone() for name, p in network.named_parameters()}
    victim = Classifier(network)
    for one in suite("full", victim, threat, 4, backward="bpda-soft"):
        one.run(x, labels, 0)
    assert torch.equal(x, images(4))
    assert torch.equal(labels, torch.arange(4))
    assert all(module.training for module in network.modules())
    assert not any(module.training for module in victim.modules())
    for name, parameter in network.named_parameters():
        assert parameter.requires_grad == (name != "stem.weight")
        assert (parameter.grad is None) == (gradients[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name])
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert {layer.backward_mode for net in (network, victim) for layer in Q.quant_layers(net).values()} == {"ste"}
    fixed = [*victim.parameters(), *victim.twin().parameters()]
    assert not any(parameter.requires_grad for parameter in fixed)


def test_a_classifier_normalises_and_rounds() -> None:
    """(x - mean) / std, of images on the grid of 8 bits if so asked, with the gradient passing; in evaluation mode."""
    network = small_network()
    x = images(3).requires_grad_()
    plain, rounding = (Classifier(network, (0.4,), (0.2,), requantize=flag) for flag in (False, True))
    assert torch.equal(plain(x), network((x - 0.4) / 0.2))
    eight = (x.detach() * 255).round() / 255
    torch.testing.assert_close(rounding(x), network((eight - 0.4) / 0.2), rtol=1e-4, atol=1e-4)
    assert not torch.equal(rounding(x), plain(x))
    ends = torch.tensor([0.0, 1.0]).repeat(32).view(1, 1, 8, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(rounding(ends).square().sum(), ends)
    (expected,) = torch.autograd.grad(plain(ends).square().sum(), ends)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)
    assert not plain.quantized
    assert Classifier(quantized(network)).quantized


@pytest.mark.parametrize("mode", ["twin", "hard", "ste"])
def test_gradients_are_those_of_the_mode(mode: str) -> None:
    """FGSM, step by step: the quantized network's logits with the gradient of the float one (twin), none at all (hard), or
    that of training."""
    qnetwork, threat = quantized(small_network()), ThreatModel(0.05)
    x, labels = 0.3 + 0.4 * images(5), torch.tensor([0, 1, 2, 3, 0])
    network = Q.float_copy(qnetwork)
    inputs = x.clone().requires_grad_()
    logits = qnetwork(x).detach()
    to_logits = logits.softmax(1) - F.one_hot(labels, 4)
    through = network if mode == "twin" else qnetwork
    (gradient,) = torch.autograd.grad((to_logits * through(inputs)).sum(), inputs)
    expected = x if mode == "hard" else x + 0.05 * gradient.sign()
    found = attack("fgsm", Classifier(qnetwork), threat, x, labels, backward=mode)
    clear = gradient.abs() > 1e-6
    assert clear.double().mean() > 0.9
    torch.testing.assert_close(found[clear], expected[clear], rtol=0, atol=1e-6)


def test_the_twin_keeps_the_logits_of_the_quantized_network() -> None:
    """To the last bit, with the gradient of the float network, and of its weights as they are now."""
    qnetwork = quantized(small_network())
    with torch.no_grad():
        qnetwork.classifier.weight += 0.1
    victim = Classifier(qnetwork, (0.4,), (0.2,))
    twinned, x = TwinnedClassifier(victim, victim.twin()), images(5).requires_grad_()
    with torch.no_grad():
        assert torch.equal(twinned(x), victim(x))
    assert not torch.allclose(twinned(x), victim.twin()(x), atol=1e-3)
    (found,) = torch.autograd.grad(twinned(x)[:, 1].sum(), x)
    (expected,) = torch.autograd.grad(Q.float_copy(qnetwork)((x - 0.4) / 0.2)[:, 1].sum(), x)
    torch.testing.assert_close(found, expected)
    (own,) = torch.autograd.grad(victim(x)[:, 1].sum(), x)
    assert not torch.allclose(own, expected, atol=1e-3)


def test_transfer_is_what_fools_another_network() -> None:
    """PGD on the source, whatever the victim is; it fools the source, and the victim less."""
    x, threat = images(40), ThreatModel(0.1)
    source = Classifier(fitted_network(1))
    labels = brightest(x)
    victims = (Classifier(small_network()), Classifier(linear_network(0, 4)))
    found = [attack("transfer-other", victim, threat, x, labels, sources={"other": source}, seed=5) for victim in victims]
    assert torch.equal(*found)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        assert torch.equal(found[0], pgd(source, x, labels, threat, steps=50))
    assert (answers(source, found[0]) != labels).double().mean() > 0.5


def test_restarts_add_up() -> None:
    """Who is fooled by the first start stays fooled, with the same image; more are."""
    network, threat, x = fitted_network(), ThreatModel(0.06), images(100)
    labels = answers(network, x)
    found = []
    for restarts in (1, 8):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            found.append(pgd(network, x, labels, threat, steps=2, restarts=restarts))
    once, often = (answers(network, images) != labels for images in found)
    assert torch.equal(found[0][once], found[1][once])
    assert 0 < once.sum() < often.sum()
    assert len(pgd(network, x[:0], labels[:0], threat, steps=2)) == 0


def test_efforts_are_lists_of_attacks() -> None:
    """quick < standard < full; only `full` has other backward passes, those that the victim has and the first isn't."""
    threat = ThreatModel()
    plain, quant = Classifier(small_network()), Classifier(quantized(small_network()))
    quick = ["noise", "fgsm", "rfgsm", "pgd", "apgd-ce", "apgd-dlr", "square"]
    standard = [*quick[:4], "pgd-dlr", "pgd-temperature", *quick[4:6], "apgd-dlr-targeted", "square"]

    def names(*arguments: object, **options: object) -> list[str]:
        return [one.name for one in suite(*arguments, **options)]  # type: ignore[arg-type]

    assert names("quick", quant, threat, 10) == quick
    assert names("standard", quant, threat, 10) == standard
    assert names("full", plain, threat, 10) == standard
    modes = ["pgd-ste", "pgd-bpda-identity", "pgd-bpda-soft", "pgd-twin"]
    assert names("full", quant, threat, 10) == [*standard, *modes[1:]]
    assert names("full", quant, threat, 10, backward="hard") == [*standard, *modes]
    assert names("full", quant, threat, 10, backward="twin") == [*standard, *modes[:3]]
    assert names("quick", quant, threat, 10, sources={"a": plain}) == [*quick, "transfer-a"]
    assert names("square, fgsm,square", quant, threat, 10) == ["square", "fgsm"]
    # DLR needs three classes, its targeted version four: efforts do without.
    assert [name for name in standard if name not in names("standard", plain, threat, 2)] == [
        "pgd-dlr",
        "apgd-dlr",
        "apgd-dlr-targeted",
    ]
    assert [name for name in standard if name not in names("standard", plain, threat, 3)] == ["apgd-dlr-targeted"]
    passes = {one.name: one.passes for one in suite("full", plain, threat, 10)}
    assert passes["apgd-dlr-targeted"] == 900
    assert {one.name: one.passes for one in suite("full", plain, threat, 4)}["apgd-dlr-targeted"] == 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": 8}, "eps is 8; images are in [0, 1], so it is above 0 and at most 1: 8/255, not 8"),
        ({"eps": 0}, "eps is 0; "),
        ({"eps": -0.1}, "eps is -0.1; "),
        ({"eps": math.nan}, "eps is nan; "),
        ({"eps": math.inf, "norm": "l2"}, "eps is inf; "),
        ({"norm": "l1"}, "unknown norm 'l1'; known: linf, l2"),
    ],
)
def test_a_bad_threat_is_named(arguments: dict[str, float | str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        ThreatModel(**arguments)  # type: ignore[arg-type]


def test_bad_attacks_are_named() -> None:
    """Unknown names and modes, and losses without enough classes if asked for by name."""
    victim, threat = Classifier(linear_network()), ThreatModel()
    for names, classes, message in (
        ("fgsm,bim", 2, "unknown attack 'bim'; known: quick, standard, full, or some of noise, fgsm, "),
        ("", 2, "unknown attack ''"),
        ("pgd-twin", 2, "unknown attack 'pgd-twin'"),
        ("transfer-x", 2, "unknown attack 'transfer-x'"),
        ("apgd-dlr", 2, "apgd-dlr needs at least 3 classes, the network has 2: use pgd and apgd-ce"),
        ("fgsm,pgd-dlr", 2, "pgd-dlr needs at least 3 classes, the network has 2"),
        ("apgd-dlr-targeted", 3, "apgd-dlr-targeted needs at least 4 classes, the network has 3"),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            suite(names, victim, threat, classes)
    with pytest.raises(ValueError, match="unknown backward mode 'soft'; known: ste, bpda-identity, bpda-soft, hard, twin"):
        suite("fgsm", victim, threat, 2, backward="soft")


def test_threats_are_words() -> None:
    assert [str(threat) for threat in (ThreatModel(), ThreatModel(0.5, "l2"))] == ["linf, eps 8/255", "l2, eps 0.5"]
