"""All solvers get the same problem and number of evaluations, meet the budget, and repeat themselves for a seed."""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import envs
import haq
import quantizers as Q
from haq.solvers import SOLVERS, actor, agents, ilp, sensitivity
from haq.solvers.base import Session, Trial, find_solver, solve
from tests.conftest import images, make_problem, small_network

PUBLISHED = Path(__file__).parents[2] / "experiments" / "hawqv3_resnet18.json"
SEARCHING = [name for name in SOLVERS if name != "exhaustive"]  # which needs a small problem
# td3 differs from ddpg in how its agent learns, and from nobody in how it searches.
AND_TD3_SLOWLY = [pytest.param(name, marks=pytest.mark.slow) if name == "td3" else name for name in SEARCHING]


def run(name: str, problem: haq.Problem, evaluations: int = 24, seed: int = 0, env: str = "plan") -> tuple[Trial, list[Trial]]:
    tried: list[Trial] = []
    session = Session(problem, evaluations, tried.append, env=env)
    return solve(name, session, seed), tried


@pytest.mark.parametrize("name", AND_TD3_SLOWLY)
@pytest.mark.parametrize("evaluations", [1, 24])
def test_the_contract(name: str, evaluations: int) -> None:
    problem = make_problem(small_network())
    found, tried = run(name, problem, evaluations)
    assert problem.within_budget(found.cost)
    assert found.cost == pytest.approx(problem.policy_cost(found.policy))
    assert found.evaluation == problem.evaluate(found.policy)
    assert 1 <= len(tried) <= evaluations
    assert len({t.policy for t in tried}) == len(tried)
    assert found.policy["stem"] == found.policy["classifier"] == (8, 8)
    again, tried_again = run(name, make_problem(small_network()), evaluations)
    assert (again, tried_again) == (found, tried)


@pytest.mark.parametrize("name", ["ddpg", "random"])
def test_another_seed_is_another_search(name: str) -> None:
    problem = make_problem(small_network())
    assert run(name, problem, seed=0)[1] != run(name, problem, seed=1)[1]


@pytest.mark.parametrize("name", AND_TD3_SLOWLY)
def test_global_random_state_is_neither_used_nor_changed(name: str) -> None:
    problem = make_problem(small_network())
    first = run(name, problem)[1]
    torch.manual_seed(99)
    np.random.seed(99)
    random.seed(99)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index, union-attr]
    assert run(name, problem)[1] == first
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index, union-attr]
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_sessions_count_policies_once_and_stop_at_their_allowance(problem: haq.Problem) -> None:
    session = Session(problem, 2)
    session.evaluate(problem.uniform(4, keep_pinned=True))
    session.evaluate(problem.uniform(4, keep_pinned=True))
    assert (session.used, session.left) == (1, 1)
    session.evaluate(problem.uniform(8))
    assert session.best is not None
    assert session.best.policy == problem.uniform(4, keep_pinned=True)  # uniform 8 exceeds the budget, however good
    with pytest.raises(RuntimeError, match="all 2 evaluations"):
        session.evaluate(problem.uniform(3, keep_pinned=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem": (1, 1)}, r"layer 'stem' can't take 1/1 \(weights/activations\): it is pinned at 8/8"),
        ({"pointwise": (2, 4)}, "'pointwise' can't take 2/4 .*: 3 to 6 bits are allowed"),
        ({"pointwise": (4, 7)}, "'pointwise' can't take 4/7 .*: 3 to 6 bits are allowed"),
        ({"pointwise": (None, 4)}, "'pointwise' can't take float/4 .*: 3 to 6 bits are allowed"),
        ({"pointwise": (4, None)}, "'pointwise' can't take 4/float .*: 3 to 6 bits are allowed"),
        ({"hidden": (5, 4)}, "layers 'depthwise' and 'hidden' are tied and take the same bits, not 4/4 and 5/4"),
        ({"more": (4, 4)}, "'more' is in one of the two only"),
    ],
)
def test_no_solver_leaves_the_problem(
    network: nn.Module, change: dict[str, tuple[int | None, int | None]], message: str
) -> None:
    inputs, labels = images(8), torch.zeros(8, dtype=torch.long)
    problem = haq.Problem(network, inputs, (inputs, labels), "edge", budget=0.7, tied=[("hidden", "depthwise")], bits=(3, 6))
    allowed = problem.uniform(4, keep_pinned=True)

    class Leaves(haq.Solver):
        def solve(self, problem: haq.Problem, session: haq.Session, seed: int) -> None:
            session.evaluate(allowed)
            session.evaluate(Q.BitPolicy({**allowed, **change}))

    session = Session(problem, 5)
    with pytest.raises(ValueError, match=f"^solver 'Leaves' chose a policy that is not allowed: .*{message}"):
        solve(Leaves, session, 0)
    assert session.used == 1
    with pytest.raises(ValueError, match=message):
        session.evaluate(Q.BitPolicy({**allowed, **change}))


def test_only_policies_are_evaluated(problem: haq.Problem) -> None:
    session = Session(problem, 5)
    policy = problem.uniform(4, keep_pinned=True)
    for other, kind in ((dict(policy), "dict"), (None, "NoneType"), ([(8, 8)], "list")):
        with pytest.raises(ValueError, match=f"must be a quantizers.BitPolicy, not {kind}"):
            session.evaluate(other)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'hidden' is in one of the two only"):
        session.evaluate(Q.BitPolicy({name: bits for name, bits in policy.items() if name != "hidden"}))
    assert session.used == 0


def test_pairs_that_a_scheme_lacks_are_not_evaluated(network: nn.Module) -> None:
    class Alike(Q.Linear):
        """Weights and inputs have the same width, or float."""

        def check(self, weight_bits: int | None, activation_bits: int | None, signed: bool = False) -> None:
            if None not in (weight_bits, activation_bits) and weight_bits != activation_bits:
                raise ValueError("not alike")

    inputs, labels = images(8), torch.zeros(8, dtype=torch.long)
    problem = haq.Problem(network, inputs, (inputs, labels), "edge", budget=0.7, scheme=Alike())
    session = Session(problem, 5)
    policy = problem.uniform(4, keep_pinned=True)
    session.evaluate(policy)
    with pytest.raises(ValueError, match="'hidden' can't take 4/5 .*: its scheme 'linear' has no such pair"):
        session.evaluate(Q.BitPolicy({**policy, "hidden": (4, 5)}))


def test_what_costs_too_much_or_as_much_as_more_bits_may_be_evaluated(problem: haq.Problem) -> None:
    """Sensitivities need it: the largest widths exceed the budget, and pairs that are not worth choosing are allowed."""
    session = Session(problem, 100)
    session.evaluate(problem.uniform(8))
    assert session.best is None
    policy = problem.uniform(4, keep_pinned=True)
    for w, a in itertools.product(range(2, 9), repeat=2):
        session.evaluate(Q.BitPolicy({**policy, "hidden": (w, a)}))


class Steady(haq.Solver):
    """It does nothing; what is derived from it does wrong."""

    def solve(self, problem: haq.Problem, session: haq.Session, seed: int) -> None: ...


def takes_too_little(self: haq.Solver, problem: haq.Problem) -> None: ...


def takes_other_names(self: haq.Solver, p: Any, s: Any, n: Any, more: int = 0) -> None:
    s.evaluate(p.uniform(2, keep_pinned=True))


def asks_for_what_is_not_there(self: haq.Solver, problem: haq.Problem, session: Session, seed: int) -> None:
    problem.uniform(4)["nowhere\nat all"]


def evaluates_more_than_it_may(self: haq.Solver, problem: haq.Problem, session: Session, seed: int) -> None:
    for bits in (8, 7, 6):
        session.evaluate(problem.uniform(bits, keep_pinned=True))


def solver_class(solve: Callable[..., None]) -> type[haq.Solver]:
    return type("Wrong", (Steady,), {"solve": solve})


@pytest.mark.parametrize("made", [False, True])
def test_a_solver_that_takes_something_else_is_refused_before_it_begins(made: bool, problem: haq.Problem) -> None:
    solvers = [solver_class(takes_too_little), solver_class(lambda: None), solver_class(3)]  # type: ignore[arg-type]
    for solver in solvers:
        with pytest.raises(ValueError, match=r"can't be used: it lacks a method solve that takes \(problem, session, seed\)"):
            find_solver(solver() if made else solver)
    fits = solver_class(takes_other_names)
    assert SOLVERS._check is not None
    assert SOLVERS._check(fits) == SOLVERS._check(fits()) == ""
    assert SOLVERS._check(solvers[0]) == "a method solve that takes (problem, session, seed)"
    assert solve(fits, Session(problem, 3), 0).feasible


@pytest.mark.parametrize(
    ("does", "message"),
    [
        (asks_for_what_is_not_there, "failed: KeyError: .*nowhere"),
        (lambda self, problem, session, seed: seed + "1", "failed: TypeError: unsupported operand"),
        (evaluates_more_than_it_may, "failed: RuntimeError: all 2 evaluations are used"),
        (lambda self, problem, session, seed: None, "evaluated no policy within the budget, 0 in all"),
        (
            lambda self, problem, session, seed: session.evaluate(problem.uniform(8)) and None,
            "evaluated no policy within the budget, 1 in all",
        ),
    ],
)
def test_a_solver_that_fails_is_named_in_one_sentence(does: Callable[..., None], message: str, problem: haq.Problem) -> None:
    with pytest.raises(ValueError, match=f"^solver 'Wrong' {message}") as caught:
        solve(solver_class(does), Session(problem, 2), 0)
    assert str(caught.value).isprintable()


def test_a_solver_that_fails_while_it_is_made_is_named(problem: haq.Problem) -> None:
    class Unlucky(Steady):
        def __init__(self) -> None:
            raise FileNotFoundError("no such\nboard")

    with pytest.raises(ValueError, match=r"Unlucky.* can't be made \(FileNotFoundError: no such board\)"):
        solve(Unlucky, Session(problem, 2), 0)


def test_what_fails_in_an_evaluation_is_not_called_the_solvers_fault(problem: haq.Problem) -> None:
    def on_trial(trial: Trial) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        solve(solver_class(takes_other_names), Session(problem, 2, on_trial), 0)


def test_unknown_solvers_name_the_close_ones(problem: haq.Problem) -> None:
    with pytest.raises(ValueError, match="did you mean random"):
        solve("radnom", Session(problem, 1), 0)


numbers = st.integers(0, 1000).map(lambda n: n / 100)  # a limit is kept to some 1e-11 of it, not to the last bit


@settings(max_examples=60)
@given(st.data())
def test_the_integer_programme_is_optimal(data: st.DataObject) -> None:
    layers, options = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    table = st.lists(st.lists(numbers, min_size=options, max_size=options), min_size=layers, max_size=layers)
    loss, cost = np.array(data.draw(table)), np.array(data.draw(table))
    tied = [(0, layers - 1)] if layers > 1 and data.draw(st.booleans()) else []
    limit = 4 * data.draw(numbers)
    every = [
        choice for choice in itertools.product(range(options), repeat=layers) if all(choice[a] == choice[b] for a, b in tied)
    ]
    rows = np.arange(layers)
    totals = [(loss[rows, choice].sum(), cost[rows, choice].sum()) for choice in every]
    fitting = [total for total, price in totals if price <= limit]
    if not fitting:
        if min(price for _, price in totals) > limit * (1 + 1e-9) + 1e-9:
            with pytest.raises(ValueError, match="the least is"):
                ilp.allocate(loss, cost, limit, tied)
        return
    chosen = ilp.allocate(loss, cost, limit, tied)
    assert cost[rows, chosen].sum() <= limit + 1e-9 * max(limit, 1)
    # A sum that is the limit itself may come out a last bit above it: then it may be taken, or not.
    at_most = limit + 1e-9 * max(limit, 1)
    least = min(total for total, price in totals if price <= at_most)
    assert least - 1e-6 <= loss[rows, chosen].sum() <= min(fitting) + 1e-6
    assert all(chosen[a] == chosen[b] for a, b in tied)


def test_options_that_are_infinite_are_not_taken() -> None:
    loss = [[0.0, 1.0], [np.inf, 2.0]]
    assert ilp.allocate(loss, [[1, 1], [1, 1]], 5).tolist() == [0, 1]
    with pytest.raises(ValueError, match="layer 1 has no available option"):
        ilp.allocate([[0.0], [np.inf]], [[1.0], [1.0]], 5)
    with pytest.raises(ValueError, match="NaN"):
        ilp.allocate([[np.nan]], [[1.0]], 5)
    with pytest.raises(ValueError, match="two arrays"):
        ilp.allocate([[0.0, 1.0]], [[1.0]], 5)


def test_the_integer_programme_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS does, on this one."""
    random = np.random.default_rng(1)
    bits = np.array(list(itertools.product(range(1, 9), repeat=2)))
    loss = random.lognormal(0, 1.5, (50, 1)) * (4.0 ** -bits[:, 0] + 4.0 ** -bits[:, 1])
    cost = random.lognormal(0, 1, (50, 1)) * bits.prod(1) * (1 + 0.05 * random.random((50, 64)))
    ilp.allocate(loss, cost, cost[:, -1].sum() * random.uniform(0.1, 0.6))
    ctypes.CDLL(None).fflush(None)
    print("still here")
    assert capfd.readouterr() == ("still here\n", "")


def test_published_allocations_are_found() -> None:
    """HAWQ-V3's ResNet-18 problems, each with its proven optimum."""
    given = json.loads(PUBLISHED.read_text())
    trace = np.array(given["trace"])
    loss = np.stack([trace * given["dw2_4bit"], trace * given["dw2_8bit"]], axis=1)
    parameters, bops = np.array(given["parameters"]), np.array(given["bops"])
    costs = {
        "modelsize": np.stack([parameters * 4, parameters * 8], axis=1),
        "bops": np.stack([bops / 4, bops], axis=1),
        "latency": np.stack([given["latency_int4"], given["latency_int8"]], axis=1),
    }
    for name, case in given["cases"].items():
        cost = costs[name.partition("_")[0]]
        low, high = cost[:, 0].sum(), cost[:, 1].sum()
        chosen = ilp.allocate(loss, cost, low + case["fraction"] * (high - low), tied=given["tied_pairs"])
        total = loss[np.arange(len(loss)), chosen].sum()
        assert total == pytest.approx(case["optimal_objective"], rel=1e-9), name


def test_sensitivities_are_monotone_and_cover_what_was_not_measured() -> None:
    problem = make_problem(small_network())
    for evaluations in (1, 3, 8, 200):
        rise = sensitivity.measure(problem, Session(problem, evaluations), keep=1)
        assert np.isfinite(rise).all()
        assert (rise >= 0).all()
        assert (np.diff(rise, axis=1) <= 0).all()
        assert (np.diff(rise, axis=2) <= 0).all()
        assert (rise[:, 7, 7] == 0).all()


def test_sensitivities_are_those_measured() -> None:
    problem = make_problem(small_network())
    session = Session(problem, 200)
    rise = sensitivity.measure(problem, session, keep=1)
    base = problem.uniform(8)
    layer = problem.workload.names.index("hidden")
    changed = {**base, "hidden": (2, 8)}
    bits = np.array(list(changed.values()))
    measured = problem.evaluate(problem.policy(*bits.T)).loss - problem.evaluate(base).loss
    assert rise[layer, 1, 7] >= measured
    assert rise[layer, 1, 7] == pytest.approx(measured) or rise[layer, 1, 7] == rise[layer, 2, 7]


def test_truncated_noise_stays_inside_without_piling_up() -> None:
    random = np.random.default_rng(0)
    drawn = actor.truncated_normal(np.full((20000, 1), 0.9, np.float32), 0.5, random)
    assert drawn.min() >= -1
    assert drawn.max() <= 1
    assert (np.abs(drawn) == 1).mean() < 1e-3  # clipped normal noise would put 42 % there
    assert np.abs(actor.truncated_normal(np.zeros((20000, 1), np.float32), 0.5, random).mean()) < 0.02


@pytest.mark.parametrize("name", ["ddpg", pytest.param("sac", marks=pytest.mark.slow)])
def test_haqs_own_search_keeps_the_contract(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "WARM_UP", 6)
    problem = make_problem(small_network())
    found, tried = run(name, problem, 12, env="haq")
    assert len(tried) == 12
    assert all(problem.within_budget(one.cost) for one in tried)  # no sensitivities: every evaluation is an episode's
    assert (found, tried) == run(name, make_problem(small_network()), 12, env="haq")


def test_the_share_of_actions_at_a_bound_is_kept() -> None:
    session = Session(make_problem(small_network()), 30)
    solve("ddpg", session, 0)
    assert session.saturated
    assert all(0 <= share <= 1 for share in session.saturated)


def test_exhaustive_search_is_the_truth_where_it_is_possible() -> None:
    problem = make_problem(small_network(), 0.6)
    problem.decisions = [
        d if len(d.pairs) == 1 else d._replace(pairs=d.pairs[-3:], prices=d.prices[-3:]) for d in problem.decisions
    ]
    problem.limit = sum(float(np.median(d.prices)) for d in problem.decisions)
    best, tried = run("exhaustive", problem, 27)
    assert best.rank == min(found.rank for found in tried)
    assert 1 < len(tried) < 27
    for name in ("random", "evolution", "ddpg"):
        assert run(name, problem, 60)[0].rank == best.rank
    with pytest.raises(ValueError, match=f"{len(tried)} policies are within the budget"):
        run("exhaustive", problem, len(tried) - 1)
    with pytest.raises(ValueError, match="hopeless"):
        run("exhaustive", make_problem(small_network(), 0.6), 2)


def test_asking_for_given_widths_gives_them() -> None:
    problem = make_problem(small_network(), 0.6)
    env = envs.MixedPrecisionEnv(problem)
    random_policies = [found.policy for found in run("random", problem, 10)[1]]
    for policy in random_policies:
        env.reset()
        done, info = False, {}
        while not done:
            w, a = policy[env.next_layer()]
            _, _, done, _, info = env.step(env.action_for(w, a))
        assert info["policy"] == policy


@pytest.mark.parametrize("env", ["plan", "haq"])
@pytest.mark.parametrize("name", list(SOLVERS))
def test_where_nothing_is_left_to_decide_the_only_policy_is_found(name: str, env: str) -> None:
    tiny = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    inputs, labels = images(8), torch.zeros(8, dtype=torch.long)
    one_layer = haq.Problem(tiny, inputs, (inputs, labels), "edge", budget=1.0)
    for problem in (one_layer, only_eight_bits()):
        found, tried = run(name, problem, 5, env=env)
        assert found.policy == problem.uniform(8)
        assert [trial.policy for trial in tried] == [found.policy]


@functools.cache
def only_eight_bits() -> haq.Problem:
    inputs, labels = images(8), torch.zeros(8, dtype=torch.long)
    return haq.Problem(small_network(), inputs, (inputs, labels), "edge", budget=1.0, bits=(8, 8), pinned={})
