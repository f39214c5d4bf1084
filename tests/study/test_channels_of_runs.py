"""What `haq.solve` finds of channels and bits is tuned, shown, saved and loaded; earlier searches of it are learned from."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import haq
import quantizers as Q
from haq.study.channels import bits_only, channels_of, smaller
from haq.study.known_trials import gather
from tests.conftest import brightest, fitted, images


def conv_network() -> nn.Module:
    """Three convolutions and a linear layer, for 1x8x8 images and 4 classes; most of it is between the first and the last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential()
        network.add_module("stem", nn.Conv2d(1, 8, 3, 1, 1))
        network.add_module("relu", nn.ReLU())
        for name, inputs in (("first", 8), ("second", 16)):
            network.add_module(name, nn.Conv2d(inputs, 16, 3, 1, 1, bias=False))
            network.add_module(f"{name}_norm", nn.BatchNorm2d(16))
            network.add_module(f"{name}_relu", nn.ReLU())
        network.add_module("pool", nn.AdaptiveAvgPool2d(2))
        network.add_module("flatten", nn.Flatten())
        network.add_module("classifier", nn.Linear(64, 4))
    return network.eval()


@functools.cache
def network() -> nn.Module:
    """The same, after it learned which quarter is brightest."""
    return fitted(conv_network(), 40).eval()


@functools.cache
def problem(budget: float = 0.4, prune: str | None = "1,0.75,0.5,0.25") -> haq.Problem:
    """Channels and bits of the small network; one for all tests, which keeps what was evaluated."""
    x = images(64, 1)
    given = {}
    if prune is not None:
        given = {"prune": prune, "criterion": "l1"}
    return haq.Problem(network(), calibrate=images(32), search=(x, brightest(x)), target="edge", budget=budget, **given)


@functools.cache
def result() -> haq.Result:
    return haq.solve(problem(), "random", evaluations=10)


def test_the_smaller_network_is_what_is_returned_shown_and_saved(tmp_path: Path) -> None:
    found = result()
    assert found.policy.keep
    channels = channels_of(found.problem, found.policy)
    assert channels is not None
    made = found.quantized
    assert sum(map(len, Q.kept_channels(made).values())) <= channels.kept
    assert made.second.weight.shape[:2] == (channels.layers[2].outputs, channels.layers[2].inputs)
    assert channels.parameters < channels.of_parameters
    table = repr(found.table())
    for layer in channels.layers:
        assert layer.outputs_words in table
    assert "channels kept" in found.table()._repr_html_()
    assert f"{channels.short} channels" in repr(found)
    axes = found.plot().axes
    assert len(axes) == 3
    assert "of 32 channels kept" in axes[1].get_title()
    heights = [bar.get_height() for bar in axes[1].patches[len(channels.layers) :]]  # type: ignore[attr-defined]
    assert heights == [100 * layer.outputs / layer.of_outputs for layer in channels.layers]
    folder = found.save(tmp_path / "found")
    assert json.loads((folder / "policy.json").read_text())["keep"] == dict(found.policy.keep)
    assert json.loads((folder / "solution.json").read_text())["channels"]["kept"] == channels.kept
    again = haq.load(folder, network=network())
    assert torch.equal(again(images(8, 3)), made(images(8, 3)))
    for keep, sentence in (({"first": 0.125, "second": 0.125}, "the policy keeps 2 of the 16"), ({}, "keeps all channels")):
        found.policy.with_keep(keep).to_json(folder / "policy.json")
        with pytest.raises(ValueError, match=f"policy.json and .*quantized.safetensors: .*{sentence}"):
            haq.load(folder, network=network())


def test_it_is_fine_tuned_with_the_whole_float_network_as_teacher() -> None:
    found = haq.solve(problem(), "random", evaluations=4, seed=1)
    x = images(96, 5)
    tuned = found.finetune([(x, brightest(x))], epochs=1)
    assert Q.kept_channels(tuned) == Q.kept_channels(found.problem.quantized(found.policy))
    assert torch.isfinite(tuned(images(4))).all()


def test_costs_of_every_metric_are_of_the_smaller_layers() -> None:
    from haq.study.result import costs

    policy = problem().uniform(8).with_keep({"second": 0.5})
    whole, half = (costs(problem(), one) for one in (policy.with_keep(None), policy))
    assert half["storage_bytes"] < whole["storage_bytes"]
    assert half["latency_s"] < whole["latency_s"]
    assert smaller(problem(), policy).workload.macs < problem().workload.macs
    assert smaller(problem(), policy.with_keep(None)) is problem()


def test_bits_alone_are_told_to_be_out_of_reach() -> None:
    alone = bits_only(problem())
    assert alone.uniform(8).keep == {}
    least = alone.smallest / alone.reference
    assert problem().smallest / alone.reference < 0.95 * least
    with pytest.raises(ValueError, match="with all channels latency is at least .*, and the budget is"):
        bits_only(problem().on("edge", 0.95 * least))


def test_trials_of_others_are_learned_from_as_far_as_they_mean_something(tmp_path: Path) -> None:
    found = result()
    found.save(tmp_path / "pruned")
    known = gather(tmp_path / "pruned", problem())
    assert {trial.policy for trial in known.trials} == {trial.policy for trial in found.trials}
    # Where no channels are searched, policies of fewer channels mean nothing.
    plain = problem(0.6, None)
    known = gather(tmp_path / "pruned", plain)
    assert not any(trial.policy.keep for trial in known.trials)
    assert known.left_out == sum(bool(trial.policy.keep) for trial in found.trials)
    assert gather(found, plain).left_out == known.left_out
    # Policies of all channels mean the same here.
    other = haq.solve(plain, "random", evaluations=3)
    assert len(gather(other, problem()).trials) == 3
