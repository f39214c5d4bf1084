"""Every file of a run has one record: what is written is read again as it was, and what doesn't fit is named."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

import quantizers as Q
from haq.store import files
from haq.store.records import (
    ConfigRecord,
    FileRecord,
    FinishedSweepRecord,
    Metric,
    PolicyRecord,
    ProblemRecord,
    ResultRecord,
    RobustnessRecord,
    SensitivityRecord,
    SweepRecord,
)
from haq.store.units import UNITS
from quantizers import MAX_BITS
from tests.reporting.written_runs import change, write_robustness, write_run, write_wide_run

ROOT = Path(__file__).parents[2]
RECORDS: dict[str, type[FileRecord]] = {
    "config.yaml": ConfigRecord,
    "problem.json": ProblemRecord,
    "policy.json": PolicyRecord,
    "result.json": ResultRecord,
    "robustness/robustness.json": RobustnessRecord,
}
POLICY = {"stem": (8, 8), "body": (3, None), "head": (None, 5)}


def policy(**widths: int) -> dict[str, Any]:
    return PolicyRecord.of({name: (width, width) for name, width in widths.items()}).to_dict()


def sweep(**changes: Any) -> dict[str, Any]:
    """The file of a finished sweep of one search."""
    shares = {"search_accuracy": 0.9, "test_accuracy": 0.8}
    run = {"seed": 0, "folder": "a", "evaluations": 4, "cost": 1.0, "fraction": 0.5, **shares, "policy": policy(stem=8)}
    found = {"budget": "0.5", "solver": "ilp", "limit": 1.0, "cost": 1.0, "fraction": 0.5, **shares, "runs": [run]}
    target = {"name": "edge", "cost_is": "estimated", "kind": "estimated", "uniform8": 2.0, "left_out": ""}
    return {
        "schema": "haq-sweep-2",
        "finished": True,
        "command": "python -m haq.sweep",
        "asked": {"settings": {"network": "n"}, "hw": ["edge"], "budgets": ["0.5"], "solvers": ["ilp"], "seeds": 1},
        "signature": {"network": "1"},
        "versions": {"haq": "0"},
        "network": "n",
        "data": "d",
        "objective": "accuracy",
        "objective_is": "accuracy",
        "metric": "latency",
        "unit": "s",
        "accuracy_is": "measured",
        "images": {"test": 3, "search": 4},
        "float": shares,
        "sensitivities": None,
        "targets": {"edge": {**target, "uniform": [], "found": [{**found, "pareto": True}]}},
        "specialisation": None,
        **changes,
    }


@pytest.mark.parametrize("name", RECORDS)
def test_what_is_read_is_written_again_as_it_was(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_robustness(run)
    first = RECORDS[name].read(run / name)
    first.write(run / name)
    text = (run / name).read_text()
    again = RECORDS[name].read(run / name)
    assert again == first
    again.write(run / name)
    assert (run / name).read_text() == text
    assert not list(tmp_path.rglob("*.part"))


def test_a_sweep_is_read_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "sweep.json"
    SweepRecord.from_dict(sweep()).write(path)
    done = SweepRecord.read(path)
    assert isinstance(done, FinishedSweepRecord)
    assert json.loads(path.read_text()) == sweep()
    assert done.found[0].spread("test", "accuracy") == (0.8, 0.8)
    begun = SweepRecord.from_dict(
        {key: sweep()[key] for key in ("schema", "asked", "signature", "versions")} | {"finished": False}
    )
    assert not isinstance(begun, FinishedSweepRecord)
    with pytest.raises(ValueError, match="the record is not the file of a sweep: 'search_agreement' is missing"):
        SweepRecord.from_dict(sweep(objective="agreement"))
    with pytest.raises(ValueError, match="'network' is missing"):
        SweepRecord.from_dict({key: value for key, value in sweep().items() if key != "network"})
    with pytest.raises(ValueError, match="'images' says nothing of the test split"):
        SweepRecord.from_dict(sweep(images={"search": 4, "test": 0}))


def test_a_policy_has_one_encoding() -> None:
    """`quantizers` has it for those who have torch, the store for those who haven't."""
    bits = Q.BitPolicy(POLICY)
    record = PolicyRecord.of(bits)
    assert record.to_dict() == bits.to_dict()
    assert Q.BitPolicy.from_dict(record.to_dict()) == bits
    assert record.widths() == dict(bits)
    assert Q.BitPolicy(PolicyRecord.from_dict(bits.to_dict()).widths()) == bits
    with pytest.raises(ValueError, match=f"from 1 to {MAX_BITS}"):
        PolicyRecord.of({"stem": (MAX_BITS + 1, 1)})


def test_a_policy_in_a_file_too(tmp_path: Path) -> None:
    Q.BitPolicy(POLICY).to_json(tmp_path / "one.json")
    PolicyRecord.of(POLICY).write(tmp_path / "other.json")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "other.json").read_bytes()
    assert PolicyRecord.read(tmp_path / "one.json").widths() == POLICY


@pytest.mark.parametrize("name", ["config.yaml", "problem.json", "result.json", "robustness/robustness.json"])
@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ("1", r"made by an older version of haq \(haq-\w+-1, this one reads haq-\w+-2\): (search|attack) again, or use that"),
        ("3", r"made by a newer version of haq \(haq-\w+-3, this one reads haq-\w+-2\): upgrade haq to use it"),
        ("x", r"is not .*: its schema is 'haq-\w+-x', not 'haq-\w+-2'"),
    ],
)
def test_files_of_other_versions_are_refused_with_what_to_do(name: str, version: str, sentence: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_robustness(run)
    path = run / name
    path.write_text(re.sub(r"(haq-[a-z]+)-2", rf"\1-{version}", path.read_text(), count=1))
    with pytest.raises(ValueError, match=sentence) as error:
        RECORDS[name].read(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": 3}, "'layers' is 3; it must be a list"),
        ({"layers": [3]}, "'layers.0' is 3; it must be a mapping"),
        ({"layers": [{"name": "a", "weight_bits": 1}]}, "'layers.0.activation_bits' is missing"),
        (
            {"layers": [{"name": "a", "weight_bits": True, "activation_bits": 1}]},
            "layer 'a': bits must be an integer from 1 to 8",
        ),
        ({"layers": [{"name": "a", "weight_bits": 0, "activation_bits": 1}]}, "or null for float, not 0"),
        ({"layers": 2 * [{"name": "a", "weight_bits": 1, "activation_bits": 1}]}, "layer 'a' is named twice"),
        ({"layers": 10_001 * [{"name": "a"}]}, "it must have at most 10000"),
        ({"version": 3}, "has version 3; this release reads versions 1 and 2: it was made by a newer version of haq, upgrade"),
        ({"version": True}, "has version True; this release reads versions 1 and 2"),
        ({"schema": "bits"}, "its schema is 'bits', not 'haq-bit-policy'"),
    ],
)
def test_the_first_fault_is_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        PolicyRecord.from_dict({**policy(stem=8), **changes}, "a/policy.json")
    assert str(error.value).startswith("a/policy.json ")


def test_what_is_shown_of_a_hostile_value_is_short(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    for value in ("x" * 10**6, 10**5000, {"deep": [[[]]]}, ["\x1b[2J" * 10**5]):
        with pytest.raises(ValueError, match="is not a bit policy") as error:
            PolicyRecord.from_dict({**policy(stem=8), "layers": value}, path)
        assert len(str(error.value)) < 300 + len(str(path))
    path.write_text("[" * 300 + "]" * 300)
    with pytest.raises(ValueError, match="must be an object"):
        PolicyRecord.read(path)
    path.write_text(json.dumps({**policy(stem=8), "layers": 0}).replace(" 0}", "[" * 300 + "]" * 300 + "}"))
    with pytest.raises(ValueError, match="nested too deeply"):
        PolicyRecord.read(path)


def test_what_means_nothing_is_not_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    before = (run / "result.json").read_bytes()
    content = ResultRecord.read(run / "result.json").to_dict()
    content["budget"]["used"] = float("nan")
    with pytest.raises(ValueError, match="'budget.used' is nan; it must be a finite number"):
        ResultRecord.from_dict(content, run / "result.json").write(run / "result.json")
    assert (run / "result.json").read_bytes() == before


def test_floats_are_kept_to_the_last_bit(tmp_path: Path) -> None:
    increases = [None, 0.1 + 0.2, 1 / 3, 5e-324, 1e22, 0.0, 2.0, 1e-7]
    content = {
        "schema": "haq-sensitivity-2",
        "kind": "loss",
        "signature": {},
        "bits": [2, 8],
        "base": policy(stem=8),
        "loss_increases": [{"layers": ["stem"], "weights": increases, "activations": increases[::-1]}],
    }
    SensitivityRecord.from_dict(content).write(tmp_path / "sensitivity.json")
    (row,) = SensitivityRecord.read(tmp_path / "sensitivity.json").loss_increases
    assert row.weights == increases
    assert row.activations == increases[::-1]
    assert json.loads((tmp_path / "sensitivity.json").read_text()) == content


def test_a_run_of_wide_widths_and_three_budgets_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = write_wide_run(tmp_path / "run", goal=True, budget=False)
    for name in ("problem.json", "policy.json", "result.json"):
        read = RECORDS[name].read(folder / name)
        assert read.to_dict() == json.loads((folder / name).read_text())
    problem = ProblemRecord.read(folder / "problem.json")
    assert [limit.metric for limit in problem.further] == ["storage", "peak_memory"]
    assert problem.before == [(8, 16), (8, 8), (8, 8), (8, 8), (8, 16)]
    assert problem.choice_words == "4, 8, 16 and float for weights, 8, 16 and float for activations"
    layer = problem.layers[1]
    assert (layer.cost_at(4, None), layer.cost_at(4, 32), layer.cost_at(2, 2)) == (256e-6, 256e-6, None)


def test_costs_of_few_bits_alone_are_read_as_they_were(tmp_path: Path) -> None:
    problem = ProblemRecord.read(write_run(tmp_path / "run") / "problem.json")
    layer = problem.layers[0]
    assert layer.cost_at(8, 8) == layer.cost[7][7]
    assert layer.cost_at(16, 16) is layer.cost_at(None, 8) is None
    assert (problem.before_words, problem.choice_words, problem.goal_words) == ("8/8", "2 to 8", "the best")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"limit": 1.0}, "'limits' limit latency to 0.00"),
        ({"limit": None, "limits": []}, "'limit' is null; it must be a number, unless other metrics are limited"),
        ({"reference_policy": policy(stem=8)}, "'reference_policy' is of other layers than 'layers'"),
        ({"reference_policy": policy(**{f"layer{i}": 8 for i in range(5)})}, "in 'reference_policy' don't add up to"),
        ({"goal": {"kind": "cheapest", "is": "x"}}, "'goal.least' is missing, which a goal of kind 'cheapest' has"),
        ({"goal": {"kind": "tradeoff", "is": "x", "alpha": 0.0, "beta": -1.0}}, "'goal.target' is missing"),
        ({"widths": {"weights": [9], "activations": [8]}}, "a width must be 1 to 8, 16 or float, not '9'"),
    ],
)
def test_what_a_problem_may_not_say(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = write_wide_run(tmp_path / "run") / "problem.json"
    change(path, **changes)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ProblemRecord.read(path)


def test_costs_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = write_wide_run(tmp_path / "run") / "problem.json"
    layers = json.loads(path.read_text())["layers"]
    layers[2]["cost"] = [row[:9] for row in layers[2]["cost"]]
    change(path, layers=layers)
    with pytest.raises(ValueError, match="'cost' of a layer must have 8 or 10 rows, of as many costs each"):
        ProblemRecord.read(path)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"budgets": []}, ""),
        ({"uniform": [{"bits": "4/9", "cost": 1.0, "search_accuracy": 0.5}]}, "a width must be 1 to 8, 16 or float, not '9'"),
        (
            {"uniform": [{"bits": 12, "cost": 1.0, "search_accuracy": 0.5}]},
            "'bits' of a uniform policy is 12; it must be 1 to 8",
        ),
    ],
)
def test_what_a_result_may_not_say(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    path = write_wide_run(tmp_path / "run") / "result.json"
    change(path, **changes)
    if not sentence:
        assert [budget.metric for budget in ResultRecord.read(path).all_budgets] == ["latency"]
        return
    with pytest.raises(ValueError, match=re.escape(sentence)):
        ResultRecord.read(path)


def test_every_budget_of_a_result_makes_sense(tmp_path: Path) -> None:
    path = write_wide_run(tmp_path / "run") / "result.json"
    budgets = json.loads(path.read_text())["budgets"]
    budgets[1]["used"] *= 0.5
    budgets[1]["used_fraction"] *= 0.5
    change(path, budgets=budgets)
    with pytest.raises(ValueError, match=r"it must be 'found.storage_bytes'"):
        ResultRecord.read(path)
    change(path, budgets=[*budgets[1:]])
    with pytest.raises(ValueError, match="the first of 'budgets' isn't 'budget'"):
        ResultRecord.read(path)


def test_sensitivities_have_eight_or_ten_places(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "schema": "haq-sensitivity-2",
        "kind": "loss",
        "signature": {},
        "bits": [2, 32],
        "base": policy(stem=8),
    }
    for count in (8, 10):
        content["loss_increases"] = [{"layers": ["stem"], "weights": [None] * count, "activations": [0.5] * count}]
        SensitivityRecord.from_dict(content)
    content["loss_increases"][0]["weights"] = [None] * 9
    with pytest.raises(ValueError, match="there are 9 increases of an operand; there must be 8 or 10, by width"):
        SensitivityRecord.from_dict(content)


def test_metrics_are_those_that_have_units() -> None:
    assert get_args(Metric) == tuple(UNITS)


def test_records_need_no_torch() -> None:
    code = "import sys; import haq.store.records, haq.store.inventory, haq.store.cleanup; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "False\n"


def test_one_place_writes_beside_and_renames() -> None:
    own = {ROOT / "haq/store/files.py"}
    for path in (ROOT / "haq").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert path in own or not re.search(r"\w*partial\w*\.replace\(|os\.(replace|rename)\(|\.rename\(", text), path


def test_what_can_not_be_written_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write(path, "old")

    def fails(self: Path, target: Path) -> Path:
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        with pytest.raises(OSError, match="no"):
            files.write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
