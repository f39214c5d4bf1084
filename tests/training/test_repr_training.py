"""RePr drops filters that overlap, keeps them at exactly zero, and brings them back orthogonal; it goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from haq import data, networks, training
from haq.store.checkpoint import Checkpoint
from haq.training.methods import Method, TrainingState, build_method
from haq.training.repr_method import RePr, norms_behind, ranked_layers
from quantizers.pruning.filter_overlap import filter_overlaps, mean_overlap, overlapping_filters
from tests.conftest import images


class Residual(nn.Module):
    """A convolution that is added to what it reads."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.norm(self.conv(x)))


def module(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU()),
            *(nn.Conv2d(8, 10, 3, padding=1), nn.BatchNorm2d(10), nn.ReLU()),
            *(nn.Conv2d(10, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
            Residual(12),
            *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 4)),
        )


NETWORK = networks.Network("small", module(), (1, 8, 8))


def split() -> data.Split:
    x = images(96)
    with torch.no_grad():
        return data.Split(x, NETWORK.module(x).argmax(1))


def fitted(method: Method | None, state: Checkpoint | None = None, epochs: int = 7, **options: Any) -> nn.Module:
    made = module(1)
    settings = {"learning_rate": 0.05, "seed": 0, "batch_size": 16, "weight_decay": 1e-2, "schedule": "constant"}
    on_epoch = options.pop("on_epoch", training.loop.no_epoch)
    config = training.TrainConfig(epochs=epochs, **{**settings, **options})
    training.fit(NETWORK, split(), config, module=made, method=method, state=state, on_epoch=on_epoch)
    return made


def cosines(one: Tensor, other: Tensor) -> Tensor:
    rows, others = (nn.functional.normalize(filters.flatten(1).double()) for filters in (one, other))
    return (rows @ others.T).abs()


class Watched(RePr):
    """Looks at what happens in every phase."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[str] = []
        self.before: dict[str, Tensor] = {}

    def before_epoch(self, training: TrainingState) -> None:
        was, old = dict(self.dropped), dict(self._old)
        weights = {name: layer.weight.detach().clone() for name, layer in self._layers.items()}
        super().before_epoch(training)
        if self.dropped and not was:
            self.seen.append("drop")
            assert self.dropped == overlapping_filters(weights, self.share)
            for name, gone in self.dropped.items():
                assert torch.equal(self._old[name], weights[name][list(gone)])
        if was and not self.dropped:
            self.seen.append("back")
            self.check_what_came_back(training, was, old)

    def check_what_came_back(self, training: TrainingState, was: dict[str, tuple[int, ...]], old: dict[str, Tensor]) -> None:
        for name, gone in was.items():
            weight = self._layers[name].weight.detach()
            kept = [number for number in range(len(weight)) if number not in gone]
            new = weight[list(gone)]
            assert cosines(new, weight[kept]).max() < 1e-5
            assert cosines(new, old[name]).diagonal().max() < 1e-5
            norm = self._norms[name]
            for tensor, value in ((norm.weight, 1), (norm.bias, 0), (norm.running_mean, 0), (norm.running_var, 1)):
                assert (tensor[list(gone)] == value).all()
            for optimizer in training.optimizers:
                for parameter in (self._layers[name].weight, norm.weight, norm.bias):
                    for kept_state in optimizer.state[parameter].values():
                        if kept_state.dim():
                            assert (kept_state[list(gone)] == 0).all()
        # The next layer reads what came back.
        for part in self._readers["2"]:
            assert (part.weight[:, list(was.get("2", ()))] != 0).all()

    def after_step(self, training: TrainingState) -> None:
        for name, gone in self.dropped.items():
            numbers = list(gone)
            layer, norm = self._layers[name], self._norms[name]
            for parameter in (layer.weight, layer.bias, norm.weight, norm.bias):
                if parameter is not None:
                    # Before the method mends anything: the optimizer itself leaves them alone.
                    assert (parameter[numbers] == 0).all()
                    assert (parameter.grad[numbers] == 0).all()
            for reader in self._readers.get(name, []):
                assert (reader.weight[:, [place for one in gone for place in reader.places[one]]] == 0).all()
            self.seen.append("held")
        super().after_step(training)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "AdamW", "RMSprop"])
def test_dropped_filters_stay_zero_and_come_back_orthogonal(optimizer: str) -> None:
    method = Watched(share=0.3, cycles=2, full=1, reduced=1)
    fitted(method, epochs=5, optimizer=optimizer, learning_rate=0.01)
    phases = [word for number, word in enumerate(method.seen) if number == 0 or word != method.seen[number - 1]]
    assert phases == ["drop", "held", "back", "drop", "held", "back"]
    assert not method.dropped
    assert len(method.overlaps) == 5


def test_filters_are_ranked_over_all_layers_but_the_first() -> None:
    made = module()
    layers = ranked_layers(made)
    assert list(layers) == ["2", "5", "8.conv"]
    norms = norms_behind(NETWORK, made, layers, images(2))
    assert norms == {"2": made[3], "5": made[6], "8.conv": made[8].norm}
    grouped = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 1, 1), nn.Conv2d(1, 2, 1))
    assert list(ranked_layers(grouped)) == ["3"]
    for parameter in made[5].parameters():
        parameter.requires_grad_(False)
    assert list(ranked_layers(made)) == ["2", "8.conv"]


def test_readers_of_channels_that_others_write_too_are_left_alone() -> None:
    """What is added in a residual block is several filters': the linear layer behind it isn't drawn anew."""
    method = RePr(share=0.3, cycles=1, full=1, reduced=1)
    fitted(method, epochs=3)
    assert set(method._readers) == {"2"}
    assert [reader.places[3] for reader in method._readers["2"]] == [(3,)]


def test_the_overlap_falls_and_stays_below_the_twins() -> None:
    """The mean of the overlap is lower after the cycles than before them, and than that of the same training without RePr."""
    method = RePr(share=0.3, cycles=2, full=1, reduced=1)
    made = fitted(method, epochs=7)
    twin = fitted(None, epochs=7)
    mean, of_twin = (mean_overlap({name: one.weight for name, one in ranked_layers(net).items()}) for net in (made, twin))
    assert method.overlaps[2] < method.overlaps[0]
    assert mean == method.overlaps[-1]
    assert mean < of_twin
    assert method.report() == [f"mean overlap of 34 filters: {mean:.4f}, after 2 cycles of RePr"]


class Killed(Exception):
    """Somebody pulled the plug."""


@pytest.mark.parametrize("after", range(1, 7))
def test_a_killed_training_goes_on_to_the_same_bytes(after: int, tmp_path: Path) -> None:
    """Killed after any epoch: with all filters, just before a drop, while some are dropped, just before they come back."""

    def method() -> RePr:
        return RePr(share=0.3, cycles=2, full=1, reduced=2)

    state = Checkpoint(tmp_path / "part.state", {})

    def die(epoch: int, loss: float) -> None:
        if epoch == after:
            raise Killed

    whole = WHOLE.get("module") or WHOLE.setdefault("module", fitted(method()))
    with pytest.raises(Killed):
        fitted(method(), state, on_epoch=die)
    resumed = fitted(method(), state)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


WHOLE: dict[str, nn.Module] = {}


def test_only_networks_that_went_through_all_cycles_are_kept() -> None:
    judged: list[bool] = []
    method = RePr(share=0.3, cycles=2, full=1, reduced=1)

    def judge(_: nn.Module) -> training.Judgement:
        judged.append(bool(method.dropped))
        return training.Judgement(0.5, float(len(judged)))  # early networks look better

    config = training.TrainConfig(epochs=6, learning_rate=0.05, seed=0, batch_size=16)
    made = module(1)
    outcome = training.fit(NETWORK, split(), config, module=made, method=method, judge=judge)
    assert judged == [False, True, False, True, False, False]
    assert outcome is not None
    assert outcome.kept == 5
    assert all((layer.weight.flatten(1).norm(dim=1) > 0).all() for layer in ranked_layers(made).values())


def test_lengths_are_those_of_the_paper() -> None:
    method = build_method("repr")
    assert isinstance(method, RePr)
    with pytest.raises(StopIteration):
        fitted(Stop(method), epochs=100)
    assert (method.share, method.cycles, method.full, method.reduced) == (0.3, 3, 20, 10)


class Stop(Method):
    """Prepares another method, and ends the training before its first epoch."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def begin(self, training: TrainingState) -> None:
        self.method.begin(training)
        raise StopIteration


def test_bad_values_are_named() -> None:
    for text, message in (
        ("repr(share=0)", "repr: share is 0; it must be a share of the filters, beyond 0 and below 1"),
        ("repr(share=most)", "repr: share is 'most'; it must be"),
        ("repr(cycles=0)", "repr: cycles is 0; it must be an integer of at least 1"),
        ("repr(full=1.5)", "repr: full is 1.5; it must be an integer of at least 1"),
        ("repr(next_layers=2)", "repr: next_layers is 2; it must be True or False"),
    ):
        with pytest.raises(ValueError, match="^[^\n]*$") as refused:
            build_method(text)
        assert message in str(refused.value)
    with pytest.raises(ValueError, match="2 cycles of 1 full and 2 reduced epochs, and one .* take 7 epochs, there are 4"):
        fitted(RePr(cycles=2, full=1, reduced=2), epochs=4)
    bare = networks.Network("bare", nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten()), (1, 8, 8))
    config = training.TrainConfig(epochs=9, learning_rate=0.1, seed=0)
    with pytest.raises(ValueError, match="no convolution but the first has filters"):
        training.fit(bare, split(), config, method="repr(cycles=1)")
    with pytest.raises(ValueError, match="patience is 2, but the training method needs all epochs"):
        training.fit(
            NETWORK,
            split(),
            training.TrainConfig(epochs=9, learning_rate=0.1, seed=0, patience=2),
            module=module(),
            method="repr(cycles=1)",
            judge=lambda _: training.Judgement(0.5, 1.0),
        )


def test_filters_of_a_layer_with_more_of_them_than_weights_come_back_random() -> None:
    made = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.Conv2d(2, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4)
    )
    network = networks.Network("wide", made, (1, 8, 8))
    config = training.TrainConfig(epochs=3, learning_rate=0.05, seed=0, batch_size=16)
    training.fit(network, split(), config, method=RePr(share=0.5, cycles=1, full=1, reduced=1))
    assert torch.isfinite(made[1].weight).all()
    assert (made[1].weight.flatten(1).norm(dim=1) > 0).all()
    assert filter_overlaps(made[1].weight).max() < 1
