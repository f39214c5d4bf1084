"""Criteria are found by name: our own, those of installed packages, and `module:Name` if a person names it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import quantizers as Q
from quantizers.pruning import ChannelGroup, ScoreRanking

OWN = """
import torch
import quantizers as Q


def first_weights(network, group):
    \"\"\"Magnitude of a filter's first weight.\"\"\"
    return network.get_submodule(group.writers[0]).weight.flatten(1)[:, 0].abs()


class FirstWeights(Q.Criterion):
    summary = "magnitude of a filter's first weight"

    def scores(self, network, group):
        return first_weights(network, group)


NUMBER = 3
"""
NAMES = {"l1", "l2", "bn-scale", "fpgm", "kse", "ccp", "taylor", "random"}


@pytest.fixture(autouse=True)
def the_same_criteria_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Q.Criterion, "known", dict(Q.Criterion.known))


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Write a module of one's own into the current folder."""
    (tmp_path / "criteria_of_mine.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "criteria_of_mine", raising=False)
    return "criteria_of_mine"


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        made[0].weight[:, 0] = torch.tensor([3.0, -4.0, 0.0, 1.0])
    return made


def kept(criterion: Q.Criterion, network: nn.Module) -> tuple[int, ...]:
    return criterion.prepare(network, Q.channel_groups(network, torch.zeros(1, 2))).keep("0", 2)


def test_our_own_are_listed_with_a_line_each() -> None:
    assert set(Q.criterion_names()) >= NAMES
    rows = {row.name: row for row in Q.criterion_rows()}
    for name in NAMES:
        assert rows[name].origin == "built in"
        assert rows[name].line
        assert "\n" not in rows[name].line
        assert Q.Criterion.named(name).name == name
    needing = {name for name in NAMES if Q.Criterion.named(name).needs_data}
    assert needing == {name for name in NAMES if Q.Criterion.named(name).needs_loss} == {"ccp", "taylor"}


@pytest.mark.parametrize("attribute", ["first_weights", "FirstWeights"])
def test_a_function_or_a_class_of_ones_own(attribute: str, mine: str, network: nn.Module) -> None:
    name = f"{mine}:{attribute}"
    with pytest.raises(ValueError, match="unknown criterion .*only imported if you name it yourself"):
        Q.Criterion.named(name, modules=False)
    assert mine not in sys.modules
    criterion = Q.Criterion.named(name)
    assert criterion.name == name
    assert criterion.summary.startswith("agnitude", 1)
    assert kept(criterion, network) == (0, 1)
    # What was named once is known: a file may say it, too.
    assert kept(Q.Criterion.named(name, modules=False), network) == (0, 1)
    assert name in Q.criterion_names()


def test_a_criterion_needs_no_name(network: nn.Module) -> None:
    def last_bias(network: nn.Module, group: ChannelGroup) -> Tensor:
        return torch.arange(group.channels)

    class Reversed(Q.Criterion):
        def scores(self, network: nn.Module, group: ChannelGroup) -> Tensor:
            return -torch.arange(group.channels)

    assert kept(Q.Criterion.named(last_bias), network) == (2, 3)
    assert kept(Q.Criterion.named(Reversed), network) == (0, 1)
    assert kept(Q.Criterion.named(Reversed()), network) == (0, 1)
    assert set(Q.Criterion.known) == NAMES


def test_an_installed_criterion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: nn.Module) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plugged_criteria", raising=False)
    (tmp_path / "plugged_criteria.py").write_text(OWN)
    info = tmp_path / "plugged_criteria-1.5.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged_criteria\nVersion: 1.5\nSummary: First weights\n")
    points = "first = plugged_criteria:FirstWeights\nl1 = plugged_criteria:FirstWeights\n"
    (info / "entry_points.txt").write_text(f"[quantizers.criteria]\n{points}")
    assert "first" in Q.criterion_names()
    assert ("first", "plugged_criteria 1.5", "First weights") in Q.criterion_rows()
    taken = ("l1", "plugged_criteria 1.5", "not used, the name is taken: give plugged_criteria:FirstWeights")
    assert taken in Q.criterion_rows()
    assert "plugged_criteria" not in sys.modules
    criterion = Q.Criterion.named("first", modules=False)
    assert criterion.name == "first"
    assert kept(criterion, network) == (0, 1)
    monkeypatch.delitem(sys.modules, "plugged_criteria")


def test_what_is_no_criterion_is_said(mine: str) -> None:
    for name, reason in (
        ("l3", "unknown criterion 'l3'; did you mean l. or l.. known: l1, l2, .*or module:Name"),
        (f"{mine}:NUMBER", f"criterion '{mine}:NUMBER' can't be used: give a subclass of quantizers.Criterion, or a function"),
        ("torch:nn.Linear", "criterion 'torch:nn.Linear' can't be used: it is no subclass of quantizers.Criterion"),
        ("quantizers:Criterion", "'quantizers:Criterion' can't be used: it has neither a method `scores` nor `rank`"),
        (3, "criterion '3' can't be used: give a subclass"),
    ):
        with pytest.raises(ValueError, match=reason):
            Q.Criterion.named(name)
    with pytest.raises(ImportError, match=f"criterion '{mine}:Nothing' can't be imported from {mine}:Nothing"):
        Q.Criterion.named(f"{mine}:Nothing")


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        (torch.zeros(3), "not a tensor of shape \\(3,\\)"),
        (torch.tensor([1.0, float("nan"), 0.0, 0.0]), "not nan"),
        ("scores", "not str"),
        (None, "not NoneType"),
    ],
)
def test_what_a_function_gives_is_checked(given: object, wrong: str, network: nn.Module) -> None:
    def mine(network: nn.Module, group: ChannelGroup) -> object:
        return given

    expected = f"criterion 'mine' must give a finite score for each of the 4 channels of group '0', {wrong}"
    with pytest.raises(ValueError, match=expected):
        kept(Q.Criterion.named(mine), network)


def test_scores_may_be_a_list(network: nn.Module) -> None:
    criterion = Q.Criterion.named(lambda network, group: [1, 4, 2, 3])
    ranking = criterion.prepare(network, Q.channel_groups(network, torch.zeros(1, 2)))
    assert isinstance(ranking, ScoreRanking)
    assert ranking.scores["0"].tolist() == [1, 4, 2, 3]
