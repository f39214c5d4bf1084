"""Networks come by name; the default one is what it claims; a checkpoint that isn't one is refused and never run."""

from __future__ import annotations

import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import hw_models
from haq import data, hardware, networks, training
from haq.networks import zoo
from haq.study.config import SearchConfig
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


def test_counting_outputs_leaves_every_module_in_its_mode() -> None:
    module = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 3)).train()
    module[0].eval()
    assert networks.output_count(networks.Network("n", module, (1, 2, 2))) == 3
    assert [part.training for part in module.modules()] == [True, False, True, True]


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


def _bare(network: networks.Network) -> dict[str, torch.Tensor]:
    return dict(network.module.state_dict())


def _put(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: {**state, key: change(state[key])}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"epoch": 3, "model_state_dict": state},
        lambda state: {"state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{key}": value for key, value in state.items()},
        lambda state: {f"_orig_mod.module.{key}": value for key, value in state.items()},
        lambda state: {key: nn.Parameter(value, requires_grad=False) for key, value in state.items()},
        _put("stem.weight", lambda x: x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)),
        _put("stem.weight", torch.Tensor.double),
    ],
)
def test_what_training_scripts_save_is_accepted(wrap: Callable[[Any], object], tmp_path: Path) -> None:
    network = networks.load("mobilenet-mini", pretrained=False)
    torch.save(wrap(_bare(network)), tmp_path / "net.pt")
    assert networks.load(f"mobilenet-mini@{tmp_path}/net.pt").signature() == network.signature()


BIG = torch.zeros(10**6)


def _laughs(state: object) -> object:
    """Lists within lists, each twice: few bytes, and 2 ** 50 ways through them."""
    made: list[Any] = []
    for _ in range(50):
        made = [made, made]
    return {"a": made}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda state: dict(enumerate(state.values())), "one of its keys is 0, not the name of a tensor"),
        (lambda state: {(1, 2): torch.zeros(1)}, "one of its keys is a tuple, not the name of a tensor"),
        (lambda state: {"a": {"b": 1}}, "no state dict of tensors: 'a' is mapping"),
        (_laughs, "'a' is list"),
        (_put("stem.weight", lambda x: x.to("meta")), "it holds a meta tensor"),
        (_put("stem.weight", torch.Tensor.to_sparse), "it holds a sparse tensor"),
        (_put("stem.weight", lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)), "quantized tensor|was not opened"),
        (_put("stem.weight", lambda x: torch.zeros(1).expand(10**6, 10**6)), r"a tensor that repeats its values"),
        (lambda state: {str(key): BIG[key:] for key in range(20)}, "its tensors are several times as large as the file"),
        (_put("stem.weight", lambda x: x.to(torch.complex64)), r"holds stem\.weight as torch\.complex64; the network has"),
        (_put("stem.weight", lambda x: x > 0), r"holds stem\.weight as torch\.bool"),
        (_put("stem.weight", lambda x: x.to(torch.int8)), r"holds stem\.weight as torch\.int8"),
        (_put("stem.weight", lambda x: x.to(torch.float8_e4m3fn)), r"holds stem\.weight as torch\.float8_e4m3fn"),
        (_put("stem_norm.running_var", torch.neg), r"negative values in stem_norm\.running_var, a variance"),
        (_put("stem_norm.num_batches_tracked", torch.Tensor.float), r"num_batches_tracked as torch\.float32"),
        (lambda state: {"a": torch.tensor(1.0)}, "no tensor with a value"),
        (lambda state: {"a": torch.zeros(10**9, 0)}, "no tensor with a value"),
        (lambda state: {**state, "z": torch.zeros(10**6, dtype=torch.int8)}, "ends with a tensor of 1,000,000 rows"),
        (lambda state: [], "no state dict of tensors but list"),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_what_is_no_state_dict_is_refused(make: Callable[[Any], object], message: str, tmp_path: Path) -> None:
    torch.save(make(_bare(networks.load("mobilenet-mini", pretrained=False))), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=message) as caught:
        networks.load(f"mobilenet-mini@{tmp_path}/net.pt")
    assert str(caught.value).isprintable()


def test_nothing_is_unpacked_that_a_checkpoint_says_is_larger_than_it(tmp_path: Path) -> None:
    path, packed = tmp_path / "net.pt", tmp_path / "packed.pt"
    torch.save({"a": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as file, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as other:
        for entry in file.infolist():
            other.writestr(entry.filename, file.read(entry.filename))
    with pytest.raises(ValueError, match="it is compressed, which nothing is that torch.save writes"):
        networks.load(f"mobilenet-mini@{packed}")
    for new_format in (True, False):
        torch.save({"a": torch.zeros(10**6)}, path, _use_new_zipfile_serialization=new_format)
        content = path.read_bytes().replace((10**6).to_bytes(4, "little"), (2 * 10**9).to_bytes(4, "little"))
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated or of another kind"):
            networks.load(f"mobilenet-mini@{path}")


@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "somewhere"])
def test_a_pipe_is_not_waited_for(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    os.mkfifo(path)
    for given in (str(path), f"mobilenet-mini@{path}"):
        with pytest.raises(ValueError, match="is no ordinary file"):
            networks.load(given)


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({"mean": "[0, 0, 0]"}, r"mean '\[0, 0, 0\]'; one finite number is accepted, or one a channel"),
        ({"std": "[]"}, r"std '\[\]'; one number above 0 is accepted"),
        ({"std": "[-1]"}, r"std '\[-1\]'; one number above 0 is accepted"),
        ({"std": "[true]"}, "std"),
        ({"std": "[NaN]"}, "std"),
        ({"mean": "[" * 900}, "describes no network of its tensors"),
        ({"mean": f"[0{',0' * 1000}]"}, "its mean has 2,003 characters, at most 1,000 are read"),
        ({"input_shape": "[1, 4096, 4096]"}, r"images of '\[1, 4096, 4096\]', at most 3x800x800 are accepted"),
        ({"input_shape": "[true, 28, 28]"}, "images of"),
        ({"input_shape": f"[1, 1, {'9' * 900}]"}, "images of '.1, 1, 9+[.]{3}, at most"),
        ({"network": "timm:vit_giant_patch14_224"}, "is a checkpoint of another network"),
        ({"network": "timm:hf-hub:a/b"}, "timm has no 'hf-hub:a/b'"),
        (
            {"network": "pytest:main"},
            "names network pytest:main, and code is never called because a file says so: add --trust",
        ),
        (
            {"network": "x" * 5000},
            "net.safetensors names a network that can't be built: unknown network 'x{200}'; did you mean",
        ),
        ({"network": "\u202epytest:main"}, r"net.safetensors names a network that can't be built: unknown network '\\u202e"),
        ({"network": ""}, "net.safetensors doesn't say which network it is of; name the network: NAME@"),
        ({"std": "[1e-45]"}, "std '.1e-45.'; one number above 0 is accepted"),
    ],
)
def test_a_header_that_can_be_of_no_network_is_refused(notes: dict[str, str], message: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    networks.save_checkpoint(networks.load("mobilenet-mini", pretrained=False), path)
    tensors, held = networks.read_state(path)
    path.write_bytes(safetensors.torch.save(tensors, {**held, **notes}))
    with pytest.raises(ValueError, match=message) as caught:
        networks.load(str(path))
    assert len(str(caught.value)) < 900


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
    with pytest.raises(ImportError, match=r"timm is not installed: pip install 'torchvision>="):
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
    shapeless = networks.load("my_own_network:shapeless")
    assert shapeless.input_shape == ()
    with pytest.raises(ValueError, match=r"set module\.input_shape"):
        networks.output_count(shapeless)
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
    with pytest.raises(
        ValueError, match=r"unknown network 'mobilenetv2_050'.*not installed: timm .*pip install 'torchvision>="
    ):
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


def test_images_that_a_network_can_not_take_are_told(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    network = networks.load("mobilenet-mini", pretrained=False)
    networks.save_checkpoint(replace(network, input_shape=(3, 28, 28)), path)
    message = "^mobilenet-mini can't take images of 3x28x28, which it or its file says that it takes: RuntimeError"
    with pytest.raises(ValueError, match=message):
        networks.output_count(networks.load(str(path)))
    with pytest.raises(ValueError, match=message):
        hardware.main(["show", "edge", "--network", str(path)])


def test_a_path_may_have_the_sign_that_parts_it_from_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    network = networks.load("mobilenet-mini", pretrained=False)
    for path in ("a@b/x@y.safetensors", "x@y.safetensors"):
        networks.save_checkpoint(network, Path(path))
        for name in (path, str(tmp_path / path), f"mobilenet-mini@{path}"):
            assert networks.load(name).signature() == network.signature()
            asked = SearchConfig(network=name)
            assert asked.files()["network"].samefile(path)
            assert not asked.code()
    for name in ("mine:net@a@b.pt", "mine:net@b/c@d.pt"):
        assert SearchConfig(network=name).code() == [("network", "mine:net")]


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
