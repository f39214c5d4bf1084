"""Quantized networks work in anyone's training script: compiled, on several processes, in mixed precision, checkpointed,
folded, turned back into float, and for every compact network of three libraries."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import quantizers as Q
from haq import networks
from quantizers.functional import BLOCK
from tests.conftest import images, small_network

LABELS = torch.arange(16) % 4


def quantized(scheme: str | Q.Scheme = "linear", w: int = 4, a: int = 4) -> nn.Module:
    network = small_network()
    return Q.quantize(network, Q.BitPolicy.uniform(network, w=w, a=a), calibrate=images(32), scheme=scheme)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def step(network: nn.Module, inputs: Tensor) -> Tensor:
    loss = F.cross_entropy(network(inputs), LABELS[: len(inputs)])
    loss.backward()
    return loss.detach()


def test_state_dicts_load_strictly_both_ways() -> None:
    network, qnetwork = small_network(1), quantized()
    assert list(qnetwork.state_dict()) == list(network.state_dict())
    qnetwork.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(qnetwork.stem.weight, network.stem.weight)
    network.load_state_dict(qnetwork.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        qnetwork.load_state_dict(network.state_dict() | {"stem.weight_scale": torch.ones(1)}, strict=True)


def test_a_float_copy_is_the_float_network() -> None:
    network, qnetwork = small_network(), quantized()
    with torch.no_grad():
        qnetwork.stem.weight.mul_(1.5)
        network.stem.weight.mul_(1.5)
    again = Q.float_copy(qnetwork)
    assert type(again.stem) is nn.Conv2d
    assert type(again.hidden) is nn.Linear
    assert not Q.quant_layers(again)
    assert list(again.state_dict()) == list(network.state_dict())
    assert [name for name, _ in again.named_buffers()] == [name for name, _ in network.named_buffers()]
    assert torch.equal(again(images(8)), network(images(8)))
    again.stem.weight.data.zero_()
    assert qnetwork.stem.weight.any()
    assert repr(again) == repr(network)
    assert Q.quant_layers(Q.quantize(again, Q.BitPolicy.uniform(again, w=2, a=2), calibrate=images(8)))


def test_a_single_layer_is_a_network() -> None:
    layer = nn.Linear(4, 3)
    policy = Q.BitPolicy({"": (4, 4)})
    qlayer = Q.quantize(layer, policy, calibrate=torch.randn(8, 4))
    assert isinstance(qlayer, Q.QuantLinear)
    assert type(Q.float_copy(qlayer)) is nn.Linear


def test_one_dimensional_convolutions() -> None:
    network = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 4, 3, groups=4))
    inputs = torch.randn(5, 2, 20)
    qnetwork = Q.quantize(network, Q.BitPolicy.uniform(network, w=8, a=8), calibrate=inputs)
    assert isinstance(qnetwork[0], Q.QuantConv1d)
    assert torch.allclose(qnetwork(inputs), network(inputs), atol=0.05)


def test_folding_batch_norm_changes_nothing_but_the_layers() -> None:
    network = small_network()
    network.norm.running_mean.normal_()
    network.norm.running_var.uniform_(0.5, 2)
    network.norm.weight.data.uniform_(0.5, 2)
    inputs = images(8)
    folded = Q.fold_batch_norm(network, inputs)
    assert isinstance(folded.norm, nn.Identity)
    assert torch.allclose(folded(inputs), network(inputs), atol=1e-4)
    assert folded.stem.bias is not None
    assert isinstance(network.norm, nn.BatchNorm2d)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("trained", [True, False])
def test_folded_layers_are_trained_as_their_weights_were(linear: bool, trained: bool) -> None:
    """A new bias takes after the weights; one that the layer had stays as it was."""
    without: nn.Module = nn.Conv2d(1, 2, 3, bias=False)
    norm: nn.Module = nn.BatchNorm2d(2)
    inputs = images(4)
    if linear:
        without, norm = nn.Linear(8, 2, bias=False), nn.BatchNorm1d(2)
        inputs = torch.randn(4, 8)
    without.weight.requires_grad_(trained)
    network = nn.Sequential(without, norm).eval()
    folded = Q.fold_batch_norm(network, inputs)
    assert folded[0].weight.requires_grad == trained
    assert folded[0].bias.requires_grad == trained
    without.bias = nn.Parameter(torch.zeros(2), not trained)
    folded = Q.fold_batch_norm(network, inputs)
    assert folded[0].bias.requires_grad == (not trained)


def test_layers_behind_a_folded_shift_are_trained_as_their_weights_were() -> None:
    network = nn.Sequential(nn.Linear(8, 4), nn.SiLU(), nn.Linear(4, 4, bias=False), nn.SiLU(), nn.Linear(4, 2, bias=False))
    network[2].weight.requires_grad_(False)
    folded = Q.fold_shifts(network, torch.randn(4, 8))
    assert not folded[2].bias.requires_grad
    assert folded[4].bias.requires_grad


def test_folding_leaves_the_example_and_what_stands_between_alone() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3)
            self.last_norm = nn.BatchNorm2d(2)
            self.last_norm.running_mean.fill_(0.3)
            self.same, self.held = self.norm, [self.norm]

        def forward(self, x: Tensor) -> dict[str, tuple[Tensor]]:
            x = self.held[0](self.conv(x.sub_(0.5).mul_(2)))
            return {"maps": (self.last_norm(self.last(x).relu_()),)}

    network, inputs = InPlace().eval(), images(4)
    folded = Q.fold_batch_norm(network, inputs)
    assert torch.equal(inputs, images(4))
    assert isinstance(folded.norm, nn.Identity)
    assert isinstance(folded.same, nn.Identity)
    assert isinstance(folded.last_norm, nn.BatchNorm2d)
    torch.testing.assert_close(folded(images(4))["maps"][0], network(images(4))["maps"][0])


def test_folding_is_refused_where_it_would_change_the_result() -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)
            self.norm.weight.data.fill_(3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            result: Tensor = self.norm(x) + x
            return result

    with pytest.raises(ValueError, match="folding changes what the network computes"):
        Q.fold_batch_norm(Forked(), torch.randn(1, 1, 4, 4))


@pytest.mark.parametrize("width", [3, 5])
def test_a_norm_over_tokens_is_left_alone(width: int) -> None:
    """A Linear's outputs are its last dimension, the channels of a norm the second, be they as many or not."""
    network = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(3)).eval()
    network[1].running_mean.normal_()
    x = torch.randn(2, 3, 4)
    assert torch.equal(Q.fold_batch_norm(network, x)(x), network(x))


def test_a_norm_with_an_activation_inside_keeps_it() -> None:
    network = networks.load("timm:mobilenetv2_050", pretrained=False).module
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    inputs = torch.randn(1, 3, 64, 64)
    assert torch.allclose(Q.fold_batch_norm(network, inputs)(inputs), network(inputs), atol=1e-4)


def test_layers_that_are_added_can_be_tied() -> None:
    policy = Q.BitPolicy({"a": (2, 3), "b": (4, 2), "c": (8, None), "d": (1, 1)})
    assert dict(policy.tied([("a", "b"), ("c", "d")])) == {"a": (4, 3), "b": (4, 3), "c": (8, None), "d": (8, None)}
    with pytest.raises(ValueError, match="no layer 'e' to tie"):
        policy.tied([("a", "e")])


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    network = quantized()
    step(network, images(16))
    expected = gradients(network)
    network.zero_grad()
    inputs = images(16).requires_grad_()
    F.cross_entropy(checkpoint(network, inputs, use_reentrant=False), LABELS).backward()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(network).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_floating_types(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 101).to(dtype)
    for bits, signed in ((8, True), (4, False), (1, True)):
        scale = torch.tensor(0.05)
        q = Q.quantize_tensor(x, scale, bits, signed)
        assert q.dtype == dtype
        assert torch.equal(q, q.round())
        leaf = x.clone().requires_grad_()
        fake = Q.fake_quantize(leaf, scale, bits, signed)
        assert fake.dtype == dtype
        assert torch.equal(fake, Q.dequantize(q, scale))
        fake.sum().backward()
        assert leaf.grad is not None
        assert leaf.grad.dtype == dtype


def test_mixed_precision_trains() -> None:
    network = quantized()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(network(images(16)), LABELS)
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(network).values())
    assert set(gradients(network)) == {name for name, _ in network.named_parameters()}


def test_a_whole_network_in_double() -> None:
    network = quantized().double()
    assert network(images(8).double()).dtype == torch.float64


@pytest.mark.parametrize("shape", [(0, 1, 8, 8), (1, 1, 8, 8)])
def test_empty_and_single_batches(shape: tuple[int, ...]) -> None:
    network = quantized()
    out = network(torch.zeros(shape))
    assert out.shape == (shape[0], 4)
    out.sum().backward()


def test_strange_values() -> None:
    scale = torch.tensor(0.5)
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0])
    fake = Q.fake_quantize(x, scale, 4, True)
    assert fake[:2].tolist() == [3.5, -3.5]
    assert fake[2].isnan()
    turned = torch.arange(12.0).view(3, 4).t()  # not contiguous
    assert torch.equal(Q.fake_quantize(turned, scale, 8, True), Q.fake_quantize(turned.contiguous(), scale, 8, True))
    large = torch.randn(3, 1 << 18)
    assert torch.equal(Q.fake_quantize(large, scale, 4, True)[1], Q.fake_quantize(large[1], scale, 4, True))


def test_zero_points() -> None:
    x = torch.linspace(-1, 3, 41)
    scale, zero = torch.tensor(4 / 255), torch.tensor(64.0)
    q = Q.quantize_tensor(x, scale, 8, False, zero_point=zero)
    assert (q.min().item(), q.max().item()) == (0, 255)
    fake = Q.fake_quantize(x.clone().requires_grad_(), scale, 8, False, zero_point=zero)
    assert torch.equal(fake, Q.dequantize(q, scale, zero))
    assert (fake - x).abs().max() <= scale / 2 + 1e-6
    assert Q.fake_quantize(torch.zeros(1), scale, 8, False, zero_point=zero).item() == 0


SCRIPT = """
import os, sys
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[2]}
import torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
sys.path.insert(0, sys.argv[3])
import quantizers as Q
from tests.conftest import images, small_network
rank = int(sys.argv[1])
dist.init_process_group("gloo", rank=rank, world_size=2)
torch.set_num_threads(1)
network = small_network()
qnetwork = Q.quantize(network, Q.BitPolicy.uniform(network, w=4, a=4), calibrate=images(32), scheme=sys.argv[4])
inputs, labels = images(16), torch.arange(16) % 4
parallel = DistributedDataParallel(qnetwork)
half = slice(8 * rank, 8 * rank + 8)
nn.functional.cross_entropy(parallel(inputs[half]), labels[half]).backward()
both = {name: p.grad.clone() for name, p in qnetwork.named_parameters() if p.requires_grad}
qnetwork.zero_grad()
if rank == 0:
    nn.functional.cross_entropy(qnetwork(inputs), labels).backward()
    for name, p in qnetwork.named_parameters():
        assert torch.allclose(p.grad, both[name], rtol=1e-2, atol=1e-5), (name, (p.grad - both[name]).abs().max())
    print("equal")
dist.barrier()
dist.destroy_process_group()
"""


# With lsq, parameters of the quantizers are trained too.
@pytest.mark.parametrize("scheme", ["lsq", pytest.param("linear", marks=pytest.mark.slow)])
def test_two_processes_train_as_one(scheme: str, tmp_path: Path) -> None:
    """DistributedDataParallel over gloo: the gradients of two halves are those of the whole batch."""
    script, root = tmp_path / "train.py", str(Path(__file__).parents[2])
    script.write_text(SCRIPT)
    port = str(29500 + hash(str(tmp_path)) % 2000)
    arguments = [[sys.executable, str(script), str(rank), port, root, scheme] for rank in (0, 1)]
    processes = [subprocess.Popen(a, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for a in arguments]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], results
    assert "equal" in results[0][0]


WIDTHS: list[tuple[int | None, int | None]] = [(4, 4), (4, None), (None, 4), (None, None)]


@pytest.mark.parametrize("scheme", ["linear", "dorefa", "pact", "lsq", "lsqplus", "kmeans"])
def test_a_parameter_requires_a_gradient_only_where_it_gets_one(scheme: str) -> None:
    """DistributedDataParallel waits for the gradient of every parameter that requires one."""
    inputs = torch.randn(8, 6)
    qnetwork = Q.quantize(
        nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), {"0": (4, 4), "1": (4, 4)}, calibrate=inputs, scheme=scheme
    )
    everything = {name for name, _ in qnetwork.named_parameters()}
    met = set()
    for bits in [*WIDTHS, (4, 4)]:
        Q.set_policy(qnetwork, {"0": bits, "1": (4, 4)})
        qnetwork.zero_grad()
        qnetwork(inputs).square().sum().backward()
        requiring = {name for name, p in qnetwork.named_parameters() if p.requires_grad}
        assert requiring == set(gradients(qnetwork))
        met |= requiring
    assert met == everything - ({"1.weight"} if scheme == "kmeans" else set())
    assert all(p.requires_grad for p in Q.float_copy(qnetwork).parameters())


def test_parameters_that_rest_wake_as_they_were() -> None:
    inputs = torch.randn(8, 6)
    network = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 2))
    network[1].weight = network[0].weight
    qnetwork = Q.quantize(network, Q.BitPolicy.uniform(network, 4, 4), calibrate=inputs, scheme="kmeans")
    assert not qnetwork[0].weight.requires_grad
    qnetwork[2].codebook.requires_grad_(False)  # somebody freezes it
    Q.set_policy(qnetwork, {"0": (4, 4), "1": (None, 4), "2": (None, 4)})
    assert qnetwork[0].weight.requires_grad  # the other layer uses it
    assert qnetwork[2].weight.requires_grad
    Q.set_policy(qnetwork, Q.BitPolicy.uniform(network, 4, 4))
    assert not qnetwork[0].weight.requires_grad
    assert not qnetwork[2].codebook.requires_grad
    Q.set_policy(qnetwork, {"0": (None, 4), "1": (4, 4), "2": (4, 4)})  # now the first layer wakes it
    assert qnetwork[1].weight.requires_grad
    Q.set_policy(qnetwork, Q.BitPolicy.uniform(network, 4, 4))
    Q.set_policy(qnetwork.requires_grad_(True), Q.BitPolicy.uniform(network, 4, 4))  # the same bits again
    assert not any(qnetwork[layer].weight.requires_grad for layer in range(3))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_compiled_networks_give_the_same() -> None:
    network = quantized()
    compiled = torch.compile(copy.deepcopy(network))
    inputs = images(16)
    with torch.no_grad():
        assert torch.allclose(compiled(inputs), network(inputs), atol=1e-4)
    assert step(compiled, inputs).item() == pytest.approx(step(network, inputs).item(), abs=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("scheme", ["linear", "lsq", "lsqplus", "pact", "dorefa", "kmeans", "binary"])
def test_traced_networks_give_the_same(scheme: str) -> None:
    """With gradients and without, and whatever is kept already."""
    bits = 4
    if scheme == "binary":
        bits = 1
    network = Q.quantize(nn.Sequential(nn.Conv2d(1, 2, 3)), {"0": (bits, bits)}, calibrate=images(8), scheme=scheme)
    x = images(BLOCK // 64 + 1)  # so large that it is quantized in pieces
    with torch.no_grad():
        expected = network(x)
        traced = torch.jit.trace(network, images(2))
        torch.jit.save(torch.jit.trace(network, x), io.BytesIO())
    with pytest.warns(torch.jit.TracerWarning, match="no gradient"):
        learning = torch.jit.trace(network, x)
    with torch.no_grad():
        assert torch.equal(traced(x), expected)
        assert torch.equal(learning(x), expected)
        network[0].weight.data.mul_(-1)  # the traced networks have the same weights: nothing that was kept is in them
        assert torch.equal(traced(x), network(x))
        assert torch.equal(learning(x), network(x))


def test_what_is_quantized_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        network = Q.quantize(small_network(), Q.BitPolicy.uniform(small_network(), 4, 4), scheme="lsq", calibrate=images(8))
    before = network.stem.weight.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    network(images(8)).sum().backward()
    optimizer.step()
    assert not torch.equal(network.stem.weight, before)
    assert not any(tensor.is_inference() for tensor in (*network.parameters(), *network.buffers()))


def test_a_compiled_network_is_named() -> None:
    compiled = torch.compile(small_network(), backend="eager")
    with pytest.raises(ValueError, match="the network is compiled: quantize what was compiled"):
        Q.quantize(compiled, {}, calibrate=images(8))


class Padded(nn.Conv2d):
    """A layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_subclasses_are_traced_with_gradients_too() -> None:
    """The check that torch makes runs without gradients, and must find the same operations."""
    network = Q.quantize(nn.Sequential(Padded(1, 2, 3)), {"0": (4, 4)}, calibrate=images(8))
    assert torch.equal(torch.jit.trace(network, images(2))(images(4)), network(images(4)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exported_networks_give_the_same() -> None:
    network, x = quantized().eval(), images(2)
    with torch.no_grad():
        expected = network(x)
    exported = torch.export.export(network, (x,)).module()
    assert torch.equal(exported(x), expected)
    followed = make_fx(network)(x)
    assert torch.equal(followed(x), expected)
    network.stem.weight.data.mul_(-1)
    assert torch.equal(followed(x), network(x))


# One of each kind of block; the others, of the same families, are slow tests.
COMPACT = [
    *("timm:mobilenetv3_small_100", "timm:resnet18", "timm:ghostnet_100", "torchvision:mobilenet_v2"),
    *("torchvision:squeezenet1_1", "torchvision:shufflenet_v2_x0_5", "pytorchcv:shufflenet_g3_w1", "pytorchcv:espnetv2_wd2"),
    *("pytorchcv:menet108_8x1_g3", "efficientnet-lite0"),
]
OTHERS = [
    *("timm:mobilenetv1_100", "timm:mobilenetv2_100", "timm:mobilenetv3_large_100", "timm:efficientnet_b0"),
    *("timm:semnasnet_100", "timm:mnasnet_100", "torchvision:mobilenet_v3_large", "torchvision:mobilenet_v3_small"),
    *("torchvision:squeezenet1_0", "torchvision:shufflenet_v2_x1_0", "torchvision:mnasnet1_0", "torchvision:efficientnet_b0"),
    *("torchvision:resnet18", "pytorchcv:mobilenet_w1", "pytorchcv:mobilenetv2_w1", "pytorchcv:mobilenetv3_large_w1"),
    *("pytorchcv:squeezenet_v1_0", "pytorchcv:squeezenet_v1_1", "pytorchcv:shufflenetv2_w1", "pytorchcv:mnasnet_b1"),
    *("pytorchcv:efficientnet_b0", "pytorchcv:proxylessnas_mobile", "pytorchcv:nasnet_4a1056", "pytorchcv:igcv3_w1"),
    "pytorchcv:fdmobilenet_w1",
]


@pytest.mark.parametrize("name", [*COMPACT, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)])
def test_every_compact_network_is_quantized_and_trained_one_step(name: str) -> None:
    torch.manual_seed(0)
    network = networks.load(name, pretrained=False)
    fixed = name.startswith("pytorchcv")  # whose last pool expects the full size
    inputs = torch.randn(2, *network.input_shape) if fixed else torch.randn(2, 3, 96, 96)
    # Norms as a trained network has them: those of a fresh one let values grow or vanish from layer to layer.
    for module in network.module.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    with torch.no_grad():
        network.module.train()(inputs)
    policy = Q.BitPolicy.uniform(network.module, w=4, a=4)
    qnetwork = Q.quantize(network.module, policy, calibrate=inputs, scheme=Q.Linear(calibration="max")).train()
    assert list(qnetwork.state_dict()) == list(network.module.state_dict())
    layers = Q.quant_layers(qnetwork)
    assert len(layers) == len(policy)
    before = {key: p.detach().clone() for key, p in qnetwork.named_parameters()}
    optimizer = torch.optim.SGD(qnetwork.parameters(), 0.1)
    F.cross_entropy(qnetwork(inputs), torch.tensor([0, 1])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in qnetwork.parameters())
    optimizer.step()
    # Its gradient has come through every other layer.
    first = next(iter(layers))
    assert not torch.equal(layers[first].weight, before[f"{first}.weight"])


@pytest.mark.parametrize("scheme", ["linear", "dorefa", "pact", "lsq"])
def test_passes_before_a_backward_do_not_disturb_each_other(scheme: str) -> None:
    x = torch.randn(8, 3, 128, 128)
    assert x.numel() > BLOCK  # smaller inputs aren't written into memory that is used again
    network = Q.quantize(nn.Sequential(nn.Conv2d(3, 4, 3)), {"0": (4, 4)}, calibrate=x, scheme=scheme)
    weight = network.get_parameter("0.weight")
    apart = [torch.autograd.grad(network(batch).square().mean(), weight)[0] for batch in (x, x / 2)]
    first = network(x).square().mean()
    with torch.no_grad():
        network(x / 3)
    (together,) = torch.autograd.grad(first + network(x / 2).square().mean(), weight)
    torch.testing.assert_close(together, sum(apart))
