"""Small networks that vote: what each is trained on, how much it counts, and that nobody's vote is turned round."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from quantizers.ensemble import (
    RULES,
    Ensemble,
    bagging,
    bagging_indices,
    boosting,
    member_weight,
    updated_weights,
)
from quantizers.schemes import Binary
from tests.conftest import images


class Says(nn.Module):
    """The same logits whatever it is asked."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.register_buffer("logits", torch.tensor([logits]))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_buffer("logits").expand(len(x), -1)


def labelled(count: int = 160) -> tuple[Tensor, Tensor]:
    """The brightest quarter is the class."""
    x = images(count)
    return x - 0.5, F.avg_pool2d(x, 4).flatten(1).argmax(1)


@pytest.mark.parametrize("vote", ["soft", "hard"])
def test_one_member_decides_alone(network: nn.Module, vote: str) -> None:
    x = images(32)
    alone = Ensemble([network], [0.3], vote)
    logits = network(x)
    assert torch.equal(alone(x).argmax(1), logits.argmax(1))
    expected = logits.softmax(1) if vote == "soft" else F.one_hot(logits.argmax(1), 4).float()
    assert torch.equal(alone(x), expected)
    assert alone.cost_factor == 1


def test_soft_votes_count_confidence_and_hard_ones_heads() -> None:
    members = [Says(5.0, 0.0, 0.0), Says(0.0, 0.5, 0.0), Says(0.0, 0.5, 0.0)]
    x = torch.zeros(2, 1)
    soft, hard = Ensemble(members), Ensemble(members, vote="hard")
    assert soft(x).argmax(1).tolist() == [0, 0]
    assert hard(x).argmax(1).tolist() == [1, 1]
    torch.testing.assert_close(hard(x)[0], torch.tensor([1 / 3, 2 / 3, 0]))
    torch.testing.assert_close(soft(x), sum(m(x).softmax(1) for m in members) / 3)
    assert soft.cost_factor == 3


def test_members_that_change_their_input_leave_it_to_the_others() -> None:
    x = images(4).flatten(1)
    linear = nn.Linear(64, 3)
    shifted = nn.Sequential(nn.Threshold(0.5, 0.0, inplace=True), linear)
    expected = Q.Ensemble([nn.Sequential(nn.Threshold(0.5, 0.0), linear), linear])(x)
    assert torch.equal(Q.Ensemble([shifted, linear])(x), expected)
    assert torch.equal(x, images(4).flatten(1))


def test_votes_are_weighted_and_only_their_ratio_counts() -> None:
    members, x = [Says(1.0, 0.0), Says(0.0, 1.0), Says(0.0, 1.0)], torch.zeros(1, 1)
    for factor in (1.0, 0.01):
        heavy = Ensemble(members, [3 * factor, factor, factor], "hard")
        torch.testing.assert_close(heavy(x), torch.tensor([[0.6, 0.4]]))
    twins = Ensemble([members[0], members[0]], [0.2, 7.0])
    torch.testing.assert_close(twins(x), members[0](x).softmax(1))


def test_an_ensemble_is_a_module_that_can_be_stored(network: nn.Module) -> None:
    made = Ensemble([network, Says(0.0, 0, 0, 1)], [2.0, 1.0])
    other = Ensemble([network, Says(1.0, 0, 0, 0)])
    other.load_state_dict(made.state_dict())
    assert torch.equal(other(images(3)), made(images(3)))
    made(images(3)).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("members", "alphas", "vote", "message"),
    [
        ([], None, "soft", "at least one"),
        ([Says(0.0)], [1.0, 2.0], "soft", "1 members can't have 2"),
        ([Says(0.0)], [-0.4], "soft", "positive.*-0.4"),
        ([Says(0.0)], [0.0], "soft", "positive"),
        ([Says(0.0)], [math.nan], "soft", "positive"),
        ([Says(0.0)], [math.inf], "soft", "finite"),
        ([Says(0.0)], None, "loud", "unknown vote 'loud'; known: soft, hard"),
    ],
)
def test_bad_ensembles_are_refused(members: list[nn.Module], alphas: list[float] | None, vote: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ensemble(members, alphas, vote)


def test_weights_of_members_are_those_of_the_papers() -> None:
    for error, classes, samme, adaboost in (
        (0.5, 2, 0.0, 0.0),
        (0.5, 10, math.log(9), 0.0),
        (0.7, 10, 1.35, -0.424),
        (0.9, 10, 0.0, -1.099),
        (0.1, 2, math.log(9), math.log(9) / 2),
    ):
        assert RULES["samme"](error, classes) == pytest.approx(samme, abs=1e-3)
        assert RULES["adaboost"](error, classes) == pytest.approx(adaboost, abs=1e-3)


def test_a_vote_against_itself_is_refused() -> None:
    assert member_weight(0.7, 10) == pytest.approx(1.35, abs=1e-3)
    for error, rule in ((0.5, "adaboost"), (0.7, "adaboost"), (0.91, "samme")):
        bound = "0.9" if rule == "samme" else "0.5"
        with pytest.raises(ValueError, match=rf"'{rule}' gives an error of {error}.*below {bound}"):
            member_weight(error, 10, rule)
    for error, classes in ((0.0, 10), (1.0, 10), (0.3, 1)):
        with pytest.raises(ValueError, match="no weight for error"):
            member_weight(error, classes)
    with pytest.raises(ValueError, match="unknown rule 'gentle'; known: samme, adaboost"):
        member_weight(0.1, 10, "gentle")


def test_bagging_draws_with_replacement_and_repeats_itself() -> None:
    drawn = bagging_indices(5000, 3)
    assert len(drawn) == 5000
    assert torch.equal(drawn, bagging_indices(5000, 3))
    assert not torch.equal(drawn, bagging_indices(5000, 4))
    assert len(drawn.unique()) / 5000 == pytest.approx(1 - math.exp(-1), abs=0.02)
    assert (int(drawn.min()), int(drawn.max())) == (0, 4999)


def test_after_samme_a_member_is_as_good_as_guessing() -> None:
    """What the weight is for: on the new sample weights the member's error is 1 - 1/K (AdaBoost: 1/2)."""
    wrong = torch.tensor([True, False, False, False, True, False])
    start = torch.tensor([1.0, 2, 3, 1, 2, 1], dtype=torch.double)
    start /= start.sum()
    error = float(start[wrong].sum())
    for rule, classes, expected in (("samme", 10, 0.9), ("samme", 2, 0.5), ("adaboost", 2, 0.5)):
        after = updated_weights(start, wrong, member_weight(error, classes, rule), rule)
        assert float(after.sum()) == pytest.approx(1)
        assert float(after[wrong].sum()) == pytest.approx(expected)
        for same in (wrong, ~wrong):
            torch.testing.assert_close(after[same] / after[same].sum(), start[same] / start[same].sum())


@pytest.mark.parametrize("resample", [False, True])
def test_boosting_shows_each_member_what_the_one_before_got_wrong(resample: bool) -> None:
    labels, number = torch.arange(400) % 4, torch.arange(400)
    mistakes = number < 120, number >= 360  # errors of 0.3, and of 0.1 that by then weighs 1/4 x 40/280
    seen: list[tuple[Tensor, int]] = []

    def train_member(samples: Tensor, seed: int) -> nn.Module:
        seen.append((samples, seed))
        return Says(0.0, 0, 0, 0)

    def predict(member: nn.Module) -> Tensor:
        return torch.where(mistakes[len(seen) - 1], (labels + 1) % 4, labels)

    made = boosting(train_member, predict, labels, 4, 2, resample=resample, seed=7)
    assert [seed for _, seed in seen] == [7, 8]
    assert made.alphas.tolist() == pytest.approx([math.log(7 / 3) + math.log(3), math.log(27) + math.log(3)], rel=1e-5)
    if resample:
        assert all(samples.dtype == torch.long and len(samples) == 400 for samples, _ in seen)
        assert (seen[0][0] < 120).float().mean().item() == pytest.approx(0.3, abs=0.08)
        assert (seen[1][0] < 120).float().mean().item() == pytest.approx(0.75, abs=0.08)
    else:
        assert torch.equal(seen[0][0], torch.ones(400))
        assert seen[1][0][:120].tolist() == pytest.approx([0.75 * 400 / 120] * 120)
        assert seen[1][0][120:].tolist() == pytest.approx([0.25 * 400 / 280] * 280)


def test_boosting_stops_at_a_member_that_guesses_and_bears_a_perfect_one() -> None:
    labels = torch.arange(100) % 10
    answers = {"right": labels, "wrong": (labels + 1) % 10}

    def run(answer: str, rule: str = "samme") -> Ensemble:
        return boosting(lambda samples, seed: Says(0.0), lambda member: answers[answer], labels, 10, 2, rule=rule)

    assert run("right").alphas.tolist() == pytest.approx([math.log(199 * 9)] * 2)
    with pytest.raises(ValueError, match="member 0: .*error"):
        run("wrong")
    answers["mostly wrong"] = torch.where(torch.arange(100) < 70, answers["wrong"], labels)
    with pytest.raises(ValueError, match="member 0: rule 'adaboost' gives an error of 0.7 the weight -0.424"):
        run("mostly wrong", "adaboost")


def binary_member(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            *(nn.Flatten(), nn.Linear(64, 8, bias=False), nn.BatchNorm1d(8), nn.Linear(8, 4, bias=False), nn.BatchNorm1d(4))
        )
    member = Q.quantize(network, {"1": (1, None), "3": (1, 1)}, scheme=Binary())
    optimizer = torch.optim.Adam(member.parameters(), 0.03)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(member(x), y).backward()
        optimizer.step()
    return member.eval()


@pytest.mark.parametrize("kind", ["bagging", "samme"])
def test_an_ensemble_of_weak_binary_networks_is_better_than_they_are(kind: str) -> None:
    (x, y), (test_x, test_y) = labelled(), (images(400, 9) - 0.5, F.avg_pool2d(images(400, 9), 4).flatten(1).argmax(1))

    def train_member(indices: Tensor, seed: int) -> nn.Module:
        return binary_member(x[indices], y[indices], seed)

    @torch.no_grad()
    def accuracy(network: nn.Module) -> float:
        return (network(test_x).argmax(1) == test_y).float().mean().item()

    if kind == "bagging":
        made = bagging(train_member, len(x), 7)
        singles = [accuracy(member) for member in made.members]
    else:
        made = boosting(train_member, torch.no_grad()(lambda member: member(x).argmax(1)), y, 4, 7)
        singles = [accuracy(binary_member(x, y, seed)) for seed in range(4)]
    assert accuracy(made) > sum(singles) / len(singles) + 0.03
    assert made.cost_factor == 7
