"""Bytes: what the parameters of a quantized network take, and the peak of its activation memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from hw_models.widths import FLOAT, PLACES, WIDTHS, places
from hw_models.workload import Workload

BITS = 8  # the largest of the few-bit widths; beside 1 to 8 there are 16 bits and float (`hw_models.widths`)
FLOAT_BYTES = 4
IN_FLOAT = PLACES - 1  # the place of float in a table
SCHEMES = ("linear", "affine", "kmeans")


def storage_parts(workload: Workload, scheme: str = "linear") -> Mapping[str, NDArray[np.int64]]:
    """Count the bytes of every layer's parameters at every weight width, by what they are.

    weights      at their bits, padded to a byte per layer; for k-means, the indices of the codebook
                 (none where the weight is an earlier layer's: see `untied_bytes`)
    codebooks    k-means: 2^bits float32 values per layer (Han et al., ICLR 2016), no more than the layer has weights
    scales       float32: one per output channel for the weights (not for k-means, nor in float), one per layer for its input
    zero_points  affine: a byte beside every scale
    biases       float32

    Args:
        workload: The layers.
        scheme: How weights are stored: linear, affine (with zero points) or kmeans.

    Returns:
        Bytes by what they are, arrays of shape (layers, 10).

    Raises:
        ValueError: For an unknown scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r} of storing weights; known: {', '.join(SCHEMES)}")
    widths = np.array(WIDTHS)
    weights = np.array([layer.own_weights for layer in workload.layers])[:, None]
    channels = np.array([layer.out_channels for layer in workload.layers])[:, None]
    biases = np.array([layer.own_biases for layer in workload.layers])[:, None]
    zero = np.zeros((len(workload), PLACES), np.int64)
    scales = zero + 1 + channels * (widths < FLOAT)
    zero_points = zero
    codebooks = zero
    if scheme == "affine":
        zero_points = scales
    if scheme == "kmeans":
        scales = zero + 1
        codebooks = FLOAT_BYTES * np.minimum(2 ** np.minimum(widths, FLOAT - 1), weights) * (widths < FLOAT)
    return {
        "weights": -(-weights * widths // 8),
        "codebooks": codebooks,
        "scales": FLOAT_BYTES * scales,
        "zero_points": zero_points,
        "biases": zero + FLOAT_BYTES * biases,
    }


def storage_bytes(workload: Workload, scheme: str = "linear") -> NDArray[np.float64]:
    """Sum the bytes of every layer's parameters over `storage_parts`.

    They have shape (layers, 10, 10) as in a cost table, and are the same at every activation width but float, where the input
    has no scale. What belongs to no layer is `float_bytes`. A weight that several layers have counts at the first of them:
    right where all have the same width, and `untied_bytes` is what is missing where they don't.

    Args:
        workload: The layers.
        scheme: How weights are stored, as `storage_parts` takes it.

    Returns:
        Bytes, shape (layers, 10, 10).
    """
    total = np.sum(list(storage_parts(workload, scheme).values()), axis=0)
    stored = np.repeat(total[:, :, None], PLACES, axis=2).astype(np.float64)
    of_input = FLOAT_BYTES
    if scheme == "affine":
        of_input += 1
    stored[:, :, IN_FLOAT] -= of_input  # a float input has no scale
    return stored


def untied_bytes(workload: Workload, w_bits: NDArray[np.integer]) -> NDArray[np.int64]:
    """Count the bytes of weights that `storage_bytes` leaves out because an earlier layer has them, at another width.

    A weight that several layers have is stored once for each width that it is used at.

    Args:
        workload: The layers.
        w_bits: Weight widths, integers of shape (..., layers).

    Returns:
        Bytes, shape (...).
    """
    total = np.zeros(w_bits.shape[:-1], np.int64)
    for group in workload.tied_weights:
        for place, index in enumerate(group[1:], 1):
            width = w_bits[..., index].astype(np.int64)
            stored = (w_bits[..., group[:place]] == width[..., None]).any(-1)
            total += np.where(stored, 0, -(-workload.layers[index].weights * width // 8))
    return total


def float_bytes(workload: Workload) -> int:
    """Count the bytes of what no policy quantizes.

    These are norms with their running statistics, embeddings, and layers that are never called.

    Args:
        workload: The layers.

    Returns:
        Bytes, four for every value.
    """
    return FLOAT_BYTES * (workload.other_parameters + workload.other_values)


def peak_activation_bytes(
    workload: Workload, a_bits: object, *, batch: int = 1, elements: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Find the most memory that activations take at one time.

    A value is held from the operation that makes it to the last one that reads it, at the widest of its readers' activation
    bits, or in float32 if no layer reads it; norms, activation functions and additions write over their input where
    nobody else needs it. An engine that fuses or reorders operations can need less, one that copies, more.

    Args:
        workload: The layers, and the activations between them.
        a_bits: Activation widths, integers of shape (..., layers).
        batch: Images at a time.
        elements: How many values the workload's buffers hold per image, shape (..., buffers), where they are others: of the
            same network with fewer channels, say. None: as many as the workload says.

    Returns:
        Bytes, shape (...).

    Raises:
        ValueError: For what aren't widths of `hw_models.widths` (float being 32), and for a workload that wasn't traced.
    """
    bits = np.asarray(a_bits)
    if not np.issubdtype(bits.dtype, np.integer) or bits.ndim == 0 or bits.shape[-1] != len(workload):
        raise ValueError(f"a_bits must be integers (..., {len(workload)} layers), not {bits.dtype} {bits.shape}")
    places(bits)
    if not workload.buffers:
        raise ValueError("this workload has no record of its activations: make it with hw_models.trace")
    first, last, own = np.array([(b.first, b.last, b.elements) for b in workload.buffers]).T
    if elements is None:
        elements = own
    held = []
    for buffer in workload.buffers:
        widest = np.full(bits.shape[:-1], 8 * FLOAT_BYTES)
        if buffer.readers:
            widest = bits[..., list(buffer.readers)].max(-1)
        held.append(widest)
    size = -(-elements * batch * np.stack(held, axis=-1) // 8)
    # The peak stands where something has just been made.
    moments = np.unique(first)[:, None]
    alive = (first <= moments) & (moments <= last)
    peak: NDArray[np.int64] = (size @ alive.T).max(-1)
    return peak
