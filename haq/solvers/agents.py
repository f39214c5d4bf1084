"""Agents from Stable-Baselines3 (DDPG, TD3, SAC): proposers of candidates beside a surrogate's own, or HAQ's own search.

Unless asked for HAQ's environment, an agent proposes and the surrogate chooses (`haq.solvers.actor`,
`haq.solvers.surrogate`). The search is that of `surrogate`, with the same first policies; of those that follow, every second
is chosen among the agent's candidates alone, the others among its and everybody's. How many choices came from its actor
is counted (`haq.solvers.contribution`).

With `--env haq` it is HAQ's (Wang et al., CVPR 2019, section 3.5): DDPG on `haq/HAQ-v0` with hidden layers of 400 and 300,
replay of transitions in batches of 64, soft updates of 0.01, no discount, and truncated-normal exploration around the actor's
action that decays by a factor per episode; every episode is evaluated. One thing is different, since a search has hundreds of
episodes and not thousands: the return of an episode is given to every one of its steps (n-step returns as long as the
episode). The reward comes at the end only; learned one step at a time it doesn't arrive in time.

With `--ahead N` N policies are chosen before it is learned what the first of them is worth, so that as many processes can
evaluate them. What is done depends on N, but not on how many there are.
"""

from __future__ import annotations

import json
import operator
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import Tensor

import envs
import quantizers as Q
from haq.problem.channels import ChannelProblem, chooses_channels
from haq.problem.evaluator import Evaluation, one_thread
from haq.problem.goal import BEST, CHEAPEST, TRADEOFF
from haq.problem.problem import Problem
from haq.solvers import PLAN, cheapest
from haq.solvers.actor import AGENTS, Actor, check_start, kept_random_state, truncated_normal
from haq.solvers.agent_file import AgentFile
from haq.solvers.base import Session, Solver, Spending
from haq.solvers.surrogate import Search, start_spending

Floats = NDArray[np.float32]

# Of HAQ.
HIDDEN = [400, 300]
RATE = 1e-3
PAPER_RATE = 1e-4  # of the actor
BATCH = 64
TAU = 0.01
UPDATES = 16  # gradient steps per episode
SIGMA = 0.5  # of the noise around the actor's actions
PAPER_DECAY = 0.99  # of that, per episode
WARM_UP = 20  # episodes at random
MOST_STALE_ROUNDS = 30  # episodes in a row without a policy that is new, after which there seem to be none
NOT_EVALUATED = Evaluation(0.0, 0.0, 0)


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
    chosen: int = 0  # episodes
    stale_rounds: int = 0  # those in a row that came to nothing new
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
    """An agent of Stable-Baselines3 that proposes candidates to the surrogate; or HAQ's own."""

    chooses_ahead = True
    takes_agent = True
    uses_trials = True
    races = True
    goals = (BEST.kind, CHEAPEST, TRADEOFF)

    def __init__(self, *, alone: bool = False) -> None:
        """Choose who proposes candidates.

        Args:
            alone: Whether nobody else proposes candidates after the first ones: what the agent is worth without the others.
                What these are worth without the agent `surrogate` tells.
        """
        self.alone = alone

    def check_agent(self, agent: AgentFile) -> None:
        """Raise ValueError, in one sentence, for a pretrained agent that it can't start from."""
        check_start(self.name, agent)

    def solve(self, problem: Problem, session: Session, seed: int) -> None:
        """Search in one of the two environments, and leave global generators as they were."""
        if chooses_channels(problem):
            self._solve_jointly(problem, session, seed)
            return
        if all(len(decision.pairs) == 1 for decision in problem.decisions):
            # There is nothing to learn where there is nothing to decide.
            session.evaluate(problem.decide(decision.pairs[0] for decision in problem.decisions))
            return
        if session.env != PLAN:
            self._solve_as_haq(problem, session, seed)
            return
        actor = Actor(self.name, problem, seed, session.agent)
        actor.saturated = session.saturated
        search = Search(problem, session, seed, [actor], alone=self.alone)
        if session.agent is not None:
            search.begin_from(actor.first_proposals(), self.name)
        search.run()

    def spending(self, problem: Problem, evaluations: int) -> list[Spending]:
        """Tell what the evaluations go into."""
        return start_spending(problem, evaluations)

    def _solve_jointly(self, problem: ChannelProblem, session: Session, seed: int) -> None:
        """Search channels and widths. Raises ValueError for what an agent can't do there."""
        if session.env != PLAN:
            raise ValueError(
                f"environment {session.env!r} knows no channels: search channels and widths in {PLAN!r}, or leave prune out"
            )
        if session.agent is not None:
            raise ValueError(
                "a pretrained agent knows no channels: leave the agent out, or search widths alone, without prune"
            )
        search = Search(problem, session, seed, alone=self.alone)
        if len(search.space.free):
            actor = Actor(self.name, problem, seed, losses=search.losses)
            actor.saturated = session.saturated
            search.propose_with(actor)
        search.run()

    def _solve_as_haq(self, problem: Problem, session: Session, seed: int) -> None:
        if problem.goal.kind != BEST.kind:
            # HAQ knows no other goal: it is led from budget to budget.
            cheapest.search(self, session, seed)
            return
        with kept_random_state():
            search_as_haq(AGENTS[self.name], problem, session, seed)


class DDPG(Agent):
    """Deep deterministic policy gradients (Lillicrap et al., ICLR 2016), what HAQ searches with."""

    name = "ddpg"
    summary = "reinforcement learning: an actor and its critic, which imagine episodes, beside the surrogate"


class TD3(Agent):
    """Twin delayed DDPG (Fujimoto et al., ICML 2018)."""

    name = "td3"
    summary = "the same with two critics and a delayed actor"


class SAC(Agent):
    """Soft actor-critic (Haarnoja et al., ICML 2018)."""

    name = "sac"
    summary = "the same with an actor that is rewarded for staying random"


def not_evaluated(policy: Q.BitPolicy) -> Evaluation:
    """Judge the policy of an imagined episode, whose reward nobody looks at."""
    return NOT_EVALUATED


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
        while learner.may_choose and learner.stale_rounds < MOST_STALE_ROUNDS:
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
