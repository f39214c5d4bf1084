"""What an agent sees of any problem: the same features in the same order, so that one agent can act on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium
import numpy as np
from numpy.typing import NDArray

from envs.base import Observation, unit_box
from envs.episodes import feature_names
from envs.mixed_precision import MixedPrecisionEnv
from hw_models.metrics import METRICS
from hw_models.widths import PLACES

# All that `MixedPrecisionEnv` can tell of a decision, of all widths and whatever has a budget.
FEATURES = feature_names(PLACES, METRICS)


class View:
    """Observations of one environment as an agent sees those of any: `FEATURES`, without the bits of every layer.

    What an environment doesn't tell, such as the cost of a width that no layer can take, is 0.
    """

    def __init__(self, features: Sequence[str]) -> None:
        """Find an environment's features among all.

        Args:
            features: Their names, in the order of its observations.
        """
        self._columns = np.array([FEATURES.index(name) for name in features])

    def __call__(self, observations: Observation) -> Observation:
        """Return what an agent sees, shape (..., len(FEATURES)), of observations, shape (..., entries)."""
        seen = np.zeros((*observations.shape[:-1], len(FEATURES)), np.float32)
        seen[..., self._columns] = observations[..., : len(self._columns)]
        return seen


class ViewEnv(gymnasium.ObservationWrapper[Observation, NDArray[np.float32], Observation]):
    """`MixedPrecisionEnv` as `View` shows it: an agent that learned in it can act on another problem."""

    def __init__(self, env: MixedPrecisionEnv) -> None:
        """Wrap an environment."""
        super().__init__(env)
        self._view = View(env.features)
        self.observation_space = unit_box(len(FEATURES))

    def observation(self, observation: Observation) -> Observation:
        """Return what an agent sees of an observation."""
        return self._view(observation)
