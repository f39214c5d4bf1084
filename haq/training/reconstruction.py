"""Post-training quantization of one policy: biases and roundings that are found for it from some samples, without targets."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import quantizers as Q
from haq.data import Split
from haq.networks import Network
from haq.problem.objective import Objective
from haq.training.adversaries import Adversary
from haq.training.config import Judgement
from haq.training.finetuning import hold_out, judge_of, some_batches, threads_for
from haq.training.goals import UserLoss, network_inputs
from quantizers.calling import count_of
from quantizers.observers import OnProgress, no_progress
from quantizers.reconstruction import ITERATIONS

CALIBRATION = 512  # samples


class Reconstructed(NamedTuple):
    """What a reconstruction found.

    Attributes:
        network: The better network of the two, in evaluation mode.
        kept: Whether that is the one that was found.
        before: How the network before was judged.
        after: How the one that was found was judged.
        calibration_images: From how many samples it was found.
        seconds: How long it took.
    """

    network: nn.Module
    kept: bool
    before: Judgement
    after: Judgement
    calibration_images: int
    seconds: float

    @property
    def best(self) -> Judgement:
        """Return the judgement of the better network."""
        if self.kept:
            return self.after
        return self.before


def reconstruct(
    network: Network,
    qnetwork: nn.Module,
    split: Split,
    *,
    seed: int,
    adversary: Adversary | None = None,
    objective: Objective | None = None,
    loss: UserLoss | None = None,
    source: nn.Module | None = None,
    on_progress: OnProgress = no_progress,
) -> Reconstructed:
    """Correct the biases and learn the roundings of a copy of a quantized network at its bits (`quantizers.reconstruct`).

    Samples that `finetune` would hold out too judge the network before and after (`judge_of`), and the better one is returned.

    Args:
        network: The float network.
        qnetwork: The quantized one, whose scheme takes offsets; it is left as it is.
        split: The samples. Targets play no part in what is found.
        seed: Of all that is random.
        adversary: What the network that is judged has to bear, if it was chosen for that.
        objective: What it is judged by; None: classification of images.
        loss: As of `judge_of`.
        source: The float network that the quantized one was made of, layer by layer, if that is one of fewer channels; None:
            `network`.
        on_progress: Told how many of how many parts are done, and what they are.

    Returns:
        The better network, and how both were judged.

    Raises:
        ValueError: For fewer than three samples, an objective without a distance between outputs and no loss, and for layers
            whose scheme can only round to the nearest.
    """
    if len(split) < 3:
        raise ValueError(f"post-training quantization takes at least 3 {split.samples_are}, there are {len(split)}")
    began = time.monotonic()
    trained_on, held = hold_out(split)
    batches, count = calibration_of(network, trained_on)
    judge = judge_of(network, held, adversary, objective=objective, loss=loss)
    found = Q.copy_network(qnetwork).eval()
    if source is None:
        source = network.module
    calls: dict[str, Any] = {}
    if network.forward is not None:
        calls["forward"] = network.forward
    with threads_for(network):
        before = judge(found)
        Q.correct_bias(found, source, batches, **calls)
        with torch.enable_grad():
            Q.reconstruct(found, source, batches, iterations=ITERATIONS, seed=seed, on_progress=on_progress, **calls)
        after = judge(found)
    kept = after.beats(before)
    if not kept:
        found = Q.copy_network(qnetwork).eval()
    return Reconstructed(found, kept, before, after, count, time.monotonic() - began)


def calibration_of(network: Network, split: Split) -> tuple[Any, int]:
    """Take the samples from which biases and roundings are found.

    Args:
        network: What preprocesses them.
        split: Where they are taken from, of every class its share.

    Returns:
        A tensor of inputs, or a list of batches (inputs, targets); and how many samples there are.
    """
    batches = []
    count = 0
    for inputs, targets in some_batches(split, CALIBRATION, CALIBRATION):
        inputs = network_inputs(network, inputs)
        batches.append((inputs, targets))
        count += count_of(inputs)
    only = batches[0][0]
    if len(batches) == 1 and isinstance(only, Tensor) and network.forward is None:
        return only, count
    return batches, count
