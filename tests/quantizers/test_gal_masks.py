"""Soft masks of channels: the proximal step, zeros that grow with the penalty, and smaller networks that compute the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quantizers.pruning import (
    ChannelGroups,
    Discriminator,
    Fista,
    SoftMasks,
    channel_groups,
    discriminator_loss,
    generator_loss,
    remove_blocks,
    remove_channels,
    removed_blocks,
    residual_blocks,
    soft_threshold,
)
from tests.conftest import images, small_network

pytest.importorskip("torch_pruning")


class Block(nn.Module):
    """A residual block, and beside it a branch whose channels are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(6, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.second = nn.Conv2d(8, 6, 3, padding=1)
        self.branch = nn.Conv2d(6, 5, 1)
        self.after = nn.Conv2d(11, 7, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))
        result: Tensor = self.after(torch.cat([y, torch.relu(self.branch(y))], 1))
        return result


def residual_network() -> nn.Module:
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), Block(), pool, nn.Flatten(), nn.Linear(28, 4)).eval()


def grouped_network() -> nn.Module:
    """A network in which a grouped convolution reads channels, and writes some, which are kept in pairs."""
    torch.manual_seed(0)
    grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
    layers = (nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), grouped, nn.ReLU(), nn.Conv2d(12, 6, 1), nn.ReLU())
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4)).eval()


def filled(masks: SoftMasks, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for mask in masks.masks:
        values = torch.rand(mask.shape, generator=generator)
        mask.data = values * (torch.rand(mask.shape, generator=generator) > 0.4)


def test_soft_threshold_gives_exact_zeros() -> None:
    values = torch.tensor([-2.0, -0.5, -0.1, 0.0, 0.1, 0.5, 0.500001, 2.0])
    made = soft_threshold(values, 0.5)
    assert made[1:6].tolist() == [0.0] * 5
    torch.testing.assert_close(made[[0, 6, 7]], torch.tensor([-1.5, 1e-6, 1.5]), atol=1e-7, rtol=0)
    assert torch.equal(soft_threshold(values, 0.0), values)
    grid = torch.linspace(-3, 3, 6001)
    for value, moved in zip(values, made, strict=True):
        best = grid[(0.5 * (grid - value) ** 2 + 0.5 * grid.abs()).argmin()]  # what it is the minimum of
        assert abs(float(best - moved)) < 2e-3


def test_a_step_is_never_negative_and_momentum_extrapolates() -> None:
    """By hand: t = 0, 1, (1 + sqrt 5) / 2 = 1.618, (1 + sqrt(1 + 4 * 1.618^2)) / 2 = 2.194."""
    parameter = nn.Parameter(torch.tensor([1.0, 0.1, 1.0]))
    fista = Fista([parameter])
    gradient = torch.tensor([1.0, 1.0, -1.0])
    fista.extrapolate()
    assert parameter.tolist() == pytest.approx([1.0, 0.1, 1.0])
    parameter.grad = gradient.clone()
    fista.step(0.1, 0.5)
    assert parameter.tolist() == pytest.approx([0.85, 0.0, 1.05])
    assert parameter.tolist()[1] == 0.0
    fista.extrapolate()
    assert parameter.tolist() == pytest.approx([0.85, 0.0, 1.05])  # its weight is (1 - 1) / 1.618
    parameter.grad = gradient.clone()
    fista.step(0.1, 0.5)
    assert parameter.tolist() == pytest.approx([0.70, 0.0, 1.10])
    fista.extrapolate()
    weight = 0.618034 / 2.193527
    assert parameter.tolist() == pytest.approx([0.70 - 0.15 * weight, 0.0, 1.10 + 0.05 * weight])
    fista.settle()
    assert parameter.tolist() == pytest.approx([0.70, 0.0, 1.10])
    fista.restart()
    fista.extrapolate()
    assert parameter.tolist() == pytest.approx([0.70, 0.0, 1.10])
    for rate, penalty in ((-1.0, 0.1), (0.1, -1.0), (float("nan"), 0.1)):
        with pytest.raises(ValueError, match="both must be numbers from 0 on"):
            fista.step(rate, penalty)


def lasso(penalty: float, steps: int, restart: int | None = None) -> tuple[Tensor, list[float]]:
    """Minimise a quadratic whose solution without a penalty is known, and return values of the whole after every step."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(30, 20, generator=generator, dtype=torch.float64) / 30**0.5
    target = matrix @ (torch.arange(20) % 3 == 0).double()
    parameter = nn.Parameter(torch.ones(20, dtype=torch.float64))
    fista = Fista([parameter])
    rate = 1 / float(torch.linalg.matrix_norm(matrix, 2)) ** 2
    values = []
    for step in range(steps):
        if restart is not None and step % restart == 0:
            fista.restart()
        fista.extrapolate()
        fista.zero_grad()
        (0.5 * ((matrix @ parameter - target) ** 2).sum()).backward()
        fista.step(rate, penalty)
        with torch.no_grad():
            values.append(float(0.5 * ((matrix @ parameter - target) ** 2).sum() + penalty * parameter.sum()))
    return parameter.detach(), values


def test_it_finds_the_minimum_faster_than_without_momentum() -> None:
    _, values = lasso(0.02, 400)
    _, without = lasso(0.02, 60, restart=1)
    assert values[60] - values[-1] < 0.2 * (without[-1] - values[-1])
    solution, _ = lasso(0.02, 400)
    assert (solution >= 0).all()
    assert (solution == 0).sum() >= 8


def test_more_masks_are_zero_at_a_larger_penalty() -> None:
    counts = [int((lasso(penalty, 300)[0] == 0).sum()) for penalty in (0.0, 0.01, 0.05, 0.2, 0.5, 1.0, 5.0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[3] < counts[-1]
    assert counts[-1] == 20


def test_its_state_goes_on_as_it_would_have() -> None:
    def made() -> tuple[nn.Parameter, Fista]:
        parameter = nn.Parameter(torch.tensor([1.0, 0.5]))
        return parameter, Fista([parameter])

    def step(parameter: nn.Parameter, fista: Fista) -> None:
        fista.extrapolate()
        parameter.grad = 2 * (parameter.detach() - 0.3)
        fista.step(0.1, 0.05)

    parameter, fista = made()
    for _ in range(5):
        step(parameter, fista)
    other, again = made()
    again.load_state_dict(copy.deepcopy(fista.state_dict()))
    assert torch.equal(other, parameter)
    for _ in range(5):
        step(parameter, fista)
        step(other, again)
    assert torch.equal(other, parameter)
    with pytest.raises(ValueError, match="aren't those of this network"):
        Fista([nn.Parameter(torch.ones(3))]).load_state_dict(fista.state_dict())


@pytest.mark.parametrize("build", [small_network, residual_network, grouped_network])
def test_removal_computes_what_the_masked_network_does(build: object) -> None:
    network = build()  # type: ignore[operator]
    x = images(16)
    groups = channel_groups(network, x[:1])
    with torch.no_grad():
        plain = network(x)
        masks = SoftMasks(network, groups)
        assert torch.equal(network(x), plain)
        filled(masks)
        masked = network(x)
        assert (masked - plain).abs().max() > 1e-2
        masks.fold(network)
        assert (network(x) - masked).abs().max() <= 1e-6
        smaller = remove_channels(network, groups, masks.kept())
        assert (smaller(x) - masked).abs().max() <= 1e-6
    left = sum(len(channels) for channels in masks.kept().values())
    gone = zip(masks.masks, groups.groups, strict=True)
    assert left == sum(group.channels - group.unit * int((mask == 0).sum()) for mask, group in gone)
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in network.parameters())


class Sum(nn.Sequential):
    """x + f(x), with a ReLU behind it or without."""

    def __init__(self, relu: bool, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + super().forward(x)
        if self.relu:
            result = result.relu()
        return result


def network_of_blocks() -> nn.Module:
    torch.manual_seed(0)

    def branch() -> list[nn.Module]:
        layers = [nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)]
        return [*layers, nn.BatchNorm2d(6)]

    plain = nn.Sequential(*branch())  # of the same shapes, but no block
    stem = nn.Conv2d(1, 6, 3, padding=1)
    pool = nn.AdaptiveAvgPool2d(2)
    layers = (stem, Sum(True, *branch()), Sum(False, *branch()), plain, Sum(True, *branch()), pool, nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(24, 4)).eval()


def test_residual_blocks_are_found_and_can_go() -> None:
    network = network_of_blocks()
    x = images(8)
    blocks = residual_blocks(network, x[:1])
    assert {name: (block.last, block.relu) for name, block in blocks.items()} == {
        "1": ("1.4", True),
        "2": ("2.4", False),
        "4": ("4.4", True),
    }
    with torch.no_grad():
        plain = network(x)
        masks = SoftMasks(network, channel_groups(network, x[:1]), blocks)
        assert torch.equal(network(x), plain)
        filled(masks)
        for mask, value in zip(masks.block_masks, (0.0, 0.0, 0.5), strict=True):
            mask.fill_(value)
        masked = network(x)
        masks.fold(network)
        assert masks.lost_blocks() == {"1": True, "2": False}
        smaller = remove_blocks(remove_channels(network, masks.groups, masks.kept()), masks.lost_blocks())
        assert (smaller(x) - masked).abs().max() <= 1e-6
    assert removed_blocks(copy.deepcopy(smaller)) == {"1": True, "2": False}
    assert isinstance(smaller[1], nn.ReLU)
    assert isinstance(smaller[2], nn.Identity)
    with pytest.raises(ValueError, match="the network has no block '9' that could be removed"):
        remove_blocks(network, {"9": True})


def test_a_group_without_masks_left_keeps_a_channel_of_zeros() -> None:
    network = residual_network()
    x = images(4)
    masks = SoftMasks(network, channel_groups(network, x[:1]))
    with torch.no_grad():
        for mask in masks.masks:
            mask.zero_()
        masked = network(x)
        masks.fold(network)
        smaller = remove_channels(network, masks.groups, masks.kept())
        assert (smaller(x) - masked).abs().max() <= 1e-6
    assert set(map(len, masks.kept().values())) == {1}


def test_masks_have_gradients_also_where_they_are_zero() -> None:
    network = small_network()
    masks = SoftMasks(network, channel_groups(network, images(1)))
    filled(masks)
    network(images(8)).square().sum().backward()
    for mask in masks.masks:
        assert mask.grad is not None
        assert (mask.grad[mask == 0] != 0).any()


def test_without_channels_to_remove_there_are_no_masks() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(ValueError, match="no channels of the network can be removed .*outputs of the network"):
        SoftMasks(network, channel_groups(network, images(1)))
    with pytest.raises(ValueError, match="there is nothing to learn masks for"):
        SoftMasks(network, ChannelGroups((), {}))


def test_the_discriminator_is_the_papers_with_a_single_sigmoid() -> None:
    made = Discriminator(10, torch.Generator().manual_seed(0))
    again = Discriminator(10, torch.Generator().manual_seed(0))
    shapes = [tuple(p.shape) for p in made.parameters() if p.dim() == 2]
    assert shapes == [(128, 10), (256, 128), (128, 256), (1, 128)]
    assert all(torch.equal(one, other) for one, other in zip(made.parameters(), again.parameters(), strict=True))
    assert not any(isinstance(module, nn.Sigmoid) for module in made.modules())
    x = torch.randn(200, 10, generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    for _ in range(60):  # it can be as sure as it likes, not 0.73 at most
        optimizer.zero_grad()
        discriminator_loss(made(x[:100]), made(x[100:] + 5), 0.0).backward()
        optimizer.step()
    assert made(x[:100]).sigmoid().mean() > 0.95


def test_losses_are_those_of_the_formula() -> None:
    of_baseline, of_generator = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0])
    real = -of_baseline.sigmoid().log().mean()
    made = -(1 - of_generator.sigmoid()).log().mean()
    fooled = -of_generator.sigmoid().log().mean()
    torch.testing.assert_close(discriminator_loss(of_baseline, of_generator, 0.0), real + made)
    torch.testing.assert_close(discriminator_loss(of_baseline, of_generator, 0.5), real + made + 0.5 * fooled)
    outputs, expected = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    torch.testing.assert_close(generator_loss(outputs, expected, of_generator, 0.1), fooled + 0.1 * (4 + 9) / 4)
    # The regulariser holds it back: what can't be told apart is best called undecided.
    same = torch.zeros(4, requires_grad=True)
    (gradient,) = torch.autograd.grad(discriminator_loss(torch.full((4,), 9.0), same), same)
    assert gradient.abs().max() < 1e-6
    assert F.binary_cross_entropy_with_logits(same, torch.ones(4)) > 0
