"""Gymnasium environments: importing this package registers `haq/MixedPrecision-v0`."""

import gymnasium

from envs.mixed_precision import MixedPrecisionEnv, SearchProblem
from envs.plan import Plan

__all__ = ["MixedPrecisionEnv", "Plan", "SearchProblem"]

gymnasium.register(id="haq/MixedPrecision-v0", entry_point="envs.mixed_precision:MixedPrecisionEnv")
