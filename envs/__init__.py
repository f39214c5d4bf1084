"""Gymnasium environments: importing this package registers `haq/MixedPrecision-v0` and `haq/HAQ-v0`."""

import gymnasium

from envs.base import SearchProblem
from envs.episodes import Episodes
from envs.haq_paper import HaqEnv
from envs.mixed_precision import MixedPrecisionEnv
from envs.plan import Plan, PlanWithin
from envs.view import FEATURES, View, ViewEnv

__all__ = ["FEATURES", "Episodes", "HaqEnv", "MixedPrecisionEnv", "Plan", "PlanWithin", "SearchProblem", "View", "ViewEnv"]

gymnasium.register(id="haq/MixedPrecision-v0", entry_point="envs.mixed_precision:MixedPrecisionEnv")
gymnasium.register(id="haq/HAQ-v0", entry_point="envs.haq_paper:HaqEnv")
