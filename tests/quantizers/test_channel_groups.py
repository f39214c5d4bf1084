"""Channels that depend on each other are one group, and what can't be removed is named with its reason."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import quantizers as Q
from haq.networks.mobilenet_mini import mobilenet_mini
from quantizers.pruning.groups import ChannelGroups, channel_groups
from quantizers.pruning.removal import mask_channels, remove_channels

IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16).sin().view(2, 3, 16, 16)


def seeded(network: nn.Module) -> nn.Module:
    """Give a network weights and statistics of norms that hide nothing."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point() and tensor.dim():
                tensor.copy_(0.1 + 0.9 * torch.rand(tensor.shape, generator=generator))
                if tensor.dim() > 1:
                    tensor.sub_(0.55).mul_(2 / tensor[0].numel() ** 0.5)
    return network.double().eval()


def some_kept(groups: ChannelGroups, seed: int = 0) -> dict[str, list[int]]:
    """Choose some units of every group."""
    generator = torch.Generator().manual_seed(seed)
    kept = {}
    for name, group in groups.items():
        count = int(torch.randint(1, group.units + 1, (1,), generator=generator))
        units = torch.randperm(group.units, generator=generator)[:count].sort().values.tolist()
        kept[name] = [unit * group.unit + place for unit in units for place in range(group.unit)]
    return kept


def check_removal(network: nn.Module, groups: ChannelGroups, example: Any = IMAGES) -> None:
    """Removal is what masking is, for some choice of channels."""
    network = seeded(copy.deepcopy(network))
    kept = some_kept(groups)
    with torch.no_grad():
        given = remove_channels(network, groups, kept)(example.double())
        expected = mask_channels(network, groups, kept)(example.double())
    torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def members(groups: ChannelGroups, name: str) -> dict[tuple[str, str], tuple[tuple[int, ...], ...]]:
    return {(member.module, member.dim): member.places for member in groups[name].members}


class Net(nn.Module):
    """A network whose `forward` is given as a function of it and its input."""

    def __init__(self, run: Any, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def conv(inputs: int, outputs: int, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def head(network: nn.Module, x: Tensor) -> Any:
    return network.head(x.mean((2, 3)))  # type: ignore[operator]


def test_the_default_network() -> None:
    network = mobilenet_mini().eval()
    groups = channel_groups(network, torch.randn(1, 1, 28, 28))
    assert list(groups) == ["stem", "block1.pointwise", "block3.pointwise", "block6.pointwise"]
    assert groups.fixed == {"classifier": "they are outputs of the network"}
    residual = groups["block1.pointwise"]
    assert residual.writers == ("block1.pointwise", "block2.depthwise", "block2.pointwise", "block3.depthwise")
    assert residual.readers == ("block2.depthwise", "block2.pointwise", "block3.depthwise", "block3.pointwise")
    assert (residual.channels, residual.unit, residual.units) == (48, 1, 48)
    assert groups.groups[0] is groups["stem"]
    for group in groups.groups:
        for member in group.members:
            assert member.places == tuple((channel,) for channel in range(group.channels))


def test_shares_become_counts() -> None:
    network = nn.Sequential(conv(3, 12), nn.ReLU(), conv(12, 12, groups=3), nn.ReLU(), conv(12, 2))
    groups = channel_groups(network, IMAGES)
    group = groups["0"]
    assert (group.channels, group.unit) == (12, 3)
    assert [group.count(share) for share in (0.01, 0.125, 0.375, 0.5, 0.874, 0.875, 1)] == [3, 3, 6, 6, 9, 12, 12]
    for share in (0, -0.5, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"'0' can't keep .* must be beyond 0 and at most 1"):
            group.count(share)


def test_groups_say_what_there_is() -> None:
    groups = channel_groups(nn.Sequential(conv(3, 4), conv(4, 2)), IMAGES)
    with pytest.raises(KeyError, match="can't be removed: they are outputs"):
        groups["1"]
    with pytest.raises(KeyError, match="no group of channels 'x'; there are 0"):
        groups["x"]


def concatenated(net: Any, x: Tensor) -> Any:
    return head(net, net.last(torch.cat([net.one(x), net.two(x)], 1)))


def test_concatenation_gives_offsets() -> None:
    network = Net(concatenated, one=conv(3, 4), two=conv(3, 6), last=conv(10, 5), head=nn.Linear(5, 2))
    groups = channel_groups(network, IMAGES)
    assert members(groups, "one")["last", "in"] == tuple((place,) for place in range(4))
    assert members(groups, "two")["last", "in"] == tuple((place,) for place in range(4, 10))
    check_removal(network, groups)


def test_a_network_input_in_a_concatenation() -> None:
    network = Net(
        lambda net, x: head(net, net.last(torch.cat([x, net.one(x)], 1))),
        one=conv(3, 4),
        last=conv(7, 5),
        head=nn.Linear(5, 2),
    )
    groups = channel_groups(network, IMAGES)
    assert members(groups, "one")["last", "in"] == tuple((place,) for place in range(3, 7))
    check_removal(network, groups)


def test_what_is_added_to_an_input_is_fixed() -> None:
    network = Net(lambda net, x: head(net, net.last(x + net.one(x))), one=conv(3, 3), last=conv(3, 5), head=nn.Linear(5, 2))
    groups = channel_groups(network, IMAGES)
    assert list(groups) == ["last"]
    assert groups.fixed["one"] == "they meet the network's inputs"


def test_a_flatten_gives_several_places() -> None:
    network = nn.Sequential(conv(3, 4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 2))
    groups = channel_groups(network, IMAGES)
    assert members(groups, "0")["3", "in"][1] == (4, 5, 6, 7)
    check_removal(network, groups)


def test_a_grouped_convolution_keeps_as_many_in_each_group() -> None:
    network = nn.Sequential(
        *(conv(3, 8), nn.BatchNorm2d(8), conv(8, 12, groups=4), nn.PReLU(12), conv(12, 6), nn.ReLU(), conv(6, 2)),
    )
    groups = channel_groups(network, IMAGES)
    assert (groups["0"].channels, groups["0"].unit) == (8, 4)
    assert members(groups, "0")["2", "in"] == ((0,), (2,), (4,), (6,), (1,), (3,), (5,), (7,))
    assert (groups["2"].channels, groups["2"].unit) == (12, 4)
    smaller = remove_channels(network, groups, {"0": [4, 5, 6, 7], "2": list(range(8))})
    assert (smaller[2].in_channels, smaller[2].out_channels, smaller[2].groups) == (4, 8, 4)  # type: ignore[index]
    check_removal(network, groups)


def test_each_group_of_one_channel_may_make_several() -> None:
    network = nn.Sequential(conv(3, 4), conv(4, 12, groups=4), nn.ReLU(), conv(12, 6), nn.ReLU(), conv(6, 2))
    groups = channel_groups(network, IMAGES)
    assert members(groups, "0")["1", "out"][2] == (6, 7, 8)
    assert groups["0"].readers == ("1", "3")
    check_removal(network, groups)


def test_group_norm_keeps_whole_groups() -> None:
    network = nn.Sequential(conv(3, 12), nn.GroupNorm(4, 12), nn.ReLU(), conv(12, 2))
    groups = channel_groups(network, IMAGES)
    assert (groups["0"].channels, groups["0"].unit) == (12, 3)
    assert remove_channels(network, groups, {"0": [3, 4, 5]})[1].num_groups == 1  # type: ignore[index]
    check_removal(network, groups)
    one = nn.Sequential(conv(3, 12), nn.GroupNorm(1, 12), nn.ReLU(), conv(12, 2))
    assert channel_groups(one, IMAGES).fixed["0"] == "a grouped layer needs all of them"


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(6, affine=True, track_running_stats=True), nn.BatchNorm2d(6, affine=False)]
)
def test_other_norms(norm: nn.Module) -> None:
    network = nn.Sequential(conv(3, 6), norm, nn.ReLU(), conv(6, 2))
    groups = channel_groups(network, IMAGES)
    assert list(groups) == ["0"]
    check_removal(network, groups)


def squeezed(net: Any, x: Tensor) -> Any:
    x = net.one(x)
    gate = torch.sigmoid(net.up(F.relu(net.down(x.mean((2, 3), keepdim=True)))))
    return head(net, x * gate)


def test_squeeze_and_excitation() -> None:
    network = Net(squeezed, one=conv(3, 8), down=conv(8, 2, 1), up=conv(2, 8, 1), head=nn.Linear(8, 2))
    groups = channel_groups(network, IMAGES)
    assert {name: group.channels for name, group in groups.items()} == {"one": 8, "down": 2}
    assert groups["one"].writers == ("one", "up")
    check_removal(network, groups)


class Shuffle(nn.Module):
    """The shuffle of ShuffleNet, written with views."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


@pytest.mark.parametrize("shuffle", [Shuffle(), nn.ChannelShuffle(2)])
def test_a_shuffle_of_channels_is_followed(shuffle: nn.Module) -> None:
    network = nn.Sequential(conv(3, 8), shuffle, conv(8, 8), nn.ReLU(), conv(8, 2))
    groups = channel_groups(network, IMAGES)
    assert groups["0"].unit == 2
    places = dict(zip((at for (at,) in members(groups, "0")["0", "out"]), members(groups, "0")["2", "in"], strict=True))
    assert [places[channel] for channel in range(8)] == [(0,), (2,), (4,), (6,), (1,), (3,), (5,), (7,)]
    check_removal(network, groups)


def halved(net: Any, x: Tensor) -> Any:
    first, second = net.one(x).chunk(2, dim=1)
    return head(net, net.last(second * torch.sigmoid(first)))


def test_halves_that_are_multiplied() -> None:
    network = Net(halved, one=conv(3, 8), last=conv(4, 5), head=nn.Linear(5, 2))
    groups = channel_groups(network, IMAGES)
    assert members(groups, "one")["one", "out"] == ((0, 4), (1, 5), (2, 6), (3, 7))
    check_removal(network, groups)


def scaled(net: Any, x: Tensor) -> Any:
    return head(net, net.one(x) * net.scale.gamma[:, None, None])


def test_parameters_without_a_layer_follow() -> None:
    scale = nn.Module()
    scale.gamma = nn.Parameter(torch.linspace(1, 2, 6))
    network = Net(scaled, one=conv(3, 6), scale=scale, head=nn.Linear(6, 2))
    groups = channel_groups(network, IMAGES)
    assert members(groups, "one")["scale.gamma", "out"] == tuple((place,) for place in range(6))
    smaller = remove_channels(network, groups, {"one": [1, 4]})
    assert smaller.scale.gamma.shape == (2,)  # type: ignore[union-attr]
    assert isinstance(smaller.scale.gamma, nn.Parameter)  # type: ignore[union-attr]
    check_removal(network, groups)


def test_buffers_without_a_layer_follow() -> None:
    scale = nn.Module()
    scale.register_buffer("gamma", torch.linspace(1, 2, 6))
    network = Net(scaled, one=conv(3, 6), scale=scale, head=nn.Linear(6, 2))
    groups = channel_groups(network, IMAGES)
    assert list(groups) == ["one"]
    check_removal(network, groups)


def test_one_dimension() -> None:
    network = nn.Sequential(
        *(nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.PReLU(6), nn.Conv1d(6, 6, 3, groups=6), nn.Conv1d(6, 4, 1)),
        *(nn.AdaptiveMaxPool1d(3), nn.Flatten(), nn.Linear(12, 2)),
    )
    groups = channel_groups(network, torch.randn(2, 3, 20))
    assert {name: group.channels for name, group in groups.items()} == {"0": 6, "4": 4}
    check_removal(network, groups, torch.randn(2, 3, 20))


def test_a_transposed_convolution() -> None:
    network = nn.Sequential(conv(3, 6), nn.ReLU(), nn.ConvTranspose2d(6, 5, 2, stride=2), nn.BatchNorm2d(5), conv(5, 2))
    groups = channel_groups(network, IMAGES)
    assert {name: group.channels for name, group in groups.items()} == {"0": 6, "2": 5}
    check_removal(network, groups)


class Attention(nn.Module):
    """As timm writes it: `forward` goes by num_heads, head_dim and attn_dim."""

    def __init__(self, channels: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = num_heads, head_dim, num_heads * head_dim
        self.qkv = nn.Linear(channels, 3 * self.attn_dim)
        self.proj = nn.Linear(self.attn_dim, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        qkv = self.qkv(x).reshape(n, length, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        made: Tensor = self.proj(x.transpose(1, 2).reshape(n, length, self.attn_dim))
        return made


class Transformer(nn.Module):
    """One block of a vision transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 4, stride=4)
        self.norm1, self.norm2 = nn.LayerNorm(12), nn.LayerNorm(12)
        self.attention = Attention(12, 4, 3)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        made: Tensor = self.head(x.mean(1))
        return made


def test_whole_heads_of_an_attention() -> None:
    network = Transformer()
    groups = channel_groups(network, IMAGES)
    assert {name: (group.channels, group.unit) for name, group in groups.items()} == {"attention.qkv": (12, 3), "up": (20, 1)}
    assert members(groups, "attention.qkv")["attention.qkv", "out"][4] == (4, 16, 28)
    assert "normalises over them (LayerNorm)" in groups.fixed["patches"]
    smaller = remove_channels(network, groups, {"attention.qkv": [3, 4, 5, 9, 10, 11]})
    attention: Any = smaller.get_submodule("attention")
    assert (attention.num_heads, attention.head_dim, attention.attn_dim, attention.qkv.out_features) == (2, 3, 6, 18)
    check_removal(network, groups)


def doubled(net: Any, x: Tensor) -> Any:
    return head(net, net.again(F.relu(net.again(net.one(x)))))


def test_a_layer_that_is_called_twice() -> None:
    network = Net(doubled, one=conv(3, 4), again=conv(4, 4), head=nn.Linear(4, 2))
    groups = channel_groups(network, IMAGES)
    assert groups["one"].writers == ("one", "again")
    assert members(groups, "one")["again", "in"] == members(groups, "one")["again", "out"]
    check_removal(network, groups)


def test_layers_that_share_a_weight_are_fixed() -> None:
    network = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), conv(4, 4), nn.ReLU(), conv(4, 2))
    network[4].weight = network[2].weight
    groups = channel_groups(network, IMAGES)
    assert not list(groups)
    assert groups.fixed["0"] == "2 has the same weights as 4"


def reduced(net: Any, x: Tensor) -> Any:
    x = net.one(x)
    return head(net, net.last(x * torch.sigmoid(x.mean(1, keepdim=True))))


def written_out(net: Any, x: Tensor) -> Any:
    x = net.one(x)
    return head(net, net.last(x.view(x.shape[0], 2, 4, 16, 16).sum(1).repeat(1, 2, 1, 1)))


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (reduced, "without them the network computes something else than with zeros in their places"),
        (written_out, "the network can't run without some of them"),
        (lambda net, x: head(net, net.last(F.softmax(net.one(x), 1))), "computes something else"),
        (lambda net, x: head(net, net.last(net.one(x).flip(1))), "computes something else"),
        (lambda net, x: head(net, net.last(net.one(x).detach())), "on the way to the outputs can't be followed"),
        (lambda net, x: head(net, net.last(F.conv2d(x, net.one.weight, padding=1))), "it is never called"),
    ],
)
def test_what_torch_pruning_takes_for_granted_is_tried_out(run: Any, reason: str) -> None:
    network = Net(run, one=conv(3, 8), last=conv(8, 5), head=nn.Linear(5, 2))
    groups = channel_groups(network, IMAGES)
    assert list(groups) == ["last"]
    assert reason in groups.fixed["one"]
    check_removal(network, groups)


def in_turn(net: Any, x: Tensor) -> Any:
    x = net.one(x)
    return head(net, torch.cat([net.two(x[:, ::2]), net.three(x[:, 1::2])], 1))


def test_two_halves_that_must_stay_as_large_are_fixed() -> None:
    """Every choice that takes as many of both would do; others wouldn't."""
    network = Net(in_turn, one=conv(3, 8), two=conv(4, 4), three=conv(4, 4), head=nn.Linear(8, 2))
    groups = channel_groups(network, IMAGES)
    assert list(groups) == ["two", "three"]
    assert "can't run without some of them" in groups.fixed["one"]
    check_removal(network, groups)


class Recurrent(nn.Module):
    """A convolution in front of a recurrent layer."""

    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.first, self.recurrent, self.head = nn.Conv1d(3, 6, 3), kind(6, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.recurrent(self.first(x).transpose(1, 2))[0][:, -1])
        return made


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_what_recurrent_layers_read_is_fixed(kind: Any) -> None:
    groups = channel_groups(Recurrent(kind), torch.randn(2, 3, 9))
    assert not list(groups)
    assert set(groups.fixed) == {"first", "head"}


def test_zeros_hide_nothing() -> None:
    """A block whose last norm is zero, as at the start of training, answers the same whatever is removed within."""
    network = Net(reduced, one=conv(3, 8), last=conv(8, 5), head=nn.Linear(5, 2))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    assert "something else" in channel_groups(network, IMAGES).fixed["one"]


def test_several_outputs_are_all_fixed() -> None:
    network = Net(lambda net, x: {"a": [net.one(x)], "b": net.two(x)}, one=conv(3, 4), two=conv(3, 4))
    groups = channel_groups(network, IMAGES)
    assert not list(groups)
    assert dict(groups.fixed) == dict.fromkeys(("one", "two"), "they are outputs of the network")


def test_inputs_of_any_structure() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.last = conv(3, 4), conv(3, 4), conv(4, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            made: Tensor = self.last(self.one(left) + self.two(right))
            return made

    network = Two()
    for example in ((IMAGES, IMAGES), {"left": IMAGES, "right": IMAGES}):
        groups = channel_groups(network, example)
        assert groups["one"].writers == ("one", "two")
    groups = channel_groups(network, (IMAGES, 1), forward=lambda module, batch: module(batch[0], batch[0]))
    assert groups["one"].channels == 4


def state_of(network: nn.Module) -> Mapping[str, Any]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_the_network_is_left_alone() -> None:
    network = mobilenet_mini().train()
    network.get_parameter("stem.weight").requires_grad_(False)
    network.get_submodule("block1").eval()
    before, modes = state_of(network), [module.training for module in network.modules()]
    generator = torch.get_rng_state()
    with torch.no_grad():
        groups = channel_groups(network, torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1)))
    assert list(groups)
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert [module.training for module in network.modules()] == modes
    assert not network.get_parameter("stem.weight").requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_weights_that_are_computed_are_refused() -> None:
    network = nn.Sequential(conv(3, 4), conv(4, 2))
    parametrizations.weight_norm(network[0])
    with pytest.raises(ValueError, match="'0' is computed from others .*remove that before pruning"):
        channel_groups(network, IMAGES)
    network = nn.Sequential(conv(3, 4), conv(4, 2))
    prune.l1_unstructured(network[1], "weight", 0.5)
    with pytest.raises(ValueError, match="'1' is computed from others .*remove that before pruning"):
        channel_groups(network, IMAGES)


def test_bad_examples_are_a_sentence() -> None:
    with pytest.raises(ValueError, match="can't be run on the example, so its channels can't be followed"):
        channel_groups(nn.Sequential(conv(3, 4), conv(4, 2)), torch.zeros(1, 5, 8, 8))
    with pytest.raises(ValueError, match="can't be run on the example"):
        channel_groups(nn.Sequential(conv(3, 4), conv(4, 2)), "images")
    network = Net(lambda net, x: net.one(x) / 0, one=conv(3, 4))
    with pytest.raises(ValueError, match="outputs for the example aren't finite"):
        channel_groups(network, IMAGES)


def test_no_layer_at_all_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="Sequential has no convolution or linear layer whose channels could be removed"):
        channel_groups(nn.Sequential(nn.ReLU()), torch.zeros(1, 2))


def test_one_image_without_a_batch() -> None:
    network = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2))
    assert list(channel_groups(network, IMAGES[0])) == ["0"]


def test_layers_without_maps() -> None:
    network = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    example = torch.randn(3, 4)
    groups = channel_groups(network, example)
    assert {name: group.channels for name, group in groups.items()} == {"0": 6, "2": 5}
    check_removal(network, groups, example)


def test_a_quantized_network_is_refused() -> None:
    network = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2))
    made = Q.quantize(network, Q.BitPolicy.uniform(network, 8, 8), calibrate=IMAGES)
    with pytest.raises(ValueError, match="is quantized .layer '0'.: prune the float network"):
        channel_groups(made, IMAGES)


KINDS = ("conv", "grouped", "depthwise", "residual", "cat", "norm", "group norm", "prelu", "shuffle")


@st.composite
def networks(draw: st.DrawFn) -> nn.Module:
    """Draw a small network of chains, residuals, concatenations, groups and norms."""
    width = draw(st.sampled_from([4, 6, 8, 12]))
    layers: list[nn.Module] = [conv(3, width)]
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(
            st.sampled_from(["conv", "grouped", "depthwise", "residual", "cat", "norm", "group norm", "prelu", "shuffle"])
        )
        if kind == "conv":
            outputs = draw(st.sampled_from([4, 6, 8, 12]))
            layers.append(conv(width, outputs))
            width = outputs
        elif kind == "grouped":
            layers.append(conv(width, 2 * width, groups=2))
            width *= 2
        elif kind == "depthwise":
            layers.append(conv(width, width, groups=width))
        elif kind == "residual":
            layers.append(Net(lambda net, x: x + net.two(F.relu(net.one(x))), one=conv(width, 5), two=conv(5, width)))
        elif kind == "cat":
            layers.append(Net(lambda net, x: torch.cat([net.one(x), x], 1), one=conv(width, 4)))
            width += 4
        elif kind == "norm":
            layers.append(nn.BatchNorm2d(width))
        elif kind == "group norm":
            layers.append(nn.GroupNorm(2, width))
        elif kind == "prelu":
            layers.append(nn.PReLU(width))
        else:
            layers.append(nn.ChannelShuffle(2))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 3))


@given(networks(), st.integers(0, 1000))
@settings(max_examples=12)
def test_removal_is_masking_on_random_networks(network: nn.Module, seed: int) -> None:
    example = IMAGES[:, :, :6, :6].double()
    network = seeded(network)
    groups = channel_groups(network, example)
    kept = some_kept(groups, seed)
    with torch.no_grad():
        given = remove_channels(network, groups, kept)(example)
        expected = mask_channels(network, groups, kept)(example)
    torch.testing.assert_close(given, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    named = {name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    assert {writer for group in groups.groups for writer in group.writers} | {
        name.split("#")[0] for name in groups.fixed
    } <= named
    # Every output channel of every layer is in a group, or its layer is in a fixed one.
    for group in groups.groups:
        assert group.channels % group.unit == 0
        assert all(len(member.places) == group.channels for member in group.members)
