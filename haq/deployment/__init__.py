"""From a quantized network to a file that runs: the graph, the program of integers, and the formats."""

from __future__ import annotations

from haq.deployment.exporter import SUMMARIES, Exporter, lacking
from hw_models.registry import Registry

EXPORTERS: Registry[type[Exporter]] = Registry(
    "exporter",
    "haq.exporters",
    {
        "tvm": ("haq.deployment.tvm:TvmExporter", SUMMARIES["tvm"]),
        "onnx": ("haq.deployment.onnx:OnnxExporter", SUMMARIES["onnx"]),
        "qonnx": ("haq.deployment.qonnx:QonnxExporter", SUMMARIES["qonnx"]),
        "c": ("haq.deployment.c:CExporter", SUMMARIES["c"]),
        "executorch": ("haq.deployment.executorch:ExecutorchExporter", SUMMARIES["executorch"]),
    },
    check=lacking,
)
