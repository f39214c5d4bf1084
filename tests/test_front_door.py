"""The main job in Python, as in a notebook: search a network of one's own, look at the result, tune it, save it, load it."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

import haq
import quantizers as Q
from haq.solvers import SOLVERS
from haq.store import history
from haq.store.records import PolicyRecord, ProblemRecord
from hw_models.registry import BUILT_IN
from tests.conftest import brightest, fitted_network, images, make_problem, small_network


def loader(count: int, seed: int) -> DataLoader[Any]:
    x = images(count, seed)
    return DataLoader(TensorDataset(x, brightest(x)), batch_size=50)


class Numbered(Dataset[Any]):
    """Single images with plain numbers as labels, as torchvision's data sets have them."""

    def __init__(self, count: int, seed: int) -> None:
        self.images = images(count, seed)
        self.labels = brightest(self.images).tolist()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], self.labels[index]


def test_the_main_job_in_ten_lines(tmp_path: Path) -> None:
    net, train, held_out = fitted_network(), loader(400, 1), loader(150, 2)

    problem = haq.Problem(net, calibrate=train, search=held_out, target="edge", budget=0.5, correction=None)
    result = haq.solve(problem, "greedy", evaluations=40, seed=0)
    table = result.table()
    figure = result.plot()
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    tuned = result.finetune(train, epochs=4)
    folder = result.save(tmp_path / "found")
    again = haq.load(folder, net)

    assert problem.within_budget(result.trial.cost)
    assert result.policy == result.trial.policy == Q.get_policy(again)
    x = images(20, 3)
    with torch.no_grad():
        assert torch.equal(again(x), tuned(x))
        assert not torch.equal(again(x), problem.quantized(result.policy)(x))
    assert result.quantized is tuned is result.finetuned
    assert result.kept == "fine-tuned"
    assert result.evaluate(tuned).accuracy >= result.trial.accuracy - 0.02
    for name in problem.workload.names:
        assert name in repr(table)
        assert f"<td>{name}</td>" in table._repr_html_()
    assert len(figure.axes) == 2


def test_what_is_saved_is_what_was_found(tmp_path: Path) -> None:
    problem = make_problem(small_network())
    result = haq.solve(problem, "random", evaluations=7, seed=3)
    folder = result.save(tmp_path / "a" / "b")
    names = {path.name for path in folder.iterdir()}
    assert names == {"policy.json", "history.csv", "problem.json", "solution.json", "quantized.safetensors", "policy.png"}
    assert Q.BitPolicy(PolicyRecord.read(folder / "policy.json").widths()) == result.policy
    rows = history.read(folder / "history.csv", len(problem.workload))
    assert [(row.accuracy, row.cost, row.within_budget) for row in rows] == [
        (trial.accuracy, trial.cost, trial.feasible) for trial in result.history
    ]
    assert ProblemRecord.read(folder / "problem.json").limit == problem.limit
    content = result.to_dict()
    assert content["found"]["accuracy"] == result.trial.accuracy
    assert content["budget"]["holds"]
    with torch.no_grad():
        x = images(20, 3)
        assert torch.equal(haq.load(folder / "quantized.safetensors", problem.network)(x), result.quantized(x))
    with pytest.raises(ValueError, match=r"b is in use and is not overwritten: name another folder"):
        result.save(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no quantized network: neither quantized.safetensors nor"):
        haq.load(tmp_path / "empty")


def test_the_same_seed_gives_the_same_result_with_or_without_workers() -> None:
    alone, again = (haq.solve(make_problem(small_network()), "evolution", evaluations=24, seed=5) for _ in range(2))
    helped = haq.solve(make_problem(small_network()), "evolution", evaluations=24, seed=5, workers=1)
    other = haq.solve(make_problem(small_network()), "evolution", evaluations=24, seed=6)
    assert alone.trials == again.trials == helped.trials
    assert other.trials != alone.trials
    assert len(alone.trials) == 24


def test_every_trial_is_told_and_kept() -> None:
    told: list[haq.Trial] = []
    result = haq.solve(make_problem(small_network()), "random", evaluations=6, on_trial=told.append)
    assert told == result.trials == result.history
    assert result.best == min((trial for trial in told if trial.feasible and trial.whole), key=lambda trial: trial.rank)
    assert result.trial in told
    assert all(trial.accuracy == trial.evaluation.accuracy and trial.loss == trial.evaluation.loss for trial in told)
    with pytest.raises(AttributeError):
        told[0].cost = 0.0  # type: ignore[misc]


def test_sensitivities_of_one_result_are_taken_by_another() -> None:
    problem = make_problem(small_network())
    first = haq.solve(problem, "greedy", evaluations=60)
    second = haq.solve(problem, "greedy", evaluations=1, sensitivities=first.sensitivities)
    assert second.policy == first.policy
    assert len(second.trials) == 1
    by_hessian = haq.solve(problem, "ilp", evaluations=1, sensitivities="hessian")
    assert by_hessian.sensitivities is not None
    assert by_hessian.sensitivities.kind == "hessian"


def test_trials_become_a_table_of_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    result = haq.solve(make_problem(small_network()), "random", evaluations=4)
    monkeypatch.setitem(sys.modules, "pandas", None)  # as if it weren't installed
    with pytest.raises(ImportError, match="to_pandas needs pandas: pip install pandas"):
        result.history.to_pandas()

    class Pandas:
        DataFrame = dict

    monkeypatch.setitem(sys.modules, "pandas", Pandas)
    table = result.history.to_pandas()
    assert table["accuracy"] == [trial.accuracy for trial in result.trials]
    assert table["policy"][0] == result.trials[0].policy


def test_one_line_says_what_it_is() -> None:
    problem = make_problem(small_network())
    result = haq.solve(problem, "random", evaluations=5)
    session = haq.Session(problem, 5)
    for thing in (problem, result, session, result.trials, result.trial, problem.objective):
        assert "\n" not in repr(thing)
        assert len(repr(thing)) < 200
    assert re.fullmatch(
        r"Problem\(5 layers on edge, latency within \S+ us \(0.6 of uniform 8 bits\), bits 2:8, scheme linear, "
        r"objective accuracy, float 100.00 %\)",
        repr(problem),
    )
    assert re.fullmatch(r"Result\(random: accuracy \S+ % at \S+ us \(0\.\d+ of .*\), 5 evaluations; float .*\)", repr(result))
    assert repr(session) == "Session(0 of 5 evaluations used, nothing within the budget yet)"
    for shown in (problem, result, result.trials, result.table()):
        page = shown._repr_html_()
        assert page.startswith("<table>")
        assert page.count("<table>") == page.count("</table>")


def test_progress_is_shown_to_people_only(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    haq.solve(make_problem(small_network()), "random", evaluations=3)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    haq.solve(make_problem(small_network()), "random", evaluations=3)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "random" in shown.err
    assert "3/3" in shown.err


def test_progress_is_shown_in_a_notebook(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    pages: list[str] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            assert raw
            pages.append(data["text/html"])

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        assert raw
        assert display_id
        pages.append(data["text/html"])
        return Handle()

    ipython = types.ModuleType("IPython.display")
    ipython.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", ipython)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    haq.solve(make_problem(small_network()), "random", evaluations=3)
    assert all(page.startswith("<pre>") for page in pages)
    assert "3/3" in pages[-1]
    assert "random" in pages[-1]
    assert "3/3" not in pages[0]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "search",
    [
        Numbered(60, 2),
        DataLoader(Numbered(60, 2), batch_size=7),
        [(images(60, 2), brightest(images(60, 2)))],
        [list(pair) for pair in zip(images(60, 2).split(25), brightest(images(60, 2)).split(25), strict=True)],
    ],
    ids=["dataset", "loader", "batches", "lists"],
)
def test_data_are_taken_as_they_are(search: Any) -> None:
    x = images(60, 2)
    network = small_network()
    wanted = haq.Problem(network, images(32, 1), (x, brightest(x)), "edge", budget=0.9)
    for calibrate in (DataLoader(Numbered(32, 1), batch_size=32), TensorDataset(images(32, 1))):
        problem = haq.Problem(network, calibrate, search, "edge", budget=0.9)
        assert problem.evaluate(problem.uniform(4)) == wanted.evaluate(wanted.uniform(4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"search": ["pictures"]}, "`search` gave a str; it must give tensors of inputs, or pairs"),
        ({"calibrate": [{"image": 1}]}, "`calibrate` gave a dict; it must give tensors"),
        ({"calibrate": []}, "`calibrate` gave no images"),
        ({"search": DataLoader(TensorDataset(images(8)))}, "`search` has no labels to tell the accuracy by"),
    ],
)
def test_what_is_no_data_is_named(given: dict[str, Any], message: str) -> None:
    x = images(8)
    with pytest.raises(ValueError, match=message):
        haq.Problem(**{"network": small_network(), "calibrate": x, "search": (x, brightest(x)), "target": "edge"} | given)


def test_what_solve_refuses() -> None:
    problem = make_problem(small_network())
    with pytest.raises(ValueError, match="unknown solver 'radnom'; did you mean random"):
        haq.solve(problem, "radnom")
    with pytest.raises(ValueError, match="evaluations is 0; it must be an integer of at least 1"):
        haq.solve(problem, "random", evaluations=0)
    with pytest.raises(ValueError, match="unknown environment 'maze'; known: plan, haq"):
        haq.solve(problem, "ddpg", env="maze")
    with pytest.raises(ValueError, match="unknown kind of sensitivities 'guess'"):
        haq.solve(problem, "ilp", sensitivities="guess")
    result = haq.solve(problem, "random", evaluations=2)
    with pytest.raises(ValueError, match=r"takes images \(N, C, H, W\), the loader gives inputs of shape \(3, 64\)"):
        result.finetune(torch.zeros(3, 64))


class Halves(haq.Solver):
    """A solver of one's own: uniform policies, from the widest to the narrowest."""

    summary = "uniform policies, from the widest to the narrowest"
    draws = False

    def solve(self, problem: haq.Problem, session: haq.Session, seed: int) -> None:
        for bits in (8, 7, 6, 5, 4, 3, 2):
            if session.left:
                session.evaluate(problem.uniform(bits, keep_pinned=True))


class Unfinished(haq.Solver):
    """It forgot what it is for."""


class Picky(Halves):
    """It can't be made without being told how."""

    def __init__(self, taste: str) -> None:
        self.taste = taste


class Resembling:
    """It has a method of that name only."""

    def solve(self, problem: haq.Problem, session: haq.Session, seed: int) -> None: ...


def test_a_solver_of_ones_own() -> None:
    problem = make_problem(small_network())
    results = [haq.solve(problem, solver, evaluations=9) for solver in (Halves, Halves(), f"{__name__}:Halves")]
    assert results[0].trials == results[1].trials == results[2].trials
    assert [trial.policy["hidden"][0] for trial in results[0].trials] == [8, 7, 6, 5, 4, 3, 2]
    assert not results[0].trials[0].feasible
    assert repr(results[0]).startswith("Result(Halves: accuracy")
    assert haq.solve(problem, Picky("sour"), evaluations=9).trials == results[0].trials


def test_what_is_no_solver_is_named_with_what_is_missing() -> None:
    problem = make_problem(small_network())
    with pytest.raises(ValueError, match=r"Unfinished.* can't be made \(.*abstract.*solve.*\): give an instance"):
        haq.solve(problem, Unfinished)
    with pytest.raises(ValueError, match=r"Picky'.* can't be made \(.*taste.*\)"):
        haq.solve(problem, Picky)
    with pytest.raises(ValueError, match="it lacks uses_sensitivities, draws and chooses_ahead"):
        haq.solve(problem, f"{__name__}:Resembling")
    with pytest.raises(ValueError, match="it lacks uses_sensitivities, draws and chooses_ahead"):
        haq.solve(problem, Resembling())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="solver 'Nothing' evaluated no policy within the budget, 0 in all"):
        haq.solve(problem, type("Nothing", (Halves,), {"solve": lambda self, problem, session, seed: None}))


def test_solvers_say_of_themselves_what_lists_say_of_them() -> None:
    for row in SOLVERS.rows():
        solver = SOLVERS.get(row.name)
        assert issubclass(solver, haq.Solver)
        assert (row.origin, solver.name, solver.summary) == (BUILT_IN, row.name, row.line)
    having = {what: {n for n in SOLVERS if getattr(SOLVERS.get(n), what)} for what in ("uses_sensitivities", "chooses_ahead")}
    assert having == {
        "uses_sensitivities": {"ilp", "greedy"},
        "chooses_ahead": {"ddpg", "td3", "sac", "evolution", "surrogate"},
    }
    assert {name for name in SOLVERS if not SOLVERS.get(name).draws} == {"ilp", "greedy", "exhaustive"}


class TopTwo(haq.Objective):
    """An objective of one's own: the label is among the two best answers."""

    name = "top-2"
    words = "the share of images whose label is among the two best answers"

    def correct(self, outputs: Any, labels: torch.Tensor) -> torch.Tensor:
        return (outputs[0].topk(2).indices == labels[:, None]).any(1)


class Margins(haq.Objective):
    """Another one, with a loss of its own."""

    def loss(self, outputs: Any, labels: torch.Tensor, divergence: float | None) -> float:
        return float(torch.nn.functional.multi_margin_loss(outputs[0].double(), labels))


def test_an_objective_of_ones_own(tmp_path: Path) -> None:
    x = images(200, 4)
    given = fitted_network(), images(32, 1), (x, brightest(x)), "edge"
    plain = haq.Problem(*given)
    policy = plain.uniform(3)
    for objective in (TopTwo(), TopTwo, f"{__name__}:TopTwo"):
        problem = haq.Problem(*given, objective=objective)
        with torch.no_grad():
            best = problem.quantized(policy)(x).topk(2).indices
        wanted = (best == brightest(x)[:, None]).any(1).float().mean().item()
        assert problem.evaluate(policy).accuracy == pytest.approx(wanted)
        assert wanted > plain.evaluate(policy).accuracy
        assert problem.evaluate(policy).loss == plain.evaluate(policy).loss
    result = haq.solve(problem, "ilp", evaluations=20)
    assert "top-2" in repr(result)
    assert ProblemRecord.read(result.save(tmp_path / "found") / "problem.json").objective == "top-2"
    problem = haq.Problem(*given, objective=Margins())
    assert problem.objective.name == problem.objective.words == "Margins"
    assert problem.evaluate(policy).accuracy == plain.evaluate(policy).accuracy
    assert problem.evaluate(policy).loss != plain.evaluate(policy).loss


def test_what_is_no_objective_is_named_with_what_is_missing() -> None:
    problem = make_problem(small_network())
    with pytest.raises(ValueError, match="can't be used: it lacks words, needs_labels, correct, loss and build"):
        haq.Problem(problem.network, images(8), images(8), "edge", objective=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown objective 'agreemnt'; did you mean agreement"):
        haq.Problem(problem.network, images(8), images(8), "edge", objective="agreemnt")


def test_importing_haq_imports_no_torch() -> None:
    code = (
        "import haq, sys, haq.solvers, haq.problem;"
        "print(*dir(haq)); print(haq.solvers.SOLVERS.rows(), haq.problem.OBJECTIVES.rows());"
        "assert not {'torch', 'numpy'} & set(sys.modules), 'heavy'"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    named = set(done.stdout.splitlines()[0].split())
    assert {"Problem", "solve", "load", "Result", "Trial", "Solver", "Session", "Objective", "solvers", "networks"} <= named


def test_the_names_that_others_rely_on() -> None:
    assert haq.solvers.ilp.allocate([[0.0, 1.0]], [[2.0, 1.0]], 1.0).tolist() == [1]
    assert callable(haq.deploy.load)
    assert {"SOLVERS", "Solver", "ilp"} <= set(dir(haq.solvers))
    assert {"OBJECTIVES", "Objective", "Problem"} <= set(dir(haq.problem))
    problem = make_problem(small_network())
    assert isinstance(problem.evaluate(problem.uniform(8)).accuracy, float)
    assert np.isfinite(problem.quantization_error).all()


def test_fine_tuning_that_makes_it_worse_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    problem = make_problem(fitted_network())
    result = haq.solve(problem, "random", evaluations=4)
    before = result.evaluate(result.quantized)
    noise = torch.randn(64, *images(1).shape[1:], generator=torch.Generator().manual_seed(0))
    with caplog.at_level(logging.WARNING, "haq"):
        tuned = result.finetune(noise * 100, epochs=1, learning_rate=9.0)
    assert "fine-tuning did not help: on 16 images that were held out" in caplog.text
    after = result.evaluate(tuned)
    assert after == before
    assert tuned is result.finetuned is not result.quantized
    assert result.evaluate(result.quantized) == before
    assert "kept: calibrated only" in repr(result)
    assert result.kept == result.to_dict()["quantized_is"] == "calibrated only"
    assert result.to_dict()["finetuned"] == after._asdict()
    again = haq.load(result.save(tmp_path / "found"), problem.network)
    x = images(20, 3)
    with torch.no_grad():
        assert torch.equal(again(x), result.quantized(x))


def test_fine_tuning_again_never_makes_it_worse() -> None:
    # Two bits cost so much that fine-tuning wins something back.
    x = images(96)
    search = (x, brightest(x))
    given = {"target": "edge", "budget": 1.0, "bits": (2, 2), "correction": None}
    problem = haq.Problem(fitted_network(), images(32, 1), search, **given)
    result = haq.solve(problem, "random", evaluations=1)
    first = result.finetune(loader(400, 1), epochs=4)
    assert result.quantized is first
    last = result.finetune(images(64) * 100, epochs=1, learning_rate=9.0)
    assert result.quantized is first
    assert result.finetuned is last
    assert result.kept == "fine-tuned earlier"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"epochs": epochs}, f"epochs is {epochs!r}; it must be an integer of at least 1") for epochs in (0, -1, 1.5, True, "3")]
    + [
        (
            {"learning_rate": rate},
            rf"learning_rate is {rate!r}".replace("+", r"\+") + "; it must be a number above 0 and below 10",
        )
        for rate in (1e9, float("nan"), 0, -1, True, "fast")
    ]
    + [({"seed": seed}, f"seed is {seed}; it must be an integer from 0 to 4294967295") for seed in (-1, 1.5, 2**32)],
)
def test_numbers_that_fine_tuning_cannot_use_are_named(options: dict[str, Any], message: str) -> None:
    result = haq.solve(make_problem(small_network()), "random", evaluations=2)
    with pytest.raises(ValueError, match=message):
        result.finetune(images(8), **options)


X8 = images(8)
Y8 = brightest(X8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"network": "net"}, "network is 'net'; it must be a torch.nn.Module"),
        ({"network": None}, "network is None; it must be a torch.nn.Module"),
        ({"target": None}, "target is None; it must be a name, such as 'edge', or a hardware target"),
        ({"target": 5}, "target is 5; it must be a name"),
        ({"calibrate": None}, "`calibrate` is None; it must be a tensor, a pair"),
        ({"search": None}, "`search` is None; it must be a tensor, a pair"),
        ({"search": 7}, "`search` is 7; it must be a tensor, a pair"),
        ({"bits": (2.5, 8)}, r"bits is \(2.5, 8\); it must be a pair of integers"),
        ({"bits": 8}, "bits is 8; it must be a pair of integers"),
        ({"bits": (2, None)}, r"bits is \(2, None\); it must be a pair of integers"),
        ({"bits": (True, 8)}, r"bits is \(True, 8\); it must be a pair of integers"),
        ({"pinned": {"0": 8}}, "pinned layer '0' has 8; it must be a pair of integers"),
        ({"pinned": ["stem"]}, r"pinned is \['stem'\]; it must map names of layers"),
    ],
)
def test_arguments_of_a_wrong_type_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        haq.Problem(**{"network": small_network(), "calibrate": X8, "search": (X8, Y8), "target": "edge"} | given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"search": (X8, Y8.float())}, "`search` has labels of type torch.float32 and shape .*; they must be class numbers"),
        ({"search": (X8, Y8 > 1)}, "`search` has labels of type torch.bool"),
        ({"search": (X8, Y8[:, None])}, r"`search` has labels of type torch.int64 and shape \(8, 1\)"),
        ({"search": (X8, torch.eye(8).long())}, r"`search` has labels of type torch.int64 and shape \(8, 8\)"),
        ({"search": [(X8, ["cat"] * 8)]}, "`search` gave a list as labels; they must be a tensor of class numbers"),
        ({"search": (X8.byte(), Y8)}, "`search` gave inputs of type torch.uint8 .*; they must be torch.float32"),
        ({"calibrate": X8.byte()}, "`calibrate` gave inputs of type torch.uint8"),
        (
            {"search": [(X8, Y8), (X8[..., 1:], Y8)]},
            "`search` gave inputs of shape .* first, and in batch 2 of .*; all must be alike",
        ),
        (
            {"search": [(X8, Y8), (X8[:5], Y8[:3]), (X8[:3], Y8[:5])]},
            "`search` needs as many images as labels, at least one; got 5 and 3 in batch 2 of 3",
        ),
        ({"search": (X8[:0], Y8[:0])}, "`search` gave no images"),
    ],
)
def test_data_that_are_not_inputs_and_class_numbers_are_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        haq.Problem(**{"network": small_network(), "calibrate": X8, "search": (X8, Y8), "target": "edge"} | given)


def test_class_numbers_may_be_of_any_whole_type() -> None:
    found = {
        haq.Problem(small_network(), X8, (X8, Y8.to(kind)), "edge", budget=0.9).float_result
        for kind in (torch.int64, torch.int32, torch.uint8)
    }
    assert len(found) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": 1.5}, "seed is 1.5; it must be an integer from 0 to 4294967295"),
        ({"seed": -1}, "seed is -1; it must be an integer"),
        ({"seed": 2**32}, "seed is 4294967296; it must be an integer"),
        ({"workers": 1.5}, "workers is 1.5; it must be an integer of at least 1"),
        ({"workers": 0}, "workers is 0; it must be an integer of at least 1"),
        ({"evaluations": 1.5}, "evaluations is 1.5; it must be an integer of at least 1"),
        ({"on_trial": 5}, "on_trial is 5; it must be a function that takes a trial"),
    ],
)
def test_what_solve_cannot_use_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        haq.solve(make_problem(small_network()), "random", **{"evaluations": 2} | given)


def test_what_is_no_problem_and_no_file_is_named() -> None:
    with pytest.raises(TypeError, match="problem is a NoneType; it must be a haq.Problem"):
        haq.solve(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="problem is a .*; it must be a haq.Problem"):
        haq.solve(small_network())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="path is None; it must be the path of a file or a folder"):
        haq.load(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="network is 'name'; it must be the float network"):
        haq.load("file", network="name")  # type: ignore[arg-type]
