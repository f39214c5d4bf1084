"""What `haq.solve` finds of channels and bits is tuned, shown, saved and loaded; earlier searches of it are learned from."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

import haq
import quantizers as Q
from haq.study.channels import bits_only, channels_of, smaller
from haq.study.known_trials import gather
from tests.conftest import brightest, fitted, images, small_network


@functools.cache
def problem(budget: float = 0.3, prune: str | None = "1,0.75,0.5,0.25") -> haq.Problem:
    """Channels and bits of the small network; one for all tests, which keeps what was evaluated."""
    x = images(64, 1)
    given = {}
    if prune is not None:
        given = {"prune": prune, "criterion": "l1"}
    return haq.Problem(network(), calibrate=images(32), search=(x, brightest(x)), target="edge", budget=budget, **given)


@functools.cache
def network() -> torch.nn.Module:
    return fitted(small_network())


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
    assert made.hidden.weight.shape[0] == channels.layers[3].outputs
    assert channels.parameters < channels.of_parameters
    table = repr(found.table())
    for layer in channels.layers:
        assert layer.outputs_words in table
    assert "channels kept" in found.table()._repr_html_()
    assert f"{channels.short} channels" in repr(found)
    axes = found.plot().axes
    assert len(axes) == 3
    assert "of 32 channels kept" in axes[1].get_title()
    heights = [bar.get_height() for bar in axes[1].patches[len(channels.layers) :]]
    assert heights == [100 * layer.outputs / layer.of_outputs for layer in channels.layers]
    folder = found.save(tmp_path / "found")
    assert json.loads((folder / "policy.json").read_text())["keep"] == dict(found.policy.keep)
    assert json.loads((folder / "solution.json").read_text())["channels"]["kept"] == channels.kept
    again = haq.load(folder, network=network())
    assert torch.equal(again(images(8, 3)), made(images(8, 3)))
    (folder / "policy.json").write_text((folder / "policy.json").read_text().replace('"hidden"', '"pointwise"'))
    with pytest.raises(ValueError, match=r"policy.json( and|: ).*(the policy keeps|keeps all channels|named twice|keep)"):
        _with_other_channels(folder, found.policy)


def _with_other_channels(folder: Path, policy: Q.BitPolicy) -> None:
    """Load what was saved, once its policy keeps other channels."""
    other = {name: 0.25 if share != 0.25 else 0.5 for name, share in policy.keep.items()}
    policy.with_keep(other).to_json(folder / "policy.json")
    haq.load(folder, network=network())


def test_it_is_fine_tuned_with_the_whole_float_network_as_teacher() -> None:
    found = haq.solve(problem(), "random", evaluations=4, seed=1)
    x = images(96, 5)
    tuned = found.finetune([(x, brightest(x))], epochs=1)
    assert Q.kept_channels(tuned) == Q.kept_channels(found.problem.quantized(found.policy))
    assert torch.isfinite(tuned(images(4))).all()


def test_costs_of_every_metric_are_of_the_smaller_layers() -> None:
    from haq.study.result import costs

    policy = problem().uniform(8).with_keep({"hidden": 0.5})
    whole, half = (costs(problem(), one) for one in (policy.with_keep(None), policy))
    assert half["storage_bytes"] < whole["storage_bytes"]
    assert half["latency_s"] < whole["latency_s"]
    assert smaller(problem(), policy).workload.macs < problem().workload.macs
    assert smaller(problem(), policy.with_keep(None)) is problem()


def test_bits_alone_are_told_to_be_out_of_reach() -> None:
    alone = bits_only(problem())
    assert alone.policy([8] * 5, [8] * 5).keep == {}
    with pytest.raises(ValueError, match="with all channels latency is at least .*, and the budget is"):
        bits_only(problem(0.17))


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
