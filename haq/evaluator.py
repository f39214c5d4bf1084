"""Accuracy of a policy on held-out images, fast: one forward pass for a policy never seen before, none for one that was."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q

BATCH = 125  # images; small enough for a layer's activations to stay in the processor's cache


class Evaluation(NamedTuple):
    """Share of images classified correctly (0..1), and mean cross-entropy (nats)."""

    accuracy: float
    loss: float


class Evaluator:
    """Evaluates policies of one quantized network on one set of images, which it keeps in memory.

    Weights are quantized once per (layer, bits) and scales calibrated once; the results are cached by policy.
    """

    def __init__(self, network: nn.Module, inputs: Tensor, labels: Tensor) -> None:
        """`network` comes from `quantizers.quantize`; `inputs` (N, ...) are preprocessed, `labels` int64 (N,)."""
        if len(inputs) != len(labels) or not len(inputs):
            raise ValueError(f"evaluation needs as many images as labels, at least one; got {len(inputs)} and {len(labels)}")
        self.network = network.eval()
        self.batches = list(zip(inputs.split(BATCH), labels.split(BATCH), strict=True))
        self.count = len(labels)
        self.cache: dict[Q.BitPolicy, Evaluation] = {}

    def evaluate(self, policy: Q.BitPolicy) -> Evaluation:
        """Accuracy and loss of a policy. Raises ValueError if the outputs aren't finite."""
        if policy not in self.cache:
            Q.set_policy(self.network, policy)
            self.cache[policy] = self.measure(self.network)
        return self.cache[policy]

    def measure(self, network: nn.Module) -> Evaluation:
        """Accuracy and loss of any network, in evaluation mode, on the same images.

        Every thread takes whole batches: small networks spend much of their time waiting where all threads share one
        operation. The sums are taken in the order of the batches, so the result doesn't depend on who was first.
        """
        threads = torch.get_num_threads()
        if threads == 1 or len(self.batches) == 1:
            parts = [self._batch(network, *batch) for batch in self.batches]
        else:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                parts = list(pool.map(lambda batch: self._batch(network, *batch), self.batches))
            torch.set_num_threads(threads)  # threads made from now on would have taken over the pool's setting
        loss = sum(part[1] for part in parts)
        if loss != loss or loss == float("inf"):
            raise ValueError("the network's outputs are not finite on the search images")
        return Evaluation(sum(part[0] for part in parts) / self.count, loss / self.count)

    @staticmethod
    @torch.inference_mode()
    def _batch(network: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[int, float]:
        """Images classified correctly, and the sum of their losses."""
        outputs = network(inputs)
        if outputs.dim() != 2 or labels.max() >= outputs.shape[1] or labels.min() < 0:
            span = f"{int(labels.min())} to {int(labels.max())}"
            raise ValueError(f"labels from {span} don't fit outputs of shape {tuple(outputs.shape)}")
        correct = int((outputs.argmax(1) == labels).sum())
        return correct, float(F.cross_entropy(outputs.double(), labels, reduction="sum"))
