"""Solvers: all of them get the same problem and the same number of evaluations, and report in the same way."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import lazy_loader

from hw_models.registry import Registry, requires

if TYPE_CHECKING:
    from haq.solvers import cheapest as cheapest
    from haq.solvers import choice as choice
    from haq.solvers import ilp as ilp
    from haq.solvers.base import Session as Session
    from haq.solvers.base import Solver as Solver
    from haq.solvers.base import Trial as Trial

# The environments that agents can learn in.
PLAN = "plan"
ENVS = (PLAN, "haq")
_lacking_names = requires("solve", "uses_sensitivities", "draws", "chooses_ahead")


def lacking(thing: Any) -> str:
    """Say what a solver, or its class, lacks, in words that continue "it lacks"; empty text for nothing."""
    if missing := _lacking_names(thing):
        return missing
    arguments = ["problem", "session", "seed"]
    if isinstance(thing, type) and inspect.isfunction(inspect.getattr_static(thing, "solve")):
        arguments.insert(0, "self")
    try:
        inspect.signature(thing.solve).bind(*arguments)
    except (TypeError, ValueError):
        # Something compiled doesn't say what it takes.
        if not inspect.isbuiltin(thing.solve):
            return "a method solve that takes (problem, session, seed)"
    return ""


# A solver's libraries are needed only if it is asked for.
SOLVERS: Registry[type[Solver]] = Registry(
    "solver",
    "haq.solvers",
    {
        "ddpg": (
            "haq.solvers.agents:DDPG",
            "reinforcement learning: an actor and its critic, which imagine episodes, beside the surrogate",
        ),
        "td3": ("haq.solvers.agents:TD3", "the same with two critics and a delayed actor"),
        "sac": ("haq.solvers.agents:SAC", "the same with an actor that is rewarded for staying random"),
        "surrogate": (
            "haq.solvers.surrogate:Surrogate",
            "a Gaussian process learns from every trial, and chooses the next (Bayesian optimization)",
        ),
        "ilp": ("haq.solvers.ilp:IntegerProgramme", "measured sensitivities, and the policy that is optimal if they add up"),
        "greedy": (
            "haq.solvers.greedy:Greedy",
            "measured sensitivities, and step by step what costs the least for what it saves",
        ),
        "evolution": ("haq.solvers.evolution:Evolution", "policies are crossed and mutated, and the best survive"),
        "random": ("haq.solvers.random_search:RandomSearch", "random policies that fill the budget"),
        "exhaustive": ("haq.solvers.exhaustive:Exhaustive", "every policy within the budget, where there are few"),
    },
    check=lacking,
)

__getattr__, _, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "agents",
        "base",
        "cheapest",
        "contribution",
        "choice",
        "evolution",
        "exhaustive",
        "greedy",
        "hessian",
        "ilp",
        "iterated",
        "random_search",
        "sensitivity",
        "surrogate",
    ],
    submod_attrs={"base": ["Session", "Solver", "Trial"]},
)
__all__ += ["ENVS", "PLAN", "SOLVERS"]


def __dir__() -> list[str]:
    return sorted(__all__)
