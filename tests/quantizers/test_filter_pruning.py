"""Filters of binary layers are switched off by learned masks, and taken out without a change in any output bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from quantizers.binary_training import RPReLU, RSign, split_parameters
from quantizers.pruning import MainSubsidiary, kept_share, layerwise_pruning, masked_layers, remove_filters
from quantizers.schemes import Binary
from tests.conftest import images

Bits = dict[str, tuple["int | None", "int | None"]]


def network(**options: object) -> nn.Module:
    """Convolutions with what may stand between them, a nested block, and linear layers; norms as training would leave them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Sequential(
            *(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.Hardtanh()),
            nn.Sequential(nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.PReLU(12), nn.PReLU()),
            nn.Sequential(nn.Conv2d(12, 10, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(10), RPReLU(10)),
            *(nn.Conv2d(10, 6, 2, bias=False), nn.MaxPool2d(2, 1, 1), nn.BatchNorm2d(6), RSign(6, "clipped")),
            *(nn.Flatten(), nn.Linear(96, 20, bias=False), nn.BatchNorm1d(20), nn.Dropout(0.1)),
            *(nn.Linear(20, 4, bias=False), nn.BatchNorm1d(4)),
        )
        for module in made.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                nn.init.uniform_(module.weight, -1, 1)
                nn.init.normal_(module.bias, 0, 0.3)
                module.momentum = 1.0
            if isinstance(module, RPReLU | RSign):
                for parameter in module.parameters():
                    nn.init.normal_(parameter, 0, 0.2)
        policy: Bits = dict.fromkeys(Q.BitPolicy.uniform(made, 1, 1), (1, 1))
        policy["0"] = (1, None)
        made = Q.quantize(made, policy, scheme=MainSubsidiary(**options))  # type: ignore[arg-type]
        made(images(64))
    return made.eval()


def switch_off(made: nn.Module, off: dict[str, list[int]]) -> nn.Module:
    with torch.no_grad():
        for name, filters in off.items():
            made.get_submodule(name).get_parameter("filter_mask")[filters] = -0.5
    return made


OFF = {"3.0": [0, 3, 4, 11], "4.0": [9], "5": [1, 2], "10": [0, 5, 6, 7, 19]}


def chain(*between: nn.Module, bias: bool = False, groups: int = 1, channels: int = 4) -> nn.Module:
    made = nn.Sequential(nn.Conv2d(4, 4, 3, bias=bias), *between, nn.Conv2d(channels, 4, 3, bias=False, groups=groups)).eval()
    return Q.quantize(made, Q.BitPolicy.uniform(made, 1, 1), scheme="main-subsidiary")


def noise(count: int, channels: int = 4, size: int = 9) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(0))


def test_all_filters_are_kept_at_first() -> None:
    made = network()
    plain = Q.quantize(Q.float_copy(made), Q.get_policy(made), scheme=Binary())
    assert torch.equal(made(images(3)), plain(images(3)))
    assert list(made.state_dict()) == list(plain.state_dict())
    assert kept_share(made).item() == 1
    assert list(masked_layers(made)) == list(Q.quant_layers(made))


def test_a_filter_that_is_off_leaves_exactly_the_shift_of_its_norm() -> None:
    norm = nn.BatchNorm2d(4)
    made = switch_off(chain(norm), {"0": [2]})
    with torch.no_grad():
        norm = made.get_submodule("1")
        norm.get_parameter("bias").copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))
    front = nn.Sequential(made.get_submodule("0"), norm)
    assert (made.get_submodule("0")(noise(5))[:, 2] == 0).all()
    assert (front(noise(5))[:, 2] == 0.3).all()  # running statistics 0 and 1
    assert (front.train()(noise(5))[:, 2] == 0.3).all()
    assert front(noise(5))[:, 1].unique().numel() > 1


def test_a_masks_gradient_is_that_of_a_clipped_sign() -> None:
    layer = Q.quantize(nn.Linear(3, 5, bias=False), {"": (1, None)}, scheme="main-subsidiary")
    assert isinstance(layer, Q.QuantLayer)
    mask = layer.get_parameter("filter_mask")
    with torch.no_grad():
        layer.weight.fill_(0.5)
        mask.copy_(torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5]))
    made = layer.quantized_weight()
    assert made[:, 0].tolist() == [0, 0, 1, 1, 1]
    made.sum().backward()
    assert mask.grad is not None
    assert mask.grad.tolist() == [0, 1.5, 1.5, 1.5, 0]  # three weights, half of each
    assert layer.weight.grad is not None
    assert layer.weight.grad[:, 0].tolist() == [0, 0, 1, 1, 1]


def test_the_penalty_is_the_kept_share_and_pushes_every_mask_down() -> None:
    made = switch_off(network(), OFF)
    share = kept_share(made, ["3.0", "4.0"])
    assert share.item() == pytest.approx(17 / 22)
    assert kept_share(made).item() == pytest.approx((56 - 12) / 56)
    share.backward()
    for name, count in (("3.0", 12), ("4.0", 10)):
        gradient = made.get_submodule(name).get_parameter("filter_mask").grad
        assert gradient is not None
        assert gradient.tolist() == pytest.approx([0.5 / 22] * count)
    with pytest.raises(ValueError, match="layer '7' has no filter mask; those that have: 0, 3.0"):
        kept_share(made, ["7"])
    with pytest.raises(ValueError, match="no layer but the last"):
        kept_share(nn.Linear(2, 2))


@pytest.mark.parametrize("off", [OFF, {"4.0": list(range(10))}, {"10": [3]}, {}])
def test_removal_leaves_every_bit_of_the_output(off: dict[str, list[int]]) -> None:
    made = network()
    x = images(32)
    assert made(x).unique(dim=0).shape[0] > 16
    before = switch_off(made, off)(x)
    small = remove_filters(made)
    assert torch.equal(small(x), before)
    assert torch.equal(small(x[:1]), before[:1])
    assert torch.equal(made(x), before)
    for (name, layer), (new, left) in zip(Q.quant_layers(made).items(), Q.quant_layers(small).items(), strict=True):
        assert new.removesuffix(".layer") == name
        kept = len(layer.weight) - len(off.get(name, []))
        assert len(left.weight) == len(left.get_parameter("filter_mask")) == max(1, kept)


@pytest.mark.parametrize("size", [(8, 8), (9, 7), (20, 13)])
def test_removal_doesnt_depend_on_the_size_of_images(size: tuple[int, int]) -> None:
    made = switch_off(network()[:7], {"3.0": OFF["3.0"], "4.0": [2, 3]})  # type: ignore[index]
    x = torch.rand(8, 1, *size, generator=torch.Generator().manual_seed(0))
    assert made(x).unique(dim=0).shape[0] == 8
    assert torch.equal(remove_filters(made)(x), made(x))


def test_a_smaller_network_is_a_network() -> None:
    made = switch_off(network(), OFF)
    small, x = remove_filters(made), images(6)
    before = small(x)
    conv = small.get_submodule("4.0.layer")
    assert (conv.in_channels, conv.out_channels) == (8, 9)  # type: ignore[union-attr]
    assert small.get_submodule("3.1").num_features == 8  # type: ignore[union-attr]
    again = remove_filters(switch_off(network(), OFF))
    assert torch.equal(copy.deepcopy(small)(x), before)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(-1)
    again.load_state_dict(small.state_dict())
    Q.load_quantizer_state(again, Q.quantizer_state(small))
    assert torch.equal(again(x), before)
    small.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())


def test_a_constant_is_not_the_same_at_the_border() -> None:
    """Padding is zero, so fewer of the kernel's weights meet the constant there: one number per channel would be wrong."""
    made = Q.quantize(
        nn.Sequential(nn.Conv2d(2, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 3, padding=1, bias=False)).eval(),
        {"0": (1, 1), "2": (1, 1)},
        scheme="main-subsidiary",
    )
    with torch.no_grad():
        made.get_submodule("2").get_parameter("weight").fill_(1.0)
    x = noise(2, 2, 4)
    small = remove_filters(switch_off(made, {"0": [1]}))
    assert torch.equal(small(x), made(x))
    difference = (made(x) - small.get_submodule("2.layer")(small[:2](x)))[0, 0]
    assert difference.tolist() == [[4, 6, 6, 4], [6, 9, 9, 6], [6, 9, 9, 6], [4, 6, 6, 4]]


def test_one_dimension_too() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Sequential(
            *(nn.Conv1d(2, 5, 3, bias=False), nn.BatchNorm1d(5), nn.AdaptiveMaxPool1d(6), nn.Conv1d(5, 3, 3, padding="same")),
        ).eval()
        nn.init.normal_(made[1].bias)
        made[3].bias = None
    made = switch_off(Q.quantize(made, {"0": (1, 1), "3": (1, 1)}, scheme="main-subsidiary"), {"0": [0, 1, 4]})
    x = torch.randn(4, 2, 12, generator=torch.Generator().manual_seed(0))
    assert torch.equal(remove_filters(made)(x), made(x))


def test_float_inputs_and_biases_are_exact_up_to_rounding_only() -> None:
    made = switch_off(network(), {"0": [1, 5]})
    with pytest.raises(ValueError, match=r"layer '0'.*add up integers.*exact=False"):
        remove_filters(made)
    torch.testing.assert_close(remove_filters(made, exact=False)(images(8)), made(images(8)))

    plain = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    nn.init.constant_(plain[1].bias, 0.7)
    made = switch_off(Q.quantize(plain, {"0": (1, 1), "3": (None, None)}, scheme="main-subsidiary"), {"0": [1, 2]})
    with pytest.raises(ValueError, match="'0'"):
        remove_filters(made)
    torch.testing.assert_close(remove_filters(made, exact=False)(noise(3)), made(noise(3)))


class Block(nn.Module):
    """Not a row: nobody knows where the channels go."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


@pytest.mark.parametrize(
    ("made", "name", "message"),
    [
        (chain(), "1", "no quantized layer follows"),
        (chain(nn.AvgPool2d(2)), "0", "a AvgPool2d follows"),
        (chain(groups=2), "0", r"has groups \('1'\)"),
        (chain(bias=True), "0", "no bias"),
        (Q.quantize(Block(), {"conv": (1, 1)}, scheme="main-subsidiary"), "conv", "doesn't stand in an nn.Sequential"),
        (chain(nn.PixelUnshuffle(2), channels=16), "0", "PixelUnshuffle follows"),
    ],
)
def test_what_cannot_be_removed_is_named(made: nn.Module, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"layer '{name}'.*{message}"):
        remove_filters(switch_off(made, {name: [1]}))


def test_scales_of_the_next_layer_would_change() -> None:
    for exact, message in ((False, "'4.0' has scales of its whole weight"), (True, r"integers.*\('3.0'\)")):
        with pytest.raises(ValueError, match=f"layer '3.0' can't be removed: .*{message}"):
            remove_filters(switch_off(network(scaling="xnor"), {"3.0": [1]}), exact=exact)


def test_masks_are_trained_one_layer_after_the_other() -> None:
    made = network()
    made.get_submodule("1").get_parameter("weight").requires_grad_(False)
    masks = {name: layer.get_parameter("filter_mask") for name, layer in masked_layers(made).items()}
    free = [p for p in made.parameters() if p.requires_grad and not any(p is mask for mask in masks.values())]
    seen = []
    for name, phase, parameters in layerwise_pruning(made, generator=torch.Generator().manual_seed(0)):
        seen.append((name, phase))
        expected = [masks[name]] if phase == "mask" else free
        assert [id(p) for p in parameters] == [id(p) for p in expected]
        assert {id(p) for p in made.parameters() if p.requires_grad} == {id(p) for p in expected}
        if phase == "mask":
            started = masks[name].detach()
            assert -1e-4 <= started.min() < 0 < started.max() <= 1e-4
    assert seen == [(name, phase) for name in list(masks)[:-1] for phase in ("mask", "weights")]
    assert {id(p) for p in made.parameters() if p.requires_grad} == {id(p) for p in free}
    steps = layerwise_pruning(made, ["5"])
    next(steps)
    steps.close()
    assert {id(p) for p in made.parameters() if p.requires_grad} == {id(p) for p in free}


def trained(strength: float) -> tuple[nn.Module, float]:
    """A network whose one hidden layer has 32 filters, pruned as the paper does; and its accuracy."""
    x, y = images(192) - 0.5, F.avg_pool2d(images(192), 4).flatten(1).argmax(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = nn.Sequential(
            *(nn.Flatten(), nn.Linear(64, 24, bias=False), nn.BatchNorm1d(24)),
            *(nn.Linear(24, 32, bias=False), nn.BatchNorm1d(32), nn.Linear(32, 4, bias=False), nn.BatchNorm1d(4)),
        )
    made = Q.quantize(made, {"1": (1, None), "3": (1, 1), "5": (1, 1)}, scheme="main-subsidiary")

    def fit(parameters: list[nn.Parameter], lr: float, steps: int, strength: float) -> None:
        optimizer = torch.optim.Adam(parameters, lr)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(made(x), y)
            if strength:
                loss = loss + strength * kept_share(made, ["3"])
            loss.backward()
            optimizer.step()

    masks = {id(layer.get_parameter("filter_mask")) for layer in masked_layers(made).values()}
    fit([p for p in made.parameters() if id(p) not in masks], 0.02, 40, 0)
    for _, phase, parameters in layerwise_pruning(made, ["3"], torch.Generator().manual_seed(0)):
        fit(parameters, *((1e-4, 25, strength) if phase == "mask" else (0.01, 25, 0)))
    made.eval()
    with torch.no_grad():
        return made, (made(x).argmax(1) == y).float().mean().item()


def test_a_stronger_penalty_keeps_fewer_filters() -> None:
    runs = {strength: trained(strength) for strength in (0.0, 50.0, 1000.0)}
    shares = [kept_share(made, ["3"]).item() for made, _ in runs.values()]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1] > 0
    made, accuracy = runs[1000.0]
    assert accuracy > 0.8
    x = images(64) - 0.5
    assert torch.equal(remove_filters(made)(x), made(x))
    weights, others = split_parameters(remove_filters(made))
    assert weights[1].shape[0] == round(shares[-1] * 32) == weights[2].shape[1]
    assert len(others) == 3 + 6
