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


def quantized(scheme: object = "linear", bits: tuple[int, int] = (3, 4)) -> tuple[nn.Module, nn.Module]:
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
    ],
)
def test_every_scheme_comes_back_as_it_was(scheme: object, bits: tuple[int, int], tmp_path: Path) -> None:
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
