"""A file of a network with fewer channels says which are kept; whatever else it says is refused in a sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import haq
import quantizers as Q
from haq import networks
from quantizers.kept import check_pruned_to
from tests.conftest import images, small_network


def smaller(network: nn.Module | None = None, share: float = 0.5) -> nn.Module:
    """The small network, in which every group keeps its first channels."""
    network = network or small_network()
    groups = Q.channel_groups(network, images(1))
    return Q.remove_channels(network, groups, {group.name: range(group.count(share)) for group in groups.groups})


def quantized(bits: int = 4) -> nn.Module:
    made = smaller()
    return Q.quantize(made, Q.BitPolicy.uniform(made, bits, bits), calibrate=images(32)).eval()


def changed(path: Path, change: Callable[[dict[str, str]], Any], tensors: dict[str, torch.Tensor] | None = None) -> None:
    """Write a file again, with another header or other tensors."""
    notes = dict(networks.read_header(path).notes)
    change(notes)
    held = safetensors.torch.load_file(path)
    held.update(tensors or {})
    safetensors.torch.save_file(held, path, metadata=notes)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a quantized network with half of its channels."""
    path = tmp_path_factory.mktemp("written") / "q.safetensors"
    networks.save_quantized(path, quantized())
    return path.read_bytes()


def test_it_comes_back_as_it_was_of_the_whole_float_network(tmp_path: Path) -> None:
    whole, made = small_network(), quantized()
    path = tmp_path / "q.safetensors"
    networks.save_quantized(path, made)
    kept = json.loads(networks.read_header(path).notes["channels"])
    assert kept == {name: list(channels) for name, channels in Q.kept_channels(made).items()}
    assert set(kept) == {"stem", "pointwise", "hidden"}
    before = {key: tensor.clone() for key, tensor in whole.state_dict().items()}
    again = haq.load(path, network=whole)
    assert torch.equal(again(images(8, 1)), made(images(8, 1)))
    assert Q.kept_channels(again) == Q.kept_channels(made)
    assert all(torch.equal(tensor, before[key]) for key, tensor in whole.state_dict().items())
    written = path.read_bytes()
    networks.save_quantized(path, again)
    assert path.read_bytes() == written
    # The network that was pruned itself will do too.
    assert torch.equal(haq.load(path, network=smaller())(images(8, 1)), made(images(8, 1)))


def test_what_was_loaded_knows_what_it_was_pruned_to(tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    networks.save_quantized(path, quantized())
    again = haq.load(path, network=small_network())
    check_pruned_to(again, dict.fromkeys(("stem", "pointwise", "hidden"), 0.5))
    with pytest.raises(ValueError, match="policy keeps 4 of the 16 channels of 'stem', but the network was pruned to 8"):
        check_pruned_to(again, {"stem": 0.25, "pointwise": 0.5, "hidden": 0.5})


def test_a_network_that_the_file_names_is_built_with_fewer_channels(tmp_path: Path) -> None:
    network = networks.load()
    x = torch.rand(4, *network.input_shape)
    groups = Q.channel_groups(network.module, x[:1])
    kept = {group.name: range(group.count(0.25)) for group in groups.groups}
    made = Q.remove_channels(network.module, groups, kept)
    qnetwork = Q.quantize(made, Q.BitPolicy.uniform(made, 4, 4), calibrate=x).eval()
    path = tmp_path / "q.safetensors"
    networks.save_quantized(path, qnetwork, network)
    assert torch.equal(networks.load_quantized(path)(x), qnetwork(x))
    for name in (str(path), f"mobilenet-mini@{path}"):
        loaded = networks.load(name).module
        assert Q.kept_channels(loaded) == Q.kept_channels(qnetwork)
        torch.testing.assert_close(loaded(x), Q.float_copy(qnetwork)(x))


class Grouped(nn.Module):
    """Convolutions of several groups, a norm of groups, and a scale that is a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.act = nn.PReLU(8)
        self.wide = nn.Conv2d(8, 16, 3, groups=8)
        self.norm2 = nn.GroupNorm(8, 16)
        self.up = nn.Conv2d(16, 6, 2)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 6)[:, None, None])
        self.last = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.grouped(torch.relu(self.norm(self.first(x)))))
        x = self.norm2(self.wide(x))
        return self.last((self.up(x) * self.scale).mean((2, 3)))


def test_whatever_layers_there_are(tmp_path: Path) -> None:
    whole = Grouped().eval()
    made = smaller(whole)
    assert Q.kept_channels(made)
    qnetwork = Q.quantize(made, Q.BitPolicy.uniform(made, 8, 8), calibrate=images(32)).eval()
    path = tmp_path / "q.safetensors"
    networks.save_quantized(path, qnetwork)
    again = haq.load(path, network=whole)
    assert torch.equal(again(images(8, 1)), qnetwork(images(8, 1)))
    assert Q.float_copy(again).grouped.in_channels == made.grouped.in_channels


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"channels": "{"}, "its channels are no JSON"),
        ({"channels": "[1]"}, "its channels are a list, where lists of numbers by group are wanted"),
        ({"channels": '{"stem": 3}'}, "its channels of group 'stem' are 3; they must be whole numbers from 0 to 15"),
        ({"channels": '{"stem": [0, 16]}'}, "its channels of group 'stem' have 16; they must be whole numbers from 0 to 15"),
        ({"channels": '{"stem": [1, 0]}'}, "its channels of group 'stem' have 0; they must be whole numbers"),
        ({"channels": '{"stem": [true]}'}, "its channels of group 'stem' have True; they must be whole numbers"),
        ({"channels": '{"other": [0]}'}, "its channels are of group 'other', of which it doesn't say how many there are"),
        ({"channels": '{"stem": []}'}, "its channels of group 'stem' are a list; they must be"),
        ({"channel_sizes": '{"stem": [16, 3]}'}, "its group 'stem' of channels is a list; it must be how many there are"),
        ({"channel_sizes": '{"stem": [99999999999, 1]}'}, "its group 'stem' of channels is"),
        ({"channels": '{"stem": ' * 5000}, "its channels are no JSON"),
        ({"channels": "[" + "1," * 2**21 + "1]"}, "its channels has 4,194,307 characters, at most 2,097,152 are read"),
    ],
)
def test_headers_that_say_something_else(change: dict[str, str], sentence: str, written: bytes, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    path.write_bytes(written)
    changed(path, lambda notes: notes.update(change))
    with pytest.raises(ValueError, match=f"q.safetensors isn't of this network with fewer channels: {sentence}"):
        haq.load(path, network=small_network())


def test_tensors_that_dont_go_with_the_network(written: bytes, tmp_path: Path) -> None:
    path = tmp_path / "q.safetensors"
    for name, shape, sentence in (
        ("stem.weight", (17, 1, 3, 3), "'stem.weight' of shape .17, 1, 3, 3., which .16, 1, 3, 3. can't become by leaving"),
        ("hidden.weight", (8, 0), "'hidden.weight' of shape .8, 0., which"),
    ):
        path.write_bytes(written)
        changed(path, lambda notes: None, {name: torch.zeros(shape)})
        with pytest.raises(ValueError, match=f"isn't of this network with fewer channels: it has {sentence}"):
            haq.load(path, network=small_network())
    path.write_bytes(written)
    # A network of other channels than the file's is told as another one.
    changed(path, lambda notes: notes.pop("channels"))
    with pytest.raises(ValueError, match="q.safetensors is a checkpoint of another network: .* of another shape"):
        haq.load(path, network=small_network())
    path.write_bytes(written)
    with pytest.raises(ValueError, match="the network that is given lost other channels"):
        haq.load(path, network=smaller(share=0.25))


def test_a_file_can_ask_for_no_more_memory_than_such_a_network_takes(tmp_path: Path) -> None:
    network = networks.load()
    x = torch.rand(4, *network.input_shape)
    groups = Q.channel_groups(network.module, x[:1])
    made = Q.remove_channels(network.module, groups, {group.name: range(group.count(0.25)) for group in groups.groups})
    path = tmp_path / "q.safetensors"
    networks.save_quantized(path, Q.quantize(made, Q.BitPolicy.uniform(made, 4, 4), calibrate=x), network)
    changed(path, lambda notes: notes.update(network="timm:vit_giant_patch14_224"))
    with pytest.raises(ValueError, match="q.safetensors (is a checkpoint of another network|names a network)"):
        networks.load_quantized(path)


def test_a_note_of_ones_own_cant_be_called_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a note can't be named 'channels'"):
        networks.save_quantized(tmp_path / "q.safetensors", quantized(), notes={"channels": "all"})
