"""RePr: filters that say what others say are dropped for a while, and come back orthogonal to what is there.

Prakash, Storer, Florencio, Zhang, "RePr: Improved Training of Convolutional Filters", CVPR 2019, arXiv 1811.07275.

    haq train --method "repr(share=0.3, cycles=3)" --epochs 40 --out network.safetensors
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from haq.networks import Network
from haq.training.methods import Method, TrainingState, forget
from quantizers.copying import evaluating
from quantizers.pruning import channel_groups
from quantizers.pruning.filter_overlap import mean_overlap, orthogonal_filters, overlapping_filters

PAPER = (20, 10, 100)  # epochs of full training and of reduced training in a cycle, and epochs in all


class Part(NamedTuple):
    """A part of a parameter: what of it belongs to some filters."""

    parameter: nn.Parameter
    index: Any


class Reader(NamedTuple):
    """A layer that reads the channels of a filter's layer: its weight, groups, the axis of input channels, and places."""

    weight: nn.Parameter
    groups: int
    axis: int
    places: tuple[tuple[int, ...], ...]


class RePr(Method):
    """Trains a network with RePr.

    In every cycle all filters are trained for some epochs; then those of the highest overlap (`filter_overlaps`, ranked over
    all layers) are dropped, and the others trained alone; then the dropped ones come back, orthogonal to the others and to
    what they were. What is left of the epochs trains all filters.

    While a filter is dropped it is zero, and so are scale and shift of the batch norm behind it, and what the next layers do
    with it; no gradient, decay or momentum moves that. When it comes back, its batch norm begins anew, the next layers'
    weights for it are drawn as those of a new layer are, and optimizers remember nothing of it. Where other layers write to
    the same channels, as in residual blocks, the next layers' weights belong to these filters as well, and are left alone.

    Ranked are convolutions without groups, of at least two filters that are trained, but for the first.

    Attributes:
        overlaps: The mean overlap of the ranked filters after every epoch.
        overlap: The same of the network that is kept.
        dropped: Numbers of the filters that are dropped now, by layer.
    """

    needs_all_epochs = True

    def __init__(
        self,
        share: float = 0.3,
        cycles: int = 3,
        full: int | None = None,
        reduced: int | None = None,
        next_layers: bool = True,
    ) -> None:
        """Say how filters are dropped.

        Args:
            share: Of all ranked filters, beyond 0 and below 1.
            cycles: How often.
            full: Epochs of a cycle with all filters; None: a fifth of the training, as in the paper.
            reduced: Epochs of a cycle without the dropped ones; None: a tenth.
            next_layers: Whether the next layers' weights for a dropped filter are drawn anew, too. That takes torch-pruning,
                and a network whose channels it can follow.

        Raises:
            ValueError: For a value out of range.
        """
        super().__init__()
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            raise ValueError(f"repr: share is {share!r}; it must be a share of the filters, beyond 0 and below 1")
        for name, count in (("cycles", cycles), ("full", full), ("reduced", reduced)):
            is_count = isinstance(count, int) and not isinstance(count, bool) and count >= 1
            if not is_count and (name == "cycles" or count is not None):
                raise ValueError(f"repr: {name} is {count!r}; it must be an integer of at least 1")
        if not isinstance(next_layers, bool):
            raise ValueError(f"repr: next_layers is {next_layers!r}; it must be True or False")
        self.share, self.cycles, self.full, self.reduced = float(share), cycles, full, reduced
        self.next_layers = next_layers
        self.dropped: dict[str, tuple[int, ...]] = {}
        self.overlaps: list[float] = []
        self.overlap = 0.0
        self._old: dict[str, Tensor] = {}
        self._layers: dict[str, _ConvNd] = {}
        self._norms: dict[str, _BatchNorm] = {}
        self._readers: dict[str, list[Reader]] = {}

    def begin(self, training: TrainingState) -> None:
        """Find the layers, their norms and readers, and the lengths of the cycles."""
        self.full = self.full or max(1, training.epochs * PAPER[0] // PAPER[2])
        self.reduced = self.reduced or max(1, training.epochs * PAPER[1] // PAPER[2])
        needed = self.cycles * (self.full + self.reduced) + 1
        if training.epochs < needed:
            raise ValueError(
                f"repr: {self.cycles} cycles of {self.full} full and {self.reduced} reduced epochs, and one with all filters "
                f"after them, take {needed} epochs, there are {training.epochs}"
            )
        self._layers = ranked_layers(training.module)
        if not self._layers:
            raise ValueError("repr: no convolution but the first has filters that could be ranked")
        network = training.network
        if not network.input_shape:
            raise ValueError(f"repr: {network.name} doesn't say what images it takes, so that its channels can't be followed")
        images = torch.rand(2, *network.input_shape, generator=torch.Generator().manual_seed(0)).to(network.device)
        self._norms = norms_behind(network, training.module, self._layers, images)
        if self.next_layers:
            try:
                self._readers = self._found_readers(training, images)
            except ValueError as error:
                raise ValueError(f"repr: {error}; with next_layers=False channels needn't be followed") from error

    def _found_readers(self, training: TrainingState, images: Tensor) -> dict[str, list[Reader]]:
        """Find what reads the filters of each layer, where nobody else writes to the same channels."""
        forward = None
        if training.network.forward is not None:
            forward = training.network.run
        groups = channel_groups(training.module, images, forward=forward)
        found: dict[str, list[Reader]] = {}
        for name in self._layers:
            if name not in groups or groups[name].writers != (name,):
                continue
            found[name] = []
            for member in groups[name].members:
                if member.dim == "in":
                    layer = training.module.get_submodule(member.module)
                    weight = layer.get_parameter("weight")
                    found[name].append(Reader(weight, getattr(layer, "groups", 1), member.axis, member.places))
        return found

    def before_epoch(self, training: TrainingState) -> None:
        """Drop filters, or bring them back, where a phase ends."""
        assert self.full is not None
        assert self.reduced is not None
        cycle, epoch = divmod(training.epoch, self.full + self.reduced)
        if epoch == 0 and 0 < cycle <= self.cycles:
            self._bring_back(training)
        if epoch == self.full and cycle < self.cycles:
            self._drop(training)

    def before_step(self, training: TrainingState) -> None:
        """Let nothing move what is dropped."""
        for parameter, index in self._parts():
            if parameter.grad is not None:
                parameter.grad[index] = 0

    def after_step(self, training: TrainingState) -> None:
        """Keep what is dropped at zero, whatever an optimizer does without a gradient."""
        with torch.no_grad():
            for parameter, index in self._parts():
                parameter[index] = 0

    def after_epoch(self, training: TrainingState) -> None:
        """Measure how much filters overlap."""
        self.overlaps.append(mean_overlap(self._weights()))

    def may_keep(self, training: TrainingState) -> bool:
        """Keep only networks that went through all cycles."""
        assert self.full is not None
        assert self.reduced is not None
        return training.epoch > self.cycles * (self.full + self.reduced)

    def finish(self, training: TrainingState) -> None:
        """Measure how much the filters of the network that is kept overlap."""
        self.overlap = mean_overlap(self._weights())

    def tensors(self) -> dict[str, Any]:
        """Add what is dropped, and what it was."""
        dropped = {name: list(numbers) for name, numbers in self.dropped.items()}
        return {**super().tensors(), "dropped": dropped, "old": dict(self._old), "overlaps": list(self.overlaps)}

    def load_tensors(self, content: dict[str, Any]) -> None:
        """Go on with what is dropped."""
        super().load_tensors(content)
        self.dropped = {name: tuple(numbers) for name, numbers in content["dropped"].items()}
        self._old = dict(content["old"])
        self.overlaps = list(content["overlaps"])

    def report(self) -> list[str]:
        """Say how much filters overlap."""
        count = sum(map(len, self._weights().values()))
        return [f"mean overlap of {count} filters: {self.overlap:.4f}, after {self.cycles} cycles of RePr"]

    def _weights(self) -> dict[str, Tensor]:
        return {name: layer.weight for name, layer in self._layers.items()}

    def _drop(self, training: TrainingState) -> None:
        self.dropped = overlapping_filters(self._weights(), self.share)
        self._old = {name: self._layers[name].weight.detach()[list(gone)].clone() for name, gone in self.dropped.items()}
        with torch.no_grad():
            for parameter, index in self._parts():
                parameter[index] = 0
                forget(training.optimizers, parameter, index)

    @torch.no_grad()
    def _bring_back(self, training: TrainingState) -> None:
        generator = training.generator
        parts = self._parts()
        # First what readers do with dropped filters: that is a part of filters, too, which others are to be orthogonal to.
        for parameter, index in self._reader_parts():
            bound = parameter[0].numel() ** -0.5
            fresh = torch.rand(parameter[index].shape, generator=generator) * (2 * bound) - bound
            parameter[index] = fresh.to(parameter)
        for name, gone in self.dropped.items():
            layer, numbers = self._layers[name], list(gone)
            kept = [number for number in range(len(layer.weight)) if number not in gone]
            layer.weight[numbers] = orthogonal_filters(layer.weight[kept], self._old[name], generator)
            norm = self._norms.get(name)
            if norm is not None:
                begin_anew(norm, numbers)
        for parameter, index in parts:
            forget(training.optimizers, parameter, index)
        self.dropped, self._old = {}, {}

    def _parts(self) -> list[Part]:
        """List what of every parameter belongs to dropped filters."""
        parts = []
        for name, gone in self.dropped.items():
            for module in (self._layers[name], self._norms.get(name)):
                if module is not None:
                    own = [parameter for parameter in module._parameters.values() if parameter is not None]
                    parts += [Part(parameter, (list(gone),)) for parameter in own]
        return parts + self._reader_parts()

    def _reader_parts(self) -> list[Part]:
        """List what the next layers have of dropped filters that nobody else writes to."""
        parts: list[Part] = []
        for name, gone in self.dropped.items():
            for weight, groups, axis, places in self._readers.get(name, []):
                positions = [place for number in gone for place in places[number]]
                parts += _columns(weight, groups, axis, positions)
        return parts


def ranked_layers(module: nn.Module) -> dict[str, _ConvNd]:
    """Return the convolutions whose filters RePr ranks, by name, in the order of the modules.

    Not the first convolution, as in the paper; none with groups, whose filters look at different channels; none with fewer
    than two filters, or that isn't trained.
    """
    found = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Conv1d | nn.Conv2d)]
    ranked: dict[str, _ConvNd] = {}
    for name, layer in found[1:]:
        weight = layer._parameters.get("weight")
        if layer.groups == 1 and layer.out_channels > 1 and weight is not None and weight.requires_grad:
            ranked[name] = layer
    return ranked


def norms_behind(
    network: Network, module: nn.Module, layers: Mapping[str, nn.Module], example: Tensor
) -> dict[str, _BatchNorm]:
    """Find the batch norms that take what layers return as it is.

    Args:
        network: What runs the module.
        module: What the layers are in; it is run once, in evaluation mode.
        layers: The layers by name.
        example: Inputs, preprocessed.

    Returns:
        The norms by the name of the layer before them.
    """
    returned: dict[int, str] = {}
    alive: list[Tensor] = []  # so that no other tensor gets the number of one of these
    found: dict[str, _BatchNorm] = {}

    def after_layer(name: str, output: Any) -> None:
        alive.append(output)
        returned[id(output)] = name

    def before_norm(norm: _BatchNorm, given: tuple[Any, ...]) -> None:
        if given and id(given[0]) in returned:
            found[returned[id(given[0])]] = norm

    def told_of(name: str, layer: nn.Module) -> Any:
        return layer.register_forward_hook(lambda _layer, _given, output: after_layer(name, output))

    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm)]
    handles = [told_of(name, layer) for name, layer in layers.items()]
    handles += [norm.register_forward_pre_hook(before_norm) for norm in norms]
    try:
        with torch.no_grad(), evaluating(module):
            network.run(module, example)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def begin_anew(norm: _BatchNorm, channels: Sequence[int]) -> None:
    """Give some channels of a batch norm the scale, shift and statistics of a new one."""
    numbers = list(channels)
    for tensor, value in ((norm.weight, 1.0), (norm.bias, 0.0), (norm.running_mean, 0.0), (norm.running_var, 1.0)):
        if tensor is not None:
            tensor[numbers] = value


def _columns(weight: nn.Parameter, groups: int, axis: int, positions: list[int]) -> list[Part]:
    """List the parts of a layer's weight that read some input channels."""
    if groups == 1:
        return [Part(weight, (*[slice(None)] * axis, positions))]
    rows, columns = len(weight) // groups, weight.shape[1]
    parts = []
    for position in positions:
        group, column = divmod(position, columns)
        parts.append(Part(weight, (slice(group * rows, (group + 1) * rows), [column])))
    return parts
