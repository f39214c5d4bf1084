"""The networks of the papers, as three libraries build them, have the published numbers of parameters and MACs.

MACs are the multiply-accumulates of convolutions and linear layers on one image; parameters are all that are trained, batch
norm's and biases too. Networks and images are on the meta device, where tensors have a shape only, but in the last test.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import hw_models
from haq import networks
from hw_models.workload import Workload


class Published(NamedTuple):
    """Exact counts of the network as published, and in millions what its paper (or its authors' code) says they are."""

    parameters: int
    macs: int
    said_parameters: float | None = None
    said_macs: float | None = None
    not_said: int = 0  # MACs that the paper's figure leaves out
    side: int = 224


PUBLISHED = {
    "MobileNetV1 1.0": Published(4_231_976, 568_740_352, 4.2, 569),
    "MobileNetV1 0.75": Published(2_585_560, 325_400_448, 2.6, 325),
    "MobileNetV1 0.5": Published(1_331_592, 149_497_088, 1.3, 149),
    "MobileNetV1 0.25": Published(470_072, 41_030_272, 0.5, 41),
    # The parameters of the authors' code, which leave batch norm out; the paper says 3.4 and 6.9.
    "MobileNetV2 1.0": Published(3_504_872, 300_774_272, 3.47, 300),
    "MobileNetV2 1.4": Published(6_108_776, 582_195_824, 6.06, 585),
    "MobileNetV3 large": Published(5_483_032, 216_589_760, 5.4, 219),
    "MobileNetV3 small": Published(2_542_856, 56_510_400, 2.5, 56),
    "SqueezeNet 1.0": Published(1_248_424, 818_924_576, 1.25),
    "SqueezeNet 1.1": Published(1_235_496, 349_151_936),
    "ShuffleNetV1 g=1": Published(1_531_936, 143_078_976, None, 143),
    "ShuffleNetV1 g=2": Published(1_733_848, 140_836_512, None, 140),
    "ShuffleNetV1 g=3": Published(1_865_728, 137_460_672, None, 140),
    "ShuffleNetV1 g=4": Published(1_968_344, 134_339_776, None, 133),
    "ShuffleNetV1 g=8": Published(2_434_768, 138_365_952, None, 137),
    "ShuffleNetV2 0.5": Published(1_366_792, 40_476_448, 1.4, 41),
    "ShuffleNetV2 1.0": Published(2_278_604, 144_907_992, 2.3, 146),
    "ShuffleNetV2 1.5": Published(3_503_624, 295_759_392, 3.5, 299),
    "ShuffleNetV2 2.0": Published(7_393_996, 583_253_464, 7.4, 591),
    "MnasNet-A1": Published(3_887_038, 311_579_072, 3.9, 312),
    "MnasNet-B1": Published(4_383_312, 314_415_872, 4.4, 315),
    "EfficientNet-B0": Published(5_288_548, 385_814_752, 5.3, 390),
    "EfficientNet-B1": Published(7_794_184, 686_802_832, 7.8, 700, side=240),
    "EfficientNet-lite0": Published(4_652_008, 385_187_552),  # no paper: two libraries agree on it
    "NASNet-A mobile": Published(5_289_978, 568_234_858, 5.3, 564),
    # The authors' code; their own figures for MACs are without the classifier.
    "ESPNetv2 0.5": Published(1_241_332, 29_399_508, 1.24, 28.4, not_said=1_024_000),
    "ESPNetv2 1.0": Published(1_670_072, 86_744_404, 1.67, 85.7, not_said=1_024_000),
    "ESPNetv2 1.25": Published(1_965_440, 124_423_444, 1.96, 123.4, not_said=1_024_000),
    "ESPNetv2 1.5": Published(2_314_856, 169_628_884, 2.31, 168.6, not_said=1_024_000),
    "ESPNetv2 2.0": Published(3_498_136, 286_086_228, 3.49, 284.8, not_said=1_280_000),
    "ProxylessNAS mobile": Published(4_080_512, 320_427_584, None, 320),
    "ProxylessNAS mobile14": Published(6_857_568, 580_883_408, None, 581),
    "ProxylessNAS cpu": Published(4_361_648, 439_243_864),
    "ProxylessNAS gpu": Published(7_119_848, 465_260_160),
    "ResNet-18": Published(11_689_512, 1_814_073_344, 11.69, 1800),
    "ResNet-50": Published(25_557_032, 4_089_184_256, 25.6, 4100),
    "AlexNet": Published(61_100_840, 714_188_480, 61.1),
    "VGG-16": Published(138_357_544, 15_470_264_320, 138.4),
}


class Row(NamedTuple):
    """What one library builds. Without a reason it is the published network; with one it is known to be another."""

    name: str
    network: str
    parameters: int
    macs: int
    reason: str = ""


NO_BIAS = "no bias in the classifier"
BIAS_BEFORE_LAST = "no bias in the layer before the last"
WIDE_1553 = "a last convolution of 1553 channels, not 1024"
WIDE_2153 = "a last convolution of 2153 channels, not 2048"
UNEVEN = "the first block joins 24 and 92 channels, not 58 and 58"
ESPNET = "the image is added in the last stage too, and blocks of stride 2 lack a PReLU that the authors' code never calls"

ROWS = (
    Row("timm:mobilenetv1_100", "MobileNetV1 1.0", 4_231_976, 568_740_352),
    Row("pytorchcv:mobilenet_w1", "MobileNetV1 1.0", 4_231_976, 568_740_352),
    Row("pytorchcv:mobilenetb_w1", "MobileNetV1 1.0", 4_222_056, 568_740_352, "no batch norm after depthwise layers"),
    Row("pytorchcv:mobilenet_w3d4", "MobileNetV1 0.75", 2_585_560, 325_400_448),
    Row("pytorchcv:mobilenet_wd2", "MobileNetV1 0.5", 1_331_592, 149_497_088),
    Row("pytorchcv:mobilenet_wd4", "MobileNetV1 0.25", 470_072, 41_030_272),
    Row("timm:mobilenetv2_100", "MobileNetV2 1.0", 3_504_872, 300_774_272),
    Row("torchvision:mobilenet_v2", "MobileNetV2 1.0", 3_504_872, 300_774_272),
    Row(
        "pytorchcv:mobilenetv2_w1",
        "MobileNetV2 1.0",
        3_504_960,
        313_619_328,
        f"an expansion convolution (32 to 32 channels) in the first block, which should have none; {NO_BIAS}",
    ),
    Row("pytorchcv:mobilenetv2b_w1", "MobileNetV2 1.0", 3_503_872, 300_774_272, NO_BIAS),
    Row("timm:mobilenetv2_140", "MobileNetV2 1.4", 6_108_776, 582_195_824),
    Row("timm:mobilenetv3_large_100", "MobileNetV3 large", 5_483_032, 216_589_760),
    Row("timm:tf_mobilenetv3_large_100", "MobileNetV3 large", 5_483_032, 216_589_760),
    Row("torchvision:mobilenet_v3_large", "MobileNetV3 large", 5_483_032, 216_589_760),
    Row("pytorchcv:mobilenetv3_large_w1", "MobileNetV3 large", 5_481_752, 216_589_760, BIAS_BEFORE_LAST),
    Row(
        "timm:mobilenetv3_rw",
        "MobileNetV3 large",
        5_479_918,
        216_587_936,
        f"squeezes to 18 and 30 channels where 24 and 32 are multiples of 8; {BIAS_BEFORE_LAST}",
    ),
    Row("timm:mobilenetv3_small_100", "MobileNetV3 small", 2_542_856, 56_510_400),
    Row("timm:tf_mobilenetv3_small_100", "MobileNetV3 small", 2_542_856, 56_510_400),
    Row("torchvision:mobilenet_v3_small", "MobileNetV3 small", 2_542_856, 56_510_400),
    Row(
        "pytorchcv:mobilenetv3_small_w1",
        "MobileNetV3 small",
        2_945_288,
        56_913_856,
        f"1280 channels before the classifier, as in the large network, not 1024; {BIAS_BEFORE_LAST}",
    ),
    Row("torchvision:squeezenet1_0", "SqueezeNet 1.0", 1_248_424, 818_924_576),
    Row("pytorchcv:squeezenet_v1_0", "SqueezeNet 1.0", 1_248_424, 818_924_576),
    Row("torchvision:squeezenet1_1", "SqueezeNet 1.1", 1_235_496, 349_151_936),
    Row("pytorchcv:squeezenet_v1_1", "SqueezeNet 1.1", 1_235_496, 349_151_936),
    Row("pytorchcv:shufflenet_g1_w1", "ShuffleNetV1 g=1", 1_531_936, 143_078_976),
    Row("pytorchcv:shufflenet_g2_w1", "ShuffleNetV1 g=2", 1_733_848, 140_836_512),
    Row("pytorchcv:shufflenet_g3_w1", "ShuffleNetV1 g=3", 1_865_728, 137_460_672),
    Row("pytorchcv:shufflenet_g4_w1", "ShuffleNetV1 g=4", 1_968_344, 134_339_776),
    Row("pytorchcv:shufflenet_g8_w1", "ShuffleNetV1 g=8", 2_434_768, 138_365_952),
    Row("torchvision:shufflenet_v2_x0_5", "ShuffleNetV2 0.5", 1_366_792, 40_476_448),
    Row("pytorchcv:shufflenetv2_wd2", "ShuffleNetV2 0.5", 1_366_792, 40_476_448),
    Row("pytorchcv:shufflenetv2b_wd2", "ShuffleNetV2 0.5", 1_366_792, 40_476_448),
    Row("torchvision:shufflenet_v2_x1_0", "ShuffleNetV2 1.0", 2_278_604, 144_907_992),
    Row("pytorchcv:shufflenetv2_w1", "ShuffleNetV2 1.0", 2_278_604, 144_907_992),
    Row("pytorchcv:shufflenetv2b_w1", "ShuffleNetV2 1.0", 2_279_760, 145_814_296, UNEVEN),
    Row("torchvision:shufflenet_v2_x1_5", "ShuffleNetV2 1.5", 3_503_624, 295_759_392),
    Row("pytorchcv:shufflenetv2_w3d2", "ShuffleNetV2 1.5", 4_406_098, 314_536_776, WIDE_1553),
    Row("torchvision:shufflenet_v2_x2_0", "ShuffleNetV2 2.0", 7_393_996, 583_253_464),
    Row("pytorchcv:shufflenetv2_w2", "ShuffleNetV2 2.0", 7_601_686, 588_379_984, WIDE_2153),
    Row("timm:semnasnet_100", "MnasNet-A1", 3_887_038, 311_579_072),
    Row("pytorchcv:mnasnet_a1", "MnasNet-A1", 3_887_038, 311_579_072),
    Row("timm:mnasnet_100", "MnasNet-B1", 4_383_312, 314_415_872),
    Row("torchvision:mnasnet1_0", "MnasNet-B1", 4_383_312, 314_415_872),
    Row("pytorchcv:mnasnet_b1", "MnasNet-B1", 4_383_312, 314_415_872),
    Row("timm:efficientnet_b0", "EfficientNet-B0", 5_288_548, 385_814_752),
    Row("timm:tf_efficientnet_b0", "EfficientNet-B0", 5_288_548, 385_814_752),
    Row("torchvision:efficientnet_b0", "EfficientNet-B0", 5_288_548, 385_814_752),
    Row("pytorchcv:efficientnet_b0", "EfficientNet-B0", 5_288_548, 385_814_752),
    Row("timm:efficientnet_b1", "EfficientNet-B1", 7_794_184, 686_802_832),
    Row("timm:tf_efficientnet_b1", "EfficientNet-B1", 7_794_184, 686_802_832),
    Row("torchvision:efficientnet_b1", "EfficientNet-B1", 7_794_184, 686_802_832),
    Row("pytorchcv:efficientnet_b1", "EfficientNet-B1", 7_794_184, 686_802_832),
    Row("efficientnet-lite0", "EfficientNet-lite0", 4_652_008, 385_187_552),
    Row("timm:efficientnet_lite0", "EfficientNet-lite0", 4_652_008, 385_187_552),
    Row("pytorchcv:nasnet_4a1056", "NASNet-A mobile", 5_289_978, 568_234_858),
    Row("pytorchcv:espnetv2_wd2", "ESPNetv2 0.5", 1_241_092, 29_441_109, ESPNET),
    Row("pytorchcv:espnetv2_w1", "ESPNetv2 1.0", 1_669_592, 86_823_637, ESPNET),
    Row("pytorchcv:espnetv2_w5d4", "ESPNetv2 1.25", 1_964_832, 124_521_493, ESPNET),
    Row("pytorchcv:espnetv2_w3d2", "ESPNetv2 1.5", 2_314_120, 169_745_749, ESPNET),
    Row("pytorchcv:espnetv2_w2", "ESPNetv2 2.0", 3_497_144, 286_240_725, ESPNET),
    Row("pytorchcv:proxylessnas_mobile", "ProxylessNAS mobile", 4_080_512, 320_427_584),
    Row("pytorchcv:proxylessnas_mobile14", "ProxylessNAS mobile14", 6_857_568, 580_883_408),
    Row("pytorchcv:proxylessnas_cpu", "ProxylessNAS cpu", 4_361_648, 439_243_864),
    Row("pytorchcv:proxylessnas_gpu", "ProxylessNAS gpu", 7_119_848, 465_260_160),
    Row("timm:resnet18", "ResNet-18", 11_689_512, 1_814_073_344),
    Row("torchvision:resnet18", "ResNet-18", 11_689_512, 1_814_073_344),
    Row("pytorchcv:resnet18", "ResNet-18", 11_689_512, 1_814_073_344),
    Row("timm:resnet50", "ResNet-50", 25_557_032, 4_089_184_256),
    Row("torchvision:resnet50", "ResNet-50", 25_557_032, 4_089_184_256),
    Row("pytorchcv:resnet50b", "ResNet-50", 25_557_032, 4_089_184_256),
    Row("pytorchcv:resnet50", "ResNet-50", 25_557_032, 3_857_973_248, "stride in a block's first 1x1 layer, not in its 3x3"),
    Row("torchvision:alexnet", "AlexNet", 61_100_840, 714_188_480),
    Row("pytorchcv:alexnetb", "AlexNet", 61_100_840, 714_188_480),
    Row("pytorchcv:alexnet", "AlexNet", 62_378_344, 1_131_457_664, "96, 256, 384, 384, 256 channels as in 2012, ungrouped"),
    Row("timm:vgg16", "VGG-16", 138_357_544, 15_470_264_320),
    Row("torchvision:vgg16", "VGG-16", 138_357_544, 15_470_264_320),
    Row("pytorchcv:vgg16", "VGG-16", 138_357_544, 15_470_264_320),
)
NETWORK_OF = {row.name: row.network for row in ROWS}

# Layers of networks whose papers let them be counted by hand: a stem, blocks, (a last convolution,) a classifier.
LAYERS = {
    "timm:mobilenetv1_100": 1 + 13 * 2 + 1,
    "pytorchcv:mobilenet_w1": 1 + 13 * 2 + 1,
    "timm:mobilenetv2_100": 1 + 2 + 16 * 3 + 1 + 1,
    "torchvision:mobilenet_v2": 1 + 2 + 16 * 3 + 1 + 1,
    "pytorchcv:mobilenetv2_w1": 1 + 17 * 3 + 1 + 1,
    "efficientnet-lite0": 1 + 2 + 15 * 3 + 1 + 1,
    "torchvision:squeezenet1_0": 1 + 8 * 3 + 1,
    "torchvision:resnet18": 1 + 8 * 2 + 3 + 1,
    "torchvision:resnet50": 1 + 16 * 3 + 4 + 1,
    "torchvision:alexnet": 5 + 3,
    "torchvision:vgg16": 13 + 3,
}

# MACs of depthwise layers, and their share in percent: little work, but on hardware it is bound by memory.
DEPTHWISE = {
    "MobileNetV1 1.0": (17_385_984, 3.1),
    "MobileNetV2 1.0": (20_716_416, 6.9),
    "MobileNetV3 large": (18_392_640, 8.5),
    "EfficientNet-B0": (34_532_064, 9.0),
}


@cache
def build(name: str) -> nn.Module:
    with torch.device("meta"):
        return networks.load(name, pretrained=False).module


@cache
def trace(name: str, side: int | None = None, batch: int = 1) -> Workload:
    side = side or PUBLISHED[NETWORK_OF[name]].side
    return hw_models.trace(build(name), torch.zeros(batch, 3, side, side, device="meta"))


def once() -> Iterator[Any]:
    """Give each published network's first row; other builds of it, by other libraries, are slow tests."""
    seen: set[str] = set()
    for row in ROWS:
        marks = []
        if row.network in seen:
            marks = [pytest.mark.slow]
        seen.add(row.network)
        yield pytest.param(row, id=row.name, marks=marks)


def families() -> Iterator[Any]:
    """Give one build of each published network; where another of its family came before, the test is slow."""
    seen: set[str] = set()
    for network, name in {row.network: row.name for row in ROWS}.items():
        family = network.split()[0]
        marks = []
        if family in seen:
            marks = [pytest.mark.slow]
        seen.add(family)
        yield pytest.param(name, marks=marks)


@pytest.mark.parametrize("row", list(once()))
def test_exact_counts(row: Row) -> None:
    published = PUBLISHED[row.network]
    trained = sum(parameter.numel() for parameter in build(row.name).parameters() if parameter.requires_grad)
    workload = trace(row.name)
    assert (trained, workload.parameters, workload.macs) == (row.parameters, row.parameters, row.macs)
    # A reason goes stale when a library mends its network, and so does a number that has none.
    assert ((row.parameters, row.macs) != (published.parameters, published.macs)) == bool(row.reason)


@pytest.mark.parametrize("network", PUBLISHED)
def test_papers_say_the_same_in_millions(network: str) -> None:
    published = PUBLISHED[network]
    # Parameters are given with one decimal, which is coarse for the smallest networks.
    if published.said_parameters is not None:
        assert published.parameters / 1e6 == pytest.approx(published.said_parameters, rel=0.02, abs=0.05)
    if published.said_macs is not None:
        assert (published.macs - published.not_said) / 1e6 == pytest.approx(published.said_macs, rel=0.02)


def test_every_published_network_is_built_once_or_more() -> None:
    assert {row.network for row in ROWS} == set(PUBLISHED)
    assert len(NETWORK_OF) == len(ROWS)


def test_squeezenet_1_1_needs_less_than_half() -> None:
    ratio = trace("torchvision:squeezenet1_0").macs / trace("torchvision:squeezenet1_1").macs
    assert round(ratio, 2) == 2.35  # "2.4x less computation", say the authors


@pytest.mark.parametrize("row", [row for row in ROWS if row.reason == ESPNET], ids=lambda row: row.name)
def test_espnetv2_is_the_authors_but_for_the_reason_given(row: Row) -> None:
    published, layers = PUBLISHED[row.network], trace(row.name).layers
    shortcut = "features.stage4.unit1.shortcut_block."
    assert sum(layer.macs for layer in layers if not layer.name.startswith(shortcut)) == published.macs
    # A PReLU has a parameter per channel that its block adds: in all, from the stem's channels to the last stage's.
    assert row.parameters + layers[-2].in_channels - layers[0].out_channels == published.parameters
    assert (layers[-1].kind, layers[-1].macs) == ("linear", published.not_said)


@pytest.mark.parametrize("name", LAYERS)
def test_number_of_layers(name: str) -> None:
    assert len(trace(name)) == LAYERS[name]


@pytest.mark.parametrize("name", [row.name for row in ROWS if row.network in DEPTHWISE])
def test_depthwise_share(name: str) -> None:
    depthwise = sum(layer.macs for layer in trace(name).layers if layer.kind == "depthwise")
    macs, percent = DEPTHWISE[NETWORK_OF[name]]
    assert depthwise == macs
    assert round(100 * depthwise / PUBLISHED[NETWORK_OF[name]].macs, 1) == percent


@pytest.mark.parametrize("name", list(families()))
def test_another_counter_agrees(name: str) -> None:
    # Torch counts what its operators do, not what modules say they are; two operations are one multiply-accumulate.
    side = PUBLISHED[NETWORK_OF[name]].side
    module = build(name)  # before, since loading may call it
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(3, 3, side, side, device="meta"))
    assert counter.get_total_flops() == 2 * 3 * trace(name).macs


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", "timm:efficientnet_b0", "pytorchcv:shufflenet_g3_w1"])
def test_macs_do_not_depend_on_the_batch(name: str) -> None:
    assert trace(name, batch=3).layers == trace(name).layers


def test_parts_add_up_to_the_whole() -> None:
    whole = trace("torchvision:mobilenet_v2")
    module: Any = build("torchvision:mobilenet_v2")
    x = torch.zeros(1, 3, 224, 224, device="meta")
    parts = []
    for stage in (*module.features, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), module.classifier)):
        parts.append(hw_models.trace(stage, x))
        x = stage(x)
    assert sum(part.macs for part in parts) == whole.macs == sum(layer.macs for layer in whole.layers)
    assert [layer.macs for part in parts for layer in part.layers] == [layer.macs for layer in whole.layers]


@pytest.mark.parametrize(
    "name",
    [
        "timm:mobilenetv1_100",
        "torchvision:mobilenet_v2",
        "torchvision:mobilenet_v3_large",
        "torchvision:shufflenet_v2_x1_0",
        "torchvision:resnet50",
        "torchvision:vgg16",
    ],
)
def test_twice_the_side_is_four_times_the_convolutions(name: str) -> None:
    once, twice = trace(name).layers, trace(name, side=448).layers
    assert [layer.name for layer in once] == [layer.name for layer in twice]
    for small, large in zip(once, twice, strict=True):
        # What follows global pooling, squeeze and excitation included, sees one position at every size.
        assert large.macs == small.macs * (1 if small.kind == "linear" or small.output_size == (1, 1) else 4)


@pytest.mark.parametrize(
    "name",
    [
        "timm:mobilenetv2_100",
        "torchvision:squeezenet1_1",
        "pytorchcv:shufflenet_g3_w1",
        "pytorchcv:alexnetb",
    ],
)
def test_real_tensors_give_the_same(name: str) -> None:
    network = networks.load(name, pretrained=False)
    assert hw_models.trace(network.module, torch.zeros(1, *network.input_shape)).layers == trace(name).layers
