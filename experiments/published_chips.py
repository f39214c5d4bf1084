"""The chips that ship as rooflines beside latencies that their makers publish: prints ours next to theirs.

    python -m experiments.published_chips

Sources, all measured by the makers: the STM32 model zoo of STMicroelectronics (README of mobilenetv1 and mobilenetv2,
STM32H747I-DISCO at 400 MHz, X-CUBE-AI 10.0, int8); model cards of Qualcomm AI Hub (Snapdragon 8 Gen 2, whose NPU is of the
generation of the modelled one, v73); TensorFlow quantization toolkit of NVIDIA (model zoo results, A100, TensorRT 8.4,
INT8, one image).
docs/experiments/published_chips.md holds what this prints and what to make of it.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import hw_models
from experiments.shared import add_columns
from haq import networks
from hw_models.target import price
from hw_models.widths import pair_words, place_of

FITTED = "a constant of the target comes from it"


class Published(NamedTuple):
    """A latency that a maker measured, and the network of ours that is nearest to theirs."""

    target: str
    label: str
    network: str
    w: int
    a: int
    milliseconds: float
    note: str = ""


ROWS = (
    Published("cortex-m7", "MobileNetV1 0.25", "pytorchcv:mobilenet_wd4", 8, 8, 166.75),
    Published("cortex-m7", "MobileNetV1 0.5", "pytorchcv:mobilenet_wd2", 8, 8, 504.37),
    Published("cortex-m7", "MobileNetV1 1.0", "timm:mobilenetv1_100", 8, 8, 1641.84),
    Published("cortex-m7", "MobileNetV2 0.35", "timm:mobilenetv2_035", 8, 8, 313.92),
    Published("cortex-m7", "MobileNetV2 1.0", "timm:mobilenetv2_100", 8, 8, 1106.64),
    Published("cortex-m7", "MobileNetV2 1.4", "timm:mobilenetv2_140", 8, 8, 2010.66),
    Published("hexagon-npu", "ShuffleNetV2 1.0", "pytorchcv:shufflenetv2_w1", 8, 8, 0.586, FITTED),
    Published("hexagon-npu", "MobileNetV2 1.0", "timm:mobilenetv2_100", 8, 8, 0.24),
    Published("hexagon-npu", "ConvNeXt-Tiny", "timm:convnext_tiny", 8, 8, 1.711),
    Published("hexagon-npu", "ConvNeXt-Tiny", "timm:convnext_tiny", 8, 16, 3.449, "the ratio of 8/16 to 8/8 comes from it"),
    Published("nvidia-a100", "MobileNetV1 1.0", "timm:mobilenetv1_100", 8, 8, 0.16, FITTED),
    Published("nvidia-a100", "MobileNetV2 1.0", "timm:mobilenetv2_100", 8, 8, 0.30),
    Published("nvidia-a100", "ResNet-50", "timm:resnet50", 8, 8, 0.46),
    Published("nvidia-a100", "ResNet-101", "timm:resnet101", 8, 8, 0.84),
    Published("nvidia-a100", "EfficientNet-B0", "timm:efficientnet_b0", 8, 8, 0.67),
)


class Compared(NamedTuple):
    """A published latency beside ours, in milliseconds."""

    published: Published
    ours: float

    @property
    def cells(self) -> tuple[str, ...]:
        """The row of a table: target, network, pair of widths, published, ours, their ratio, note."""
        row = self.published
        ratio = self.ours / row.milliseconds
        pair = pair_words(row.w, row.a)
        return row.target, row.label, pair, f"{row.milliseconds:g}", f"{self.ours:.4g}", f"{ratio:.2f}", row.note


COLUMNS = ("target", "network", "weights/activations", "published, ms", "ours, ms", "ours/published", "note")


def compare(rows: tuple[Published, ...] = ROWS) -> list[Compared]:
    """Price every network at the published widths."""
    workloads: dict[str, hw_models.Workload] = {}
    found = []
    for row in rows:
        if row.network not in workloads:
            loaded = networks.load(row.network, pretrained=False)
            networks.answer_to_zeros(loaded)
            workloads[row.network] = hw_models.trace(loaded.module, torch.zeros(1, 3, 224, 224))
        latency = price(hw_models.load_target(row.target), workloads[row.network]).latency_s
        assert latency is not None
        found.append(Compared(row, 1e3 * float(latency[:, place_of(row.w), place_of(row.a)].sum())))
    return found


def main() -> None:
    argparse.ArgumentParser(prog="python -m experiments.published_chips", description=__doc__).parse_args()
    table = Table(title="Latency of one image, 224x224", box=box.SIMPLE_HEAD, pad_edge=False)
    add_columns(table, COLUMNS, left=("target", "network", "weights/activations", "note"))
    before = ROWS[0].target
    for row in compare():
        if row.published.target != before:
            table.add_section()
            before = row.published.target
        table.add_row(*row.cells)
    Console().print(table)


if __name__ == "__main__":
    main()
