"""A compiled network computes what the quantized one does: its integer program bit for bit."""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

import quantizers as Q
from haq import deploy, networks, search
from haq.console.errors import EXIT_BAD_INPUT, run_command
from haq.deployment import folder as folders
from haq.deployment import interpreter
from haq.deployment import tvm as tvm_code
from haq.deployment.graph import capture
from haq.deployment.lowering import lower
from haq.deployment.program import Codes
from haq.deployment.tvm import Layer
from hw_models import load_target
from hw_models.measured.timing import Timing
from hw_models.tvm_cpu import kernels
from hw_models.tvm_cpu.choose import Choice
from hw_models.tvm_cpu.kernel import Kernel
from hw_models.tvm_cpu.target import CpuTarget
from tests.commands.test_search_command import MODULE, QUICK

pytest.importorskip("tvm")

IMAGES = 6
WITHOUT_TORCH = 'import sys; sys.modules["torch"] = None'  # importing it raises ImportError


MEASURED = CpuTarget.fastest


def chosen_unmeasured(target: CpuTarget, wanted: Iterable[Layer]) -> dict[Layer, Choice]:
    """Take another kernel for every layer of those that can compute it, at few bits one that goes bit by bit."""
    chosen: dict[Layer, Choice] = {}
    for layer in dict.fromkeys(wanted):
        conv, w, a, signed = layer
        able = kernels.candidates(conv, w, a, signed, target.cpu)
        if w * a < 8:
            able = [kernel for kernel in able if kernel.name.startswith("bits")] or able
        kernel = able[(len(chosen) + w) % len(able)]
        chosen[layer] = Choice(kernel, Timing(1e-6, 0.0, 1))
    return chosen


@pytest.fixture(scope="module", autouse=True)
def unmeasured() -> Iterator[None]:
    """Compile no kernel to measure it, which takes most of the time: whichever is chosen, integers are the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuTarget, "fastest", chosen_unmeasured)
        yield


class Small(nn.Module):
    """All that is deployable, on small maps: residual additions, both poolings, a flatten of a map, ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 20, 3, 2, 1, bias=False), nn.BatchNorm2d(20), nn.ReLU6())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.left = nn.Sequential(nn.Conv2d(20, 20, 3, 1, 1, groups=20), nn.ReLU(), nn.Conv2d(20, 20, 1), nn.BatchNorm2d(20))
        self.right = nn.Conv2d(20, 20, 3, 1, 2, dilation=2, groups=2)
        self.average = nn.AvgPool2d(2)
        self.last = nn.Linear(20 * 2 * 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.stem(x))
        x = torch.relu(x + self.left(x))
        x = x + self.right(x)
        return self.last(self.average(x).flatten(1))  # type: ignore[no-any-return]


def small() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    network = Small().train()
    images = torch.randn(64, 3, 16, 16)
    network(images)  # batch statistics
    return network.eval(), images[:IMAGES]


def assert_same(network: nn.Module, images: Tensor, folder: Path) -> deploy.Deployed:
    """Outputs, and the integers that enter every layer."""
    deployed = deploy.to_tvm(network, images, folder, reuse=False)
    program = lower(capture(network, images), network, images)
    expected, entered = interpreter.run(program, images.numpy())
    assert np.array_equal(deployed(images.numpy()), expected)
    for step in program.steps:
        name = getattr(step, "layer", None)
        if name is not None and isinstance(program.values[step.input].representation, Codes):
            codes = program.values[step.input].representation
            found = deployed.value(step.input).astype(int) - codes.zero
            assert np.array_equal(found.transpose(2, 0, 1), entered[step.name][-1].reshape(found.transpose(2, 0, 1).shape))
    assert interpreter.compare(network, program, images).same_answers == 1
    return deployed


# Between these widths the same kernels are compiled for other bits.
OTHERS = [pytest.param(2, 2, marks=pytest.mark.slow), pytest.param(1, 4, marks=pytest.mark.slow)]


@pytest.mark.parametrize(("w", "a"), [(8, 8), (1, 1), (5, 3), *OTHERS])
def test_every_operation(w: int, a: int, tmp_path: Path) -> None:
    network, images = small()
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=w, a=a), calibrate=images).eval()
    assert_same(quantized, images, tmp_path)


def test_the_fastest_kernel_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stopwatch that needs no time: the last candidate is the fastest."""

    def stopped(some: list[Kernel], *given: Any, **options: Any) -> dict[Kernel, Timing]:
        return {kernel: Timing(1 / (1 + number), 0.0, 1) for number, kernel in enumerate(some)}

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(CpuTarget, "fastest", MEASURED)
    monkeypatch.setattr("hw_models.tvm_cpu.target.measure", stopped)
    monkeypatch.setattr("hw_models.tvm_cpu.target.Reference", lambda *given: lambda: 1.0)
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    network, images = nn.Sequential(*layers).eval(), torch.randn(2, 3, 8, 8)
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), calibrate=images).eval()
    deployed = assert_same(quantized, images, tmp_path / "deployed")
    (layer,) = tvm_code.layers(lower(capture(quantized, images), quantized, images))
    target: Any = load_target("cpu")
    able = kernels.candidates(*layer[:3], False, target.cpu)
    assert len(able) > 1  # two where there is no AVX-512
    assert able[-1].name in [step["code"] for step in deployed.description["steps"]]


def test_mixed_policy_with_float_layers(tmp_path: Path) -> None:
    network, images = small()
    bits = {"stem.0": (None, None), "left.0": (4, 5), "left.2": (None, 6), "right": (3, 3), "last": (None, None)}
    quantized = Q.quantize(network, Q.BitPolicy(bits), calibrate=images).eval()
    deployed = deploy.to_tvm(quantized, images, tmp_path)
    with torch.inference_mode():
        assert torch.allclose(deployed(images), quantized(images), rtol=1e-3, atol=1e-3)
    kinds = {step["name"]: step["code"].split()[0] for step in deployed.description["steps"]}
    assert kinds["stem.0"] == kinds["last"] == "float"


def test_binary_network(tmp_path: Path) -> None:
    """Signs whose padding is zero."""
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.Conv2d(32, 40, 3, 1, 1, bias=False)]
    network = nn.Sequential(*layers, nn.BatchNorm2d(40), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 5)).train()
    images = torch.randn(64, 3, 16, 16)
    network(images)
    network = network.eval()
    schemes = {"0": Q.Linear(), "2": Q.Binary(), "6": Q.Linear()}
    policy = {"0": (8, 8), "2": (1, 1), "6": (8, 8)}
    quantized = Q.quantize(network, policy, scheme=schemes, calibrate=images).eval()
    deployed = assert_same(quantized, images[:IMAGES], tmp_path)
    assert any(step["code"].startswith("bits w1a1") for step in deployed.description["steps"])


def test_default_network(tmp_path: Path) -> None:
    made = networks.load()
    from haq import data

    images = made.preprocess(next(data.load("fashion-mnist-12k").test.batches(40))[0]).contiguous()
    rng = np.random.default_rng(0)
    names = list(Q.BitPolicy.uniform(made.module, w=8, a=8))
    policy = {name: (int(rng.integers(2, 9)), int(rng.integers(2, 9))) for name in names}
    quantized = Q.quantize(made.module, policy, calibrate=images).eval()
    deployed = assert_same(quantized, images, tmp_path)
    assert isinstance(deployed(images), torch.Tensor)


def test_the_page_on_deployment_runs_it_without_torch(tmp_path: Path) -> None:
    network, images = small()
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), calibrate=images).eval()
    deployed = deploy.to_tvm(quantized, images, tmp_path / "deployed")
    np.save(tmp_path / "images.npy", images.numpy())
    page = (Path(__file__).parents[2] / "docs" / "guide" / "deployment.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(import json, sys.*?)```", page, re.DOTALL)
    (tmp_path / "example.py").write_text(f"{WITHOUT_TORCH}\n{example}")
    command = [sys.executable, "example.py", "deployed", "images.npy"]
    printed = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    outputs = np.array([json.loads(line) for line in printed.splitlines()], np.float32)
    assert np.array_equal(outputs, deployed(images.numpy()))


def test_what_no_kernel_covers_is_named_before_anything_is_compiled(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softmax2d(), nn.Flatten(), nn.Linear(4 * 36, 2)).eval()
    images = torch.randn(2, 3, 8, 8)
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), calibrate=images).eval()
    with pytest.raises(ValueError, match=r"layer '1' \(Softmax2d\) can't be deployed: operation aten.softmax"):
        deploy.to_tvm(quantized, images, tmp_path / "deployed")
    assert not (tmp_path / "deployed").exists()


def test_a_run_of_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its costs are neither needed nor asked for; its network and data must be the same."""
    (tmp_path / "small_job.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "small_job", raising=False)
    assert run_command(lambda: search.main([*QUICK, "--solver", "greedy", "--out", "run"])) == 0
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    config["settings"] |= {"hw": "rpc:192.0.2.1:9090", "target": "generic"}
    config["signature"] |= {"target": "other", "machine": json.dumps({"processor": "Z80"})}
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    for tuned in ("fine-tuned", "not fine-tuned"):
        # One if an answer differs from PyTorch's, at a tie.
        assert run_command(lambda: deploy.main(["run"])) in (0, 1)
        out, err = capsys.readouterr()
        assert not err
        assert f"written: run/deployed ({tuned})" in out
        content = json.loads(Path("run/deployed/network.json").read_text())
        assert Q.BitPolicy.from_dict(content["policy"]) == Q.BitPolicy.from_json("run/policy.json")
        assert content["machine"]["processor"] != "Z80"
        Path("run/checkpoint/quantized.safetensors").unlink(missing_ok=True)
    config["signature"]["network"] = "other"
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    assert run_command(lambda: deploy.main(["run"])) == EXIT_BAD_INPUT
    assert "the network (small_job:network) is no longer what run began with" in capsys.readouterr().err


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small compiled network."""
    network, images = small()
    folder = tmp_path_factory.mktemp("written") / "deployed"
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=8, a=8), calibrate=images).eval()
    deploy.to_tvm(quantized, images, folder)
    return folder


def test_threads_do_not_mix_their_images(written: Path) -> None:
    deployed = deploy.load(written)
    images = [torch.full((1, 3, 16, 16), value) for value in (-1.0, -0.3, 0.3, 1.0)]
    expected = [deployed(image) for image in images]
    assert not torch.equal(expected[0], expected[1])

    def ask(number: int) -> bool:
        return all(torch.equal(deployed(images[number % 4]), expected[number % 4]) for _ in range(300))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(ask, range(8)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(written: Path, value: float) -> None:
    """By the code, by the integer program, and where either is made or compared."""
    network, images = small()
    bad = images.clone()
    bad[2, 1, 3, 3] = value
    deployed = deploy.load(written)
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=8, a=8), calibrate=images).eval()
    program = lower(capture(quantized, images), quantized, images)
    for call in (
        lambda: deployed(bad),
        lambda: deployed(bad.numpy()),
        lambda: interpreter.run(program, bad.numpy()),
        lambda: interpreter.compare(quantized, program, bad),
        lambda: deploy.to_tvm(quantized, bad, written.parent / "never"),
    ):
        with pytest.raises(ValueError, match=r"of finite numbers; image 2 has NaN or infinity$"):
            call()
    assert not (written.parent / "never").exists()


def test_images_of_other_layouts_are_taken_and_of_other_types_refused(written: Path) -> None:
    _, images = small()
    deployed = deploy.load(written)
    expected = deployed(images)
    last = images.to(memory_format=torch.channels_last)
    assert torch.equal(deployed(last), expected)
    assert torch.equal(deployed(images.clone().requires_grad_()), expected)
    assert np.array_equal(deployed(images.numpy()[::-1]), expected.numpy()[::-1])
    assert np.array_equal(deployed(np.asfortranarray(images.numpy())), expected.numpy())
    assert deployed(images[:0]).shape == (0, 5)
    for other in (
        images.double(),
        images.half(),
        images.bfloat16(),
        images.to_sparse(),
        images.to("meta"),
        images.numpy().astype(">f4"),
        images.numpy().astype(np.float64),
        images.tolist(),
        images[0],
        images[..., :15],
        None,
    ):
        with pytest.raises(ValueError, match="the network takes"):
            deployed(other)


def test_a_network_that_is_written_over_goes_on_as_it_was(written: Path, tmp_path: Path) -> None:
    """The library is loaded from a copy, and another one of the same path is loaded anew."""
    folder = tmp_path / "deployed"
    shutil.copytree(written, folder)
    network, images = small()
    before = deploy.load(folder)
    expected = before(images)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.weight.data.mul_(-1)
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=8, a=8), calibrate=images).eval()
    after = deploy.to_tvm(quantized, images, folder)
    program = lower(capture(quantized, images), quantized, images)
    assert np.array_equal(after(images.numpy()), interpreter.run(program, images.numpy())[0])
    (folder / "network.so").write_bytes(b"")
    assert torch.equal(before(images), expected)
    with pytest.raises(ValueError, match=r"network.so has 0 bytes, not the [\d,]+ that were written"):
        deploy.load(folder)


def test_a_library_that_is_none_is_refused(written: Path, tmp_path: Path) -> None:
    """As somebody made it who described it, too."""
    folder = tmp_path / "deployed"
    shutil.copytree(written, folder)
    content = json.loads((folder / "network.json").read_text())
    for entry in ("files", "sha256", "format"):
        del content[entry]
    folders.write(folder, content | {"calls": ["no_such"]})
    with pytest.raises(ValueError, match=r"network.so can't be loaded, from a copy in .*: "):
        deploy.load(folder)
    folders.write(folder, content | {"target": {"kind": "abacus"}})
    with pytest.raises(ValueError, match='Target kind "abacus" is not defined'):
        deploy.load(folder)
    (folder / "network.so").write_bytes(b"no library")
    folders.write(folder, content)
    with pytest.raises(ValueError, match=r"network.so can't be loaded, from a copy in .*: "):
        deploy.load(folder)


def zipped(path: Path, name: str, content: bytes, how: int) -> None:
    with zipfile.ZipFile(path, "w", how) as file:
        file.writestr(f"{name}.npy", content)


def test_constants_that_are_none_are_refused(written: Path, tmp_path: Path) -> None:
    """Again as somebody made and described them: other sizes and types, and what would fill the memory."""
    folder = tmp_path / "deployed"
    shutil.copytree(written, folder)
    content = json.loads((folder / "network.json").read_text())
    for entry in ("files", "sha256", "format"):
        del content[entry]
    path = folder / "constants.npz"
    whole = np.load(path)["packed"]

    def refused(message: str) -> None:
        folders.write(folder, content)
        with pytest.raises(ValueError, match=f"constants.npz {message}"):
            deploy.load(folder)

    np.savez(path, other=whole)
    refused("can't be read: the array '(other|packed)' is missing")
    for wrong in (whole[:-1], whole.reshape(1, -1), whole.astype(np.int8)):
        np.savez(path, packed=wrong)
        refused("has 'packed' of another size or type than network.json says")
    np.savez_compressed(path, packed=np.zeros(2**24, np.uint8))
    assert path.stat().st_size < 2**16
    refused("can't be read: its arrays take 16.8 MB in memory, and .* are allowed")
    held = io.BytesIO()
    np.save(held, whole)
    for how in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        zipped(path, "packed", held.getvalue(), how)
        refused("can't be read: it is compressed in another way than ours are")
    zipped(path, "packed", held.getvalue()[:-7], zipfile.ZIP_DEFLATED)
    refused("can't be read: an array isn't of the size that it says")
    zipped(path, "packed", held.getvalue(), zipfile.ZIP_DEFLATED)
    folders.write(folder, content)
    assert deploy.load(folder).folder == folder


class Reused(nn.Module):
    """A layer that is called twice, the second time without what its quantization does."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 3, 1, 1)
        self.last = nn.Linear(3 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).flatten(1))  # type: ignore[no-any-return]


def test_what_is_off_by_more_than_rounding_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever mistake it comes from: here one of the lowering, which forgets a bias, and doubles a scale."""
    torch.manual_seed(0)
    network, images = Reused().eval(), torch.randn(8, 3, 8, 8)
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), calibrate=images).eval()
    graph = capture(quantized, images)
    wrong = copy.deepcopy(quantized)
    wrong.first.bias.data += 1
    with pytest.raises(ValueError, match=r"its integer program gives layer 'last' integers that are off by up to \d+"):
        interpreter.check(quantized, lower(graph, wrong, images), images)
    wrong = copy.deepcopy(quantized)
    wrong.last.bias.data += 1
    with pytest.raises(ValueError, match="its integer program gives outputs that are off by 1"):
        interpreter.check(quantized, lower(graph, wrong, images), images)
    wrong = Q.quantize(network, {"first": (4, 4), "last": (4, None)}, calibrate=images).eval()
    with pytest.raises(ValueError, match="rounds what enters layer 'last', which the network doesn't"):
        interpreter.check(wrong, lower(graph, quantized, images), images)
    monkeypatch.setattr("haq.deployment.tvm.lower", lambda graph, network, images: lower(graph, wrong, images))
    with pytest.raises(ValueError, match="doesn't round what enters layer 'last', which the network does"):
        deploy.to_tvm(quantized, images, tmp_path / "deployed")
    assert not (tmp_path / "deployed").exists()


def test_bad_folders_and_images(written: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no network.json: python -m haq.deploy RUN --to tvm"):
        deploy.load(tmp_path)
    (tmp_path / "network.json").write_text("{}")
    with pytest.raises(ValueError, match="is of format 'None', not 'haq-deployed-3'"):
        deploy.load(tmp_path)
    deployed = deploy.load(written)
    with pytest.raises(ValueError, match=r"float32 images \(N, 3, 16, 16\), not float32 of \(1, 1, 16, 16\)"):
        deployed(np.zeros((1, 1, 16, 16), np.float32))
    with pytest.raises(ValueError, match="not uint8"):
        deployed(np.zeros((1, 3, 16, 16), np.uint8))
    assert deployed(np.zeros((0, 3, 16, 16), np.float32)).shape == (0, 5)
