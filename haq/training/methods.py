"""Training methods: what the one training loop does beside taking steps, such as dropping filters and learning masks.

A method is a class with hooks, which `haq.training.fit` calls at their time. One of your own is a file with one class in it:

    # noisy.py
    import torch
    from haq.training.methods import Method

    class Noisy(Method):
        \"\"\"Weights are disturbed after every epoch.\"\"\"

        def __init__(self, size=0.01):
            super().__init__()
            self.size = size

        def after_epoch(self, training):
            for weight in training.module.parameters():
                noise = torch.randn(weight.shape, generator=training.generator)
                weight.data += self.size * noise.to(weight.device)

    haq train --method "noisy:Noisy(size=0.02)" --out network.safetensors

A package offers one under a name of its own in its pyproject.toml:

    [project.entry-points."haq.training_methods"]
    noisy = "noisy:Noisy"

Importing this needs no torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from haq.training.optimizers import argument_value, split_at_commas
from hw_models.registry import Registry, join_words, requires

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from haq.networks import Network
    from haq.training.config import TrainConfig

HOOKS = ("begin", "before_epoch", "loss", "before_step", "after_step", "after_epoch", "may_keep", "position", "finish")
RESULT = ("rebuilt", "report")
STATE = ("tensors", "load_tensors")


class TrainingState(Protocol):
    """What a method sees of a training under way, and may change: `haq.training.loop.Training`.

    Attributes:
        network: What preprocesses inputs, and knows how modules are called.
        module: What is trained.
        teacher: What outputs are held against; None: the targets.
        config: How it is trained.
        generator: Of everything random, on the CPU. Its state is kept with the training: draw from nothing else.
        optimizers: Of the module's parameters; there are none yet in `begin`.
        epoch: How many epochs are done, of `epochs`.
        epochs: How many there are.
        step: How many steps are done, of `steps`.
        steps: How many there are.
        steps_per_epoch: How many there are in an epoch; the last may have fewer.
    """

    network: Network
    module: nn.Module
    teacher: nn.Module | None
    config: TrainConfig
    generator: torch.Generator
    optimizers: list[torch.optim.Optimizer]
    epoch: int
    epochs: int
    step: int
    steps: int
    steps_per_epoch: int

    def outputs(self, module: nn.Module, inputs: Any, targets: Any = None) -> Any:
        """Compute the outputs of a module, in float32 whatever it computes in; the copies of a method too.

        Args:
            module: What is trained, or any other of the same interface.
            inputs: Of a batch, preprocessed.
            targets: Of the batch.

        Returns:
            What the module returns.
        """
        ...

    def tensors(self) -> dict[str, Any]:
        """Copy all tensors of the module, what its quantizers keep included."""
        ...

    def load_tensors(self, content: dict[str, Any]) -> None:
        """Put back what `tensors` copied, into the tensors that the module has."""
        ...


class Method:
    """What a training does beside its steps; this one does nothing. One object goes through one training.

    Hooks are called in this order: `begin`; for every epoch `before_epoch`, for every step of it `loss`, `before_step` and
    `after_step`, then `after_epoch`, and after it was judged `may_keep`; `finish` in the end.

    A training that was interrupted begins anew and is then put back: `begin` is called with the module as it was at the very
    beginning, then `load_tensors` with what `tensors` returned after the last epoch done. Whatever changes between epochs must
    be in `tensors`, in the module, or in the states of optimizers; then the training goes on to the same bytes. States are
    saved after `after_epoch`: what prepares the next epoch is best done in its `before_epoch`.

    Attributes:
        modules: Modules of the method's own, by names, such as a discriminator. Their states are kept with the training.
        optimizers: Optimizers of its own, likewise. The method itself takes their steps, and sets their learning rates.
        needs_all_epochs: Whether the training must not end early (`TrainConfig.patience`), as where there are cycles.
        needs_trained: Whether it begins with a network that is trained already.
    """

    needs_all_epochs = False
    needs_trained = False

    def __init__(self) -> None:
        """Begin with no modules and optimizers of its own."""
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}

    def begin(self, training: TrainingState) -> None:
        """Prepare, and check that the training suits the method, before optimizers are made.

        What is added to the module here is trained with it, and kept with it: parameters, modules, parametrizations. After
        `finish` the module must have the same entries in its `state_dict`, of the same shapes, as before, since that is how a
        checkpoint of the network is read.

        Args:
            training: The training that begins: its module, configuration and generator.

        Raises:
            ValueError: In a sentence that names the value, for a training that the method can't work with.
        """

    def before_epoch(self, training: TrainingState) -> None:
        """Prepare the next epoch; `training.epoch` of them are done.

        Args:
            training: The training.
        """

    def loss(self, training: TrainingState, inputs: Any, targets: Any, outputs: Any, loss: Tensor) -> Tensor:
        """Return what is minimised in a step.

        Args:
            training: The training.
            inputs: Of the batch, in the network's input space.
            targets: Of the batch.
            outputs: Of the module in training mode, with a graph of gradients.
            loss: What would be minimised otherwise; without a teacher it comes from the targets.

        Returns:
            A scalar: the loss itself, one with something added, or another.
        """
        return loss

    def before_step(self, training: TrainingState) -> None:
        """Look at the gradients, and change them, before optimizers take their step; in float16 they are scaled.

        Args:
            training: The training; gradients are in its module's parameters.
        """

    def after_step(self, training: TrainingState) -> None:
        """Go on after a step; `training.step` of them are done, the last one included.

        Args:
            training: The training.
        """

    def after_epoch(self, training: TrainingState) -> None:
        """Go on after an epoch, before its network is judged; `training.epoch` of them are done, this one included.

        Args:
            training: The training.
        """

    def may_keep(self, training: TrainingState) -> bool:
        """Say whether the network after this epoch may be what the training ends with, if it is the best.

        At least one epoch's must, where networks are judged. A method whose networks aren't finished before its last cycle
        says so here.

        Args:
            training: The training.

        Returns:
            True, unless the method says otherwise.
        """
        return True

    def position(self, training: TrainingState) -> tuple[int, int]:
        """Return where the schedule of the learning rate is.

        Only schedules of ours (`haq.training.optimizers.SCHEDULES`) ask; those of torch go on by themselves.

        Args:
            training: The training.

        Returns:
            Steps done, and steps in all.
        """
        return training.step, training.steps

    def finish(self, training: TrainingState) -> None:
        """Leave the module ready for use; it is the best one by now if it was judged.

        Args:
            training: The training that is over.
        """

    def rebuilt(self, module: nn.Module) -> nn.Module:
        """Return the network that is used, and written, after the training: another one where the method makes it smaller.

        Whoever trains calls it after `finish`; `fit` itself doesn't, since it leaves a module as it was built.

        Args:
            module: What was trained.

        Returns:
            The module itself, or a copy with other layers, whose outputs are the same up to rounding.
        """
        return module

    def report(self) -> list[str]:
        """Return what is worth saying after the training, a sentence each: `haq train` prints them.

        Returns:
            Sentences; none by default.
        """
        return []

    def tensors(self) -> dict[str, Any]:
        """Return what `load_tensors` goes on from: tensors, numbers, strings and containers of them; what is empty isn't kept.

        Whoever has more than modules and optimizers adds to what this returns.

        Returns:
            The state by name.
        """
        content: dict[str, Any] = {}
        if self.modules:
            content["modules"] = {name: module.state_dict() for name, module in self.modules.items()}
        if self.optimizers:
            content["optimizers"] = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        return content

    def load_tensors(self, content: dict[str, Any]) -> None:
        """Go on from what `tensors` returned; tensors come back on the CPU. Modules and optimizers are those of `begin`.

        Args:
            content: What `tensors` returned.
        """
        for name, module in self.modules.items():
            module.load_state_dict(content["modules"][name])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(content["optimizers"][name])


_lacking_names = requires(*HOOKS, *RESULT, *STATE, "needs_all_epochs", "needs_trained")


def lacking(thing: Any) -> str:
    """Say what a training method's class lacks, in words that continue "it lacks"; empty text for nothing."""
    if not isinstance(thing, type):
        return "what makes it a class"
    return _lacking_names(thing)


# Training methods by name.
METHODS: Registry[type[Method]] = Registry(
    "training method",
    "haq.training_methods",
    {
        "repr": (
            "haq.training.repr_method:RePr",
            "filters that overlap most are dropped for some epochs, and come back orthogonal to the others",
        ),
        "lottery": (
            "haq.training.lottery_ticket:LotteryTicket",
            "weights of the smallest magnitude are masked round by round, the others put back to where they began",
        ),
        "gal": (
            "haq.training.gal:GenerativeAdversarial",
            "soft masks of channels, learned against a discriminator without labels, then removal (GAL, Lin et al. 2019)",
        ),
        "flgc": (
            "haq.training.flgc:LearnedGroups",
            "dense convolutions learn their groups, and become group convolutions (FLGC, Wang et al. 2019)",
        ),
    },
    check=lacking,
)


def parse_method(text: str) -> tuple[str, dict[str, Any]]:
    """Read a method's name and its arguments: "repr(share=0.3, cycles=3)", or the name alone.

    Args:
        text: As it is given on a command line.

    Returns:
        The name, and the arguments by name.

    Raises:
        ValueError: For text of another form.
    """
    name, opened, inside = text.strip().partition("(")
    arguments: dict[str, Any] = {}
    if opened:
        if not inside.endswith(")"):
            raise ValueError(f"method {text!r} has no closing bracket; give NAME or NAME(ARGUMENT=VALUE, ...)")
        for part in split_at_commas(inside[:-1]):
            key, is_set, value = (piece.strip() for piece in part.partition("="))
            if not part and len(inside) == 1:
                break
            if not is_set or not key.isidentifier():
                raise ValueError(f"method {text!r} has {part!r}; arguments are written NAME=VALUE")
            if key in arguments:
                raise ValueError(f"method {text!r} has {key}= twice; give it once")
            arguments[key] = argument_value(value, f"method {text!r}")
    return name.strip(), arguments


def build_method(text: str, modules: bool = True) -> Method:
    """Make the method that a text describes.

    Args:
        text: Such as "repr(share=0.3, cycles=3)"; the name is one of `METHODS`, or `module:Name`.
        modules: Whether `module:Name` may be imported.

    Returns:
        The method.

    Raises:
        ValueError: For an unknown name, an argument that it doesn't take, and a value that it refuses.
        ImportError: For a method of somebody else's that can't be imported.
    """
    name, arguments = parse_method(text)
    kind = METHODS.get(name, modules)
    taken = list(inspect.signature(kind).parameters)
    for key in arguments:
        if key not in taken:
            known = "no arguments"
            if taken:
                known = join_words([f"{one}=" for one in taken])
            raise ValueError(f"method {text!r} has {key}=; {name} takes {known}")
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ValueError(f"method {text!r} can't be made: {error}") from error


def as_method(method: Method | str | None) -> Method:
    """Return a method for what was given: itself, what a text describes, and one that does nothing for None."""
    if method is None:
        return Method()
    if isinstance(method, str):
        return build_method(method)
    return method


def forget(optimizers: Sequence[torch.optim.Optimizer], parameter: Tensor, index: Any = ...) -> None:
    """Reset what optimizers remember of a parameter, or of a part of it, as if it had never been trained.

    Momentum and other averages become zero; how many steps an optimizer counts stays as it is, since that is of the whole
    parameter.

    Args:
        optimizers: Of the training.
        parameter: The parameter.
        index: Of the part; by default all of it.
    """
    for optimizer in optimizers:
        for kept in optimizer.state.get(parameter, {}).values():
            if hasattr(kept, "shape") and kept.shape == parameter.shape and kept.dim():
                kept[index] = 0
