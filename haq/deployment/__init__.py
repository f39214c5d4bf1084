"""From a quantized network to a file that runs: the graph, the program of integers, and the formats."""

from __future__ import annotations

from haq.deployment.exporter import Exporter, lacking
from hw_models.registry import Registry

EXPORTERS: Registry[type[Exporter]] = Registry(
    "exporter",
    "haq.exporters",
    {
        "tvm": (
            "haq.deployment.tvm:TvmExporter",
            "a folder with one library for this machine's processor, integers from end to end",
        ),
        "onnx": (
            "haq.deployment.onnx:OnnxExporter",
            "a file with QuantizeLinear and DequantizeLinear, for ONNX Runtime and others",
        ),
        "qonnx": ("haq.deployment.onnx:QonnxExporter", "a file of QONNX, for tools of FPGAs"),
    },
    check=lacking,
)
