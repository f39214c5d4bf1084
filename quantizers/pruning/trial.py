"""Trying out groups of channels: what removal gives must be what masking gives, or the group is fixed."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from quantizers.batches import copied
from quantizers.calling import Forward, call, leaves, map_tensors
from quantizers.copying import copy_network
from quantizers.pruning.channels import ChannelGroup, ChannelGroups
from quantizers.pruning.removal import mask_channels, remove_channels

SEED = 1
SAME = 1e-9  # of the largest value, in double precision
SAME_SINGLE = 1e-4
WHOLE = 2  # trials in which channels of all groups are removed
DIFFERS = "without them the network computes something else than with zeros in their places"


class Trial:
    """Tries out whether groups can be removed, on a copy of the network whose weights are drawn anew.

    Weights that are zero or all alike, as in networks that aren't trained yet, would hide mistakes.
    """

    def __init__(self, network: nn.Module, example: Any, forward: Forward | None) -> None:
        """Draw weights.

        Args:
            network: A copy in evaluation mode, which stays as it is.
            example: Its inputs.
            forward: What runs it on them; None: `call`.

        Raises:
            ValueError: If the network's outputs for the example aren't finite.
        """
        self.run = forward or call
        self.generator = torch.Generator().manual_seed(SEED)
        for precision, same in ((torch.float64, SAME), (None, SAME_SINGLE)):
            for redraw in (True, False):
                self.same = same
                self.network, self.example = copy_network(network), example
                if precision is not None:
                    self.network = self.network.to(precision)
                    self.example = map_tensors(example, _as_double)
                if redraw:
                    self._draw(self.network)
                if self._works():
                    return
        raise ValueError("channels of the network can't be removed: its outputs for the example aren't finite")

    def _works(self) -> bool:
        try:
            return all(bool(output.isfinite().all()) for output in self._outputs(self.network))
        except Exception:  # some networks compute in one precision only
            return False

    @torch.no_grad()
    def _draw(self, network: nn.Module) -> None:
        """Give a network random weights at which signals keep about their size."""
        for module in network.modules():
            for name, tensor in module.named_parameters(recurse=False):
                tensor.copy_(self._drawn(module, name, tensor))
            if isinstance(module, _BatchNorm | _InstanceNorm) and module.running_mean is not None:
                assert module.running_var is not None
                module.running_mean.copy_(0.1 * self._normal(module.running_mean))
                module.running_var.copy_(self._about_one(module.running_var))

    def _drawn(self, module: nn.Module, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if "norm" in type(module).__name__.lower() and name == "weight":
            return self._about_one(tensor)
        if tensor.dim() > 1 and name == "weight":
            return self._normal(tensor) * (2 / tensor[0].numel()) ** 0.5
        if tensor.dim() > 1:
            return tensor + 0.1 * self._normal(tensor)
        return 0.3 * self._normal(tensor)

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator, dtype=torch.float64).to(like)

    def _about_one(self, like: Tensor) -> Tensor:
        return (0.5 + torch.rand(like.shape, generator=self.generator, dtype=torch.float64)).to(like)

    def _outputs(self, network: nn.Module) -> list[Tensor]:
        """Run a network; equal numbers are drawn in every run."""
        with torch.no_grad(), torch.random.fork_rng([]):
            torch.manual_seed(SEED)
            return leaves(self.run(network, copied(self.example)))

    def failures(self, groups: Sequence[ChannelGroup]) -> dict[str, str]:
        """Return the groups that can't be removed, with the reason."""
        found = self._alone(list(groups))
        sound = [group for group in groups if group.name not in found]
        # Some may fail only together: leave out the one that makes the others fail.
        while reason := self._failure(sound):
            low, high = 0, len(sound)  # the first `low` don't fail, the first `high` do
            while high - low > 1:
                middle = (low + high) // 2
                if self._failure(sound[:middle]):
                    high = middle
                else:
                    low = middle
            found[sound[low].name] = self._failure(sound[: low + 1]) or reason
            del sound[low]
        return found

    def _alone(self, groups: list[ChannelGroup]) -> dict[str, str]:
        """Return those of some groups that fail by themselves, by halving what fails."""
        reason = self._failure(groups)
        if not reason:
            return {}
        if len(groups) == 1:
            return {groups[0].name: reason}
        middle = len(groups) // 2
        return {**self._alone(groups[:middle]), **self._alone(groups[middle:])}

    def _failure(self, groups: Sequence[ChannelGroup]) -> str:
        """Say in what way removal of channels of some groups isn't what masking is; nothing if it is.

        Channels of all of them are removed, once the first and once not, and then of some groups and not of others, so that
        of any two groups once the one is smaller and the other as it was: two halves that must stay as large are no two
        groups.
        """
        for number in range(WHOLE + (len(groups) - 1).bit_length()):
            chosen = [group for place, group in enumerate(groups) if number < WHOLE or place >> (number - WHOLE) & 1]
            kept = {group.name: self._some(group, number) for group in chosen if group.units > 1}
            if kept and (reason := self._difference(groups, kept)):
                return reason
        return ""

    def _difference(self, groups: Sequence[ChannelGroup], kept: Mapping[str, list[int]]) -> str:
        """Say in what way removal isn't what masking is for one choice of channels; nothing if it is."""
        all_groups = ChannelGroups(tuple(groups), {})
        try:
            given = self._outputs(remove_channels(self.network, all_groups, kept))
        except Exception as error:  # whatever a network raises
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:120]
            return f"the network can't run without some of them ({reason})"
        expected = self._outputs(mask_channels(self.network, all_groups, kept))
        if len(given) != len(expected):
            return DIFFERS
        for one, other in zip(given, expected, strict=True):
            if one.shape != other.shape or not _are_close(one, other, self.same):
                return DIFFERS
        return ""

    def _some(self, group: ChannelGroup, number: int) -> list[int]:
        """Choose channels of a group to keep, others for every name and number; the first unit only for odd numbers."""
        generator = torch.Generator().manual_seed(zlib.crc32(group.name.encode()) + number)
        count = int(torch.randint(1, group.units, (1,), generator=generator))
        if number % 2:
            units = [0, *(1 + torch.randperm(group.units - 1, generator=generator)[: count - 1]).tolist()]
        else:
            units = (1 + torch.randperm(group.units - 1, generator=generator)[:count]).tolist()
        return [unit * group.unit + place for unit in sorted(units) for place in range(group.unit)]


def _as_double(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor.double()
    return tensor


def _are_close(one: Tensor, other: Tensor, same: float) -> bool:
    if not one.is_floating_point():
        return torch.equal(one, other)
    largest = float(other.abs().max()) if other.numel() else 0.0
    return torch.allclose(one, other, rtol=0, atol=same * largest)
