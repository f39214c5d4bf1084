"""What is counted of a policy: what a target prices, and what any network has of itself.

latency, energy and storage are a target's. The others are counted from the workload alone:

bops                 bit operations of one image: multiply-accumulates x weight bits x activation bits
average_weight_bits  the mean width of the weights, each weight counted once
memory_traffic       bytes that move for one image, if every layer reads its input and weights and writes its output once
peak_memory          bytes of the activations that are alive at one time, which is no sum over layers

Float counts as 32 bits in all of them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hw_models.widths import PLACES, WIDTHS
from hw_models.workload import Layer, Workload

# The unit of each metric.
UNITS = {
    "latency": "s",
    "energy": "J",
    "storage": "B",
    "bops": "bops",
    "average_weight_bits": "bits",
    "memory_traffic": "B",
    "peak_memory": "B",
}
METRICS = tuple(UNITS)  # what a budget can be of
OF_TARGETS = ("latency", "energy", "storage")  # priced by a target; the others are counted
PEAK = "peak_memory"
STORED_ONCE = ("storage", "average_weight_bits")  # where layers that share a weight want it at one width

_BITS = np.array(WIDTHS, dtype=np.float64)


def bops(workload: Workload) -> NDArray[np.float64]:
    """Count the bit operations of every layer at every pair of widths, for one image.

    MACs x weight bits x activation bits (Baskin et al., "UNIQ", 2018, without its term for accumulators), shape
    (layers, 10, 10).
    """
    macs = np.array([layer.macs for layer in workload.layers], dtype=np.float64)
    return macs[:, None, None] * _BITS[:, None] * _BITS


def average_weight_bits(workload: Workload) -> NDArray[np.float64]:
    """Return every layer's part of the mean width of the weights, shape (layers, 10, 10): their sum is the mean.

    A weight that several layers have counts at the first of them.
    """
    weights = np.array([layer.own_weights for layer in workload.layers], dtype=np.float64)
    shares = weights / max(weights.sum(), 1.0)
    return np.repeat(shares[:, None, None] * _BITS[:, None], PLACES, axis=2)


def memory_traffic(workload: Workload) -> NDArray[np.float64]:
    """Count the bytes that every layer moves for one image at every pair of widths, shape (layers, 10, 10).

    Each call reads its input at the activation width, reads its weights at theirs, and writes its output at the layer's own
    activation width: b (h w c1 + h' w' c2) / 8 + b_w k^2 c1 c2 / (8 g). For a pointwise layer and one width that is the memory
    access cost of ShuffleNetV2, h w (c1 + c2) + c1 c2 / g elements (Ma et al., ECCV 2018, section 2).
    """
    activations = np.array([sum(moved(layer)) for layer in workload.layers], dtype=np.float64)
    weights = np.array([layer.weights * len(layer.calls) for layer in workload.layers], dtype=np.float64)
    bits = weights[:, None, None] * _BITS[:, None] + activations[:, None, None] * _BITS
    return bits / 8


def moved(layer: Layer) -> tuple[int, int]:
    """Count the elements that a layer reads as input and writes as output for one image, over all calls."""
    read = sum(call.input_size[0] * call.input_size[1] * layer.in_channels for call in layer.calls)
    written = sum(call.positions * layer.out_channels for call in layer.calls)
    return read, written


COUNTED = {"bops": bops, "average_weight_bits": average_weight_bits, "memory_traffic": memory_traffic}
