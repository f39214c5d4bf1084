"""Equalized and smoothed networks compute what they computed, with more even ranges."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import quantizers as Q
from quantizers.graph import capture

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels)


def conv(inputs: int, outputs: int, size: int, **options: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options), norm(outputs)]


class Sum(nn.Module):
    """x + f(x), or g(x) + f(x), and what comes after."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.branch, self.shortcut, self.after = branch, shortcut or nn.Identity(), after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.shortcut(x) + self.branch(x))


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)]


def inverted(inputs: int, outputs: int) -> nn.Module:
    inner = 2 * inputs
    layers = [*conv(inputs, inner, 1), nn.ReLU6(inplace=True), *conv(inner, inner, 3, groups=inner), nn.ReLU6(inplace=True)]
    branch = nn.Sequential(*layers, *conv(inner, outputs, 1))
    if inputs == outputs:
        return Sum(branch)
    return branch


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 6, 3), nn.Conv2d(10, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.cat([self.one(x).relu(), self.two(x)], 1)).mean((2, 3))


class Gated(nn.Module):
    """Squeeze and excitation between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x).relu()
        gate = self.excite(self.squeeze(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.two(x * gate).mean((2, 3))


class Shuffled(nn.Module):
    """Channels are split, shuffled as in ShuffleNet, and flattened with their places."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(4, 4, 1), nn.Linear(8 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = self.one(x).relu().chunk(2, 1)
        x = torch.cat([kept, self.two(changed)], 1)
        x = x.view(len(x), 2, 4, 6, 6).transpose(1, 2).reshape(len(x), 8, 6, 6)
        return self.last(x.flatten(1))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: nn.Sequential(*conv(3, 8, 3), nn.ReLU(), *conv(8, 6, 3), nn.ReLU(), *head(6)),
    "depthwise": lambda: nn.Sequential(
        *conv(3, 8, 1), nn.ReLU(), *conv(8, 8, 3, groups=8), nn.ReLU(), *conv(8, 6, 1), nn.ReLU(), *head(6)
    ),
    "inverted residuals": lambda: nn.Sequential(
        *conv(3, 6, 3), nn.ReLU6(), inverted(6, 6), inverted(6, 8), inverted(8, 8), *head(8)
    ),
    "basic blocks": lambda: nn.Sequential(
        *conv(3, 6, 3),
        nn.ReLU(),
        Sum(nn.Sequential(*conv(6, 6, 3), nn.ReLU(), *conv(6, 6, 3)), None, nn.ReLU()),
        Sum(nn.Sequential(*conv(6, 8, 3), nn.ReLU(), *conv(8, 8, 3)), nn.Sequential(*conv(6, 8, 1)), nn.ReLU()),
        *head(8),
    ),
    "bottleneck": lambda: nn.Sequential(
        *conv(3, 8, 3),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        Sum(nn.Sequential(*conv(8, 4, 1), nn.ReLU(True), *conv(4, 4, 3), nn.ReLU(True), *conv(4, 8, 1)), None, nn.ReLU(True)),
        *head(8),
    ),
    "flattened": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 5)),
    "slopes": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.PReLU(6), nn.Conv2d(6, 6, 3), nn.LeakyReLU(0.2), nn.Dropout(), nn.Conv2d(6, 5, 1), *head(5)
    ),
    "groups": lambda: nn.Sequential(
        *conv(3, 8, 3), nn.ReLU(), *conv(8, 12, 3, groups=4), nn.ReLU(), *conv(12, 6, 1, groups=2), *head(6)
    ),
    "concatenation": Concatenated,
    "gate": Gated,
    "shuffle": Shuffled,
    "reflection": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect"),
        nn.Upsample(scale_factor=2),
        *head(6),
    ),
    "linear": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(192, 12), nn.ReLU(), nn.Linear(12, 7), nn.Identity(), nn.Linear(7, 5)
    ),
    "one dimension": lambda: nn.Sequential(
        nn.Flatten(2),
        nn.Conv1d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool1d(2),
        nn.Conv1d(6, 4, 3),
        nn.Flatten(),
        nn.Linear(120, 5),
    ),
    "weight norm": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Conv2d(3, 6, 3)), nn.ReLU(), parametrizations.weight_norm(nn.Conv2d(6, 6, 3)), *head(6)
    ),
}
IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
OTHERS = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def random(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a network with channels of very different sizes, and norms that have seen something."""
    torch.manual_seed(0)
    network = make().eval()
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear) and not hasattr(module, "parametrizations"):
            sizes = torch.exp(torch.randn(len(module.weight)))
            module.weight *= sizes.view(-1, *[1] * (module.weight.dim() - 1))
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.2, 2)
            module.bias.normal_()
            module.running_mean.normal_()  # type: ignore[union-attr, operator]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return network


def difference(one: nn.Module, other: nn.Module, x: Tensor) -> float:
    """Return the largest difference of outputs, of the outputs' size."""
    with torch.no_grad():
        before = one(x)
        return float((before - other(x)).abs().max() / before.abs().max())


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in network.named_modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)}


@torch.no_grad()
def evenness(network: nn.Module) -> float:
    """Return how even the largest weights of output channels are within layers: the mean of mean / largest."""
    found = []
    for layer in layers_of(network).values():
        rows = layer.weight.flatten(1).abs().amax(1)  # type: ignore[operator, union-attr]
        found.append(float(rows.mean() / rows.max()))
    return sum(found) / len(found)


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_stay(name: str, by: str) -> None:
    network = random(NETWORKS[name])
    kept = {key: value.clone() for key, value in network.state_dict().items()}
    made = Q.equalize(network, IMAGES, by=by)
    assert difference(network, made, IMAGES) < 1e-5
    assert all(torch.equal(value, kept[key]) for key, value in network.state_dict().items())
    exact = Q.equalize(network, IMAGES, by=by, absorb=False)
    assert difference(network, exact, OTHERS) < 1e-5
    before = layers_of(Q.fold_batch_norm(network, IMAGES))
    moved = [not torch.equal(before[key].weight, layer.weight) for key, layer in layers_of(exact).items()]  # type: ignore[arg-type]
    assert sum(moved) >= 2


@pytest.mark.parametrize("name", ["chain", "depthwise", "inverted residuals", "basic blocks", "groups", "one dimension"])
def test_weights_of_one_tensor_get_more_even(name: str) -> None:
    network = random(NETWORKS[name])
    assert evenness(Q.equalize(network, IMAGES)) > 1.1 * evenness(Q.fold_batch_norm(network, IMAGES))


def test_the_two_ranges_of_a_channel_are_equal() -> None:
    """What equation 11 of the paper makes of every channel, depthwise triples included."""
    network = random(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 5, 1))
    )
    first, depthwise, last = layers_of(Q.equalize(network, IMAGES, absorb=False)).values()
    middle = depthwise.weight.flatten(1).abs().amax(1)  # type: ignore[operator, union-attr]
    assert torch.allclose(first.weight.flatten(1).abs().amax(1), middle, rtol=1e-3)  # type: ignore[operator, union-attr]
    assert torch.allclose(last.weight.abs().amax((0, 2, 3)), middle, rtol=1e-3)  # type: ignore[operator, union-attr]


def test_values_and_weights_of_a_channel_are_equal_by_activations() -> None:
    network = random(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1)))
    made = Q.equalize(network, IMAGES, by="activations", absorb=False)
    values = made[:2](IMAGES).amax((0, 2, 3))  # type: ignore[index]
    assert torch.allclose(values, made[2].weight.abs().amax((0, 2, 3)), rtol=1e-4)  # type: ignore[index]


def test_the_graph_knows_readers_and_operations() -> None:
    network = random(NETWORKS["basic blocks"])
    graph = capture(Q.fold_batch_norm(network, IMAGES), (IMAGES,))
    assert set(graph.readers("0")) == {"3.branch.0", "4.branch.0", "4.shortcut.0"}
    assert graph.readers("4.branch.3") == ("7",)
    assert graph.operations("4.branch.3") == ("add", "relu", "adaptive_avg_pool2d", "flatten")
    assert torch.equal(graph.layers["0"].outputs, graph.layers["3.branch.3"].outputs)
    assert graph.layers["7"].end == "the network's output"


def test_relu6_becomes_relu_only_where_that_changes_nothing() -> None:
    network = random(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 5, 1)))
    small = 0.01 * IMAGES
    assert isinstance(Q.equalize(network, small)[1], nn.ReLU)  # type: ignore[index]
    with torch.no_grad():
        network[0].weight[:4] *= 20  # type: ignore[index, operator]
    with pytest.raises(ValueError, match=r"nothing can be equalized: outputs reach the bound of a ReLU6 \('1'\)"):
        Q.equalize(network, IMAGES, relu6="keep")
    with pytest.raises(ValueError, match=r"'0' can't be equalized: outputs reach the bound"):
        Q.equalize(network, IMAGES, layers=["0"], relu6="keep")
    made = Q.equalize(network, small, batches=IMAGES)
    assert difference(network, made, 100 * OTHERS) < 1e-5
    assert not torch.equal(made[0].weight, network[0].weight)  # type: ignore[index, arg-type]
    assert isinstance(made[1], Q.ChannelClamp)  # type: ignore[index]
    # A hook would be lost.
    network[1].register_forward_hook(lambda module, inputs, output: 2 * output)  # type: ignore[index]
    with pytest.raises(ValueError, match="has no hooks"):
        Q.equalize(network, small)
    with pytest.raises(ValueError, match="unknown choice 'relu' for `relu6`; known: keep, clamp"):
        Q.equalize(network, IMAGES, relu6="relu")


def test_a_relu6_called_twice_may_mean_two_things() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.last, self.act = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 5, 1), nn.ReLU6()

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.act(self.two(self.act(self.one(x)))))

    network = random(Twice)
    made = Q.equalize(network, 0.01 * IMAGES)
    assert difference(network, made, 0.01 * IMAGES) < 1e-5
    assert isinstance(made.act, nn.ReLU)
    with pytest.raises(ValueError, match="if it is called once"):
        Q.equalize(network, 10 * IMAGES)


def test_high_biases_are_absorbed() -> None:
    network = random(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1, bias=False), nn.Flatten(), nn.Linear(180, 4))
    )
    with torch.no_grad():
        network[0].bias += 100  # type: ignore[index, operator]
    made, plain = Q.equalize(network, IMAGES), Q.equalize(network, IMAGES, absorb=False)
    assert difference(network, made, IMAGES) < 1e-5
    assert made[:2](IMAGES).max() < 0.5 * plain[:2](IMAGES).max()  # type: ignore[index]
    assert made[:2](IMAGES).amin((0, 2, 3)).max() < 1e-3  # type: ignore[index]
    # Zeros around the map would have to be that constant.
    padded = random(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1)))
    with torch.no_grad():
        padded[0].bias += 100  # type: ignore[index, operator]
    one, other = Q.equalize(padded, IMAGES), Q.equalize(padded, IMAGES, absorb=False)
    assert torch.equal(one[0].bias, other[0].bias)  # type: ignore[index, arg-type]


def test_channels_that_the_data_never_reaches_keep_their_scale_at_relu6() -> None:
    """They would be cut off elsewhere on other data."""
    network = random(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1)))
    with torch.no_grad():
        network[0].weight *= 20  # type: ignore[index, operator]
        network[0].bias[0] = -200  # type: ignore[index, operator]
    for by in ("weights", "activations"):
        made = Q.equalize(network, IMAGES, by=by, relu6="keep", absorb=False)
        assert type(made[1]) is nn.ReLU6  # type: ignore[index]
        assert difference(network, made, 500 * OTHERS) < 1e-5


def test_ranges_are_those_of_all_batches() -> None:
    network = random(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 5, 1)))
    assert isinstance(Q.equalize(network, 0.01 * IMAGES)[1], nn.ReLU)  # type: ignore[index]
    batches = [(0.01 * IMAGES, torch.zeros(8)), (9 * IMAGES, torch.zeros(8))]
    assert isinstance(Q.equalize(network, 0.01 * IMAGES[:1], batches=batches)[1], Q.ChannelClamp)  # type: ignore[index]


class Tied(nn.Module):
    """One weight in two layers, a layer that is called twice, a weight also read by itself, and a layer with a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.entry, self.first, self.same, self.twice = (nn.Linear(6, 6) for _ in range(4))
        self.middle, self.read, self.hooked, self.last = (nn.Linear(6, 6) for _ in range(4))
        self.same.weight = self.first.weight
        self.hooked.register_forward_hook(lambda module, inputs, output: output.sin())

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(self.first(self.entry(x)).relu()).relu()
        x = self.twice(self.twice(x).relu()).relu()
        x = self.read(self.middle(x)).relu() + self.read.weight.sum()
        return self.last(self.hooked(x))


def test_shared_layers_and_hooks() -> None:
    network = random(Tied)
    x = torch.randn(4, 6)
    made = Q.equalize(network, x)
    assert difference(network, made, 10 * x) < 1e-5
    assert made.first.weight is made.same.weight
    assert not torch.equal(made.twice.weight, network.twice.weight)  # type: ignore[arg-type]
    for name, why in (("hooked", "sin"), ("read", "weight"), ("middle", "weight")):
        with pytest.raises(ValueError, match=f"'{name}' can't be equalized.*{why}"):
            Q.equalize(network, x, layers=[name])


class Doubling(nn.Linear):
    """A subclass that does more than its layer."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.linear(x.flatten(1), self.weight, self.bias)


def test_layers_of_other_classes() -> None:
    network = random(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Doubling(144, 6), nn.ReLU(), Doubling(6, 3)))
    with torch.no_grad():
        network[2].bias += 100  # type: ignore[index, operator]
    for by in ("weights", "activations"):
        assert difference(network, Q.equalize(network, IMAGES, by=by), IMAGES) < 1e-5


def test_dead_channels_keep_their_scale() -> None:
    network = random(lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 1)))
    with torch.no_grad():
        network[0].weight[2] = 0  # type: ignore[index, operator]
        network[2].weight[:, 4] = 0  # type: ignore[index, operator]
    for by in ("weights", "activations"):
        made = Q.equalize(network, IMAGES, by=by, absorb=False)
        assert all(parameter.isfinite().all() for parameter in made.parameters())
        assert torch.equal(made[0].weight[4], network[0].weight[4])  # type: ignore[index]
        assert difference(network, made, OTHERS) < 1e-5


def test_only_the_layers_that_are_named() -> None:
    network = random(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3), nn.GELU()))
    x = torch.randn(4, 4)
    made = Q.equalize(network, x, layers=["2"], absorb=False)
    assert torch.equal(made[0].weight, network[0].weight)  # type: ignore[index, arg-type]
    assert not torch.equal(made[4].weight, network[4].weight)  # type: ignore[index, arg-type]
    with pytest.raises(ValueError, match=r"'4' can't be equalized.*gelu"):
        Q.equalize(network, x, layers=["2", "4"])
    with pytest.raises(ValueError, match="'9' can't be equalized: the network calls no such layer"):
        Q.equalize(network, x, layers=["9"])


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return self.two(self.one(x))
        return self.one(x)


def test_what_cannot_be_done_is_said() -> None:
    x = torch.randn(4, 4)
    with pytest.raises(ValueError, match=r"nothing can be equalized.*tanh"):
        Q.equalize(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), x)
    with pytest.raises(ValueError, match=r"Choosing can't be equalized: torch.export can't write down"):
        Q.equalize(Choosing(), x)
    with pytest.raises(ValueError, match="needs an example"):
        Q.equalize(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="this one is empty"):
        Q.equalize(nn.Linear(4, 4), x[:0])
    with pytest.raises(ValueError, match="aren't finite"):
        Q.equalize(nn.Linear(4, 4), x / 0)
    with pytest.raises(ValueError, match="unknown aim 'size'; known: weights, activations"):
        Q.equalize(nn.Linear(4, 4), x, by="size")
    chain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    quantized = Q.quantize(chain, Q.BitPolicy.uniform(chain, w=8, a=8), calibrate=x)
    with pytest.raises(ValueError, match="before `quantize`"):
        Q.equalize(quantized, x)
    with pytest.raises(ValueError, match="nothing can be smoothed"):
        Q.smooth(chain, x)
    with pytest.raises(ValueError, match=r"alpha must be between 0 and 1, not 2"):
        Q.smooth(chain, x, alpha=2)
    with pytest.raises(ValueError, match="at least one image"):
        Q.smooth(chain, [])


class OwnNorm(nn.Module):
    """RMSNorm as models of language write it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Transformer(nn.Module):
    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        heads = [layer(y).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v)]
        x = x + self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        y = self.second(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


TOKENS = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 10, 8)
NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(8),
    "LayerNorm without weight": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "RMSNorm without weight": lambda: nn.RMSNorm(8, elementwise_affine=False),
    "written by hand": lambda: OwnNorm(8),
}


@pytest.mark.parametrize("name", NORMS)
def test_smoothing_moves_outliers_into_the_weights(name: str) -> None:
    network = random(lambda: Transformer(NORMS[name](), NORMS[name]()))
    made = Q.smooth(network, [TOKENS[:2], TOKENS[2:]], alpha=0.5)
    assert difference(network, made, 10 * TOKENS) < 1e-5
    # Equation 4: after it, with alpha 1/2, the largest value and weight of every channel are equal.
    with torch.no_grad():
        values = made.first(TOKENS).abs().amax((0, 1))  # type: ignore[operator]
    weights = torch.cat([layer.weight for layer in (made.q, made.k, made.v)]).abs().amax(0)  # type: ignore[misc]
    assert torch.allclose(values, weights, rtol=1e-4)
    assert all(type(a) is type(b) for a, b in zip(made.modules(), network.modules(), strict=True))


def test_smoothing_behind_batch_norm_and_other_norms() -> None:
    network = random(
        lambda: nn.Sequential(
            nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6, affine=False), nn.Conv2d(6, 4, 1)
        )
    )
    made = Q.smooth(network, IMAGES)
    assert difference(network, made, OTHERS) < 1e-5
    assert not torch.equal(made[0].weight, network[0].weight)  # type: ignore[index, arg-type]
    assert made[3].weight is not None  # type: ignore[index]


def test_a_norm_that_is_read_elsewhere_stays() -> None:
    class Post(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer, self.other, self.last = nn.LayerNorm(8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.last(self.other(torch.sin(x) + self.layer(x)))

    network = random(Post)
    made = Q.smooth(network, TOKENS)
    assert difference(network, made, TOKENS) < 1e-5
    assert torch.equal(made.norm.weight, network.norm.weight)  # type: ignore[arg-type]
    assert not torch.equal(made.other.weight, network.other.weight)  # type: ignore[arg-type]


def test_attention_of_torch_and_values_behind_it() -> None:
    network = random(lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True, activation="relu"))
    assert difference(network, Q.smooth(network, TOKENS), TOKENS) < 1e-5
    assert difference(network, Q.equalize(network, TOKENS, absorb=True), TOKENS) < 1e-5


def test_a_wrong_graph_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    from quantizers import graph

    monkeypatch.setattr(graph, "KEEPING", graph.KEEPING | {"sigmoid"})
    network = random(lambda: nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="changes what the network computes"):
        Q.equalize(network, torch.randn(4, 4))


def test_the_copy_can_be_quantized_and_trained() -> None:
    network = random(NETWORKS["inverted residuals"])
    made = Q.equalize(network, IMAGES)
    assert all(layer.weight.requires_grad for layer in layers_of(made).values())
    quantized = Q.quantize(made, Q.BitPolicy.uniform(made, w=8, a=8), calibrate=IMAGES)
    assert difference(network, quantized, IMAGES) < 0.1
