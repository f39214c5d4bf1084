"""Gymnasium environments: importing this package registers their ids.

These are `haq/MixedPrecision-v0`, `haq/PruneAndQuantize-v0` and `haq/HAQ-v0`.
"""

import gymnasium

from envs.base import SearchProblem
from envs.episodes import Episodes
from envs.haq_paper import HaqEnv
from envs.joint_episodes import JointEpisodes, JointProblem
from envs.mixed_precision import MixedPrecisionEnv
from envs.plan import Plan, PlanWithin
from envs.prune_and_quantize import PruneAndQuantizeEnv
from envs.view import FEATURES, View, ViewEnv

__all__ = [
    "FEATURES",
    "Episodes",
    "HaqEnv",
    "JointEpisodes",
    "JointProblem",
    "MixedPrecisionEnv",
    "Plan",
    "PlanWithin",
    "PruneAndQuantizeEnv",
    "SearchProblem",
    "View",
    "ViewEnv",
]

gymnasium.register(id="haq/MixedPrecision-v0", entry_point="envs.mixed_precision:MixedPrecisionEnv")
gymnasium.register(id="haq/HAQ-v0", entry_point="envs.haq_paper:HaqEnv")
gymnasium.register(id="haq/PruneAndQuantize-v0", entry_point="envs.prune_and_quantize:PruneAndQuantizeEnv")
