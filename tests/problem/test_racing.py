"""What can't be among the best is told early, and nothing that may be chosen is ever cut short for it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import haq
import quantizers as Q
from haq.problem import racing
from haq.problem.evaluator import RISK, Evaluation, Evaluator
from haq.problem.objective import Objective, ValueObjective
from haq.problem.paired import error_of_difference
from haq.problem.samples import KeptSamples
from haq.solvers import choice
from haq.solvers.base import Session, Solver, Trial, solve
from haq.store import history
from haq.study.search_run import history_row
from haq.study.workers.processes import working
from tests.conftest import brightest, fitted_network, images

COUNT = 750  # six batches


def raced(**options: object) -> haq.Problem:
    """A problem of several batches, of a network that knows its classes."""
    x = images(COUNT, 3)
    given: dict[str, object] = {"budget": 0.4, "correction": None, "search": (x, brightest(x))}
    return haq.Problem(fitted_network(), calibrate=images(64, 1), target="edge", **{**given, **options})


@pytest.fixture(scope="module")
def problem() -> haq.Problem:
    return raced()


def random_policies(problem: haq.Problem, count: int, seed: int = 0) -> list[Q.BitPolicy]:
    draws = random.Random(seed)
    return [
        problem.decide(decision.pairs[draws.randrange(len(decision.pairs))] for decision in problem.decisions)
        for _ in range(count)
    ]


def test_what_is_beaten_is_further_below_than_any_policy_that_may_be_chosen() -> None:
    """Whichever samples two policies are wrong about, but for errors that avoid each other."""
    generator = torch.Generator().manual_seed(0)
    for count in (20, 600, 2000):
        for share in (0.0, 0.1, 0.5, 0.9, 0.99, 1.0):
            best = torch.rand(count, generator=generator) < share
            beat = float(best.double().mean()) - racing.margin(float(best.double().mean()), count)
            for changed in (1 / count, 0.02, 0.2, 1.0):
                other = torch.where(
                    torch.rand(count, generator=generator) < changed, torch.rand(count, generator=generator) < share, best
                )
                error = error_of_difference(best, other)
                assert error is not None
                if float(best.double().mean() - other.double().mean()) <= error:
                    assert float(other.double().mean()) >= beat
    # And it is no wider than needed: about 0.9 points at 92 % of 2,000 samples.
    assert racing.margin(0.92, 2000) == pytest.approx(math.sqrt((0.92 * 0.08 + 0.911 * 0.089) / 2000) + 1 / 2000, rel=0.01)


def test_what_may_be_chosen_is_found_by_the_rule_of_the_choice(problem: haq.Problem) -> None:
    session = Session(problem, 40)
    trial = solve("random", session, 0)
    cut = [one for one in session.trials if not one.whole]
    assert len(cut) > 5
    unraced = Session(problem, 40, race=False)
    assert solve("random", unraced, 0) == trial
    assert unraced.best == session.best
    best = session.best
    assert best is not None
    whole = {one.policy: one for one in unraced.trials}
    for one in cut:
        error = problem.paired_error(best.policy, one.policy)
        assert error is not None
        assert best.value - whole[one.policy].value > error


@pytest.mark.parametrize("solver", ["random", "evolution"])
def test_the_search_is_the_same_as_with_whole_evaluations(solver: str, problem: haq.Problem) -> None:
    sessions = [Session(problem, 50, race=race) for race in (True, False)]
    chosen = [solve(solver, session, 1) for session in sessions]
    assert chosen[0] == chosen[1]
    asked = [[trial.policy for trial in session.trials] for session in sessions]
    assert asked[0] == asked[1]
    assert all(trial.whole for trial in sessions[1].trials)
    assert not all(trial.whole for trial in sessions[0].trials)


def test_what_is_known_when_a_policy_is_chosen_decides(problem: haq.Problem) -> None:
    bad, good = (problem.uniform(bits, keep_pinned=True) for bits in (2, 8))
    session = Session(problem, 9)
    session.expect([bad], beat=None)
    session.expect([bad], beat=0.9)
    assert session.evaluate(bad).images == COUNT
    session = Session(problem, 9)
    session.expect([bad], beat=0.9)
    session.expect([bad], beat=None)
    part = session.evaluate(bad)
    assert part.images < COUNT
    assert session.evaluate(bad) == part  # it isn't evaluated again, by another rule
    assert session.evaluate(good).images == COUNT
    assert [trial.whole for trial in session.trials] == [False, True]


def test_nothing_that_was_asked_before_changes_a_result() -> None:
    policies = random_policies(raced(), 6)
    beats = (0.95, 0.8, 0.6)
    fresh = {(policy, beat): raced_once(policy, beat) for policy in policies for beat in beats}
    assert len({found.images for found in fresh.values()}) > 2
    problem = raced()
    for policy in policies:
        for beat in beats:  # ever more samples, and back again
            assert problem.evaluate(policy, beat) == fresh[policy, beat]
        for beat in reversed(beats):
            assert problem.evaluate(policy, beat) == fresh[policy, beat]
        whole = problem.evaluate(policy)
        assert whole.images == COUNT
        for beat in beats:
            assert problem.evaluate(policy, beat) == fresh[policy, beat]
        assert problem.evaluate(policy) == whole
        problem.evaluator.cache[policy] = whole  # as if it came from elsewhere
        assert problem.evaluate(policy, beats[0]) == fresh[policy, beats[0]]


_ONCE: list[haq.Problem] = []


def raced_once(policy: Q.BitPolicy, beat: float) -> Evaluation:
    """What an evaluator gives that was never asked anything."""
    if not _ONCE:
        _ONCE.append(raced())
    evaluator = _ONCE[0].evaluator
    evaluator.cache.clear()
    return evaluator.race(policy, beat)


def test_any_number_of_workers_cuts_the_same() -> None:
    def rows(problem: haq.Problem, solver: str) -> list[Trial]:
        problem.evaluator.cache.clear()
        session = Session(problem, 16, ahead=3)
        solve(solver, session, 0)
        return session.trials

    problem = raced()
    alone = {solver: rows(problem, solver) for solver in ("random", "surrogate")}
    assert not all(trial.whole for trials in alone.values() for trial in trials)
    with working(problem.evaluator, 2):
        for solver, trials in alone.items():
            assert rows(problem, solver) == trials


def test_a_search_is_told_again_what_it_was_told(problem: haq.Problem) -> None:
    first = Session(problem, 30)
    solve("random", first, 3)
    recorded = {trial.policy: trial.evaluation for trial in first.trials[:20]}
    other = raced()
    other.evaluator.cache.update({policy: raced().evaluate(policy) for policy in list(recorded)[:2]})
    again = Session(other, 30, recorded=recorded)
    asked: list[object] = []
    original = other.evaluator.judge
    other.evaluator.judge = lambda policy, beat=None: (asked.append(policy), original(policy, beat))[1]  # type: ignore[method-assign]
    solve("random", again, 3)
    assert again.trials == first.trials
    assert not set(asked[:10]) & set(recorded)


def test_what_was_cut_short_is_neither_best_nor_chosen(problem: haq.Problem) -> None:
    """Not even where the part that was seen happened to be good."""
    policy = problem.uniform(2, keep_pinned=True)
    assert problem.holds(policy)
    lucky = Evaluation(1.0, 0.0, 125, 0.0)
    session = Session(problem, 5, recorded={policy: lucky})
    session.expect([policy], beat=0.99)
    session.evaluate(policy)
    (trial,) = session.trials
    assert trial.feasible
    assert not trial.whole
    assert session.best is None
    assert not choice.is_candidate(trial)


class _FirstThatFits(Solver):
    """Evaluates policies as they come, all of them raced."""

    goals = ("best", "cheapest")

    def solve(self, problem: haq.Problem, session: Session, seed: int) -> None:
        for policy in random_policies(problem, session.evaluations, seed):
            session.expect([policy], session.racing_beat())
            session.evaluate(policy)


def test_of_the_cheapest_only_what_cannot_be_good_enough_is_cut() -> None:
    problem = raced(budget=None, max_drop=3)
    session = Session(problem, 40)
    threshold = problem.goal.threshold(problem.objective, problem.float_accuracy)
    assert session.racing_beat() == threshold
    solve(_FirstThatFits(), session, 0)
    cut = [trial for trial in session.trials if not trial.whole]
    assert cut
    assert not any(problem.meets(problem.evaluate(trial.policy)) for trial in cut)
    assert session.best is not None
    assert problem.meets(problem.evaluate(session.best.policy))
    stages = Session(problem, 60)  # led from budget to budget
    assert solve("evolution", stages, 0).whole


def test_a_trade_off_is_never_raced() -> None:
    session = Session(raced(tradeoff="soft"), 30)
    assert solve("random", session, 0).whole
    assert all(trial.whole for trial in session.trials)
    assert not session.races
    assert session.racing_beat() is None


class Similarity(ValueObjective):
    """How near the right class's probability is to 1, by sample."""

    unit = "%"
    higher_is_better = True

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.softmax(1).gather(1, targets[:, None])[:, 0]


class Wrong(ValueObjective):
    """The share of wrong answers."""

    unit = "%"
    higher_is_better = False

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.argmax(1) != targets).float()


class Unbounded(Similarity):
    """The same in another unit: nobody knows how large a value may be."""

    unit = ""


@pytest.mark.parametrize("objective", [Similarity(), Wrong()])
def test_means_of_values_from_0_to_1_are_raced(objective: Objective) -> None:
    problem = raced(objective=objective)
    session = Session(problem, 40)
    solve("random", session, 0)
    cut = [trial for trial in session.trials if not trial.whole]
    assert cut
    assert session.best is not None
    for trial in cut:
        assert objective.signed(problem.evaluate(trial.policy).value) < objective.signed(session.best.value)


def test_what_cannot_be_told_from_a_part_is_never_cut() -> None:
    x = images(COUNT, 3)
    labels = brightest(x)

    def agreement(network: nn.Module) -> float:
        with torch.inference_mode():
            return float((network(x).argmax(1) == labels).double().mean())

    agreement.higher_is_better = True  # type: ignore[attr-defined]
    given: list[dict[str, object]] = [
        {"objective": Unbounded()},
        {"objective": agreement, "search": (x, labels)},
        {"search": (x[:125], labels[:125])},  # a single batch
    ]
    unshuffled = raced()
    assert unshuffled.evaluator.samples is not None
    unshuffled.evaluator.samples.is_shuffled = False  # as those of a stream
    for problem in (unshuffled, *(raced(**options) for options in given)):
        policy = random_policies(problem, 1)[0]
        assert not problem.evaluator.races
        assert Session(problem, 3).racing_beat() is None
        assert problem.evaluate(policy, 1.0) == problem.evaluate(policy)
        assert problem.evaluate(policy).images == problem.evaluator.count


def chances(right: int, seen: int, count: int, needed: int) -> tuple[float, float]:
    share = needed / count
    return racing.chance_of_counted(right, seen, share, count), racing.chance_of_bounded(right, seen, share, count)


@pytest.mark.parametrize("count", [40, 2000])
def test_the_bound_of_values_is_never_below_the_exact_probability_of_counts(count: int) -> None:
    from scipy.stats import hypergeom

    draws = random.Random(count)
    for _ in range(300):
        seen, needed = draws.randrange(1, count), draws.randrange(count + 1)
        right = draws.randrange(max(0, seen - (count - needed)), min(seen, needed) + 1)
        exact, bound = chances(right, seen, count, needed)
        if right * count < needed * seen:
            assert exact == pytest.approx(float(hypergeom.cdf(right, count, needed, seen)))
        assert bound >= exact * (1 - 1e-6) - 1e-12 or exact == 1.0


def test_values_that_just_reach_what_is_to_beat_are_stopped_with_the_risk_that_was_stated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert RISK == 1e-3
    monkeypatch.setattr("haq.problem.evaluator.RISK", 0.2)
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(1.0)
    policy = Q.BitPolicy({"0": (8, 8)})
    quantized = Q.quantize(nn.Sequential(network), policy, calibrate=torch.ones(2, 1))

    class Told(ValueObjective):
        unit = "%"
        higher_is_better = True

        def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return targets

    # Far apart, so that the mean of a part moves as much as it can.
    values = torch.cat([torch.zeros(100), torch.ones(900)])
    stopped, far = 0, 0
    for seed in range(100):
        order = torch.randperm(1000, generator=torch.Generator().manual_seed(seed))
        evaluator = Evaluator(quantized, KeptSamples([(torch.ones(1000, 1), values[order])]), objective=Told())
        stopped += evaluator.race(policy, 0.9).images < 1000
        far += evaluator.race(policy, 0.99).images < 1000
    assert stopped <= 0.2 * 100
    assert far > 90


def test_a_history_tells_which_evaluations_were_cut(problem: haq.Problem, tmp_path: Path) -> None:
    session = Session(problem, 40)
    solve("random", session, 0)
    rows = [history_row("random", number, trial, problem) for number, trial in enumerate(session.trials, 1)]
    path = tmp_path / "history.csv"
    history.write(path, rows)
    assert history.tells_images(path)
    assert history.read(path) == rows
    assert [row.whole for row in rows] == [trial.whole for trial in session.trials]
    header = path.read_text().splitlines()[0]
    assert header == ",".join((*history.COLUMNS, "images"))
    whole = [row for row in rows if row.whole]
    history.write(path, whole)
    assert not history.tells_images(path)
    assert path.read_text().splitlines()[0] == ",".join(history.COLUMNS)


@pytest.mark.parametrize(
    ("images", "told"), [("0", "the images are '0', not a number from 1"), ("-3", "the images are '-3'"), ("x", "are 'x'")]
)
def test_a_damaged_history_names_the_images(
    images: str, told: str, problem: haq.Problem, tmp_path: Path, solved: Callable[[], Session]
) -> None:
    session = solved()
    rows = [history_row("random", number, trial, problem) for number, trial in enumerate(session.trials, 1)]
    path = tmp_path / "history.csv"
    history.write(path, rows)
    cut = next(row for row in rows if not row.whole)
    path.write_text(path.read_text().replace(f",{cut.images}\n", f",{images}\n", 1))
    with pytest.raises(ValueError, match="history.csv, line"):
        history.read(path)
    with pytest.raises(ValueError, match=told):
        history.read(path)


@pytest.fixture(scope="module")
def solved(problem: haq.Problem) -> Callable[[], Session]:
    session = Session(problem, 40)
    solve("random", session, 0)
    return lambda: session
