"""Post-training quantization of one policy: biases and roundings that are found for it from some images, without labels."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import nn

import quantizers as Q
from haq.data import Split
from haq.data.dataset import stratified
from haq.networks import Network
from haq.problem.evaluator import one_thread
from haq.training.adversaries import Adversary
from haq.training.config import Judgement
from haq.training.finetuning import SMALL, hold_out, judge_of
from quantizers.observers import OnProgress, no_progress
from quantizers.reconstruction import ITERATIONS

CALIBRATION = 512  # images


class Reconstructed(NamedTuple):
    """What a reconstruction found.

    Attributes:
        network: The better network of the two, in evaluation mode.
        kept: Whether that is the one that was found.
        before: How the network before was judged.
        after: How the one that was found was judged.
        calibration_images: From how many images it was found.
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
    on_progress: OnProgress = no_progress,
) -> Reconstructed:
    """Correct the biases and learn the roundings of a copy of a quantized network at its bits (`quantizers.reconstruct`).

    Images that `finetune` would hold out too judge the network before and after (`judge_of`), and the better one is returned.

    Args:
        network: The float network.
        qnetwork: The quantized one, whose scheme takes offsets; it is left as it is.
        split: The images. Labels play no part in what is found.
        seed: Of all that is random.
        adversary: What the network that is judged has to bear, if it was chosen for that.
        on_progress: Told how many of how many parts are done, and what they are.

    Returns:
        The better network, and how both were judged.

    Raises:
        ValueError: For fewer than three images, and for layers whose scheme can only round to the nearest.
    """
    if len(split) < 3:
        raise ValueError(f"post-training quantization takes at least 3 images, there are {len(split)}")
    began = time.monotonic()
    trained_on, held = hold_out(split)
    chosen = stratified(trained_on.labels, min(CALIBRATION, len(trained_on)))
    images = network.preprocess(trained_on.images[chosen])
    judge = judge_of(network, held, adversary)
    found = Q.copy_network(qnetwork).eval()
    small = max(network.input_shape[1:], default=0) <= SMALL
    with one_thread() if small else nullcontext():
        before = judge(found)
        Q.correct_bias(found, network.module, images)
        with torch.enable_grad():
            Q.reconstruct(found, network.module, images, iterations=ITERATIONS, seed=seed, on_progress=on_progress)
        after = judge(found)
    kept = after.beats(before)
    if not kept:
        found = Q.copy_network(qnetwork).eval()
    return Reconstructed(found, kept, before, after, len(images), time.monotonic() - began)
