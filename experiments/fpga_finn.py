"""From a file of `haq deploy --to qonnx --for finn` to FINN's own dialect of ONNX, streamlined, run by FINN's interpreter.

    python experiments/fpga_finn.py NETWORK.onnx IMAGES.npz FOLDER

It is to be copied: it needs finn-plus 1.6 alone. IMAGES.npz has `images` (N, C, H, W) or (N, C), as the network takes them.
Written are FOLDER/converted.onnx, FOLDER/streamlined.onnx, where FINN's dataflow builder goes on (with Vivado), and the
outputs of the two, FOLDER/converted.npy and FOLDER/outputs.npy.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from finn.transformation.qonnx.convert_qonnx_to_finn import ConvertQONNXtoFINN
from finn.transformation.streamline import Streamline
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.transformation.change_batchsize import ChangeBatchSize
from qonnx.transformation.infer_shapes import InferShapes
from qonnx.util.cleanup import cleanup_model


def run(model: Any, images: Any) -> Any:
    """Run a model on images (N, ...), all at once."""
    model = model.transform(ChangeBatchSize(len(images))).transform(InferShapes())
    outputs = execute_onnx(model, {model.graph.input[0].name: images})
    return outputs[model.graph.output[0].name].reshape(len(images), -1)


def main(file: str, images: str, folder: str) -> None:
    """Convert a file, streamline it, and run both on images."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    x = np.load(images)["images"].astype(np.float32)
    model = cleanup_model(ModelWrapper(file)).transform(ConvertQONNXtoFINN())
    model.save(str(place / "converted.onnx"))
    np.save(place / "converted.npy", run(model, x))
    model = model.transform(Streamline())
    model.save(str(place / "streamlined.onnx"))
    np.save(place / "outputs.npy", run(model, x))


if __name__ == "__main__":
    main(*sys.argv[1:])
