"""Gymnasium environments: importing this package registers `haq/MixedPrecision-v0`."""

import gymnasium

from envs.mixed_precision import MixedPrecisionEnv, SearchProblem

__all__ = ["MixedPrecisionEnv", "SearchProblem"]

gymnasium.register(id="haq/MixedPrecision-v0", entry_point="envs.mixed_precision:MixedPrecisionEnv")
