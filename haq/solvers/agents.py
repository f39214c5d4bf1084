"""HAQ's agent: DDPG, from Stable-Baselines3, on `haq/MixedPrecision-v0`.

From HAQ (Wang et al., CVPR 2019, section 3.5): hidden layers of 400 and 300, replay of transitions in batches of 64, soft
updates of 0.01, no discount, and truncated-normal exploration around the actor's action that decays by a factor per
episode. Two things are different, because a search has hundreds of episodes and not thousands:

* The return of an episode is given to every one of its steps (n-step returns as long as the episode). The reward comes at
  the end only; learned one step at a time it doesn't arrive in time.
* The agent doesn't start from nothing. Up to half of its evaluations go into the sensitivities that greedy descent and the
  integer programme work with; the policies these propose are its first episodes, and its actor is first taught to repeat
  them. Whatever it finds beyond that is its own.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from stable_baselines3 import DDPG
from stable_baselines3.common.noise import ActionNoise

import envs
import quantizers as Q
from haq.problem import Problem
from haq.solvers import Session, greedy, ilp, sensitivity

HIDDEN = [400, 300]
ACTOR_RATE, CRITIC_RATE = 3e-4, 1e-3
BATCH, TAU = 64, 0.01
UPDATES = 2  # gradient steps per step of the environment
SIGMA, DECAY = 0.4, 0.98
IMITATION_STEPS = 300


class TruncatedNormalNoise(ActionNoise):
    """Normal noise around an action, cut off where the action would leave [-1, 1]; `sigma` decays with every episode.

    Unlike noise that is added and clipped, it puts no weight on the bounds themselves.
    """

    def __init__(self, sigma: float, decay: float, random: np.random.Generator) -> None:
        super().__init__()
        self.sigma, self.decay, self.random = sigma, decay, random

    def around(self, action: NDArray[np.float32]) -> NDArray[np.float32]:
        """A draw for every entry of an action, by the inverse of the distribution function."""
        low, high = ndtr((-1 - action) / self.sigma), ndtr((1 - action) / self.sigma)
        drawn = action + self.sigma * ndtri(low + (high - low) * self.random.random(action.shape))
        return np.clip(drawn, -1, 1).astype(np.float32)

    def __call__(self) -> NDArray[np.float32]:
        raise RuntimeError("truncated noise depends on the action it is drawn around: call around(action)")

    def reset(self) -> None:
        """End of an episode (Stable-Baselines3 calls this)."""
        self.sigma *= self.decay


class HaqDDPG(DDPG):
    """DDPG that explores with TruncatedNormalNoise, whose draw needs the actor's action, and learns at two rates."""

    def _update_learning_rate(self, optimizers: Any) -> None:
        for optimizer, rate in ((self.actor.optimizer, ACTOR_RATE), (self.critic.optimizer, CRITIC_RATE)):
            for group in optimizer.param_groups:
                group["lr"] = rate

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        action, stored = super()._sample_action(learning_starts, None, n_envs)
        if self.num_timesteps < learning_starts or not isinstance(action_noise, TruncatedNormalNoise):
            return action, stored
        noisy = action_noise.around(stored)
        # The action space is [-1, 1]: what is done and what is stored are the same.
        return noisy, noisy


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Put the global generators back: Stable-Baselines3 seeds and uses them."""
    python, array = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


@kept_random_state()
def solve(problem: Problem, session: Session, seed: int) -> None:
    """Sensitivities, the rivals' policies as demonstrations, then one episode per evaluation that is left."""
    counted = copy.copy(problem)
    counted.evaluate = session.evaluate  # type: ignore[method-assign]
    env = gymnasium.make("haq/MixedPrecision-v0", problem=counted)
    inner = env.unwrapped
    assert isinstance(inner, envs.MixedPrecisionEnv)
    steps = len(inner.decisions)
    agent = HaqDDPG(
        "MlpPolicy",
        env,
        learning_rate=CRITIC_RATE,
        buffer_size=(session.evaluations + 2) * steps,
        learning_starts=0,
        batch_size=BATCH,
        tau=TAU,
        gamma=1.0,
        n_steps=steps,
        train_freq=(1, "episode"),
        gradient_steps=UPDATES * steps,
        action_noise=TruncatedNormalNoise(SIGMA, DECAY, np.random.default_rng(seed)),
        policy_kwargs={"net_arch": HIDDEN},
        seed=seed,
        device="cpu",
    )
    rise = sensitivity.measure(problem, session, keep=max(session.evaluations // 2, 1))
    for proposal in dict.fromkeys((ilp.propose(problem, rise), greedy.propose(problem, rise))):
        if session.left:
            demonstrate(agent, inner, proposal)
    imitate(agent)
    agent.learn(session.left * steps)


def demonstrate(agent: DDPG, env: envs.MixedPrecisionEnv, policy: Q.BitPolicy) -> None:
    """Play the episode that decides a policy, and put it into the agent's replay buffer."""
    assert agent.replay_buffer is not None
    observation, done = env.reset()[0], False
    while not done:
        w, a = policy[env.next_layer()]
        assert w is not None
        assert a is not None
        action = env.action_for(w, a)
        following, reward, done, _, info = env.step(action)
        agent.replay_buffer.add(observation[None], following[None], action[None], np.array([reward]), np.array([done]), [info])
        observation = following


def imitate(agent: DDPG) -> None:
    """Teach the actor the actions in the replay buffer."""
    assert agent.replay_buffer is not None
    for group in agent.actor.optimizer.param_groups:
        group["lr"] = ACTOR_RATE
    size = agent.replay_buffer.size()
    observations = torch.as_tensor(agent.replay_buffer.observations[:size, 0])
    actions = torch.as_tensor(agent.replay_buffer.actions[:size, 0])
    for _ in range(IMITATION_STEPS):
        loss = (agent.actor(observations) - actions).square().mean()
        agent.actor.optimizer.zero_grad()
        loss.backward()
        agent.actor.optimizer.step()
    agent.actor_target.load_state_dict(agent.actor.state_dict())
