"""Lottery tickets: survivors are put back bit for bit, masks hold, and a training that was killed goes on exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from haq import data, networks, train, training
from haq.console.errors import run_command
from haq.store.checkpoint import Checkpoint
from haq.training.lottery_ticket import LotteryTicket, MaskedWeights
from haq.training.methods import Method, TrainingState, build_method
from quantizers.pruning.lottery_ticket import magnitude_masks, mask_density, maskable_weights
from tests.conftest import images, small_network

NETWORK = networks.Network("small", small_network(), (1, 8, 8))
STEPS = 4  # of an epoch


def split() -> data.Split:
    x = images(64)
    with torch.no_grad():
        return data.Split(x, NETWORK.module(x).argmax(1))


def fitted(method: Method | None, state: Checkpoint | None = None, epochs: int = 6, **options: Any) -> nn.Module:
    made = small_network(1)
    on_epoch = options.pop("on_epoch", training.loop.no_epoch)
    settings = {"learning_rate": 0.05, "seed": 0, "batch_size": 16, "weight_decay": 1e-2}
    config = training.TrainConfig(epochs=epochs, **{**settings, **options})
    training.fit(NETWORK, split(), config, module=made, method=method, state=state, on_epoch=on_epoch)
    return made


class Watched(LotteryTicket):
    """Notes what a round begins with, and checks that masks hold."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.at_step: dict[str, Tensor] = {}
        self.rounds_seen: list[dict[str, Tensor]] = []
        self.rates: list[float] = []
        self.all_masks: list[dict[str, Tensor]] = []
        self.trained: dict[str, Tensor] = {}

    def begin(self, training: TrainingState) -> None:
        super().begin(training)
        if not self.rewind:
            self.at_step = training.tensors()["module"]

    def before_epoch(self, training: TrainingState) -> None:
        before = self.masks
        trained = {name: weight.detach().clone() for name, weight in self._weights.items()}
        super().before_epoch(training)
        if self.masks is before:
            return
        last = list(trained)[-1]
        expected = magnitude_masks(trained, self.share, before or None, across=self.across, shares={last: self.last})
        assert all(torch.equal(self.masks[name], expected[name]) for name in expected)
        state = training.module.state_dict()
        for name, value in self.at_step.items():
            expected_value = value
            if name in self.masks:
                expected_value = torch.where(self.masks[name], value, torch.zeros(()))
            assert torch.equal(state[name], expected_value), name  # bit for bit
        assert not any(optimizer.state for optimizer in training.optimizers)
        self.all_masks.append(self.masks)

    def before_step(self, training: TrainingState) -> None:
        self.rates.append(training.optimizers[0].param_groups[0]["lr"])
        super().before_step(training)

    def after_step(self, training: TrainingState) -> None:
        for name, mask in self.masks.items():
            weight = self._weights[name]
            assert (weight[~mask] == 0).all()  # before anything is mended
            assert weight.grad is not None
            assert (weight.grad[~mask] == 0).all()
        super().after_step(training)
        if training.step == self.rewind:
            self.at_step = training.tensors()["module"]


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "AdamW"])
@pytest.mark.parametrize(("across", "rewind"), [("layer", 0), ("network", 0), ("layer", 3)])
def test_survivors_are_put_back_bit_for_bit_and_masks_are_nested(optimizer: str, across: str, rewind: int) -> None:
    method = Watched(rounds=2, share=0.4, across=across, rewind=rewind)
    made = fitted(method, optimizer=optimizer, learning_rate=0.01)
    first, second = method.all_masks
    for name, weight in maskable_weights(made).items():
        assert (first[name] | ~second[name]).all()
        assert (weight[~second[name]] == 0).all()
        assert (weight[second[name]] != 0).any()
    *others, last = second.values()
    assert last.float().mean() == pytest.approx(0.8**2, abs=0.05)
    assert mask_density(dict(enumerate(others))) == pytest.approx(0.6**2, abs=0.02)  # type: ignore[arg-type]
    assert method.report() == [
        f"weights that survive: {100 * mask_density(second):.2f} % of those of convolutions and linear layers"
    ]


def test_the_schedule_begins_anew_in_every_round() -> None:
    method = Watched(rounds=2, share=0.2)
    fitted(method)
    steps = 2 * STEPS
    assert method.rates[:steps] == method.rates[steps : 2 * steps] == method.rates[2 * steps :]
    late = Watched(rounds=2, share=0.2, rewind=3)
    fitted(late)
    assert late.rates[:steps] == method.rates[:steps]
    assert late.rates[steps] == late.rates[3]
    assert late.rates[2 * steps :] == late.rates[steps : 2 * steps]


def test_with_masks_of_ones_a_training_is_what_it_is_without() -> None:
    plain = fitted(None)
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in maskable_weights(plain).items()}
    for method in (MaskedWeights(masks), MaskedWeights()):
        made = fitted(method)
        assert all(torch.equal(value, plain.state_dict()[key]) for key, value in made.state_dict().items())


def test_a_ticket_is_the_training_of_its_masks_from_the_beginning() -> None:
    """The last round is just what training with the masks gives, from the network's own beginning and another order."""
    masks = magnitude_masks(maskable_weights(fitted(None, epochs=2)), 0.4)
    made = fitted(MaskedWeights(masks), epochs=2)
    for name, weight in maskable_weights(made).items():
        assert (weight[~masks[name]] == 0).all()
    with pytest.raises(ValueError, match="the mask of 'nothing' fits no weight of the network"):
        fitted(MaskedWeights({"nothing": torch.ones(2, dtype=torch.bool)}))


class Killed(Exception):
    """Somebody pulled the plug."""


@pytest.mark.parametrize("rewind", [0, 3])
def test_a_killed_training_goes_on_to_the_same_bytes(rewind: int, tmp_path: Path) -> None:
    def method() -> LotteryTicket:
        return LotteryTicket(rounds=2, share=0.3, rewind=rewind)

    whole = fitted(method())
    for after in range(1, 6):
        state = Checkpoint(tmp_path / f"{after}.state", {})

        def die(epoch: int, loss: float, after: int = after) -> None:
            if epoch == after:
                raise Killed

        with pytest.raises(Killed):
            fitted(method(), state, on_epoch=die)
        resumed = fitted(method(), state)
        assert all(torch.equal(value, resumed.state_dict()[key]) for key, value in whole.state_dict().items())


MODULE = """
import torch
from tests.conftest import images
def splits():
    return {name: (images(n, n), torch.arange(n) % 4) for name, n in (("train", 64), ("search", 16), ("test", 8))}
def network():
    from haq.networks import Network
    from tests.conftest import small_network
    return Network("small", small_network(), (1, 8, 8))
"""
JOB = ["--network", "job_of_tickets:network", "--data", "job_of_tickets:splits", "--epochs", "6", "--batch-size", "16"]


def test_the_command_keeps_a_network_of_the_last_round(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job_of_tickets.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [*JOB, "--method", "lottery(rounds=2, share=0.5, last=0.5)", "--out", "ticket.safetensors"]
    assert run_command(lambda: train.main(words)) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "weights that survive: 25.0" in out
    assert any(f"after epoch {epoch}," in out for epoch in (5, 6))
    tensors, header = networks.read_state(Path("ticket.safetensors"))
    weights = [tensor for name, tensor in tensors.items() if name.endswith("weight") and tensor.dim() > 1]
    assert sum(int((tensor != 0).sum()) for tensor in weights) == pytest.approx(
        0.25 * sum(tensor.numel() for tensor in weights), abs=4
    )
    assert "--method 'lottery(rounds=2, share=0.5, last=0.5)'" in header["command"]


def test_bad_values_are_named() -> None:
    for text, message in (
        ("lottery(rounds=0)", "lottery: rounds is 0; it must be an integer of at least 1"),
        ("lottery(share=1)", "lottery: share is 1; it must be a share of the weights, from 0 to below 1"),
        ("lottery(share=few)", "lottery: share is 'few'; it must be a share"),
        ("lottery(last=-1)", "lottery: last is -1; it must be a share"),
        ("lottery(across=layers)", "lottery: across is 'layers'; it must be layer or network"),
        ("lottery(rewind=-1)", "lottery: rewind is -1; it must be an integer of at least 0"),
    ):
        with pytest.raises(ValueError, match="^[^\n]*$") as refused:
            build_method(text)
        assert message in str(refused.value)
    for method, options, message in (
        (LotteryTicket(rounds=3), {}, "the epochs must be a multiple of 4, and are 6"),
        (LotteryTicket(rounds=1), {"steps": 10}, "the epochs must be a multiple of 2, and are 2.5"),
        (LotteryTicket(rounds=2, rewind=8), {}, "rewind is 8; it must be below the 8 steps of a round"),
        (LotteryTicket(rounds=2), {"schedule": "StepLR"}, "the schedule 'StepLR' can't begin anew"),
    ):
        with pytest.raises(ValueError, match=message):
            fitted(method, **options)
