"""What CONTRIBUTING.md shows of adding one of anything works as it stands there."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hw_models
import quantizers as Q
from haq import data, networks
from haq.attacks import ATTACKS
from haq.deployment import EXPORTERS
from haq.problem.objective import find_objective
from haq.solvers.base import Session, solve
from haq.training.methods import build_method
from tests.conftest import images, make_problem, small_network

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"^\*\*An? ([a-z ]+)\*\*.*?```python\n(.*?)```", TEXT, re.MULTILINE | re.DOTALL))


def scheme(place: str) -> None:
    network = small_network()
    qnetwork = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), calibrate=images(8), scheme=place)
    assert len(Q.quant_layers(qnetwork)["hidden"].quantized_weight().unique()) == 3


def target(place: str) -> None:
    workload = hw_models.trace(small_network(), images(1))
    made, edge = (hw_models.load_target(name).cost_table(workload) for name in (place, "edge"))
    assert made.latency_s == pytest.approx(edge.latency_s / 2, nan_ok=True)


def solver(place: str) -> None:
    session = Session(make_problem(small_network()), 5)
    assert solve(place, session, 0).feasible
    assert session.used == 4


def objective(place: str) -> None:
    assert "two best" in find_objective(place).words


USES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "scheme": ("Ternary", scheme),
    "hardware model": ("Lanes", hw_models.HARDWARE_MODELS.get),
    "hardware target": ("Half", target),
    "solver": ("Uniform", solver),
    "objective": ("TopTwo", objective),
    "attack": ("Corners", ATTACKS.get),
    "exporter": ("Listing", EXPORTERS.get),
    "training method": ("Noisy", build_method),
    "network": ("small", networks.load),
    "data source": ("noise", data.load),
}


def test_there_is_an_example_of_each() -> None:
    assert EXAMPLES.keys() == USES.keys()


@pytest.mark.parametrize("kind", USES)
def test_the_example_works(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Q.Scheme, "known", dict(Q.Scheme.known))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(EXAMPLES[kind])
    name, use = USES[kind]
    use(f"mine:{name}")
    sys.modules.pop("mine")


def test_the_rooms_are_those_that_there_are() -> None:
    root = Path(__file__).parents[1] / "haq"
    rooms = {path.parent.name for path in root.glob("*/__init__.py")}
    assert {room for room in rooms if f"`{room}/`" not in TEXT} == set()
