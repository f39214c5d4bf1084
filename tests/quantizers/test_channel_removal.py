"""A network from which channels were removed computes what it computes with zeros in their places, and is smaller."""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantizers as Q
from haq.networks import load
from haq.networks.mobilenet_mini import mobilenet_mini
from hw_models import trace
from quantizers.calling import leaves
from quantizers.pruning.channels import ChannelGroup, ChannelGroups
from quantizers.pruning.groups import apply_kept, channel_groups
from quantizers.pruning.removal import mask_channels, remove_channels
from tests.quantizers.test_channel_groups import some_kept

SAME = 1e-6  # of the largest output

# Names, height and width of images, and the least number of groups that can be removed.
FAST = [
    ("mobilenet-mini", 28, 4),
    ("torchvision:squeezenet1_1", 48, 25),
    ("timm:resnet10t", 32, 10),
    ("timm:mobilenetv3_small_050", 48, 26),
]
SLOW = [
    ("torchvision:mobilenet_v3_small", 48, 27),
    ("torchvision:resnet18", 32, 12),
    ("torchvision:alexnet", 96, 7),
    ("torchvision:vgg11_bn", 64, 10),
    ("torchvision:densenet121", 64, 120),
    ("torchvision:googlenet", 64, 57),
    ("torchvision:inception_v3", 160, 94),
    ("torchvision:mobilenet_v2", 64, 20),
    ("torchvision:mnasnet0_5", 64, 25),
    ("torchvision:shufflenet_v2_x0_5", 64, 17),
    ("torchvision:resnext50_32x4d", 64, 37),
    ("torchvision:regnet_y_400mf", 64, 53),
    ("torchvision:efficientnet_b0", 64, 40),
    ("torchvision:convnext_tiny", 64, 18),
    ("torchvision:vit_b_16", 224, 12),
    ("timm:vit_tiny_patch16_224", 224, 24),
    ("timm:mixer_s32_224", 224, 16),
    ("timm:seresnet18", 64, 20),
    ("timm:ghostnet_050", 64, 31),
    ("timm:efficientnet_lite0", 64, 24),
    ("timm:convnext_atto", 64, 12),
    ("timm:swin_tiny_patch4_window7_224", 224, 12),
    ("pytorchcv:preresnet18", 224, 9),
    ("pytorchcv:igcv3_wd4", 224, 4),
]


def drawn(network: nn.Module) -> nn.Module:
    """Give a network other weights where they are alike, in double precision."""
    generator = torch.Generator().manual_seed(5)
    network = network.double().eval()
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point() and tensor.dim() and tensor.unique().numel() < 2:
                tensor.add_(0.2 * torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
    return network


def difference(given: Any, expected: Any) -> float:
    """Return the largest difference of outputs, relative to the largest output."""
    largest = 0.0
    for one, other in zip(leaves(given), leaves(expected), strict=True):
        assert bool(other.isfinite().all())
        assert float(other.abs().max()) > 0
        largest = max(largest, float((one - other).abs().max() / other.abs().max()))
    return largest


CASES = [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]


def weights_of(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(("name", "size", "least"), CASES, ids=str)
def test_removal_is_masking(name: str, size: int, least: int) -> None:
    torch.manual_seed(0)
    network = drawn(load(name, classes=10, pretrained=False).module)
    channels = 1 if name == "mobilenet-mini" else 3
    example = torch.rand(2, channels, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    groups = channel_groups(network, example)
    assert len(groups) >= least
    kept = some_kept(groups, 7)
    smaller = remove_channels(network, groups, kept)
    masked = mask_channels(network, groups, kept)
    with torch.no_grad():
        found = difference(smaller(example), masked(example))
    share = weights_of(smaller) / weights_of(network)
    print(f"{name}: {len(groups)} groups, {len(groups.fixed)} fixed, difference {found:.1e}, {share:.2f} of the weights")
    assert found <= SAME
    assert share < 1


EXAMPLE = torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(2))


@functools.cache
def prepared() -> tuple[nn.Module, ChannelGroups]:
    torch.manual_seed(0)
    network = drawn(mobilenet_mini()).float()
    return network, channel_groups(network, EXAMPLE)


@pytest.fixture
def network() -> nn.Module:
    return copy.deepcopy(prepared()[0])


@pytest.fixture
def example() -> Tensor:
    return EXAMPLE.clone()


@pytest.fixture
def groups() -> ChannelGroups:
    return prepared()[1]


KEPT = {"stem": [0, 3, 5, 31], "block1.pointwise": list(range(0, 48, 2)), "block6.pointwise": [7]}


def test_everything_of_a_channel_goes(network: nn.Module, groups: ChannelGroups) -> None:
    smaller = remove_channels(network, groups, KEPT)
    stem = smaller.get_submodule("stem")
    assert isinstance(stem, nn.Conv2d)
    assert (stem.in_channels, stem.out_channels) == (1, 4)
    assert torch.equal(stem.weight, network.get_parameter("stem.weight")[[0, 3, 5, 31]])
    norm = smaller.get_submodule("stem_norm")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.num_features == 4
    for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
        if tensor.dim():
            assert torch.equal(tensor, network.get_submodule("stem_norm").state_dict()[name][[0, 3, 5, 31]])
    depthwise = smaller.get_submodule("block1.depthwise")
    assert isinstance(depthwise, nn.Conv2d)
    assert (depthwise.in_channels, depthwise.out_channels, depthwise.groups) == (4, 4, 4)
    classifier = smaller.get_submodule("classifier")
    assert isinstance(classifier, nn.Linear)
    assert (classifier.in_features, classifier.out_features) == (1, 10)
    untouched = network.get_submodule("classifier")
    assert isinstance(untouched, nn.Linear)
    assert torch.equal(classifier.weight, untouched.weight[:, [7]])


def test_nothing_is_shared_with_the_network(network: nn.Module, groups: ChannelGroups) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    smaller = remove_channels(network, groups, KEPT)
    with torch.no_grad():
        for tensor in (*smaller.parameters(), *smaller.buffers()):
            tensor.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert Q.kept_channels(network) == {}


def test_modes_and_what_is_trained_stay(network: nn.Module, groups: ChannelGroups) -> None:
    network.train()
    network.get_submodule("block2").eval()
    network.get_parameter("stem.weight").requires_grad_(False)
    smaller = remove_channels(network, groups, KEPT)
    pairs = zip(network.named_modules(), smaller.named_modules(), strict=True)
    assert all((one, a.training, type(a)) == (other, b.training, type(b)) for (one, a), (other, b) in pairs)
    assert [p.requires_grad for p in network.parameters()] == [p.requires_grad for p in smaller.parameters()]
    smaller(torch.rand(2, 1, 28, 28)).sum().backward()
    assert smaller.get_parameter("block1.pointwise.weight").grad is not None
    assert smaller.get_parameter("stem.weight").grad is None


def test_what_is_kept_is_recorded(network: nn.Module, groups: ChannelGroups) -> None:
    smaller = remove_channels(network, groups, {**KEPT, "block3.pointwise": range(96)})
    expected = {name: tuple(channels) for name, channels in KEPT.items()}
    file = io.BytesIO()
    torch.save(smaller, file)
    file.seek(0)
    stored = torch.load(file, weights_only=False)
    for made in (smaller, copy.deepcopy(smaller), pickle.loads(pickle.dumps(smaller)), stored, Q.copy_network(smaller)):
        assert Q.kept_channels(made) == expected
    Q.kept_channels(smaller).clear()
    assert Q.kept_channels(smaller) == expected
    assert "kept" not in " ".join(smaller.state_dict())


def test_pruned_twice_is_pruned_once(network: nn.Module, groups: ChannelGroups, example: Tensor) -> None:
    once = remove_channels(network, groups, KEPT)
    again = channel_groups(once, example)
    assert [group.channels for group in again.groups] == [4, 24, 96, 1]
    twice = remove_channels(once, again, {"stem": [1, 3], "block1.pointwise": [5, 6], "block3.pointwise": [0, 95]})
    expected = {"stem": (3, 31), "block1.pointwise": (10, 12), "block3.pointwise": (0, 95), "block6.pointwise": (7,)}
    assert Q.kept_channels(twice) == expected
    direct = remove_channels(network, groups, expected)
    with torch.no_grad():
        assert torch.equal(twice(example), direct(example))


def test_nothing_removed_is_a_copy(network: nn.Module, groups: ChannelGroups, example: Tensor) -> None:
    for kept in ({}, {"stem": range(32)}):
        made = remove_channels(network, groups, kept)
        assert made is not network
        assert Q.kept_channels(made) == {}
        with torch.no_grad():
            assert torch.equal(made(example), network(example))


def test_the_workload_is_of_the_smaller_layers(network: nn.Module, groups: ChannelGroups, example: Tensor) -> None:
    smaller = remove_channels(network, groups, KEPT)
    layers = {layer.name: layer for layer in trace(smaller, example).layers}
    shape = {"stem": (1, 4), "block1.depthwise": (4, 4), "block1.pointwise": (4, 24), "classifier": (1, 10)}
    for name, (inputs, outputs) in shape.items():
        assert (layers[name].in_channels, layers[name].out_channels) == (inputs, outputs)


def test_a_smaller_network_is_quantized_and_trained_like_any(
    network: nn.Module, groups: ChannelGroups, example: Tensor
) -> None:
    smaller = remove_channels(network, groups, KEPT)
    made = Q.quantize(smaller, Q.BitPolicy.uniform(smaller, 4, 4), calibrate=example)
    assert Q.kept_channels(made) == Q.kept_channels(smaller)
    assert Q.kept_channels(Q.float_copy(made)) == Q.kept_channels(smaller)
    made.train()
    made(example).sum().backward()


def test_a_policys_shares_must_be_the_networks(network: nn.Module, groups: ChannelGroups, example: Tensor) -> None:
    plain = Q.BitPolicy.uniform(network, 8, 8)
    policy = plain.with_keep({"stem": 0.5, "block1.pointwise": 0.25})
    with pytest.raises(ValueError, match=r"keeps 0\.25 of the channels of 'block1.pointwise', but the network was not pruned"):
        Q.quantize(network, policy, calibrate=example)
    kept = {"stem": range(16), "block1.pointwise": range(12)}
    smaller = remove_channels(network, groups, kept)
    made = Q.quantize(smaller, policy, calibrate=example)
    Q.set_policy(made, policy)
    Q.set_policy(made, plain)  # which says nothing of channels
    Q.quantize(smaller, plain.with_keep({**policy.keep, "block3.pointwise": 0.999}), calibrate=example)
    for keep, sentence in [
        ({"stem": 0.5}, "keeps 48 of the 48 channels of 'block1.pointwise', but the network was pruned to 12"),
        ({"stem": 0.75, "block1.pointwise": 0.25}, "keeps 24 of the 32 channels of 'stem', but the network was pruned to 16"),
        ({**policy.keep, "block3.pointwise": 0.5}, "keeps 48 of the 96 channels of 'block3.pointwise'.* pruned to 96"),
        ({**policy.keep, "other": 0.5}, "keeps 0.5 of the channels of 'other', but the network was not pruned to that"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            Q.quantize(smaller, plain.with_keep(keep), calibrate=example)
        with pytest.raises(ValueError, match=sentence):
            Q.set_policy(made, plain.with_keep(keep))


@pytest.mark.parametrize(
    ("kept", "sentence"),
    [
        ({"nobody": [0]}, "there is no group of channels 'nobody'; there are stem, block1.pointwise"),
        ({3: [0]}, "there is no group of channels '3'"),
        ({"classifier": [0]}, "no channels of 'classifier' can be removed: they are outputs of the network"),
        ({"stem": []}, "group 'stem' must keep at least one of its channels"),
        ({"stem": [0, 32]}, "group 'stem' has no channel 32: they are 0 to 31"),
        ({"stem": [-1, 0]}, "group 'stem' has no channel -1"),
        ({"stem": [3, 1]}, "the kept channels of 'stem' must be in rising order, each once"),
        ({"stem": [1, 1]}, "must be in rising order, each once"),
        ({"stem": [0.5]}, "group 'stem' has no channel 0.5"),
        ({"stem": [True]}, "group 'stem' has no channel True"),
        ({"stem": ["1"]}, "group 'stem' has no channel of type str"),
        ({"stem": [10**5000]}, "group 'stem' has no channel of type int"),
        ({"stem": [[0]]}, "group 'stem' has no channel of type list"),
        ({"stem": list(range(10**5))}, "group 'stem' can't keep 100000 channels: it has 32"),
        ({"stem": "01"}, "must be a list of integers, not str"),
        ({"stem": 3}, "must be a list of integers, not int"),
        ({"stem": None}, "must be a list of integers, not NoneType"),
        ({"stem": {"0": 1}}, "must be a list of integers, not dict"),
        ({"stem": itertools.count()}, "must be a list of integers, not count"),
        ([["stem", [0]]], "must be lists of integers by name of a group, not list"),
        ("stem", "must be lists of integers by name of a group, not str"),
        (None, "must be lists of integers by name of a group, not NoneType"),
    ],
)
def test_what_is_no_choice_of_channels_is_a_sentence(
    network: nn.Module, groups: ChannelGroups, example: Tensor, kept: Any, sentence: str
) -> None:
    for refused in (remove_channels, mask_channels):
        with pytest.raises(ValueError, match=sentence):
            refused(network, groups, kept)
    if not isinstance(kept, dict) or "nobody" in kept:
        with pytest.raises(ValueError, match=sentence):
            apply_kept(network, example, kept)


def test_a_part_of_a_unit_is_a_sentence() -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 2, 1))
    groups = channel_groups(network, torch.rand(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"channels of '0' are kept in runs of 4 \(0 to 3, and so on\)"):
        remove_channels(network, groups, {"0": [0, 1, 2, 3, 4]})


def test_groups_of_another_network_are_a_sentence(network: nn.Module, groups: ChannelGroups, example: Tensor) -> None:
    with pytest.raises(ValueError, match="are another network's: this one has no 'stem"):
        remove_channels(nn.Sequential(nn.Conv2d(1, 2, 1)), groups, KEPT)
    smaller = remove_channels(network, groups, KEPT)
    with pytest.raises(ValueError, match="are another network's: 'stem.*' has fewer channels here"):
        remove_channels(smaller, groups, {"stem": [0]})
    forged = ChannelGroups((ChannelGroup("stem", 4, 1, groups["block6.pointwise"].members, (), ()),), {})
    with pytest.raises(ValueError, match="another network's"):
        remove_channels(smaller, forged, {"stem": [3]})


def test_a_record_is_applied_to_a_new_network(network: nn.Module, groups: ChannelGroups, example: Tensor) -> None:
    smaller = remove_channels(network, groups, KEPT)
    record = {name: list(channels) for name, channels in Q.kept_channels(smaller).items()}
    made = apply_kept(network, example, record)
    assert Q.kept_channels(made) == Q.kept_channels(smaller)
    with torch.no_grad():
        assert torch.equal(made(example), smaller(example))
    assert apply_kept(network, example, {}) is network


def test_a_record_is_applied_without_trying_out_others(network: nn.Module, example: Tensor) -> None:
    """Modules that are called in another precision, with hooks and attributes of their own, are copied as they are."""
    seen: list[str] = []
    network.register_forward_hook(lambda module, inputs, outputs: seen.append(type(module).__name__))
    network.note = {"words": ["kept"], "tensor": torch.ones(2)}  # type: ignore[assignment]
    made = apply_kept(network, example, KEPT)
    before = len(seen)
    with torch.no_grad():
        made(example)
    assert len(seen) == before + 1
    note: Any = made.note
    assert note["words"] == ["kept"]
    assert note["tensor"] is not network.note["tensor"]  # type: ignore[index, union-attr]


def test_outputs_in_training_follow_too(network: nn.Module, groups: ChannelGroups, example: Tensor) -> None:
    """Norms that take statistics of the batch see the same of every channel that is left."""
    smaller, masked = remove_channels(network, groups, KEPT).train(), mask_channels(network, groups, KEPT).train()
    torch.testing.assert_close(smaller(example), masked(example), rtol=1e-4, atol=1e-5)
