"""What a search or a sweep is asked to do: defaults, checks in a sentence, and the command that asks for the same."""

from __future__ import annotations

import pickle
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from haq.study.config import SearchConfig, SweepCell, SweepConfig, WorkersConfig, read_scheme
from hw_models import trust


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seed": -1}, "--seed is -1; it must be an integer of at least 0"),
        ({"seed": True}, "--seed is True; it must be an integer of at least 0"),
        ({"evaluations": "x"}, "--evaluations is 'x'; it must be an integer of at least 1"),
        ({"evaluations": 1.5}, "--evaluations is 1.5; it must be an integer of at least 1"),
        ({"hw": 3}, "--hw is 3; it must be text"),
        ({"steps": 3}, "unknown setting 'steps'; known: network, data"),
        ({"solver": "dpg"}, "unknown solver 'dpg'; did you mean ddpg"),
        ({"objective": "acuracy"}, "unknown objective 'acuracy'; did you mean accuracy"),
        ({"env": "gym"}, "unknown environment 'gym'; known: plan, haq"),
        ({"sensitivity_kind": "x"}, "unknown kind of sensitivities 'x'; it can be loss, kl, hessian"),
        ({"bits": "8:2"}, "--bits: '8:2' is no span of widths: the smaller stands first, such as 2:8; give"),
        ({"bits": "4,9"}, "--bits: a width must be 1 to 8, 16 or float, not '9'; give such as 2:8 or 4,8,16,float"),
        ({"bits": "4/8/8"}, "--bits: '4/8/8' has more than one '/'; give such as"),
        ({"metric": "speed"}, "--metric is 'speed'; known: latency, energy, storage, bops"),
        ({"budget": "speed=0.5"}, "--budget 'speed=0.5' is of an unknown metric 'speed'; known: latency, energy, storage"),
        ({"budget": "0.5,latency=1ms"}, "--budget limits latency twice, to 0.5 and to 1ms: leave one of them out"),
        ({"budget": "0.5,storage="}, "--budget is '0.5,storage='; it must be a limit such as 0.5 or 40kB, or METRIC=LIMIT"),
        ({"budget": "storage=0.5"}, "--metric is latency, which no --budget limits (storage=0.5): add --budget latency=LIMIT"),
        ({"budget": "none"}, "--budget none goes with --max-drop or --at-least alone"),
        ({"reference": "8x8"}, "--reference: '8x8' is no pair of widths; write w8a16, 8/16, 4/float or float, or a policy"),
        ({"max_drop": -1.0}, "--max-drop is -1; it must be a number from 0"),
        ({"max_drop": float("nan")}, "--max-drop is nan; it must be a number from 0"),
        ({"at_least": "much"}, "--at-least is 'much'; it must be a value of the objective, such as 91.5% or 0.3"),
        ({"tradeoff": "mild"}, "--tradeoff is 'mild'; it must be soft, hard, or two exponents of the cost"),
        ({"tradeoff": "0.07,0.07"}, "--tradeoff is '0.07,0.07'; it must be soft, hard, or two exponents"),
        ({"max_drop": 1.0, "at_least": "90%"}, "--max-drop and --at-least say the same in two ways: leave one of them out"),
        ({"max_drop": 1.0, "tradeoff": "soft"}, "--tradeoff looks for the most of one number, and --max-drop or --at-least"),
        ({"eps": "4/255"}, "--eps 4/255 is of an attack: it goes with --objective accuracy+robust, not accuracy"),
        ({"eps": "8", "objective": "accuracy+robust"}, "eps is on the scale of images in [0, 1]: 8/255, not 8"),
        ({"scheme": ""}, "--scheme is ''; it must be NAME or NAME,LAYER=NAME, with each layer once, not ''"),
        ({"scheme": "lsq,stem"}, "--scheme is 'lsq,stem'; it must be NAME or NAME,LAYER=NAME"),
        ({"scheme": "lsq,a=b,a=c"}, "--scheme is 'lsq,a=b,a=c'; it must be NAME or NAME,LAYER=NAME"),
    ],
)
def test_what_is_not_accepted_is_one_sentence(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}") as caught:
        SearchConfig(**given)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        SearchConfig().replace(**given)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"seed": "3"}, "setting 'seed' is '3', a str; it must be an integer"),
        ({"seed": True}, "setting 'seed' is 'True', a bool; it must be an integer"),
        ({"hw": None}, "setting 'hw' is 'None', a NoneType; it must be text"),
        ({"later": 1}, "unknown setting 'later': it may be of a newer version of haq; known: network"),
        ({"seed": -2}, "--seed is -2; it must be an integer of at least 0"),
    ],
)
def test_what_a_file_may_not_say(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        SearchConfig.read(content)


def test_it_goes_to_a_file_and_back() -> None:
    config = SearchConfig(hw="a b.yaml", cold=True, threads=2, scheme="lsq,stem=linear", sensitivity="run")
    assert SearchConfig.read(config.to_dict()) == config == pickle.loads(pickle.dumps(config))
    assert hash(SearchConfig.read(config.to_dict())) == hash(config)
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3


def test_the_command_asks_for_the_same() -> None:
    assert SearchConfig().command() == "python -m haq.search"
    config = SearchConfig(hw="it's; rm -rf ~", cold=True, seed=3, objective="agreement", finetune_epochs=0)
    words = shlex.split(config.command())
    assert words == ["python", "-m", "haq.search", *config.options()]
    assert words[3:5] == ["--hw", "it's; rm -rf ~"]
    assert words[-1] == "--cold"
    # Sensitivities bring their kind along.
    assert "--sensitivity-kind" not in SearchConfig(sensitivity="run", sensitivity_kind="kl").words()


def test_several_budgets_are_one_text_and_the_metric_comes_first() -> None:
    config = SearchConfig(metric="storage", budget="latency=0.5,40kB,peak_memory=256kB")
    assert list(config.budgets().items()) == [("storage", "40kB"), ("latency", "0.5"), ("peak_memory", "256kB")]
    assert SearchConfig.read(config.to_dict()) == config
    assert SearchConfig.from_options({"budget": "storage=40kB,latency=0.5"}).metric == "storage"
    assert SearchConfig.from_options({"budget": "storage=40kB,0.5"}).metric == "latency"
    assert SearchConfig().budgets() == {"latency": "0.5"}


def test_the_cheapest_has_no_budget_unless_one_is_given() -> None:
    config = SearchConfig.from_options({"max_drop": 0.5})
    assert (config.budgets(), config.limits(), config.to_dict()["budget"]) == ({}, None, "none")
    assert config.command() == "python -m haq.search --max-drop 0.5"
    assert SearchConfig().replace(at_least="91%").budget == "none"
    within = SearchConfig(max_drop=0.5, budget="0.5")
    assert within.limits() == "0.5"
    # What is asked for again is what was asked for.
    for one in (config, within, SearchConfig(max_drop=1.0, metric="energy", budget="storage=40kB")):
        words = one.options()
        given = {word[2:].replace("-", "_"): value for word, value in zip(words[::2], words[1::2], strict=True)}
        given["max_drop"] = float(given["max_drop"])
        assert SearchConfig.from_options(given) == one


def test_what_most_runs_do_without_is_in_no_file_of_theirs() -> None:
    told = SearchConfig().to_dict()
    assert not {"reference", "max_drop", "at_least", "tradeoff"} & set(told)
    assert SearchConfig(tradeoff="soft").to_dict()["tradeoff"] == "soft"
    # Runs from before there were wider widths.
    assert SearchConfig.read({**told, "bits": "2:8"}).bits == "2:8"
    assert SearchConfig(tradeoff="0,-1").exponents() == (0.0, -1.0)
    assert (SearchConfig(at_least="91.5%").least_value(), SearchConfig(at_least="0.3").least_value()) == (0.915, 0.3)


def test_files_of_the_users_own() -> None:
    assert SearchConfig().files() == {}
    config = SearchConfig(network="mobilenet-mini@a.pt", data="images:photographs", hw="lut:table.csv")
    assert config.files() == {"network": Path("a.pt"), "data": Path("photographs"), "hw": Path("table.csv")}
    assert SearchConfig(reference="a/policy.json").files() == {"reference": Path("a/policy.json")}


def test_schemes_of_single_layers() -> None:
    assert read_scheme("lsq") == ("lsq", {})
    assert read_scheme("stem=lsq") == ("linear", {"stem": "lsq"})
    assert read_scheme("mine:Ternary,stem=linear,blocks.0.conv=pact") == (
        "mine:Ternary",
        {"stem": "linear", "blocks.0.conv": "pact"},
    )


def test_options_that_do_not_go_together() -> None:
    with pytest.raises(ValueError, match="it goes with --objective accuracy"):
        SearchConfig.from_options({"eps": "8/255"})
    with pytest.raises(ValueError, match="--sensitivity brings its kind along"):
        SearchConfig.from_options({"sensitivity": "run", "sensitivity_kind": "kl"})
    assert SearchConfig.from_options({"eps": "8/255", "objective": "accuracy+robust"}).eps == "8/255"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": 0}, "--seeds is 0; it must be an integer of at least 1: so many are 0, 1, 2 ..."),
        ({"hw": ()}, "--hw is ''; it must be names parted by commas, each of them once"),
        ({"hw": "edge,edge"}, "--hw is 'edge,edge'; it must be names parted by commas, each of them once"),
        ({"hw": (1,)}, "--hw is 1; it must be names"),
        ({"hw": "a/edge.yaml,b/edge.yaml"}, "--hw is 'a/edge.yaml,b/edge.yaml'; its files must have different names"),
        ({"budgets": "1/2"}, "--hw or --budgets have a '/' in 'edge-1/2--seed0': runs are named after them"),
        ({"budgets": "0.5:0.3:0.1"}, "--budgets is '0.5:0.3:0.1'; it must be FIRST:LAST:STEP"),
        ({"solvers": "ilp,dpg"}, "unknown solver 'dpg'; did you mean ddpg"),
    ],
)
def test_a_sweep_is_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        SweepConfig.from_options(given)


def test_a_sweep_asks_for_searches() -> None:
    sweep = SweepConfig.from_options({"hw": "edge", "budgets": "0.3:0.5:0.1", "solvers": "ilp", "metric": "storage"})
    assert sweep.budgets == ("0.3", "0.4", "0.5")
    assert sweep.settings == SearchConfig(metric="storage", finetune_epochs=0)
    command = "python -m haq.sweep --hw edge --budgets 0.3,0.4,0.5 --solvers ilp --metric storage"
    assert sweep.command() == command
    assert SweepCell("rpc:board:9090", "0.5", "ilp", 1).folder == "rpc-board-9090-0.5-ilp-seed1"
    assert SweepCell("lut:a/table.csv", "0.5", "ilp", 1).folder == "table-0.5-ilp-seed1"


def test_who_works() -> None:
    assert WorkersConfig().describe() == "in this process"
    assert WorkersConfig(workers=3).describe() == "in 3 processes"
    assert WorkersConfig(ray="auto").describe() == "by all processors of the Ray cluster auto"
    with pytest.raises(ValueError, match="^--workers is 0; it must be at least 1$"):
        WorkersConfig(workers=0)
    assert [WorkersConfig(**one).exceed(2) for one in ({}, {"workers": 2}, {"workers": 3}, {"ray": "auto"})] == [  # type: ignore[arg-type]
        False,
        False,
        True,
        True,
    ]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder, with the folder of a run in it; afterwards the path is as before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("runs/evil").mkdir(parents=True)
    Path("runs/evil/config.yaml").touch()


FIELDS = ("network", "data", "hw", "solver", "objective", "scheme")


@pytest.mark.parametrize("module", ["runs.evil.code_x", "canary", "torch.distributed.run", "pytest", "not.there"])
def test_code_that_only_a_file_names_is_refused_without_an_import(
    here: None, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it lies: in the run's folder, in the current one, where packages are installed, or nowhere."""
    for file in ("runs/evil/code_x.py", "canary.py"):
        Path(file).write_text("raise SystemExit('code that a file names was run')")
    source = Path("runs/evil/config.yaml")
    name = f"{module}:S"
    SearchConfig(hw="lut:a.csv").code()  # what is ours may be imported
    before = set(sys.modules)
    asked: list[SearchConfig | SweepConfig] = [SearchConfig(**{field: name}) for field in FIELDS]
    schemes = (f"{name},stem=lsq", f"stem={name},hidden=json:S", f"lsq,stem={name}")
    asked += [SearchConfig(scheme=scheme) for scheme in schemes]
    asked += [SearchConfig(network=f"{name}@net.pt"), SweepConfig(hw=("edge", name)), SweepConfig(solvers=(name, "ilp"))]
    asked.append(SweepConfig(settings=SearchConfig(data=name)))
    for config in asked:
        with pytest.raises(trust.UntrustedError, match=rf"^{source} names \w+ {name}, and code is .* add --trust {name} if"):
            config.check_code(source)
        # A command to be pasted doesn't ask for trust in what nobody has named.
        assert config.trust_words() == []
    assert set(sys.modules) == before
    # Whoever names it himself may have it, and that very name alone.
    monkeypatch.setattr(trust, "_named", {name})
    assert all(config.trust_words() == ["--trust", name] for config in asked)
    for config in asked[:-4]:
        if config.to_dict()["scheme"] != schemes[1]:
            config.check_code(source)
    with pytest.raises(trust.UntrustedError):
        SearchConfig(solver=f"{name}2").check_code(source)


def test_all_code_that_a_file_names_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = SearchConfig(network="mine:net@a.pt", data="mine:data", solver="os:system", scheme="lsq,stem=mine:Scheme")
    monkeypatch.setattr(trust, "_named", {"mine:data"})
    with pytest.raises(trust.UntrustedError) as caught:
        asked.check_code(Path("run/config.yaml"))
    sentence = str(caught.value)
    assert sentence.endswith("add --trust mine:net if you trust it, and --trust mine:Scheme, which it names too")


def test_names_that_are_no_code_need_no_trust() -> None:
    for given in (
        {"network": "timm:x", "data": "images:photographs", "hw": "lut:a.csv", "scheme": "lsq,stem=pact"},
        {"network": "a:b/c.pt", "data": "imagefolder:x.y", "hw": "rpc:board:9090"},
        {"network": "mobilenet-mini@x.pt", "hw": "mine.yaml"},
    ):
        SearchConfig(**given).check_code(Path("config.yaml"))
        assert SearchConfig(**given).trust_words() == []
    # Code of Python itself is never what is meant, whoever names it.
    with pytest.raises(ValueError, match="names solver os:system, which is of Python itself, and code is never called"):
        SearchConfig(solver="os:system").check_code(Path("config.yaml"))


def test_an_attack_that_is_given_beside_a_file(here: None) -> None:
    given = {"objective": "accuracy+robust", "eps": "4/255"}
    content = {"schema": "haq-run-2", "settings": SearchConfig().to_dict(), "signature": {}, "versions": {}}
    Path("config.yaml").write_text(yaml.safe_dump(content))
    assert SearchConfig.from_options(given, Path("config.yaml")).eps == "4/255"


def test_the_file_of_a_search_is_none_of_a_sweep(here: None) -> None:
    Path("config.yaml").write_text("schema: haq-run-2\n")
    Path("sweep.json").write_text('{"schema": "haq-sweep-2"}')
    with pytest.raises(ValueError, match=r"^--config config.yaml is the file of a search: give the sweep.json of a sweep"):
        SweepConfig.from_options({}, Path("config.yaml"))
    with pytest.raises(ValueError, match=r"^--config sweep.json is the file of a sweep: give the config.yaml of a search"):
        SearchConfig.from_options({}, Path("sweep.json"))


def test_a_key_that_is_given_twice_in_a_file(here: None) -> None:
    content = {"schema": "haq-run-2", "settings": SearchConfig().to_dict(), "signature": {}, "versions": {}}
    text = yaml.safe_dump(content, sort_keys=False)
    Path("config.yaml").write_text(text.replace("  hw: edge\n", "  hw: edge\n  hw: cloud\n"))
    with pytest.raises(ValueError, match=r"config.yaml is not the configuration of a run: 'hw' is given twice, the second"):
        SearchConfig.from_file(Path("config.yaml"))
