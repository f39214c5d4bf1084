"""An agent from Stable-Baselines3 as a proposer of candidates: it learns from episodes, most of which it only imagines.

An episode of `haq/MixedPrecision-v0` decides one policy, and costs nothing until that policy is evaluated. So an agent plays
many of them for each evaluation, all at once (`envs.Episodes`). What an imagined policy is worth the surrogate predicts
(`haq.solvers.surrogate.Model.reward`), anew whenever it has learned more: model-based reinforcement learning, as in Dyna
(Sutton, SIGART Bulletin 1991), with a model of the return. What it plays last are its proposals, and the surrogate's expected
improvement chooses among them and those of all other generators.

The return of an episode is given to every one of its steps, since the reward comes at the end only. Returns are brought to one
scale, on which critics learn at any unit and at any distance from the float network.

An agent sees the same features of every problem, in the same order (`envs.View`), so that one agent can go on with another
problem. Of channels and widths (`haq/PruneAndQuantize-v0`) it sees what that environment shows, and begins as one that knows
nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import gymnasium
import numpy as np
import stable_baselines3
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.type_aliases import ReplayBufferSamples

import envs
from envs.base import reward_of, unit_box
from envs.view import FEATURES
from haq.problem.channels import chooses_channels
from haq.problem.evaluator import Evaluation, one_thread
from haq.problem.problem import Problem
from haq.solvers.agent_file import AgentFile
from haq.solvers.space import Options
from haq.solvers.surrogate import Model

Floats = NDArray[np.float32]

HIDDEN = [64, 64]
ACTOR_RATE = 6e-4
CRITIC_RATE = 3e-3
TAU = 0.01
BATCH = 256  # steps of episodes
UPDATES = 8  # gradient steps per evaluation
CRITICS_FIRST = 100  # gradient steps in which critics learn alone: what they say in the beginning leads nowhere
BLIND = 1e-2  # by which the weights of the actor's last layer are multiplied: it begins with the plan
IMAGINED = 32  # episodes per evaluation that are learned from
ELITE = 16  # best policies among what is remembered, from which half of what is learned is drawn
FIRST = 3  # policies of a pretrained agent that a search begins with
MOST_EPISODES = 512  # that are remembered
SIGMA = 1.0  # the largest of the noise around the actor's actions
LEAST_SIGMA = 0.1
FARTHEST = 3.0  # standard deviations from the mean beyond which a return counts as much
TINY = 1e-12


class OwnRates:
    """An agent whose optimizers keep the learning rates that they were given.

    Stable-Baselines3 would set one rate, the critic's, for all of them before every training.
    """

    def _update_learning_rate(self, optimizers: Any) -> None:
        pass


class DDPG(OwnRates, stable_baselines3.DDPG):
    """DDPG with learning rates of its own for actor and critic."""


class TD3(OwnRates, stable_baselines3.TD3):
    """TD3 with learning rates of its own for actor and critic."""


class SAC(OwnRates, stable_baselines3.SAC):
    """SAC with learning rates of its own for actor and critic."""


AGENTS: dict[str, type[OffPolicyAlgorithm]] = {"ddpg": DDPG, "td3": TD3, "sac": SAC}


class Memory(ReplayBuffer):
    """What an agent learns from: steps of whole episodes, each with its episode's return.

    Stable-Baselines3 samples from it as from its own; that every step ends an episode makes the return its value.

    Attributes:
        options: The policy of every episode, shape (episodes, decisions).
        real: The reward of every episode that was evaluated, NaN of those that were imagined, shape (episodes,).
    """

    def __init__(self, space: Any, action_space: Any, draws: np.random.Generator) -> None:
        """Begin with no episode.

        Args:
            space: Of what the agent sees.
            action_space: Of what it does.
            draws: What is drawn from.
        """
        super().__init__(1, space, action_space, "cpu")
        self.draws = draws
        self.forget()

    def forget(self) -> None:
        """Forget all episodes."""
        self.seen: list[Floats] = []
        self.done: list[Floats] = []
        self.options: Options = np.zeros((0, 0), np.int64)
        self.real = np.zeros(0)
        self._returns = torch.zeros(0, 1)

    def remember(self, seen: Floats, done: Floats, options: Options, rewards: NDArray[np.float64]) -> None:
        """Take episodes; the oldest that were imagined leave where there are too many.

        Args:
            seen: Before every step, shape (episodes, steps, features).
            done: The actions, shape (episodes, steps, entries).
            options: The policies, shape (episodes, decisions).
            rewards: NaN where they are imagined, shape (episodes,).
        """
        if not self.seen:
            self.options = options[:0]
        self.seen += list(seen)
        self.done += list(done)
        self.options = np.concatenate([self.options, options])
        self.real = np.concatenate([self.real, rewards])
        surplus = len(self.seen) - MOST_EPISODES
        if surplus > 0:
            leaving = set(np.flatnonzero(np.isnan(self.real))[:surplus].tolist())
            stays = [index for index in range(len(self.seen)) if index not in leaving]
            self.seen, self.done = [self.seen[index] for index in stays], [self.done[index] for index in stays]
            self.options, self.real = self.options[stays], self.real[stays]

    def judge(self, rewards: NDArray[np.float64]) -> None:
        """Give every episode its return: its reward on one scale, whatever the unit; shape (episodes,)."""
        scale = max(float(rewards.std()), TINY)
        returns = np.clip((rewards - rewards.mean()) / scale, -FARTHEST, FARTHEST)
        steps = [len(one) for one in self.done]
        self._rows = np.arange(sum(steps)).reshape(len(steps), -1)
        order = np.argsort(-returns, kind="stable")
        _, first = np.unique(self.options[order], axis=0, return_index=True)
        self._best = order[np.sort(first)[:ELITE]]
        self._seen = torch.as_tensor(np.concatenate(self.seen))
        self._done = torch.as_tensor(np.concatenate(self.done))
        self._returns = torch.as_tensor(np.repeat(returns, steps).astype(np.float32)[:, None])

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        """Draw steps with the returns of their episodes, half of them from the best policies."""
        half = batch_size // 2
        best = self._rows[self._best].ravel()
        drawn = self.draws.integers(len(self._returns), size=batch_size)
        drawn[:half] = best[self.draws.integers(len(best), size=half)]
        rows = torch.as_tensor(drawn)
        seen, returns = self._seen[rows], self._returns[rows]
        return ReplayBufferSamples(seen, self._done[rows], seen, torch.ones_like(returns), returns)


class Actor:
    """An agent on one problem: it learns from what was evaluated and from what it imagines, and proposes candidates.

    Attributes:
        name: The agent's.
        agent: What chooses actions.
        memory: What it learns from.
        saturated: The share of its actions without noise that lay at a bound, by choice.
    """

    def __init__(
        self,
        name: str,
        problem: Problem,
        seed: int,
        start: AgentFile | None = None,
        losses: Sequence[NDArray[np.float64]] | None = None,
    ) -> None:
        """Make an agent that learned nothing on this problem.

        Args:
            name: "ddpg", "td3" or "sac".
            problem: What is searched; some decision has more than one option.
            seed: What everything random comes from.
            start: A pretrained agent, whose networks it begins with; None for those of chance.
            losses: What options are predicted to lose, by place, of a problem of channels and widths; None: by their errors.

        Raises:
            ValueError: If the pretrained agent's networks aren't what its file says.
        """
        self.name = name
        self.env: envs.MixedPrecisionEnv | envs.PruneAndQuantizeEnv
        self._shown: gymnasium.Env[Any, Any]  # as the agent sees it
        if chooses_channels(problem):
            joint = envs.PruneAndQuantizeEnv(problem, losses)
            self.env = self._shown = joint
            self._view: Callable[[Floats], Floats] = np.asarray
        else:
            widths = envs.MixedPrecisionEnv(problem)
            self.env, self._shown = widths, envs.ViewEnv(widths)
            self._view = envs.View(widths.features)
        self.problem = problem
        self._draws = np.random.default_rng([seed, 1])
        self.saturated: list[float] = []
        with kept_random_state():
            self.agent = self._begun(seed, start)
            self._random = torch.get_rng_state()
        self.memory = Memory(self.agent.observation_space, self.agent.action_space, np.random.default_rng([seed, 2]))
        self.agent.replay_buffer = self.memory
        self._has_learned = False

    def _begun(self, seed: int, start: AgentFile | None) -> OffPolicyAlgorithm:
        """Make the agent."""
        if start is None:
            agent = make_agent(self.name, self._shown, seed)
            blind(agent)
            return agent
        agent = make_agent(self.name, self._shown, seed, start.record.hidden)
        start.start(agent)
        return agent

    def learn(self, options: tuple[int, ...], evaluation: Evaluation) -> None:
        """Remember a policy that was evaluated as an episode; of one that was cut short the model knows more."""
        reward = np.nan
        if evaluation.images >= self.problem.evaluator.count:
            reward = reward_of(self.problem, evaluation)
        self._remember_taking(np.array([options]), np.array([reward]))

    def propose(self, model: Model, count: int) -> list[tuple[int, ...]]:
        """Play episodes around the actor's actions, learn from some of them, and return the policies of all.

        Args:
            model: It predicts what they are worth.
            count: How many are played.

        Returns:
            Option vectors, those closest to what the actor does first.
        """
        with one_thread(), self._own_random():
            self.train(model)
            sigmas = np.geomspace(LEAST_SIGMA, SIGMA, count)
            sigmas[0] = 0
            seen, done, options = self.play(sigmas)
            self.saturated.append(float(self.env.episodes.saturation[0]))
            chosen = self._draws.permutation(count)[:IMAGINED]
            self.memory.remember(seen[chosen], done[chosen], options[chosen], np.full(len(chosen), np.nan))
        return list(map(tuple, options.tolist()))

    def first_proposals(self) -> list[tuple[int, ...]]:
        """Return the policies of a pretrained agent before anything is evaluated: what it does, and what is near that."""
        sigmas = np.geomspace(LEAST_SIGMA, SIGMA, IMAGINED)
        sigmas[0] = 0
        with one_thread(), self._own_random():
            options = self.play(sigmas)[2]
        return list(dict.fromkeys(map(tuple, options.tolist())))[:FIRST]

    def train(self, model: Model, updates: int = UPDATES) -> None:
        """Learn from what is remembered, as the model sees it now.

        Args:
            model: It predicts the rewards of what was imagined.
            updates: Gradient steps.
        """
        if not self.memory.seen:
            return
        rewards = self.memory.real.copy()
        imagined = np.isnan(rewards)
        if imagined.any():
            rewards[imagined] = model.reward(self.memory.options[imagined])
        rewards[~np.isfinite(rewards)] = rewards[np.isfinite(rewards)].min(initial=0.0)
        self.memory.judge(rewards)
        if not self._has_learned:
            self._has_learned = True
            self._set_rate(0.0)
            self.agent.train(CRITICS_FIRST, BATCH)
            self._set_rate(ACTOR_RATE)
        self.agent.train(updates, BATCH)

    def _set_rate(self, rate: float) -> None:
        """Let the actor learn at a rate."""
        for group in self.agent.actor.optimizer.param_groups:  # type: ignore[union-attr]
            group["lr"] = rate

    def play(self, sigmas: NDArray[np.float64]) -> tuple[Floats, Floats, Options]:
        """Play episodes around the actor's actions.

        Args:
            sigmas: Of the noise in each, shape (episodes,); 0 is what the actor does.

        Returns:
            What was seen before every step, shape (episodes, steps, features), the actions, shape (episodes, steps,
            entries), and the policies, shape (episodes, decisions).
        """
        episodes = self.env.episodes
        seen, done = [self._view(episodes.begin(len(sigmas)))], list[Floats]()
        while not episodes.is_over:
            asked = self.agent.predict(seen[-1], deterministic=True)[0]
            noisy = truncated_normal(asked, np.maximum(sigmas, TINY)[:, None], self._draws)
            done.append(np.where(sigmas[:, None] > 0, noisy, asked).astype(np.float32))
            seen.append(self._view(episodes.act(done[-1])))
        return np.stack(seen[:-1], axis=1), np.stack(done, axis=1), episodes.options

    def _remember_taking(self, options: Options, rewards: NDArray[np.float64]) -> None:
        """Remember episodes that decide given policies."""
        episodes = self.env.episodes
        seen, done = [self._view(episodes.begin(len(options)))], list[Floats]()
        while not episodes.is_over:
            wanted = options[:, episodes.free[episodes.step]]
            done.append(episodes.actions_taking(wanted))
            seen.append(self._view(episodes.take(wanted)))
        self.memory.remember(np.stack(seen[:-1], axis=1), np.stack(done, axis=1), options, rewards)

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        """Let Stable-Baselines3 draw from a state of PyTorch's generator that is this agent's alone."""
        with kept_random_state():
            torch.set_rng_state(self._random)
            yield
            self._random = torch.get_rng_state()


def make_agent(name: str, env: gymnasium.Env[Any, Any], seed: int, hidden: Sequence[int] = HIDDEN) -> OffPolicyAlgorithm:
    """Make an agent of Stable-Baselines3 that learns from returns.

    Args:
        name: "ddpg", "td3" or "sac".
        env: What it sees and does.
        seed: What everything random comes from.
        hidden: The sizes of its networks' hidden layers.

    Returns:
        The agent, untrained.
    """
    agent = AGENTS[name](
        "MlpPolicy",
        env,
        learning_rate=CRITIC_RATE,
        buffer_size=1,
        batch_size=BATCH,
        tau=TAU,
        gamma=1.0,
        policy_kwargs={"net_arch": list(hidden), "optimizer_kwargs": {"fused": True}},
        seed=seed,
        device="cpu",
    )
    agent.set_logger(Logger(None, []))
    return agent


def last_layer(agent: OffPolicyAlgorithm) -> torch.nn.Linear:
    """Return the layer of an actor that its actions come from, without noise."""
    mean = agent.actor.mu
    assert isinstance(mean, torch.nn.Module)
    return [part for part in mean.modules() if type(part) is torch.nn.Linear][-1]


@torch.no_grad()
def blind(agent: OffPolicyAlgorithm) -> None:
    """Let an actor do nearly nothing, whatever it sees: an action of 0 is the plan's."""
    last = last_layer(agent)
    last.weight.mul_(BLIND)
    last.bias.zero_()


class NoProblem(gymnasium.Env[Floats, Floats]):
    """What an agent is made for where there is no problem yet: the spaces that all problems have."""

    def __init__(self) -> None:
        """Make the spaces."""
        self.observation_space = unit_box(len(FEATURES))
        self.action_space = unit_box(2)


def check_start(name: str, start: AgentFile) -> None:
    """Check that an agent can begin with the networks of a pretrained one.

    Args:
        name: "ddpg", "td3" or "sac".
        start: The pretrained agent.

    Raises:
        ValueError: In one sentence, for one of another kind, that observes other features, or whose networks aren't what its
            file says.
    """
    start.check_kind(name)
    start.check_features(FEATURES)
    with kept_random_state():
        start.start(make_agent(name, NoProblem(), 0, start.record.hidden))


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Put the global generators back in the end: Stable-Baselines3 seeds and uses them."""
    python = random.getstate()
    array = np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)


def truncated_normal(mean: Floats, sigma: Any, draws: np.random.Generator) -> Floats:
    """Draw around actions, cut off where they would leave [-1, 1], by the inverse of the distribution function.

    Unlike noise that is added and clipped, it puts no weight on the bounds themselves.

    Args:
        mean: The actions.
        sigma: Standard deviation before it is cut off, one or by action.
        draws: What is drawn from.

    Returns:
        Actions, of mean's shape.
    """
    low, high = ndtr((-1 - mean) / sigma), ndtr((1 - mean) / sigma)
    drawn = mean + sigma * ndtri(low + (high - low) * draws.random(mean.shape))
    return np.clip(drawn, -1, 1).astype(np.float32)
