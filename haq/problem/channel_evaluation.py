"""What a policy that keeps a part of the channels is worth: of the really smaller network, made for every such policy.

Channels are removed, the statistics of norms are taken anew in one pass over the calibration inputs, and the layers are
quantized at just the policy's bits, with the scheme, the rounding and the correction of all other policies. What comes out
depends on the policy alone.
"""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import quantizers as Q
from haq.problem.evaluator import Evaluator, one_thread
from haq.problem.samples import BATCH, Samples, pieces
from haq.problem.snapshot import Snapshot
from quantizers.batches import prepared
from quantizers.calling import Forward, leaves
from quantizers.correction import distance
from quantizers.norms import is_frozen, running_norms, take_statistics
from quantizers.pruning.criterion import Criterion, Ranking
from quantizers.pruning.groups import ChannelGroups
from quantizers.residuals import residual_quantizers

KEPT_FLOAT = 4  # float networks with fewer channels that are kept, those asked for last
KEPT_QUANTIZED = 2  # the same of quantized ones that know all widths
COMPARED = 64  # calibration samples on which new statistics of norms are held against the old ones

Keep = frozenset[tuple[str, float]]


@dataclass(frozen=True)
class Recipe:
    """How smaller networks are made, the same for every policy.

    Attributes:
        groups: The groups of channels of the network.
        criterion: What says which channels are kept.
        loss: What a criterion that needs one takes; None where the objective has none.
        calibration: The batches that norms, scales and the criterion see.
        schemes: The quantization scheme of every layer.
        correction: As `quantizers.quantize` takes it.
        roundings: Likewise, by layer.
        forward: Likewise.
        frozen: The names of norms whose statistics stay.
    """

    groups: ChannelGroups
    criterion: Criterion
    loss: Callable[[Any, Any], Tensor] | None
    calibration: list[Any]
    schemes: Mapping[str, Q.Scheme]
    correction: str | None
    roundings: Mapping[str, str]
    forward: Forward | None
    frozen: frozenset[str]


def frozen_norms(network: nn.Module) -> frozenset[str]:
    """Name the norms of a network whose statistics are to stay (`quantizers.norms.is_frozen`)."""
    names = {module: name for name, module in network.named_modules()}
    return frozenset(names[norm] for norm in running_norms(network) if is_frozen(norm))


class ChannelEvaluator(Evaluator):
    """Evaluates policies that keep all channels as any evaluator does, and others by networks that it makes for them.

    Attributes:
        recipe: How these are made.
    """

    def __init__(self, network: nn.Module, inputs: Samples | None, *, recipe: Recipe, **given: Any) -> None:
        """Take a quantized network, samples, and how smaller networks are made.

        Args:
            network: From `quantizers.quantize`, with all channels.
            inputs: The samples.
            recipe: How smaller ones are made.
            given: What else an `Evaluator` takes.
        """
        self.recipe = recipe
        self._batches: list[Any] = []
        self._forget()
        super().__init__(network, inputs, **given)

    def _forget(self) -> None:
        """Forget all that was made of the network."""
        self._source: nn.Module | None = None
        self._ranking: Ranking | None = None
        self._chosen: dict[tuple[str, int], tuple[int, ...]] = {}
        self._pruned: OrderedDict[Keep, nn.Module] = OrderedDict()
        self._quantized: OrderedDict[Keep, nn.Module] = OrderedDict()
        self._last: Keep = frozenset()

    def _stored(self) -> list[Tensor]:
        """List the tensors that results depend on, the calibration inputs among them."""
        return [*super()._stored(), *leaves(self.recipe.calibration)]

    def _forget_what_changed(self) -> None:
        before: Snapshot | None = self._snapshot
        super()._forget_what_changed()
        if before is not None and self._snapshot is not before:
            self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Give all that it takes to evaluate policies elsewhere; which channels a criterion keeps is known already."""
        empty: OrderedDict[Keep, nn.Module] = OrderedDict()
        return super().__getstate__() | {"_source": None, "_pruned": empty, "_quantized": empty.copy(), "_batches": []}

    @property
    def ranking(self) -> Ranking:
        """Return what the criterion found out about the network's channels."""
        self._forget_what_changed()
        return self._ranked()

    def _ranked(self) -> Ranking:
        if self._ranking is None:
            recipe = self.recipe
            with one_thread():
                self._ranking = recipe.criterion.prepare(
                    self._float(),
                    recipe.groups,
                    recipe.calibration,
                    recipe.loss,
                    torch.Generator().manual_seed(0),
                    forward=recipe.forward,
                )
        return self._ranking

    def _float(self) -> nn.Module:
        """Return the float network of the quantized one, as it is now, with residual quantizers that do nothing yet."""
        if self._source is None:
            made = Q.float_copy(self.network, keep_residuals=True)
            for quantizer in residual_quantizers(made).values():
                quantizer.calibrated = False
            self._source = made.eval()
        return self._source

    def kept(self, keep: Mapping[str, float]) -> dict[str, tuple[int, ...]]:
        """Return the channels that are kept at some shares, by group, as the criterion chooses them."""
        self._forget_what_changed()
        return self._kept_at(keep)

    def _kept_at(self, keep: Mapping[str, float]) -> dict[str, tuple[int, ...]]:
        found = {}
        for name, share in keep.items():
            count = self.recipe.groups[name].count(share)
            if (name, count) not in self._chosen:
                self._chosen[name, count] = self._ranked().keep(name, count)
            found[name] = self._chosen[name, count]
        return found

    def pruned(self, keep: Mapping[str, float]) -> nn.Module:
        """Make the smaller float network, in evaluation mode, with new statistics of its norms.

        The statistics are those of one pass in which every norm normalises each batch by the batch's own, unless its outputs
        come no nearer to those of the network with all channels by it (`quantizers.correction.distance`).

        Args:
            keep: What is kept, by the name of a group.

        Returns:
            A network of the caller's own.
        """
        self._forget_what_changed()
        return Q.copy_network(self._pruned_at(keep))

    def _pruned_at(self, keep: Mapping[str, float]) -> nn.Module:
        """Return a smaller float network, which nobody may change."""
        key = frozenset(keep.items())
        if key not in self._pruned:
            with one_thread():
                made = Q.remove_channels(self._float(), self.recipe.groups, self._kept_at(keep))
                self._refresh(made)
            self._pruned[key] = made
            if len(self._pruned) > KEPT_FLOAT:
                self._pruned.popitem(last=False)
        self._pruned.move_to_end(key)
        return self._pruned[key]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _refresh(self, made: nn.Module) -> None:
        """Take the statistics of a smaller network's norms anew, unless that takes it further from the whole one."""
        names = {module: name for name, module in made.named_modules()}
        norms = [norm for norm in running_norms(made) if names[norm] not in self.recipe.frozen]
        if not norms:
            return
        forward = self.recipe.forward
        batches = self._calibration()
        some = [next(pieces(batches[0], COMPARED))[0]]
        saved = [[buffer.clone() for buffer in norm.buffers(recurse=False)] for norm in norms]
        before = distance(made, self._float(), some, forward)
        take_statistics(made, norms, (_copied(batch) for batch in batches), forward)
        if distance(made, self._float(), some, forward) > before:
            for norm, tensors in zip(norms, saved, strict=True):
                for buffer, tensor in zip(norm.buffers(recurse=False), tensors, strict=True):
                    buffer.copy_(tensor)

    def _calibration(self) -> list[Any]:
        """Return the calibration inputs in batches whose activations stay in the processor's cache."""
        if not self._batches:
            forward = self.recipe.forward
            for batch in self.recipe.calibration:
                self._batches += [part for part, _ in pieces(prepared(batch, self.network, forward), BATCH)]
        return self._batches

    def quantized(self, policy: Q.BitPolicy) -> nn.Module:
        """Make the smaller network of a policy, quantized so that all widths are known; at the policy's it is what is judged.

        Args:
            policy: One that keeps a part of some channels.

        Returns:
            A network of the caller's own, in evaluation mode.
        """
        self._forget_what_changed()
        return self._made(policy, alone=False)

    def _made(self, policy: Q.BitPolicy, *, alone: bool) -> nn.Module:
        """Quantize the smaller network of a policy; `alone`: so that no other bits can be set."""
        recipe = self.recipe
        with one_thread(), _without_warnings():
            made = Q.quantize(
                self._pruned_at(policy.keep),
                policy,
                scheme=dict(recipe.schemes),
                calibrate=self._calibration_given(),
                correction=recipe.correction,
                rounding=dict(recipe.roundings),
                forward=recipe.forward,
                alone=alone,
            )
        return made.eval()

    def _calibration_given(self) -> Any:
        """Return the calibration inputs as `quantizers.quantize` takes them."""
        if self.recipe.forward is not None:
            return self._calibration()
        return [(batch,) for batch in self._calibration()]

    def prepared(self, policy: Q.BitPolicy) -> nn.Module:
        """Give the network that a policy is judged by; of one that keeps a part of some channels, one made for it."""
        if not policy.keep:
            return super().prepared(policy)
        network = self._ready(policy)
        if self.tune is not None:
            network = self.tune(copy.deepcopy(network)).eval()
        if self.objective.attacked:
            network.requires_grad_(False)
        return network

    def _ready(self, policy: Q.BitPolicy) -> nn.Module:
        """Return the quantized network of a policy.

        The first policy that keeps certain channels has a network for its bits alone, which is made fastest. If another
        follows that keeps the same, one is made that knows all widths, with the same result.
        """
        key = frozenset(policy.keep.items())
        if key in self._quantized:
            self._quantized.move_to_end(key)
            Q.set_policy(self._quantized[key], policy)
            return self._quantized[key]
        again, self._last = key == self._last, key
        if self.tune is None and not again:
            return self._made(policy, alone=True)
        self._quantized[key] = self._made(policy, alone=False)
        if len(self._quantized) > KEPT_QUANTIZED:
            self._quantized.popitem(last=False)
        return self._quantized[key]

    def take_ranking(self, other: ChannelEvaluator) -> None:
        """Take over what another evaluator of the same network knows of which channels are kept."""
        self._ranking, self._chosen = other.ranking, dict(other._chosen)


def _copied(batch: Any) -> Any:
    """Copy a batch: a network may normalise what it is given in place."""
    return copy.deepcopy(batch)


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Leave out what was said already when the whole network was quantized."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
