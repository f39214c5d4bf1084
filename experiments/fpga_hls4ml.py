"""From a file of `haq deploy --to qonnx --for hls4ml` to C++ for high-level synthesis, simulated by g++.

    python experiments/fpga_hls4ml.py NETWORK.onnx IMAGES.npz FOLDER

It is to be copied: it needs hls4ml 1.3 and qonnx alone, in an environment without haq, whose package `quantizers` hls4ml
would take for another of that name. IMAGES.npz has `images` (N, C, H, W) or (N, C), as the network takes them. The project is
written to FOLDER, and the outputs to FOLDER/outputs.npy; `build` of the model makes a circuit of it where Vitis HLS is
installed.
"""

import sys
from pathlib import Path
from typing import Any

import hls4ml
import numpy as np
from onnx import helper
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.transformation import channels_last
from qonnx.transformation.infer_shapes import InferShapes
from qonnx.transformation.quant_constant_folding import FoldTransposeIntoQuantInit
from qonnx.util.cleanup import cleanup_model

# Of what isn't quantized: batch norms, biases, images and outputs.
PRECISION = "fixed<40,16>"


def to_channels_last(model: Any) -> Any:
    """Put channels last, as hls4ml has them. ConvertToChannelsLastAndClean of qonnx 1.0 loses branches."""
    model, _ = channels_last.InsertChannelsLastDomainsAndTrafos().apply(model)
    steps = [
        channels_last.MoveTransposePastFork(),
        channels_last.RemoveConsecutiveChanFirstAndChanLastTrafos(),
        channels_last.MoveChanFirstDownstream(),
    ]
    changed = True
    while changed:
        for step in steps:
            model, changed = step.apply(model)
            if changed:
                break
    further = [
        FoldTransposeIntoQuantInit(),
        channels_last.AbsorbChanFirstIntoMatMul(),
        channels_last.MoveChanLastUpstream(),
        channels_last.MakeInputChannelsLast(),
        channels_last.RemoveConsecutiveChanFirstAndChanLastTrafos(),
        InferShapes(),
    ]
    for step in further:
        model = model.transform(step)
    model = cleanup_model(model)
    for node in list(model.graph.node):
        if node.op_type in ("AveragePool", "GlobalAveragePool"):
            put_pool_last(model, node)
    return model


def put_pool_last(model: Any, node: Any) -> None:
    """Take away the transpositions around an average pooling, which qonnx knows with channels first alone."""
    before = model.find_producer(node.input[0])
    size = model.get_tensor_shape(node.input[0])[2:]
    count, channels, *places = model.get_tensor_shape(node.output[0])
    if node.op_type == "GlobalAveragePool":
        node.op_type = "AveragePool"
        window = {"kernel_shape": size, "strides": size, "pads": [0, 0] * len(size)}
        node.attribute.extend(helper.make_attribute(name, value) for name, value in window.items())
    node.domain = "qonnx.custom_op.channels_last"
    node.input[0] = before.input[0]
    model.graph.node.remove(before)
    model.set_tensor_shape(node.output[0], [count, *places, channels])
    for after in list(model.find_consumers(node.output[0])):
        if after.op_type == "Transpose":
            for reader in model.find_consumers(after.output[0]):
                for place, name in enumerate(reader.input):
                    if name == after.output[0]:
                        reader.input[place] = node.output[0]
            model.graph.node.remove(after)


def main(file: str, images: str, folder: str) -> None:
    """Convert a file, compile it, and run it on images."""
    model = to_channels_last(cleanup_model(ModelWrapper(file)))
    config = hls4ml.utils.config_from_onnx_model(model, granularity="name", backend="Vitis", default_precision=PRECISION)
    project = hls4ml.converters.convert_from_onnx_model(
        model, output_dir=folder, io_type="io_parallel", backend="Vitis", hls_config=config
    )
    project.write()
    # g++ takes many minutes to optimize the lists of what each pixel of a convolution reads, for nothing.
    lists = Path(folder, "firmware/nnet_utils/nnet_code_gen.h")
    begin = '#pragma GCC push_options\n#pragma GCC optimize("O0")\n'
    lists.write_text(lists.read_text().replace("// hls4ml insert code", begin, 1) + "\n#pragma GCC pop_options\n")
    script = Path(folder, "build_lib.sh")
    script.write_text(script.read_text().replace("-O3", "-O1"))
    project._compile()
    x = np.ascontiguousarray(np.moveaxis(np.load(images)["images"], 1, -1), np.float32)
    np.save(Path(folder, "outputs.npy"), project.predict(x).reshape(len(x), -1))


if __name__ == "__main__":
    main(*sys.argv[1:])
