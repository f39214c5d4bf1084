"""Agents from Stable-Baselines3 (DDPG, TD3, SAC) on `haq/MixedPrecision-v0`.

From HAQ (Wang et al., CVPR 2019, section 3.5): DDPG with hidden layers of 400 and 300, replay of transitions in batches of
64, soft updates of 0.01, no discount, and truncated-normal exploration around the actor's action that decays by a factor per
episode. What is different is due to one thing: a search has hundreds of episodes and not thousands.

* The return of an episode is given to every one of its steps (n-step returns as long as the episode). The reward comes at
  the end only; learned one step at a time it doesn't arrive in time.
* The agent doesn't start from nothing. As many of its evaluations as that takes, but for a tenth, go into the sensitivities
  that greedy descent and the integer programme work with: a plan made of half of them is worse than none. They make the
  environment's plan, from which actions are deviations, and the policies that greedy and the programme propose are the first
  episodes.
* An episode costs nothing until its policy is evaluated. So many are played for each evaluation, around the actor's actions
  and around those of the best episodes so far, and the one evaluated is that for which the critic expects most.

* With `--ahead N` the agent chooses N policies before it learns what the first of them is worth, so that as many processes can
  evaluate them. What it does depends on N, but not on how many there are.

With `--env haq` only the first of these holds: the agent is HAQ's, on `haq/HAQ-v0`.
"""

from __future__ import annotations

import json
import operator
import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import stable_baselines3
import torch
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import Tensor

import envs
import quantizers as Q
from haq.problem.evaluator import Evaluation, one_thread
from haq.problem.problem import Problem
from haq.solvers import greedy, ilp, sensitivity
from haq.solvers.actor import check_start
from haq.solvers.agent_file import AgentFile
from haq.solvers.base import Session, Solver

Floats = NDArray[np.float32]

HIDDEN = [400, 300]
RATE = 1e-3
BATCH = 64
TAU = 0.01
UPDATES = 16  # gradient steps per episode
SIGMA = 0.5  # of the noise around the actor's actions
DECAY = 0.98  # of that, per episode
CANDIDATES = 32  # episodes played for each that is evaluated
ELITE = 4  # best episodes around which half of them are played
CHANGED = (0.1, 0.2, 0.4)  # shares of their decisions that are made anew
# Of HAQ.
PAPER_RATE = 1e-4  # of the actor
PAPER_DECAY = 0.99  # of the noise, per episode
WARM_UP = 20  # episodes at random
MOST_STALE_ROUNDS = 3  # rounds without a policy that is new, after which there seem to be none
NOT_EVALUATED = Evaluation(0.0, 0.0, 0)


class OwnRates:
    """An agent whose optimizers keep the learning rates that they were given.

    Stable-Baselines3 would set one rate, the critic's, for all of them before every training.
    """

    def _update_learning_rate(self, optimizers: Any) -> None:
        pass


class PaperDDPG(OwnRates, stable_baselines3.DDPG):
    """DDPG with learning rates of its own for actor and critic."""


class PaperTD3(OwnRates, stable_baselines3.TD3):
    """TD3 with learning rates of its own for actor and critic."""


class PaperSAC(OwnRates, stable_baselines3.SAC):
    """SAC with learning rates of its own for actor and critic."""


AGENTS: dict[str, type[OffPolicyAlgorithm]] = {
    "ddpg": stable_baselines3.DDPG,
    "td3": stable_baselines3.TD3,
    "sac": stable_baselines3.SAC,
}
PAPER_AGENTS: dict[str, type[OffPolicyAlgorithm]] = {"ddpg": PaperDDPG, "td3": PaperTD3, "sac": PaperSAC}


class Episode(NamedTuple):
    """One policy being decided: what was seen, done and given, step by step."""

    policy: Q.BitPolicy
    observations: Floats  # (steps + 1, features)
    actions: Floats  # (steps, entries)
    reward: float
    saturated: float = 0.0


@dataclass
class Learner:
    """An agent, what it has learned from, and what it has chosen but not learned from yet: all that a search goes on with.

    The environments draw nothing, and an episode begins with a reset, so they have no state that would have to be kept.
    """

    agent: OffPolicyAlgorithm
    draws: np.random.Generator
    session: Session
    sigma: float = SIGMA
    chosen: int = 0  # episodes, without demonstrations
    stale_rounds: int = 0  # choices in a row that came to nothing
    episodes: list[Episode] = field(default_factory=list)
    waiting: deque[Episode] = field(default_factory=deque)

    @property
    def may_choose(self) -> bool:
        """Say whether another policy may be chosen before the first of those that wait is learned from."""
        new = {episode.policy for episode in self.waiting if not self.session.seen(episode.policy)}
        return len(self.waiting) < self.session.ahead and len(new) < self.session.left

    def choose(self, episode: Episode) -> None:
        """Let a policy be evaluated, and wait in line to be learned from."""
        self.waiting.append(episode)
        self.session.expect([episode.policy])

    def learn(self, env: gymnasium.Env) -> Episode:
        """Take the first that waits, have it judged, put it into the replay buffer, train, and keep all that on disk."""
        waiting = self.waiting.popleft()
        episode = play(env, lambda step, _: waiting.actions[step])
        self._remember(episode)
        with one_thread():
            self.agent.train(UPDATES, BATCH)
        return episode

    def save(self) -> None:
        """Write a checkpoint, if the session keeps any."""
        if self.session.checkpoint is None:
            return
        generator = np.random.get_state()
        assert isinstance(generator, tuple)
        name, keys, *rest = generator
        self.session.checkpoint.write(
            {
                "agent": self.agent.get_parameters(),
                "variables": self._variables(),
                "updates": self.agent._n_updates,
                "episodes": [_as_tensors(episode) for episode in self.episodes],
                "waiting": [_as_tensors(episode) for episode in self.waiting],
                "saturated": self.session.saturated,
                "counts": [self.sigma, self.chosen, self.stale_rounds],
                "draws": json.dumps(self.draws.bit_generator.state),
                "numpy": [name, torch.from_numpy(keys.astype(np.int64)), *rest],
                "python": random.getstate(),
                "torch": torch.get_rng_state(),
            }
        )

    def restore(self) -> bool:
        """Go on from the checkpoint, if there is one: agent, replay buffer and every random state.

        What was evaluated until then is asked for again, in its order, so that the session counts it.

        Returns:
            Whether there was one.
        """
        if self.session.checkpoint is None or (content := self.session.checkpoint.read()) is None:
            return False
        with self.session.checkpoint.fitting():
            episodes, waiting = (list(map(_from_tensors, content[name])) for name in ("episodes", "waiting"))
            self.agent.set_parameters(content["agent"], exact_match=True, device="cpu")
            for variable, kept in zip(self._variables(), content["variables"], strict=True):
                variable.copy_(kept)
            self.agent._n_updates = content["updates"]
            self.session.saturated[:] = content["saturated"]
            self.sigma, self.chosen, self.stale_rounds = content["counts"]
            self.draws.bit_generator.state = json.loads(content["draws"])
            name, keys, *rest = content["numpy"]
            np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
            random.setstate(content["python"])
            torch.set_rng_state(content["torch"])
            for episode in episodes:
                self._remember(episode)
        for episode in episodes:
            self.session.evaluate(episode.policy)
        for episode in waiting:
            self.choose(episode)
        return True

    def _remember(self, episode: Episode) -> None:
        self.episodes.append(episode)
        assert self.agent.replay_buffer is not None
        steps = len(episode.actions)
        for step in range(steps):
            done = step == steps - 1
            reward = 0.0
            if done:
                reward = episode.reward
            self.agent.replay_buffer.add(
                episode.observations[step][None],
                episode.observations[step + 1][None],
                episode.actions[step][None],
                np.array([reward]),
                np.array([done]),
                [{}],
            )

    def _variables(self) -> list[Tensor]:
        """List what an agent learns beside its networks (SAC: the logarithm of the entropy's weight)."""
        return [operator.attrgetter(name)(self.agent).data for name in self.agent._get_torch_save_params()[1]]


class Agent(Solver):
    """An agent of Stable-Baselines3 (`AGENTS[name]`) in the session's environment."""

    uses_sensitivities = True
    chooses_ahead = True
    takes_agent = True

    def check_agent(self, agent: AgentFile) -> None:
        """Raise ValueError, in one sentence, for a pretrained agent that it can't start from."""
        check_start(self.name, agent)

    def solve(self, problem: Problem, session: Session, seed: int) -> None:
        """Search in one of the two environments, and leave global generators as they were."""
        if all(len(decision.pairs) == 1 for decision in problem.decisions):
            # There is nothing to learn where there is nothing to decide.
            session.evaluate(problem.decide(decision.pairs[0] for decision in problem.decisions))
            return
        with kept_random_state():
            if session.env == "haq":
                search_as_haq(PAPER_AGENTS[self.name], problem, session, seed)
            else:
                search(AGENTS[self.name], problem, session, seed)


class DDPG(Agent):
    """Deep deterministic policy gradients (Lillicrap et al., ICLR 2016), what HAQ searches with."""

    name = "ddpg"
    summary = "reinforcement learning as in HAQ: an actor, and a critic that it learns from"


class TD3(Agent):
    """Twin delayed DDPG (Fujimoto et al., ICML 2018)."""

    name = "td3"
    summary = "the same with two critics and a delayed actor"


class SAC(Agent):
    """Soft actor-critic (Haarnoja et al., ICML 2018)."""

    name = "sac"
    summary = "the same with an actor that is rewarded for staying random"


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


def not_evaluated(policy: Q.BitPolicy) -> Evaluation:
    """Judge the policy of an imagined episode, whose reward nobody looks at."""
    return NOT_EVALUATED


def search(kind: type[OffPolicyAlgorithm], problem: Problem, session: Session, seed: int) -> None:
    """Measure sensitivities, show the rivals' policies, then play an episode for each evaluation that is left.

    Args:
        kind: The agent's class.
        problem: What is searched.
        session: Evaluates policies.
        seed: What everything random comes from.
    """
    loss_increase = sensitivity.measure(problem, session, keep=max(session.evaluations // 10, 1))
    env = envs.MixedPrecisionEnv(problem, loss_increase, judge=session.evaluate)
    agent = make_agent(kind, env, len(env.decisions), seed, session.evaluations + 2)
    learner = Learner(agent, np.random.default_rng(seed), session)
    players = [envs.MixedPrecisionEnv(problem, loss_increase, not_evaluated) for _ in range(CANDIDATES)]
    player = players[0]
    proposals = [ilp.propose(problem, loss_increase), greedy.propose(problem, loss_increase)]
    proposals = list(dict.fromkeys(proposals))[: session.left]
    if not learner.restore():
        for proposal in proposals:
            learner.choose(play(player, follow(player, proposal)))
    while True:
        while learner.may_choose and learner.stale_rounds < MOST_STALE_ROUNDS:
            with one_thread():
                choose_best(learner, players)
        if not learner.waiting:
            return
        episode = learner.learn(env)
        learner.stale_rounds = 0
        if len(learner.episodes) > len(proposals):
            session.saturated.append(episode.saturated)
        learner.save()


def choose_best(learner: Learner, players: list[envs.MixedPrecisionEnv]) -> None:
    """Imagine episodes, and choose the new one for which the critic expects most, if there is one."""
    waiting = {episode.policy for episode in learner.waiting}
    candidates = imagine(learner.agent, players, learner.episodes, learner.sigma, learner.draws)
    new = [one for one in candidates if not learner.session.seen(one.policy) and one.policy not in waiting]
    if not new:
        learner.stale_rounds += 1
        return
    learner.stale_rounds = 0
    best = new[int(np.argmax(expected(learner.agent, new)))].policy
    learner.choose(play(players[0], follow(players[0], best)))
    learner.sigma *= DECAY


def search_as_haq(kind: type[OffPolicyAlgorithm], problem: Problem, session: Session, seed: int) -> None:
    """Search as HAQ does: random episodes to begin with, then around what the actor does, every one of them evaluated.

    Args:
        kind: The agent's class, one whose optimizers keep their rates (`OwnRates`).
        problem: What is searched.
        session: Evaluates policies.
        seed: What everything random comes from.
    """
    env = envs.HaqEnv(problem, judge=session.evaluate)
    player = envs.HaqEnv(problem, judge=not_evaluated)
    steps = 2 * len(env.free)
    agent = make_agent(kind, env, steps, seed, session.evaluations + WARM_UP)
    for group in agent.actor.optimizer.param_groups:  # type: ignore[union-attr]
        group["lr"] = PAPER_RATE
    learner = Learner(agent, np.random.default_rng(seed), session)

    def explore(step: int, observation: Floats) -> Floats:
        if learner.chosen < WARM_UP:
            return learner.draws.uniform(-1, 1, 1).astype(np.float32)
        asked = agent.predict(observation, deterministic=True)[0]
        return truncated_normal(asked, learner.sigma, learner.draws)

    learner.restore()
    while True:
        while learner.may_choose and learner.stale_rounds < 10 * MOST_STALE_ROUNDS:
            with one_thread():
                learner.choose(play(player, explore))
            learner.chosen += 1
            if learner.chosen > WARM_UP:
                learner.sigma *= PAPER_DECAY
        if not learner.waiting:
            return
        used = session.used
        session.saturated.append(learner.learn(env).saturated)
        learner.stale_rounds += 1
        if session.used > used:
            learner.stale_rounds = 0
        learner.save()


def make_agent(kind: type[OffPolicyAlgorithm], env: gymnasium.Env, steps: int, seed: int, episodes: int) -> OffPolicyAlgorithm:
    """Make an agent of Stable-Baselines3 with HAQ's networks, that learns from whole episodes.

    Args:
        kind: Its class.
        env: The environment that it learns in.
        steps: Steps of an episode.
        seed: What everything random comes from.
        episodes: How many the replay buffer holds.

    Returns:
        The agent, untrained.
    """
    agent = kind(
        "MlpPolicy",
        env,
        learning_rate=RATE,
        buffer_size=episodes * steps,
        batch_size=BATCH,
        tau=TAU,
        gamma=1.0,
        n_steps=steps,
        policy_kwargs={"net_arch": HIDDEN},
        seed=seed,
        device="cpu",
    )
    agent.set_logger(Logger(None, []))
    return agent


def play(env: gymnasium.Env, act: Callable[[int, Floats], Floats]) -> Episode:
    """Play an episode of what `act` does at each step, which it is told, with what is seen there."""
    observations, actions = [env.reset()[0]], list[Floats]()
    done, reward, info = False, 0.0, dict[str, Any]()
    while not done:
        actions.append(act(len(actions), observations[-1]))
        observation, given, done, _, info = env.step(actions[-1])
        observations.append(observation)
        reward = float(given)
    return Episode(info["policy"], np.array(observations), np.array(actions, np.float32), reward, info["saturated"])


def follow(env: envs.MixedPrecisionEnv, policy: Q.BitPolicy) -> Callable[[int, Floats], Floats]:
    """Make what decides just this policy."""

    def act(step: int, observation: Floats) -> Floats:
        w, a = policy[env.next_layer()]
        return env.action_for(w, a)

    return act


def _as_tensors(episode: Episode) -> dict[str, Any]:
    """Put an episode into plain data and tensors."""
    return {
        "policy": episode.policy.to_dict(),
        "observations": torch.from_numpy(episode.observations),
        "actions": torch.from_numpy(episode.actions),
        "reward": episode.reward,
        "saturated": episode.saturated,
    }


def _from_tensors(kept: dict[str, Any]) -> Episode:
    policy = Q.BitPolicy.from_dict(kept["policy"])
    return Episode(policy, kept["observations"].numpy(), kept["actions"].numpy(), kept["reward"], kept["saturated"])


def imagine(
    agent: OffPolicyAlgorithm,
    players: list[envs.MixedPrecisionEnv],
    episodes: list[Episode],
    sigma: float,
    draws: np.random.Generator,
) -> list[Episode]:
    """Play one episode with each player without evaluating anything.

    A quarter of them are played around the actor's actions, a quarter at random, and half with the bits of one of the best
    episodes, some of which are drawn or planned anew.

    Args:
        agent: Chooses actions.
        players: Environments.
        episodes: What was played and evaluated so far.
        sigma: Of the noise around the actor's actions.
        draws: What is drawn from.

    Returns:
        What was played, an episode for each player.
    """
    best = sorted(episodes, key=lambda episode: -episode.reward)[:ELITE]
    observations = [np.array([player.reset()[0] for player in players])]
    guides: list[Episode | None] = [None] * len(players)
    if best:
        for i in range(1, len(players), 2):
            guides[i] = best[int(draws.integers(len(best)))]
    actions: list[Floats] = []
    policies: list[Q.BitPolicy] = []
    for _ in players[0].decisions:
        asked = agent.predict(observations[-1], deterministic=True)[0]
        noisy = truncated_normal(asked, sigma, draws)
        for i, (player, guide) in enumerate(zip(players, guides, strict=True)):
            if i % 4 == 0:
                noisy[i] = draws.uniform(-1, 1, 2)
            elif guide is not None and draws.random() < CHANGED[i % len(CHANGED)]:
                noisy[i] = 0
                if draws.random() < 0.5:
                    noisy[i] = draws.uniform(-1, 1, 2)
            elif guide is not None:
                w, a = guide.policy[player.next_layer()]
                noisy[i] = player.action_for(w, a)
        actions.append(noisy)
        following = []
        for player, action in zip(players, noisy, strict=True):
            observation, _, done, _, info = player.step(action)
            following.append(observation)
            if done:
                policies.append(info["policy"])
        observations.append(np.array(following))
    seen, done_ = np.stack(observations, axis=1), np.stack(actions, axis=1)
    return [Episode(policy, o, a, np.nan) for policy, o, a in zip(policies, seen, done_, strict=True)]


@torch.no_grad()
def expected(agent: OffPolicyAlgorithm, episodes: list[Episode]) -> Floats:
    """Tell what the critic expects of episodes: the mean over their steps, each of which it is asked about."""
    observations = torch.as_tensor(np.stack([episode.observations[:-1] for episode in episodes]))
    actions = torch.as_tensor(np.stack([episode.actions for episode in episodes]))
    values = torch.stack(agent.critic(observations.flatten(0, 1), actions.flatten(0, 1)))  # type: ignore[attr-defined]
    result: Floats = values.min(0).values.view(len(episodes), -1).mean(1).numpy()
    return result


def truncated_normal(mean: Floats, sigma: float, draws: np.random.Generator) -> Floats:
    """Draw around actions, cut off where they would leave [-1, 1], by the inverse of the distribution function.

    Unlike noise that is added and clipped, it puts no weight on the bounds themselves.

    Args:
        mean: The actions.
        sigma: Standard deviation before it is cut off.
        draws: What is drawn from.

    Returns:
        Actions, of mean's shape.
    """
    low, high = ndtr((-1 - mean) / sigma), ndtr((1 - mean) / sigma)
    drawn = mean + sigma * ndtri(low + (high - low) * draws.random(mean.shape))
    return np.clip(drawn, -1, 1).astype(np.float32)
