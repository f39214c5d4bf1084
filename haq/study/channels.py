"""What a run says of channels, where they are searched together with widths: in its files, its tables and its pictures."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

import quantizers as Q
from haq.problem.budget import OutOfReach
from haq.problem.channel_evaluation import ChannelEvaluator, Recipe, frozen_norms
from haq.problem.channels import ChannelProblem
from haq.problem.objective import Objective
from haq.problem.problem import Problem
from haq.problem.samples import Samples
from haq.problem.schemes import calibration_policy
from haq.store.records import ChannelsRecord
from haq.store.units import describe_amount, finite
from haq.study.config import SearchConfig
from hw_models import trust
from hw_models.extras import install_line
from hw_models.widths import places
from quantizers.calling import Forward, inputs_of
from quantizers.kept import check_pruned_to
from quantizers.pruning import Criterion


def check_installed(config: SearchConfig) -> None:
    """Raise ImportError, with what to install, if channels are to be pruned and nothing here can follow them."""
    if config.prune is not None and importlib.util.find_spec("torch_pruning") is None:
        raise ImportError(f"--prune needs torch-pruning, which isn't installed: {install_line('prune')}")


def is_joint(problem: Problem) -> bool:
    """Say whether channels are searched together with widths."""
    return isinstance(problem, ChannelProblem)


def smaller(problem: Problem, policy: Q.BitPolicy) -> Problem:
    """Return the problem in which the channels that a policy keeps are decided: its layers and costs are the smaller ones.

    Args:
        problem: What is searched.
        policy: One of its policies.

    Returns:
        The problem itself, where no channels are searched or the policy keeps all.
    """
    if not isinstance(problem, ChannelProblem) or not policy.keep:
        return problem
    return problem.at(policy.keep)


def bits_only(problem: Problem) -> Problem:
    """Return the problem of widths alone, with all channels, within the same budgets; it shares what was evaluated.

    Args:
        problem: A problem of channels and widths.

    Returns:
        The other problem; the same one where no channels are searched.

    Raises:
        OutOfReach: A ValueError, if widths alone can't meet the budgets.
    """
    if not isinstance(problem, ChannelProblem):
        return problem
    alone = problem.at({})
    limit = alone.limits[0]
    if limit.is_given and not limit.holds(alone.smallest):
        least, amount = (describe_amount(amount, limit.metric) for amount in (alone.smallest, limit.amount))
        raise OutOfReach(f"with all channels {limit.metric} is at least {least}, and the budget is {amount}")
    if alone.several is not None and alone.several.conflict() is not None:
        raise OutOfReach("with all channels the budgets can't be met together")
    return alone


def smaller_float(problem: Problem, policy: Q.BitPolicy) -> nn.Module | None:
    """Return the float network with the channels that a policy keeps, from which it is quantized; None if it keeps all."""
    if not isinstance(problem, ChannelProblem) or not policy.keep:
        return None
    return problem.pruned(policy.keep)


def smaller_evaluator(
    network: nn.Module,
    teacher: nn.Module,
    calibration: list[Any],
    samples: Samples,
    *,
    criterion: str,
    objective: Objective,
    schemes: Mapping[str, Q.Scheme],
    correction: str | None,
    roundings: Mapping[str, str],
    forward: Forward | None,
) -> ChannelEvaluator:
    """Make what quantizes networks of fewer channels, where no hardware is loaded; it does as that of a problem does.

    Args:
        network: The float network, with residual quantizers where there are to be some.
        teacher: The float network without.
        calibration: Batches of inputs, as a problem keeps them.
        samples: A few samples.
        criterion: What says which channels are kept.
        objective: What policies are judged by.
        schemes: Of every layer.
        correction: As `quantizers.quantize` takes it.
        roundings: Of every layer.
        forward: Computes outputs of (network, batch); None: the network is called with the inputs.

    Returns:
        The evaluator.
    """
    example = samples.example()
    if forward is None:
        example = inputs_of(example, teacher)
    if ":" in criterion and criterion not in Criterion.known:
        trust.allow(criterion, "criterion")
    loss = None
    if objective.takes_scores:
        loss = objective.training_loss
    recipe = Recipe(
        groups=Q.channel_groups(teacher, example, forward=forward),
        criterion=Criterion.named(criterion),
        loss=loss,
        calibration=calibration,
        schemes=schemes,
        correction=correction,
        roundings=roundings,
        forward=forward,
        frozen=frozen_norms(teacher),
    )
    whole = Q.quantize(
        network,
        calibration_policy(schemes),
        scheme=dict(schemes),
        calibrate=calibration,
        correction=correction,
        rounding=dict(roundings),
        forward=forward,
    )
    return ChannelEvaluator(whole, samples, recipe=recipe, teacher=teacher, objective=objective, forward=forward)


def group_count(problem: Problem) -> int:
    """Return how many groups of channels a history of a problem tells of; 0 where none are searched."""
    if not isinstance(problem, ChannelProblem):
        return 0
    return len(problem.channel_decisions)


def kept_shares(problem: Problem, policy: Q.BitPolicy) -> tuple[float, ...]:
    """Return the share that a policy keeps of every group that is searched, as a row of a history has them."""
    if not isinstance(problem, ChannelProblem):
        return ()
    return tuple(policy.keep.get(decision.group, 1.0) for decision in problem.channel_decisions)


def keep_of(names: Sequence[str], shares: Sequence[float]) -> dict[str, float]:
    """Return what a policy keeps, by group, of the shares of a row of a history.

    Args:
        names: The groups, in the order of the shares.
        shares: Those of the row; none where no channels were searched.

    Returns:
        The shares by group, without those of groups that keep all.
    """
    if not shares:
        return {}
    return {name: share for name, share in zip(names, shares, strict=True) if share < 1}


def group_names(problem: Problem) -> list[str]:
    """List the groups of channels that are searched, in the order in which a history tells of them."""
    if not isinstance(problem, ChannelProblem):
        return []
    return [decision.group for decision in problem.channel_decisions]


def check_keep(policy: Q.BitPolicy, problem: Problem, source: Path) -> None:
    """Raise ValueError, naming the file that a policy is from and the group, for channels that can't be pruned in a problem.

    Args:
        policy: The policy.
        problem: What it is of.
        source: The file that the policy is from.
    """
    if not policy.keep:
        return
    if not isinstance(problem, ChannelProblem):
        name = next(iter(policy.keep))
        raise ValueError(f"{source} keeps a part of the channels of {name[:80]!r}, and no channels are searched here")
    try:
        problem.numbers_of(policy.keep)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def check_keeps(qnetwork: nn.Module, policy: Q.BitPolicy) -> None:
    """Raise ValueError, naming the group, unless a network has as many channels as a policy keeps."""
    kept = Q.kept_channels(qnetwork)
    if kept and not policy.keep:
        raise ValueError(f"the policy keeps all channels, and the network lost some of group {next(iter(kept))[:80]!r}")
    check_pruned_to(qnetwork, policy.keep)


def allows_keep(policy: Q.BitPolicy, problem: Problem) -> bool:
    """Say whether what a policy keeps of channels can be chosen in a problem."""
    try:
        check_keep(policy, problem, Path())
    except ValueError:
        return False
    return True


def pruning_entry(problem: Problem) -> dict[str, Any]:
    """Describe as plain data which channels may be pruned (`haq.store.records.PruningRecord`); nothing if none may be."""
    if not isinstance(problem, ChannelProblem):
        return {}
    groups = [
        {
            "name": decision.group,
            "channels": int(problem.channel_groups[decision.group].channels),
            "shares": [float(share) for share in decision.shares],
            "layers": list(problem.channel_groups[decision.group].writers),
        }
        for decision in problem.channel_decisions
    ]
    entry = {"criterion": problem.criterion.name, "groups": groups, "fixed": dict(problem.not_pruned)}
    return {"pruning": entry}


def channels_of(problem: Problem, policy: Q.BitPolicy) -> ChannelsRecord | None:
    """Tell what a policy keeps of the channels of a network, and what is left of every layer.

    Args:
        problem: What was searched.
        policy: One of its policies.

    Returns:
        The record; None where no channels are searched.
    """
    if not isinstance(problem, ChannelProblem):
        return None
    made = smaller(problem, policy)
    w, a = problem.bit_arrays(policy)
    costs = made.cost[np.arange(len(w)), places(w), places(a)]
    layers = [
        {
            "name": whole.name,
            "inputs": left.in_channels,
            "of_inputs": whole.in_channels,
            "outputs": left.out_channels,
            "of_outputs": whole.out_channels,
            "macs": left.macs,
            "parameters": left.parameters,
            "cost": finite(float(cost)),
        }
        for whole, left, cost in zip(problem.workload.layers, made.workload.layers, costs, strict=True)
    ]
    groups = [problem.channel_groups[decision.group] for decision in problem.channel_decisions]
    counts = [group.count(policy.keep.get(group.name, 1.0)) for group in groups]
    content = {
        "criterion": problem.criterion.name,
        "kept": sum(counts),
        "of_channels": sum(group.channels for group in groups),
        "groups": len(groups),
        "pruned": sum(count < group.channels for count, group in zip(counts, groups, strict=True)),
        "macs": made.workload.macs,
        "of_macs": problem.workload.macs,
        "parameters": sum(layer.own_parameters for layer in made.workload.layers),
        "of_parameters": sum(layer.own_parameters for layer in problem.workload.layers),
        "layers": layers,
    }
    return ChannelsRecord.from_dict(content, "what is kept of channels")


def words_of(entry: Mapping[str, Any]) -> str:
    """Say what is kept of channels, as result.json has it."""
    return ChannelsRecord.from_dict(entry, "what is kept of channels").words
