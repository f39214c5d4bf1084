"""What a problem of channels and widths offers, and what it refuses in a sentence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import haq
import quantizers as Q
from haq.problem.channels import ChannelProblem
from haq.problem.problem import NotAllowed
from haq.problem.shares import read_shares, shares_words
from tests.problem.pruned import drawn, images, network_of, problem_of, samples


@pytest.fixture(scope="module")
def problem() -> ChannelProblem:
    return problem_of("residual")


@pytest.mark.parametrize(
    ("prune", "shares"),
    [
        ("0.25:1", (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)),
        ((0.7, 1.0), (0.75, 0.875, 1.0)),
        ("1,0.75,0.5", (0.5, 0.75, 1.0)),
        ([1, 0.3], (0.3, 1.0)),
        ("0.5 : 1", (0.5, 0.625, 0.75, 0.875, 1.0)),
    ],
)
def test_shares_are_read_and_written(prune: Any, shares: tuple[float, ...]) -> None:
    assert read_shares(prune) == shares
    assert read_shares(shares_words(shares)) == shares


@pytest.mark.parametrize(
    ("prune", "words"),
    [
        ("0:1", "beyond 0 and at most 1, not '0'"),
        ("0.5:1.5", "beyond 0 and at most 1, not '1.5'"),
        ("half", "beyond 0 and at most 1, not 'half'"),
        ([1, -0.5], "beyond 0 and at most 1, not '-0.5'"),
        ("1:0.5", "the smaller share comes first"),
        ("0.25:0.75", "must reach 1"),
        ([0.5, 0.75], "must reach 1"),
        ("1", "leaves nothing to choose"),
        ("1:1", "leaves nothing to choose"),
        ("", "beyond 0 and at most 1, not ''"),
        (0.5, "give a range such as 0.25:1"),
        ([True, 0.5], "beyond 0 and at most 1, not 'True'"),
    ],
)
def test_wrong_shares_are_told(prune: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        problem_of("residual", prune=prune)


def test_every_group_has_its_counts(problem: ChannelProblem) -> None:
    assert [decision.group for decision in problem.channel_decisions] == [g.name for g in problem.channel_groups.groups]
    for decision in problem.channel_decisions:
        group = problem.channel_groups[decision.group]
        assert decision.counts[-1] == group.channels
        assert decision.shares[-1] == 1
        assert (np.diff(decision.counts) > 0).all()
        assert (np.diff(decision.errors) < 0).all()
        assert decision.errors[-1] == 0
        assert [group.count(share) for share in decision.shares] == decision.counts.tolist()
        names = [problem.workload.names[layer] for layer in decision.layers]
        assert set(names) == {*group.writers, *group.readers}
    assert problem.not_pruned == {"classifier": "they are outputs of the network"}


def test_options_and_policies_name_each_other(problem: ChannelProblem) -> None:
    for seed in range(4):
        policy = drawn(problem, seed)
        numbers = problem.numbers_of(policy.keep)
        assert problem.keep_of(numbers) == policy.keep
        problem.check_policy(policy)
        assert problem.allows(policy)
    assert problem.numbers_of({}).tolist() == [len(d.counts) - 1 for d in problem.channel_decisions]


def test_tables_get_words(problem: ChannelProblem) -> None:
    words = problem.channel_words({"stem.0": 0.5})
    assert words["stem.0"] == "4 of 8"
    assert words["classifier"] == "4"
    assert list(words) == list(problem.workload.names)
    assert "4 groups of channels keep 0.25:1 by l1" in repr(problem)


def test_what_policies_keep_is_checked(problem: ChannelProblem) -> None:
    policy = problem.uniform(8)
    refused = {
        "body": ({"body": 0.5}, "keeps a part of 'body', which is no group of channels; groups are stem.0"),
        "outputs": ({"classifier": 0.5}, "the channels of 'classifier' can't be pruned: they are outputs of the network"),
        "share": ({"stem.0": 0.3}, "group 'stem.0' can't keep 0.3 of its channels; it may keep 0.25, 0.375"),
    }
    for keep, words in refused.values():
        with pytest.raises(NotAllowed, match=words):
            problem.check_policy(policy.with_keep(keep))
        with pytest.raises(NotAllowed, match=words):
            problem.policy_cost(policy.with_keep(keep))
    with pytest.raises(NotAllowed, match="the channels are chosen already"):
        problem.at({}).check_policy(policy.with_keep({"stem.0": 0.5}))
    at = problem.at({"stem.0": 0.5})
    assert at.workload == problem.shape_of({"stem.0": 0.5})[0]
    assert at.uniform(8).keep == {"stem.0": 0.5}
    with pytest.raises(NotAllowed, match="the channels are chosen already"):
        at.check_policy(policy)


def test_channels_of_pinned_layers_stay() -> None:
    problem = problem_of("residual", pinned=None)
    words = "layer 'stem.0', which writes them, is pinned"
    assert problem.not_pruned["stem.0"] == words
    with pytest.raises(NotAllowed, match=words):
        problem.check_policy(problem.uniform(8, keep_pinned=True).with_keep({"stem.0": 0.5}))


def test_a_network_without_prunable_groups_says_why() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    words = r"no channels of Sequential can be pruned: '4' \(they are outputs of the network\); '0' \(layer '0', which writes"
    with pytest.raises(ValueError, match=words):
        problem_of(network.eval(), pinned=None)


def test_a_criterion_without_pruning_and_an_unknown_one() -> None:
    network = network_of("residual")
    with pytest.raises(ValueError, match="`criterion` says which channels are kept, and without `prune` all are"):
        haq.Problem(network, images(8), samples(8), "edge", objective="agreement", criterion="fpgm")
    with pytest.raises(ValueError, match="unknown criterion 'l3'"):
        problem_of(network, criterion="l3")


def test_a_criterion_with_a_loss_needs_class_scores() -> None:
    network = network_of("residual")
    with pytest.raises(ValueError, match="criterion 'taylor' needs a loss, which objective 'mse' doesn't have"):
        haq.Problem(
            network, images(8), (images(8), torch.zeros(8, 4)), "edge", objective="mse", prune="0.5:1", criterion="taylor"
        )


def test_one_sample_for_calibration_is_too_few() -> None:
    with pytest.raises(ValueError, match="`calibrate` has one sample, by which norms of a smaller network have no variance"):
        haq.Problem(network_of("residual"), images(1), samples(8), "edge", objective="agreement", prune="0.5:1")


def test_options_of_another_form_are_refused(problem: ChannelProblem) -> None:
    w, a = problem.bit_arrays(problem.uniform(8))
    with pytest.raises(ValueError, match="options of channels must be integers"):
        problem.totals(np.zeros((1, 2), int), w[None], a[None])


def test_budgets_that_only_pruning_meets_together() -> None:
    network = network_of("residual")
    options: dict[str, Any] = {"objective": "agreement", "pinned": {}}
    plain = haq.Problem(network, images(8), samples(8), "edge", budget={"latency": 0.9, "storage": 0.9}, **options)
    budgets = {limit.metric: 0.8 * limit.smallest / limit.reference for limit in plain.limits}
    with pytest.raises(haq.problem.budget.OutOfReach):
        haq.Problem(network, images(8), samples(8), "edge", budget=budgets, **options)
    problem = problem_of(network, budget=budgets, **options)
    keep = problem.keep_of([0] * len(problem.channel_decisions))
    at = problem.at(keep)
    assert at.several is not None
    chosen = at.several.choose([np.zeros(len(decision.pairs)) for decision in at.decisions])
    policy = at.decide(decision.pairs[pick] for decision, pick in zip(at.decisions, chosen, strict=True))
    assert problem.holds(policy)
    assert Q.BitPolicy.from_dict(policy.to_dict()) == policy
