"""What the how-to pages add is built and installed as a package, listed by its name, and does what the page says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import hw_models
import quantizers as Q
from haq import data, networks
from haq.attacks import assess
from haq.deployment import EXPORTERS, graph
from haq.problem.objective import find_objective
from haq.solvers.base import Session, solve
from haq.training.methods import build_method
from tests.conftest import brightest, images, make_problem, small_network

ROOT = Path(__file__).parents[1]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs" / "how_to").glob("*.md"))}
# The kind of `haq list` for each group of entry points.
KINDS = {
    "quantizers.schemes": "schemes",
    "quantizers.criteria": "criteria",
    "haq.targets": "targets",
    "haq.hardware_models": "hardware-models",
    "haq.solvers": "solvers",
    "haq.objectives": "objectives",
    "haq.attacks": "attacks",
    "haq.exporters": "exporters",
    "haq.training_methods": "methods",
    "haq.networks": "networks",
    "haq.data": "data",
}


def files_of(text: str) -> dict[str, str]:
    """The files that a page writes by `%%writefile`."""
    return dict(re.findall(r"^```python\n%%writefile (\S+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


def project_of(text: str) -> str | None:
    """The pyproject.toml that a page shows or writes."""
    shown = re.search(r"^```toml\n(\[build-system\].*?)^```$", text, re.MULTILINE | re.DOTALL)
    written = re.search(r"^cat > pyproject.toml <<'END'\n(.*?)^END$", text, re.MULTILINE | re.DOTALL)
    found = shown or written
    return found and found[1]


def points_of(project: str) -> list[tuple[str, str, str]]:
    """The entry points of a pyproject.toml: group, name, and place."""
    found = []
    for group, lines in re.findall(r'^\[project\.entry-points\."([\w.]+)"\]\n((?:[\w-]+ = ".*"\n)+)', project, re.MULTILINE):
        found += [(group, name, place) for name, place in re.findall(r'^([\w-]+) = "(.*)"$', lines, re.MULTILINE)]
    return found


PROJECTS = {page: project for page, text in PAGES.items() if (project := project_of(text)) is not None}
POINTS = [(page, *point) for page, project in PROJECTS.items() for point in points_of(project)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each page, with its pyproject.toml and the files that it writes."""
    folder = tmp_path_factory.mktemp("pages")
    for page, project in PROJECTS.items():
        source = folder / page
        source.mkdir()
        (source / "pyproject.toml").write_text(project)
        for name, content in files_of(PAGES[page]).items():
            (source / name).write_text(content)
    return folder


@pytest.fixture(scope="module")
def installed(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of all pages, installed as pip does it, with nothing fetched."""
    folder = tmp_path_factory.mktemp("site-packages")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(folder)]
    packages = [str(sources / page) for page in PROJECTS]
    done = subprocess.run([*pip, *offline, *packages], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def importable(installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages where Python finds them, and an empty current folder."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(installed)])
    monkeypatch.setattr(Q.Scheme, "known", dict(Q.Scheme.known))
    monkeypatch.setattr(Q.pruning.Criterion, "known", dict(Q.pruning.Criterion.known))
    for _, _, _, place in POINTS:
        # Other tests have modules of these names.
        monkeypatch.setitem(sys.modules, place.partition(":")[0], None)  # so that what is there before, or nothing, comes back
        del sys.modules[place.partition(":")[0]]
    monkeypatch.chdir(tmp_path)


def test_every_kind_of_plug_in_has_a_page_with_a_package() -> None:
    assert {group for _, group, _, _ in POINTS} == set(KINDS)
    table = re.findall(r"^\| `([\w.]+)` \|.*\]\((\w+)\.md\) \|$", PAGES["plugin"], re.MULTILINE)
    assert {group for group, _ in table} == set(KINDS)
    for group, page in table:
        assert (page, group) in {(page, group) for page, group, _, _ in POINTS}


def test_the_packages_are_listed_by_the_program(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(installed)])}
    command = [sys.executable, "-W", "error", "-m", "haq", "list", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert len(POINTS) > len(PROJECTS) > 8
    for page, group, name, _ in POINTS:
        (row,) = [row for row in listed[KINDS[group]] if row["name"] == name]
        (package,) = re.findall(r'^name = "(.*)"$', PROJECTS[page], re.MULTILINE)
        (line,) = re.findall(r'^description = "(.*)"$', PROJECTS[page], re.MULTILINE)
        assert (row["origin"], row["line"]) == (f"{package} 1.0", line)


def scheme(name: str) -> None:
    network = small_network()
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), calibrate=images(8), scheme=name)
    hidden = Q.quant_layers(quantized)["hidden"]
    codes = hidden.scheme.integer_weights(hidden).codes
    assert int(codes.abs().max()) == 7
    assert torch.equal(hidden.quantized_weight().abs().max(), hidden.weight.abs().max())
    with pytest.raises(ValueError, match="no inputs of 1 bit"):
        hidden.scheme.check(4, 1)


def criterion(name: str) -> None:
    network = small_network().eval()
    (group, *_) = Q.channel_groups(network, images(2)).groups
    small = Q.prune(network, {group.name: 0.5}, criterion=name, batches=[images(8)])
    before, after = (whole.get_parameter(f"{group.writers[0]}.weight") for whole in (network, small))
    kept = before.flatten(1)[:, 0].abs().topk(group.channels // 2).indices.sort().values
    assert torch.equal(after, before[kept])


def target(name: str) -> None:
    table = hw_models.load_target(name).cost_table(hw_models.trace(small_network(), images(1)))
    assert table.latency_s[:, 7, 7] == pytest.approx(2 * table.latency_s[:, 3, 3])


def hardware_model(name: str) -> None:
    model: Any = hw_models.HARDWARE_MODELS.get(name)
    if ":" not in name:  # as files name it
        Path("lanes.yaml").write_text(files_of(PAGES["target"])["lanes.yaml"])
        machine: Any = hw_models.load_target("lanes.yaml")
        assert type(machine) is model
        cycles = machine.cost_table(hw_models.trace(small_network(), images(1))).cycles
        assert (abs(cycles[:, 7, 7] - 4 * cycles[:, 3, 3]) < 4).all()


def solver(name: str) -> None:
    session = Session(make_problem(small_network()), 7)
    assert solve(name, session, 0).feasible
    assert session.used == 7


def objective(name: str) -> None:
    found = find_objective(name)
    assert "two best" in found.words
    scores = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    assert found.correct([scores], torch.tensor([0, 1, 2])).tolist() == [True, True, False]


def attack(name: str) -> None:
    x = images(12).sigmoid()
    found = assess(small_network(), x, brightest(x), eps=0.1, attacks=name)
    assert name in {one.partition("\n")[0] for one in found.attacks}
    assert found.worst <= found.clean


def exporter(name: str) -> None:
    network = small_network().eval()
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), calibrate=images(8))
    kind = EXPORTERS.get(name)
    path = Path(kind.output)
    captured = graph.capture(quantized, images(1))
    kind().check(quantized)
    kind().export(quantized, captured, images(8), path, notes={}, options={}, on_progress=lambda *told: None)
    assert np.load(path)["hidden.codes"].dtype == np.int8
    samples: Any = None
    assert kind().compare(quantized, captured, samples, path).same_answers
    with torch.no_grad():
        Q.quant_layers(quantized)["hidden"].weight *= 2
    other = Q.quantize(Q.float_copy(quantized), Q.get_policy(quantized), calibrate=images(8))
    assert not kind().compare(other, captured, samples, path).same_answers
    with pytest.raises(ValueError, match="hidden"):
        kind().check(Q.quantize(network, {**Q.get_policy(quantized), "hidden": (None, 4)}, calibrate=images(8)))


def training_method(name: str) -> None:
    disturbed = []
    for size in (0.01, 0.01, 0.02):
        module = small_network()
        training: Any = SimpleNamespace(module=module, generator=torch.Generator().manual_seed(3))
        build_method(f"{name}(size={size})").after_epoch(training)
        disturbed.append(torch.cat([weight.detach().flatten() for weight in module.parameters()]))
    begin = torch.cat([weight.detach().flatten() for weight in small_network().parameters()])
    assert torch.equal(disturbed[0], disturbed[1])
    assert (disturbed[2] - begin).std() == pytest.approx(0.02, rel=0.2)


def network(name: str) -> None:
    found = networks.load(name)
    assert found.module(torch.rand(2, *found.input_shape)).shape == (2, 4)


def data_source(name: str) -> None:
    found = data.load(name)
    assert len(found.train) + len(found.search) == 900
    assert len(found.test) == 300


USES: dict[str, Callable[[str], None]] = {
    "quantizers.schemes": scheme,
    "quantizers.criteria": criterion,
    "haq.targets": target,
    "haq.hardware_models": hardware_model,
    "haq.solvers": solver,
    "haq.objectives": objective,
    "haq.attacks": attack,
    "haq.exporters": exporter,
    "haq.training_methods": training_method,
    "haq.networks": network,
    "haq.data": data_source,
}


@pytest.mark.parametrize("by", ["name", "place"])
@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point[0]}: {point[2]}")
def test_the_example_of_a_page_works(point: tuple[str, str, str, str], by: str, importable: None) -> None:
    _, group, name, place = point
    USES[group]({"name": name, "place": place}[by])
