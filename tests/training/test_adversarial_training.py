"""Training against attacks: perturbations are what papers say, touch nothing else, and leave a network that bears them."""

from __future__ import annotations

import copy
import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq import data, networks, train, training
from haq.attacks import gradient, proxy, threat_model
from haq.attacks.proxy import ProxyAttack
from haq.attacks.threat_model import PerturbationBall
from haq.console.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, run_command
from haq.store.checkpoint import Checkpoint
from haq.training.adversaries import Adversary, TrainingAttack
from tests.conftest import images, small_network

EPS = 8 / 255
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
KINDS = ("pgd", "rfgsm", "free")


def coloured() -> networks.Network:
    """For 3x6x6 images, with a norm and dropout in it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(128, 5)
    return networks.Network("coloured", nn.Sequential(*layers), (3, 6, 6), MEAN, STD)


def bytes_of(count: int, *shape: int) -> Tensor:
    """uint8 images, black and white pixels among them."""
    made = torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(3))
    made[:, :, 0], made[:, :, 1] = 0, 255
    return made.to(torch.uint8)


def attack(network: networks.Network, kind: str, eps: float = EPS) -> TrainingAttack:
    return TrainingAttack(Adversary(kind, eps), PerturbationBall.of(network, eps))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eps", [EPS, 0.3])
def test_perturbed_images_are_images_within_eps(kind: str, eps: float) -> None:
    network = coloured()
    given, labels = bytes_of(16, 3, 6, 6), torch.arange(16) % 5
    inputs, loss = network.preprocess(given), functools.partial(F.cross_entropy, target=labels)
    made, generator = attack(network, kind, eps), torch.Generator().manual_seed(0)
    for _ in range(3):  # free begins with no perturbation at all
        perturbed = made.perturb(network.module, inputs, loss, generator)
        if kind == "free":
            loss(network.module(perturbed)).backward()
            made.learn(perturbed)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    pixels, before = perturbed.detach().double() * std + mean, given / 255.0
    change = (pixels - before).abs()
    assert change.max() <= eps + 1e-6
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    for channel in range(3):  # and eps is reached, in each of them
        assert change[:, channel].max() >= eps - 1e-6


def linear(classes: int = 2) -> tuple[networks.Network, Tensor, Tensor, Tensor]:
    """A linear network with two classes, inputs that no perturbation takes out of range, labels, and the sign of each input's
    gradient: towards the weights of the other class."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(12, classes))
    weight = torch.randn(classes, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        module[1].weight.copy_(weight)
        module[1].bias.zero_()
    network = networks.Network("linear", module, (3, 2, 2), MEAN, STD)
    inputs, labels = network.preprocess(bytes_of(8, 3, 2, 2) // 2 + 64), torch.arange(8) % 2
    sign = (weight[1 - labels] - weight[labels]).sign().view(8, 3, 2, 2)
    return network, inputs, labels, sign


def test_on_a_linear_network_pgd_is_the_closed_form() -> None:
    """x + eps sign(w), which costs a margin of eps |w|_1: the largest loss there is in the ball."""
    network, inputs, labels, sign = linear()
    ball = PerturbationBall.of(network, EPS)
    slope = gradient.input_gradient(network.module, functools.partial(F.cross_entropy, target=labels))
    fgsm = inputs + ball.radius * slope(inputs).sign()
    torch.testing.assert_close(fgsm, inputs + ball.radius * sign)
    for steps in (1, 2, 7):
        made = gradient.pgd(slope, inputs, ball, steps, torch.Generator().manual_seed(steps))
        torch.testing.assert_close(made, fgsm)
    scores = network.module(torch.stack([inputs, made]).flatten(0, 1)).detach().unflatten(0, (2, 8))
    own, other = (scores.gather(2, index.expand(2, 8).unsqueeze(2)) for index in (labels, 1 - labels))
    weight = network.module[1].weight.detach()
    loss_of_margin = ((weight[0] - weight[1]).view(3, 2, 2).abs() * ball.radius).sum()
    torch.testing.assert_close((own - other)[0] - (own - other)[1], loss_of_margin.expand(8, 1))


def test_the_edge_of_the_range_of_images_is_kept() -> None:
    network, _, labels, sign = linear()
    inputs = network.preprocess(bytes_of(8, 3, 2, 2))  # black and white
    ball = PerturbationBall.of(network, EPS)
    slope = gradient.input_gradient(network.module, functools.partial(F.cross_entropy, target=labels))
    made = gradient.pgd(slope, inputs, ball, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(made, (inputs + ball.radius * sign).clamp(ball.low, ball.high))
    assert (made == inputs).any()


def test_pgd_starts_at_random_and_takes_the_steps_that_it_says() -> None:
    """Where the gradient says no direction the start is what remains: uniform in the ball. And steps are 2.5 eps / steps."""
    network, inputs, _, _ = linear()
    ball = PerturbationBall.of(network, EPS)
    inputs = inputs[:1].expand(4000, -1, -1, -1)
    start = gradient.pgd(torch.zeros_like, inputs, ball, 7, torch.Generator().manual_seed(0))
    place = (start - inputs) / ball.radius
    assert place.abs().max() <= 1 + 1e-5
    assert abs(place.mean()) < 0.01
    assert abs(place.var() - 1 / 3) < 0.01
    moved = gradient.pgd(torch.ones_like, inputs, ball, 5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(moved, torch.minimum(start + 2.5 * ball.radius, inputs + ball.radius))
    seen: list[Tensor] = []
    gradient.pgd(lambda x: seen.append(x) or torch.ones_like(x), inputs, ball, 50, torch.Generator().manual_seed(0))  # type: ignore[func-returns-value]
    torch.testing.assert_close(seen[1], torch.minimum(seen[0] + 2.5 / 50 * ball.radius, inputs + ball.radius))


def test_rfgsm_is_its_formula() -> None:
    network, inputs, _, sign = linear()
    ball = PerturbationBall.of(network, EPS)
    points: list[Tensor] = []

    def gradient_of(x: Tensor) -> Tensor:
        points.append(x)
        return sign

    made = gradient.rfgsm(gradient_of, inputs, ball, torch.Generator().manual_seed(4))
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(points[0], inputs + ball.radius / 2 * noise.sign())
    torch.testing.assert_close(made, inputs + ball.radius / 2 * noise.sign() + ball.radius / 2 * sign)
    assert len(points) == 1


@pytest.mark.parametrize("kind", ["pgd", "rfgsm"])
def test_crafting_touches_nothing(kind: str) -> None:
    network = coloured()
    module = network.module.train()
    module[3].eval()  # a part that was frozen stays so
    inputs, labels = network.preprocess(bytes_of(8, 3, 6, 6)), torch.arange(8) % 5
    F.cross_entropy(module(inputs), labels).backward()
    loss = functools.partial(F.cross_entropy, target=labels)
    state = copy.deepcopy(module.state_dict())
    gradients = [p.grad.clone() for p in module.parameters()]
    modes, drawn = [part.training for part in module.modules()], torch.get_rng_state()
    perturbed = attack(network, kind).perturb(module, inputs, loss, torch.Generator().manual_seed(0))
    assert not perturbed.requires_grad
    assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
    assert all(torch.equal(p.grad, before) for p, before in zip(module.parameters(), gradients, strict=True))
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.get_rng_state(), drawn)
    module.eval()
    assert loss(module(perturbed)) > 1.05 * loss(module(inputs))


def grey(count: int) -> data.Split:
    return data.Split(torch.full((count, 1, 8, 8), 128, dtype=torch.uint8), torch.arange(count) % 4)


def small(seed: int = 0) -> networks.Network:
    return networks.Network("small", small_network(seed), (1, 8, 8))


def shipped(count: int) -> data.Split:
    """Random images with labels that can be learned."""
    x = (255 * images(count)).to(torch.uint8)
    with torch.no_grad():
        return data.Split(x, small_network()(x / 255).argmax(1))


def test_free_training_replays_batches_and_keeps_the_perturbation() -> None:
    network, given = small(), []
    network.module.register_forward_pre_hook(lambda module, arguments: given.append(arguments[0]))
    steps: list[tuple[int, int]] = []
    epochs: list[int] = []
    training.fit(
        network,
        grey(40),
        training.TrainConfig(9, learning_rate=0.01, seed=0, batch_size=16, adversary=Adversary("free", EPS, steps=4)),
        on_step=lambda step, of: steps.append((step, of)),
        on_epoch=lambda epoch, loss: epochs.append(epoch),
    )
    assert epochs == [1, 2, 3]  # 9 / 4, rounded up
    assert steps == [(step, 36) for step in range(1, 37)]  # 3 batches, each 4 times, in 3 passes
    assert [len(x) for x in given] == [16] * 8 + [8] * 4 + [16] * 8 + [8] * 4 + [16] * 8 + [8] * 4
    # Moved and mirrored, the middle of a grey image is what it was: what differs from it is the perturbation.
    middle = (slice(None), slice(None), slice(2, -2), slice(2, -2))
    delta = torch.zeros(16, 1, 8, 8)
    for x in given:
        torch.testing.assert_close((x.detach() - 128 / 255)[middle], delta[: len(x)][middle], atol=1e-6, rtol=0)
        delta[: len(x)] = (delta[: len(x)] + EPS * x.grad.sign()).clamp(-EPS, EPS)
    assert (delta.abs() > 0).float().mean() > 0.5


def test_against_a_teacher_the_distance_from_its_answers_to_clean_images_is_raised() -> None:
    """A copy of its teacher is at no distance from it, until its images are attacked and the teacher's aren't."""
    network, split, found = small(), shipped(64), {}
    for name, adversary in (("clean", None), *((kind, Adversary(kind, 0.1)) for kind in KINDS)):
        training.fit(
            network,
            split,
            training.TrainConfig(4, learning_rate=1e-9, seed=0, fixed_norms=True, adversary=adversary),
            module=small_network(),
            teacher=network.module,
            on_epoch=lambda epoch, loss, name=name: found.update({name: loss}),  # type: ignore[misc]
        )
    assert abs(found["clean"]) < 1e-6
    assert all(found[kind] > 1e-3 for kind in KINDS)
    assert found["pgd"] > 2 * found["rfgsm"]


def test_finetuning_takes_a_penalty_and_an_adversary() -> None:
    network = small()
    qnetwork = Q.quantize(network.module, Q.BitPolicy.uniform(network.module, w=3, a=3), calibrate=images(32))
    asked: list[nn.Module] = []

    def penalty(module: nn.Module) -> Tensor:
        asked.append(module)
        return Q.lipschitz_penalty(module, beta=1.0)

    options = {}, {"penalty": penalty}, {"adversary": Adversary("rfgsm", 0.1)}
    given = {"epochs": 2, "seed": 0, "keep_best": False}
    tuned = [training.finetune(network, qnetwork, shipped(64), **given, **option) for option in options]  # type: ignore[arg-type]
    assert len(asked) == 4
    weights = [net.get_submodule("pointwise").weight for net in tuned]
    assert not any(torch.equal(weights[0], other) for other in weights[1:])
    penalties = [Q.lipschitz_penalty(net).item() for net in tuned]
    assert penalties[1] < 0.9 * penalties[0]


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_training_goes_on_exactly(kind: str, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def trained(path: Path, last: int | None = None) -> nn.Module:
        def on_epoch(epoch: int, loss: float) -> None:
            if epoch == last:
                raise Killed

        module = small_network(1)
        state = Checkpoint(path, {"kind": kind})
        adversary = Adversary(kind, EPS, 2 if kind == "free" else None)
        training.fit(
            small(),
            shipped(48),
            training.TrainConfig(6, learning_rate=0.05, seed=0, batch_size=16, adversary=adversary),
            module=module,
            state=state,
            on_epoch=on_epoch,
        )
        return module

    whole = trained(tmp_path / "whole")
    with pytest.raises(Killed):
        trained(tmp_path / "part", last=2)
    kept = torch.load(tmp_path / "part", weights_only=True)["perturbation"]
    assert (kept is not None) == (kind == "free")
    part = trained(tmp_path / "part")
    assert all(torch.equal(value, part.state_dict()[key]) for key, value in whole.state_dict().items())


# The others are held against their formulas above; here it is to be seen that training by one is worth it.
@pytest.mark.parametrize("kind", ["rfgsm", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("pgd", "free"))])
def test_training_against_attacks_makes_a_network_bear_them(kind: str) -> None:
    """On the shipped images, at an eps that takes nearly everything from a network trained without."""
    dataset, eps = data.load(), 0.1
    some, test = dataset.train.subset(torch.arange(2000)), dataset.test.subset(torch.arange(500))

    def found(adversary: Adversary | None) -> tuple[float, float]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            first = nn.Conv2d(1, 8, 5, 2, 2), nn.BatchNorm2d(8), nn.ReLU()
            second = nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()
            network = networks.Network("tiny", nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(784, 10)), (1, 28, 28))
        epochs = 16 if adversary is not None and adversary.kind == "free" else 4  # 4 passes each
        training.fit(network, some, training.TrainConfig(epochs, learning_rate=0.1, seed=0, adversary=adversary))
        attacked = proxy.worst_case(network, test, network.module, ProxyAttack.of(network, eps, steps=10))
        return training.accuracy(network, test), attacked

    clean, attacked = found(None)
    assert attacked < 0.15 < 0.65 < clean
    clean, defended = found(Adversary(kind, eps))
    assert defended > attacked + 0.2
    assert clean > defended


@pytest.mark.parametrize(
    ("text", "eps"), [("8/255", 8 / 255), ("0.03", 0.03), ("1e-2", 0.01), (" 4 / 255 ", 4 / 255), ("1", 1)]
)
def test_eps_is_a_fraction_or_a_decimal(text: str, eps: float) -> None:
    assert threat_model.parse_eps(text) == eps


@pytest.mark.parametrize("text", ["8", "0", "0/255", "256/255", "1.01"])
def test_eps_out_of_range_is_named(text: str) -> None:
    message = rf"eps is on the scale of images in \[0, 1\]: 8/255, not 8; it must be above 0 and at most 1, not {text}$"
    with pytest.raises(ValueError, match=message):
        threat_model.parse_eps(text)


@pytest.mark.parametrize("text", ["8/0", "a lot", "", "-0.1", "8/255/2", "nan", "1..2", "/255"])
def test_what_is_no_eps_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=rf"eps {text!r} is not understood: give a fraction such as 8/255"):
        threat_model.parse_eps(text)


def test_eps_is_written_as_people_write_it() -> None:
    written = [threat_model.describe_eps(eps) for eps in (8 / 255, 0.03, 0.5 / 255, 1.0)]
    assert written == ["8/255", "0.03", "0.001961", "255/255"]


def test_adversaries_that_are_none_are_refused() -> None:
    assert [Adversary(kind).count for kind in KINDS] == [7, 1, 4]
    assert Adversary(eps="8 / 255") == Adversary()  # type: ignore[arg-type]
    for arguments, message in (
        (("fgsm",), "unknown adversary 'fgsm'; known: pgd, free, rfgsm"),
        (("pgd", 8.0), "eps is on the scale of images in .* not 8.0"),
        (("pgd", float("nan")), "above 0 and at most 1, not nan"),
        (("pgd", EPS, 0), "the number of attack steps is 0; it must be an integer of at least 1"),
        (("rfgsm", EPS, 2), "rfgsm takes one gradient step, not 2: leave the number of steps out, or choose pgd"),
    ):
        with pytest.raises(ValueError, match=message):
            Adversary(*arguments)
    with pytest.raises(ValueError, match="the number of attack steps is 0"):
        ProxyAttack.of(small(), EPS, steps=0)


def test_images_of_unknown_range_are_refused() -> None:
    threads = torch.get_num_threads()
    split = data.Split(images(8), torch.zeros(8).long())
    qnetwork = Q.quantize(small_network(), Q.BitPolicy.uniform(small_network(), w=3, a=3), calibrate=images(8))
    with pytest.raises(ValueError, match=r"the images of the data set are float32, taken as they are, .* give uint8 images"):
        training.finetune(small(), qnetwork, split, epochs=1, seed=0, adversary=Adversary())
    assert torch.get_num_threads() == threads


MODULE = """
import torch
from tests.conftest import images
def splits():
    sizes = (("train", 64), ("search", 16), ("test", 12))
    return {name: ((255 * images(n, n)).to(torch.uint8), torch.arange(n) % 4) for name, n in sizes}
def floats():
    return {name: (x.float(), y) for name, (x, y) in splits().items()}
def network():
    from haq.networks import Network
    from tests.conftest import small_network
    return Network("small", small_network(), (1, 8, 8))
"""
JOB = ["--network", "adversarial_job:network", "--data", "adversarial_job:splits", "--epochs", "4", "--batch-size", "16"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current folder with a small job of one's own in it."""
    (tmp_path / "adversarial_job.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "adversarial_job", raising=False)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("kind", KINDS)
def test_the_command_with_an_attack_a_penalty_and_a_scheme(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*JOB, "--scheme", "lsq", "--bits", "4/4", "--pretrained"]
    penalty, against = ["--lipschitz", "1e-3"], ["--adversarial", kind, *(["--attack-steps", "2"] if kind != "rfgsm" else [])]
    attacked = [*asked, *penalty, *against, "--out", "q.safetensors"]
    assert run_command(lambda: train.main(attacked)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert ("epoch 2/2" if kind == "free" else "epoch 4/4") in out
    assert "accuracy on the test split, worst of clean and PGD-10 at eps 8/255: " in out
    assert "(a cheap attack, not an evaluation: python -m haq.robustness adversarial_job:network@q.safetensors)" in out
    tensors, notes = networks.read_state(Path("q.safetensors"))
    assert (
        f"--lipschitz 0.001 --adversarial {kind} --eps 8/255 --attack-steps {1 if kind == 'rfgsm' else 2}" in notes["command"]
    )
    assert notes["test_accuracy_attacked"].endswith("(worst of clean and PGD-10 at eps 8/255)")
    layers = Q.quant_layers(networks.load_quantized(Path("q.safetensors")))
    assert [layer.scheme.name for layer in layers.values()] == ["linear", "lsq", "lsq", "lsq", "linear"]
    # Each of the two does something.
    for name, one in (("penalty.safetensors", penalty), ("against.safetensors", against)):
        assert run_command(lambda name=name, one=one: train.main([*asked, *one, "--out", name])) == 0  # type: ignore[misc]
        other, _ = networks.read_state(Path(name))
        assert not torch.equal(other["pointwise.weight"], tensors["pointwise.weight"])


@pytest.mark.usefixtures("place")
def test_a_training_against_another_attack_is_another_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*JOB, "--adversarial", "pgd", "--out", "a.safetensors"]

    save = Checkpoint.write

    def save_and_die(self: Checkpoint, *rest: object) -> None:
        save(self, *rest)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoint, "write", save_and_die)
        assert run_command(lambda: train.main(asked)) == EXIT_INTERRUPTED
    assert run_command(lambda: train.main([*asked, "--eps", "4/255", "--resume"])) == EXIT_BAD_INPUT
    assert "eps was '8/255' and is '4/255' now" in capsys.readouterr().err
    assert run_command(lambda: train.main([*asked, "--resume"])) == 0
    assert "epoch 1/4" not in capsys.readouterr().out


@pytest.mark.usefixtures("place")
def test_what_the_command_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--eps", "8/255"], "--eps 8/255 is of an attack: choose one with --adversarial pgd|free|rfgsm"),
        (["--attack-steps", "3"], "--attack-steps 3 is of an attack"),
        (["--adversarial", "pgd", "--eps", "8"], "eps is on the scale of images in [0, 1]: 8/255, not 8"),
        (["--adversarial", "rfgsm", "--attack-steps", "3"], "rfgsm takes one gradient step, not 3"),
        (["--adversarial", "free", "--attack-steps", "0"], "the number of attack steps is 0"),
        (["--adversarial", "free", "--data", "adversarial_job:floats"], "the images of adversarial_job:floats are float32"),
    ):
        assert run_command(lambda options=options: train.main([*JOB, "--out", "a.safetensors", *options])) == 2  # type: ignore[misc]
        assert message in capsys.readouterr().err
    assert not Path("a.safetensors").exists()
