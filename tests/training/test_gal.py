"""GAL: masks learn without labels, what they leave out is removed without any change, and training goes on exactly."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantizers as Q
from haq import data, networks, train, training
from haq.console.errors import run_command
from haq.networks.grouped import read_blocks
from haq.store.checkpoint import Checkpoint
from haq.training.gal import GenerativeAdversarial
from haq.training.methods import build_method
from quantizers.pruning import SoftMasks
from tests.conftest import brightest, fitted_network, images

pytest.importorskip("torch_pruning")

NETWORK = networks.Network("small", fitted_network(), (1, 8, 8))
CONFIG = training.TrainConfig(epochs=3, learning_rate=0.003, seed=0, batch_size=16)
INPUTS = images(96, 7)


def split(labels: torch.Tensor | None = None) -> data.Split:
    if labels is None:
        labels = brightest(INPUTS)
    return data.Split(INPUTS, labels)


def made(penalty: float = 3.0, tune: float = 0.34) -> GenerativeAdversarial:
    return GenerativeAdversarial(penalty, tune=tune, rate=0.05)


def fitted(method: GenerativeAdversarial, given: data.Split | None = None, **options: Any) -> nn.Module:
    module = copy.deepcopy(NETWORK.module)
    training.fit(NETWORK, given or split(), CONFIG, module=module, method=method, **options)
    return module


def masks(method: GenerativeAdversarial) -> torch.Tensor:
    return torch.cat([mask.detach() for mask in method.masks.masks])


def test_labels_play_no_part_in_the_masks() -> None:
    """With labels in another order, weights and masks are the same to the last bit until fine-tuning begins."""
    order = torch.randperm(len(INPUTS), generator=torch.Generator().manual_seed(3))
    shuffled = split(brightest(INPUTS)[order])
    methods = made(1.5, tune=0.0), made(1.5, tune=0.0)
    modules = fitted(methods[0]), fitted(methods[1], shuffled)
    assert torch.equal(masks(methods[0]), masks(methods[1]))
    assert all(torch.equal(one, other) for one, other in zip(modules[0].parameters(), modules[1].parameters(), strict=True))
    assert 0 < methods[0].masks.zeros() < len(masks(methods[0]))
    tuned = made(), made()
    modules = fitted(tuned[0]), fitted(tuned[1], shuffled)
    assert torch.equal(masks(tuned[0]), masks(tuned[1]))
    assert any(
        not torch.equal(one, other) for one, other in zip(modules[0].parameters(), modules[1].parameters(), strict=True)
    )


def test_more_channels_go_at_a_larger_penalty() -> None:
    counts = []
    for penalty in (0.0, 2.0, 3.5, 12.0):
        method = made(penalty, tune=0.0)
        fitted(method)
        counts.append(method.masks.zeros())
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[1] < counts[-1]


def test_the_smaller_network_computes_the_same() -> None:
    method = made()
    module = fitted(method)
    smaller = method.rebuilt(module)
    with torch.no_grad():
        assert (smaller(INPUTS) - module(INPUTS)).abs().max() <= 1e-6 * module(INPUTS).abs().max()
    assert module.state_dict().keys() == NETWORK.module.state_dict().keys()
    assert not any(m._forward_pre_hooks for m in module.modules())
    sizes = [sum(p.numel() for p in one.parameters()) for one in (smaller, module)]
    assert sizes[0] < 0.9 * sizes[1]
    kept = Q.pruning.kept_channels(smaller)
    assert set(kept) <= {"stem", "pointwise", "hidden"}
    words = method.report()
    assert words[0] == f"channels left: {48 - method.masks.zeros()} of 48"
    assert [line.partition(":")[0] for line in words[1:]] == ["stem", "pointwise", "hidden"]


class Killed(Exception):
    """Somebody pulled the plug."""


@pytest.mark.parametrize("after", [1, 2])
def test_a_training_goes_on_exactly_in_both_phases(tmp_path: Path, after: int) -> None:
    whole_method = made()
    whole = fitted(whole_method)
    assert whole_method.masks.zeros() > 0
    state = Checkpoint(tmp_path / "training.state", {})

    def die(epoch: int, loss: float) -> None:
        if epoch == after:
            raise Killed

    with pytest.raises(Killed):
        fitted(made(), state=state, on_epoch=die)
    method = made()
    again = fitted(method, state=state)
    assert torch.equal(masks(method), masks(whole_method))
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), again.parameters(), strict=True))


def test_networks_are_kept_only_once_masks_are_learned() -> None:
    seen: list[int] = []

    def judge(module: nn.Module) -> training.Judgement:
        seen.append(len(seen))
        return training.Judgement(0.5, float(len(seen)))  # worse from epoch to epoch

    for method, kept in ((made(), 3), (made(tune=0.67), 2), (made(tune=0.0), 3)):
        seen.clear()
        outcome = training.fit(NETWORK, split(), CONFIG, module=copy.deepcopy(NETWORK.module), method=method, judge=judge)
        assert outcome is not None
        assert outcome.kept == kept


def test_masks_begin_anew_when_the_learning_rate_has_fallen() -> None:
    restarts: list[int] = []
    method = GenerativeAdversarial(1.0, tune=0.0, rate=0.05)
    config = training.TrainConfig(epochs=4, learning_rate=0.003, seed=0, batch_size=16, schedule="step")
    begin = method.begin

    def noted(state: Any) -> None:
        begin(state)
        restart = method.fista.restart

        def note() -> None:
            restarts.append(state.step)
            restart()

        method.fista.restart = note  # type: ignore[method-assign]

    method.begin = noted  # type: ignore[method-assign]
    training.fit(NETWORK, split(), config, module=copy.deepcopy(NETWORK.module), method=method)
    assert restarts == [13, 19]  # the first steps after half and three quarters of 24


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gal(penalty=-1)", "gal has penalty=-1; it must be a number from 0 on"),
        ("gal(penalty=much)", "gal has penalty='much'"),
        ("gal(mu=True)", "gal has mu=True"),
        ("gal(every=0)", "gal has every=0; it must be a number of steps from 1 on"),
        ("gal(tune=1)", "gal has tune=1; it must be a share of the epochs, from 0 to below 1"),
        ("gal(rate=0)", "gal has rate=0; it must be a number above 0"),
        ("gal(blocks=1)", "gal has blocks=1; it must be True or False"),
        ("gal(share=0.3)", "has share=; gal takes penalty=, mu=, every=, tune=, rate= and blocks="),
    ],
)
def test_bad_values_are_refused_in_a_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match="^[^\n]*$") as refused:
        build_method(text)
    assert message in str(refused.value)


def test_what_it_cannot_work_with_is_refused_in_a_sentence() -> None:
    module = NETWORK.module
    quantized = Q.quantize(module, Q.BitPolicy.uniform(module, w=4, a=4), calibrate=INPUTS)
    shapeless = networks.Network("shapeless", module, ())
    half = training.TrainConfig(epochs=2, learning_rate=0.003, seed=0, batch_size=16, amp=True)
    images_out = networks.Network("pictures", nn.Conv2d(1, 1, 3), (1, 8, 8))
    for network, trained, config, message in (
        (NETWORK, quantized, CONFIG, "gal prunes float networks"),
        (shapeless, copy.deepcopy(module), CONFIG, "shapeless doesn't say of which shape its images are"),
        (NETWORK, copy.deepcopy(module), half, "leave out --amp"),
        (images_out, copy.deepcopy(images_out.module), CONFIG, "pictures returns something else"),
    ):
        with pytest.raises(ValueError, match=message):
            training.fit(network, split(), config, module=trained, method=made())


class Sum(nn.Sequential):
    """relu(x + f(x))."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = (x + super().forward(x)).relu()
        return result


def blocks() -> networks.Network:
    torch.manual_seed(0)
    branch = (nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1))
    layers = (nn.Conv2d(1, 6, 3, 2, 1), Sum(*branch), nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4))
    return networks.Network("blocks", nn.Sequential(*layers).eval(), (1, 8, 8))


def test_whole_blocks_go_and_the_file_knows(tmp_path: Path) -> None:
    network = blocks()
    method = GenerativeAdversarial(2.0, tune=0.0, rate=0.05, blocks=True)
    training.fit(network, split(), CONFIG, method=method)
    with torch.no_grad():
        for mask in method.masks.block_masks:  # whatever was learned
            mask.zero_()
    network = blocks()
    masks = SoftMasks(network.module, method.masks.groups, method.masks.blocks)
    masks.load_state_dict(method.masks.state_dict())
    masks.fold(network.module)
    smaller = method.rebuilt(network.module).eval()
    assert method.report()[-1] == "residual blocks that are gone, of 1: 1"
    with torch.no_grad():
        assert (smaller(INPUTS) - network.module(INPUTS)).abs().max() <= 1e-6
    path = tmp_path / "blocks.safetensors"
    name = "tests.training.test_gal:blocks"
    networks.save_checkpoint(replace(network, name=name, module=smaller), path)
    again = networks.load(f"{name}@{path}")
    assert Q.pruning.removed_blocks(again.module) == {"1": True}
    assert again.module(INPUTS).equal(smaller(INPUTS))
    with pytest.raises(ValueError, match="gal has blocks=True, and small has no residual block that could go"):
        training.fit(NETWORK, split(), CONFIG, module=copy.deepcopy(NETWORK.module), method=GenerativeAdversarial(blocks=True))


def test_blocks_of_a_file_are_checked() -> None:
    assert read_blocks('{"layer1.1": true}') == {"layer1.1": True}
    for text, message in (
        ("{", "are no JSON"),
        ("[]", "where true or false by block is wanted"),
        ('{"layer1.1": 1}', "its block 'layer1.1' that is gone is 1; true or false"),
    ):
        with pytest.raises(ValueError, match="^[^\n]*$") as refused:
            read_blocks(text)
        assert message in str(refused.value)


MODULE = """
from quantizers.pruning import SoftMasks
from tests.conftest import brightest, fitted_network, images, small_network
def splits():
    return {name: (images(n, n), brightest(images(n, n))) for name, n in (("train", 64), ("search", 32), ("test", 32))}
def network(pretrained=True):
    from haq.networks import Network
    return Network("small", fitted_network() if pretrained else small_network(), (1, 8, 8))
"""


def test_the_command_writes_a_smaller_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gal_job.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    arguments = ["--network", "gal_job:network", "--data", "gal_job:splits", "--epochs", "3", "--batch-size", "8"]
    arguments += ["--learning-rate", "0.003", "--method", "gal(penalty=3, rate=0.05, tune=0.34)", "--out", "a.safetensors"]
    assert run_command(lambda: train.main(arguments)) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "begins with a trained network, and the weights of gal_job:network are random here: add --pretrained" in error
    assert run_command(lambda: train.main([*arguments, "--pretrained"])) == 0
    out = capsys.readouterr().out
    assert "channels left: " in out
    smaller = networks.load("gal_job:network@a.safetensors").module
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in NETWORK.module.parameters())
    assert networks.load("a.safetensors").module(INPUTS).equal(smaller(INPUTS))
