"""Every step of a program becomes code that computes what the interpreter does, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import quantizers as Q
from experiments import deployed_zoo
from haq.deployment import interpreter
from haq.deployment import tvm as tvm_code
from haq.deployment.graph import capture
from haq.deployment.lowering import lower
from haq.deployment.nodes import Ranges, Taps, Window
from haq.deployment.program import (
    Codes,
    Epilogue,
    Fixed,
    Float,
    Lookup,
    Move,
    Output,
    Pool,
    Product,
    Program,
    Representation,
    Residual,
    Resize,
    Step,
    Sum,
    Table,
    Value,
)
from hw_models.tvm_cpu.cpu import Cpu
from hw_models.tvm_cpu.move import Move as MoveCode

pytest.importorskip("tvm")

HEIGHT, WIDTH = 4, 5
FIXED = Fixed(2.0**-10, 2**20)
UNSIGNED = Codes(0.03, 8, False)
SHIFTED = Codes(0.04, 8, False, zero_point=77)
SIGNED = Codes(0.05, 6, True)
SIGNS = Codes(1.0, 1, True)
WIDE = Codes(0.001, 16, True)
ALL: tuple[Representation, ...] = (FIXED, UNSIGNED, SHIFTED, SIGNED, SIGNS, WIDE, Float())
SOME: tuple[Representation, ...] = (FIXED, SHIFTED)


class Steps:
    """A program of random steps, with every representation that a step may read or write."""

    def __init__(self, channels: int) -> None:
        self.draw = np.random.default_rng(channels)
        self.channels = channels
        self.values = {"image": Value(Float(), (HEIGHT, WIDTH, channels))}
        self.steps: list[Step] = []

    def hold(self, name: str, representation: Representation, shape: tuple[int, int, int]) -> str:
        self.values[name] = Value(representation, shape)
        return name

    def epilogue(self, name: str, shape: tuple[int, int, int], scale: float, **options: Any) -> Epilogue:
        """Write some representations; `scale` makes real numbers of what a step computes."""
        some = options.pop("some", SOME)
        outputs = [Output(self.hold(f"{name}:{r.kind}", r, shape), float(np.float32(FIXED.unit / r.unit))) for r in some]
        factors = self.draw.uniform(0.5, 1.5, (2, shape[2])).astype(np.float32)
        given = {"residuals": (), "low": -2000.0, "high": 3000.0, **options}
        multiplier = factors[0] * np.float32(scale / FIXED.unit)
        return Epilogue(multiplier, factors[1], outputs=tuple(outputs), **given)

    def index(self, count: int, shape: tuple[int, int, int]) -> NDArray[np.int32]:
        return self.draw.integers(-1, count, shape).astype(np.int32)

    def table(self, start: float) -> Table:
        return Table(start, start / 8, self.draw.normal(size=(int(2 * start), 3)).astype(np.float32))

    def taps(self, size: int, outputs: int) -> Taps:
        first, second = self.draw.integers(0, size, (2, outputs)).astype(np.int32)
        return Taps(first, second, self.draw.random(outputs))

    def program(self) -> Program:
        channels = self.channels
        whole = (HEIGHT, WIDTH, channels)
        slope = self.draw.normal(size=channels).astype(np.float32)
        self.steps.append(Sum("sum", "image", self.epilogue("sum", whole, 1.0, slope=slope, some=ALL)))
        table = self.table(20.0)
        codes = [f"sum:{r.kind}" for r in ALL if isinstance(r, Codes)]
        residuals = tuple(Residual(name, 0.3) for name in [*codes, f"sum:{FIXED.kind}"])
        added = {"residuals": residuals, "table": table, "low": -3.0, "high": 5.0, "some": ALL}
        self.steps.append(
            Sum("table", f"sum:{UNSIGNED.kind}", self.epilogue("table", whole, FIXED.unit * UNSIGNED.scale, **added))
        )
        for segments in (8, 32):  # which registers hold
            few = {"table": self.table(segments / 2)}
            self.steps.append(Sum(f"{segments}", f"sum:{FIXED.kind}", self.epilogue(f"{segments}", whole, FIXED.unit, **few)))
        bounds = np.array([[0, 2], [1, 4]], np.int32)
        ranges = Ranges(bounds, bounds, np.ones((2, 2)))
        window = Window((3, 2), (2, 1), (1, 0))
        places = self.hold("places", FIXED, (HEIGHT, WIDTH, 1))
        self.steps.append(
            Move("places", (f"sum:{FIXED.kind}",), self.index(HEIGHT * WIDTH * channels, (HEIGHT, WIDTH, 1)), places)
        )
        average = self.hold("mean", UNSIGNED, (1, 1, channels))
        self.steps.append(
            Move("mean", (f"sum:{UNSIGNED.kind}",), self.index(HEIGHT * WIDTH * channels, (1, 1, channels)), average)
        )
        for r in (FIXED, UNSIGNED, SHIFTED):
            self.pools(f"sum:{r.kind}", r.unit, ranges, window)
        for r in (FIXED, SIGNED, WIDE):
            self.resize(f"sum:{r.kind}", r.unit)
        for r, other, unit in (
            (FIXED, f"sum:{SIGNS.kind}", 1.0),
            (WIDE, "places", FIXED.unit),
            (Float(), "mean", UNSIGNED.unit),
        ):
            step = f"sum:{r.kind} times"
            self.steps.append(Product(step, f"sum:{r.kind}", other, self.epilogue(step, whole, r.unit * unit)))
        self.look_up(f"sum:{SHIFTED.kind}")
        self.move()
        last = self.hold("result", Float(), whole)
        one = np.ones(1, np.float32)
        self.steps.append(Sum("last", "image", Epilogue(one, one, (), -1.0, 1.0, (Output(last, 1.0),))))
        dims = (1, channels, HEIGHT, WIDTH)
        return Program(tuple(self.steps), self.values, "image", last, dims, dims)

    def resize(self, name: str, unit: float) -> None:
        size = 7, 3
        epilogue = self.epilogue(f"{name} resized", (*size, self.channels), unit)
        taps = self.taps(HEIGHT, size[0]), self.taps(WIDTH, size[1])
        self.steps.append(Resize(f"{name} resized", name, *taps, epilogue))

    def pools(self, name: str, unit: float, ranges: Ranges, window: Window) -> None:
        size = 2, 4
        for kind, scale in (("max", unit), ("avg", unit / 6)):
            step = f"{name} {kind}"
            epilogue = self.epilogue(step, (*size, self.channels), scale)
            self.steps.append(Pool(step, kind, name, window, size, epilogue))
        step = f"{name} ranges"
        factors = self.draw.random((2, 2)).astype(np.float32)
        epilogue = self.epilogue(step, (2, 2, self.channels), unit)
        self.steps.append(Pool(step, "avg", name, None, (2, 2), epilogue, ranges, factors))
        if name == f"sum:{UNSIGNED.kind}":
            alone = self.hold(f"{name} alone", UNSIGNED, (*size, self.channels))
            ones = np.ones(1, np.float32), np.zeros(1, np.float32)
            epilogue = Epilogue(*ones, (), -np.inf, np.inf, (Output(alone, 1.0),))
            self.steps.append(Pool(alone, "max", name, window, size, epilogue))

    def look_up(self, name: str) -> None:
        outputs = [self.hold(f"{name} looked up {r.kind}", r, (HEIGHT, WIDTH, self.channels)) for r in ALL]
        entries = tuple(self.draw.integers(0, 256, 256).astype(r.dtype) for r in ALL)
        self.steps.append(Lookup(f"{name} looked up", name, tuple(outputs), entries))

    def move(self) -> None:
        shape = 3, 7, 2 * self.channels
        for r in ALL:
            inputs = f"sum:{r.kind}", f"table:{r.kind}"
            name = f"moved {r.kind}"
            index = self.index(2 * HEIGHT * WIDTH * self.channels, shape)
            self.steps.append(Move(name, inputs, index, self.hold(name, r, shape)))


def compiled(program: Program, folder: Path, threads: int = 1, *, reuse: bool = False) -> tvm_code.Deployed:
    target = deployed_zoo.unmeasured(threads)
    return tvm_code.compile_program(program, target, folder, {}, reuse=reuse)


@pytest.mark.parametrize(
    ("channels", "threads"),
    [(17, 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 1), (3, 1), (15, 3), (40, 1)))],
)
def test_every_step_and_representation(channels: int, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hw_models.tvm_cpu.builder.WORTH_DIVIDING", 0)
    program = Steps(channels).program()
    deployed = compiled(program, tmp_path, threads)
    for seed in range(2):
        images = 2 * torch.randn(1, channels, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed)).numpy()
        deployed(images)
        for name, expected in interpreter.compute_values(program, images).items():
            if name != program.output:
                assert np.array_equal(deployed.value(name), expected[0]), name


# --------------------------------------------------------------------------------------------------------------- moves

MOVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "concatenation": lambda a, b: torch.cat([a, b], 1),
    "shuffle": lambda a, b: nn.ChannelShuffle(2)(torch.cat([a, b], 1)),
    "shuffle of one": lambda a, b: nn.ChannelShuffle(a.shape[1])(a),
    "part of a shuffle": lambda a, b: nn.ChannelShuffle(2)(torch.cat([a, b], 1))[:, : a.shape[1]],
    "padding": lambda a, b: nn.functional.pad(a, (1, 2, 0, 3), value=-1),
    "channels of zeros": lambda a, b: nn.functional.pad(b, (0, 0, 0, 0, 2, 1), value=-1),
    "reflection": lambda a, b: nn.functional.pad(a, (2, 1, 1, 2), mode="reflect"),
    "nearest": lambda a, b: nn.functional.interpolate(b, scale_factor=2),
    "pixels": lambda a, b: nn.PixelUnshuffle(2)(a),
    "transposed": lambda a, b: a.transpose(1, 3),
    "backwards": lambda a, b: b.flip(1, 3),
    "no order": lambda a, b: torch.cat([a, b], 1).flatten()[torch.randperm(a.numel())].reshape(a.shape),
}


@pytest.mark.parametrize("channels", [1, 17, 64])
def test_moves(channels: int, run_code: Callable[..., dict[str, NDArray[Any]]]) -> None:
    torch.manual_seed(0)
    size = 4, 6
    count = channels * size[0] * size[1]
    first = torch.arange(count, dtype=torch.float64).reshape(*size, channels).permute(2, 0, 1)[None]
    numbers = [np.random.default_rng(i).integers(1, 256, count).astype(np.uint8) for i in range(2)]
    codes, expected, given = {}, {}, {}
    for name, moved in MOVES.items():
        index = moved(first, first + count).permute(0, 2, 3, 1)[0].numpy().astype(np.int32)
        code = MoveCode(index, (count, count), index.shape[2], "uint8", 7)
        codes[name] = code
        given[name] = {"input0": numbers[0], "input1": numbers[1], **code.constants()}
        expected[name] = np.where(index < 0, 7, np.concatenate(numbers)[index]).reshape(-1)
    for name, found in run_code(codes, given).items():
        assert np.array_equal(found, expected[name]), name


@pytest.fixture
def run_code() -> Callable[..., dict[str, NDArray[Any]]]:
    """Compile pieces of code together, and return what each writes."""
    import tvm

    def run(codes: dict[str, Any], given: dict[str, dict[str, Any]]) -> dict[str, NDArray[Any]]:
        symbols = {name: f"code{number}" for number, name in enumerate(codes)}
        functions: dict[str, Any] = {}
        for name, code in codes.items():
            functions |= code.functions(symbols[name])
        module = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(Cpu.host().target))
        found = {}
        for name, code in codes.items():
            (arguments,) = code.arguments().values()
            arrays = [np.zeros(a.shape, a.dtype) for a in arguments]
            tensors = [
                tvm.runtime.tensor(given[name].get(a.name, array).reshape(-1))
                for a, array in zip(arguments, arrays, strict=True)
            ]
            module[f"{symbols[name]}_main"](*tensors)
            found[name] = tensors[[a.name for a in arguments].index("output0")].numpy()
        return found

    return run


# ------------------------------------------------------------------------------------------------------------ networks


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class Squeeze(nn.Module):
    """A block of an inverted residual with Hardswish, squeeze and excitation, shuffled and upsampled."""

    def __init__(self, width: int = 15) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.Hardswish())
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 4, 1), nn.SiLU(), nn.Conv2d(4, width, 1), nn.Hardsigmoid()
        )
        self.slow = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, padding_mode="circular"), nn.PReLU(width))
        self.up = nn.Sequential(nn.AvgPool2d(2, padding=1, count_include_pad=False), nn.Upsample(size=8, mode="bilinear"))
        self.last = nn.Sequential(nn.Conv2d(2 * width, 4, 1), nn.GELU(), nn.Conv2d(4, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x * self.squeeze(x)
        x = torch.cat([self.up(self.slow(x)), x], 1)
        return self.last(nn.functional.channel_shuffle(x, 2)).mean((2, 3))  # type: ignore[no-any-return]


def assert_equal(network: nn.Module, images: Tensor, folder: Path, w: int = 8, a: int = 8) -> None:
    quantized = Q.quantize(network.eval(), Q.BitPolicy.uniform(network, w=w, a=a), calibrate=images).eval()
    program = lower(capture(quantized, images), quantized, images)
    interpreter.check(quantized, program, images)
    deployed = compiled(program, folder, reuse=True)
    expected, _ = interpreter.run(program, images.numpy())
    assert np.array_equal(deployed(images.numpy()), expected)
    assert deployed(images).shape == network(images).shape


@pytest.mark.parametrize(("w", "a"), [(4, 5), pytest.param(8, 8, marks=pytest.mark.slow)])
def test_a_network_of_new_steps(w: int, a: int, tmp_path: Path) -> None:
    network, images = Squeeze(), torch.randn(4, 3, 16, 16)
    network.train()(torch.randn(16, 3, 16, 16))
    assert_equal(network, images, tmp_path, w, a)


@pytest.mark.parametrize("network", [deployed_zoo.PlainAudio(3), deployed_zoo.DilatedAudio(7, 2)], ids=["plain", "dilated"])
def test_sounds(network: nn.Module, tmp_path: Path) -> None:
    network.train()(torch.randn(4, 1, 4000))
    assert_equal(network, torch.randn(3, 1, 4000), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x0_5", "timm:efficientnet_lite0"]
)
@pytest.mark.parametrize("policy", deployed_zoo.POLICIES)
def test_published_networks(name: str, policy: str) -> None:
    (row,) = deployed_zoo.study(deployed_zoo.Case(name, 32), [policy])
    assert row.result == "equal"


def test_the_list_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are written one by one, and those that are there aren't made again, unless they failed."""
    asked = []

    def study(case: deployed_zoo.Case, policies: list[str]) -> Iterator[deployed_zoo.Row]:
        for policy in policies:
            asked.append((case.name, policy))
            result = "equal"
            if len(asked) == 2:
                result = "operation x | y can't be deployed"
            yield deployed_zoo.Row(*case, policy, result, 3, "2 Move, 1 table", seconds=0.5)

    monkeypatch.setattr(deployed_zoo, "study", study)
    arguments = ["--networks", "resnet20_cifar10", "--out", str(tmp_path)]
    assert deployed_zoo.main(arguments) == 1
    assert "| operation x / y can't be deployed |" in (tmp_path / "deployed-zoo.md").read_text()
    assert deployed_zoo.main(arguments) == 0
    assert len(asked) == len(set(asked)) + 1
    rows = deployed_zoo.read(tmp_path / "deployed-zoo.csv")
    assert [row.result for row in rows] == ["equal"] * len(rows)
    assert "2 of 2 networks compile" in (tmp_path / "deployed-zoo.md").read_text()
