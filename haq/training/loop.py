"""The one training loop: float networks, and quantized ones back to their accuracy."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq.attacks.threat_model import PerturbationBall, check_images
from haq.data import Split
from haq.networks import Network
from haq.store.checkpoint import Checkpoint
from haq.training.adversaries import Adversary, TrainingAttack


def augment(images: Tensor, generator: torch.Generator, shift: int = 2) -> Tensor:
    """Mirror half of the images and move each by up to `shift` pixels (zeros enter at the border)."""
    count, _, height, width = images.shape
    mirrored = torch.rand(count, generator=generator) < 0.5
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    down, right = torch.randint(0, 2 * shift + 1, (2, count), generator=generator)
    padded = F.pad(images, (shift, shift, shift, shift))
    rows = (down.view(-1, 1) + torch.arange(height)).view(count, 1, height, 1)
    columns = (right.view(-1, 1) + torch.arange(width)).view(count, 1, 1, width)
    index = (
        torch.arange(count).view(-1, 1, 1, 1),
        torch.arange(images.shape[1]).view(1, -1, 1, 1),
        rows,
        columns,
    )
    return padded[index]


def fit(
    network: Network,
    split: Split,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    module: nn.Module | None = None,
    teacher: nn.Module | None = None,
    batch_size: int = 128,
    weight_decay: float = 1e-4,
    optimizer: str | Callable[[nn.Module], Sequence[torch.optim.Optimizer]] = "sgd",
    scales: Sequence[Tensor] = (),
    fixed_norms: bool = False,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    clipping: Q.WeightClipping | None = None,
    adversary: Adversary | None = None,
    state: Checkpoint | None = None,
    steps: int | None = None,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
    on_step: Callable[[int, int], None] = lambda step, steps: None,
) -> None:
    """Train `module` (default: the network's own) in place, on `split`, with a cosine learning rate, for `epochs`, or for as
    many `steps` (batches) if these are given.

    With a `teacher` the labels play no part: the loss is the Kullback-Leibler distance from the teacher's outputs on random
    mixtures of images, which a few thousand images provide without end (function matching, Beyer et al., CVPR 2022).
    `scales` are quantization steps to train as well; they stay positive. `fixed_norms` keeps the statistics of batch norms.
    `optimizer` is `sgd` (Nesterov, momentum 0.9), `adam`, or a function that makes optimizers for the module, whose own
    learning rates then stand for `learning_rate`; what a quantization scheme learns isn't decayed. `penalty` is added to the
    loss; `clipping` clips weights after every step. With an `adversary` the network is trained on inputs that are perturbed to
    raise the loss (with a teacher: the distance from its outputs on the inputs as they were); of `free`, every batch is
    replayed, in as many times fewer epochs. `state` keeps what it takes to go on after every epoch, and goes on from there.
    `on_epoch(epoch, mean loss)` and `on_step(done, of)` report. Everything random comes from `seed`, but for what the module
    itself draws (dropout). Raises FloatingPointError if the loss stops being a number, and ValueError for an adversary on
    images of unknown range.
    """
    module = module or network.module
    generator = torch.Generator().manual_seed(seed)
    learned = {id(p) for p in Q.learned_parameters(module)}
    trained = [p for p in module.parameters() if p.requires_grad]
    # Scales and biases of norms, and of quantizers, have nothing to decay towards.
    decayed = [p for p in trained if p.dim() > 1 and id(p) not in learned]
    others = [p for p in trained if p.dim() <= 1 or id(p) in learned] + list(scales)
    smallest = [0.1 * scale.detach() for scale in scales]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    made: list[torch.optim.Optimizer]
    if callable(optimizer):
        made = list(optimizer(module))
    elif optimizer == "adam":
        made = [torch.optim.Adam(groups, learning_rate)]
    elif optimizer == "sgd":
        made = [torch.optim.SGD(groups, learning_rate, momentum=0.9, nesterov=True)]
    else:
        raise ValueError(f"unknown optimizer {optimizer!r}; known: sgd, adam")
    if clipping is not None:
        made[-1].register_step_post_hook(clipping)
    full = [[group["lr"] for group in one.param_groups] for one in made]
    attack, replays = None, 1
    if adversary is not None:
        check_images(split)
        attack, replays = TrainingAttack(adversary, PerturbationBall.of(network, adversary.eps)), adversary.replays
        epochs = adversary.passes(epochs)
    per_epoch = math.ceil(len(split) / batch_size) * replays
    steps = steps or epochs * per_epoch
    warmup = min(200, steps // 10 + 1)
    done = _restore(state, module, made, generator, attack) if state else 0
    step = done * per_epoch
    loss_of: Callable[[Tensor], Tensor]
    for epoch in range(done, math.ceil(steps / per_epoch)):
        total, seen = 0.0, 0
        module.train()
        for part in module.modules():
            if fixed_norms and isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        for images, labels in split.batches(batch_size, generator):
            inputs = network.preprocess(augment(images, generator))
            if teacher is None:
                loss_of = functools.partial(F.cross_entropy, target=labels)
            else:
                inputs = _mixed(inputs, generator)
                loss_of = _distance(teacher, inputs)
            for _ in range(min(replays, steps - step)):
                rate = min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))
                for one, peaks in zip(made, full, strict=True):
                    for group, peak in zip(one.param_groups, peaks, strict=True):
                        group["lr"] = peak * rate
                given = attack.perturb(module, inputs, loss_of, generator) if attack else inputs
                loss = loss_of(module(given))
                if penalty is not None:
                    loss = loss + penalty(module)
                if not torch.isfinite(loss):
                    raise FloatingPointError(
                        f"the training loss is {loss.item()} in epoch {epoch + 1}: lower the learning rate"
                    )
                for one in made:
                    one.zero_grad()
                loss.backward()
                if attack:
                    attack.learn(given)
                for one in made:
                    one.step()
                with torch.no_grad():
                    for scale, least in zip(scales, smallest, strict=True):
                        torch.maximum(scale, least, out=scale)
                total += loss.item() * len(labels)
                seen += len(labels)
                step += 1
                on_step(step, steps)
            if step == steps:
                break
        if state:
            _save(state, module, made, generator, epoch + 1, attack)
        on_epoch(epoch + 1, total / seen)
    module.eval()


def _save(
    state: Checkpoint,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    generator: torch.Generator,
    epoch: int,
    attack: TrainingAttack | None,
) -> None:
    """What a training goes on with after an epoch: network, quantizers, optimizers and random states, and the perturbation
    that an attack keeps."""
    state.write(
        {
            "epoch": epoch,
            "module": module.state_dict(),
            "quantizers": Q.quantizer_state(module),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "generator": generator.get_state(),
            "torch": torch.get_rng_state(),  # of dropout and stochastic rounding
            "perturbation": attack and attack.delta,
        }
    )


def _restore(
    state: Checkpoint,
    module: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    generator: torch.Generator,
    attack: TrainingAttack | None,
) -> int:
    """Restore everything and return the number of epochs done: 0 if nothing was saved yet."""
    # Weights, what an optimizer and an attack keep: never so many times the network.
    most = 16 * sum(t.numel() * t.element_size() for t in module.state_dict().values()) + 2**28
    if (content := state.read(most)) is None:
        return 0
    with state.fitting():
        module.load_state_dict(content["module"])
        if content["quantizers"]:
            Q.load_quantizer_state(module, content["quantizers"])
        for optimizer, kept in zip(optimizers, content["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        generator.set_state(content["generator"])
        torch.set_rng_state(content["torch"])
        if attack:
            attack.delta = content["perturbation"]
        epoch = content["epoch"]
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise TypeError("the epoch is no number")
    return epoch


def _mixed(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Random mixtures of two images each."""
    share = torch.rand(len(inputs), 1, 1, 1, generator=generator)
    partner = torch.randperm(len(inputs), generator=generator)
    last = inputs.is_contiguous(memory_format=torch.channels_last)
    order = torch.channels_last if last else torch.contiguous_format
    return (share * inputs + (1 - share) * inputs[partner]).contiguous(memory_format=order)


def _distance(teacher: nn.Module, inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """Distance of outputs from the teacher's on these inputs, in nats."""
    with torch.no_grad():
        targets = F.log_softmax(teacher(inputs), dim=1)
    return lambda outputs: F.kl_div(F.log_softmax(outputs, dim=1), targets, reduction="batchmean", log_target=True)


@torch.inference_mode()
def agreement(network: Network, split: Split, module: nn.Module, batch_size: int = 250) -> float:
    """The share of `split` on which `module` answers what the float network answers, 0..1; labels play no part."""
    same = 0
    for images, _ in split.batches(batch_size):
        inputs = network.preprocess(images)
        same += int((module.eval()(inputs).argmax(1) == network.module.eval()(inputs).argmax(1)).sum())
    return same / len(split)


@torch.inference_mode()
def accuracy(network: Network, split: Split, module: nn.Module | None = None, batch_size: int = 250) -> float:
    """The share of `split` classified correctly, 0..1."""
    module = (module or network.module).eval()
    correct = sum(
        int((module(network.preprocess(images)).argmax(1) == labels).sum()) for images, labels in split.batches(batch_size)
    )
    return correct / len(split)
