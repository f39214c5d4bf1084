"""Convolutions that learn groups: one group for every channel, the formula's multiplications, the same outputs afterwards."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hw_models
import quantizers as Q
from quantizers.pruning import (
    GroupedConv2d,
    Grouping,
    LearnedGroupConv2d,
    group_convolutions,
    learn_groups,
    learned_groups,
    make_dense,
)
from quantizers.pruning.flgc import even_grouping, hard_assignment


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 18, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(18, 24, 1, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 5),
    )
    return layers.eval()


def inputs(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def shaken(seed: int, groups: int = 4) -> nn.Sequential:
    """A network that has learned groups, which are uneven."""
    net = network()
    generator = torch.Generator().manual_seed(seed)
    for layer in learn_groups(net, groups, generator=generator).values():
        for logits in (layer.input_groups, layer.output_groups):
            logits.data = torch.randn(logits.shape, generator=generator)
    return net


def with_groups(conv: nn.Conv2d, grouping: Grouping) -> LearnedGroupConv2d:
    layer = LearnedGroupConv2d.of(conv, grouping.groups)
    layer.input_groups.data = torch.eye(grouping.groups)[list(grouping.inputs)]
    layer.output_groups.data = torch.eye(grouping.groups)[list(grouping.outputs)]
    assert layer.grouping == grouping
    return layer


def test_rows_have_exactly_one_one_also_where_entries_are_equal() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 2.0], [3.0, 1.0, 3.0], [-1.0, -2.0, 0.5]])
    hard = hard_assignment(logits)
    assert torch.equal(hard, torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]]))
    many = hard_assignment(torch.randint(0, 3, (500, 4), generator=torch.Generator().manual_seed(0)).float())
    assert torch.equal(many.sum(1), torch.ones(500))
    assert set(many.unique().tolist()) == {0.0, 1.0}


def test_the_gradient_is_that_of_the_softmax() -> None:
    """Straight through: every entry of a row learns, as if it hadn't been made hard."""
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    (through,) = torch.autograd.grad((hard_assignment(logits) * weight).sum(), logits)
    (soft,) = torch.autograd.grad((logits.softmax(1) * weight).sum(), logits)
    assert torch.equal(through, soft)
    assert (through != 0).all()


def test_the_mask_is_of_blocks() -> None:
    """Sorted by their groups, filters and input channels make a matrix of blocks of ones, and zeros elsewhere."""
    layer = shaken(3)[3]
    assert isinstance(layer, LearnedGroupConv2d)
    grouping = layer.grouping
    rows = sorted(range(18), key=lambda channel: grouping.outputs[channel])
    columns = sorted(range(12), key=lambda channel: grouping.inputs[channel])
    mask = grouping.mask()[rows][:, columns]
    row = column = 0
    for group_inputs, group_outputs in grouping.members:
        block = mask[row : row + len(group_outputs), column : column + len(group_inputs)]
        assert (block == 1).all()
        row, column = row + len(group_outputs), column + len(group_inputs)
    assert mask.sum() == sum(len(i) * len(o) for i, o in grouping.members)
    assert torch.equal(layer.masked_weight(), layer.weight * grouping.mask()[:, :, None, None])


@pytest.mark.parametrize("seed", range(8))
def test_outputs_are_those_of_the_masked_convolution(seed: int) -> None:
    net = shaken(seed, groups=3 + seed % 3)
    x = inputs()
    with torch.no_grad():
        masked = net(x)
        grouped = group_convolutions(net)
        assert (grouped(x) - masked).abs().max() <= 1e-5
        dense = copy.deepcopy(net)
        make_dense(dense)
        assert (dense(x) - masked).abs().max() <= 1e-6
    assert not any(isinstance(module, LearnedGroupConv2d) for module in (*grouped.modules(), *dense.modules()))
    assert dense.state_dict().keys() == network().state_dict().keys()
    assert learned_groups(grouped) == learned_groups(net)


def test_multiplications_are_the_sum_over_groups() -> None:
    """sum_g C_in,g C_out,g k^2 H W, in our own count and in the workload that costs are made of."""
    uneven = Grouping(3, (0, 0, 0, 1, 2, 2), (0, 1, 1, 1, 2))
    assert uneven.macs(9, 16) == (3 * 1 + 1 * 3 + 2 * 1) * 9 * 16
    assert uneven.macs(9, 16) != 6 * 5 * 9 * 16 / 3
    net = shaken(5)
    grouped = group_convolutions(net)
    traced: dict[str, int] = {}
    for record in hw_models.trace(grouped, inputs(1)).layers:
        name = record.name.partition(".convs.")[0]
        traced[name] = traced.get(name, 0) + record.macs
    groupings = learned_groups(net)
    assert traced["3"] == groupings["3"].macs(9, 16)
    assert traced["5"] == groupings["5"].macs(1, 16)


def test_even_groups_are_one_group_convolution_and_uneven_ones_several() -> None:
    conv = nn.Conv2d(6, 9, 3, padding=1)
    even = GroupedConv2d(conv, Grouping(3, (0, 1, 2, 0, 1, 2), (2, 2, 2, 1, 1, 1, 0, 0, 0)))
    assert [type(module) for module in even.convs] == [nn.Conv2d]
    assert (even.convs[0].groups, even.convs[0].in_channels, even.convs[0].out_channels) == (3, 6, 9)
    uneven = GroupedConv2d(conv, Grouping(3, (0, 0, 2, 0, 1, 2), (2, 2, 2, 1, 1, 1, 0, 0, 0)))
    assert [(c.in_channels, c.out_channels, c.groups) for c in uneven.convs] == [(3, 3, 1), (1, 3, 1), (2, 3, 1)]


@pytest.mark.parametrize("bias", [False, True])
def test_dead_channels_are_named_and_change_nothing(bias: bool) -> None:
    """A group without filters isn't read; one without inputs gives its biases."""
    conv = nn.Conv2d(5, 6, 3, padding=1, stride=2, bias=bias)
    grouping = Grouping(4, (0, 3, 0, 1, 1), (0, 2, 1, 1, 2, 0))
    assert grouping.dead_inputs == (1,)
    assert grouping.dead_outputs == (1, 4)
    assert len(grouping.live) == 2
    layer = with_groups(conv, grouping)
    x = torch.randn(2, 5, 7, 7)
    with torch.no_grad():
        expected = layer(x)
        grouped = layer.grouped()
        torch.testing.assert_close(grouped(x), expected, atol=1e-6, rtol=1e-6)
        other = x.clone()
        other[:, 1] += 1
        assert torch.equal(grouped(other), grouped(x))
    first = torch.zeros(()) if conv.bias is None else conv.bias[1].detach()
    assert torch.equal(expected[:, 1], first.expand(2, 4, 4))
    everywhere = Grouping(2, (0,) * 5, (1,) * 6)
    with pytest.raises(ValueError, match="no filter sees an input channel"):
        GroupedConv2d(conv, everywhere)


def test_groups_begin_even_and_are_learned() -> None:
    drawn = even_grouping(10, 7, 3, torch.Generator().manual_seed(0))
    assert sorted(len(inputs) for inputs, _ in drawn.members) == [3, 3, 4]
    assert sorted(len(outputs) for _, outputs in drawn.members) == [2, 2, 3]
    net = network()
    layers = learn_groups(net, 3, generator=torch.Generator().manual_seed(0))
    assert list(layers) == ["0", "3", "5"]
    before = learned_groups(net)
    assert all({len(inputs) for inputs, _ in grouping.members} <= {1, 4, 6} for grouping in before.values())
    optimizer = torch.optim.SGD(net.train().parameters(), 2.0)
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        x = torch.randn(32, 3, 8, 8, generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), (x.mean((1, 2, 3)) > 0).long()).backward()
        optimizer.step()
    assert learned_groups(net) != before
    fixed = network()
    for layer in learn_groups(fixed, 3, learned=False).values():
        assert not layer.input_groups.requires_grad
        assert not layer.output_groups.requires_grad
        assert layer.weight.requires_grad


def test_groups_are_quantized_as_other_convolutions_are() -> None:
    net = group_convolutions(shaken(1))
    policy = Q.BitPolicy.uniform(net, w=8, a=8)
    assert {name.partition(".")[0] for name in policy if ".convs." in name} == {"3", "5"}
    quantized = Q.quantize(net, policy, calibrate=inputs(32))
    with torch.no_grad():
        assert (quantized(inputs()) - net(inputs())).abs().max() < 0.05


def test_groups_are_written_to_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from haq.deployment import onnx as onnx_files
    from haq.deployment.graph import capture

    net = group_convolutions(shaken(1))
    quantized = Q.quantize(net, Q.BitPolicy.uniform(net, w=8, a=8), calibrate=inputs(32))
    graph = capture(quantized, inputs())
    onnx_files.export(graph, quantized, tmp_path / "grouped.onnx")
    found = onnx_files.verify(tmp_path / "grouped.onnx", quantized, inputs())
    assert (found.fault, found.same_answers) == ("", 1.0)


@pytest.mark.parametrize(
    ("groups", "layers", "message"),
    [
        (1, None, "groups is 1; it must be an integer of at least 2"),
        (2.0, None, r"groups is 2\.0"),
        (100, None, "no convolution of the network can learn 100 groups"),
        (4, ["3", "nine"], "the network has no layer 'nine'"),
        (4, ["8"], "layer '8' can't learn 4 groups: it is no Conv2d but Linear"),
        (4, ["0"], "layer '0' can't learn 4 groups: it has 3 channels on one side, fewer than 4"),
    ],
)
def test_bad_groups_are_refused_in_a_sentence(groups: int, layers: list[str] | None, message: str) -> None:
    net = network()
    with pytest.raises(ValueError, match=message):
        learn_groups(net, groups, layers=layers)
    assert learned_groups(net) == {}


def test_bad_groupings_are_refused_in_a_sentence() -> None:
    for arguments, message in (
        ((0, (0,), (0,)), "groups is 0; it must be an integer of at least 1"),
        ((2, (), (0,)), "a grouping of no input channel"),
        ((2, (0, 2), (0,)), "input channel 1 is in group 2; groups are numbered 0 to 1"),
        ((2, (0,), (True,)), "filter 0 is in group True"),
    ):
        with pytest.raises(ValueError, match=message):
            Grouping(*arguments)
    with pytest.raises(
        ValueError, match="layer '3': a grouping of 2 input channels and 1 filters isn't of a convolution of 12"
    ):
        group_convolutions(network(), {"3": Grouping(2, (0, 1), (0,))})
    with pytest.raises(ValueError, match="no convolution '8' that could run in groups"):
        group_convolutions(network(), {"8": Grouping(2, (0, 1), (0,))})
