"""BitFusion: layer results of its authors' simulator, its paper's comparison with Eyeriss, and a search without short cuts."""

from __future__ import annotations

import csv
import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import hw_models
from experiments import published_hardware
from hw_models.bitfusion import COUNTERS, BitFusionTarget, Schedule, Shape
from hw_models.widths import place_of

PER_CHANNEL, BROADCAST = "per_channel_x_C", "as_IC1_OCC"  # as the reference names the two ways to run a depthwise layer
COLUMNS = (
    "total_cycles",
    "compute_cycles",
    "mem_stall_cycles",
    "dram_rd_bits",
    "dram_wr_bits",
    "wbuf_rd_bits",
    "wbuf_wr_bits",
)
COLUMNS += ("ibuf_rd_bits", "ibuf_wr_bits", "obuf_rd_bits", "obuf_wr_bits")
TARGETS = {"bf_e": "bitfusion", "bf16": "bitfusion-16bit"}

# What the authors' simulator says of a layer. First the layer: configuration, way to run a depthwise layer, kernel, output
# size, stride, input and output channels, first of its network, batch, weight and activation bits. Then COLUMNS, then nJ.
GOLDEN: list[tuple[tuple, tuple[int, ...], float]] = [
    (
        ("bf_e", "", 7, 112, 2, 3, 64, 1, 16, 4, 4),
        (4896598, 1204224, 3692374, 529104896, 411041792, 7552892928, 49152, 7552892928, 118013952, 822083584, 822083584),
        15096652.0328,
    ),
    (
        ("bf_e", "", 7, 112, 2, 3, 64, 1, 1, 2, 2),
        (286985, 25088, 261897, 29410816, 25690112, 236027904, 32768, 236027904, 3687936, 51380224, 51380224),
        857371.596,
    ),
    (
        ("bf_e", "", 7, 112, 2, 3, 64, 1, 16, 8, 8),
        (5511425, 4014080, 1497345, 647151616, 411041792, 15105785856, 81920, 15105785856, 236027904, 822083584, 822083584),
        18151956.9315,
    ),
    (
        ("bf_e", "", 3, 112, 2, 3, 32, 1, 16, 8, 4),
        (2253782, 200704, 2053078, 227205120, 205520896, 1387266048, 8192, 693633024, 21676032, 411041792, 411041792),
        6655103.5062,
    ),
    (
        ("bf_e", "", 11, 55, 4, 3, 64, 1, 1, 4, 4),
        (87923, 36300, 51623, 10685804, 6195200, 281107200, 98304, 281107200, 4392300, 12390400, 12390400),
        286292.6633,
    ),
    (
        ("bf_e", "", 3, 13, 1, 256, 256, 0, 1, 2, 2),
        (35201, 18432, 16769, 4661248, 2097152, 301989888, 2359296, 301989888, 204800, 4194304, 4194304),
        130659.4175,
    ),
    (
        ("bf_e", "", 3, 32, 1, 128, 128, 0, 1, 2, 2),
        (51542, 36864, 14678, 5701632, 4194304, 301989888, 327680, 301989888, 1179648, 8388608, 8388608),
        182553.5923,
    ),
    (
        ("bf_e", "", 1, 112, 1, 32, 64, 0, 1, 8, 4),
        (276054, 25088, 250966, 27312128, 25690112, 205520896, 16384, 102760448, 1605632, 51380224, 51380224),
        817076.2349,
    ),
    (
        ("bf_e", "", 3, 13, 1, 256, 256, 0, 1, 8, 2),
        (93569, 56448, 37121, 11542528, 6422528, 924844032, 4718592, 231211008, 401408, 12845056, 12845056),
        317804.7564,
    ),
    (
        ("bf_e", "", 1, 14, 2, 128, 256, 0, 1, 8, 4),
        (18614, 6272, 12342, 1968128, 1605632, 51380224, 262144, 25690112, 100352, 3211264, 3211264),
        58066.8012,
    ),
    (
        ("bf_e", "", 1, 1, 1, 400, 120, 0, 16, 2, 8),
        (1958, 448, 1510, 224256, 65536, 1536000, 107520, 6144000, 51200, 126976, 126976),
        4872.8554,
    ),
    (
        ("bf_e", "", 1, 1, 1, 9216, 4096, 0, 16, 4, 4),
        (906583, 294912, 611671, 171966464, 2097152, 2415919104, 150994944, 2415919104, 18874368, 39845888, 39845888),
        2886337.6947,
    ),
    (
        ("bf_e", "", 1, 1, 1, 1024, 1000, 0, 16, 6, 4),
        (38571, 16384, 22187, 6881280, 524288, 100663296, 6291456, 67108864, 65536, 1572864, 1572864),
        121433.9356,
    ),
    (
        ("bf_e", "", 1, 1, 1, 4096, 1000, 0, 16, 4, 8),
        (111958, 65536, 46422, 19398656, 2097152, 268435456, 16777216, 536870912, 524288, 4194304, 4194304),
        376500.6039,
    ),
    (
        ("bf_e", "", 1, 1, 1, 9216, 4096, 0, 16, 3, 5),
        (734550, 589824, 144726, 138936320, 2097152, 1811939328, 113246208, 3019898880, 23592960, 77594624, 77594624),
        2486692.7978,
    ),
    (
        ("bf_e", PER_CHANNEL, 3, 56, 2, 64, 64, 0, 1, 3, 5),
        (2164544, 1806336, 358208, 210058560, 205520896, 5419008, 6144, 9031680, 4531520, 211943424, 211943424),
        6682053.7599,
    ),
    (
        ("bf_e", PER_CHANNEL, 3, 28, 1, 256, 256, 0, 16, 4, 8),
        (34554880, 28901376, 5653504, 3346169856, 3288334336, 115605504, 32768, 231211008, 57802752, 3391094784, 3391094784),
        106695454.2464,
    ),
    (
        ("bf_e", PER_CHANNEL, 3, 28, 1, 256, 256, 0, 16, 2, 8),
        (34554880, 28901376, 5653504, 3346169856, 3288334336, 57802752, 32768, 231211008, 57802752, 3391094784, 3391094784),
        106694219.2527,
    ),
    (
        ("bf_e", PER_CHANNEL, 3, 112, 1, 32, 32, 0, 1, 8, 8),
        (4307904, 3612672, 695232, 416063488, 411041792, 28901376, 4096, 28901376, 5017600, 423886848, 423886848),
        13303873.3398,
    ),
    (
        ("bf_e", PER_CHANNEL, 3, 56, 1, 128, 128, 0, 1, 4, 8),
        (4308096, 3612672, 695424, 416075776, 411041792, 14450688, 16384, 28901376, 5017600, 423886848, 423886848),
        13303749.2667,
    ),
    (
        ("bf_e", BROADCAST, 3, 112, 1, 32, 32, 0, 1, 6, 4),
        (134244, 112896, 21348, 12929600, 12845056, 21676032, 6144, 14450688, 78400, 25690112, 25690112),
        417223.103,
    ),
    (
        ("bf_e", BROADCAST, 3, 28, 1, 256, 256, 0, 1, 2, 2),
        (67603, 56448, 11155, 6557128, 6422528, 3612672, 131072, 3612672, 3528, 12845056, 12845056),
        209626.8811,
    ),
    (
        ("bf_e", BROADCAST, 3, 56, 1, 128, 128, 0, 16, 2, 2),
        (2142002, 1806336, 335666, 205743232, 205520896, 115605504, 65536, 115605504, 156800, 411041792, 411041792),
        6646672.8384,
    ),
    (
        ("bf_e", BROADCAST, 3, 112, 1, 32, 32, 0, 1, 4, 4),
        (134255, 112896, 21359, 12931648, 12845056, 14450688, 8192, 14450688, 78400, 25690112, 25690112),
        417099.508,
    ),
    (
        ("bf_e", BROADCAST, 3, 28, 1, 256, 256, 0, 1, 2, 8),
        (67146, 56448, 10698, 6469408, 6422528, 3612672, 32768, 14450688, 14112, 12845056, 12845056),
        208954.0262,
    ),
    (
        ("bf16", "", 11, 55, 4, 3, 64, 1, 1, 16, 16),
        (557415, 556600, 815, 76848832, 6195200, 1124428800, 376832, 1124428800, 70276800, 12390400, 12390400),
        1484713.9384,
    ),
    (
        ("bf16", "", 11, 55, 4, 3, 64, 1, 16, 16, 16),
        (8906234, 8905600, 634, 1223928832, 99123200, 17990860800, 376832, 17990860800, 1124428800, 198246400, 198246400),
        23670429.1643,
    ),
    (
        ("bf16", "", 1, 28, 1, 128, 256, 0, 16, 16, 16),
        (3211692, 3211264, 428, 308805632, 102760448, 6576668672, 524288, 6576668672, 205520896, 205520896, 205520896),
        7558813.0808,
    ),
    (
        ("bf16", "", 1, 112, 1, 32, 64, 0, 16, 16, 16),
        (4817067, 3211264, 1605803, 513835008, 411041792, 6576668672, 32768, 6576668672, 102760448, 822083584, 822083584),
        15346856.4055,
    ),
    (
        ("bf16", "", 1, 1, 1, 4096, 4096, 0, 16, 16, 16),
        (2097547, 2097152, 395, 337641472, 2097152, 4294967296, 268435456, 4294967296, 67108864, 1075838976, 1075838976),
        6155349.4825,
    ),
    (
        ("bf16", "", 1, 1, 1, 8192, 1024, 0, 1, 16, 16),
        (700075, 65536, 634539, 134381568, 32768, 134217728, 134217728, 134217728, 131072, 557056, 557056),
        2048364.4188,
    ),
    (
        ("bf16", PER_CHANNEL, 3, 112, 1, 32, 32, 0, 1, 16, 16),
        (3615808, 3612672, 3136, 231219200, 205520896, 57802752, 8192, 57802752, 25690112, 218365952, 218365952),
        7570515.8094,
    ),
    (
        ("bf16", PER_CHANNEL, 3, 56, 1, 128, 128, 0, 16, 16, 16),
        (57818112, 57802752, 15360, 3699408896, 3288334336, 924844032, 32768, 924844032, 411041792, 3493855232, 3493855232),
        121126774.7961,
    ),
    (
        ("bf16", BROADCAST, 3, 112, 1, 32, 32, 0, 1, 16, 16),
        (225930, 225792, 138, 14659584, 12845056, 57802752, 8192, 57802752, 1806336, 25690112, 25690112),
        482048.8141,
    ),
    (
        ("bf16", BROADCAST, 3, 14, 2, 256, 256, 0, 16, 16, 16),
        (452095, 451584, 511, 26207232, 25690112, 115605504, 65536, 115605504, 451584, 51380224, 51380224),
        917076.8316,
    ),
]


def target(name: str = "bitfusion", **changes: object) -> BitFusionTarget:
    found = hw_models.load_target(name)
    assert isinstance(found, BitFusionTarget)
    return found.model_copy(update=changes)


def layer_and_call(mode: str, k: int, o: int, s: int, ic: int, oc: int) -> hw_models.Layer:
    """A layer of o x o outputs; for a depthwise one, `oc` channels."""
    kind, groups = ("depthwise", oc) if mode else ("conv", 1)
    sides = ((o, o), ((o - 1) * s + k,) * 2)
    call = hw_models.Call(sides[1], sides[0])
    return hw_models.Layer("layer", kind, oc if mode else ic, oc, (k, k), (s, s), (0, 0), (1, 1), groups, False, (call,))


def check(row: tuple, expected: tuple[int, ...], nanojoules: float) -> None:
    config, mode, k, o, s, ic, oc, first, batch, w, a = row
    machine = target(TARGETS[config], depthwise="per_channel" if mode == PER_CHANNEL else "broadcast")
    layer = layer_and_call(mode, k, o, s, ic, oc)
    shape, times = machine.shape(layer, layer.calls[0], batch, im2col=bool(first))
    found = machine.schedule(shape, np.array([w]), np.array([a]))
    ours = [times * int(found.cycles[0]), *(times * int(found.counters[name][0]) for name in COUNTERS)]
    assert dict(zip(COLUMNS, ours, strict=True)) == dict(zip(COLUMNS, expected, strict=True)), row
    assert times * found.energy_j[0] * 1e9 == pytest.approx(nanojoules, rel=1e-6), row


@pytest.mark.parametrize(("row", "expected", "nanojoules"), GOLDEN)
def test_layers_of_the_authors_simulator(row: tuple, expected: tuple[int, ...], nanojoules: float) -> None:
    check(row, expected, nanojoules)


def test_every_layer_of_the_reference(reference: Path) -> None:
    with (reference / "bitfusion_layers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 576
    for row in rows:
        numbers = [int(row[key]) for key in ("K", "O", "S", "IC", "OC", "im2col", "batch", "wbits", "abits")]
        expected = tuple(int(row[name]) for name in COLUMNS)
        check((row["config"], row["dw_mode"], *numbers), expected, float(row["energy_nJ"]))


def test_the_papers_averages_over_eyeriss() -> None:
    comparison = {row.network: row for row in published_hardware.over_eyeriss()}
    assert len(comparison) == 8
    for row in comparison.values():
        assert (f"{row.speedup:.2f}", f"{row.energy:.2f}") == (row.published_speedup, row.published_energy), row.network
    averages = [math.exp(np.log([getattr(row, x) for row in comparison.values()]).mean()) for x in ("speedup", "energy")]
    assert [f"{average:.2f}" for average in averages] == ["3.93", "5.12"]


def search_slowly(machine: BitFusionTarget, shape: Shape, w: int, a: int) -> tuple[int, float, dict[str, int]]:
    """Every tiling and every order of the loops, one after the other, as the rules in hw_models/bitfusion.py are written."""
    n, m, bw = machine.array_rows, machine.array_columns, machine.dram_bits_per_cycle
    depth = n * (8 // max(a, 2)) * (8 // max(w, 2))
    (kh, kw), (oh, ow) = shape.kernel, shape.output
    limits = [4 * getattr(machine, f"{x}_buffer_bytes") for x in ("weight", "activation", "output")]

    def powers(dimension: int, unit: int = 1) -> list[int]:
        return sorted({min(unit * 2**k, dimension) for k in range(12)})

    def up(x: int, y: int) -> int:
        return -(-x // y)

    best: tuple[int, float, dict[str, int]] = (2**62, math.inf, {})
    tilings = itertools.product(
        powers(shape.images), range(7), powers(shape.inputs), powers(shape.outputs, 1 if shape.im2col else m)
    )
    for b, k, ic, oc in tilings:
        th, tw = min(2**k, oh), min(2**k, ow)
        weights = up(kh * kw * ic, depth) * depth * oc * w
        if shape.im2col:
            activations = th * tw * kh * kw * ic * b * a
            compute = b * th * tw * up(oc, m) * up(kh * kw * ic, depth)
        else:
            down, across = ((size - 1) * s + x for size, s, x in zip((th, tw), shape.stride, shape.window, strict=True))
            activations = down * across * ic * b * a
            compute = b * up(oc, m) * th * tw * kh * kw * up(ic, depth)
        tiles = (weights, activations, th * tw * up(oc, m) * m * b * 32)
        if any(tile > limit for tile, limit in zip(tiles, limits, strict=True)):
            continue
        loops = {
            "b": up(shape.images, b),
            "w": up(ow, tw),
            "h": up(oh, th),
            "i": up(shape.inputs, ic),
            "o": up(shape.outputs, oc),
        }
        count = math.prod(loops.values())
        positions, columns = b * th * tw, up(oc, m) * m
        inner = up(kh * kw * ic, depth) * depth if shape.im2col else up(ic, depth) * depth * kh * kw
        costs = [
            inner * positions * (a + columns * (w + 32)),
            columns * positions * (32 + inner * (a + w)),
            inner * columns * (w + positions * (a + 32)),
        ]
        macs = kh * kw * ic * positions * oc
        read_weights, read_activations, outputs = [
            (macs * w, macs // oc * a, macs * 32),
            (macs * w, macs * a, oc * positions * 32),
            (macs // positions * w, macs * a, macs * 32),
        ][costs.index(min(costs))]
        for order in itertools.permutations("bwhio"):
            traffic, resident = [], []
            for tile, limit, depends in zip(tiles, limits, ("io", "bwhi", "bwho"), strict=True):
                moved, held, on_chip = tile, tile, True
                for loop in order:
                    if on_chip and loop in depends:
                        moved *= loops[loop]
                        on_chip = moved <= limit
                        held = moved if on_chip else held
                    elif not on_chip:
                        moved *= loops[loop]
                traffic.append(moved)
                resident.append(held)
            middle = up(sum(traffic) + traffic[2] - sum(resident) - resident[2], bw)
            stall = max(0, middle - count * compute) + up(sum(resident), bw) + up(resident[2], bw)
            values = (count * compute, stall, sum(traffic), traffic[2], count * read_weights, traffic[0])
            values += (count * read_activations, traffic[1], count * outputs + traffic[2], count * outputs + traffic[2])
            counters = dict(zip(COUNTERS, values, strict=True))
            total = count * compute + stall
            if total <= best[0]:
                energy = float(machine._energy({name: np.array(value) for name, value in counters.items()}))
                if (total, energy) < best[:2]:
                    best = (total, energy, counters)
    return best


sides = st.tuples(st.integers(1, 9), st.integers(1, 9))


@given(
    st.tuples(st.sampled_from([(1, 1), (3, 3), (3, 1), (1, 5)]), st.sampled_from([(1, 1), (2, 2), (2, 1)]), sides),
    st.tuples(st.integers(1, 40), st.integers(1, 80), st.integers(1, 3), st.booleans()),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
)
def test_the_search_finds_what_a_slow_one_finds(
    form: tuple[tuple[int, int], ...], amounts: tuple[int, int, int, bool], bits: tuple[int, int]
) -> None:
    machine = target(weight_buffer_bytes=4096, activation_buffer_bytes=512, output_buffer_bytes=1024)
    kernel, stride, output = form
    shape = Shape(kernel, kernel, stride, output, *amounts)
    found = machine.schedule(shape, *(np.array([b]) for b in bits))
    cycles, energy, counters = search_slowly(machine, shape, *bits)
    assert found.cycles[0] == cycles
    assert found.energy_j[0] == pytest.approx(energy, rel=1e-12)
    assert {name: int(values[0]) for name, values in found.counters.items()} == counters


ALL = tuple(np.repeat(np.arange(1, 9), 8)), tuple(np.tile(np.arange(1, 9), 8))
shapes = st.builds(
    lambda k, o, i, c, b: Shape((k, k), (k, k), (1, 1), (o, o), i, c, b, False),
    *(st.sampled_from([1, 3]), st.integers(1, 14), st.integers(1, 200), st.integers(1, 200), st.integers(1, 4)),
)


def everywhere(machine: BitFusionTarget, shape: Shape) -> Schedule:
    return machine.schedule(shape, *(np.array(bits) for bits in ALL))


@given(shapes)
def test_five_to_seven_bits_compute_as_eight_and_save_only_traffic(shape: Shape) -> None:
    """Whatever the schedule: at the least traffic possible, 5 to 7 bits move less, and the array is no faster."""
    machine = target()
    w = a = np.arange(1, 9)
    tilings, _ = machine._tilings(shape, w, a)
    for same in (slice(4, 8), slice(2, 4), slice(0, 2)):
        assert (tilings.compute[same] == tilings.compute[same][:1]).all()
    assert (np.diff(tilings.weights[4:], axis=0) > 0).all()
    assert (np.diff(tilings.activations[4:], axis=0) > 0).all()


@settings(max_examples=40)
@given(shapes)
def test_cost_grows_with_work(shape: Shape) -> None:
    """Four times the work always costs more. (A little more need not: 129 channels can tile better than 97.)"""
    machine = target()
    small = everywhere(machine, shape)
    height, width = shape.output
    for bigger in (
        shape._replace(images=4 * shape.images),
        shape._replace(outputs=32 * 4 * shape.outputs),  # the array's columns are filled 32 at a time
        shape._replace(output=(2 * height, 2 * width)),
    ):
        large = everywhere(machine, bigger)
        assert (large.cycles > small.cycles).all()
        assert (large.energy_j > small.energy_j).all()
    large = everywhere(machine, shape._replace(inputs=4 * 256 * shape.inputs))
    assert (large.cycles > small.cycles).all()


def test_energy_is_not_monotone_in_bits() -> None:
    """w4/a6 can cost more than w4/a8: nothing may assume otherwise."""
    worse = 0
    for channels, size in ((256, 14), (512, 14), (512, 7), (128, 28)):
        shape = Shape((3, 3), (3, 3), (1, 1), (size, size), channels, channels, 16, False)
        energy = everywhere(target(), shape).energy_j.reshape(8, 8)
        worse += int((np.diff(energy, axis=0) < 0).sum() + (np.diff(energy, axis=1) < 0).sum())
    assert worse > 0


def trace(module: nn.Module, *shape: int) -> hw_models.Workload:
    return hw_models.trace(module, torch.zeros(1, *shape))


def test_the_first_convolution_is_im2col_and_only_that() -> None:
    network = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    compute = target().cost_table(trace(network, 8, 10, 10), batch=1).counters["compute_cycles"]
    assert compute[0, 7, 7] == 100 * math.ceil(72 / 16)
    assert compute[1, 7, 7] == 100 * 9


def test_grouped_layers_are_priced_group_by_group() -> None:
    machine = target()
    first = nn.Conv2d(64, 64, 1)
    grouped = trace(nn.Sequential(first, nn.Conv2d(64, 96, 3, padding=1, groups=4)), 64, 9, 9)
    one = trace(nn.Sequential(nn.Conv2d(16, 16, 1), nn.Conv2d(16, 24, 3, padding=1)), 16, 9, 9)
    for part in ("cycles", "energy_j"):
        of_one = getattr(machine.cost_table(one), part)[1]
        assert getattr(machine.cost_table(grouped), part)[1] == pytest.approx(4 * of_one, nan_ok=True)


def test_depthwise_layers_have_two_rules() -> None:
    workload = trace(nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, padding=1, groups=64)), 3, 14, 14)
    broadcast, single = (
        target(depthwise=rule).cost_table(workload, batch=1).counters for rule in ("broadcast", "per_channel")
    )
    assert broadcast["compute_cycles"][1, 7, 7] == 2 * 196 * 9
    assert single["compute_cycles"][1, 7, 7] == 64 * 196 * 9


def test_a_rectangular_layer_costs_the_same_turned_round() -> None:
    machine = target()
    wide, high = (
        Shape(kernel, window, stride, output, 32, 48, 2, False)
        for kernel, window, stride, output in (
            ((1, 5), (1, 9), (1, 2), (3, 20)),
            ((5, 1), (9, 1), (2, 1), (20, 3)),
        )
    )
    for one, other in zip(everywhere(machine, wide)[:2], everywhere(machine, high)[:2], strict=True):
        assert one == pytest.approx(other)


def test_dilation_widens_the_window_and_not_the_work() -> None:
    plain, dilated = (trace(nn.Conv2d(16, 16, 3, padding=d, dilation=d), 16, 12, 12) for d in (1, 2))
    tables = [target(batch=1).cost_table(w) for w in (plain, dilated)]
    compute = [t.counters["compute_cycles"] for t in tables]
    assert np.array_equal(*compute)
    assert target().shape(dilated.layers[0], dilated.layers[0].calls[0], 1, im2col=False)[0].window == (5, 5)


def test_rows_of_a_linear_layer_are_images() -> None:
    machine = target()
    sequence, batch = trace(nn.Linear(64, 32), 12, 64), trace(nn.Linear(64, 32), 64)
    assert np.array_equal(machine.cost_table(sequence, batch=2).cycles, machine.cost_table(batch, batch=24).cycles)


def test_the_other_configurations() -> None:
    assert hw_models.load_target("bitfusion-small").core_pj_per_cycle == pytest.approx(235.104 / 8)  # type: ignore[attr-defined]
    workload = trace(nn.Conv2d(64, 64, 3, padding=1), 64, 28, 28)
    cycles = {name: target(name).cost_table(workload).cycles for name in ("bitfusion", "bitfusion-small", "bitfusion-bf_s")}
    few = {name: of_all[:, :8, :8] for name, of_all in cycles.items() if of_all is not None}
    assert (few["bitfusion-small"] > few["bitfusion"]).all()  # an eighth of the units
    assert (few["bitfusion-bf_s"] < few["bitfusion"]).all()  # 21 times the memory width


def test_only_the_variant_of_16_bits_has_16_bits_and_none_has_float() -> None:
    workload = trace(nn.Conv2d(64, 64, 3, padding=1), 64, 28, 28)
    for name in ("bitfusion", "bitfusion-small", "bitfusion-bf_s"):
        assert target(name).cost_table(workload).supported.sum() == 8 * 8
    supported = target("bitfusion-16bit").cost_table(workload).supported[0]
    assert supported[:9, :9].all()
    assert supported.sum() == 9 * 9


@pytest.mark.parametrize("row", [case for case in GOLDEN if case[0][0] == "bf16" and not case[0][7]])
def test_tables_have_16_bits_as_the_authors_simulator(row: tuple) -> None:
    """The first convolution of a workload is run as im2col, so the layer comes behind another."""
    (_, mode, k, o, s, ic, oc, _, batch, w, a), expected, nanojoules = row
    rule = "per_channel" if mode == PER_CHANNEL else "broadcast"
    machine = target("bitfusion-16bit", depthwise=rule)
    layer = layer_and_call(mode, k, o, s, ic, oc)
    first = replace(layer_and_call("", 1, 1, 1, 1, 1), name="first")
    table = machine.cost_table(hw_models.Workload((first, layer)), batch=batch)
    cell = 1, place_of(w), place_of(a)
    assert table.cycles is not None
    assert table.energy_j is not None
    ours = (int(table.cycles[cell]), *(int(table.counters[name][cell]) for name in COUNTERS))
    assert ours == expected
    assert table.energy_j[cell] * 1e9 == pytest.approx(nanojoules, rel=1e-6)


def test_what_cannot_be_priced_is_named() -> None:
    workload = trace(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 31, padding=15)), 3, 40, 40)
    with pytest.raises(ValueError, match="layer '1' can't be priced on bitfusion: no tile of it fits"):
        target(weight_buffer_bytes=1024).cost_table(workload)
    with pytest.raises(ValueError, match="bits must be from 1 to 8, found 0 to 9"):
        target().schedule(Shape((1, 1), (1, 1), (1, 1), (1, 1), 1, 1, 1, False), np.array([0, 9]), np.array([1, 1]))
