"""Timings measured while the machine was busy are measured again, or marked; those of the cache are checked at every start."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import hw_models
from haq import search
from hw_models.measured import trusted as trust
from hw_models.measured.cache import TimingCache
from hw_models.measured.timing import Timing
from hw_models.tvm_cpu import target as targets
from tests.commands.test_search_command import MODULE, SMALL, call
from tests.conftest import enter
from tests.hw_models.stand_in_kernels import Spin, candidates


class Machine:
    """A machine whose clock is made up: `load` says how much slower everything is now."""

    def __init__(self) -> None:
        self.load = 1.0
        self.calm_after = 10**9  # so many groups of kernels
        self.spread = 0.01
        self.speed: dict[int, float] = {}  # of kernels with so many input channels
        self.measured: list[list[str]] = []
        self.references = 0
        self.told: list[str] = []

    def now(self) -> float:
        if len(self.measured) >= self.calm_after:
            return 1.0
        return self.load

    def reference(self, *_: object) -> object:
        def read() -> float:
            self.references += 1
            return 1e-4 * self.now()

        return read

    def measure(self, kernels: list[Spin], cpu: object, **_: object) -> dict[Spin, Timing]:
        slow = self.now()
        self.measured.append([f"{kernel.conv.in_channels} {kernel.name}" for kernel in kernels])
        found = {}
        for kernel in kernels:
            seconds = 1e-6 * kernel.steps * kernel.conv.macs * slow * self.speed.get(kernel.conv.in_channels, 1.0)
            found[kernel] = Timing(seconds, self.spread * seconds, 5)
        return found

    def table(self, network: nn.Module | None = None) -> hw_models.CostTable:
        """Price a network in what could be a new process."""
        trust._settled.clear()
        self.told.clear()
        self.measured.clear()
        workload = hw_models.trace(network or layers(), torch.zeros(1, 4))
        return hw_models.load_target("cpu", notice=self.told.append).cost_table(workload)


def layers(count: int = 6) -> nn.Sequential:
    """Linear layers of different sizes."""
    return nn.Sequential(*(nn.Linear(4 + i, 5 + i) for i in range(count)))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    pytest.importorskip("tvm")
    from hw_models.tvm_cpu import kernels

    made = Machine()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "candidates", candidates)
    monkeypatch.setattr(targets, "measure", made.measure)
    monkeypatch.setattr(targets, "Reference", made.reference)
    monkeypatch.setattr(trust, "_settled", {})
    return made


def test_an_idle_machine_is_believed(machine: Machine) -> None:
    first = machine.table()
    assert machine.told == []
    assert "busy" not in first.provenance
    assert machine.references >= 2 * len(machine.measured)
    # A new process checks one kernel of some shapes, and changes nothing.
    again = machine.table()
    assert machine.told == []
    assert [len(group) for group in machine.measured] == [trust.SAMPLE - 1]
    assert np.array_equal(first.metric("latency"), again.metric("latency"), equal_nan=True)
    machine.measured.clear()
    hw_models.load_target("cpu").cost_table(again.workload)
    assert machine.measured == []  # once a process


def test_what_was_measured_under_load_is_measured_again(machine: Machine) -> None:
    right = machine.table().metric("latency")
    path = TimingCache(hw_models.load_target("cpu").key).path  # type: ignore[attr-defined]
    path.unlink()
    # Busy from the first moment: nothing tells. The next start does, by the reference.
    machine.load = 5.0
    assert machine.table().metric("latency") == pytest.approx(5 * right, nan_ok=True)
    machine.load = 1.0
    assert machine.table().metric("latency") == pytest.approx(right, nan_ok=True)
    assert machine.told == []
    machine.table()
    assert len(machine.measured) == 1


def test_a_load_that_ends_costs_some_repeats(machine: Machine) -> None:
    machine.table(layers(1))
    right = machine.table(nn.Sequential(nn.Linear(4, 9))).metric("latency")
    machine.load = 3.0
    machine.calm_after = 2
    assert machine.table(nn.Sequential(nn.Linear(4, 7))).metric("latency") == pytest.approx(right * 7 / 9, nan_ok=True)
    assert machine.told == []


@pytest.mark.parametrize("busy", ["reference", "spread"])
def test_a_machine_that_stays_busy_ends_with_a_warning(machine: Machine, busy: str) -> None:
    right = machine.table(layers(1)).metric("latency")
    if busy == "reference":
        machine.load = 3.0
    machine.spread = {"reference": 0.01, "spread": 0.5}[busy]
    table = machine.table(layers(8))
    groups = len(machine.measured)
    assert table.provenance.endswith(", the machine being busy in 7 of 8 layers")
    assert machine.told[0] == "the machine is busy: what was measured before on cpu could not be checked"
    assert machine.told[1].startswith("the times of 7 of 8 layers on cpu are not trusted ('1' is the first)")
    # Marked in the file, too: they are measured anew as soon as it is idle.
    machine.load = 1.0
    machine.spread = 0.01
    table = machine.table(layers(8))
    assert machine.told == []
    assert "busy" not in table.provenance
    assert table.metric("latency")[0] == pytest.approx(right[0], nan_ok=True)
    calm = len(machine.measured)
    assert groups <= calm + trust.MOST_AGAIN + trust.AGAIN


def test_a_shape_that_is_off_is_measured_again_by_itself(machine: Machine) -> None:
    first = machine.table()
    machine.speed = {4: 0.5, 5: 1.05, 6: 1.3}  # twice as fast as the cache says, nearly the same, slower
    table = machine.table()
    ratio = (table.metric("latency") / first.metric("latency"))[:, 7, 7]
    assert ratio == pytest.approx([0.5, 1, 1.3, 1, 1, 1])
    assert machine.told == []


def test_a_run_does_not_go_on_with_other_times(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(tmp_path, monkeypatch, MODULE)
    asked = [*SMALL[:-1], "0.95", "--hw", "cpu", "--solver", "random", "--evaluations", "2", "--finetune-epochs", "0"]
    assert call(search.main, *asked, "--out", "run") == 0
    (tmp_path / "run" / "result.json").unlink()
    trust._settled.clear()
    machine.speed = {16: 2.0}
    capsys.readouterr()
    assert call(search.main, "--resume", "run") == 2
    sentence = "the target (cpu) has other times than run began with, as they were measured anew: start a new run"
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_a_check_on_a_busy_machine_says_so_and_changes_nothing(machine: Machine) -> None:
    first = machine.table()
    machine.load = 2.0
    again = machine.table()
    assert np.array_equal(first.metric("latency"), again.metric("latency"), equal_nan=True)
    assert machine.told == ["the machine is busy: what was measured before on cpu could not be checked"]


def test_marks_are_read_back_and_files_without_them_are_taken(machine: Machine) -> None:
    cache = TimingCache({"processor": "a", "threads": 1})
    cache.save({"a": Timing(1.0, 0.1, 3, trusted=False), "b": Timing(1.0, 0.1, 3)})
    assert {name: timing.trusted for name, timing in cache.read().items()} == {"a": False, "b": True}
    cache.path.write_text(cache.path.read_text().replace("true", "7"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cache.read() == {}
    assert "the mark of 'b' is [7]" in str(caught[0].message)
    cache.path.write_text('{"key": {"processor": "a", "threads": 1}, "timings": {"a": [1.0, 0.1, 3]}}')
    assert cache.read() == {"a": Timing(1.0, 0.1, 3)}
