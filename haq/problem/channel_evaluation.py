"""What a policy that keeps a part of the channels is worth: of the really smaller network, made for every such policy.

Channels are removed, the statistics of norms are taken anew in one pass over calibration inputs, and the layers are quantized
at just the policy's bits, with the scheme, the rounding and the correction of all other policies. What comes out depends on
the policy alone. An evaluation shall take about as long as one of the network as it is, which has been calibrated before: so a
part of the calibration inputs, evenly spread, is all that is looked at (`REFRESHED`, `CALIBRATED`).
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
from haq.problem.samples import BATCH, Samples, pieces, samples_in
from haq.problem.snapshot import Snapshot
from quantizers.batches import called, copied, prepared
from quantizers.calling import Forward, leaves, map_tensors
from quantizers.correction import distance
from quantizers.kept import RECORD
from quantizers.norms import is_frozen, running_norms, take_statistics
from quantizers.pruning.channels import ChannelGroups
from quantizers.pruning.criterion import Criterion, Ranking
from quantizers.residuals import residual_quantizers

KEPT_FLOAT = 4  # float networks with fewer channels that are kept, those asked for last
KEPT_QUANTIZED = 2  # the same of quantized ones that know all widths
REFRESHED = 256  # calibration samples by which statistics of norms are taken, about
CALIBRATED = 128  # the same of scales and corrections; where weights are rounded by what layers read, all samples are taken
COMPARED = 64  # on how many of these new statistics are held against the old ones

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
        self._thinned: dict[int, list[Any]] = {}
        self._forget()
        super().__init__(network, inputs, **given)

    def _forget(self) -> None:
        """Forget all that was made of the network and the calibration inputs."""
        self._thinned.clear()
        self._source: nn.Module | None = None
        self._outputs: nn.Module | None = None
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
        return super().__getstate__() | {
            "_source": None,
            "_outputs": None,
            "_pruned": empty,
            "_quantized": empty.copy(),
            "_thinned": {},
        }

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
            # Shares are of the channels that the problem's network has, whatever was removed before.
            made.__dict__.pop(RECORD, None)
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
        batches = self._calibration(REFRESHED)
        some = [next(pieces(batches[0], COMPARED))[0]]
        saved = [[buffer.clone() for buffer in norm.buffers(recurse=False)] for norm in norms]
        whole = self._float()
        if forward is None:
            if self._outputs is None:
                self._outputs = _Outputs(called(whole, copied(some[0])))
            whole = self._outputs
        before = distance(made, whole, some, forward)
        take_statistics(made, norms, map(copied, batches), forward)
        if distance(made, whole, some, forward) > before:
            for norm, tensors in zip(norms, saved, strict=True):
                for buffer, tensor in zip(norm.buffers(recurse=False), tensors, strict=True):
                    buffer.copy_(tensor)

    def _calibration(self, most: int) -> list[Any]:
        """Return every so manyth calibration input, about so many, in batches whose activations stay in the cache."""
        if most not in self._thinned:
            batches = self.recipe.calibration
            step = max(1, sum(map(samples_in, batches)) // most)
            made: list[Any] = []
            for batch in batches:
                taken = prepared(_every(batch, step), self.network, self.recipe.forward)
                # Parts of one size: a small one at the end would have other statistics.
                count = -(-samples_in(taken) // BATCH)
                made += [part for part, _ in pieces(taken, -(-samples_in(taken) // count))]
            self._thinned[most] = made
        return self._thinned[most]

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
        most = CALIBRATED
        if any(rounding != "nearest" for rounding in self.recipe.roundings.values()):
            most = sum(map(samples_in, self.recipe.calibration))
        if self.recipe.forward is not None:
            return self._calibration(most)
        return [(batch,) for batch in self._calibration(most)]

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


class _Outputs(nn.Module):
    """Stands for a network where its outputs on the one batch that is asked for are known."""

    def __init__(self, outputs: Any) -> None:
        super().__init__()
        self._known = outputs

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Return the outputs."""
        return self._known


def _every(batch: Any, step: int) -> Any:
    """Return every so manyth sample of a batch; of one that can't be divided so, as many at its beginning."""
    count = samples_in(batch)
    wanted = -(-count // step)

    def taken(tensor: Tensor) -> Tensor:
        if tensor.dim() and len(tensor) == count:
            return tensor[::step]
        return tensor

    made = map_tensors(batch, taken)
    if samples_in(made) == wanted:
        return made
    return next(pieces(batch, wanted))[0]


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Leave out what was said already when the whole network was quantized."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
