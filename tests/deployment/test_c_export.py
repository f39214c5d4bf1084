"""C code that `--to c` writes computes its integer program bit for bit: by gcc, with sanitizers, and for ARM, emulated."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq import data, deploy, networks, search
from haq.console.errors import EXIT_BAD_INPUT, run_command
from haq.deployment import c as c_code
from haq.deployment import c_source, fixed_point
from haq.deployment.c import CExporter, Compiled
from haq.deployment.fixed_point import FixedProgram, run_integers
from haq.deployment.graph import capture
from haq.deployment.lowering import lower
from haq.deployment.program import Codes, Convolution, Lookup
from tests.commands.test_search_command import MODULE, QUICK
from tests.conftest import enter, images, small_network
from tests.deployment.test_fixed_point import everything

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
SANITIZED = ("gcc", "-O1", "-g", "-fsanitize=undefined,address", "-fno-sanitize-recover=all")
# Compilers for other machines, and what runs their programs here.
FOREIGN = {
    "arm64": (("aarch64-linux-gnu-gcc", "-O2"), ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")),
    "thumb": (("arm-linux-gnueabihf-gcc", "-Os", "-mthumb"), ("qemu-arm", "-L", "/usr/arm-linux-gnueabihf")),
}
# A Cortex-M4 without an operating system: where it starts, and where its memories are.
START = """
extern void _start(void);
extern unsigned top;
__attribute__((section(".vectors"), used)) static const void *vectors[] = {&top, (void *)_start};
"""
MEMORY = """
MEMORY { FLASH (rx): ORIGIN = 0, LENGTH = 4M
         RAM (rwx): ORIGIN = 0x20000000, LENGTH = 4M }
SECTIONS {
  .text : { KEEP(*(.vectors)) *(.text*) *(.rodata*) *(.init) *(.fini) *(.eh_frame*) } > FLASH
  .ARM.exidx : { *(.ARM.exidx*) } > FLASH
  .data : { *(.data*) } > RAM
  .bss : { __bss_start__ = .; *(.bss*) *(COMMON) __bss_end__ = .; } > RAM
  end = .; __end__ = .; top = ORIGIN(RAM) + LENGTH(RAM); __stack = top;
}
"""


def write(network: nn.Module, bits: Any, x: Tensor, folder: Path, scheme: Any = "linear") -> FixedProgram:
    """Quantize a network and write it; bits are a pair for all layers or a policy."""
    policy = bits
    if isinstance(bits, tuple):
        policy = dict.fromkeys(Q.BitPolicy.uniform(network, w=8, a=8), bits)
    quantized = Q.quantize(network, policy, calibrate=x, scheme=scheme).eval()
    fixed = c_code.convert(quantized, capture(quantized, x), x)
    c_code.write(folder, fixed, {})
    return fixed


def assert_equal(
    folder: Path, fixed: FixedProgram, x: Tensor, compiler: Sequence[str] = ("gcc", "-O1"), runner: Sequence[str] = ()
) -> None:
    expected, _ = run_integers(fixed, x.numpy())
    with Compiled(folder, compiler, runner) as code:
        assert np.array_equal(code(x.numpy()), expected.reshape(len(x), -1))


# ----------------------------------------------------------------------------------------------------------- bit for bit


@needs_gcc
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (5, 3), (1, 1)])
def test_every_operation(bits: tuple[int, int], tmp_path: Path) -> None:
    network, x = everything()
    assert_equal(tmp_path, write(network, bits, x, tmp_path), x[:8])


@needs_gcc
def test_with_sanitizers(tmp_path: Path) -> None:
    """Nothing is read or written beyond its end, and nothing is undefined, at numbers as large as they may be either."""
    network, x = everything()
    names = Q.BitPolicy.uniform(network, w=8, a=8)
    policy = {name: (bits, 9 - bits) for name, bits in zip(names, (8, 3, 1, 7, 6), strict=True)}
    fixed = write(network, policy, x, tmp_path)
    for far in (x[:4], x[:4] * 1e4, -x[:2] * 1e30, x[:2] * 1e-38):
        assert_equal(tmp_path, fixed, far, SANITIZED)


class Kinds(nn.Module):
    """Every kind of step that isn't in `Everything`."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")
        self.prelu = nn.PReLU(6, init=-0.4)
        self.layers = nn.ModuleList(nn.Conv2d(6, 6, 1) for _ in range(3))
        self.gate = nn.Conv2d(6, 6, 1)
        self.last = nn.Conv2d(12, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        y = self.prelu(self.layers[0](x))
        y = F.channel_shuffle(torch.cat([y[:, :3], x[:, 3:]], 1), 2)
        y = F.interpolate(F.avg_pool2d(self.layers[1](y), 3, 2, 1, count_include_pad=False), scale_factor=2, mode="bilinear")
        z = x.reshape(len(x), 6, 4, 20).transpose(2, 3).reshape(x.shape)
        z = F.hardswish(self.layers[2](F.interpolate(F.max_pool2d(z, 2), scale_factor=2)))
        return self.last(torch.cat([y * y[:, :1], z], 1))  # type: ignore[no-any-return]


@needs_gcc
def test_every_other_kind_of_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 10)
    fixed = write(Kinds().eval(), (5, 7), x, tmp_path / "net")
    found = {type(step).__name__ for step in fixed.steps}
    assert {"Convolution", "Pool", "Product", "Resize", "Move"} <= found
    called = (tmp_path / "net" / "net.c").read_text()
    for function in ("average", "product", "resize", "move", "scatter", "max_pool", "sum_pool"):
        assert f"static void {function}(" in called
    for far in (x, x * 1e5):
        assert_equal(tmp_path / "net", fixed, far, SANITIZED)


@needs_gcc
def test_residuals_of_bytes(tmp_path: Path) -> None:
    """With quantizers at residuals nothing takes 32 bits but the network's ends."""
    network, x = everything()
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), calibrate=x).eval()
    quantized = Q.add_residual_quantizers(quantized, x)
    fixed = c_code.convert(quantized, capture(quantized, x), x)
    ends = {fixed.output, *(image.value for image in fixed.image)}
    within = [value for name, value in fixed.values.items() if name not in ends]
    assert all(isinstance(value.representation, Codes) for value in within)
    c_code.write(tmp_path, fixed, {})
    assert_equal(tmp_path, fixed, x[:4], SANITIZED)


class OfBytes(nn.Module):
    """A function of integers of 8 bits, that two read: a layer, and an average."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(torch.fake_quantize_per_tensor_affine(self.first(x), 0.02, 100, 0, 255))
        return self.second(x) + x.mean((2, 3), keepdim=True)  # type: ignore[no-any-return]


@needs_gcc
def test_a_function_of_bytes_is_a_table_of_256(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5, 5)
    fixed = write(OfBytes().eval(), (6, 6), x, tmp_path)
    (step,) = (step for step in fixed.steps if isinstance(step, Lookup))
    assert sorted(entries.dtype.name for entries in step.entries) == ["int32", "uint8"]
    assert_equal(tmp_path, fixed, x, SANITIZED)


@needs_gcc
def test_signals_and_vectors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    signals = nn.Sequential(nn.Conv1d(2, 4, 5, 2), nn.ReLU(), nn.Conv1d(4, 3, 3, padding=1)).eval()
    vectors = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3)).eval()
    for network, x in ((signals, torch.randn(4, 2, 20)), (vectors, torch.randn(4, 7))):
        assert_equal(tmp_path, write(network, (3, 8), x, tmp_path), x)


@needs_gcc
@pytest.mark.parametrize("bits", [(2, 5), (7, 1)])
def test_signed_and_asymmetric_inputs(bits: tuple[int, int], tmp_path: Path) -> None:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Conv2d(6, 9, 3, 2, 1, groups=3), nn.Conv2d(9, 7, (3, 1))]
    network = nn.Sequential(*layers, nn.Conv2d(7, 4, 5, padding=4, dilation=2)).eval()
    x = torch.randn(6, 3, 11, 9) + 0.5
    for scheme in ("linear", "linear-asymmetric"):
        fixed = write(network, (bits[0], max(bits[1], 1 + (scheme != "linear"))), x, tmp_path, scheme)
        assert_equal(tmp_path, fixed, x)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, FixedProgram, Tensor]:
    """The default network at mixed bits, written, and test images."""
    network, calibrate, x = default_data(60)
    folder = tmp_path_factory.mktemp("default")
    bits = {name: (1 + index % 8, 8 - index % 5) for index, name in enumerate(Q.BitPolicy.uniform(network, w=8, a=8))}
    return folder, write(network, bits, calibrate, folder), x


def default_data(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    made, all_data = networks.load(), data.load("fashion-mnist-12k")
    train = next(all_data.train.batches(100))[0]
    test = next(all_data.test.batches(min(count, len(all_data.test))))[0]
    return made.module, made.preprocess(train).contiguous(), made.preprocess(test).contiguous()


@needs_gcc
def test_the_default_network_by_gcc(default: tuple[Path, FixedProgram, Tensor]) -> None:
    assert_equal(*default, ("gcc", "-O2"))


@needs_gcc
@pytest.mark.slow
@pytest.mark.parametrize("bits", [8, 4])
def test_the_default_network_on_all_test_images(bits: int, tmp_path: Path) -> None:
    network, calibrate, x = default_data(10**6)
    assert_equal(tmp_path, write(network, (bits, bits), calibrate, tmp_path), x, ("gcc", "-O2"))


@pytest.mark.parametrize("machine", FOREIGN)
def test_the_default_network_on_other_machines(machine: str, default: tuple[Path, FixedProgram, Tensor]) -> None:
    compiler, runner = FOREIGN[machine]
    if not all(map(shutil.which, (compiler[0], runner[0]))):
        pytest.skip(f"needs {compiler[0]} and {runner[0]}")
    folder, fixed, x = default
    assert_equal(folder, fixed, x[:20], compiler, runner)


def test_a_microcontroller_without_an_operating_system(tmp_path: Path) -> None:
    compiler, runner = "arm-none-eabi-gcc", "qemu-system-arm"
    if not all(map(shutil.which, (compiler, runner))):
        pytest.skip(f"needs {compiler} and {runner}")
    (tmp_path / "start.c").write_text(START)
    start = str(tmp_path / "start.o")
    subprocess.run([compiler, "-mcpu=cortex-m4", "-mthumb", "-c", str(tmp_path / "start.c"), "-o", start], check=True)
    (tmp_path / "memory.ld").write_text(MEMORY)
    options = ("-Os", "-mcpu=cortex-m4", "-mthumb", "--specs=rdimon.specs", "-T", tmp_path / "memory.ld")
    machine = ("-M", "mps2-an386", "-nographic", "-monitor", "none", "-serial", "none")
    talk = ("-semihosting-config", "enable=on,target=native", "-kernel")
    tools = ([compiler, *map(str, options), start], [runner, *machine, *talk])
    network, x = everything()
    fixed = write(network, (4, 4), x, tmp_path / "net")
    assert_equal(tmp_path / "net", fixed, x[:4], *tools)


# -------------------------------------------------------------------------------------------------------- what is written


def test_weights_take_their_bits() -> None:
    network, x = small_network(), images(8)
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=8, a=8), calibrate=x).eval()
    graph = capture(quantized, x)
    for bits in range(1, 9):
        Q.set_policy(quantized, Q.BitPolicy.uniform(network, w=bits, a=8))
        fixed = fixed_point.fixed_point(lower(graph, quantized, x))
        convolutions = [step for step in fixed.steps if isinstance(step, Convolution)]
        exact = sum(-(-step.weights.size * bits // 8) for step in convolutions)
        # A reader takes two bytes at a time, and so there is one more per layer.
        assert exact <= c_source.generate(fixed, "net").bytes["weights"] <= exact + len(convolutions)


@given(st.integers(1, 8).flatmap(lambda bits: st.tuples(st.just(bits), st.lists(st.integers(0, 2**bits - 1), min_size=1))))
def test_packed_weights_are_the_weights(given: tuple[int, list[int]]) -> None:
    bits, numbers = given
    weights = np.array(numbers) - 2 ** (bits - 1)
    if bits == 1:
        weights = 2 * np.array(numbers) - 1
    stream = int.from_bytes(c_source.pack(weights, bits).tobytes(), "little")
    read = [(stream >> (bits * index)) % 2**bits for index in range(len(numbers))]
    if bits > 1:
        read = [(number + 2 ** (bits - 1)) % 2**bits - 2 ** (bits - 1) for number in read]
    else:
        read = [2 * number - 1 for number in read]
    assert read == weights.tolist()


def test_values_that_are_needed_together_have_places_of_their_own() -> None:
    network, x = everything()
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), calibrate=x).eval()
    fixed = fixed_point.fixed_point(lower(capture(quantized, x), quantized, x))
    arena = c_source.plan(fixed)
    held = {image.value for image in fixed.image}
    last = {fixed.output: len(fixed.steps)}
    for index, (step, epilogue) in enumerate(zip(fixed.steps, fixed.epilogues, strict=True)):
        for name in (step.input, *(residual.value for residual in epilogue.residuals)):
            last[name] = index
    largest = 0
    for index, (step, epilogue) in enumerate(zip(fixed.steps, fixed.epilogues, strict=True)):
        written = {output.value for output in epilogue.outputs}
        over = {residual.value for residual in epilogue.residuals if last[residual.value] == index}
        if type(step).__name__ == "Sum":
            over.add(step.input)
        spans = [(name, arena.places[name], c_source.value_bytes(fixed.values[name])) for name in held | written]
        if index in arena.scratch:
            spans.append(("scratch", arena.scratch[index], 1))
        for name, start, size in spans:
            assert start + size <= arena.size
            for other, begin, length in spans:
                apart = start + size <= begin or begin + length <= start
                replaced = (start, size) == (begin, length) and {name, other} & over and {name, other} & written
                assert name == other or apart or replaced
        held = {name for name in held | written if last.get(name, -1) > index}
        largest = max(largest, sum(size for _, _, size in spans))
    total = sum(c_source.value_bytes(value) for value in fixed.values.values())
    assert arena.size < 0.6 * total
    assert arena.size <= 1.1 * largest


@needs_gcc
def test_the_description_says_what_there_is(tmp_path: Path) -> None:
    network, x = small_network(), images(8)
    folder = tmp_path / "my net-2"
    fixed = write(network, (4, 4), x, folder)
    assert sorted(path.name for path in folder.iterdir()) == ["main.c", "my_net_2.c", "my_net_2.h", "network.json"]
    described = json.loads((folder / "network.json").read_text())
    assert described["name"] == "my_net_2"
    assert described["output"]["scale"] == fixed.output_scale
    header = (folder / "my_net_2.h").read_text()
    assert f"#define MY_NET_2_ARENA_BYTES {described['arena_bytes']}" in header
    assert f"#define MY_NET_2_OUTPUT_SIZE {described['output']['shape'][2]}" in header
    assert described["flash_bytes"] > sum(described["constant_bytes"].values())
    assert described["ram_bytes"] >= described["arena_bytes"]
    assert len((folder / "main.c").read_text().splitlines()) <= 20
    code = (folder / "my_net_2.c").read_text()
    assert "malloc" not in code
    assert {line for line in code.splitlines() if line.startswith("#include <")} == {
        "#include <stdint.h>",
        "#include <string.h>",
    }
    # Floats are looked at in one place, and nothing is computed with them.
    after = code[code.index("_run(void)") :]
    assert "float" not in after


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("net", "net"),
        ("2 nets", "network_2_nets"),
        ("", "network"),
        ("é", "network"),
        ("a*/b", "a_b"),
        ("main", "main_network"),
    ],
)
def test_identifiers(text: str, name: str) -> None:
    assert c_source.identifier(text) == name


@needs_gcc
def test_names_of_layers_can_be_anything(tmp_path: Path) -> None:
    network = nn.Sequential()
    for name in ("*/ int x; /*", "back\\", "??/", "größe", "int", "a\nb"):
        network.add_module(name, nn.Conv2d(1, 1, 1))
    x = torch.rand(4, 1, 3, 3)
    assert_equal(tmp_path, write(network.eval(), (4, 4), x, tmp_path), x)


@needs_gcc
def test_a_file_that_changed_is_not_compiled(tmp_path: Path) -> None:
    folder = tmp_path / "net"
    write(small_network(), (4, 4), images(8), folder)
    with (folder / "net.c").open("a") as file:
        file.write("\n")
    with pytest.raises(ValueError, match=r"net\.c isn't as it was written, by its SHA-256: deploy the network again"):
        Compiled(folder)
    (folder / "network.json").unlink()
    with pytest.raises(FileNotFoundError, match="has no network.json"):
        Compiled(folder)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ((None, None), "layer 'stem' can't be written in C: its weights are in float; --to c takes 1 to 8 bits"),
        ((4, None), "layer 'stem' can't be written in C: its activations are in float"),
        ((16, 4), "layer 'stem' can't be written in C: its weights are of 16 bits; --to c takes 1 to 8 bits"),
        ((4, 16), "layer 'stem' can't be written in C: its activations are of 16 bits"),
    ],
)
def test_layers_that_are_refused_are_named(bits: Any, message: str) -> None:
    network, x = small_network(), images(8)
    policy = {**dict.fromkeys(Q.BitPolicy.uniform(network, w=8, a=8), (4, 4)), "stem": bits}
    with pytest.raises(ValueError, match=message):
        CExporter().check(Q.quantize(network, policy, calibrate=x).eval())


# ----------------------------------------------------------------------------------------------------------- the command


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It writes, compares all answers, tells sizes; without a compiler it says so, and of a policy in float which layer."""
    enter(tmp_path, monkeypatch, MODULE)
    assert run_command(lambda: search.main([*QUICK, "--solver", "ilp", "--out", "run"])) == 0
    capsys.readouterr()
    assert run_command(lambda: deploy.main(["run", "--to", "c"])) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "written: run/network" in printed
    assert "same answer as in PyTorch 64 of 64 test images" in printed
    for what in ("flash", "RAM, beside the stack", "storage of the policy"):
        assert what in printed
    if shutil.which("gcc"):
        assert "outputs of compiled code other than the program's 0 of" in printed
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert run_command(lambda: deploy.main(["run", "--to", "c", "--out", "other"])) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "not run here: there is no gcc" in printed
    assert "constants alone, as there is no compiler here" in printed
    Path("file").write_text("")
    assert run_command(lambda: deploy.main(["run", "--to", "c", "--out", "file"])) == EXIT_BAD_INPUT
    assert "file is a file; --to c writes a folder" in " ".join(capsys.readouterr().err.split())
