"""The BISMO overlay's stages: cycles, DRAM traffic and runs of its RTL, and a plain simulation of the stages as a rival."""

from __future__ import annotations

import csv
import math
from collections import deque
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from hw_models.bismo_overlay import BOUNDS, BismoOverlayTarget, Gemm
from hw_models.tracing import trace
from tests.conftest import small_network

# Cycle-accurate emulation of the version-1 RTL with Dk = 64 and buffers of 1024 words:
# Dm = Dn, M, K, N, weight bits, activation bits: cycles, bytes read, bytes written, ideal cycles, execute runs, fetch runs
RTL = """
2 2 2048 2 1 1: 305 1024 16 32 1 2
2 2 2048 2 4 8: 2897 6144 16 1024 32 2
2 2 512 2 4 4: 869 1024 16 128 16 2
2 2 512 2 6 6: 1709 1536 16 288 36 2
2 4 512 4 1 2: 491 1024 64 64 8 6
2 4 512 4 6 6: 5945 4608 64 1152 144 6
2 8 2048 8 2 2: 4409 20480 256 2048 64 20
2 8 2048 8 8 8: 65681 81920 256 32768 1024 20
2 8 512 64 3 3: 45149 61440 2048 9216 1152 160
2 8 512 64 8 2: 80165 139264 2048 16384 2048 160
2 10 500 6 1 1: 983 2304 240 120 15 18
2 10 500 6 6 6: 21389 13824 240 4320 540 18
2 16 512 16 2 1: 5159 17408 1024 1024 128 72
2 16 1024 16 1 2: 6227 20480 1024 2048 128 72
2 32 1024 32 1 1: 18047 69632 4096 4096 256 272
2 32 1024 32 4 2: 96569 270336 4096 32768 2048 272
2 64 512 8 1 1: 6683 16896 2048 1024 128 132
2 64 512 8 2 4: 40157 34816 2048 8192 1024 132
8 8 512 8 1 1: 407 1024 256 8 1 2
8 8 512 8 8 8: 3761 8192 256 512 64 2
8 16 1024 16 3 5: 4283 22528 1024 960 60 6
8 32 27 128 1 1: 9923 40960 16384 512 64 80
8 64 64 64 1 1: 8945 36864 16384 512 64 72
8 64 576 49 1 1: 11891 64512 14336 896 56 63
8 64 576 49 2 8: 43649 172032 14336 14336 896 63
8 64 576 49 4 4: 43391 258048 14336 14336 896 63
"""
TARGETS = ("bismo-overlay", "bismo-overlay-ultra96")


def overlay(**fields: Any) -> BismoOverlayTarget:
    """An overlay like that of the RTL's emulation, but for `fields`."""
    array = {"dm": 2, "dk": 64, "dn": 2, "lhs_entries": 1024, "rhs_entries": 1024}
    rest = {"model": "bismo-overlay", "name": "test", "description": "", "clock_mhz": 200, "batch": 1}
    return BismoOverlayTarget.model_validate({**array, **rest, **fields})


def shipped(name: str) -> BismoOverlayTarget:
    text = resources.files("hw_models").joinpath(f"targets/{name}.yaml").read_text(encoding="utf-8")
    return BismoOverlayTarget.model_validate(yaml.safe_load(text))


def run_stages(target: BismoOverlayTarget, stages: list[deque[tuple[str, Any]]]) -> int:
    """Let the stages do what they are told; returns the cycle at which the last of them is done."""
    # A token is the time it was sent at. Each stage goes on until it lacks one, and again when another has sent it.
    tokens: dict[str, deque[int]] = {
        "free operands": deque([0] * target.fetch_execute_tokens),
        "operands": deque(),
        "free result": deque([0] * target.execute_write_tokens),
        "result": deque(),
    }
    clocks = [0, 0, 0]
    while any(stages):
        waiting = sum(map(len, stages))
        for index, stage in enumerate(stages):
            while stage:
                kind, what = stage[0]
                if kind == "receive":
                    if not tokens[what]:
                        break
                    clocks[index] = max(clocks[index], tokens[what].popleft())
                elif kind == "run":
                    clocks[index] += what
                else:
                    tokens[what].append(clocks[index])
                stage.popleft()
        assert sum(map(len, stages)) < waiting, "deadlock"
    return clocks[-1]


def simulate(target: BismoOverlayTarget, m: int, k: int, n: int, w_bits: int, a_bits: int) -> Gemm:
    """Write down what each stage is told to do, one instruction after the other, and let the stages do it."""
    tm, tn = math.ceil(m / target.dm), math.ceil(n / target.dn)
    row_bits = math.lcm(target.dk, 8 * target.row_alignment_bytes)
    tk = math.ceil(k / row_bits) * row_bits // target.dk
    left_region = target.lhs_entries // target.fetch_execute_tokens
    right_region = target.rhs_entries // target.fetch_execute_tokens
    limit = min(left_region // w_bits, right_region // a_bits)
    slices = [min(limit, tk - start) for start in range(0, tk, limit)]
    right_fits = tk * a_bits <= right_region

    read_bytes = write_bytes = execute_cycles = execute_runs = fetch_runs = 0
    fetch: list[tuple[str, Any]] = []
    execute: list[tuple[str, Any]] = []
    write: list[tuple[str, Any]] = []

    def read(rows: int, words: int, planes: int, blocks: int) -> None:
        nonlocal read_bytes, fetch_runs
        fetch_runs += 1
        read_bytes += rows * words * planes * target.dk // 8
        beats = math.ceil(rows * words * planes * target.dk / target.dram_read_bits_per_cycle)
        fetch.append(("run", beats + 26 + 2 * (target.dm + target.dn) + 2 * (blocks - 1)))

    for _ in range(tn):
        for row_tile in range(tm):
            for index, words in enumerate(slices):
                fetch.append(("receive", "free operands"))
                if right_fits and row_tile == index == 0:
                    read(target.dn, tk, a_bits, blocks=1 if tn == 1 else a_bits)
                whole_blocks = 1 if tm == 1 else w_bits
                read(target.dm, words, w_bits, blocks=whole_blocks if len(slices) == 1 else w_bits * target.dm)
                if not right_fits:
                    read(target.dn, words, a_bits, blocks=a_bits * target.dn)
                fetch.append(("send", "operands"))

                execute.append(("receive", "operands"))
                is_last = index == len(slices) - 1
                if is_last:
                    execute.append(("receive", "free result"))
                for _ in range(w_bits * a_bits):
                    execute_runs += 1
                    execute_cycles += words
                    execute.append(("run", words + 16 + 15))
                execute.append(("send", "free operands"))
                if is_last:
                    execute.append(("send", "result"))
            write.append(("receive", "result"))
            write.append(("run", 34 + target.dn * (3 + 2 * math.ceil(32 * target.dm / target.dram_write_bits_per_cycle))))
            write.append(("send", "free result"))
            write_bytes += 4 * target.dm * target.dn

    done = run_stages(target, [deque(fetch), deque(execute), deque(write)])
    # The host reads at poll_cycles - 1, 2 poll_cycles - 1, ...
    seen = next(t for t in range(done, done + target.poll_cycles) if (t + 1) % target.poll_cycles == 0)
    return Gemm(seen, read_bytes, write_bytes, execute_cycles, execute_runs, fetch_runs)


@pytest.mark.parametrize("line", RTL.strip().splitlines())
def test_every_figure_of_the_rtl_to_the_last_digit(line: str) -> None:
    arguments, figures = (tuple(map(int, part.split())) for part in line.split(":"))
    size, *product = arguments
    assert overlay(dm=size, dn=size).gemm(*product) == Gemm(*figures)


def test_the_whole_reference_table_to_the_last_digit(reference: Path) -> None:
    with (reference / "bismo_rtl_cycles.csv").open(encoding="utf-8") as file:
        rows = [{name: int(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert len(rows) >= 80
    for row in rows:
        depths = {"lhs_entries": row["lhs_entries"], "rhs_entries": row["rhs_entries"]}
        gemm = overlay(dm=row["Dm"], dk=row["Dk"], dn=row["Dn"], **depths).gemm(
            row["M"], row["K"], row["N"], row["wbits"], row["abits"]
        )
        names = ("cycles", "rd_bytes", "wr_bytes", "ideal_exec_cycles", "n_exec_runs", "n_fetch_runs")
        assert gemm == Gemm(*(row[name] for name in names)), row


BIT = st.integers(1, 8)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), w_bits=BIT, a_bits=BIT)
def test_matrix_powers_equal_the_simulated_stages(data: st.DataObject, w_bits: int, a_bits: int) -> None:
    # Small buffers, so that stripes must be split; odd ports and arrays, so that beats are rounded.
    size, tokens = st.integers(1, 5), st.sampled_from([1, 2, 3, 4])
    entries = st.sampled_from([32, 50, 64, 96, 160, 1024])
    target = overlay(
        dm=data.draw(size),
        dn=data.draw(size),
        dk=data.draw(st.sampled_from([64, 96, 256])),
        lhs_entries=data.draw(entries),
        rhs_entries=data.draw(entries),
        dram_read_bits_per_cycle=data.draw(st.sampled_from([32, 64, 128, 1024])),
        dram_write_bits_per_cycle=data.draw(st.sampled_from([32, 64, 128])),
        fetch_execute_tokens=data.draw(tokens),
        execute_write_tokens=data.draw(tokens),
        poll_cycles=data.draw(st.sampled_from([1, 6])),
    )
    m, n = data.draw(st.integers(1, 7 * target.dm)), data.draw(st.integers(1, 7 * target.dn))
    k = data.draw(st.integers(1, 4000))
    assert target.gemm(m, k, n, w_bits, a_bits) == simulate(target, m, k, n, w_bits, a_bits)


def test_a_long_product_is_as_exact_as_a_short_one() -> None:
    target = overlay(dm=8, dn=8)
    assert target.gemm(64, 700, 8 * 300, 1, 2) == simulate(target, 64, 700, 8 * 300, 1, 2)


@settings(max_examples=100, deadline=None)
@given(m=st.integers(1, 500), k=st.integers(1, 4000), n=st.integers(1, 20000), w_bits=BIT, a_bits=BIT)
def test_never_faster_than_the_array_and_never_less_for_more(m: int, k: int, n: int, w_bits: int, a_bits: int) -> None:
    target = shipped("bismo-overlay")
    gemm = target.gemm(m, k, n, w_bits, a_bits)
    assert gemm.cycles >= gemm.execute_cycles
    assert gemm.cycles >= gemm.read_bytes / 8
    assert gemm.cycles >= gemm.write_bytes / 8
    larger = [(m + target.dm, k, n), (m, k + 512, n), (m, k, n + target.dn)]
    for more in (target.gemm(*shape, w_bits, a_bits) for shape in larger):
        assert more.cycles > gemm.cycles
    # All stripes fit their buffers here; where one must be split, the finer slices can overlap better.
    for bits in ((min(w_bits + 1, 8), a_bits), (w_bits, min(a_bits + 1, 8))):
        assert target.gemm(m, k, n, *bits).cycles >= gemm.cycles


def test_padding_costs_what_is_padded_to() -> None:
    # Rows of 64 bytes, tiles of 8 rows and 8 columns.
    target = overlay(dm=8, dn=8)
    assert target.gemm(1, 1, 1, 3, 5) == target.gemm(8, 512, 8, 3, 5)
    assert target.gemm(9, 513, 9, 3, 5) == target.gemm(16, 1024, 16, 3, 5)


def test_a_stripe_that_does_not_fit_is_split_along_k() -> None:
    # 16 words a row and plane. A left region holds 8 words: 4 of each of 2 planes, so 4 slices.
    product = (6, 1024, 10, 2, 1)  # 3 x 5 tiles
    small = overlay(lhs_entries=32, rhs_entries=32).gemm(*product)
    assert small.fetch_runs == 15 * (4 + 4)
    assert small.execute_runs == 15 * 4 * 2
    assert small.read_bytes == 15 * 128 * (2 * 2 + 2 * 1)
    # The right stripe of 16 words fits a region: once per column.
    mixed = overlay(lhs_entries=32, rhs_entries=64).gemm(*product)
    assert mixed.fetch_runs == 15 * 4 + 5
    assert mixed.read_bytes == 15 * 128 * 2 * 2 + 5 * 128 * 2
    whole = overlay().gemm(*product)
    assert whole.fetch_runs == 15 + 5
    for gemm in (small, mixed):
        assert gemm.execute_cycles == whole.execute_cycles
        assert gemm.write_bytes == whole.write_bytes
    assert small.cycles > mixed.cycles > whole.cycles


def test_published_peaks_and_resources() -> None:
    pynq, ultra96 = map(shipped, TARGETS)
    # 6.5 and 15.4 binary TOPS, of which the paper cuts the first off and rounds the second.
    assert pynq.peak_binary_tops == pytest.approx(6.5536)
    assert ultra96.peak_binary_tops == pytest.approx(15.36)
    assert (pynq.power_w, ultra96.power_w) == (5, 8)
    assert overlay().luts == pytest.approx(4 * (1.17 * 64 + 44.1 + 120.1))
    assert pynq.luts == pytest.approx(29678.08)
    assert overlay().brams == 2 * (2 + 2)
    assert overlay(dm=3, dn=5, dk=65, lhs_entries=1025, rhs_entries=1024).brams == 3 * (3 * 2 + 5)
    # What the chips have (XC7Z020: 53,200 and 140; ZU3EG: 70,560 and 216) must hold them.
    assert pynq.luts < 53_200
    assert ultra96.luts < 70_560
    assert (pynq.brams, ultra96.brams) == (128, 160)


def test_layers_are_priced_as_their_matrix_products() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 20, 3, stride=2, padding=1)
            self.depthwise = nn.Conv2d(20, 40, 3, groups=20)
            self.grouped = nn.Conv2d(40, 24, 3, groups=2)
            self.head = nn.Linear(24 * 9, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.grouped(self.depthwise(self.conv(x))).flatten(1))

    target = overlay(dm=8, dn=4)
    workload = trace(Network(), torch.zeros(1, 3, 14, 14))  # 7 x 7, 5 x 5 and 3 x 3 positions
    products = [(20, 27, 49, 3), (16, 72, 25, 3 * 3), (12, 180, 9, 2 * 3), (10, 216, 3, 1)]  # M, K, N, times
    table = target.cost_table(workload, batch=3)
    assert table.cycles is not None
    assert table.latency_s is not None
    for w_bits, a_bits in ((1, 1), (8, 3), (2, 8)):
        for index, (m, k, n, times) in enumerate(products):
            gemm = target.gemm(m, k, n, w_bits, a_bits)
            cell = index, w_bits - 1, a_bits - 1
            assert table.cycles[cell] == times * gemm.cycles
            assert table.counters["read_bytes"][cell] == times * gemm.read_bytes
            assert table.counters["execute_runs"][cell] == times * gemm.execute_runs
    few = table.supported
    assert few[:, :8, :8].all()
    assert not few[:, 8:].any()
    np.testing.assert_allclose(table.latency_s[few], table.cycles[few] / 200e6)
    assert table.metrics == ("latency", "storage")
    assert table.provenance == "estimated"
    one = target.cost_table(workload)
    assert one.cycles is not None
    assert one.batch == 1
    np.testing.assert_array_equal(table.cycles[:3], 3 * one.cycles[:3])


@pytest.mark.parametrize("name", TARGETS)
def test_shipped_targets_price_networks_with_energy(name: str) -> None:
    target = shipped(name)
    table = target.cost_table(trace(small_network(), torch.zeros(1, 1, 8, 8)))
    assert target.name == table.target == name
    assert table.latency_s is not None
    assert table.energy_j is not None
    assert target.power_w is not None
    np.testing.assert_allclose(table.energy_j, target.power_w * table.latency_s)
    assert table.bound is not None
    assert set(np.unique(table.bound)) <= set(range(len(BOUNDS)))


def test_the_bound_is_the_busiest_stage() -> None:
    def bounds(target: BismoOverlayTarget) -> set[str]:
        table = target.cost_table(trace(nn.Linear(512, 64), torch.zeros(32, 512)), batch=32)
        assert table.bound is not None
        return {table.bounds[table.bound[0, 0, 0]], table.bounds[table.bound[0, 7, 7]]}

    assert bounds(overlay()) == {"fetch", "execute"}
    assert bounds(overlay(dram_read_bits_per_cycle=2)) == {"fetch"}
    assert bounds(overlay(dn=16, dram_write_bits_per_cycle=1)) == {"write", "execute"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1, 1, 1, 1), "m must be a positive integer, not 0"),
        ((1, -3, 1, 1, 1), "k must be a positive integer, not -3"),
        ((1, 1, 0, 1, 1), "n must be a positive integer, not 0"),
        ((1, 1, 2.0, 1, 1), "n must be a positive integer, not 2.0"),
        ((True, 1, 1, 1, 1), "m must be a positive integer, not True"),
        ((1, 1, 1, 0, 1), "w_bits must be a positive integer, not 0"),
        ((1, 1, 1, 9, 1), "w_bits must be from 1 to 8, not 9"),
        ((1, 1, 1, 1, 32), "a_bits must be from 1 to 8, not 32"),
    ],
)
def test_bad_products_are_named(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        overlay().gemm(*arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lhs_entries": 31}, "lhs_entries is 31; one word of 8 bit planes per region needs 32"),
        ({"rhs_entries": 28}, "rhs_entries is 28"),
        ({"power_w": 5}, "power_w and power_source come together"),
        ({"power_source": "somewhere"}, "power_w and power_source come together"),
        ({"dm": 0}, "dm"),
        ({"dn": 2.5}, "dn"),
        ({"clock_mhz": math.inf}, "clock_mhz"),
        ({"columns": 8}, "columns"),
    ],
)
def test_bad_targets_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        overlay(**fields)


@pytest.mark.parametrize("batch", [0, -1, 1.5, True])
def test_bad_batches_are_named(batch: Any) -> None:
    with pytest.raises(ValueError, match="batch must be a positive integer"):
        overlay().cost_table(trace(nn.Linear(4, 4), torch.zeros(1, 4)), batch=batch)
