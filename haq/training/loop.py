"""The one training loop: float networks, and quantized ones back to their accuracy.

Read from `fit` downwards: optimizers are made, an epoch is trained, a step of it, and what it takes to go on is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq.attacks.gradient import Loss
from haq.attacks.threat_model import PerturbationBall, check_images
from haq.data import Split
from haq.data.dataset import batch_count
from haq.data.labels import class_numbers
from haq.data.sources import Stream, made_ahead
from haq.networks import Network
from haq.problem.objective import Objective
from haq.store.checkpoint import Checkpoint
from haq.training.adversaries import TrainingAttack
from haq.training.config import (
    Judgement,
    OnEpoch,
    OnJudged,
    OnStep,
    Outcome,
    TrainConfig,
    no_epoch,
    no_judgement,
    no_step,
)
from haq.training.goals import Called, Goal, UserLoss, as_float32, in_evaluation, network_inputs
from haq.training.methods import Method, as_method
from haq.training.optimizers import optimizer_class
from haq.training.schedules import Length, Schedule
from quantizers.calling import count_of, to_device
from quantizers.norms import is_frozen, running_norms

Judge = Callable[[nn.Module], Judgement]  # of a network, on samples that it isn't trained on
LEAST_SCALE = 0.1  # of where a quantization step began: so far down may training move it


def fit(
    network: Network,
    split: Split,
    config: TrainConfig,
    *,
    module: nn.Module | None = None,
    teacher: nn.Module | None = None,
    objective: Objective | None = None,
    loss: UserLoss | None = None,
    method: Method | str | None = None,
    state: Checkpoint | None = None,
    judge: Judge | None = None,
    before: Judgement | None = None,
    ahead: bool = False,
    on_epoch: OnEpoch = no_epoch,
    on_step: OnStep = no_step,
    on_judged: OnJudged = no_judgement,
) -> Outcome | None:
    """Train a module in place, on the device that the network is on.

    Images of classes are mirrored and moved at random; other inputs, of any structure, are taken as they are.

    Args:
        network: What preprocesses the inputs, and knows how modules are called with them.
        split: The samples, inputs and targets.
        config: How.
        module: What is trained; default: the network's own.
        teacher: With it targets play no part: the loss is the distance from the teacher's outputs. For class scores that is
            the Kullback-Leibler divergence on random mixtures of images, which a few thousand images provide without end
            (function matching, Beyer et al., CVPR 2022); for other objectives the mean of `Objective.divergence`. Against an
            adversary it is the distance from its outputs on the inputs as they were.
        objective: Whose `training_loss` is minimised without a teacher; None: cross-entropy, by labels.
        loss: A function of (outputs, targets) that is minimised in place of all that; it returns a number or one for each
            sample. Outputs are of the structure that they have in evaluation mode. Where there are auxiliary ones in training
            mode, their losses are added.
        method: What is done beside the steps (`haq.training.methods`), or a text that describes it, such as
            "repr(share=0.3, cycles=3)". An object is of one training.
        state: Keeps what it takes to go on after every epoch; what it holds is gone on from.
        judge: Judges the module after every epoch; in the end it is what it was after the best of them.
        before: With a judge: what the best epoch must beat. If none does, the outcome says so, and the module is left as
            it was after the last one; the network before is the caller's.
        ahead: Whether a thread may make the next batches, and ask the teacher about them, while a step is taken. It changes no
            result, and is done where that is certain (`Training.can_prepare_ahead`).
        on_epoch: Told the epochs done and the last one's mean loss.
        on_step: Told the steps done and in all.
        on_judged: Told the epochs done and the judgement after the last one.

    Returns:
        With a judge: how the epochs were judged, and which was kept.

    Raises:
        FloatingPointError: If the loss stops being a number before there is anything to keep.
        ValueError: For fewer than two samples, an objective that has nothing to train by, an adversary on images of unknown
            range, patience without a judge or with a method that needs all epochs, a training that the method can't work
            with, and a state of something else.
    """
    if len(split) < 2:
        raise ValueError(f"training takes at least 2 {split.samples_are}, there are {len(split)}")
    if config.adversary is not None:
        check_images(split)
    if config.patience is not None and judge is None:
        raise ValueError(f"patience is {config.patience}, but nothing is held out by which epochs could be judged")
    made = as_method(method)
    if config.patience is not None and made.needs_all_epochs:
        raise ValueError(f"patience is {config.patience}, but the training method needs all epochs: leave it out")
    goal = Goal(objective, loss, config.auxiliary)
    if teacher is not None:
        goal.check_teacher(network, split)
    training = Training(
        network, module or network.module, teacher, config, len(split), goal, batches_in(split, config.batch_size), made
    )
    training.least = before
    training.ahead = ahead
    if state is not None:
        training.restore(state)
    diverged = False
    for epoch in range(training.epoch, training.epochs):
        if training.is_stale or training.is_hopeless:
            break
        try:
            mean_loss = train_epoch(training, split, on_step)
        except FloatingPointError:
            if judge is None or (before is None and training.best is None):
                raise
            diverged = True
            break
        training.epoch = epoch + 1
        training.method.after_epoch(training)
        held_out_loss = mean_loss
        if judge is not None:
            training.consider(judge(training.module))
            on_judged(training.epoch, training.judged[-1])
            held_out_loss = training.judged[-1].loss
        training.schedule.after_epoch(held_out_loss)
        if state is not None:
            training.save(state)
        on_epoch(training.epoch, mean_loss)
    training.finish()
    if judge is None:
        return None
    stopped = (training.is_stale or training.is_hopeless) and training.epoch < training.epochs
    return Outcome(0, before, tuple(training.judged), training.kept, diverged, stopped)


def batches_in(split: Split, size: int) -> int:
    """Count the batches that samples are trained on in; those that come in batches of their own stay in them."""
    if isinstance(split.source, Stream):
        return sum(math.ceil(count / size) for count in split.source.sizes())
    return batch_count(len(split), size)


class Training:
    """A training under way: all that changes from step to step.

    Attributes:
        module: What is trained.
        goal: What is minimised.
        generator: All randomness of the loop: the order of images, augmentation, mixtures, random starts of attacks. It is
            the CPU's, so that every device draws the same.
        scales: Quantization steps that are trained beside the module's parameters.
        optimizers: Of the module's parameters and the scales.
        schedule: Of their learning rates.
        half: The type that networks compute in; None: that of their parameters.
        scaler: Scales losses so that float16 can hold their gradients; None where it needn't.
        attack: What perturbs the inputs; None: nothing.
        method: What is done beside the steps.
        epochs: How many there are; `epoch` of them are done.
        steps: How many there are; `step` of them are done.
        ahead: Whether a thread may make the next batches.
        least: The judgement that an epoch's network must beat to be kept; None: the first one is kept until a better comes.
        judged: The judgements after the epochs done, if the module is judged.
        kept: The number of the epoch whose network is in `best`, from 1; 0: of none.
        best: All tensors of that network.
    """

    def __init__(
        self,
        network: Network,
        module: nn.Module,
        teacher: nn.Module | None,
        config: TrainConfig,
        images: int,
        goal: Goal | None = None,
        batches: int | None = None,
        method: Method | None = None,
    ) -> None:
        """Make everything that a training begins with.

        Args:
            network: What preprocesses the inputs.
            module: What is trained.
            teacher: What the outputs are held against; None: the targets.
            config: How.
            images: How many samples there are.
            goal: What is minimised; None: of classification.
            batches: Of an epoch; None: as many as there are of so many samples.
            method: What is done beside the steps; None: nothing.
        """
        self.network = network
        self.goal = goal or Goal()
        self.module = module
        self.teacher = teacher
        self.config = config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.scales: list[Tensor] = []
        if config.train_scales:
            self.scales = trainable_scales(module)
        self.least_scales = [LEAST_SCALE * scale.detach() for scale in self.scales]
        self.half: torch.dtype | None = None
        self.scaler: torch.amp.GradScaler | None = None
        if config.amp:
            self.half = half_precision(network.device)
            if self.half == torch.float16:
                self.scaler = torch.amp.GradScaler(network.device.type)

        self.attack: TrainingAttack | None = None
        self.replays = 1
        passes = config.epochs
        if config.adversary is not None:
            self.attack = TrainingAttack(
                config.adversary, PerturbationBall.of(network, config.adversary.eps).to(network.device)
            )
            self.replays = config.adversary.replays
            passes = config.adversary.passes(config.epochs)

        self.steps_per_epoch = (batches or batch_count(images, config.batch_size)) * self.replays
        self.steps = config.steps or passes * self.steps_per_epoch
        self.epochs = math.ceil(self.steps / self.steps_per_epoch)
        self.epoch = 0
        self.step = 0
        self.method = method or Method()
        self.optimizers: list[torch.optim.Optimizer] = []
        self.method.begin(self)  # what it adds to the module is trained, too
        self.optimizers += make_optimizers(module, self.scales, config)
        self.schedule = Schedule(self.optimizers, config.schedule, Length(self.steps, self.epochs))
        self.ahead = False
        self.least: Judgement | None = None
        self.judged: list[Judgement] = []
        self.kept = 0
        self.best: dict[str, Any] | None = None

    @property
    def is_stale(self) -> bool:
        """Say whether as many epochs as there is patience for had no lower loss on held-out samples than one before them."""
        patience = self.config.patience
        if patience is None or not self.judged:
            return False
        losses = [judgement.loss for judgement in self.judged]
        best = losses.index(min(losses))
        return len(losses) - 1 - best >= patience

    @property
    def is_hopeless(self) -> bool:
        """Say whether no epoch has a lower loss than the network before, after as many steps as are allowed for that."""
        after = self.config.give_up_after
        if after is None or self.least is None or self.step < after:
            return False
        return all(judgement.loss >= self.least.loss for judgement in self.judged)

    def can_prepare_ahead(self, split: Split) -> bool:
        """Say whether a thread can make batches of images in memory while a step is taken, with the same results.

        It can where only batches draw from the generator, where nothing of somebody else's is called but the teacher, and
        where every operation is done by one thread.
        """
        if not self.ahead or self.teacher is None or self.attack is not None:
            return False
        if self.goal.loss is not None or not self.goal.is_usual_distance:
            return False
        if self.network.forward is not None or self.network.device.type != "cpu" or not split.source.is_kept:
            return False
        return torch.get_num_threads() == 1

    def outputs(self, module: nn.Module, inputs: Any, targets: Any = None) -> Any:
        """Compute the outputs of a module, in float32 whatever it computes in.

        Args:
            module: What is trained, or the teacher.
            inputs: Of a batch, preprocessed.
            targets: Of the batch.

        Returns:
            What the module returns.
        """
        if self.half is None:
            return self._run(module, inputs, targets)
        with torch.autocast(self.network.device.type, self.half):
            outputs = self._run(module, inputs, targets)
        return as_float32(outputs)

    def _run(self, module: nn.Module, inputs: Any, targets: Any) -> Any:
        if module is self.module and isinstance(inputs, Tensor) and self.network.forward is None:
            # No copy, as the teacher is given: nobody looks at them afterwards but an adversary, at their gradient.
            return module(inputs)
        return self.network.run(module, inputs, targets)

    def tensors(self) -> dict[str, Any]:
        """Copy all tensors of the module."""
        return {
            "module": {key: value.detach().clone() for key, value in self.module.state_dict().items()},
            "quantizers": Q.quantizer_state(self.module),
        }

    def load_tensors(self, content: dict[str, Any]) -> None:
        """Put back what `tensors` copied."""
        self.module.load_state_dict(content["module"])
        if content["quantizers"]:
            Q.load_quantizer_state(self.module, content["quantizers"])

    def consider(self, judgement: Judgement) -> None:
        """Note what the module is worth now; keep it if it beats the network before, and its loss is the least so far."""
        self.judged.append(judgement)
        if not self.method.may_keep(self):
            return
        if self.least is not None and not judgement.beats(self.least):
            return
        if self.kept == 0 or judgement.loss < self.judged[self.kept - 1].loss:
            self.kept = len(self.judged)
            self.best = self.tensors()

    def save(self, state: Checkpoint) -> None:
        """Write what a training goes on with after an epoch."""
        perturbation = None
        if self.attack is not None:
            perturbation = self.attack.delta
        scaler = None
        if self.scaler is not None:
            scaler = self.scaler.state_dict()
        content = {
            "epoch": self.epoch,
            "step": self.step,
            **self.tensors(),
            "judged": [tuple(judgement) for judgement in self.judged],
            "kept": self.kept,
            "best": self.best,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedule": self.schedule.state(),
            "scaler": scaler,
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),  # of dropout and stochastic rounding
            "device": device_random_state(self.network.device),  # of the same, where that isn't the CPU
            "perturbation": perturbation,
        }
        of_method = self.method.tensors()
        if of_method:
            content["method"] = of_method
        # A file of another device could be read only where there is one.
        state.write(to_device(content, "cpu"))

    def restore(self, state: Checkpoint) -> None:
        """Go on from what was written; if nothing was, from the beginning.

        Raises:
            ValueError: With what to do, for a file that is of something else or doesn't fit.
        """
        # Weights, what an optimizer and an attack keep: never so many times the network.
        size = sum(tensor.numel() * tensor.element_size() for tensor in self.module.state_dict().values())
        content = state.read(16 * size + 2**28)
        if content is None:
            return
        with state.fitting():
            self.load_tensors(content)
            self.judged = [_judgement_of(*kept) for kept in content["judged"]]
            self.kept = content["kept"]
            self.best = content["best"]
            for optimizer, kept in zip(self.optimizers, content["optimizers"], strict=True):
                optimizer.load_state_dict(kept)
            self.schedule.restore(content.get("schedule", []))
            if self.scaler is not None:
                self.scaler.load_state_dict(content["scaler"])
            set_device_random_state(self.network.device, content.get("device"))
            self.generator.set_state(content["generator"])
            torch.set_rng_state(content["torch"])
            if self.attack is not None:
                self.attack.delta = to_device(content["perturbation"], self.network.device)
            self.method.load_tensors(content.get("method", {}))
            epoch = content["epoch"]
            if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
                raise TypeError("the epoch is no number")
        self.epoch = epoch
        self.step = content.get("step", epoch * self.steps_per_epoch)

    def finish(self) -> None:
        """Leave the module ready for use, as it was at its best if it was judged."""
        if self.best is not None:
            self.load_tensors(self.best)
        for scale in self.scales:
            scale.requires_grad_(False)
        self.method.finish(self)
        self.module.eval()


def trainable_scales(module: nn.Module) -> list[Tensor]:
    """Return the activation scales of a quantized network that are no parameters of their scheme, now requiring gradients.

    Layers whose scheme has no such scales have none; a scheme that learns them hands them out as parameters.
    """
    layers = Q.quant_layers(module).values()
    fixed = [layer for layer in layers if set(layer.state_names) - set(layer.scheme.learned) >= {"activation_scale"}]
    return [layer.activation_scale.requires_grad_(True) for layer in fixed]


def make_optimizers(module: nn.Module, scales: Sequence[Tensor], config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Make the optimizers of a training.

    Args:
        module: What is trained.
        scales: Quantization steps that are trained beside its parameters.
        config: How.

    Returns:
        The optimizers; the weights are clipped after a step of the last one.
    """
    if callable(config.optimizer):
        optimizers = list(config.optimizer(module))
    else:
        groups = parameter_groups(module, scales, config)
        if config.optimizer == "adam":
            optimizers = [torch.optim.Adam(groups, config.learning_rate)]
        elif config.optimizer == "sgd":
            optimizers = [torch.optim.SGD(groups, config.learning_rate, momentum=0.9, nesterov=True)]
        else:
            optimizers = [named_optimizer(config.optimizer, groups, config.learning_rate)]
    if config.clipping is not None:
        optimizers[-1].register_step_post_hook(config.clipping)
    return optimizers


def named_optimizer(name: str, groups: list[dict[str, Any]], rate: float) -> torch.optim.Optimizer:
    """Make an optimizer of torch.

    Args:
        name: Of its class.
        groups: Of parameters.
        rate: The learning rate.

    Returns:
        The optimizer, whose other options are as torch has them.

    Raises:
        ValueError: For one that refuses these parameters.
    """
    try:
        return optimizer_class(name)([group for group in groups if group["params"]], lr=rate)  # type: ignore[call-arg]
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"optimizer {name!r} can't train this network ({reason})") from error


def _judgement_of(value: float, loss: float, images: int, higher_is_better: bool = True, error: Any = None) -> Judgement:
    """Make a judgement of what a state keeps of it."""
    if error is not None:
        error = float(error)
    return Judgement(float(value), float(loss), int(images), bool(higher_is_better), error)


def half_precision(device: torch.device) -> torch.dtype:
    """Return the type of half precision that a device computes with: float16 only on GPUs without bfloat16."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def device_random_state(device: torch.device) -> Tensor | None:
    """Return the state of a device's random numbers; None for the CPU, whose state is torch's own."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    if device.type == "mps":
        return torch.mps.get_rng_state()
    return None


def set_device_random_state(device: torch.device, state: Tensor | None) -> None:
    """Put back what `device_random_state` returned."""
    if state is None:
        return
    if device.type == "mps":
        torch.mps.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)


def parameter_groups(module: nn.Module, scales: Sequence[Tensor], config: TrainConfig) -> list[dict[str, object]]:
    """Divide what is trained into what decays, what doesn't, and codebooks, which are trained more slowly.

    Args:
        module: What is trained.
        scales: Quantization steps that are trained beside its parameters.
        config: How.

    Returns:
        Groups as optimizers take them.
    """
    learned = {id(parameter) for parameter in Q.learned_parameters(module)}
    rates = learned_rates(module)
    decayed: list[Tensor] = []
    others: list[Tensor] = []
    slower: dict[float, list[Tensor]] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in rates:
            slower.setdefault(rates[id(parameter)], []).append(parameter)
        elif parameter.dim() > 1 and id(parameter) not in learned:
            decayed.append(parameter)
        else:
            # Scales and biases of norms, and of quantizers, have nothing to decay towards.
            others.append(parameter)
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": [*others, *scales], "weight_decay": 0.0},
    ]
    for rate, parameters in slower.items():
        groups.append({"params": parameters, "weight_decay": 0.0, "lr": rate * config.learning_rate})
    return groups


def learned_rates(module: nn.Module) -> dict[int, float]:
    """Return the shares of the learning rate, other than 1, that schemes ask for what they learn, by the parameters' id."""
    rates = {}
    for layer in Q.quant_layers(module).values():
        if layer.scheme.learned_rate != 1:
            for name in layer.scheme.learned:
                rates[id(layer.get_parameter(name))] = layer.scheme.learned_rate
    return rates


@torch.enable_grad()
def fixed_weights(module: nn.Module) -> list[str]:
    """Return the quantized layers whose float weight training doesn't move: their scheme passes no gradient to it.

    A penalty on float weights says nothing of these layers.
    """
    found = []
    for name, layer in Q.quant_layers(module).items():
        flag = layer.weight.requires_grad
        layer.weight.requires_grad_(True)
        with torch.random.fork_rng(devices=[]):  # a scheme may draw
            made = layer.quantized_weight()
        gradient = None
        if made.requires_grad:
            (gradient,) = torch.autograd.grad(made.sum(), layer.weight, allow_unused=True)
        if gradient is None:
            found.append(name)
        layer.weight.requires_grad_(flag)
    return found


def train_epoch(training: Training, split: Split, on_step: OnStep = no_step) -> float:
    """Go through the images once.

    Args:
        training: The training, whose steps go on.
        split: The images and their labels.
        on_step: Told the steps done and in all.

    Returns:
        The mean loss.

    Raises:
        ValueError: If there is no batch of samples to train on.
    """
    config = training.config
    training.method.before_epoch(training)
    training.module.train()
    for norm in running_norms(training.module):
        if config.fixed_norms or is_frozen(norm):
            norm.eval()
    total = 0.0
    seen = 0
    for given, targets, loss_of in prepared_batches(training, split):
        count = count_of(given)
        for _ in range(training.replays):
            if training.step == training.steps:
                break
            loss = train_step(training, given, loss_of, targets)
            total += loss * count
            seen += count
            on_step(training.step, training.steps)
        if training.step == training.steps:
            break
    if not seen:
        raise ValueError("there is no batch of samples to train on")
    return total / seen


def prepared_batches(training: Training, split: Split) -> Iterator[tuple[Any, Any, Loss]]:
    """Yield what steps of training take, batch by batch; see `prepared`.

    Args:
        training: The training.
        split: The images and their labels.

    Yields:
        What `prepared` returns.
    """

    def made(batch: tuple[Any, Any]) -> tuple[Any, Any, Loss]:
        return prepared(training, *batch)

    def made_by_one(batch: tuple[Any, Any]) -> tuple[Any, Any, Loss]:
        torch.set_num_threads(1)
        return made(batch)

    batches = split.batches(training.config.batch_size, training.generator)
    before = torch.get_rng_state()
    first = next(batches, None)
    if first is None:
        return
    step = made(first)
    # A teacher that draws must do so in turn with what is trained, which may draw too.
    draws = not torch.equal(before, torch.get_rng_state())
    yield step
    if training.can_prepare_ahead(split) and not draws:
        yield from made_ahead(made_by_one, batches)
    else:
        yield from map(made, batches)


def prepared(training: Training, inputs: Any, targets: Any) -> tuple[Any, Any, Loss]:
    """Make of a batch what a step of training takes.

    Args:
        training: The training.
        inputs: As the data gives them.
        targets: Likewise.

    Returns:
        The inputs in the network's input space and the targets, both on its device; and the loss of outputs.
    """
    network, goal, generator = training.network, training.goal, training.generator
    is_of_images = goal.looks_at_images(inputs)
    if is_of_images:
        inputs = augment(to_device(inputs, network.device), generator)
    inputs = network_inputs(network, inputs)
    targets = to_device(targets, network.device)
    if training.teacher is not None and goal.loss is None:
        if is_of_images:
            inputs = mix(inputs, generator)
        with torch.no_grad():
            expected = training.outputs(training.teacher, inputs, targets)
        return inputs, targets, goal.from_teacher(expected)
    goal.check_targets(targets)
    wanted = goal.aligned(inputs, targets)

    def loss_of(outputs: Any) -> Tensor:
        return goal.from_targets(outputs, wanted, lambda: in_evaluation(network, training.module, inputs, targets))

    return inputs, targets, loss_of


def train_step(training: Training, inputs: Any, loss_of: Loss, targets: Any = None) -> float:
    """Train on a batch, which an adversary may perturb first.

    Args:
        training: The training, whose step is taken.
        inputs: Of the batch, in the network's input space.
        loss_of: The loss of outputs on these inputs.
        targets: Of the batch, for a network that is called with them.

    Returns:
        The loss.

    Raises:
        FloatingPointError: If it is no number.
        ValueError: If all parameters that the network computes with are frozen.
    """
    module = training.module
    method = training.method
    training.schedule.before_step(*method.position(training))
    given = inputs
    if training.attack is not None:
        attacked = module
        if training.network.forward is not None:
            attacked = Called(training.network, module, targets)
        given = training.attack.perturb(attacked, inputs, loss_of, training.generator)
    outputs = training.outputs(module, given, targets)
    loss = method.loss(training, given, targets, outputs, loss_of(outputs))
    if training.config.penalty is not None:
        loss = loss + training.config.penalty(module)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the training loss is {loss.item()} in epoch {training.epoch + 1}: lower the learning rate")
    if not loss.requires_grad:
        raise ValueError("there is nothing to train: all parameters that the network computes with are frozen")
    for optimizer in training.optimizers:
        optimizer.zero_grad()
    descend(training, loss)
    if training.attack is not None:
        training.attack.learn(given)
    with torch.no_grad():
        for scale, least in zip(training.scales, training.least_scales, strict=True):
            torch.maximum(scale, least, out=scale)
    training.step += 1
    training.schedule.after_step(training.step)
    method.after_step(training)
    return loss.item()


def descend(training: Training, loss: Tensor) -> None:
    """Take the gradients of a loss, and let the optimizers take a step."""
    scaler = training.scaler
    if scaler is None:
        loss.backward()
        training.method.before_step(training)
        for optimizer in training.optimizers:
            optimizer.step()
        return
    scaler.scale(loss).backward()
    training.method.before_step(training)
    for optimizer in training.optimizers:
        scaler.step(optimizer)
    scaler.update()


def augment(images: Tensor, generator: torch.Generator, shift: int = 2) -> Tensor:
    """Mirror half of the images and move each by some pixels; zeros enter at the border.

    Args:
        images: (N, C, H, W), on any device.
        generator: Of what is random, on the CPU.
        shift: Pixels, at most.

    Returns:
        Images of the same shape.
    """
    count, channels, height, width = images.shape
    device = images.device
    mirrored = (torch.rand(count, generator=generator) < 0.5).to(device)
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)
    down, right = torch.randint(0, 2 * shift + 1, (2, count), generator=generator).to(device)
    padded = F.pad(images, (shift, shift, shift, shift))
    rows = (down.view(-1, 1) + torch.arange(height, device=device)).view(count, 1, height, 1)
    columns = (right.view(-1, 1) + torch.arange(width, device=device)).view(count, 1, 1, width)
    index = (
        torch.arange(count, device=device).view(-1, 1, 1, 1),
        torch.arange(channels, device=device).view(1, -1, 1, 1),
        rows,
        columns,
    )
    return padded[index]


def mix(inputs: Tensor, generator: torch.Generator) -> Tensor:
    """Return random mixtures of two inputs each."""
    share = torch.rand(len(inputs), 1, 1, 1, generator=generator).to(inputs.device)
    partner = torch.randperm(len(inputs), generator=generator).to(inputs.device)
    order = torch.contiguous_format
    if inputs.is_contiguous(memory_format=torch.channels_last):
        order = torch.channels_last
    return (share * inputs + (1 - share) * inputs[partner]).contiguous(memory_format=order)


@torch.inference_mode()
def agreement(network: Network, split: Split, module: nn.Module, batch_size: int = 250) -> float:
    """Measure how often a module answers what the float network answers; labels play no part.

    Args:
        network: The float network.
        split: The images.
        module: What is measured.
        batch_size: Images at a time.

    Returns:
        The share of the images, 0..1.
    """
    module.eval()
    network.module.eval()
    goal = Goal()
    same = 0
    for images, targets in split.batches(batch_size):
        inputs = network_inputs(network, images)
        answers, expected = (goal.read(network.run(one, inputs, targets)).argmax(1) for one in (module, network.module))
        same += int((answers == expected).sum())
    return same / len(split)


@torch.inference_mode()
def accuracy(network: Network, split: Split, module: nn.Module | None = None, batch_size: int = 250) -> float:
    """Measure how often a module answers as labelled.

    Args:
        network: What preprocesses the images.
        split: The images and their labels.
        module: What is measured; default: the network's own.
        batch_size: Images at a time.

    Returns:
        The share of the images, 0..1.

    Raises:
        ValueError: For labels that are no class numbers, and outputs that are no class scores.
    """
    module = (module or network.module).eval()
    class_numbers(split.labels, "what accuracy is measured on")
    goal = Goal()
    correct = 0
    for images, labels in split.batches(batch_size):
        scores = goal.read(network.run(module, network_inputs(network, images), labels))
        correct += int((scores.argmax(1).cpu() == labels).sum())
    return correct / len(split)
