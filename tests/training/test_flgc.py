"""FLGC: groups are learned within the training loop, go on exactly, and are what is written and loaded again."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import hw_models
import quantizers as Q
from haq import data, networks, train, training
from haq.console.errors import run_command
from haq.networks.grouped import read_groupings
from haq.store.checkpoint import Checkpoint
from haq.training.flgc import LearnedGroups
from haq.training.methods import build_method
from quantizers.pruning import GroupedConv2d, learned_groups
from tests.conftest import brightest, fitted_network, images, small_network

NETWORK = networks.Network("small", fitted_network(), (1, 8, 8))
CONFIG = training.TrainConfig(epochs=3, learning_rate=0.1, seed=0, batch_size=16)
INPUTS = images(96, 7)


def fitted(method: LearnedGroups, **options: Any) -> nn.Module:
    module = copy.deepcopy(NETWORK.module)
    split = data.Split(INPUTS, brightest(INPUTS))
    training.fit(NETWORK, split, CONFIG, module=module, method=method, **options)
    return module


def test_groups_are_learned_and_are_the_masked_network_then() -> None:
    method, fixed = LearnedGroups(4), LearnedGroups(4, learned=False)
    module = fitted(method)
    fitted(fixed)
    assert list(method.groupings) == ["pointwise"]
    assert method.groupings != fixed.groupings
    assert {len(inputs) for inputs, _ in fixed.groupings["pointwise"].members} == {4}
    assert module.state_dict().keys() == NETWORK.module.state_dict().keys()
    assert type(module.pointwise) is nn.Conv2d
    mask = method.groupings["pointwise"].mask()[..., None, None]
    assert torch.equal(module.pointwise.weight != 0, mask.bool() & (module.pointwise.weight != 0))
    grouped = method.rebuilt(module)
    assert isinstance(grouped.pointwise, GroupedConv2d)
    with torch.no_grad():
        assert (grouped(INPUTS) - module(INPUTS)).abs().max() <= 1e-5
    macs = {record.name.partition(".")[0]: 0 for record in hw_models.trace(grouped, INPUTS[:1]).layers}
    for record in hw_models.trace(grouped, INPUTS[:1]).layers:
        macs[record.name.partition(".")[0]] += record.macs
    assert macs["pointwise"] == method.groupings["pointwise"].macs(1, 16)
    assert method.report()[0].startswith("pointwise: 4 groups, ")


class Killed(Exception):
    """Somebody pulled the plug."""


@pytest.mark.parametrize("after", [1, 2])
def test_a_training_goes_on_exactly(tmp_path: Path, after: int) -> None:
    whole_method = LearnedGroups(4)
    whole = fitted(whole_method)
    state = Checkpoint(tmp_path / "training.state", {})

    def die(epoch: int, loss: float) -> None:
        if epoch == after:
            raise Killed

    with pytest.raises(Killed):
        fitted(LearnedGroups(4), state=state, on_epoch=die)
    method = LearnedGroups(4)
    again = fitted(method, state=state)
    assert method.groupings == whole_method.groupings
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))


def test_dead_channels_are_reported() -> None:
    method = LearnedGroups(2)
    module = small_network()
    conv = Q.pruning.learn_groups(module, 2)["pointwise"]
    conv.input_groups.data = torch.eye(3)[[0] * 15 + [1]]
    conv.output_groups.data = torch.eye(3)[[0] * 14 + [2] * 2]
    method.groupings = learned_groups(module)
    assert method.report() == [
        "pointwise: 1 groups, 82.0 % of the weights and multiplications left; no filter reads input channels 15; "
        "filters 14, 15 read no channel"
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flgc(groups=1)", "flgc has groups=1; it must be an integer of at least 2"),
        ("flgc(groups=2.5)", "flgc has groups=2.5"),
        ("flgc(learned=1)", "flgc has learned=1; it must be True or False"),
        ("flgc(layers=pointwise)", "flgc has layers='pointwise'; it must be a list of names"),
        ("flgc(g=3)", "has g=; flgc takes groups=, learned= and layers="),
    ],
)
def test_bad_values_are_refused_in_a_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="^[^\n]*$") as refused:
        build_method(text)
    assert message in str(refused.value)


def test_what_it_cannot_work_with_is_refused_in_a_sentence() -> None:
    module = NETWORK.module
    quantized = Q.quantize(module, Q.BitPolicy.uniform(module, w=4, a=4), calibrate=INPUTS)
    split = data.Split(INPUTS, brightest(INPUTS))
    for method, trained, message in (
        (LearnedGroups(4), quantized, "flgc learns the groups of a float network"),
        (LearnedGroups(99), copy.deepcopy(module), "no convolution of the network can learn 99 groups"),
        (
            LearnedGroups(4, layers=["hidden"]),
            copy.deepcopy(module),
            "'hidden' can't learn 4 groups: it is no Conv2d but Linear",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            training.fit(NETWORK, split, CONFIG, module=trained, method=method)


MODULE = """
from tests.conftest import brightest, images, small_network
def splits():
    return {name: (images(n, n), brightest(images(n, n))) for name, n in (("train", 64), ("search", 32), ("test", 32))}
def network():
    from haq.networks import Network
    return Network("small", small_network(), (1, 8, 8))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "flgc_job.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def test_the_command_writes_what_runs_in_groups(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--network", "flgc_job:network", "--data", "flgc_job:splits", "--epochs", "2", "--batch-size", "16"]
    arguments += ["--learning-rate", "0.1", "--method", "flgc(groups=4)", "--out", "a.safetensors"]
    assert run_command(lambda: train.main(arguments)) == 0
    assert "pointwise: 4 groups, " in capsys.readouterr().out
    network = networks.load("flgc_job:network@a.safetensors")
    groupings = learned_groups(network.module)
    assert list(groupings) == ["pointwise"]
    again = networks.load("a.safetensors")
    assert again.signature() == network.signature()
    # What is quantized of it is written and loaded, too.
    policy = Q.BitPolicy.uniform(network.module, w=8, a=8)
    quantized = Q.quantize(network.module, policy, calibrate=INPUTS)
    networks.save_quantized(Path("q.safetensors"), quantized, network)
    for loaded in (
        networks.load_quantized(Path("q.safetensors")),
        networks.load_quantized(Path("q.safetensors"), network.module),
        networks.load_quantized(Path("q.safetensors"), small_network()),
    ):
        assert loaded(INPUTS).equal(quantized(INPUTS))


def test_groups_of_a_file_are_checked() -> None:
    good = {"conv": [2, [0, 1], [1, 0, 0]]}
    assert read_groupings(json.dumps(good))["conv"].live == (((0,), (1, 2)), ((1,), (0,)))
    for text, message in (
        ("{", "are no JSON"),
        ("[]", "where groups by layer are wanted"),
        ("{}", "where groups by layer are wanted"),
        ('{"conv": [2, 1]}', "its groups of layer 'conv'"),
        ('{"conv": [2, [0, 2], [1]]}', "layer 'conv': input channel 1 is in group 2"),
        ('{"conv": ["2", [0, 1], [1]]}', "layer 'conv': groups is '2'"),
        ('{"conv": [4000000000, [0], [1]]}', "has 4,000,000,000 groups"),
    ):
        with pytest.raises(ValueError, match="^[^\n]*$") as refused:
            read_groupings(text)
        assert message in str(refused.value)
