"""A policy that keeps a part of the channels is judged by the really smaller network, and always gets the same value."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import haq
import quantizers as Q
from haq.problem.channel_evaluation import ChannelEvaluator
from haq.problem.channels import ChannelProblem
from quantizers.norms import running_norms
from quantizers.pruning.criterion import Criterion
from tests.problem.pruned import drawn, images, network_of, problem_of, samples


@pytest.fixture(scope="module")
def problem() -> ChannelProblem:
    return problem_of("residual")


def value_of(problem: ChannelProblem, network: nn.Module) -> Any:
    return problem.evaluator.measure(network)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("residual", {}),
        ("separable", {}),
        ("joined", {"correction": None}),
        ("joined", {"scheme": "dorefa"}),
        ("separable", {"rounding": "gptq"}),
    ],
)
def test_what_is_judged_is_the_quantized_smaller_network(name: str, options: dict[str, Any]) -> None:
    problem = problem_of(name, metric="storage", **options)
    policy = drawn(problem, 1)
    assert policy.keep
    judged = problem.evaluate(policy)
    network = problem.quantized(policy)
    assert Q.get_policy(network) == policy.with_keep(None)
    assert Q.kept_channels(network) == problem.kept_channels(policy.keep)
    assert value_of(problem, network) == judged
    # The first is made for its bits alone, what follows it with the same channels knows all widths.
    with torch.no_grad():
        alone = problem.evaluator._made(policy, alone=True)(images(8, 7))
        assert torch.equal(network(images(8, 7)), alone)


def test_a_policy_that_keeps_all_is_what_it_is_without_pruning() -> None:
    network = network_of("residual")
    plain = haq.Problem(network, images(24), samples(), "edge", objective="agreement", pinned={})
    problem = problem_of(network)
    for seed in range(3):
        policy = drawn(problem, seed).with_keep(None)
        assert problem.evaluate(policy) == plain.evaluate(policy)
        with torch.no_grad():
            assert torch.equal(problem.quantized(policy)(images(4)), plain.quantized(policy)(images(4)))
    assert problem.float_result == plain.float_result


def test_the_value_does_not_depend_on_what_was_asked_before(problem: ChannelProblem) -> None:
    policies = [drawn(problem, seed) for seed in range(6)]
    keep = policies[0].keep
    policies += [policy.with_keep(keep) for policy in policies[:3]]
    values = [problem.evaluate(policy) for policy in policies]
    other = problem_of("residual")
    assert [other.evaluate(policy) for policy in reversed(policies)] == values[::-1]
    for seed in range(5):
        problem.evaluate(drawn(problem, 100 + seed))
    assert len(problem.evaluator._pruned) <= 4
    problem.evaluator.cache.clear()
    assert [problem.evaluate(policy) for policy in policies] == values


def test_norms_get_new_statistics_and_frozen_ones_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    network = network_of("residual")
    network.get_submodule("head.1").requires_grad_(False)
    problem = problem_of(network)
    told = iter([2.0, 1.0])
    monkeypatch.setattr("haq.problem.channel_evaluation.distance", lambda *given: next(told))
    keep = problem.keep_of([1] * len(problem.channel_decisions))
    removed = Q.remove_channels(network, problem.channel_groups, problem.kept_channels(keep))
    pruned = problem.pruned(keep)
    changed = []
    for norm, before in zip(running_norms(pruned), running_norms(removed), strict=True):
        assert isinstance(norm.running_mean, torch.Tensor)
        changed.append(not torch.equal(norm.running_mean, before.running_mean))
    assert changed == [True] * (len(changed) - 1) + [False]


def test_statistics_that_take_outputs_further_away_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of("residual")
    keep = problem.keep_of([1] * len(problem.channel_decisions))
    told = iter([1.0, 2.0])
    monkeypatch.setattr("haq.problem.channel_evaluation.distance", lambda *given: next(told))
    pruned = problem.pruned(keep)
    removed = Q.remove_channels(problem.network, problem.channel_groups, problem.kept_channels(keep))
    for norm, before in zip(running_norms(pruned), running_norms(removed), strict=True):
        assert torch.equal(norm.running_mean, before.running_mean)


def test_a_network_changed_in_place_is_judged_anew() -> None:
    problem = problem_of("residual")
    policy = drawn(problem, 1)
    before = problem.evaluate(policy)
    ranked = problem.ranking
    with torch.no_grad():
        for layer in Q.quant_layers(problem.evaluator.network).values():
            layer.weight.copy_(layer.weight.flip(0))
    after = problem.evaluate(policy)
    assert after.loss != before.loss
    assert problem.ranking is not ranked
    assert value_of(problem, problem.quantized(policy)) == after


def test_calibration_inputs_changed_in_place_are_looked_at_anew() -> None:
    problem = problem_of("residual")
    policy = drawn(problem, 1)
    before = problem.evaluate(policy)
    problem.calibration[0].mul_(3)
    assert problem.evaluate(policy).loss != before.loss


def test_another_process_finds_the_same() -> None:
    problem = problem_of("residual", criterion="fpgm")
    policies = [drawn(problem, seed) for seed in range(3)]
    copied: ChannelEvaluator = pickle.loads(pickle.dumps(problem.evaluator))
    assert [copied.evaluate(policy) for policy in policies] == [problem.evaluate(policy) for policy in policies]


def test_a_bad_policy_is_cut_short_and_the_rest_is_as_ever() -> None:
    problem = haq.Problem(
        network_of("residual"), images(24), samples(500), "edge", objective="agreement", pinned={}, prune=[1, 0.125]
    )
    assert isinstance(problem, ChannelProblem)
    policy = problem.uniform(2).with_keep(problem.keep_of([0] * len(problem.channel_decisions)))
    cut = problem.evaluate(policy, 0.99)
    assert cut.images < 500
    whole = problem.evaluate(policy)
    assert whole.images == 500
    assert problem.evaluate(policy, 0.99) == cut
    other = problem.uniform(8)
    error = problem.paired_error(policy, other)
    assert error is not None
    assert error > 0
    by_sample = problem.evaluator.by_sample(policy)
    assert by_sample is not None
    assert float(by_sample.double().mean()) == pytest.approx(whole.value)


def test_a_network_that_was_pruned_before_counts_as_it_is() -> None:
    network = network_of("residual")
    groups = Q.channel_groups(network, images(2))
    network = Q.remove_channels(network, groups, {"body.0.0": range(8)})
    problem = problem_of(network)
    policy = problem.uniform(8).with_keep({"body.0.0": 0.5})
    assert problem.evaluate(policy) == problem.evaluator.measure(problem.quantized(policy))
    assert problem.channel_words(policy.keep)["body.0.0"] == "4 of 8"


def test_other_samples_judge_the_same_network() -> None:
    problem = problem_of("residual")
    policy = drawn(problem, 1)
    judge = problem.judging(samples())
    assert judge.evaluate(policy) == problem.evaluate(policy)


def test_tuning_is_of_the_smaller_network() -> None:
    seen = []

    def tune(network: nn.Module) -> nn.Module:
        seen.append(Q.kept_channels(network))
        Q.quantizer_state(network)
        return network

    problem = problem_of("residual", tune=tune)
    policy = drawn(problem, 1)
    problem.evaluate(policy)
    assert seen == [problem.kept_channels(policy.keep)]


class Signs(Criterion):
    """Says that it needs a loss and data, and uses both."""

    needs_data = needs_loss = True

    def scores(self, network: nn.Module, group: Q.ChannelGroup) -> torch.Tensor:
        return torch.arange(group.channels).double()


def test_criteria_are_given_what_they_need(problem: ChannelProblem) -> None:
    made = problem_of("residual", criterion=Signs())
    keep = made.keep_of([0] * len(made.channel_decisions))
    for name, channels in made.kept_channels(keep).items():
        count = made.channel_groups[name].channels
        assert channels == tuple(range(count - len(channels), count))
    by_loss = problem_of("residual", criterion="taylor")
    assert by_loss.evaluate(drawn(by_loss, 1)).images == 64
    assert problem.criterion.name == "l1"


def test_several_inputs_a_forward_and_another_objective() -> None:
    network = network_of("residual")

    def forward(module: nn.Module, batch: Any) -> torch.Tensor:
        return module(batch["image"])

    def error(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(outputs, targets, reduction="none").mean(1)

    given = {"image": images(24)}
    search = {"image": images(64, 1), "targets": torch.zeros(64, 4)}
    problem = haq.Problem(
        network,
        [given],
        [search],
        "edge",
        objective=_Closeness(),
        forward=forward,
        prune=[1, 0.5],
        pinned={},
        residuals=8,
    )
    assert isinstance(problem, ChannelProblem)
    policy = problem.uniform(8).with_keep(problem.keep_of([0] * len(problem.channel_decisions)))
    judged = problem.evaluate(policy)
    assert judged.value != problem.evaluate(problem.uniform(8)).value
    made = problem.quantized(policy)
    assert Q.residual_quantizers(made)
    assert value_of(problem, made) == judged


class _Closeness(haq.problem.objective.ValueObjective):
    """How near outputs are to zero."""

    name = "closeness"
    higher_is_better = False
    needs_labels = False

    def values(self, outputs: Any, targets: Any) -> torch.Tensor:
        return outputs.square().mean(1)


def test_bits_alone_cannot_be_set_otherwise() -> None:
    network = network_of("residual")
    policy = Q.BitPolicy.uniform(network, 4, 6)
    alone = Q.quantize(network, policy, calibrate=images(24), correction="analytic", scheme=Q.Linear("output"), alone=True)
    known = Q.quantize(network, policy, calibrate=images(24), correction="analytic", scheme=Q.Linear("output"))
    with torch.no_grad():
        assert torch.equal(alone(images(8, 3)), known(images(8, 3)))
    with pytest.raises(
        ValueError, match="nothing is known of 5 bits, since it was calibrated for the bits of one policy alone"
    ):
        Q.set_policy(alone, Q.BitPolicy.uniform(network, 5, 6))
    with pytest.raises(ValueError, match="calibrated for the bits of one policy alone, and has no state of all widths"):
        Q.quantizer_state(alone)
    Q.set_policy(alone, Q.BitPolicy.uniform(network, None, None))
    with torch.no_grad():
        assert torch.allclose(alone(images(8, 3)), network(images(8, 3)), atol=1e-5)


@pytest.mark.parametrize("scheme", [Q.Linear("mse"), Q.Linear("max", per_channel=False), "linear-asymmetric"])
@pytest.mark.parametrize("pair", [(3, 5), (16, 2), (None, 16)])
def test_all_rules_find_the_same_for_a_policy_alone(scheme: Any, pair: tuple[int | None, int]) -> None:
    network = network_of("separable")
    policy = Q.BitPolicy.uniform(network, *pair)
    given: dict[str, Any] = {"calibrate": images(24), "correction": "analytic", "scheme": scheme}
    with torch.no_grad():
        alone = Q.quantize(network, policy, **given, alone=True)(images(8, 3))
        assert torch.equal(alone, Q.quantize(network, policy, **given)(images(8, 3)))


def test_the_users_network_is_left_alone() -> None:
    network = network_of("residual")
    before = copy.deepcopy(network.state_dict())
    problem = problem_of(network)
    problem.evaluate(drawn(problem, 1))
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert np.isfinite(problem.policy_cost(drawn(problem, 1)))
