"""`python -m haq.report`: what was found, on one page that is complete in itself; and nothing in a folder is trusted."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from haq import report, robustness, search, sweep
from haq.console import errors
from haq.console.commands import main_of
from haq.reporting import reading, vega
from haq.reporting.drawing import front
from haq.store.units import describe_amount, percent
from haq.study.config import SearchConfig, SweepConfig
from haq.study.front import pareto
from haq.version import __version__
from hw_models.extras import install_line
from tests.commands.test_robustness_command import MODULE, lessen
from tests.reporting.written_runs import OBJECTIVES, change, write, write_robustness, write_run

SMALL = ["--network", "small_job:network", "--data", "small_job:splits"]
HOSTILE = '</script><script>window.hacked=1</script>"><img src=x onerror=window.hacked=1>{{7*7}}'


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A real run, attacked, and a real sweep, each made by its command."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        (place / "small_job.py").write_text(MODULE)
        patch.chdir(place)
        patch.setattr(sys, "path", [str(place), *sys.path])
        patch.delitem(sys.modules, "small_job", raising=False)
        lessen(patch)
        small = [*SMALL, "--evaluations", "40"]
        assert search.main([*small, "--budget", "0.6", "--finetune-epochs", "1", "--seed", "3", "--out", "run"]) == 0
        attacks = ["--attacks", "fgsm", "--images", "32", "--workers", "1", "--defensive", "0"]
        assert robustness.main(["run", *attacks]) == 0
        asked = ["--hw", "edge,cloud", "--budgets", "0.6,0.8", "--solvers", "ilp,random", "--seeds", "2"]
        assert sweep.main([*small, *asked, "--out", "sweep"]) == 0
        yield place


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(*arguments: str | Path) -> int:
    return errors.run_command(lambda: report.main([str(argument) for argument in arguments]))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence that a report is refused with; nothing is written."""
    before = sorted(Path().rglob("*"))
    assert call(*arguments) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return err.removeprefix("error: ").strip()


class Page(HTMLParser):
    """A page's elements, the text that a reader sees, and its tables by caption."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self.feed(self.html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "br"):
            self._open.append(tag)
        if tag == "caption":
            self._rows = [[""]]
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "table":
            self.tables[self._rows[0][0]] = self._rows[1:]

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self.words.append(data)
        if {"td", "th", "caption"} & set(self._open):
            self._rows[-1][-1] += data

    @property
    def specs(self) -> dict[str, Any]:
        found = re.search(r'<script type="application/json" id="specs">(.*?)</script>', self.html, re.DOTALL)
        assert found
        content: dict[str, Any] = json.loads(found[1])
        return content


def drawn(spec: Any) -> list[dict[str, Any]]:
    """All data of a chart, whatever layer they belong to."""
    if isinstance(spec, list):
        return [row for one in spec for row in drawn(one)]
    if not isinstance(spec, dict):
        return []
    mine = list(spec.get("data", {}).get("values", []))
    return mine + [row for key, one in spec.items() if key != "data" for row in drawn(one)]


def test_a_run_from_end_to_end(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "run", "run")
    assert call("run") == 0
    assert "Written: run/report.html" in capsys.readouterr().out
    assert not list(Path().rglob("*.part"))
    page = Page(Path("run/report.html"))
    result, config = json.loads(Path("run/result.json").read_text()), yaml.safe_load(Path("run/config.yaml").read_text())
    rows = {row[0]: row[1:] for row in page.tables[f"{result['network']} on {result['data']}, edge"]}
    assert list(rows) == [
        "policy",
        "float",
        "uniform 8 bits",
        "found by ddpg",
        "fine-tuned",
        "found by greedy",
        "found by ilp",
    ]
    entries = [result[key] for key in ("float", "uniform8", "found", "finetuned")] + list(result["rivals"].values())
    for entry, row in zip(entries, list(rows.values())[1:], strict=True):
        assert row[:2] == [percent(entry["test_accuracy"]), percent(entry["search_accuracy"])]
        assert row[2] == (
            "–" if entry["latency_s"] is None else describe_amount(entry["latency_s"], "latency").replace("us", "µs")
        )
        assert row[4] == describe_amount(entry["storage_bytes"], "storage")
    assert [word for head in rows["policy"] for word in re.findall(r"\((\w+)\)", head)] == [
        *["measured"] * 2,
        *["estimated"] * 2,
        "counted",
    ]
    layers = page.tables["Data: Bits per layer, and what each layer costs"]
    policy = json.loads(Path("run/policy.json").read_text())["layers"]
    shown = [[row[0], *(cell.rstrip("*") for cell in row[4:6])] for row in layers[1:]]
    assert shown == [[one["name"], str(one["weight_bits"]), str(one["activation_bits"])] for one in policy]
    assert layers[1][4] == "8*"  # fixed
    tried = page.tables["Data: Accuracy against latency: every policy tried"]
    assert len(tried) - 1 == len(Path("run/history.csv").read_text().splitlines()) - 1
    assert config["command"] in page.text
    found, tuned = (percent(result[key]["test_accuracy"]) for key in ("found", "finetuned"))
    assert f"The policy found by ddpg has {found} accuracy on the test split" in page.text
    assert f"Found by ddpg {found} test accuracy, measured" in page.text
    assert f"Fine-tuned {tuned} test accuracy, measured" in page.text
    for words in ("finished", "The budget of", "holds", "Convergence", __version__, config["versions"]["torch"], "--seed 3"):
        assert words in page.text
    for words in (result["accuracy_is"], "nothing of it was run there", "no search and no training sees the test split"):
        assert words in page.text
    assert "unfinished" not in page.text
    before = page.html
    assert call("run") == 0
    assert Path("run/report.html").read_text(encoding="utf-8") == before


def test_what_is_on_the_chart_is_what_is_in_the_files(made: Path) -> None:
    assert call(made / "run", "--out", "page.html") == 0
    specs = list(Page(Path("page.html")).specs.values())
    run = reading.read_folder(made / "run")
    assert isinstance(run, reading.RunFolder)

    def values(spec: dict[str, Any], *keys: str) -> list[tuple[Any, ...]]:
        return [tuple(row[key] for key in keys) for row in drawn(spec) if set(keys) <= set(row)]

    assert run.policy is not None
    heights = {(row[0], row[1]): row[2] for row in values(specs[0], "layer", "operand", "height")}
    for layer, (w, a) in zip(run.problem.layers, run.policy, strict=True):
        assert (heights[layer.name, "weights"], heights[layer.name, "activations"]) == (w, -a)
    shares = [row[2] for row in values(specs[1], "layer", "when", "share") if row[1] == "before, 8/8"]
    assert sum(shares) == pytest.approx(100, rel=1e-4)
    points = set(values(specs[2], "policy", "evaluation", "is", "within"))
    assert points == {
        (one.solver, one.evaluation, percent(one.accuracy), "within" if one.within_budget else "above") for one in run.history
    }
    assert len([row for row in values(specs[2], "policy", "mean") if row[0] == "uniform bits"]) >= 7
    for solver, evaluation, best in values(specs[3], "solver", "evaluation", "y"):
        before = [o.accuracy for o in run.history if o.solver == solver and o.evaluation <= evaluation and o.within_budget]
        assert best == pytest.approx(100 * max(before))


def test_the_front_is_what_nothing_beats() -> None:
    points = [(3.0, 0.9), (1.0, 0.5), (2.0, 0.5), (2.0, 0.7), (3.0, 0.8), (4.0, 0.9), (5.0, 0.95), (1.0, 0.4)]
    assert front(points) == [(1.0, 0.5), (2.0, 0.7), (3.0, 0.9), (5.0, 0.95)]
    kept = [one for one, best in zip(points, pareto(points), strict=True) if best]
    assert sorted(kept) == front(points)


def test_a_page_that_cannot_be_written_is_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(Path("run"))

    def read_only(path: Path, content: bytes) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), f"{path}.part")

    with monkeypatch.context() as patch:
        patch.setattr(report.files, "write", read_only)
        told = refused(capsys, "run")
    assert "\n" not in told
    assert "run/report.html can't be written (Read-only file system): name a file in another place with --out" in told
    assert "--out can't" not in refused(capsys, "run", "--out", "run/config.yaml/page.html")
    assert call("run", "--out", "page.html") == 0


def test_torch_is_not_imported(made: Path) -> None:
    code = (
        "import sys; from haq import report; status = report.main(sys.argv[1:]);"
        "print(status, *sorted({name.partition('.')[0] for name in sys.modules}))"
    )
    arguments = [sys.executable, "-W", "error", "-c", code, str(made / "run"), str(made / "sweep"), "--out", "page.html"]
    root = Path(__file__).parents[2]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(root)})
    assert not done.stderr
    status, *loaded = done.stdout.splitlines()[-1].split()
    assert status == "0"
    assert not {"torch", "gymnasium", "stable_baselines3", "matplotlib", "pandas", "tvm"} & set(loaded)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"hw": "cloud", "budget": "0.8ms", "seed": 7, "finetune_epochs": 0},
        {"network": "my job:net", "objective": "accuracy+robust", "eps": "4/255"},
        {"hw": "cpu", "threads": 2, "target": '{"kind": "llvm"}', "cold": True},
        {"sensitivity": "runs/it's here", "sensitivity_kind": "kl"},
    ],
)
def test_the_command_of_a_run_asks_for_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    config = SearchConfig(**options)
    given = given_by(config.command(), search.cli, monkeypatch)
    # A search takes the kind from the sensitivities that it is given.
    expected = config
    if config.sensitivity is not None:
        expected = config.replace(sensitivity_kind="loss")
    assert SearchConfig.from_options(given) == expected


def test_the_command_of_a_sweep_asks_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = "python -m haq.sweep --hw edge,cloud --budgets 0.4:0.6:0.1 --solvers ilp --seeds 2 --evaluations 9"
    config = SweepConfig.from_options(given_by(asked, sweep.cli, monkeypatch))
    command = config.command()
    assert command.startswith("python -m haq.sweep ")
    assert "finetune" not in command
    assert SweepConfig.from_options(given_by(command, sweep.cli, monkeypatch)) == config
    assert SweepConfig.read(config.to_dict()) == config


def given_by(command: str, cli: click.Command, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What a command line gives, by field, as the command's function gets it."""
    python, option, module, *arguments = shlex.split(command)
    assert [python, option, module] == ["python", "-m", f"haq.{cli.name}"]
    found: dict[str, Any] = {}

    def taken(**values: Any) -> int:
        found.update(values["given"])
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(cli, "callback", taken)
        assert main_of(cli)(arguments) == 0
    return found


def test_names_are_shown_and_never_run() -> None:
    name = f"layer {HOSTILE}"
    run = write_run(Path("<b>run"), layers=("stem", name), network=HOSTILE, target=HOSTILE, solvers=("ddpg", "ilp"))
    change(run / "problem.json", data=HOSTILE, origin=HOSTILE)
    write_robustness(run)
    content = json.loads((run / "robustness/robustness.json").read_text())
    content["networks"][HOSTILE] = {**content["networks"]["found"], "is": HOSTILE, "verdict": HOSTILE}
    write(run / "robustness/robustness.json", content)
    assert call(run) == 0
    page = Page(run / "report.html")
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 3
    assert "img" not in tags
    assert not [attributes for _, attributes in page.elements if any(key.startswith("on") for key in attributes)]
    assert page.text.count(HOSTILE) > 10
    assert "49" not in re.findall(r"\d+", page.text)
    # Data can't end their element either, and say the same.
    assert name in {row.get("layer") for row in drawn(page.specs["chart-0-0"])}


def test_an_unfinished_run_shows_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(Path("run"), finished=False, evaluations=30, solvers=("ddpg",))
    lines = (run / "history.csv").read_text().splitlines(keepends=True)
    (run / "history.csv").write_text("".join(lines[:21]) + lines[21][:25])  # killed while it wrote
    assert call(run) == 0
    assert "Not finished, shown as far as it is there: run" in capsys.readouterr().out
    page = Page(run / "report.html")
    assert "unfinished" in page.text
    assert "This run is not finished: 20 of at most 30 evaluations by ddpg are there." in page.text
    assert "python -m haq.search --resume run" in page.text
    assert len(page.tables["Data: Accuracy against latency: every policy tried"]) == 21
    assert "fine-tuned" not in page.text

    for file in ("policy.json", "history.csv"):
        (run / file).unlink()
    assert call(run) == 0
    page = Page(run / "report.html")
    assert "0 of at most 30 evaluations by ddpg are there. None of them is within the budget yet." in page.text
    assert page.specs == {}


@pytest.mark.parametrize("metric", ["latency", "energy", "storage"])
def test_every_metric_has_its_unit_and_says_where_it_is_from(metric: str) -> None:
    run = write_run(Path("run"), metric=metric)
    assert call(run) == 0
    page = Page(run / "report.html")
    kind = "counted" if metric == "storage" else "estimated"
    assert f"of {metric} ({kind})" in page.text
    titles = re.findall(r'"title":"([^"]*)"', json.dumps(page.specs, separators=(",", ":")))
    unit = {"latency": "\\u00b5s", "energy": "\\u00b5J", "storage": "kB"}[metric]
    assert f"{metric}, {unit} ({kind})" in titles or f"{metric}, m{unit[-1]} ({kind})" in titles


@pytest.mark.parametrize(
    ("objective", "called", "shares"),
    [
        ("accuracy", "accuracy", ["91.33 %"]),
        ("agreement", "agreement", ["91.33 %"]),
        ("accuracy+robust", "worst-case accuracy", ["96.33 %", "91.33 %"]),  # plain accuracy beside it
    ],
)
def test_every_objective_is_called_by_its_name(objective: str, called: str, shares: list[str]) -> None:
    run = write_run(Path("run"), objective=objective)
    assert call(run) == 0
    page = Page(run / "report.html")
    rows = {row[0]: row[1:] for row in page.tables["small on digits, edge"]}
    assert f"test {called} (measured)" in rows["policy"]
    assert rows["found by ddpg"][: len(shares)] == shares
    assert f"has 91.33 % {called} on the test split" in page.text
    assert OBJECTIVES[objective] in page.text
    if objective == "agreement":
        assert "accuracy" not in page.text.lower()


def test_the_libraries_of_charts_are_bundled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def bundled(snippet: str) -> str:
        made.append(snippet)
        return f"bundle; {snippet}"

    monkeypatch.setattr(vega.vl_convert, "javascript_bundle", bundled)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = vega.script()
    assert first.startswith("bundle; window.vegaEmbed")
    assert vega.script() == first
    assert len(made) == 1
    (kept,) = (tmp_path / "cache" / "haq").iterdir()
    kept.write_text(first[:-5])  # of a machine that lost power
    assert vega.script() == first
    assert len(made) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))  # no folder can be made there
    assert vega.script() == first
    assert len(made) == 3


def test_a_budget_that_is_exceeded_is_said_so() -> None:
    run = write_run(Path("run"))
    budget = json.loads((run / "result.json").read_text())["budget"]
    exceeded = {"limit": budget["used"] / 2, "fraction": budget["used_fraction"] / 2, "holds": False}
    change(run / "result.json", budget={**budget, **exceeded})
    assert call(run) == 0
    text = Page(run / "report.html").text
    assert "is EXCEEDED" in text
    assert "✗ EXCEEDED" in text
    assert "holds" not in text.replace("what should hold", "")


def test_a_run_under_attack_says_what_can_be_believed(made: Path) -> None:
    run = write_run(Path("run"))
    write_robustness(run)
    assert call(run) == 0
    page = Page(run / "report.html")
    rows = {row[0]: row[1:] for row in page.tables["Accuracy under attack, measured, linf, eps 8/255"]}
    assert rows["worst case, image by image"] == ["4.0 %", "<= 12.3 %"]
    assert rows["none"] == ["91.0 %", "91.0 %"]
    assert rows["transfer-twin"] == ["6.0 %", "–"]
    assert page.tables["Signs of masked gradients"][1] == ["no gradient is zero", "PASS", "FAIL"]
    for words in (
        "Masked gradients: of found the worst case is an upper bound",
        "found: FAIL: no gradient is zero: 99.0 % of images without any.",
        "found: 12.3 %, upper bound: gradients are masked.",
        "float: 4.0 %, worst case over all attacks.",
        "found, as an integer network: 12.0 % right on its worst images, another answer than in PyTorch on 0 of 100.",
    ):
        assert words in page.text
    honest = write_run(Path("honest"))
    write_robustness(honest, masked=False)
    assert call(honest) == 0
    text = Page(honest / "report.html").text
    assert "12.3 %, worst case over all attacks" in text
    assert "Masked gradients:" not in text
    assert "<=" not in text

    # What the command itself wrote.
    assert call(made / "run", "--out", "attacked.html") == 0
    page = Page(Path("attacked.html"))
    content = json.loads((made / "run/robustness/robustness.json").read_text())
    rows = {row[0]: row[1:] for row in page.tables[f"Accuracy under attack, measured, {content['threat']}"]}
    assert rows["fgsm"] == [f"{100 * one['attacks']['fgsm']:.1f} %" for one in content["networks"].values()]


def test_what_a_search_verified_is_told() -> None:
    run = write_run(Path("run"))
    write_robustness(run)
    verified = json.loads((run / "robustness/robustness.json").read_text())["networks"]["found"]
    shutil.rmtree(run / "robustness")
    change(run / "result.json", verified=verified)
    assert call(run) == 0
    assert (
        "By the full suite on 100 test images: 12.30 % right in the worst case, upper bound" in Page(run / "report.html").text
    )


def test_a_sweep_shows_its_fronts_and_what_specialisation_is_worth(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "sweep", "sweep")
    assert call("sweep") == 0
    assert "Written: sweep/report.html" in capsys.readouterr().out
    page, content = Page(Path("sweep/report.html")), json.loads(Path("sweep/sweep.json").read_text())
    for name, target in content["targets"].items():
        rows = page.tables[f"Data: {name}: accuracy against latency"][1:]
        asked = [*target["found"], *target["uniform"]]
        assert [row[4] for row in rows] == [percent(row["test_accuracy"]) for row in asked]
        assert [row[3] for row in rows] == [f"{row['fraction']:.3f}" for row in asked]
        assert [row[6] == "yes" for row in rows] == [row["pareto"] for row in asked]
        assert "2 seeds" in next(row[5] for row in rows if row[0] == "random")
    special = content["specialisation"]["policies"]
    table = page.tables["What a policy found for one target costs on another"]
    for row, (name, one) in zip(table[1:], special.items(), strict=True):
        marks = [f"{share:.3f}{' *' if other == name else ''}" for other, share in one["fractions"].items()]
        assert row == [name, one["solver"], percent(one["test_accuracy"]), *marks]
    assert content["command"] in page.text
    assert "python -m haq.sweep --hw edge,cloud --budgets 0.6,0.8 --solvers ilp,random --seeds 2" in content["command"]


def test_an_unfinished_sweep_shows_its_searches(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "sweep", "sweep")
    content = json.loads(Path("sweep/sweep.json").read_text())
    begun = {key: content[key] for key in ("schema", "command", "asked", "signature", "versions")}
    write(Path("sweep/sweep.json"), {**begun, "finished": False})
    Path("sweep/edge-0.6-ilp-seed0/result.json").unlink()
    shutil.rmtree("sweep/cloud-0.8-random-seed1")
    assert call("sweep") == 0
    assert "Not finished" in capsys.readouterr().out
    page = Page(Path("sweep/report.html"))
    assert "This sweep is not finished: 11 searches are begun, 10 of them finished." in page.text
    assert "python -m haq.sweep --resume sweep" in page.text
    states = {row[0]: row[1] for row in page.tables["Searches"][1:]}
    assert states["edge-0.6-ilp-seed0"] == "unfinished"
    assert states["edge-0.8-ilp-seed0"] == "finished"
    assert "sensitivity" not in states


def test_several_are_listed_first_and_compared_where_they_can_be(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("all/a"))
    write_run(Path("all/deep/b"), solvers=("evolution",), finished=False)
    write_run(Path("all/c"), target="cloud")
    shutil.copytree(made / "sweep", "all/sweep")
    assert call("all/a", "all/deep/b", "all/c", "all/sweep") == 0
    assert "Written: all/report.html" in capsys.readouterr().out
    page = Page(Path("all/report.html"))
    rows = {row[0]: row[1:] for row in page.tables["Runs and sweeps"]}
    assert list(rows)[1:] == ["a", "deep/b", "c", "sweep"]
    assert [row[0] for row in rows.values()] == ["state", "finished", "unfinished", "finished", "finished sweep"]
    assert rows["a"][6:] == ["92.51 %", "91.33 %", "92.24 %"]
    joint = page.tables["Data: small on edge: accuracy against latency"]
    assert {row[0] for row in joint[1:]} == {"a", "deep/b"}
    assert "Data: small on cloud: accuracy against latency" not in {
        name for name in page.tables if "cloud" in name and "small" in name
    }
    links = [attributes["href"] for tag, attributes in page.elements if tag == "a"]
    anchors = {attributes.get("id") for _, attributes in page.elements}
    assert {str(link).removeprefix("#") for link in links} <= anchors
    assert str(Path.cwd()) not in page.html


def test_anything_else_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    Path("notes").mkdir()
    assert refused(capsys, "notes") == (
        "notes is neither the folder of a run (it has no config.yaml) nor of a sweep (no sweep.json)"
    )
    assert refused(capsys, "nowhere") == "there is no folder nowhere; give the folder of a run or of a sweep"
    run = write_run(Path("run"))
    assert refused(capsys, run, "./run") == "run is given twice; give each folder once"
    assert "run is a folder; give the page's file" in refused(capsys, run, "--out", run)
    Path("thesis.html").write_text("<p>years of work")
    assert "thesis.html is there and is not a report" in refused(capsys, run, "--out", "thesis.html")
    assert Path("thesis.html").read_text() == "<p>years of work"
    (run / "problem.json").unlink()
    assert "run has no problem.json" in refused(capsys, run)


@pytest.mark.parametrize("file", ["config.yaml", "problem.json", "result.json", "robustness/robustness.json"])
def test_a_newer_schema_is_called_newer(file: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(Path("run"))
    write_robustness(run)
    text = (run / file).read_text()
    name = re.search(r"(haq-[a-z]+)-2", text)
    assert name
    (run / file).write_text(text.replace(name[0], f"{name[1]}-9000", 1))
    sentence = refused(capsys, run)
    assert sentence.startswith(f"run/{file} was made by a newer version of haq ({name[1]}-9000, this one reads {name[0]})")


def _without(path: Path, key: str) -> None:
    content = json.loads(path.read_text())
    del content[key]
    write(path, content)


def _text(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


DEEP = "[" * 100_000
DAMAGE: list[tuple[str, Any, str]] = [
    ("problem.json", lambda p: p.write_text('{"schema": '), "run/problem.json is not what a run searches: "),
    ("problem.json", lambda p: p.write_text(DEEP), "run/problem.json is not what a run searches: "),
    ("problem.json", lambda p: p.write_bytes(b"\xff\xfe"), "run/problem.json is not text in UTF-8"),
    ("problem.json", lambda p: p.write_text("[]"), "run/problem.json is not what a run searches: it must be an object"),
    ("problem.json", lambda p: _without(p, "limit"), "run/problem.json is not what a run searches: 'limit' is missing"),
    (
        "problem.json",
        lambda p: change(p, limit="much"),
        "run/problem.json is not what a run searches: 'limit' is 'much'; it must be a number",
    ),
    (
        "problem.json",
        lambda p: change(p, limit=float("nan")),
        "run/problem.json is not what a run searches: 'limit' is nan; it must be a finite number",
    ),
    (
        "problem.json",
        lambda p: change(p, limit=float("inf")),
        "run/problem.json is not what a run searches: 'limit' is inf; it must be a finite number",
    ),
    (
        "problem.json",
        lambda p: change(p, layers=[]),
        "run/problem.json is not what a run searches: 'layers' has 0 entries; it must have at least 1",
    ),
    (
        "problem.json",
        lambda p: change(p, uniform8=1.0),
        "run/problem.json is not what a run searches: the costs of the layers at 8 bits don't add up",
    ),
    (
        "problem.json",
        lambda p: change(p, metric="<b>"),
        "run/problem.json is not what a run searches: 'metric' is '<b>'; it must be 'latency', 'energy', 'storage', 'bops'",
    ),
    ("config.yaml", lambda p: p.write_text("a: [b"), "run/config.yaml is not the configuration of a run: "),
    (
        "config.yaml",
        lambda p: p.write_text("!!python/object/apply:os.system ['touch hacked']"),
        "run/config.yaml is not the configuration of a run: it has a tag (!) in line 1",
    ),
    (
        "config.yaml",
        lambda p: _text(p, "settings:", "settled:"),
        "run/config.yaml is not the configuration of a run: 'settings' is missing",
    ),
    (
        "policy.json",
        lambda p: _text(p, '"stem"', '"stern"'),
        "run/policy.json is not a policy for the layers of run/problem.json",
    ),
    (
        "policy.json",
        lambda p: _text(p, '"weight_bits": 8', '"weight_bits": 9'),
        "run/policy.json is not a bit policy: layer 'stem': bits must be an integer from 1 to 8, 16, or null for float, not 9",
    ),
    (
        "policy.json",
        lambda p: _text(p, '"version": 1', '"version": 3'),
        "run/policy.json has version 3; this release reads versions 1 and 2: it was made by a newer version of haq",
    ),
    ("history.csv", lambda p: _text(p, "solver,", "saviour,"), "run/history.csv has the columns "),
    ("history.csv", lambda p: _text(p, "ddpg,1,8-", "ddpg,1,9-"), "run/history.csv, line 2: the weight bits are '9-"),
    (
        "history.csv",
        lambda p: _text(p, "ddpg,2,8-", "ddpg,2,"),
        "run/history.csv, line 3: weight bits of 3 layers, ",
    ),
    ("history.csv", lambda p: _text(p, "\nddpg,1,", "\nddpg,one,"), "run/history.csv, line 2: the evaluation is 'one'"),
    ("history.csv", lambda p: _text(p, ",0.3,", ",nan,"), "run/history.csv, line 2: the loss is 'nan'"),
    ("history.csv", lambda p: _text(p, ",0.01\n", "\n"), "run/history.csv, line 2: 8 columns, not 9"),
    (
        "result.json",
        lambda p: change(p, found={"test_accuracy": 0.9}),
        "run/result.json is not the result of a run: 'search_accuracy' is missing",
    ),
    (
        "result.json",
        lambda p: change(p, found={"test_accuracy": 90, "search_accuracy": 1}),
        "run/result.json is not the result of a run: 'test_accuracy' is 90.0; it must be a share from 0 to 1",
    ),
    (
        "result.json",
        lambda p: change(p, uniform=[{"search_accuracy": 0.5}]),
        "run/result.json is not the result of a run: 'uniform.0.bits' is missing",
    ),
    (
        "robustness/robustness.json",
        lambda p: change(p, networks={}),
        "run/robustness/robustness.json is not an evaluation of robustness: 'networks' has 0 entries",
    ),
]


@pytest.mark.parametrize(("file", "damage", "sentence"), DAMAGE)
def test_a_damaged_file_is_named_with_its_fault(
    file: str, damage: Any, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(Path("run"))
    write_robustness(run)
    damage(run / file)
    assert refused(capsys, run).startswith(sentence)
    assert not Path("hacked").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"schema": "haq-sweep-3"},
            "sweep/sweep.json was made by a newer version of haq (haq-sweep-3, this one reads haq-sweep-2)",
        ),
        ({"targets": []}, "sweep/sweep.json is not the file of a sweep: 'targets' is a list; it must be a mapping"),
        (
            {"metric": "money"},
            "sweep/sweep.json is not the file of a sweep: 'metric' is 'money'; it must be 'latency', 'energy', 'storage',",
        ),
        ({"objective": "agreement"}, "sweep/sweep.json is not the file of a sweep: 'search_agreement' is missing"),
    ],
)
def test_a_damaged_sweep_too(changes: dict[str, Any], sentence: str, made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(made / "sweep", "sweep")
    change(Path("sweep/sweep.json"), **changes)
    assert refused(capsys, "sweep").startswith(sentence)


def test_without_the_extra_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(Path("run"))
    for module in [name for name in sys.modules if name.startswith("haq.reporting")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr("haq.reporting", raising=False)
    monkeypatch.setitem(sys.modules, "altair", None)
    sentence = refused(capsys, run)
    assert sentence.startswith("reports need altair, vl-convert-python and jinja2")
    assert sentence.endswith(install_line("report"))


def test_help_names_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "--out" in out
    assert "RUNS" in out
