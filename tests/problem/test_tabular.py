"""A problem of which every policy is known is searched like any other, without a network; nothing else is taken for one."""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import envs
import haq
from haq.problem import table_file
from haq.problem.budget import OutOfReach
from haq.problem.table_file import TableError
from haq.problem.tabular import TabularProblem
from haq.solvers.base import Session
from haq.store import npz

Arrays = dict[str, NDArray[Any]]


def layer(name: str, channels: int) -> dict[str, Any]:
    call = {"input_size": [1, 1], "output_size": [1, 1]}
    pairs = {"kernel": [1, 1], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
    sizes = {"in_channels": channels, "out_channels": 8, "groups": 1}
    return {"name": name, "kind": "linear", **sizes, **pairs, "bias": True, "calls": [call], "macs": 8 * channels}


def made(
    decisions: tuple[tuple[int, ...], ...] = ((0,), (1, 3), (2,), (4,)),
    pairs: tuple[tuple[int, int], ...] = ((2, 2), (4, 4), (4, 8)),
    metric: str = "energy",
    limits: tuple[tuple[str, float], ...] = (("tight", 0.3), ("0.6", 0.6)),
) -> Arrays:
    """Make a table whose first and last decision are pinned, unless there is but one; values are a function of the bits."""
    random = np.random.default_rng(0)
    layers = sum(map(len, decisions))
    bits = np.arange(1, 9)
    cost = 1e-6 * (1 + random.random(layers))[:, None, None] * (bits[:, None] * bits + 8.0)
    of_decision = [np.array(pairs, np.int8) for _ in decisions]
    if len(decisions) > 1:
        of_decision[0] = of_decision[-1] = np.array([(8, 8)], np.int8)
    prices = [cost[list(g)].sum(0)[p[:, 0] - 1, p[:, 1] - 1] for g, p in zip(decisions, of_decision, strict=True)]
    noise = 2.0 ** -(2 * bits) * np.ones((len(decisions), 2, 1))
    total = functools.reduce(np.add.outer, prices).reshape(-1)
    low, high = total.min(), total.max()
    budgets = {key: float(low + share * (high - low)) for key, share in limits}
    known = total <= max(budgets.values()) * (1 + 1e-9)

    def harm(policy: Any) -> float:
        return sum(0.4 * 2.0**-w + 0.6 * 2.0**-a for w, a in policy) / len(policy)

    every = np.array([harm(policy) for policy in itertools.product(*[p.tolist() for p in of_decision])])
    accuracy = np.round(200 * (0.9 - every + 0.02 * random.random(len(every)))) / 200
    base = [(8, 8)] * len(decisions)
    if len(decisions) > 1:
        base[1:-1] = [(max(w for w, _ in pairs), max(a for _, a in pairs))] * (len(decisions) - 2)
    extra = [base]
    for number, options in enumerate(of_decision):
        for operand, width in itertools.product((0, 1), (2, 4)):
            if len(options) > 1:
                changed = [list(pair) for pair in base]
                changed[number][operand] = width
                extra.append(changed)  # type: ignore[arg-type]
    meta = {
        "name": "made",
        "metric": metric,
        "target": "somewhere",
        "bits": [2, 8],
        "float_accuracy": 0.9,
        "search_images": 200,
        "test_images": 100,
        "decisions": [list(group) for group in decisions],
        "limits": budgets,
        "layers": [layer(f"l{index}", 4 + index) for index in range(layers)],
    }
    return {
        "meta": np.array(json.dumps(meta)),
        "cost": cost,
        "noise": noise,
        "accuracy": np.where(known, accuracy, -1).astype(np.float32),
        "loss": (0.3 + every).astype(np.float32),
        "kl": every.astype(np.float32),
        "accuracy_test": np.where(known, accuracy - 0.01, -1).astype(np.float32),
        "loss_test": (0.35 + every).astype(np.float32),
        "extra_pairs": np.array(extra, np.int8),
        "extra": np.array([(0.9 - harm(policy), 0.3 + harm(policy), harm(policy)) for policy in extra]),
        **{f"pairs_{index}": p for index, p in enumerate(of_decision)},
        **{f"prices_{index}": p for index, p in enumerate(prices)},
    }


def changed(arrays: Arrays, **meta: Any) -> Arrays:
    """Change fields of a table's meta; None takes one away."""
    found = json.loads(str(arrays["meta"])) | meta
    return arrays | {"meta": np.array(json.dumps({key: value for key, value in found.items() if value is not None}))}


def without(key: str) -> Callable[[], Arrays]:
    return lambda: {name: array for name, array in made().items() if name != key}


def edited(key: str, change: Callable[[NDArray[Any]], None]) -> Callable[[], Arrays]:
    def edit() -> Arrays:
        arrays = made()
        change(arrays[key])
        return arrays

    return edit


def put(value: Any, *where: int) -> Callable[[NDArray[Any]], None]:
    def change(array: NDArray[Any]) -> None:
        array[where or (0,)] = value

    return change


def of_meta(**fields: Any) -> Callable[[], Arrays]:
    return lambda: changed(made(), **fields)


def swapped(**arrays: NDArray[Any]) -> Callable[[], Arrays]:
    return lambda: made() | arrays


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "made.npz"
    np.savez_compressed(path, **made())  # type: ignore[arg-type]
    return path


def tabular(path: str | Path, *args: Any, **options: Any) -> TabularProblem:
    problem = haq.Problem.tabular(path, *args, **options)
    assert isinstance(problem, TabularProblem)
    return problem


def test_what_the_file_says_is_what_a_policy_is_worth(table: Path) -> None:
    problem, arrays = tabular(table, budget="0.6"), made()
    assert isinstance(problem, haq.Problem)
    for option in np.flatnonzero(arrays["accuracy"] >= 0).tolist():
        one, two = divmod(option, 3)
        policy = problem.decide([(8, 8), problem.decisions[1].pairs[one], problem.decisions[2].pairs[two], (8, 8)])
        cost = sum(arrays[f"prices_{i}"][pick] for i, pick in enumerate((0, one, two, 0)))
        assert problem.policy_cost(policy) == pytest.approx(cost)
        # Counts of images, although the file has them in float32.
        found, tested = problem.evaluate(policy), problem.test(policy)
        assert found.accuracy * 200 == pytest.approx(round(200 * arrays["accuracy"][option]), abs=1e-9)
        assert found[1:4] == pytest.approx((arrays["loss"][option], 200, arrays["kl"][option]))
        assert tested[:3] == pytest.approx((arrays["accuracy_test"][option], arrays["loss_test"][option], 100))
    assert problem.quantization_error.shape == (4, 2, 10)
    assert problem.cost.shape == (5, 10, 10)
    assert problem.pinned == {"l0": (8, 8), "l4": (8, 8)}
    assert problem.float_accuracy == 0.9


@pytest.mark.parametrize("solver", ["random", "evolution", "greedy", "ilp", "exhaustive"])
def test_every_solver_searches_it(table: Path, solver: str) -> None:
    problem = tabular(table, "tight")
    result = haq.solve(problem, solver, evaluations=9 + 9)
    assert problem.holds(result.policy)
    assert problem.best_value - 0.03 <= result.trial.value <= problem.best_value
    assert "accuracy" in repr(result)
    assert "somewhere" in str(result.table())
    assert result.to_dict()["found"]["energy_j"] == pytest.approx(result.trial.cost)
    assert "made" in repr(problem) + problem._repr_html_()


@pytest.mark.parametrize("name", ["haq/MixedPrecision-v0", "haq/HAQ-v0"])
def test_both_environments_decide_it(table: Path, name: str) -> None:
    import gymnasium

    assert envs is not None
    problem = tabular(table)
    env = gymnasium.make(name, problem=problem)
    for seed in range(5):
        env.reset(seed=seed)
        env.action_space.seed(seed)
        over = False
        while not over:
            _, reward, over, _, info = env.step(env.action_space.sample())
        assert problem.holds(info["policy"])
        assert reward == pytest.approx(10 * (info["accuracy"] - problem.float_accuracy))


def test_what_was_found_is_drawn(table: Path) -> None:
    result = haq.solve(tabular(table), "random", evaluations=3)
    assert result.plot().axes
    assert "somewhere" in result._repr_html_()


def test_a_session_counts_and_keeps_the_best(table: Path) -> None:
    problem = tabular(table)
    session = Session(problem, 5)
    haq.solvers.base.solve("random", session, 3)
    assert session.used == min(5, int((problem.file.all_prices() <= problem.limit).sum()))
    assert session.best is not None
    assert session.best.value == max(trial.value for trial in session.trials if trial.feasible)


def test_budgets_are_keys_or_amounts(table: Path) -> None:
    limits = json.loads(str(made()["meta"]))["limits"]
    assert tabular(table).limit == tabular(table, "tight").limit == limits["tight"]
    for same in ("0.6", 0.6, "0.60", {"energy": "0.6"}, limits["0.6"], f"{1e6 * limits['0.6']:.15f}uJ"):
        assert tabular(table, same).limit == pytest.approx(limits["0.6"], rel=1e-12)
    problem = tabular(table, "tight")
    other = problem.on("somewhere", "0.6")
    assert (other.limit, problem.limit) == (limits["0.6"], limits["tight"])
    assert isinstance(other, TabularProblem)
    assert other.best_value >= problem.best_value
    assert other.evaluator is problem.evaluator
    limited = other.limited_to(limits["tight"])
    assert isinstance(limited, TabularProblem)
    assert limited.best_value == problem.best_value
    with pytest.raises(OutOfReach, match="can be from"):
        other.limited_to(limits["tight"] / 10)
    with pytest.raises(ValueError, match="has costs of somewhere, none of edge"):
        problem.on("edge", "0.6")


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        ("0.7", "out of reach: in the table 'made', energy can be from"),
        (1.0, "one of its limits 'tight', '0.6'"),
        ("1pJ", "has the limits 'tight', '0.6'; any other is an amount in J, mJ, uJ"),
        ("loose", "'loose' is not understood"),
        ("-1uJ", "not understood"),
        (math.nan, "not understood"),
        ([], "must be one of the table's limits"),
        (True, "must be one of the table's limits"),
        ({"latency": "0.6"}, "must be one of the table's limits"),
    ],
)
def test_other_budgets_are_refused(table: Path, budget: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tabular(table, budget)


def test_nothing_beyond_what_is_known_is_a_budget(table: Path) -> None:
    problem = tabular(table, "0.6")
    unknown = problem.file.all_prices()[problem.file.accuracy < 0].min()
    with pytest.raises(OutOfReach):
        tabular(table, float(unknown))
    assert tabular(table, float(unknown) * (1 - 1e-6)).best_value == problem.best_value


def test_other_goals_are_reached(table: Path) -> None:
    prices = tabular(table).file.all_prices()
    cheapest = tabular(table, max_drop=10.0)
    accuracy = cheapest.file.accuracy
    result = haq.solve(cheapest, "exhaustive", evaluations=9)
    assert result.trial.cost == pytest.approx(prices[accuracy >= 0.8 - 1e-9].min())
    result = haq.solve(tabular(table, at_least="80%"), "random", evaluations=9)
    assert result.trial.value >= 0.8
    traded = tabular(table, "tight", tradeoff="soft")
    worth = [traded.goal.worth(a, p, traded.tradeoff_target) for a, p in zip(accuracy, prices, strict=True) if a >= 0]
    result = haq.solve(traded, "exhaustive", evaluations=9)
    assert result.trial.worth == pytest.approx(max(worth))


def test_a_policy_that_is_not_known_is_named(table: Path) -> None:
    problem = tabular(table)
    beyond = problem.decide([(8, 8), (4, 8), (4, 8), (8, 8)])
    # The base of sensitivities is beyond every budget, and known all the same.
    assert problem.evaluate(beyond).loss == pytest.approx(made()["extra"][0, 1])
    assert not problem.holds(beyond)
    with pytest.raises(ValueError, match=r"doesn't know the policy l0 8/8, l1 4/8, l2 4/8, l3 4/8, l4 8/8"):
        problem.test(beyond)
    with pytest.raises(ValueError, match=r"l1 3/3.*none that can be chosen"):
        problem.evaluate(problem.decide([(8, 8), (3, 3), (4, 8), (8, 8)]))
    arrays = made()
    del problem.file.extra[(8, 8), (4, 8), (4, 8), (8, 8)]
    problem.evaluator.cache.clear()
    with pytest.raises(ValueError, match="beyond every budget, and was not evaluated"):
        problem.evaluate(beyond)
    assert arrays["accuracy"][-1] == -1
    with pytest.raises(ValueError, match="one pair of bits for the layers l1, l3 together"):
        problem.evaluate(problem.policy([8, 2, 2, 4, 8], [8, 2, 2, 4, 8]))


def test_what_needs_a_network_is_refused(table: Path, tmp_path: Path) -> None:
    problem = tabular(table)
    result = haq.solve(problem, "random", evaluations=3)
    for thing in (
        lambda: problem.network,
        lambda: result.quantized,
        lambda: result.save(tmp_path / "found"),
        lambda: haq.solve(problem, "ilp", evaluations=30, sensitivities="hessian"),
        lambda: haq.solve(problem, "ilp", evaluations=30, sensitivities="gradient"),
    ):
        with pytest.raises(ValueError, match="the table 'made' has no network"):
            thing()
    assert not (tmp_path / "found").exists()


def test_workers_change_nothing(table: Path) -> None:
    problem = tabular(table)
    again = pickle.loads(pickle.dumps(problem.evaluator))
    policy = haq.solve(problem, "random", evaluations=3).policy
    assert again.evaluate(policy) == problem.evaluate(policy)


@pytest.mark.parametrize(
    "arrays",
    [
        made(decisions=((0,), (1,), (2,))),
        made(decisions=((1, 0),), pairs=((2, 8), (4, 4), (8, 2), (8, 8))),
        made(metric="latency", limits=(("half of the way", 0.5),)),
        made(metric="storage", limits=(("1.0", 1.0),)),
        made(metric="bops"),
        changed(made(pairs=((1, 1), (3, 2), (4, 3))), bits=[1, 4]),
        changed(made(), bits="2:8", note="anything"),
        made() | {"cost": np.asfortranarray(made()["cost"]), "of_somebody": np.zeros(3)},
        made() | {"accuracy": made()["accuracy"].astype(np.float64).reshape(1, 3, 3, 1)},
        made() | {"meta": np.frombuffer(str(made()["meta"]).encode(), np.uint8)},
        made() | {"pairs_1": made()["pairs_1"].astype(np.int64), "extra_pairs": made()["extra_pairs"].astype(np.int64)},
        made() | {"extra_pairs": np.zeros((0, 4, 2), np.int8), "extra": np.zeros((0, 3))},
        # What a layer costs at other widths is nobody's business.
        edited("cost", put(0.0, 2, 0, 0))(),
        edited("cost", put(1e9, 2, 0, 0))(),
    ],
)
def test_other_tables_are_read(arrays: Arrays, tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", **arrays)  # type: ignore[arg-type]
    problem = tabular(tmp_path / "other.npz")
    for solver in ("evolution", "random"):
        result = haq.solve(problem, solver, evaluations=20)
        assert result.trial.value == pytest.approx(problem.best_value)
    assert problem.policy_cost(result.policy) == pytest.approx(
        problem.table.total(problem.metric, *problem.bit_arrays(result.policy))
    )


def test_a_table_is_written_as_it_was_read(table: Path, tmp_path: Path) -> None:
    first = table_file.read(table)
    first.write(tmp_path / "again.npz")
    second = table_file.read(tmp_path / "again.npz")
    for name, one in vars(first).items():
        two = getattr(second, name)
        if isinstance(one, np.ndarray):
            np.testing.assert_array_equal(one, two)
        elif name in ("pairs", "prices"):
            assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
        else:
            assert one == two


def test_ours_ship_with_the_package() -> None:
    assert {"deep", "digres", "low", "plain", "separable"} <= set(table_file.shipped())
    problem = tabular("digres", "0.15")
    assert problem.best_value == pytest.approx(0.88)
    assert problem.limit == pytest.approx(5.839514129710465e-06)
    assert sum(path.stat().st_size for path in table_file.FOLDER.iterdir()) < 6e6


@pytest.mark.parametrize(
    ("arrays", "key", "words"),
    [
        (without("meta"), "meta", "is missing"),
        (without("noise"), "noise", "is missing"),
        (without("kl"), "kl", "is missing"),
        (without("accuracy_test"), "accuracy_test", "is missing"),
        (without("extra"), "extra", "is missing"),
        (without("pairs_2"), "pairs_2", "every decision of `meta` must have both"),
        (without("prices_3"), "pairs_3", "`prices_3` is missing"),
        (swapped(pairs_4=np.ones((1, 2), np.int8)), "pairs_4", "of no decision; `meta` has 4"),
        (swapped(meta=np.array("{")), "meta", "is no JSON object"),
        (swapped(meta=np.array("[" * 100_000)), "meta", "is no JSON object"),
        (swapped(meta=np.array([1.0])), "meta", "is no JSON object"),
        (of_meta(limits=None), "meta", "lacks 'limits'"),
        (of_meta(metric="peak_memory"), "meta", "must be one of latency, energy"),
        (of_meta(metric="speed"), "meta", "'speed'; it must be one of latency, energy"),
        (of_meta(bits=[8, 2]), "meta", "the smallest and the largest width"),
        (of_meta(bits=[2, 3]), "pairs_1", "4/4, which is not within the bits 2:3 of `meta`"),
        (of_meta(float_accuracy=90.0), "meta", "float_accuracy 90.0; it must be a share"),
        (of_meta(float_accuracy=math.nan), "meta", "float_accuracy nan; it must be a share"),
        (of_meta(search_images=0), "meta", "search_images 0; it must be an integer from 1"),
        (of_meta(test_images=2.5), "meta", "test_images 2.5; it must be an integer"),
        (of_meta(decisions=[[0], [1, 3], [2], [3]]), "meta", "each of the 5 layers, numbered from 0, is once"),
        (of_meta(decisions=[[0], [1, 3], [2]]), "meta", "each of the 5 layers, numbered from 0, is once"),
        (of_meta(decisions=[0, 1]), "meta", "it must be a list of lists"),
        (of_meta(limits={}), "meta", "at least one budget"),
        (of_meta(limits={"a": "1 uJ"}), "meta", "positive numbers, in the metric's unit"),
        (of_meta(limits={"a": math.inf}), "meta", "positive numbers, in the metric's unit"),
        (of_meta(limits={"a": 1e-9}), "meta", "the limit 'a' of 0.001 uJ, which no policy meets; the cheapest takes"),
        (of_meta(limits={"a": 1.0}), "accuracy", r"is -1 for policy \d+, but `meta` has the limit 'a' of 1 J"),
        (of_meta(layers=[]), "meta", "a list of layers"),
        (of_meta(layers=[layer("a", 1)] * 5), "meta", "two layers called 'a'"),
        (of_meta(layers=[{"name": "a"}] * 5), "meta", "a layer 0 without 'kind'"),
        (of_meta(layers=[layer("a", -1)] * 5), "meta", "a layer 0 whose 'in_channels' is '-1'"),
        (of_meta(layers=[layer("a", 1) | {"calls": [{}]}] * 5), "meta", "'calls' are no list"),
        (swapped(cost=np.ones((4, 8, 8))), "cost", r"the shape \(4, 8, 8\); it must be \(5, 8, 8\)"),
        (swapped(cost=np.full((5, 8, 8), "a")), "cost", "it must be one of numbers"),
        (edited("cost", put(math.nan, 1, 2, 3)), "cost", r"is nan at \[1, 2, 3\]; it must be finite numbers from 0"),
        (edited("cost", put(-1.0, 1, 2, 3)), "cost", "must be finite numbers from 0"),
        (edited("cost", lambda array: array.__imul__(2)), "prices_0", "by `cost` its layers"),
        (swapped(noise=np.ones((4, 8, 2))), "noise", r"it must be \(4, 2, 8\)"),
        (edited("noise", put(math.inf, 0, 0, 0)), "noise", "finite numbers from 0"),
        (swapped(pairs_1=np.ones((3, 2))), "pairs_1", "must be integers"),
        (swapped(pairs_1=np.ones((3, 2), int)), "pairs_1", "a pair of bits twice"),
        (edited("pairs_1", put(9, 0, 0)), "pairs_1", "the width 9; widths must be from 1 to 8"),
        (edited("pairs_1", put(16, 0, 0)), "pairs_1", "16"),
        (swapped(prices_1=np.ones(2)), "prices_1", r"the shape \(2,\); it must be \(3,\)"),
        (edited("prices_1", put(math.nan, 1)), "prices_1", "is nan for the pair 4/4"),
        (swapped(accuracy=np.ones(8)), "accuracy", r"it must be \(9,\), a value per policy \(1 x 3 x 3 x 1 options\)"),
        (edited("accuracy", put(math.nan, 0)), "accuracy", "is nan for policy 0; it must be a share"),
        (edited("accuracy", put(88.0, 0)), "accuracy", "is 88 for policy 0; it must be a share"),
        (edited("accuracy", put(-1.0, 0)), "accuracy", "within which all must be known"),
        (edited("accuracy_test", put(-1.0, 0)), "accuracy_test", "must be known too"),
        (edited("loss", put(math.nan, 0)), "loss", "is NaN for policy 0"),
        (swapped(kl=np.ones(3)), "kl", r"it must be \(9,\)"),
        (swapped(extra_pairs=np.ones((3, 2, 2), int)), "extra_pairs", r"must be integers \(policies, 4, 2\)"),
        (swapped(extra=np.ones((2, 3))), "extra", "accuracy, loss and kl for each of extra_pairs"),
        (edited("extra", put(math.nan, 0, 0)), "extra", "has a NaN"),
    ],
)
def test_what_is_wrong_is_named(arrays: Callable[[], Arrays], key: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.npz"
    np.savez(path, **arrays())  # type: ignore[arg-type]
    with pytest.raises(TableError, match=words) as error:
        tabular(path)
    sentence = str(error.value)
    assert sentence.startswith(f"{path} can't be used: `{key}`")
    assert "\n" not in sentence


class Runs:
    """Would leave a file, if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_is_executed_or_unpacked_without_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hostile.npz"
    arrays = made() | {"meta": np.array([Runs(tmp_path / "ran")], object)}
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(TableError, match="it may hold code"):
        tabular(path)
    assert not (tmp_path / "ran").exists()
    for content in (b"", b"no zip", pickle.dumps(made())):
        path.write_bytes(content)
        with pytest.raises(TableError, match="is not the .npz file of an enumerated problem"):
            tabular(path)
    # A header that claims more numbers than there are.
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f8", "fortran_order": False, "shape": (10**12,)})
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("cost.npy", header.getvalue())
    with pytest.raises(TableError, match="isn't of the size"):
        tabular(path)
    monkeypatch.setattr(table_file, "MOST_UNPACKED", 10_000)
    np.savez_compressed(path, zeros=np.zeros(10_000))
    assert path.stat().st_size < 1000
    with pytest.raises(TableError, match=r"take 80.1 kB in memory, and 10 kB are allowed"):
        tabular(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere.npz: give the .npz file of an enumerated problem, or one of ours: "):
        tabular(tmp_path / "nowhere.npz")
    with pytest.raises(ValueError, match="compressed"):
        npz.read(path, {"zeros"}, 10_000)
