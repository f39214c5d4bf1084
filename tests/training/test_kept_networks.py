"""Training never makes a network worse: it is judged on images held out, the best is kept, and what is frozen stays."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import quantizers as Q
from haq import data, networks, train, training
from haq.console.errors import run_command
from haq.data.__main__ import main as data_main
from haq.store.checkpoint import Checkpoint
from haq.training.config import Judgement, Outcome, rate_for
from tests.conftest import enter, images, small_network

CLASSES = 4


def network_of(module: nn.Module) -> networks.Network:
    return networks.Network("small", module, (1, 8, 8))


def answered(module: nn.Module, count: int, seed: int = 0) -> data.Split:
    x = images(count, seed)
    with torch.no_grad():
        return data.Split(x, module(x).argmax(1))


def quantized(module: nn.Module, bits: int = 3) -> nn.Module:
    return Q.quantize(module, Q.BitPolicy.uniform(module, w=bits, a=bits), calibrate=images(32))


def same(one: nn.Module, other: nn.Module) -> bool:
    states = [{**module.state_dict(), **Q.quantizer_state(module)} for module in (one, other)]
    return all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def tuned(module: nn.Module, split: data.Split, bits: int = 3, **options: object) -> tuple[nn.Module, list[Outcome]]:
    outcomes: list[Outcome] = []
    given = {"epochs": 2, "seed": 0, "on_outcome": outcomes.append} | options
    return training.finetune(network_of(module), quantized(module, bits), split, **given), outcomes  # type: ignore[arg-type]


def test_what_a_high_rate_breaks_is_not_kept() -> None:
    module = small_network()
    network, (outcome,) = tuned(module, answered(module, 128), learning_rate=9.0)
    assert same(network, quantized(module))
    assert not network.training
    assert outcome.kept == 0
    assert outcome.best == outcome.before
    assert outcome.images == 32
    assert outcome.diverged or all(not judged.beats(outcome.best) for judged in outcome.epochs)


def test_the_best_epoch_is_kept() -> None:
    """It is the network that stood there then, by the judgement that it is given again."""
    module = small_network()
    split = answered(module, 256)
    judged: list[tuple[int, Judgement]] = []
    network, (outcome,) = tuned(module, split, epochs=6, bits=2, on_judged=lambda *told: judged.append(told))
    assert outcome.kept > 0
    assert [epoch for epoch, _ in judged] == list(range(7))
    assert [judgement for _, judgement in judged] == [outcome.before, *outcome.epochs]
    judge = training.judge_of(network_of(module), training.hold_out(split)[1])
    assert judge(network) == outcome.best == min(outcome.epochs, key=lambda one: one.loss)


def test_only_what_is_better_in_both_ways_is_kept() -> None:
    module = small_network()
    state = training.loop.Training(network_of(module), module, None, training.TrainConfig(1, 0.1, 0), 8)
    state.least = Judgement(0.5, 1.0)
    for judgement, kept in (
        (Judgement(0.6, 1.1), 0),
        (Judgement(0.4, 0.5), 0),
        (Judgement(0.9, float("nan")), 0),
        (Judgement(0.5, 0.9), 4),
        (Judgement(0.6, 0.95), 4),
        (Judgement(0.5, 0.9), 4),
        (Judgement(0.5, 0.8), 7),
        (Judgement(0.45, 0.7, 100), 8),  # its standard error is 5 points
        (Judgement(0.44, 0.6, 100), 8),
    ):
        state.consider(judgement)
        assert state.kept == kept


def test_images_are_held_out_by_class_and_always_the_same() -> None:
    x = torch.arange(400.0).view(-1, 1, 1, 1)
    split = data.Split(x, torch.arange(400).div(100, rounding_mode="floor"))
    kept, held = training.hold_out(split)
    assert held.labels.bincount().tolist() == [8] * 4
    seen = torch.cat([part.images[torch.arange(len(part))].flatten() for part in (kept, held)])
    assert torch.equal(seen.sort().values, x.flatten())
    assert torch.equal(training.hold_out(split)[1].labels, held.labels)
    sizes = {3: 1, 8: 2, 128: 32, 200: 32, 8000: 400, 30_000: 1000}
    for count, expected in sizes.items():
        many = data.Split(torch.zeros(count, 1, 1, 1), torch.zeros(count, dtype=torch.long))
        assert len(training.hold_out(many)[1]) == expected


def test_held_out_images_are_not_trained_on() -> None:
    """Others in their place change judgements alone."""
    module = small_network()
    split = answered(module, 64)
    _, held = training.hold_out(split)
    x = split.images[torch.arange(64)].clone()
    for image in held.images[torch.arange(len(held))]:
        x[(x == image).flatten(1).all(1)] = 0.5
    losses: list[float] = []
    outcomes = []
    for one in (split, data.Split(x, split.labels)):
        _, (outcome,) = tuned(module, one, epochs=1, on_epoch=lambda epoch, loss: losses.append(loss))
        outcomes.append(outcome)
    assert outcomes[0].epochs != outcomes[1].epochs
    assert losses[0] == losses[1]


def test_a_loss_that_is_no_number_ends_fine_tuning_with_what_there_is() -> None:
    module = small_network()
    split = answered(module, 64)
    images_of = split.images[torch.arange(64)].clone()
    held = training.hold_out(data.Split(torch.arange(64).view(-1, 1, 1, 1), split.labels))[1]
    trained = torch.ones(64, dtype=torch.bool)
    trained[held.images[torch.arange(len(held))].flatten()] = False
    images_of[trained] = float("nan")
    qnetwork = quantized(module)
    network, (outcome,) = tuned(module, data.Split(images_of, split.labels))
    assert outcome.diverged
    assert outcome.kept == 0
    assert same(network, qnetwork)


def test_the_best_network_belongs_to_what_is_gone_on_from(tmp_path: Path) -> None:
    """Of an epoch before the interruption, too."""
    module = small_network()
    split = answered(module, 64)
    worth = iter([Judgement(0.5, 1.0), Judgement(0.9, 0.1), Judgement(0.6, 0.9), Judgement(0.7, 0.8)])
    config = training.TrainConfig(4, 0.05, 0, batch_size=16)

    def run(state: Checkpoint, judge: object, epochs: int = 4) -> tuple[nn.Module, Outcome | None]:
        trained = small_network(1)
        stop = []

        def on_epoch(epoch: int, loss: float) -> None:
            stop.append(epoch)
            if epoch == epochs < 4:
                raise KeyboardInterrupt

        made = training.fit(
            network_of(module),
            split,
            config,
            module=trained,
            state=state,
            judge=judge,
            on_epoch=on_epoch,  # type: ignore[arg-type]
        )
        return trained, made

    fixed = [Judgement(0.5, 1.0), Judgement(0.9, 0.1), Judgement(0.6, 0.9), Judgement(0.7, 0.8)]
    whole, outcome = run(Checkpoint(tmp_path / "whole", {}), lambda module: next(worth))
    rest = iter(fixed)
    with pytest.raises(KeyboardInterrupt):
        run(Checkpoint(tmp_path / "cut", {}), lambda module: next(rest), 3)
    part, again = run(Checkpoint(tmp_path / "cut", {}), lambda module: next(rest))
    assert outcome == again == Outcome(0, None, tuple(fixed), 2)
    assert same(whole, part)
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "cut").read_bytes()


@pytest.mark.parametrize("count", [1, 2])
def test_data_sets_of_one_image_are_refused(count: int) -> None:
    module = small_network()
    split = answered(module, count)
    with pytest.raises(ValueError, match=f"fine-tuning takes at least 3 images, there are {count}"):
        tuned(module, split)
    with pytest.raises(ValueError, match="training takes at least 2 images, there are 1"):
        training.fit(network_of(module), answered(module, 1), training.TrainConfig(1, 0.1, 0))
    with pytest.raises(ValueError, match="batch_size is 1; it must be at least 2"):
        training.TrainConfig(1, 0.1, 0, batch_size=1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"steps": 0}, "steps is 0; it must be an integer of at least 1"),
        ({"steps": 2.5}, "steps is 2.5; it must be an integer"),
        ({"epochs": -1}, "epochs is -1; it must be at least 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; it must be a number"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(option: dict[str, float], message: str) -> None:
    module = small_network()
    with pytest.raises(ValueError, match=message):
        tuned(module, answered(module, 8), **option)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.arange(8.0), "class numbers, integers of shape"),
        (torch.eye(8).long(), "class numbers, integers of shape"),
        (torch.arange(8)[:, None], "class numbers, integers of shape"),
        (torch.arange(8), "has the label 4; with 4 classes labels must be from 0 to 3"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: torch.Tensor, message: str) -> None:
    network = network_of(small_network())
    split = data.Split(images(8), labels)
    with pytest.raises(ValueError, match=message):
        training.fit(network, split, training.TrainConfig(1, 0.1, 0))
    if labels.dim() == 2 or labels.is_floating_point():
        with pytest.raises(ValueError, match=message):
            training.accuracy(network, split)
        with pytest.raises(ValueError, match=message):
            tuned(network.module, split)


def test_outputs_that_are_no_class_scores_are_refused() -> None:
    class Aided(nn.Module):
        """Has a second output in training, as networks with auxiliary heads have."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, CLASSES)

        def forward(self, x: torch.Tensor) -> object:
            scores = self.layer(x.flatten(1))
            if self.training:
                return scores, scores
            return scores

    module = Aided().eval()
    split = answered(module, 40)
    assert training.accuracy(network_of(module), split) == 1
    with pytest.raises(ValueError, match="outputs are class scores of shape .*, not a tuple"):
        tuned(module, split)
    with pytest.raises(ValueError, match="outputs are class scores of shape .*, not a tuple"):
        training.fit(network_of(module), split, training.TrainConfig(1, 0.1, 0))


def test_where_all_is_frozen_there_is_nothing_to_train() -> None:
    module = small_network().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train: all parameters"):
        training.fit(network_of(module), answered(module, 8), training.TrainConfig(1, 0.1, 0))


def test_a_network_that_changes_its_input_is_judged_on_what_it_was_given() -> None:
    class Centring(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rest = small_network()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rest(x.sub_(0.5))  # type: ignore[no-any-return]

    module = Centring().eval()
    split = data.Split(images(40), torch.zeros(40).long())
    assert training.agreement(network_of(module), split, copy.deepcopy(module)) == 1
    judgement = training.judge_of(network_of(module), split)(copy.deepcopy(module))
    assert judgement[:2] == (1.0, 0.0)


def test_few_steps_have_a_lower_rate() -> None:
    assert rate_for(0.005, 100) == rate_for(0.005, 3000) == 0.005
    assert rate_for(0.005, 25) == pytest.approx(0.0025)
    options = train.TrainOptions()
    assert (options.batch(55_000), options.rate(55_000)) == (128, 0.2)
    assert (options.batch(200), options.rate(200)) == (20, pytest.approx(0.2 * 20 / 128))
    assert train.TrainOptions(batch_size=64).rate(200) == 0.2
    assert train.TrainOptions(learning_rate=0.1).rate(200) == 0.1


# Norms.


def normed() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 8), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.9), nn.Flatten(), nn.Linear(6, CLASSES)
    )


def values(module: nn.Sequential, split: data.Split) -> torch.Tensor:
    with torch.no_grad():
        return module[0](split.images[torch.arange(len(split))]).transpose(0, 1).flatten(1).double()


@pytest.mark.parametrize("count", [2, 500, 501, 505, 1000])
def test_every_image_counts_the_same(count: int) -> None:
    """A last batch of one doesn't weigh as much as the others, and doesn't stop it either."""
    module = normed()
    split = data.Split(images(count) * torch.rand(count, 1, 1, 1), torch.zeros(count).long())
    training.refresh_norms(network_of(module), module, split)
    seen = values(module, split)
    torch.testing.assert_close(module[1].running_mean, seen.mean(1).float(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(module[1].running_var, seen.var(1).float(), atol=1e-5, rtol=1e-4)
    assert module[1].momentum == 0.1
    assert int(module[1].num_batches_tracked) == -(-count // 500)


def test_images_that_are_sorted_by_class_are_sampled_fairly() -> None:
    module = normed()
    labels = torch.arange(800) // 100
    split = data.Split(images(800) * (1 + labels.view(-1, 1, 1, 1)), labels)
    training.refresh_norms(network_of(module), module, split, 80)
    seen = values(module, split)
    off = (module[1].running_mean - seen.mean(1)).abs() / seen.std(1)
    assert off.max() < 0.1
    assert (module[1].running_var / seen.var(1)).min() > 0.8


def test_only_norms_are_as_in_training() -> None:
    """Dropout before a norm would give it other statistics."""
    module = nn.Sequential(nn.Dropout(0.9), normed()[0], nn.BatchNorm2d(6))
    split = data.Split(images(64), torch.zeros(64).long())
    training.refresh_norms(network_of(module), module, split)
    seen = values(nn.Sequential(module[1]), split)
    torch.testing.assert_close(module[2].running_mean, seen.mean(1).float(), atol=1e-5, rtol=1e-4)
    assert not any(part.training for part in module.modules())


class Fixed(nn.BatchNorm2d):
    """A norm of somebody's own that takes no part in training."""


@pytest.mark.parametrize(
    ("norm", "changes"),
    [
        (nn.BatchNorm2d(6, momentum=None), True),
        (nn.SyncBatchNorm(6), True),
        (nn.BatchNorm2d(6, affine=False), True),
        (nn.InstanceNorm2d(6, track_running_stats=True), True),
        (nn.BatchNorm2d(6, momentum=0.0), False),
        (Fixed(6).requires_grad_(False), False),
        (nn.BatchNorm2d(6, track_running_stats=False), None),
    ],
)
def test_every_kind_of_norm_is_known(norm: nn.Module, changes: bool | None) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 6, 3), norm)
    split = data.Split(images(40), torch.zeros(40).long())
    momentum = norm.momentum
    training.refresh_norms(network_of(module), module, split)
    assert norm.momentum == momentum
    assert not norm.training
    if changes is None:
        return
    expected = torch.zeros(6)
    if changes:
        expected = values(module, split).mean(1).float()
    torch.testing.assert_close(norm.running_mean, expected, atol=1e-4, rtol=1e-3)


def test_norms_may_be_called_by_keyword() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(input=x)  # type: ignore[no-any-return]

    module, split = Network(), data.Split(images(33), torch.zeros(33).long())
    training.refresh_norms(network_of(module), module, split)
    torch.testing.assert_close(module.norm.running_mean, split.images[torch.arange(33)].mean((0, 2, 3)))


def test_norms_of_vectors_too() -> None:
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))
    split = data.Split(images(33), torch.zeros(33).long())
    training.refresh_norms(network_of(module), module, split)
    seen = split.images[torch.arange(33)].flatten(1)
    torch.testing.assert_close(module[1].running_var, seen.var(0), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="sees one value of each channel"):
        training.refresh_norms(network_of(module), module, split.subset(torch.arange(1)))


def test_what_is_frozen_stays_as_it_is() -> None:
    module = small_network()
    module.get_submodule("hidden").requires_grad_(False)
    module.get_submodule("norm").requires_grad_(False)
    qnetwork = quantized(module)
    qnetwork.requires_grad_(False)  # as an evaluator under attack leaves it
    network = training.finetune(network_of(module), qnetwork, answered(module, 64), epochs=2, seed=0, keep_best=False)
    before, after = qnetwork.state_dict(), network.state_dict()
    moved = {key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"stem", "depthwise", "pointwise", "classifier"}
    assert not network.get_submodule("hidden").weight.requires_grad
    trained = copy.deepcopy(module)
    training.fit(network_of(module), answered(module, 64), training.TrainConfig(1, 0.05, 0, batch_size=16), module=trained)
    norm = trained.get_submodule("norm")
    assert torch.equal(norm.running_mean, module.get_submodule("norm").running_mean)


# The command.

JOB = """
import torch
from torch import nn
def splits(image_size=16):
    bars = (torch.arange(image_size) // 2 % 2).float().expand(1, image_size, image_size)
    def part(count, seed):  # lying and standing stripes, which stay so however an image is moved
        noise = torch.rand(count, 1, image_size, image_size, generator=torch.Generator().manual_seed(seed))
        labels = torch.arange(count) % 2
        stripes = torch.where(labels.view(-1, 1, 1, 1) == 1, bars, bars.mT)
        return (255 * (0.6 * stripes + 0.4 * noise)).to(torch.uint8), labels
    return {"train": part(200, 1), "search": part(60, 2), "test": part(300, 3)}
def noise():
    x = torch.randint(0, 256, (80, 1, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return {"train": (x, torch.arange(80) % 2), "search": (x[:20], torch.arange(20) % 2), "test": (x, torch.arange(80) // 40)}
def net():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 2))
    made.input_shape = (1, 8, 8)
    return made
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter(tmp_path, monkeypatch, JOB)
    return tmp_path


def trained(capsys: pytest.CaptureFixture[str], *options: str, source: str = "splits") -> str:
    words = ["--network", "small_job:net", "--data", f"small_job:{source}", "--out", "a.safetensors", *options]
    status = run_command(lambda: train.main(words))
    told = capsys.readouterr()
    return f"{status} {' '.join((told.out + told.err).split())}"


def test_training_judges_every_epoch_and_keeps_the_best(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """200 images are enough as options come, and images come in the size of the network's input."""
    out = trained(capsys, "--epochs", "12")
    assert out.startswith("0 ")
    shares = [float(part.split(" %")[0]) for part in out.split("held-out accuracy ")[1:]]
    assert len(shares) == 12
    assert f"kept: the network after epoch {1 + shares.index(max(shares))}, the best on the search split" in out
    assert f"accuracy on the search split: {max(shares):.2f} % ± " in out
    assert max(shares) > 80
    assert "WARNING" not in out
    network = networks.load("a.safetensors")
    assert training.accuracy(network, data.load("small_job:splits", image_size=8).search) == pytest.approx(
        max(shares) / 100, abs=1e-4
    )


def test_training_says_that_nothing_was_learned(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "WARNING: that is no more than guessing gives (50.00 %)" in trained(capsys, "--epochs", "1", source="noise")


def test_mean_and_deviation_are_kept_in_the_checkpoint(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained(capsys, "--epochs", "1", "--mean", "0.25,0.5")
    assert out.startswith("2 ")
    assert "--mean has 2 numbers; small_job:net takes images of 1 channels" in out
    assert trained(capsys, "--epochs", "1", "--mean", "0.25", "--std", "0.5").startswith("0 ")
    loaded = networks.load("a.safetensors")
    assert (loaded.mean, loaded.std) == ((0.25,), (0.5,))
    assert "--mean 0.25 --std 0.5" in networks.read_header(Path("a.safetensors")).notes["command"]


def test_the_data_command_uses_a_networks_size(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert data_main(["small_job:splits", "--network", "small_job:net"]) == 0
    assert "images: 1 x 8 x 8, uint8" in capsys.readouterr().out
    assert data_main(["small_job:splits"]) == 0
    assert "images: 1 x 224 x 224, uint8" in capsys.readouterr().out
    assert "small_job" in sys.modules
