"""Latency can be measured: the fastest kernel of each layer at each pair of bits, on this machine or on a board; what was
measured is kept through kills, damage and other processes, and never used for another machine."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pickle
import platform
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import hw_models
from haq import hardware, search
from haq.console.errors import EXIT_BAD_INPUT, run_command
from hw_models.extras import install_line
from hw_models.measured.cache import TimingCache, cache_folder
from hw_models.measured.processor import kept_processors
from hw_models.tvm_cpu import measure as measuring
from hw_models.tvm_cpu import target as targets
from hw_models.tvm_cpu.choose import choose
from hw_models.tvm_cpu.conv import Conv
from hw_models.tvm_cpu.measure import BuildError, Timing, cross_compiler, measure
from tests.commands.test_search_command import MODULE, SMALL
from tests.hw_models.stand_in_kernels import Spin, candidates

ROOT = Path(__file__).parents[2]
CONV = Conv(8, 4, (2, 2), (2, 2))
KEY = {"processor": "a", "threads": 1}
GOOD = Timing(1e-3, 1e-4, 5)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("HAQ_DEBUG", raising=False)
    return tmp_path


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm")
    from hw_models.tvm_cpu import kernels

    monkeypatch.setattr(kernels, "candidates", candidates)


@pytest.fixture
def counted(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-in kernels that take as long as their steps say, without a clock; the list has what was measured."""
    measured: list[str] = []

    def fake(kernels: list[Spin], cpu: object, **_: object) -> dict[Spin, Timing]:
        measured.extend(f"{kernel.conv.in_channels} {kernel.name}" for kernel in kernels)
        return {kernel: seconds(kernel) for kernel in kernels}

    monkeypatch.setattr(targets, "measure", fake)
    monkeypatch.setattr(targets, "Reference", lambda *_: lambda: 1e-4)
    return measured


def seconds(kernel: Spin) -> Timing:
    return Timing(1e-6 * kernel.steps * kernel.conv.macs, 1e-9, 3)


def workload(network: nn.Module) -> hw_models.Workload:
    return hw_models.trace(network, torch.zeros(1, 1, 8, 8))


# Without TVM


def test_nothing_imports_tvm_before_it_is_needed() -> None:
    code = "import sys, haq, hw_models, haq.search, haq.hardware; haq.hardware.main(['list']); assert 'tvm' not in sys.modules"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "rpc:HOST:PORT" in done.stdout


def test_what_to_install_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    assert run_command(lambda: hardware.main(["show", "cpu"])) == EXIT_BAD_INPUT
    assert capsys.readouterr().err == f"error: the target cpu needs TVM: {install_line('tvm')}\n"


def test_options_of_measuring_are_for_measured_targets() -> None:
    with pytest.raises(
        ValueError,
        match=r"threads is for kernels that are measured \(cpu, rpc:HOST:PORT, onnxruntime, openvino\), not for edge",
    ):
        hw_models.load_target("edge", threads=2)
    with pytest.raises(ValueError, match="did you mean cpu"):
        hw_models.load_target("cpuu")


# Choosing


def all_candidates(conv: Conv = CONV) -> list[Spin]:
    return [kernel for w in range(1, 9) for a in range(1, 9) for kernel in candidates(conv, w, a, False, None)]


def test_a_cell_is_the_fastest_kernel_of_those_bits_or_wider() -> None:
    measured: list[Spin] = []

    def clock(kernels: list[Spin]) -> Mapping[Spin, Timing]:
        measured.extend(kernels)
        return {kernel: seconds(kernel) for kernel in kernels}

    every = set(all_candidates())
    chosen = choose(every, clock)
    for (w, a), choice in chosen.items():
        serving = [kernel for kernel in every if kernel.w_bits >= w and kernel.a_bits >= a]
        assert choice.timing.median_s == min(seconds(kernel).median_s for kernel in serving)
    assert chosen[1, 1].kernel.name == "bits w1a1 4x4"
    assert chosen[8, 8].kernel.name == chosen[3, 2].kernel.name == "int8 4x4"
    # Bit-serial kernels win up to w*a = 4. One step beyond is measured to know that, all that is wider isn't; and the tile
    # that is half as fast is only tried once.
    assert len(measured) == len(set(measured)) < len(every) / 4
    assert [kernel.name for kernel in measured if kernel.name.endswith("1x4")] == ["bits w1a1 1x4"]
    assert max(kernel.w_bits * kernel.a_bits for kernel in measured if kernel.name.startswith("bits")) == 6


@pytest.mark.parametrize("seed", range(5))
def test_more_bits_never_cost_less(seed: int) -> None:
    noise = np.random.default_rng(seed)
    chosen = choose(all_candidates(), lambda kernels: {k: Timing(float(noise.uniform(1, 2)), 0.0, 1) for k in kernels})
    table = np.array([[chosen[w, a].timing.median_s for a in range(1, 9)] for w in range(1, 9)])
    assert (np.diff(table, axis=0) >= 0).all()
    assert (np.diff(table, axis=1) >= 0).all()


# The cache


def test_a_cache_that_cannot_be_written_is_gone_on_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TimingCache(KEY).save({"a": GOOD})
    locked = TimingCache._locked

    def read_only(self: TimingCache) -> Any:
        if self.path.is_relative_to(tmp_path):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self.path))
        return locked(self)

    monkeypatch.setattr(TimingCache, "_locked", read_only)
    told: list[str] = []
    cache = TimingCache(KEY, told.append)
    assert len(told) == 1
    assert f"can't be kept in {cache_folder()} (Read-only file system)" in told[0]
    assert cache.read() == {"a": GOOD}
    assert cache.save({"b": GOOD}) == TimingCache(KEY, told.append).read() == {"a": GOOD, "b": GOOD}
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert TimingCache({**KEY, "threads": 7}, told.append).save({"c": GOOD}) == {"c": GOOD}


def test_a_target_is_sent_without_what_shows_its_progress_here() -> None:
    lock = threading.Lock()
    target = targets.CpuTarget(None, "a processor", "", progress=lambda *news: lock.acquire())
    assert pickle.loads(pickle.dumps(target)) == target


def test_the_cache_returns_what_was_saved() -> None:
    cache = TimingCache(KEY)
    assert cache.read() == {}
    assert cache.save({"a": GOOD}) == {"a": GOOD}
    assert TimingCache(KEY).save({"b": GOOD, "a": Timing(2.0, 0.0, 1)}) == {"a": GOOD, "b": GOOD}  # the first stands
    assert TimingCache({**KEY, "threads": 2}).read() == {}
    assert cache.path.parent == cache_folder()
    assert not list(cache_folder().glob("*.part"))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x00garbage", "not trusted"),
        (b'{"key": {"processor": "a"', "not trusted"),
        (b"[]", "not trusted"),
        ({"key": {**KEY, "processor": "b"}, "timings": {}}, "another processor"),
        ({"key": KEY, "timings": {"k": [-1.0, 0.0, 1]}}, "the time of 'k' is -1.0"),
        ({"key": KEY, "timings": {"k": [float("nan"), 0.0, 1]}}, "the time of 'k' is nan"),
        ({"key": KEY, "timings": {"k": [1e-3, float("inf"), 1]}}, "the time of 'k'"),
        ({"key": KEY, "timings": {"k": [1e-3, 0.0]}}, "not trusted"),
        ({"key": KEY, "timings": {"k": ["1", 0.0, 1]}}, "the time of 'k' is '1'"),
    ],
)
def test_a_damaged_or_foreign_cache_is_rebuilt(content: Any, reason: str) -> None:
    told: list[str] = []
    cache = TimingCache(KEY, told.append)
    cache.path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    assert cache.read() == {}
    assert len(told) == 1
    assert reason in told[0]
    assert str(cache.path) in told[0]
    assert cache.save({"k": GOOD}) == cache.read() == {"k": GOOD}
    assert len(told) == 1


def python(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT)


def test_two_processes_lose_nothing() -> None:
    code = """
    from hw_models.measured.cache import TimingCache
    from hw_models.measured.timing import Timing
    for number in range(25):
        TimingCache({"processor": "a", "threads": 1}).save({f"%s {number}": Timing(1.0, 0.0, 1)})
    """
    processes = [python(code % name) for name in ("a", "b")]
    assert [process.wait() for process in processes] == [0, 0]
    assert set(TimingCache(KEY).read()) == {f"{name} {number}" for name in ("a", "b") for number in range(25)}


def test_a_dead_process_holds_no_lock(folder: Path) -> None:
    process = python(
        """
    import time
    from hw_models.measured.cache import TimingCache
    with TimingCache({"processor": "a", "threads": 1})._locked():
        open("%s", "w").close()
        time.sleep(600)
    """
        % (held := folder / "held")
    )
    while not held.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert TimingCache(KEY).save({"a": GOOD}) == {"a": GOOD}


# The target


def test_the_table_of_a_network(counted: list[str], network: nn.Module) -> None:
    seen: list[tuple[int, int, str]] = []
    target = hw_models.load_target("cpu", progress=lambda *report: seen.append(report))
    table = target.cost_table(workload(network))
    assert table.metrics == ("latency", "storage")
    assert table.cycles is None
    assert table.provenance.startswith("measured on ")
    assert "1 thread, TVM" in table.provenance
    for index, layer in enumerate(table.workload.layers):
        eight = [kernel for kernel in candidates(Conv.of(layer), 8, 8, False, None) if kernel.name == "int8 4x4"]
        assert table.metric("latency")[index, 7, 7] == pytest.approx(seconds(eight[0]).median_s)
    assert [done for done, _, _ in seen] == [0, 1, 2, 3, 4, 5]
    assert {total for _, total, _ in seen} == {5}
    assert [note for _, _, note in seen] == [*table.workload.names, ""]
    # Once is enough, for another process too.
    before = list(counted)
    again = hw_models.load_target("cpu").cost_table(workload(network))
    assert counted == before
    assert np.array_equal(again.metric("latency"), table.metric("latency"), equal_nan=True)
    # Other conditions are another cache.
    hw_models.load_target("cpu", threads=2).cost_table(workload(network))
    assert len(counted) == 2 * len(before)


def test_shapes_are_measured_once_and_calls_add_up(counted: list[str]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(self.first(x)))

    table = hw_models.load_target("cpu").cost_table(hw_models.trace(Twice(), torch.zeros(1, 4, 9)))
    assert len(counted) == len(set(counted))
    assert np.allclose(table.metric("latency")[0], 2 * table.metric("latency")[1], equal_nan=True)


def test_layers_that_no_kernel_covers_are_all_named_first(counted: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from hw_models.tvm_cpu import kernels

    network = nn.Sequential(nn.Linear(4, 13), nn.Linear(13, 4), nn.Linear(4, 70000), nn.Linear(70000, 4))
    traced = hw_models.trace(network, torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"cpu can't compute 2 of 4 layers: '1' \(13 channels.*\); '3' \(.*70000 products"):
        hw_models.load_target("cpu").cost_table(traced)
    monkeypatch.setattr(kernels, "candidates", lambda *of: [k for k in candidates(*of) if k.a_bits < 8])
    with pytest.raises(ValueError, match=r"'0' \(no kernel for w1/a8\)"):
        hw_models.load_target("cpu").cost_table(hw_models.trace(nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 4)))
    assert not counted


KILLED = """
import os, signal, sys, torch
import hw_models
from hw_models.tvm_cpu import kernels, target as targets
from tests.conftest import small_network
from tests.hw_models.stand_in_kernels import candidates
from tests.hw_models.test_measured_latency import seconds
kernels.candidates = candidates
targets.measure = lambda some, cpu, **_: {kernel: seconds(kernel) for kernel in some}
targets.Reference = lambda *_: lambda: 1e-4
def progress(done, total, note):
    if done == 2:
        os.kill(os.getpid(), signal.SIGKILL)
hw_models.load_target("cpu", progress=progress).cost_table(hw_models.trace(small_network(), torch.zeros(1, 1, 8, 8)))
"""


def test_a_killed_measurement_goes_on_where_it_was(counted: list[str], network: nn.Module) -> None:
    process = python(KILLED)
    assert process.wait() == -signal.SIGKILL
    hw_models.load_target("cpu").cost_table(workload(network))
    first, second, *others = (Conv.of(layer) for layer in workload(network).layers)
    checked = [f"{conv.in_channels} int8 4x4" for conv in (first, second)]  # one kernel of each shape that was measured
    assert counted[-2:] == checked
    assert {name.split()[0] for name in counted[:-2]} == {str(conv.in_channels) for conv in others}


def test_refused_targets(stand_ins: None) -> None:
    for text, reason in (
        ("znver99", "LLVM knows no processor 'znver99'"),
        ('{"kind": "llvm"', "it is not JSON"),
        ('{"mcpu": "generic"}', "its kind must be 'llvm', not None"),
        ('{"kind": "cuda"}', "not 'cuda'"),
        ('{"kind": "llvm", "nokey": 1}', "nokey"),
        ('{"kind": "llvm", "mtriple": "bogus-x-y"}', "LLVM knows no machine 'bogus-x-y'"),
        ('{"kind": "llvm", "mattr": ["+nothing"]}', "LLVM knows no feature '\\+nothing'"),
    ):
        with pytest.raises(ValueError, match=reason) as caught:
            hw_models.load_target("cpu", target=text)
        assert f"TVM refuses the target {text!r}" in str(caught.value)
        assert "\n" not in str(caught.value)
    other = "aarch64-linux-gnu" if "x86" in platform.machine() else "x86_64-linux-gnu"
    with pytest.raises(ValueError, match="this machine .* can't run the target"):
        hw_models.load_target("cpu", target=json.dumps({"kind": "llvm", "mtriple": other}))
    with pytest.raises(ValueError, match="threads must be a positive integer, not 0"):
        hw_models.load_target("cpu", threads=0)


# Real measuring


def test_measuring(stand_ins: None) -> None:
    cpu = hw_models.load_target("cpu").cpu  # type: ignore[attr-defined]
    few, many = Spin(CONV, 8, 8, False, "int8 few", 1), Spin(CONV, 8, 8, False, "int8 many", 1000)
    for cold in (False, True):
        said: list[str] = []
        timings = measure([few, many, few], cpu, say=said.append, cold=cold)
        assert said == ["compiling", "measuring"]
        assert list(timings) == [few, many]
        assert timings[few].median_s > 0
        for timing in timings.values():
            assert timing.spread_s >= 0
            assert timing.repeats >= 3
    assert measure([], cpu) == {}


def test_a_kernel_that_does_not_compile_is_named(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = hw_models.load_target("cpu").cpu  # type: ignore[attr-defined]
    functions = Spin.functions

    def broken(self: Spin, symbol: str) -> dict[str, Any]:
        if self.name == "bad 4x4":
            raise RuntimeError("lines\nof reasons")
        return functions(self, symbol)

    monkeypatch.setattr(Spin, "functions", broken)
    good, bad = Spin(CONV, 8, 8, False, "int8 4x4", 1), Spin(CONV, 8, 8, False, "bad 4x4", 1)
    with pytest.raises(BuildError, match="the kernel bad 4x4 of Conv.* doesn't compile for .*: of reasons"):
        measure([good, bad], cpu)


# A board


@pytest.fixture
def servers() -> Iterator[list[tuple[int, subprocess.Popen[bytes]]]]:
    """Two local RPC servers, each in a process group of its own: TVM's may stop listening after a session that ended badly."""
    pytest.importorskip("tvm")
    started = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "tvm.exec.rpc_server", "--host", "127.0.0.1", "--port", str(port)]
        quiet = subprocess.DEVNULL
        process = subprocess.Popen([*command, "--port-end", str(port + 1)], start_new_session=True, stdout=quiet, stderr=quiet)
        started.append((port, process))
    for port, _ in started:
        for _ in range(600):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
    yield started
    for _, process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_board_is_measured_and_may_die(
    stand_ins: None, network: nn.Module, servers: list[tuple[int, subprocess.Popen[bytes]]]
) -> None:
    (port, _), (other, process) = servers
    name, llvm = f"rpc:127.0.0.1:{port}", json.dumps({"kind": "llvm"})
    with pytest.raises(ValueError, match="needs --target"):
        hw_models.load_target(name)
    small = hw_models.trace(nn.Sequential(nn.Linear(4, 4)), torch.zeros(1, 4))
    target = hw_models.load_target(name, target=llvm)
    assert isinstance(target, targets.CpuTarget)
    notes: list[str] = []
    table = replace(target, progress=lambda done, total, note: notes.append(note)).cost_table(small)
    assert notes[:3] == ["0", "compiling 0", "measuring 0"]
    assert table.target == name
    assert f"at 127.0.0.1:{port}" in table.provenance
    assert np.array_equal(target.cost_table(small).metric("latency"), table.metric("latency"), equal_nan=True)

    def kill(done: int, total: int, note: str) -> None:
        if done == 1:
            os.killpg(process.pid, signal.SIGKILL)

    dying = replace(target, board=("127.0.0.1", other), progress=kill)
    with pytest.raises(ConnectionError, match=rf"the RPC peer 127.0.0.1:{other} failed.*is kept") as caught:
        dying.cost_table(workload(network))
    assert "\n" not in str(caught.value)
    kept = [kernel for kernel in TimingCache(target.key).read() if kernel.startswith("int8 4x4")]
    assert len(kept) == 2
    with pytest.raises(ConnectionError, match=f"no RPC server answers at 127.0.0.1:{other}"):
        hw_models.load_target(f"rpc:127.0.0.1:{other}", target=llvm)


def test_a_board_that_accepts_and_never_answers(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "ANSWER_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"no RPC server answers at {address} within 0.5 s: .*busy") as caught:
            hw_models.load_target(f"rpc:{address}", target="generic")
        assert "\n" not in str(caught.value)
        # Lets go of the thread that is still waiting.
        peer, _ = silent.accept()
        peer.close()


def test_addresses(stand_ins: None) -> None:
    for name in ("rpc:board", "rpc::1", "rpc:board:0", "rpc:board:99999", "rpc:board:x"):
        with pytest.raises(ValueError, match=f"'{name}' is not the address of a board"):
            hw_models.load_target(name, target="generic")
    assert cross_compiler(None) is None
    with pytest.raises(ValueError, match="linking for riscv64-unknown-linux-musl needs riscv64-linux-musl-gcc"):
        cross_compiler("riscv64-unknown-linux-musl")


# The commands


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small_job.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "small_job", raising=False)


def test_a_search_on_measured_latency(counted: list[str], task: None, capsys: pytest.CaptureFixture[str]) -> None:
    asked = [*SMALL[:-1], "0.9", "--hw", "cpu", "--finetune-epochs", "0", "--evaluations", "5"]
    assert run_command(lambda: search.main([*asked, "--out", "run"])) == 0
    out, err = capsys.readouterr()
    assert not err
    assert "costs are measured on" in " ".join(out.split())
    Path("run/result.json").unlink()
    resume = ["--resume", "run"]
    assert run_command(lambda: search.main(resume)) == 0
    Path("run/result.json").unlink()
    capsys.readouterr()

    config = yaml.safe_load(Path("run/config.yaml").read_text())
    machine = json.loads(config["signature"]["machine"])
    config["signature"]["machine"] = json.dumps({**machine, "processor": "Z80"})
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    counted.clear()
    for path in cache_folder().glob("*.json"):
        path.unlink()
    assert run_command(lambda: search.main(resume)) == EXIT_BAD_INPUT
    error = capsys.readouterr().err
    assert f"run began with latencies measured with processor Z80, here it is {machine['processor']}" in error
    assert not counted


def test_show_measured(counted: list[str], task: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert hardware.main(["show", "cpu"]) == 0
    assert "kernels compiled with TVM" in capsys.readouterr().out
    assert hardware.main(["show", "cpu", "--network", "small_job:network", "--threads", "2"]) == 0
    assert "2 threads" in " ".join(capsys.readouterr().out.split())


def test_measuring_leaves_the_process_all_its_cores() -> None:
    """TVM's pool of threads binds the thread that sets it up to the first core."""
    before = os.sched_getaffinity(0)
    with kept_processors():
        os.sched_setaffinity(0, {min(before)})
    assert os.sched_getaffinity(0) == before
