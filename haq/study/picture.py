"""The picture of a policy: bits per layer over each layer's share of the cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import quantizers as Q
from haq.problem.problem import Problem
from haq.reporting import pictures
from haq.store.records import PolicyRecord, ProblemRecord
from haq.study.channels import channels_of
from haq.study.task import outline

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_policy(problem: Problem, policy: Q.BitPolicy, described: Mapping[str, Any] | None = None) -> Figure:
    """Draw bits per layer, weights up and activations down, over each layer's share of the cost, and what channels are kept.

    Args:
        problem: What the policy is of.
        policy: Its bits.
        described: The problem as `haq.study.task.outline` describes it, where network and data have better names than the
            problem knows.

    Returns:
        A figure that belongs to no window; a notebook shows it.
    """
    record = ProblemRecord.from_dict(described or outline(problem), "the problem")
    return pictures.draw_policy(record, PolicyRecord.of(policy), channels_of(problem, policy))


def save_picture(problem: Problem, policy: Q.BitPolicy, path: Path, described: Mapping[str, Any] | None = None) -> None:
    """Write the picture of a policy as a PNG file, beside and renamed.

    Args:
        problem: What was searched.
        policy: What is shown of it.
        path: The file.
        described: As of `draw_policy`.
    """
    pictures.save(draw_policy(problem, policy, described), path)
