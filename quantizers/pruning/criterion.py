"""A criterion says which channels of a group are worth keeping; one object serves all groups of a network.

A criterion of one's own is a function of the network and a group, or a subclass that names itself:

    def first_weights(network, group):          # --criterion my_module:first_weights
        layer = network.get_submodule(group.writers[0])
        return layer.weight.flatten(1)[:, 0].abs()

    class FirstWeights(Q.Criterion, name="first-weights"):
        summary = "magnitude of the first weight of a filter"

        def scores(self, network, group):
            return first_weights(network, group)

A package offers one in its pyproject.toml:

    [project.entry-points."quantizers.criteria"]
    first-weights = "my_package.criteria:FirstWeights"
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from quantizers.batches import Batches
from quantizers.calling import Forward
from quantizers.plugins import (
    PluginRow,
    find_installed,
    import_attribute,
    installed,
    is_ours,
    look_into_current_folder,
    names_a_module,
    origin,
    place,
    rows_of,
    unknown,
)
from quantizers.pruning.channels import ChannelGroup, ChannelGroups

GROUP = "quantizers.criteria"  # of entry points

Loss = Callable[[Any, Any], Tensor]  # (outputs, targets) -> the mean over samples


class Ranking:
    """What a criterion found out about the channels of a network: which to keep, whatever the count.

    Subclasses say which by `choose`, which gets counts that are possible only.
    """

    def __init__(self, groups: ChannelGroups) -> None:
        """Take the groups that were ranked.

        Args:
            groups: All groups of the network.
        """
        self.groups = groups

    def keep(self, group: str, count: int) -> tuple[int, ...]:
        """Return the channels of a group to keep, in ascending order.

        Args:
            group: The group's name.
            count: How many channels are kept, a multiple of the group's unit.

        Returns:
            The positions of the channels, `count` of them.

        Raises:
            ValueError: For a group that isn't there, and for a count that the group can't have.
        """
        found = find_group(self.groups, group)
        if isinstance(count, bool) or not isinstance(count, int):
            raise ValueError(f"the count of channels to keep must be an integer, not {count!r}")
        if not 0 < count <= found.channels:
            raise ValueError(f"group {group!r} has {found.channels} channels: keep 1 to {found.channels} of them, not {count}")
        if count == found.channels:
            return tuple(range(count))
        if count % found.unit:
            raise ValueError(f"group {group!r} keeps multiples of {found.unit} channels, not {count}")
        return self.choose(found, count)

    def choose(self, group: ChannelGroup, count: int) -> tuple[int, ...]:
        """Choose the channels of a group to keep.

        Args:
            group: The group.
            count: How many: a number that the group can have, and not all.

        Returns:
            Numbers of channels, ascending.
        """
        raise NotImplementedError


class ScoreRanking(Ranking):
    """Keeps the channels of the highest scores; of equal ones the first. What a smaller count keeps, a larger one does too.

    Attributes:
        scores: By the group's name a score for every channel, float64 on the CPU. Scores of different groups can't be
            compared.
    """

    def __init__(self, groups: ChannelGroups, scores: Mapping[str, Tensor]) -> None:
        """Take the groups, and scores of shape (channels,) by the group's name."""
        super().__init__(groups)
        self.scores = dict(scores)

    def choose(self, group: ChannelGroup, count: int) -> tuple[int, ...]:
        """Return the channels with the highest scores."""
        return highest(self.scores[group.name], group, count)


class Criterion:
    """The base of all criteria. Subclasses name themselves (`class Norm(Criterion, name="l1")`).

    A criterion of scores has a method `scores`, or `rank` if it looks at data; one that chooses sets of
    channels has a method `rank` that returns a `Ranking` of its own.
    """

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""  # one line, for lists
    known: ClassVar[dict[str, type[Criterion]]] = {}
    needs_data: ClassVar[bool] = False  # inputs
    needs_loss: ClassVar[bool] = False  # of outputs and targets

    def __init_subclass__(cls, name: str = "") -> None:
        """Make a subclass known by its name."""
        if name:
            cls.name = name
            Criterion.known[name] = cls

    @staticmethod
    def named(criterion: str | Criterion | Callable[..., Any], *, modules: bool = True) -> Criterion:
        """Find a criterion by name: a known class, then an installed package's, then `module:Name`.

        Args:
            criterion: The name; a criterion, which is returned as it is; a subclass; or a function
                (network, group) -> scores of shape (channels,), the highest of which are kept.
            modules: Whether `module:Name` may be imported. False for a name that no person gave,
                such as one from a file.

        Returns:
            The criterion with its default options.

        Raises:
            ValueError: For an unknown name, listing the close ones; for what is neither a criterion
                nor a function.
            ImportError: For a criterion of somebody else's that can't be imported, with the reason.
        """
        if isinstance(criterion, Criterion):
            return criterion
        if isinstance(criterion, str):
            found = _criterion_class(criterion, modules)
        else:
            found = _class_of(criterion, getattr(criterion, "__name__", repr(criterion)))
        try:
            return found()
        except TypeError as error:
            raise ValueError(f"criterion {criterion!r} can't be made without options: {error}") from error

    def prepare(
        self,
        network: nn.Module,
        groups: ChannelGroups,
        batches: Batches | None = None,
        loss: Loss | None = None,
        generator: torch.Generator | None = None,
        *,
        forward: Forward | None = None,
    ) -> Ranking:
        """Compute once what the criterion has to know of a network, which is left as it is.

        Args:
            network: The network, in float.
            groups: Its groups of channels.
            batches: Inputs, or pairs of inputs and targets, for criteria that need data.
            loss: Function of the network's outputs and the targets: the mean over samples, for criteria that need it.
                Without targets in the batches, these are the network's own answers (`quantizers.pruning.gates`).
            generator: Source of random numbers of criteria that draw any; None: a new one of seed 0.
            forward: What runs the network on a batch, as in `quantize`.

        Returns:
            What tells the channels to keep.

        Raises:
            ValueError: If data or a loss are needed and not given; naming the layer, for weights that aren't finite; naming
                the group, for one that the criterion can't rank.
        """
        if self.needs_data and batches is None:
            raise ValueError(f"criterion {self.name!r} needs data: give batches of inputs, or of pairs (inputs, labels)")
        if self.needs_loss and loss is None:
            raise ValueError(
                f"criterion {self.name!r} needs a loss: give a function of outputs and labels, such as "
                "torch.nn.functional.cross_entropy"
            )
        refuse_infinite_weights(network, groups)
        return self.rank(network, groups, batches, loss, generator, forward)

    def rank(
        self,
        network: nn.Module,
        groups: ChannelGroups,
        batches: Batches | None,
        loss: Loss | None,
        generator: torch.Generator | None,
        forward: Forward | None,
    ) -> Ranking:
        """Rank the channels of all groups: by `scores`, unless a subclass does otherwise.

        Args:
            network: As in `prepare`, and so are the others, which are what the criterion needs.
            groups: Groups of channels.
            batches: Data.
            loss: Function of outputs and targets.
            generator: Source of random numbers.
            forward: What runs the network on a batch.

        Returns:
            What tells the channels to keep.
        """
        made = {}
        for group in groups.groups:
            made[group.name] = checked_scores(self.name, group, self.scores(network, group))
        return ScoreRanking(groups, made)

    def scores(self, network: nn.Module, group: ChannelGroup) -> Tensor:
        """Return a score for every channel of a group; the highest are kept.

        Args:
            network: The network.
            group: The group.

        Returns:
            Scores, shape (channels,).
        """
        raise NotImplementedError(f"criterion {self.name!r} has neither a method `scores` nor `rank`")


def select(ranking: Ranking, groups: ChannelGroups, keep: Mapping[str, float]) -> dict[str, tuple[int, ...]]:
    """Choose the channels to keep at a share of each group.

    Args:
        ranking: What a criterion found out.
        groups: Groups of channels.
        keep: By the group's name, the share of its channels that is kept: above 0 and at most 1.

    Returns:
        By the group's name, the channels to keep in ascending order.

    Raises:
        ValueError: Naming the group, for one that isn't there or can't be pruned, and for a share that can't be.
    """
    chosen = {}
    for name, share in keep.items():
        group = find_group(groups, name)
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise ValueError(f"group {name!r} can't keep a share of {share!r}: give a number above 0 and at most 1")
        chosen[name] = ranking.keep(name, group.count(share))
    return chosen


def find_group(groups: ChannelGroups, name: str) -> ChannelGroup:
    """Return a group by name. Raises ValueError, saying why not or which there are, for a name that no prunable group has."""
    if name in groups:
        return groups[name]
    if name in groups.fixed:
        raise ValueError(f"the channels of {name!r} can't be removed: {groups.fixed[name]}")
    raise ValueError(f"there is no group of channels {str(name)[:80]!r}; there are {', '.join(groups) or 'none'}")


def highest(scores: Tensor, group: ChannelGroup, count: int) -> tuple[int, ...]:
    """Choose the channels of the highest scores.

    Args:
        scores: A score for every channel, shape (channels,); a unit's score is the sum of its channels'.
        group: The group.
        count: How many channels to choose, a multiple of the unit.

    Returns:
        The channels, in ascending order; of equal scores the first.
    """
    of_units = scores.unflatten(0, (-1, group.unit)).sum(1)
    order = torch.argsort(of_units, descending=True, stable=True)
    return channels_of(group, order[: count // group.unit].tolist())


def channels_of(group: ChannelGroup, units: Iterable[int]) -> tuple[int, ...]:
    """Return the channels of some units of a group, in ascending order."""
    chosen: list[int] = []
    for unit in sorted(units):
        chosen += range(unit * group.unit, (unit + 1) * group.unit)
    return tuple(chosen)


def checked_scores(criterion: str, group: ChannelGroup, scores: Any) -> Tensor:
    """Return scores as float64 on the CPU.

    Args:
        criterion: The criterion's name, for the message.
        group: What they are scores of.
        scores: What the criterion gave.

    Returns:
        The scores, of shape (channels,).

    Raises:
        ValueError: Naming the criterion and the group, for anything but one finite number for every channel.
    """
    what = (
        f"criterion {criterion!r} must give a finite score for each of the {group.channels} channels of group {group.name!r}"
    )
    try:
        made = torch.as_tensor(scores).detach().double().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what}, not {type(scores).__name__}") from error
    if made.shape != (group.channels,):
        raise ValueError(f"{what}, not a tensor of shape {tuple(made.shape)}")
    if not made.isfinite().all():
        raise ValueError(f"{what}, not {made[~made.isfinite()][0].item()}")
    return made


def refuse_infinite_weights(network: nn.Module, groups: ChannelGroups) -> None:
    """Raise ValueError, naming the tensor, for one of a module that is part of a group and isn't finite."""
    modules = {member.module for group in groups.groups for member in group.members}
    for name, tensor in network.named_parameters():
        if name.rpartition(".")[0] in modules and not tensor.isfinite().all():
            raise ValueError(f"channels can't be ranked: {name!r} holds values that are not finite")


def criterion_names() -> list[str]:
    """List the names of all criteria that are known or installed; no plug-in is imported.

    Returns:
        The names, our own first.
    """
    return list(dict.fromkeys([*Criterion.known, *(point.name for point in installed(GROUP))]))


def criterion_rows() -> list[PluginRow]:
    """List all criteria that are known or installed, with where they come from and a line each; no plug-in is imported.

    Returns:
        A row for each.
    """
    return rows_of(Criterion.known, GROUP)


def _criterion_class(name: str, modules: bool) -> type[Criterion]:
    if name in Criterion.known:
        return Criterion.known[name]
    point = find_installed(GROUP, name, "criterion")
    if point is not None:
        found = import_attribute(place(point), f"criterion {name!r} of {origin(point)}")
    elif modules and names_a_module(name):
        look_into_current_folder()
        found = import_attribute(name, f"criterion {name!r}")
    else:
        raise ValueError(unknown("criterion", name, criterion_names(), modules))
    made = _class_of(found, name)
    # A file that records the name can be read again.
    Criterion.known[name] = made
    if not is_ours(made):
        made.name = name
    return made


def _class_of(found: Any, name: str) -> type[Criterion]:
    """Make a class of criteria of what somebody wrote: a subclass, or a function (network, group) -> scores."""
    if isinstance(found, type):
        if not issubclass(found, Criterion):
            raise ValueError(f"criterion {name!r} can't be used: it is no subclass of quantizers.Criterion")
        if found.scores is Criterion.scores and found.rank is Criterion.rank:
            raise ValueError(f"criterion {name!r} can't be used: it has neither a method `scores` nor `rank`")
        return found
    if not callable(found):
        raise ValueError(
            f"criterion {name!r} can't be used: give a subclass of quantizers.Criterion, or a function (network, group) -> "
            f"scores, not {type(found).__name__}"
        )

    def scores(self: Criterion, network: nn.Module, group: ChannelGroup) -> Tensor:
        made: Tensor = found(network, group)
        return made

    lines = (getattr(found, "__doc__", None) or "").strip().splitlines()
    summary = next(iter(lines), "")
    content = {"name": name, "summary": summary, "scores": scores, "__module__": getattr(found, "__module__", "")}
    return type("FunctionCriterion", (Criterion,), content)
