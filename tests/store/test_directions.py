"""Whether a higher or a lower value is better is asked of the objective wherever values are ordered, and is in every file."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.nn import functional as F

import haq
from haq import evaluate, runs, search
from haq.problem.chance import doubts
from haq.problem.objective import ValueObjective
from haq.reporting import reading
from haq.reporting.drawing import front
from haq.store import history
from haq.store.history import HistoryRow, Limits
from haq.store.inventory import summarize
from haq.store.records import (
    FinishedSweepRecord,
    ObjectiveRecord,
    ProblemRecord,
    ReconstructionRecord,
    ResultRecord,
    SweepRecord,
    TuningRecord,
)
from haq.study import tables
from hw_models import trust
from tests.commands.test_robustness_command import MODULE
from tests.conftest import brightest, enter, fitted_network, images
from tests.reporting.judged_runs import ALL, DICE, ERROR, LOSS, PSNR, Judged, write_judged, write_sweep
from tests.reporting.written_runs import change

ROW = HistoryRow("ddpg", 1, (8, 4), (8, 3), 0.9, 0.3, 1.5e-5, True, None)
JOB = ["--network", "small_job:network", "--data", "small_job:splits", "--objective", "small_job:Nll"]
OBJECTIVE = """
from haq.problem.objective import ValueObjective
from torch.nn import functional as F

class Nll(ValueObjective):
    name = "nll"
    title = "log-likelihood loss"
    words = "mean negative log-likelihood"
    short = "loss"
    unit = "nats"
    higher_is_better = False

    def values(self, outputs, targets):
        return F.cross_entropy(outputs, targets, reduction="none")
"""


class Squared(ValueObjective):
    """The squared distance from the float network's scores."""

    name = "mse"
    title = "squared error"
    higher_is_better = False
    needs_labels = False
    compares_with_float = True

    def values(self, outputs: Any, targets: Any) -> Tensor:
        """Tell every sample's."""
        return F.mse_loss(outputs, targets, reduction="none").mean(1)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter(tmp_path, monkeypatch, MODULE + OBJECTIVE)
    monkeypatch.setattr(trust, "_named", set())


def test_rows_are_ranked_by_the_direction() -> None:
    lower, loss, cheaper = ROW._replace(accuracy=0.1), ROW._replace(loss=0.2), ROW._replace(cost=1e-6)
    assert sorted([lower, ROW, loss, cheaper], key=lambda row: row.rank_by(False)) == [lower, loss, cheaper, ROW]
    assert sorted([lower, ROW, loss, cheaper], key=lambda row: row.rank_by(True)) == [loss, cheaper, ROW, lower]


@pytest.mark.parametrize(
    ("limits", "accuracy", "loss"),
    [
        (Limits("dB", True, False), -31.5, -28.4),
        (Limits("dB", True, False), -math.inf, math.inf),
        (Limits("nats", False, False), math.inf, math.inf),
        (Limits("", False, False), 1e12, -1e12),
        (Limits("%", False, False), math.inf, math.inf),
        (Limits("%", True, False), 0.5, -0.2),
    ],
)
def test_a_history_is_read_as_it_was_written(limits: Limits, accuracy: float, loss: float, tmp_path: Path) -> None:
    row = ROW._replace(accuracy=accuracy, loss=loss)
    history.write(tmp_path / "history.csv", [row])
    assert history.read(tmp_path / "history.csv", 2, limits) == [row]


@pytest.mark.parametrize(
    ("limits", "cells", "sentence"),
    [
        (Limits("dB", True, False), {"accuracy": math.inf}, "the accuracy is 'inf', not a number"),
        (Limits("nats", False, False), {"accuracy": -math.inf}, "the accuracy is '-inf', not a number"),
        (Limits("nats", False, False), {"accuracy": math.nan}, "the accuracy is 'nan', not a number"),
        (Limits("%", True, False), {"accuracy": 1.5}, "the accuracy is '1.5', not a number from 0 to 1"),
        (Limits("%", True, False), {"accuracy": -math.inf}, "the accuracy is '-inf', not a number from 0 to 1"),
        (Limits("dB", True, False), {"loss": -math.inf}, "the loss is '-inf', not a number"),
        (Limits(), {"loss": -0.5}, "the loss is '-0.5', not a number from 0"),
    ],
)
def test_what_nothing_can_be_worth_is_refused(limits: Limits, cells: dict[str, float], sentence: str, tmp_path: Path) -> None:
    history.write(tmp_path / "history.csv", [ROW._replace(**cells)])
    with pytest.raises(ValueError, match="history.csv, line 2: ") as error:
        history.read(tmp_path / "history.csv", 2, limits)
    assert sentence in str(error.value)


@pytest.mark.parametrize("judged", ALL, ids=[judged.name for judged in ALL])
def test_the_best_so_far_is_that_of_the_direction(judged: Judged) -> None:
    write_judged(Path("cut"), judged, finished=False)
    best = max if judged.higher_is_better else min
    rows = history.read(Path("cut/history.csv"), limits=Limits(judged.unit, judged.higher_is_better, False))
    wanted = best(row.accuracy for row in rows if row.within_budget and row.solver == "ddpg")
    summary = summarize(Path("cut"))
    assert summary.search == wanted
    told = summary.to_dict()
    assert (told["objective_unit"], told["higher_is_better"]) == (judged.unit, judged.higher_is_better)
    folder = reading.read_folder(Path("cut"))
    assert isinstance(folder, reading.RunFolder)
    Path("cut/policy.json").unlink()
    anew = reading.read_folder(Path("cut"))
    assert isinstance(anew, reading.RunFolder)
    assert anew.best is not None
    assert anew.best.accuracy == wanted


def test_fronts_are_of_the_direction() -> None:
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.7), (2.0, 0.4), (4.0, 0.1), (5.0, 0.2)]
    assert front(points, False) == [(1.0, 0.5), (2.0, 0.4), (4.0, 0.1)]
    assert front(points) == [(1.0, 0.5), (2.0, 0.7), (3.0, 0.9)]
    assert front([(1.0, math.inf), (2.0, 0.5)], False) == [(1.0, math.inf), (2.0, 0.5)]


@pytest.mark.parametrize("judged", [PSNR, ERROR], ids=["higher", "lower"])
def test_compare_orders_runs_by_the_direction(judged: Judged, capsys: pytest.CaptureFixture[str]) -> None:
    for name, accuracy in (("middle", 0.8), ("best", 0.9), ("worst", 0.7)):
        write_judged(Path(name), judged)
        result = json.loads(Path(name, "result.json").read_text())
        found = {**result["finetuned"], f"test_{judged.name}": judged.of(accuracy)}
        change(Path(name, "result.json"), finetuned=found)
    assert runs.main(["compare", "middle", "best", "worst"]) == 0
    assert f"By test {judged.title}, the best one first: best, middle, worst" in capsys.readouterr().out
    assert runs.main(["compare", "middle", "best", "worst", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["order"] == ["best", "middle", "worst"]


def test_runs_of_other_directions_are_not_held_against_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    write_judged(Path("a"), LOSS)
    write_judged(Path("b"), LOSS._replace(higher_is_better=True))
    assert runs.main(["compare", "a", "b"]) == 0
    out = capsys.readouterr().out
    assert "Their values can't be compared: they are of another direction." in out
    assert "test negative" not in out
    assert "best one first" not in out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"objective_unit": "%"}, "'search_psnr' is 29.689; it must be a share from 0 to 1"),
        ({"float": {"search_psnr": "much", "test_psnr": 1}}, "'float.search_psnr' is 'much'; it must be a number"),
        ({"float": {"search_psnr": 20.0}}, "'test_psnr' is missing"),
        ({"higher_is_better": "yes"}, "'higher_is_better' is 'yes'; it must be true or false"),
    ],
)
def test_values_that_can_not_be_are_refused(changes: dict[str, Any], sentence: str) -> None:
    path = write_judged(Path("run"), PSNR, worthless=False) / "result.json"
    change(path, **changes)
    with pytest.raises(ValueError, match="result.json is not the result of a run: ") as error:
        ResultRecord.read(path)
    assert sentence in str(error.value)


def test_what_is_worth_nothing_is_null_in_a_file() -> None:
    for judged, worst in ((PSNR, -math.inf), (ERROR, math.inf)):
        path = write_judged(Path(judged.name), judged) / "result.json"
        result = ResultRecord.read(path)
        assert result.value(result.uniform[0], "search") == worst
        assert result.show(worst) == f"{worst} {judged.unit}".replace("inf", "∞").strip()
        result.write(path)
        assert ResultRecord.read(path) == result
    path = write_judged(Path("shares"), DICE) / "result.json"
    change(path, uniform=[{"bits": 2, "cost": 1.0, "search_miou": None}])
    with pytest.raises(ValueError, match="'search_miou' is nothing; it must be a share from 0 to 1"):
        ResultRecord.read(path)


def test_a_sweep_whose_seed_is_worth_nothing() -> None:
    path = write_sweep(Path("swept"), LOSS) / "sweep.json"
    content = json.loads(path.read_text())
    found = content["targets"]["edge"]["found"][0]
    found["runs"][1]["test_nll"] = found["test_nll"] = None
    change(path, **content)
    sweep = SweepRecord.read(path)
    assert isinstance(sweep, FinishedSweepRecord)
    first = sweep.targets["edge"].found[0]
    assert sweep.value(first, "test") == math.inf
    low, high = sweep.spread(first, "test")
    assert low < high == math.inf


def test_files_of_earlier_versions_are_of_accuracy() -> None:
    assert ObjectiveRecord(objective="accuracy+robust").objective_title == "worst-case accuracy"
    tuning = {"images": 50, "epochs": 3, "kept": 2, "before": 0.8, "best": 0.9}
    assert "80.00 % ± 5.66 before, 90.00 % ± 4.24 after epoch 2 of 3" in tables.tuning_sentence(tuning)
    with pytest.raises(ValueError, match="'best' is 9.0; it must be a share from 0 to 1"):
        TuningRecord.from_dict({**tuning, "best": 9.0})


def test_how_a_training_was_judged_is_told_in_its_unit() -> None:
    judged = {"objective": "nll", "objective_unit": "nats", "higher_is_better": False, "counts_samples": False}
    judged |= {"samples_are": "samples", "images": 50}
    tuning = {**judged, "epochs": 3, "kept": 2, "before": 0.8, "before_error": 0.0312, "best": 0.5}
    sentence = tables.tuning_sentence(tuning)
    assert "on 50 train samples that were held out: 0.8 nats ± 0.031 before, 0.5 nats after epoch 2 of 3" in sentence
    entry = {**judged, "calibration_images": 32, "seed": 0, "seconds": 1.0, "kept": True, "before": 0.8, "after": 0.7}
    entry |= {"divergence_before": 0.02, "divergence_after": 0.01, "divergence_unit": ""}
    sentence = tables.reconstruction_sentence(entry)
    assert "32 calibration samples" in sentence
    assert sentence.endswith("0.8 nats before, 0.7 nats after, divergence from the float network 0.0200 and 0.0100.")
    assert ReconstructionRecord.from_dict(entry).samples_are == "samples"


def test_a_search_in_python_for_the_lowest_error(caplog: pytest.LogCaptureFixture) -> None:
    problem = haq.Problem(fitted_network(), images(32, 1), images(40, 3), "edge", budget=0.7, objective=Squared())
    result = haq.solve(problem, "random", evaluations=8)
    within = [trial for trial in result.trials if trial.feasible]
    assert result.trial.value == min(trial.value for trial in within) > 0
    assert repr(result).startswith("Result(random: squared error 0.")
    for text in (repr(problem), repr(result), repr(result.trial), repr(result.session), result.trials._repr_html_()):
        assert "accuracy" not in text
        assert "%" not in text
    assert "squared error" in result.trials._repr_html_()
    folder = result.save("found")
    written = json.loads((folder / "solution.json").read_text())
    assert (written["objective_unit"], written["higher_is_better"]) == ("", False)
    assert written["found"]["error"] > 0
    problem_record = ProblemRecord.read(folder / "problem.json")
    assert problem_record.float_value == 0.0
    assert problem_record.samples_words == "40 images"
    rows = history.read(folder / "history.csv", limits=Limits.of(problem_record))
    assert [row.accuracy for row in rows] == [trial.value for trial in result.trials]


def test_a_search_from_the_command_line_for_the_lowest_loss(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*JOB, "--budget", "0.7", "--solver", "random", "--evaluations", "8", "--finetune-epochs", "0", "--out", "run"]
    assert search.main(asked) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "standard error of the float network's log-likelihood loss is" in out
    assert "accura" not in out.lower()
    assert "± is the standard error;" in out
    run = reading.read_folder(Path("run"))
    assert isinstance(run, reading.RunFolder)
    assert run.best is not None
    assert run.best.accuracy == min(row.accuracy for row in run.history if row.within_budget and row.solver == "random")
    assert run.result is not None
    found = run.result.value(run.result.found, "search")
    assert found == pytest.approx(run.best.accuracy)
    assert f"{run.result.show(found)} ±" in out
    assert evaluate.main(["run", "--trust", "small_job"]) == 0
    assert run.result.show(found) in capsys.readouterr().out


def test_percents_that_are_no_shares_are_refused_before_the_search() -> None:
    class Hundred(Squared):
        unit = "%"
        higher_is_better = True

        def values(self, outputs: Any, targets: Any) -> Tensor:
            return 100.0 * super().values(outputs, targets).exp()

    with pytest.raises(ValueError, match="objective 'Hundred' has the unit '%' and gave 100 for the float network: .* divide"):
        haq.Problem(fitted_network(), images(32, 1), images(40, 3), "edge", budget=0.7, objective=Hundred())


def test_what_guessing_gives_is_said_of_shares_alone() -> None:
    x = images(64, 3)
    few = haq.Problem(fitted_network(), images(32, 1), (x, brightest(x)), "edge", budget=0.7, objective=Squared())
    assert few.float_result.value == 0.0
    assert doubts(few) == []  # held against itself, the float network has no error
