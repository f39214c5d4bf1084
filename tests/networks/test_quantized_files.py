"""One file holds a quantized network, whatever its schemes; what isn't one, or is of another network, is refused unread."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import quantizers as Q
from haq import networks
from haq.networks import Network
from tests.conftest import images, small_network


def quantized(scheme: object = "linear", bits: tuple[int | None, int | None] = (3, 4)) -> tuple[nn.Module, nn.Module]:
    """A float network and its quantized copy."""
    module = small_network()
    policy = Q.BitPolicy.uniform(module, *bits)
    return module, Q.quantize(module, policy, scheme=scheme, calibrate=images(32)).eval()  # type: ignore[arg-type]


def test_the_shipped_checkpoint_is_written_again_as_it_is(tmp_path: Path) -> None:
    with resources.as_file(resources.files("haq").joinpath("assets/mobilenet-mini.safetensors")) as path:
        shipped = path.read_bytes()
        notes = networks.read_header(path).notes
    free = {key: text for key, text in notes.items() if key in ("command", "trained_on", "test_accuracy")}
    written = []
    for name in ("one.safetensors", "two.safetensors"):
        networks.save_checkpoint(networks.load(), tmp_path / name, free)
        written.append((tmp_path / name).read_bytes())
    # It was written before notes were put in order; everything else is the same, byte by byte.
    assert written[0] == written[1]
    assert _split(written[0]) == _split(shipped)


def _split(content: bytes) -> tuple[dict[str, object], bytes]:
    """The header and the bytes of the tensors."""
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        ("linear", (3, 4)),
        (Q.Linear(calibration="kl"), (4, 4)),
        ("lsq", (2, 3)),
        ("lsqplus", (2, 3)),
        ("pact", (4, 4)),
        ("dorefa", (2, 2)),
        ("kmeans", (3, 8)),
        ("binary", (1, 1)),
        ("linear", (16, 16)),
        ("linear-asymmetric", (4, 16)),
        ("linear", (None, 16)),
        ("linear", (16, None)),
        ("linear", (None, None)),
        ("lsq", (16, 16)),
        ("pact", (8, 16)),
    ],
)
def test_every_scheme_comes_back_as_it_was(scheme: object, bits: tuple[int | None, int | None], tmp_path: Path) -> None:
    module, qnetwork = quantized(scheme, bits)
    path = tmp_path / "q.safetensors"
    networks.save_quantized(path, qnetwork, notes={"why": "a test"})
    again = networks.load_quantized(path, module=module)
    assert torch.equal(again(images(8, 1)), qnetwork(images(8, 1)))
    assert Q.get_policy(again) == Q.get_policy(qnetwork)
    for name, layer in Q.quant_layers(again).items():
        assert layer.scheme == Q.quant_layers(qnetwork)[name].scheme
    assert networks.read_header(path).notes["why"] == "a test"
    first = path.read_bytes()
    networks.save_quantized(path, again, notes={"why": "a test"})
    assert path.read_bytes() == first


def _without_16_bits(path: Path) -> None:
    """Make a file what it would be of before there were 16 bits: tensors by width have eight rows."""
    notes = networks.read_header(path).notes
    tensors = safetensors.torch.load_file(path)
    for key, tensor in tensors.items():
        if key.startswith("quantizer/") and tensor.dim() and len(tensor) == 9:
            tensors[key] = tensor[:8].clone()
    safetensors.torch.save_file(tensors, path, metadata=notes)


@pytest.mark.parametrize("scheme", ["linear", "linear-asymmetric", "lsq"])
def test_files_of_before_there_were_16_bits_are_read(scheme: str, tmp_path: Path) -> None:
    module, qnetwork = quantized(scheme, (3, None))
    path = tmp_path / "q.safetensors"
    networks.save_quantized(path, qnetwork)
    _without_16_bits(path)
    again = networks.load_quantized(path, module=module)
    assert torch.equal(again(images(8, 1)), qnetwork(images(8, 1)))
    Q.set_policy(again, Q.BitPolicy.uniform(module, 8, 8))
    with pytest.raises(ValueError, match="layer 'stem': .*16 bits"):
        Q.set_policy(again, Q.BitPolicy.uniform(module, 16, 8))
    assert set(Q.get_policy(again).values()) == {(8, 8)}
    # It is written again as it was, and read once more.
    networks.save_quantized(path, again)
    assert set(Q.get_policy(networks.load_quantized(path, module=module)).values()) == {(8, 8)}


def test_a_file_of_before_there_were_16_bits_has_no_policy_with_them(tmp_path: Path) -> None:
    module, qnetwork = quantized("linear", (16, 16))
    path = tmp_path / "q.safetensors"
    networks.save_quantized(path, qnetwork)
    _without_16_bits(path)
    with pytest.raises(ValueError, match=r"q.safetensors .*16 bits"):
        networks.load_quantized(path, module=module)


def test_schemes_by_layer_and_trained_weights_come_back(tmp_path: Path) -> None:
    module = small_network()
    policy = Q.BitPolicy.uniform(module, 4, 4)
    names = list(policy)
    schemes = dict.fromkeys(names, "lsq") | {names[0]: "linear", names[-1]: "linear"}
    qnetwork = Q.quantize(module, policy, scheme=schemes, calibrate=images(32))
    with torch.no_grad():
        for parameter in qnetwork.parameters():
            parameter.mul_(1.01)
    path = tmp_path / "q.safetensors"
    networks.save_quantized(path, qnetwork)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    again = networks.load_quantized(path, module=module)
    assert not again.training
    assert [layer.scheme.name for layer in Q.quant_layers(again).values()] == list(schemes.values())
    assert torch.equal(again(images(8, 1)), qnetwork.eval()(images(8, 1)))
    # The network that was given stays what it was.
    assert all(torch.equal(before[key], tensor) for key, tensor in module.state_dict().items())


def test_a_network_with_a_known_name_needs_nothing_else(tmp_path: Path) -> None:
    network = networks.load()
    x = torch.rand(8, 1, 28, 28)
    qnetwork = Q.quantize(network.module, Q.BitPolicy.uniform(network.module, 4, 4), calibrate=x).eval()
    path = tmp_path / "q.safetensors"
    networks.save_quantized(path, qnetwork, network)
    assert networks.holds_quantized(path)
    assert torch.equal(networks.load_quantized(path)(x), qnetwork(x))
    float_one = networks.load(str(path))
    assert not Q.quant_layers(float_one.module)
    assert float_one.signature() == network.signature()
    assert (float_one.mean, float_one.std) == (network.mean, network.std)


def test_a_network_of_ones_own_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "never_imported.py").write_text("raise SystemExit('code that a file names was run')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    module, qnetwork = quantized()
    path = tmp_path / "q.safetensors"
    for network, message in (
        (None, r"doesn't say which network it is of: give the float network, load_quantized\(path, module=network\)"),
        (Network("never_imported:network", module, (1, 8, 8)), r"never called because a file says so.*module=network\)"),
        (Network("small", module, (1, 8, 8)), r"unknown network 'small'.*module=network\)"),
    ):
        networks.save_quantized(path, qnetwork, network)
        with pytest.raises(ValueError, match=message):
            networks.load_quantized(path)
        assert "never_imported" not in sys.modules
        assert torch.equal(networks.load_quantized(path, module=module)(images(4)), qnetwork(images(4)))


def _set(key: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    def make(tensors: dict[str, Tensor], notes: dict[str, str]) -> None:
        tensors[key] = change(tensors[key])

    return make


def _note(**changes: str) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, notes: notes.update(changes)


def _drop(key: str) -> Callable[[dict[str, Tensor], dict[str, str]], None]:
    return lambda tensors, notes: void(tensors.pop(key))


def void(value: object) -> None:
    return None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("stem.weight", lambda t: t[:, :, :1]), "of another network.*1 of another shape"),
        (_set("stem.weight", lambda t: t.double()), r"stem\.weight is torch\.float64"),
        (_set("stem.weight", lambda t: t * float("nan")), r"stem\.weight has values that are not finite"),
        (_drop("stem.weight"), "1 tensors missing"),
        (_drop("quantizer/stem.weight_scale"), "names differ"),
        (_set("quantizer/stem.weight_scale", lambda t: t[:1]), r"stem\.weight_scale"),
        (_set("quantizer/stem.weight_scale", lambda t: t.double()), r"stem\.weight_scale is torch\.float64"),
        (_set("quantizer/stem.weight_scale", lambda t: t * float("inf")), "not finite"),
        (_set("quantizer/stem.weight_scale", lambda t: -t), r"stem\.weight_scale has the value -.*must be above 0"),
        (_set("quantizer/stem.activation_scale", lambda t: t * 0), r"stem\.activation_scale has the value 0; a scale must be"),
        (_set("quantizer/stem.activation_scale", lambda t: t * float("nan")), r"stem\.activation_scale .*not finite"),
        (_set("quantizer/stem.activation_signed", lambda t: t * float("nan")), r"stem\.activation_signed .*not finite"),
        (_set("quantizer/stem.activation_signed", lambda t: t * 0 + 7), r"stem\.activation_signed is 7; it must be 0 or 1"),
        (_set("quantizer/stem.weight_error", lambda t: t + float("inf")), r"stem\.weight_error .*not finite"),
        (_set("quantizer/stem.activation_error", lambda t: t * float("nan")), r"stem\.activation_error .*not finite"),
        (_note(structure="0" * 16), "of another network, with the same tensors: the class of a module differs, or"),
        (_note(structure="?"), "doesn't say of which structure its network is"),
        (lambda tensors, notes: void(notes.pop("structure")), "doesn't say of which structure its network is"),
        (_set("quantizer/stem.signed", lambda t: torch.zeros(3)), "aren't of its network"),
        (lambda tensors, notes: tensors.update(other=torch.zeros(3)), "1 unknown"),
        (lambda tensors, notes: tensors.update({"quantizer/other": torch.zeros(3)}), "names differ"),
        (lambda tensors, notes: tensors.update({"quantizer/other": torch.zeros(2**24)}), "and was not read"),
        (_note(policy="{}"), "without bits and schemes"),
        (_note(policy="[" * 100_000), "without bits and schemes"),
        (_note(schemes="{}"), "the policy's layers"),
        (_note(schemes=json.dumps({"stem": {"name": "os:abort", "options": {}}})), "without bits and schemes"),
        (_note(schemes=json.dumps({"stem": {"name": "linear", "options": {"color": 1}}})), "without bits and schemes"),
        (_note(format="haq-network-3"), "made by a newer version of haq .*upgrade haq"),
        (_note(format="haq-quantized-1"), r"made by an older version of haq.*python -m haq\.finetune RUN"),
        (_note(format="haq-checkpoint-1"), r"made by an older version of haq.*python -m haq\.train"),
        (_note(format="other"), "is not a quantized network"),
    ],
)
def test_what_is_not_of_the_network_is_refused(
    change: Callable[[dict[str, Tensor], dict[str, str]], None], message: str, tmp_path: Path
) -> None:
    module, qnetwork = quantized()
    path = tmp_path / "q.safetensors"
    networks.save_quantized(path, qnetwork)
    tensors, notes = networks.read_state(path)
    change(tensors, notes)
    path.write_bytes(safetensors.torch.save({key: tensor.contiguous() for key, tensor in tensors.items()}, notes))
    with pytest.raises(ValueError, match=message) as raised:
        networks.load_quantized(path, module=module)
    assert len(str(raised.value)) < 700
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("scheme", "key"), [("lsq", "weight_scale"), ("lsqplus", "activation_scale"), ("pact", "activation_clip")]
)
def test_a_learned_step_may_be_negative_but_not_zero(scheme: str, key: str, tmp_path: Path) -> None:
    module, qnetwork = quantized(scheme, (4, 4))
    path = tmp_path / "q.safetensors"
    networks.save_quantized(path, qnetwork)
    tensors, notes = networks.read_state(path)
    tensors[f"quantizer/stem.{key}"] *= -1
    path.write_bytes(safetensors.torch.save(tensors, notes))
    assert torch.equal(networks.load_quantized(path, module)(images(4)), qnetwork(images(4)))
    for value, message in ((0.0, "has the value 0; a scale must be above 0"), (float("nan"), "not finite")):
        tensors[f"quantizer/stem.{key}"].fill_(value)
        path.write_bytes(safetensors.torch.save(tensors, notes))
        with pytest.raises(ValueError, match=rf"stem\.{key} .*{message}"):
            networks.load_quantized(path, module)


@pytest.mark.parametrize("scheme", ["linear", "lsq", "lsqplus", "pact", "dorefa", "kmeans", "binary"])
def test_weights_and_inputs_of_zeros_can_be_kept(scheme: str, tmp_path: Path) -> None:
    module = small_network()
    with torch.no_grad():
        module.get_submodule("hidden").weight.zero_()  # type: ignore[union-attr, operator]
        module.get_submodule("hidden").bias.zero_()  # type: ignore[union-attr, operator]
        module.get_submodule("stem").weight[0] = 0  # type: ignore[index, operator]
    qnetwork = Q.quantize(module, Q.BitPolicy.uniform(module, 4, 4), scheme=scheme, calibrate=images(32)).eval()
    path = tmp_path / "q.safetensors"
    networks.save_quantized(path, qnetwork)
    assert torch.equal(networks.load_quantized(path, module)(images(4)), qnetwork(images(4)))


def _another(name: str, module: nn.Module) -> nn.Module:
    network = small_network()
    setattr(network, name, module)
    return network


class Scaled(nn.Module):
    """A module of somebody's own, that counts its calls."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.factor


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("relu", nn.Tanh()),
        ("relu", nn.Sequential()),
        ("relu2", nn.LeakyReLU()),
        ("norm", nn.BatchNorm2d(16, eps=0.1).eval()),
        ("pool", nn.AdaptiveMaxPool2d(2)),
        ("depthwise", nn.Conv2d(16, 16, 3, 2, 1, groups=16)),
        ("depthwise", nn.Conv2d(16, 16, 3, 1, 2, dilation=2, groups=16)),
        ("depthwise", nn.Conv2d(16, 16, 3, 1, 1, groups=16, padding_mode="circular")),
        ("stem", nn.Conv2d(1, 16, 3, 2, 3, bias=False)),
    ],
)
def test_another_structure_with_the_same_tensors_is_refused(name: str, module: nn.Module, tmp_path: Path) -> None:
    other = _another(name, module)
    float_one, qnetwork = quantized()
    path = tmp_path / "q.safetensors"
    networks.save_quantized(path, qnetwork)
    assert set(other.state_dict()) == set(float_one.state_dict())
    with pytest.raises(ValueError, match="is of another network, with the same tensors") as error:
        networks.load_quantized(path, other)
    assert "\n" not in str(error.value)


def test_what_does_not_change_a_networks_answers_does_not_matter(tmp_path: Path) -> None:
    module = _another("relu2", Scaled(0.5))
    qnetwork = Q.quantize(module, Q.BitPolicy.uniform(module, 4, 4), calibrate=images(32))
    path = tmp_path / "q.safetensors"
    networks.save_quantized(path, qnetwork)
    fresh = _another("relu2", Scaled(0.5)).train()
    fresh.get_submodule("relu").inplace = False  # type: ignore[assignment]
    fresh.get_submodule("norm").momentum = 0.5  # type: ignore[assignment]
    assert torch.equal(networks.load_quantized(path, fresh)(images(4)), qnetwork.eval()(images(4)))
    with pytest.raises(ValueError, match="with the same tensors"):
        networks.load_quantized(path, _another("relu2", Scaled(0.25)))


def test_older_quantized_files_are_not_taken_for_float_ones(tmp_path: Path) -> None:
    _, qnetwork = quantized()
    path = tmp_path / "q.safetensors"
    networks.save_quantized(path, qnetwork)
    tensors, notes = networks.read_state(path)
    path.write_bytes(safetensors.torch.save(tensors, notes | {"format": "haq-checkpoint-1"}))
    assert networks.holds_quantized(path)
    with pytest.raises(ValueError, match="made by an older version"):
        networks.load(str(path))


def test_notes_cannot_replace_what_the_format_says(tmp_path: Path) -> None:
    _, qnetwork = quantized()
    with pytest.raises(ValueError, match="a note can't be named 'policy'"):
        networks.save_quantized(tmp_path / "q.safetensors", qnetwork, notes={"policy": "{}"})
    assert not list(tmp_path.iterdir())


def test_a_network_without_class_scores_has_a_checkpoint_too(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3))
    path = tmp_path / "maps.safetensors"
    networks.save_checkpoint(Network("maps", module, (1, 8, 8)), path)
    assert "classes" not in networks.read_header(path).notes
