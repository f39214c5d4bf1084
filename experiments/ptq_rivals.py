"""What other tools make of a network by post-training quantization: run by experiments/ptq.py in the tool's own environment.

    PYTHON -I experiments/ptq_rivals.py METHOD JOB.npz FOLDER

Nothing of this project is imported here: an environment has the tool and what it needs. JOB.npz holds the network, its layers
as JSON and their weights as arrays, the images for calibration and those for the test, and what is asked for
(`ptq.write_job`). For every column a line of JSON is printed, {"column", "seconds", "bits"} or {"column", "error"}, and the
answers to the test images are written to FOLDER/COLUMN.npy. Seconds are those of the CPU for calibration and quantization.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

BATCH = 32  # of calibration
TEST_BATCH = 250
WIDTHS = (8, 7, 6, 5, 4, 3, 2)  # that mixed precision may choose from
QUANTIZED = ("Conv2d", "Linear")


class Add(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Described(nn.Module):
    """A network made from a description: steps, each a module of torch.nn or an addition."""

    def __init__(self, steps: list[dict[str, Any]], add: Callable[[], nn.Module] = Add) -> None:
        super().__init__()
        self.steps = steps
        for step in steps:
            if step["kind"] == "Add":
                module = add()
            else:
                module = getattr(nn, step["kind"])(**step["options"])
            self.add_module(step["name"], module)

    def forward(self, x: Tensor) -> Tensor:
        values = {"input": x}
        for step in self.steps:
            inputs = [values[name] for name in step["inputs"]]
            x = getattr(self, step["name"])(*inputs)
            values[step["name"]] = x
        return x


class Column(NamedTuple):
    """Bits of the middle layers; with `mixed`, weights have so many on average. First and last layer have 8."""

    name: str
    weights: int
    activations: int
    mixed: bool


class Job:
    """A network, its images, and what is asked for."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            job = json.loads(str(arrays["job"]))
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files if name != "job"}
        self.calibrate = tensors.pop("calibrate")
        self.test = tensors.pop("test")
        self.steps = job["steps"]
        self.columns = [Column(*column) for column in job["columns"]]
        self.tensors = tensors
        self.layers = [step["name"] for step in self.steps if step["kind"] in QUANTIZED]

    def network(self, add: Callable[[], nn.Module] = Add) -> Described:
        network = Described(self.steps, add)
        network.load_state_dict(self.tensors)
        return network.eval()

    def bits(self, column: Column) -> dict[str, tuple[int, int]]:
        """Return the bits of weights and activations of every layer, of a column that isn't mixed."""
        made = dict.fromkeys(self.layers, (column.weights, column.activations))
        made[self.layers[0]] = made[self.layers[-1]] = (8, 8)
        return made

    def batches(self) -> Iterator[Tensor]:
        yield from self.calibrate.split(BATCH)

    def weight_count(self, layer: str) -> int:
        return self.tensors[f"{layer}.weight"].numel()


Quantized = tuple[nn.Module, dict[str, int]]  # a network, and the bits of its layers' weights where a tool chose them


# Sony's Model Compression Toolkit


def mct(job: Job, column: Column) -> Quantized:
    """Symmetric thresholds by squared error, weights per channel, bias correction.

    The target is that of IMX500, without its powers of two. Input and the last layer's input have 8 bits; logits aren't
    quantized.
    """
    toolkit = importlib.import_module("model_compression_toolkit")
    filters = importlib.import_module("model_compression_toolkit.core.common.network_editors")
    config = toolkit.core.CoreConfig()
    config.quantization_config.weights_bias_correction = True
    utilization = None
    candidates = [8, column.weights]
    if column.mixed:
        candidates = list(WIDTHS)
        config.mixed_precision_config = toolkit.core.MixedPrecisionQuantizationConfig()
        utilization = toolkit.core.ResourceUtilization(weights_memory=_mct_memory(job, column))
    for position, layer in enumerate(job.layers):
        bits = column.weights
        if position in (0, len(job.layers) - 1):
            bits = 8
        elif column.mixed:
            continue
        config.bit_width_config.set_manual_weights_bit_width(filters.NodeNameFilter(layer), bits, "weight")

    def images() -> Iterator[list[Tensor]]:
        for batch in job.batches():
            yield [batch]

    quantized, _ = toolkit.ptq.pytorch_post_training_quantization(
        job.network(),
        images,
        target_resource_utilization=utilization,
        core_config=config,
        target_platform_capabilities=_mct_target(candidates, column.activations),
    )
    chosen = {}
    for layer in job.layers:
        wrapped = getattr(quantized, layer)
        (quantizer,) = wrapped.weights_quantizers.values()
        chosen[layer] = int(quantizer.num_bits)
    return quantized, chosen


def _mct_memory(job: Job, column: Column) -> float:
    """Return the bytes of all weights, the middle layers' at their average, first and last layer's at 8 bits."""
    bits = 0
    for position, layer in enumerate(job.layers):
        width = column.weights
        if position in (0, len(job.layers) - 1):
            width = 8
        bits += width * job.weight_count(layer)
    return bits / 8


def _mct_target(candidates: list[int], activations: int) -> Any:
    """Make MCT's IMX500 target with symmetric thresholds, and with these bits."""
    tpc = importlib.import_module("model_compression_toolkit.target_platform_capabilities.tpc_models.imx500_tpc.v1_0.tpc")
    schema = tpc.schema
    symmetric = tpc.QuantizationMethod.SYMMETRIC
    base, _, default = tpc.get_op_quantization_configs()
    default = default.clone_and_edit(activation_quantization_method=symmetric)
    base = base.clone_and_edit(activation_quantization_method=symmetric, activation_n_bits=activations)
    edits = [{tpc.KERNEL_ATTR: {tpc.WEIGHTS_N_BITS: bits}} for bits in sorted(set(candidates), reverse=True)]
    options = [base.clone_and_edit(attr_to_edit=edit) for edit in edits]
    made = tpc.generate_tpc(default, options[0], options, "symmetric")
    names = schema.OperatorSetNames
    inner = schema.QuantizationConfigOptions(
        quantization_configurations=(default.clone_and_edit(activation_n_bits=activations),)
    )
    last = [option.clone_and_edit(enable_activation_quantization=False) for option in options]
    sets = []
    for operators in made.operator_set:
        if operators.name in (names.RELU, names.RELU6, names.ADD):
            operators = schema.OperatorsSet(name=operators.name, qc_options=inner)
        if operators.name == names.FULLY_CONNECTED:
            chosen = schema.QuantizationConfigOptions(quantization_configurations=tuple(last), base_config=last[0])
            operators = schema.OperatorsSet(name=operators.name, qc_options=chosen)
        sets.append(operators)
    return made.model_copy(update={"operator_set": tuple(sets)})


# AMD's Brevitas


def brevitas(job: Job, column: Column) -> Quantized:
    """Scales by squared error, of weights per channel; inputs unsigned where they are so; bias correction."""
    return _brevitas(job, column, gptq=False)


def brevitas_gptq(job: Job, column: Column) -> Quantized:
    """The same with GPTQ, weights in the order of their importance, before the correction."""
    return _brevitas(job, column, gptq=True)


def _brevitas(job: Job, column: Column, gptq: bool) -> Quantized:
    layers = importlib.import_module("brevitas.nn")
    scaled = importlib.import_module("brevitas.quant.scaled_int")
    calibrate = importlib.import_module("brevitas.graph.calibrate")
    quantize = importlib.import_module("brevitas.graph.quantize")
    network: nn.Module = job.network()
    signed = signed_inputs(network, job)
    for layer, (weights, activations) in job.bits(column).items():
        quantizer = scaled.Uint8ActPerTensorFloatMSE
        if signed[layer]:
            quantizer = scaled.Int8ActPerTensorFloatMSE
        options = {
            "weight_quant": scaled.Int8WeightPerChannelFloatMSE,
            "weight_bit_width": weights,
            "input_quant": quantizer,
            "input_bit_width": activations,
            "return_quant_tensor": False,
        }
        kinds = {nn.Conv2d: (layers.QuantConv2d, options), nn.Linear: (layers.QuantLinear, options)}
        others = [name for name in job.layers if name != layer]
        network = quantize.layerwise_quantize(network, compute_layer_map=kinds, name_blacklist=others)
    network.eval()
    with torch.no_grad():
        with calibrate.calibration_mode(network):
            for batch in job.batches():
                network(batch)
        if gptq:
            network(job.calibrate[:BATCH])  # calibration leaves the weights' scales for the first pass after it
            _brevitas_rounding(network, job)
        with calibrate.bias_correction_mode(network):
            for batch in job.batches():
                network(batch)
    return network, {}


def _brevitas_rounding(network: nn.Module, job: Job) -> None:
    gptq = importlib.import_module("brevitas.graph.gptq")
    with gptq.gptq_mode(network, act_order=True, use_quant_activations=False, create_weight_orig=False) as mode:
        for _ in range(mode.num_layers):
            for batch in job.batches():
                mode.model(batch)
            mode.update()


def signed_inputs(network: nn.Module, job: Job) -> dict[str, bool]:
    """Say of every layer whether any of its inputs in calibration is negative."""
    signed = dict.fromkeys(job.layers, False)
    handles = []
    for layer in job.layers:

        def look(module: nn.Module, inputs: tuple[Tensor, ...], layer: str = layer) -> None:
            signed[layer] |= bool(inputs[0].min() < 0)

        handles.append(getattr(network, layer).register_forward_pre_hook(look))
    with torch.no_grad():
        for batch in job.batches():
            network(batch)
    for handle in handles:
        handle.remove()
    return signed


# NVIDIA's Model Optimizer


def modelopt(job: Job, column: Column) -> Quantized:
    """Its default: scales by the largest value, weights per channel, inputs signed."""
    quantization = importlib.import_module("modelopt.torch.quantization")
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for layer, (weights, activations) in job.bits(column).items():
        rules.append({"quantizer_name": f"{layer}.weight_quantizer", "cfg": {"num_bits": weights, "axis": 0}})
        rules.append({"quantizer_name": f"{layer}.input_quantizer", "cfg": {"num_bits": activations, "axis": None}})

    def calibrate(network: nn.Module) -> None:
        for batch in job.batches():
            network(batch)

    with torch.no_grad():
        made = quantization.quantize(job.network(), {"quant_cfg": rules, "algorithm": "max"}, calibrate)
    return made, {}


# Qualcomm's AIMET


def aimet(job: Job, column: Column) -> Quantized:
    """Ranges by its tf_enhanced, weights per channel, then SeqMSE.

    Outputs are quantized (after a ReLU where one follows), asymmetrically: its default. Input and the last layer's input have
    8 bits; logits aren't quantized.
    """
    tool = importlib.import_module("aimet_torch")
    defs = importlib.import_module("aimet_torch.common.defs")
    search = importlib.import_module("aimet_torch.seq_mse")
    addition = importlib.import_module("aimet_torch.nn.modules.custom").Add
    folder = Path(str(importlib.import_module("aimet_torch.common.quantsim_config").__file__)).parent
    simulation = tool.QuantizationSimModel(
        job.network(addition),
        job.calibrate[:1],
        quant_scheme=defs.QuantScheme.post_training_tf_enhanced,
        default_output_bw=column.activations,
        default_param_bw=column.weights,
        config_file=str(folder / "default_config_per_channel.json"),
    )
    for layer, (weights, _) in job.bits(column).items():
        getattr(simulation.model, layer).param_quantizers["weight"].bitwidth = weights
    first = getattr(simulation.model, job.layers[0])
    first.input_quantizers[0].bitwidth = 8
    last = getattr(simulation.model, job.layers[-1])
    last.output_quantizers[0] = None
    for step in job.steps:
        if step["kind"] in ("AdaptiveAvgPool2d", "Flatten"):
            for quantizer in getattr(simulation.model, step["name"]).output_quantizers:
                if quantizer is not None:
                    quantizer.bitwidth = 8
    batches = list(job.batches())

    def answer(network: nn.Module, images: Tensor) -> Tensor:
        made: Tensor = network(images)
        return made

    def calibrate(network: nn.Module) -> None:
        for batch in batches:
            network(batch)

    with torch.no_grad():
        search.apply_seq_mse(simulation, batches, forward_fn=answer)
        simulation.compute_encodings(calibrate)
    return simulation.model, {}


# Method -> what has to be imported for it, and what does it.
METHODS: dict[str, tuple[str, Callable[[Job, Column], Quantized]]] = {
    "mct": ("model_compression_toolkit", mct),
    "brevitas": ("brevitas", brevitas),
    "brevitas-gptq": ("brevitas", brevitas_gptq),
    "modelopt": ("modelopt.torch.quantization", modelopt),
    "aimet": ("aimet_torch", aimet),
}
_DECLARED: list[torch.library.Library] = []  # a declaration lives as long as its Library object


def import_tool(name: str) -> None:
    """Import a tool, which may want torchvision.

    torchvision asks for operators that a torch build for CPUs doesn't have, and that no network here calls: they are declared.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        pass
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _DECLARED.append(library)
        for loaded in [module for module in sys.modules if module.partition(".")[0] == "torchvision"]:
            del sys.modules[loaded]
    importlib.import_module(name)


@torch.no_grad()
def answers(network: nn.Module, images: Tensor) -> np.ndarray[Any, Any]:
    return torch.cat([network(batch) for batch in images.split(TEST_BATCH)]).float().numpy()


def results(job: Job, quantize: Callable[[Job, Column], Quantized], folder: Path) -> Iterator[dict[str, Any]]:
    """Quantize and test for every column; yields what is printed, and leaves the answers in a folder."""
    for column in job.columns:
        start = time.process_time()
        try:
            quantized, bits = quantize(job, column)
            seconds = time.process_time() - start
            np.save(folder / f"{column.name}.npy", answers(quantized, job.test), allow_pickle=False)
        except Exception as error:  # whatever a tool fails with belongs into its cell
            words = " ".join(str(error).split())[:300]
            yield {"column": column.name, "error": f"{type(error).__name__}: {words}"}
            continue
        yield {"column": column.name, "seconds": seconds, "bits": bits}


def main(method: str, path: Path, folder: Path) -> None:
    # Tools print what they like; lines for the caller are written where nothing else is.
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    package, quantize = METHODS[method]
    import_tool(package)
    for result in results(Job(path), quantize, folder):
        lines.write(json.dumps(result) + "\n")
        lines.flush()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
