"""Networks come by name; the default one is what it claims; a checkpoint that isn't one is refused and never run."""

from __future__ import annotations

import pickle
import sys
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import nn

import hw_models
from haq import data, networks, training
from haq.networks import zoo
from hw_models import trust


def test_the_default_network() -> None:
    network = networks.load()
    layers = hw_models.trace(network.module, torch.zeros(1, 1, 28, 28)).layers
    assert len(layers) >= 12
    assert {layer.kind for layer in layers} == {"conv", "depthwise", "pointwise", "linear"}
    asset = resources.files("haq").joinpath("assets/mobilenet-mini.safetensors")
    assert len(asset.read_bytes()) < 1e6
    with resources.as_file(asset) as path:
        notes = networks.read_state(path)[1]
    assert notes["command"].startswith("python -m haq.train --network mobilenet-mini --data fashion-mnist --epochs")
    assert "55,000 train" in notes["trained_on"]


def test_its_accuracy_on_images_it_never_saw() -> None:
    network, dataset = networks.load(), data.load()
    assert training.accuracy(network, dataset.test) >= 0.90
    assert training.accuracy(network, dataset.search) >= 0.90
    try:
        full = data.load("fashion-mnist")
    except FileNotFoundError:
        return
    assert training.accuracy(network, full.test) >= 0.90


@pytest.mark.parametrize(
    "name",
    [
        "timm:mobilenetv2_050",
        "torchvision:squeezenet1_1",
        "pytorchcv:mobilenet_wd4",
        "efficientnet-lite0",
        "mobilenet-mini",
    ],
)
def test_every_library_builds(name: str) -> None:
    network = networks.load(name, classes=7, pretrained=False)
    assert networks.output_count(network) == 7
    assert not network.module.training


def test_efficientnet_lite0_has_its_imagenet_weights() -> None:
    network = networks.load("efficientnet-lite0")
    assert sum(p.numel() for p in network.module.parameters()) == 4_652_008
    inputs = network.preprocess(torch.tensor([0, 127, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 224, 224))
    assert inputs[0, :, 0, 0].tolist() == pytest.approx([-127 / 128, 0, 1])
    assert networks.output_count(network) == 1000


def test_preprocessing() -> None:
    network = networks.Network("n", nn.Identity(), (3, 2, 2), (0.5, 0.5, 0.5), (0.25, 0.5, 1.0))
    grey = torch.tensor([[[[0, 255], [51, 102]]]], dtype=torch.uint8)
    out = network.preprocess(grey)
    assert out.shape == (1, 3, 2, 2)
    assert out[0, :, 0, 1].tolist() == [2, 1, 0.5]
    floats = torch.rand(1, 3, 2, 2)
    assert torch.equal(network.preprocess(floats), floats)
    with pytest.raises(ValueError, match=r"takes images of shape \(3, 2, 2\), the data set has \(3, 4, 4\)"):
        network.preprocess(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))


def test_a_checkpoint_brings_its_network_back(tmp_path: Path) -> None:
    network = networks.load("mobilenet-mini", classes=4, pretrained=False)
    path = tmp_path / "mine.safetensors"
    networks.save_checkpoint(network, path)
    again = networks.load(str(path))
    assert again.signature() == network.signature()
    assert again.name == "mobilenet-mini"
    assert networks.output_count(again) == 4
    assert networks.load(f"mobilenet-mini@{path}").signature() == network.signature()
    torch.save({"state_dict": network.module.state_dict()}, tmp_path / "mine.pt")
    assert networks.load(f"mobilenet-mini@{tmp_path}/mine.pt").signature() == network.signature()


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('code in a checkpoint was run')",)


def test_bad_checkpoints_are_refused_with_the_reason(tmp_path: Path) -> None:
    network = networks.load("mobilenet-mini", pretrained=False)
    good = tmp_path / "good.safetensors"
    networks.save_checkpoint(network, good)
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(good.read_bytes()[:-100])
    nameless = tmp_path / "nameless.pt"
    torch.save(network.module.state_dict(), nameless)
    other = tmp_path / "other.pt"
    torch.save({"layer.weight": torch.zeros(3, 3)}, other)
    evil, plain = tmp_path / "evil.pt", tmp_path / "plain.pt"
    torch.save({"weight": Evil()}, evil)
    plain.write_bytes(pickle.dumps(Evil()))
    cut = tmp_path / "cut.pt"
    cut.write_bytes(nameless.read_bytes()[:1000])
    numbers = tmp_path / "numbers.pt"
    torch.save([1, 2], numbers)
    broken = dict(network.module.state_dict())
    broken["stem.weight"] = broken["stem.weight"] * float("nan")
    torch.save(broken, tmp_path / "nan.pt")
    for name, reason in (
        (truncated, "truncated"),
        (cut, "truncated|can't be read"),
        (nameless, r"doesn't say which network.*NAME@"),
        (f"mobilenet-mini@{other}", "another network: .* missing"),
        (evil, "code.*not opened"),
        (plain, "code.*not opened|can't be read"),
        (f"mobilenet-mini@{numbers}", "no state dict of tensors but list"),
        (f"mobilenet-mini@{tmp_path}/nan.pt", r"not finite in stem\.weight"),
    ):
        with pytest.raises(ValueError, match=reason):
            networks.load(str(name))
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        networks.load("nowhere.safetensors")


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("mobilenet-mni", "mobilenet-mini"),
        ("timm:mobilenetv2_10", "timm:mobilenetv2_100"),
        ("torchvision:resnet19", "torchvision:resnet18"),
        ("pytorchcv:mobilenet_wd5", "pytorchcv:mobilenet_wd4"),
    ],
)
def test_unknown_names_list_the_close_ones(name: str, close: str) -> None:
    with pytest.raises(ValueError, match=f"unknown network '{name}'.*{close}"):
        networks.load(name)


def test_weights_that_cannot_be_had_say_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> nn.Module:
        raise ConnectionError("no route to hub\nmore")

    with pytest.raises(FileNotFoundError, match=r"\(no route to hub\); give them as timm:x@CHECKPOINT"):
        zoo.create("timm:x", True, fail)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'haq\[zoo\]'"):
        networks.load("timm:mobilenetv2_100")


MODULE = """
from torch import nn
def good():
    m = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)); m.input_shape = (1, 2, 2); return m
def shapeless(): return nn.Linear(4, 3)
def wrong(): return 3
"""


def test_a_function_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_network.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    network = networks.load("my_own_network:good")
    assert network.input_shape == (1, 2, 2)
    assert networks.output_count(network) == 3
    with pytest.raises(ValueError, match=r"set module\.input_shape"):
        networks.load("my_own_network:shapeless")
    with pytest.raises(ValueError, match="returned int"):
        networks.load("my_own_network:wrong")


def test_networks_and_data_must_fit() -> None:
    network, dataset = networks.load("mobilenet-mini", classes=7, pretrained=False), data.load()
    with pytest.raises(ValueError, match="7 classes apart, fashion-mnist-12k has 10"):
        networks.check_fits(network, dataset)
    large = networks.load("timm:mobilenetv2_050", classes=10, pretrained=False)
    with pytest.raises(ValueError, match=r"takes images of shape \(3, 224, 224\)"):
        networks.check_fits(large, dataset)


def test_a_bare_name_is_looked_for_in_the_zoo_and_says_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert networks.load("mobilenetv2_050", pretrained=False).name == "timm:mobilenetv2_050"
    assert networks.load("mobilenet_wd4", pretrained=False).name == "pytorchcv:mobilenet_wd4"
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"unknown network 'mobilenetv2_050'.*not installed: timm .*pip install 'haq\[zoo\]'"):
        networks.load("mobilenetv2_050", pretrained=False)


PLUG_IN = """
from torch import nn
def tiny(classes=10):
    module = nn.Sequential(nn.Flatten(), nn.Linear(4, classes))
    module.input_shape = (1, 2, 2)
    return module
number = 3
"""


def test_an_installed_package_offers_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "more_networks.py").write_text(PLUG_IN)
    about = tmp_path / "more_networks-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: more-networks\nVersion: 1.0\nSummary: tiny networks\n")
    (about / "entry_points.txt").write_text("[haq.networks]\ntiny = more_networks:tiny\nbroken = more_networks:number\n")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert ("tiny", "more-networks 1.0", "tiny networks") in networks.NETWORKS.rows()
    network = networks.load("tiny", classes=3)
    assert (network.name, networks.output_count(network)) == ("tiny", 3)
    # A checkpoint may name what is installed: whoever installed it wants it to run.
    path = tmp_path / "tiny.safetensors"
    networks.save_checkpoint(network, path)
    assert networks.load(str(path)).signature() == network.signature()
    with pytest.raises(ValueError, match="network 'broken' can't be used: it lacks a way to be called"):
        networks.load("broken")


def test_a_checkpoint_calls_no_function_that_the_user_has_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "named_network.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    network = networks.load("named_network:good")
    path = Path("net.safetensors")
    networks.save_checkpoint(network, path)
    assert networks.load("net.safetensors").signature() == network.signature()
    monkeypatch.setattr(trust, "_named", set())
    with pytest.raises(ValueError, match=r"never called because a file says so.*named_network:good@net\.safetensors"):
        networks.load("net.safetensors")
    assert networks.load("named_network:good@net.safetensors").signature() == network.signature()


def test_names_of_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    found = networks.names_of("timm", "MobileNetV2")
    assert "timm:mobilenetv2_100" in found
    assert all("mobilenetv2" in name for name in found)
    assert networks.load(found[0], pretrained=False).name == found[0]
    with pytest.raises(ValueError, match="no library 'tim'; known: timm, torchvision, pytorchcv"):
        networks.names_of("tim")
    monkeypatch.setitem(sys.modules, "timm", None)
    assert networks.names_of("timm") == []


def test_checkpoints_are_named_such_that_any_process_can_load_them(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    for network, name in (
        ("mobilenet-mini", str(path)),
        ("timm:mobilenetv2_050@old.pt", str(path)),
        ("named_network:good", f"named_network:good@{path}"),
        ("named_network:good@old.safetensors", f"named_network:good@{path}"),
    ):
        assert networks.name_of_checkpoint(network, path) == name
        assert networks.path_of_checkpoint(name) is None
    path.touch()
    assert networks.path_of_checkpoint(str(path)) == networks.path_of_checkpoint(f"named_network:good@{path}") == path
    assert networks.path_of_checkpoint("named_network:good") is None


def raising_network() -> nn.Module:
    raise RuntimeError("no such layer")


def needing_network(width: int) -> None: ...


def no_network() -> None: ...


def double_network() -> networks.Network:
    return networks.Network("", nn.Sequential(nn.Flatten(), nn.Linear(4, 2)).double(), (1, 2, 2))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raising_network", r"test_networks:raising_network raised RuntimeError \(no such layer\): mend that function"),
        ("needing_network", "test_networks:needing_network needs the argument 'width'"),
        ("no_network", "test_networks:no_network returned NoneType; it must return an nn.Module"),
        ("double_network", r"double_network has weights of type torch.float64 \(1.weight\); they must be torch.float32"),
    ],
)
def test_a_function_that_makes_no_network_is_named(function: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        networks.load(f"{__name__}:{function}")
