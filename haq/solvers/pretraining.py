"""Training of an agent on many problems at once, so that it knows something of one that it never saw.

    problems    enumerated ones (`haq.problem.table_file`), each at `VARIANTS` budgets, on its own hardware or on another that
                is shipped, as far as everything within the budget is known; and made-up ones (`haq.problem.synthetic`)
    a round     `TOGETHER` episodes on one of them at random: one of what the actor does, and others that differ from it in one
                step each. What a policy has more than the actor's own is due to that step, and is its return, in units of what
                single steps change on this problem, so that problems weigh the same
    then        gradient steps on what was played last, on any problem: critics learn the return, and once they have, the
                actor what the critics say is best, as far as that is better than the plan by more than `ANCHOR` says. There
                is nothing to bootstrap and so no target network. SAC's actor is also rewarded for staying random

As in a search, actions are deviations from the plan for the calibration errors: an agent that knows nothing plays the plan. It
begins as such. One problem in five isn't trained on: now and then the agent is judged on these, and of all that it was on the
way the one that does best there is kept.

The same problems, kind and seed give the same file. A run takes minutes and writes its file at the end; one that was killed is
begun again.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import stable_baselines3
import torch
from numpy.typing import NDArray
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from torch import Tensor

from envs import FEATURES, Episodes, SearchProblem, View
from haq.problem import synthetic, table_file
from haq.problem.decision import Decision
from haq.problem.evaluator import one_thread
from haq.problem.synthetic import Drawn, Options
from haq.problem.table_file import UNKNOWN, TableFile
from haq.solvers.actor import HIDDEN, NoProblem, blind, kept_random_state, make_agent, truncated_normal
from haq.solvers.agent_file import AgentFile, networks_of
from haq.store.records import AgentRecord
from hw_models.widths import places

Floats = NDArray[np.float64]
Observations = NDArray[np.float32]

EPISODES = 30_000
SYNTHETIC = "synthetic"
MOST_SYNTHETIC = 10_000
VARIANTS = 12  # problems that an enumerated one stands for
KNOWN = 100  # policies within the budget that an enumerated problem must have
TOGETHER = 64  # episodes of a round
SIGMA = 0.5  # of the noise around the actor's action in the step that differs
UPDATES = 6  # gradient steps after a round
BATCH = 256
KEPT = 12_000  # steps that are learned from, the last ones
ACTOR_RATE = 1e-4
CRITIC_RATE = 1e-3
WARM_UP = 0.4  # share of the rounds in which critics learn alone
ANCHOR = 0.1  # what an action of 1 must gain in return, so that what is no better than the plan isn't done
ENTROPY = 0.01  # what a nat of randomness is worth to SAC's actor, in the return's unit
LARGEST_RETURN = 3.0
NO_PRICES: Floats = np.empty(0)
APART = 5  # of so many problems, one is held back
JUDGED = 20  # times that an agent is judged on these, while it is trained


class Table:
    """What an enumerated problem says of its policies."""

    def __init__(self, file: TableFile) -> None:
        """Take what is known."""
        self.float_accuracy = file.float_accuracy
        self._accuracy = file.accuracy.reshape(file.counts)
        self._loss = file.loss.reshape(file.counts)

    def judge(self, options: Options) -> tuple[Floats, Floats]:
        """Look up accuracy and loss of option vectors (n, decisions)."""
        index = tuple(options.T)
        return self._accuracy[index], self._loss[index]


def draw_from(file: TableFile, generator: np.random.Generator) -> Drawn:
    """Draw a problem from an enumerated one: within another budget and, where that is possible, on other hardware.

    What a policy is worth doesn't depend on what it costs.

    Args:
        file: The enumerated problem.
        generator: What is drawn from.

    Returns:
        The problem; all policies within its budget are known.
    """
    for _ in range(3):
        target, metric, cost, supported = synthetic.priced_somewhere(file.workload, generator)
        can = []
        for group, pairs in zip(file.groups, file.pairs, strict=True):
            of = places(pairs)
            together: NDArray[np.bool_] = np.all(supported[list(group)], axis=0)
            can.append(bool(together[of[:, 0], of[:, 1]].all()))
        if not all(can):
            continue
        found = _at_budget(file, target, metric, cost, generator)
        if found is not None:
            return found
    cost = np.where(np.isnan(file.cost), np.nanmax(file.cost, axis=(1, 2), keepdims=True), file.cost)
    known = int((file.accuracy != UNKNOWN).sum())
    found = _at_budget(file, file.target, file.metric, cost, generator, least=min(KNOWN, known))
    if found is None:
        # What is known is scattered: some of it costs more than what isn't.
        found = _at_budget(file, file.target, file.metric, cost, generator, least=1)
    assert found is not None  # every file has a limit that something is within
    return found


def _at_budget(
    file: TableFile, target: str, metric: str, cost: Floats, generator: np.random.Generator, least: int = KNOWN
) -> Drawn | None:
    """Put an enumerated problem at other costs within a random budget.

    Args:
        file: The enumerated problem.
        target: The hardware that costs are of.
        metric: Their metric.
        cost: In its unit, shape (layers, 10, 10).
        generator: What is drawn from.
        least: Policies that must be within the budget.

    Returns:
        The problem; None if too few policies are known within any budget.
    """
    decisions = []
    total = np.zeros(1)
    for group, pairs in zip(file.groups, file.pairs, strict=True):
        decision = Decision(group, pairs, NO_PRICES)
        decision = decision._replace(prices=decision.of(cost[list(group)].sum(0)))
        decisions.append(decision)
        total = np.add.outer(total, decision.prices).reshape(-1)
    unknown = file.accuracy == UNKNOWN
    # Strictly below what the cheapest policy costs of which nothing is known.
    known = np.sort(total[total < np.min(total[unknown], initial=np.inf)])
    if len(known) < least:
        return None
    low, high = float(known[least - 1]), float(known[-1])
    limit = low + generator.uniform(*synthetic.SHARES) * (high - low)
    name = f"{file.name} on {target}"
    return Drawn(name, metric, file.workload, cost, decisions, file.noise, limit, Table(file))


def read_problems(words: Sequence[str], seed: int) -> dict[str, list[Drawn]]:
    """Draw the problems that an agent is to be trained on.

    Args:
        words: Names of shipped tables, paths of .npz files, and "synthetic:N" for N that are made up.
        seed: What everything random comes from.

    Returns:
        Problems by word.

    Raises:
        ValueError: For a word that is none of these, or there twice, and for a file that isn't one.
        FileNotFoundError: If there is no such file.
    """
    if not words:
        raise ValueError(f"nothing to train on: give names of tables ({_shipped_words()}), paths of .npz files, synthetic:N")
    for word in words:
        if words.count(word) > 1:
            raise ValueError(f"{word[:80]!r} is there twice: name each problem once")
    counts = {word: _count_of(word) for word in words}
    found = {}
    for index, (word, count) in enumerate(counts.items()):
        # Of its own, so that what one word stands for doesn't depend on the others.
        generator = np.random.default_rng([seed, index])
        if count:
            found[word] = [synthetic.draw(generator) for _ in range(count)]
            continue
        file = table_file.read(word)
        found[word] = [draw_from(file, generator) for _ in range(VARIANTS)]
    return found


def _count_of(word: str) -> int:
    """Return how many made-up problems a word asks for; 0 for a table. Raises ValueError for neither."""
    kind, _, number = word.partition(":")
    if kind == SYNTHETIC:
        if not re.fullmatch(r"[1-9][0-9]{0,8}", number) or int(number) > MOST_SYNTHETIC:
            raise ValueError(f"{word[:80]!r} must be {SYNTHETIC}:N, N problems that are made up, from 1 to {MOST_SYNTHETIC}")
        return int(number)
    if word not in table_file.shipped() and Path(word).suffix != ".npz":
        raise ValueError(
            f"{word[:80]!r} is no problem to train on: give the name of a table ({_shipped_words()}), the path of an .npz "
            f"file, or {SYNTHETIC}:N"
        )
    return 0


def _shipped_words() -> str:
    return ", ".join(table_file.shipped())


class Practice:
    """A problem to train on, with what returns are measured by.

    Attributes:
        problem: The problem.
        planned: The accuracy of the plan's policy.
        unit: How far from that policies are, on average, that differ from the plan's in a random step.
    """

    def __init__(self, problem: Drawn, generator: np.random.Generator) -> None:
        """Play the plan, and deviate from it.

        Args:
            problem: The problem.
            generator: What is drawn from.

        Raises:
            ValueError: If there is nothing to decide.
        """
        self.problem = problem
        self.episodes = Episodes(problem)
        self._view = View(self.episodes.features)
        accuracy, _, _ = self.play_round(lambda seen: np.zeros((len(seen), 2), np.float32), generator)
        self.planned = float(accuracy[0])
        # No less than a thirtieth of a point: what is nearly the same everywhere is no reason to learn anything.
        self.unit = max(float(np.abs(accuracy - self.planned).mean()), 3e-4)

    def play_round(
        self, act: Callable[[Observations], Observations], generator: np.random.Generator
    ) -> tuple[Floats, Observations, Observations]:
        """Play the episode of what `act` does, and `TOGETHER` - 1 that differ from it in one random step.

        Args:
            act: What is done where (n, features) is seen, shape (n, 2).
            generator: What is drawn from.

        Returns:
            The accuracies, shape (episodes,), that of `act` alone first. Then, of the steps that differ, in the order of their
            episodes, and then of all of the first episode: what was seen, shape (n, features), and what was done, (n, 2).
        """
        steps = len(self.episodes.decisions)
        differing = generator.integers(steps, size=TOGETHER)
        differing[0] = steps  # none
        seen_then: list[Observations] = []
        done: list[Observations] = []

        def with_noise(seen: Observations) -> Observations:
            asked = act(seen)
            noisy = truncated_normal(asked, SIGMA, generator)
            here = differing == len(done)
            seen_then.append(seen)
            done.append(np.where(here[:, None], noisy, asked).astype(np.float32))
            return done[-1]

        accuracy = self.play(with_noise, TOGETHER)
        rows = np.arange(1, TOGETHER)
        all_seen, all_done = np.stack(seen_then), np.stack(done)
        seen = np.concatenate([all_seen[differing[1:], rows], all_seen[:, 0]])
        return accuracy, seen, np.concatenate([all_done[differing[1:], rows], all_done[:, 0]])

    def play(self, act: Callable[[Observations], NDArray[Any]], count: int) -> Floats:
        """Play so many episodes of what `act` does with what it sees (count, features); returns the policies' accuracies."""
        seen = self._view(self.episodes.begin(count))
        while not self.episodes.is_over:
            seen = self._view(self.episodes.act(act(seen)))
        return self.problem.response.judge(self.episodes.options)[0]

    def gained(self, accuracy: Floats) -> Floats:
        """Tell how much better than the plan accuracies are, in this problem's unit."""
        gained: Floats = (accuracy - self.planned) / self.unit
        return gained


def zero_shot(problem: SearchProblem, file: AgentFile) -> list[int]:
    """Tell what a pretrained agent chooses for a problem without any evaluation.

    Args:
        problem: The problem.
        file: The agent.

    Returns:
        An option for each decision, within all budgets.
    """
    with kept_random_state():
        agent = make_agent(file.record.kind, NoProblem(), 0, file.record.hidden)
    file.start(agent)
    episodes = Episodes(problem)
    view = View(episodes.features)
    seen = episodes.begin(1)
    with one_thread():
        while not episodes.is_over:
            seen = episodes.act(_asked(agent, view(seen)))
    chosen: list[int] = episodes.options[0].tolist()
    return chosen


@torch.no_grad()
def _asked(agent: OffPolicyAlgorithm, seen: Observations) -> Observations:
    """Ask the actor for its actions, without noise, shape (n, 2)."""
    actor: Any = agent.actor  # type: ignore[attr-defined]
    observations = torch.as_tensor(seen)
    if isinstance(agent, stable_baselines3.SAC):
        asked: Tensor = actor(observations, deterministic=True)
    else:
        asked = actor(observations)
    actions: Observations = asked.numpy()
    return actions


class Row(NamedTuple):
    """How well an agent does on the problems of one word, without any evaluation there."""

    word: str
    held_back: bool
    problems: int
    gained: float  # over the plan, in points of accuracy: the mean
    better: int  # problems
    worse: int


class Pretrained(NamedTuple):
    """What came out of training: the agent, and how well it does."""

    agent: AgentFile
    rows: list[Row]
    kept_at: int  # episodes after which it was as it was kept


@dataclass
class Steps:
    """The last steps that were played: a ring of arrays."""

    seen: Observations
    actions: Observations
    returns: NDArray[np.float32]
    count: int = 0

    @classmethod
    def empty(cls) -> Steps:
        """Make room for `KEPT` steps."""
        seen, actions = np.zeros((KEPT, len(FEATURES)), np.float32), np.zeros((KEPT, 2), np.float32)
        return cls(seen, actions, np.zeros(KEPT, np.float32))

    def add(self, seen: Observations, actions: Observations, returns: Floats) -> None:
        """Take steps, in place of the oldest.

        Args:
            seen: Observations, shape (n, features).
            actions: What was done there, shape (n, 2).
            returns: What it gave in the end, shape (n,).
        """
        places = (self.count + np.arange(len(seen))) % KEPT
        self.seen[places], self.actions[places], self.returns[places] = seen, actions, returns
        self.count += len(seen)

    def draw(self, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a batch: what was seen, done, and returned in the end."""
        places = generator.integers(min(self.count, KEPT), size=BATCH)
        return tuple(torch.as_tensor(part[places]) for part in (self.seen, self.actions, self.returns))  # type: ignore[return-value]


class Trainer:
    """An agent in training."""

    def __init__(self, kind: str, hidden: Sequence[int], seed: int) -> None:
        """Make an agent that plays the plan.

        Args:
            kind: "ddpg", "td3" or "sac".
            hidden: The sizes of its networks' hidden layers.
            seed: What its weights and everything random come from.
        """
        self.agent = make_agent(kind, NoProblem(), seed, hidden)
        self.generator = np.random.default_rng(seed)
        self.steps = Steps.empty()
        self.actor: Any = self.agent.actor  # type: ignore[attr-defined]
        self.critic: Any = self.agent.critic  # type: ignore[attr-defined]
        blind(self.agent)
        self._of_actor = torch.optim.Adam(self.actor.parameters(), ACTOR_RATE)
        self._of_critic = torch.optim.Adam(self.critic.parameters(), CRITIC_RATE)

    def play(self, practice: Practice) -> None:
        """Play a round on one problem, and remember the steps that say something."""
        accuracy, seen, actions = practice.play_round(lambda seen: _asked(self.agent, seen), self.generator)
        gained = np.zeros(len(seen))
        gained[: TOGETHER - 1] = (accuracy[1:] - accuracy[0]) / practice.unit
        self.steps.add(seen, actions, np.clip(gained, -LARGEST_RETURN, LARGEST_RETURN))

    def learn(self, *, critics_alone: bool) -> None:
        """Make gradient steps on what was played."""
        for _ in range(UPDATES):
            seen, actions, returns = self.steps.draw(self.generator)
            values = torch.stack(self.critic(seen, actions))
            self._of_critic.zero_grad()
            (values - returns[:, None]).square().mean().backward()  # type: ignore[no-untyped-call]
            self._of_critic.step()
            if critics_alone:
                continue
            self._of_actor.zero_grad()
            self._actor_loss(seen).backward()  # type: ignore[no-untyped-call]
            self._of_actor.step()

    def _actor_loss(self, seen: Tensor) -> Tensor:
        """Return what the actor is to lessen: what the critics say against its actions."""
        if isinstance(self.agent, stable_baselines3.SAC):
            actions, log_likelihood = self.actor.action_log_prob(seen)
            values = torch.stack(self.critic(seen, actions)).min(0).values
            loss: Tensor = (ENTROPY * log_likelihood[:, None] - values).mean()
            return loss
        actions = self.actor(seen)
        values = torch.stack(self.critic(seen, actions)).min(0).values
        return -values.mean() + ANCHOR * actions.square().mean()

    def gained(self, practices: Sequence[Practice]) -> Floats:
        """Tell how much better than the plan the agent is without noise, on each problem, in its unit."""
        found = [practice.gained(practice.play(lambda seen: _asked(self.agent, seen), 1))[0] for practice in practices]
        return np.array(found)

    def score(self, practices: Sequence[Practice]) -> float:
        """Tell how much it gains over the plan on average, in the problems' units, none of which counts for all others."""
        return float(np.clip(self.gained(practices), -LARGEST_RETURN, LARGEST_RETURN).mean())


def pretrain(
    problems: dict[str, list[Drawn]],
    kind: str = "ddpg",
    *,
    episodes: int = EPISODES,
    seed: int = 0,
    hidden: Sequence[int] = HIDDEN,
    on_progress: Callable[[int, float], None] = lambda episodes, gained: None,
) -> Pretrained:
    """Train an agent on many problems.

    Args:
        problems: By the words that asked for them; see `read_problems`.
        kind: "ddpg", "td3" or "sac".
        episodes: How many are played, rounded up to whole rounds.
        seed: What everything random comes from.
        hidden: The sizes of its networks' hidden layers.
        on_progress: Told how many episodes were played, and the best mean gain over the plan so far on the problems that are
            held back, in their units.

    Returns:
        The best agent of those that were met, by the problems that are held back, and how well it does.
    """
    generator = np.random.default_rng([seed, len(problems)])
    with kept_random_state(), one_thread():
        practices = {word: [Practice(one, generator) for one in drawn] for word, drawn in problems.items()}
        trained = {word: _apart(of_word, held_back=False) for word, of_word in practices.items()}
        held = {word: _apart(of_word, held_back=True) for word, of_word in practices.items()}
        to_train = [one for of_word in trained.values() for one in of_word]
        # Of very few problems none can be held back.
        to_judge = [one for of_word in held.values() for one in of_word] or to_train
        trainer = Trainer(kind, hidden, seed)
        rounds = -(-episodes // TOGETHER)
        best, kept, kept_at = trainer.score(to_judge), _copied(trainer.agent), 0
        for number in range(1, rounds + 1):
            trainer.play(to_train[int(trainer.generator.integers(len(to_train)))])
            trainer.learn(critics_alone=number < WARM_UP * rounds)
            if number % max(rounds // JUDGED, 1) == 0 or number == rounds:
                gained = trainer.score(to_judge)
                if gained > best:
                    best, kept, kept_at = gained, _copied(trainer.agent), number * TOGETHER
                on_progress(number * TOGETHER, best)
        record = AgentRecord(
            kind=kind,  # type: ignore[arg-type]
            features=list(FEATURES),
            hidden=list(hidden),
            trained_on=list(problems),
            episodes=rounds * TOGETHER,
            seed=seed,
        )
        file = AgentFile(record, kept)
        file.start(trainer.agent)
        rows = []
        for held_back, of_words in ((False, trained), (True, held)):
            rows += [_row(word, held_back, trainer, of_word) for word, of_word in of_words.items() if of_word]
    return Pretrained(file, rows, kept_at)


def _apart(practices: list[Practice], *, held_back: bool) -> list[Practice]:
    """Return the problems of a word that are held back, one of every `APART`, or the others."""
    return [one for index, one in enumerate(practices) if (index % APART == APART - 1) == held_back]


def _copied(agent: OffPolicyAlgorithm) -> dict[str, Tensor]:
    """Copy the networks of an agent as they are now."""
    return {name: tensor.clone() for name, tensor in networks_of(agent).items()}


def _row(word: str, held_back: bool, trainer: Trainer, practices: list[Practice]) -> Row:
    gained = trainer.gained(practices) * np.array([one.unit for one in practices])
    better, worse = int((gained > 1e-9).sum()), int((gained < -1e-9).sum())
    return Row(word, held_back, len(practices), 100 * float(gained.mean()), better, worse)
