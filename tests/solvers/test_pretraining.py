"""Agents are trained on many problems at once, kept in a file, and a search starts from what they know."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import envs
import haq
import hw_models
from haq.networks.checkpoint import read_state, write_safetensors
from haq.problem import synthetic
from haq.problem.synthetic import Drawn, Response
from haq.problem.table_file import UNKNOWN, TableFile
from haq.solvers import pretraining, random_search
from haq.solvers.agent_file import AgentFile

HIDDEN = [12, 8]


@pytest.fixture(autouse=True)
def cheap_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Targets that are priced in milliseconds."""
    monkeypatch.setattr(hw_models, "target_names", lambda: ["edge", "cloud"])


@functools.cache
def made_up(count: int, seed: int = 0) -> list[Drawn]:
    generator = np.random.default_rng(seed)
    return [synthetic.draw(generator) for _ in range(count)]


def last_layers_alone(count: int, seed: int = 0) -> list[Drawn]:
    """Problems in which nothing is lost by few bits in the first half of the layers: what can be learned of all of them."""
    generator = np.random.default_rng(seed)
    made: list[Drawn] = []
    while len(made) < count:
        drawn = synthetic.draw(generator)
        if len(drawn.decisions) > 10:
            continue
        assert isinstance(drawn.response, Response)
        half = len(drawn.decisions) // 2
        damage = [of_decision * float(index >= half) for index, of_decision in enumerate(drawn.response.damage)]
        response = dataclasses.replace(drawn.response, damage=damage, interactions=0 * drawn.response.interactions, power=1.0)
        options = synthetic.random_within(drawn.decisions, drawn.limit, 64, generator)
        response = dataclasses.replace(response, unit=response.unit * float(np.median(response.total(options))) + 1e-9)
        made.append(dataclasses.replace(drawn, response=response))
    return made


def without_interactions(problem: Drawn) -> Drawn:
    """The same problem, whose operands add up."""
    assert isinstance(problem.response, Response)
    response = dataclasses.replace(problem.response, interactions=0 * problem.response.interactions)
    return dataclasses.replace(problem, response=response)


def agent(kind: str = "ddpg", episodes: int = 64, **others: object) -> AgentFile:
    return pretraining.pretrain({"synthetic:2": made_up(2)}, kind, episodes=episodes, hidden=HIDDEN, **others).agent  # type: ignore[arg-type]


def table(known: float = 0.5) -> TableFile:
    """An enumerated problem, known up to a share of the way from its cheapest policy to its dearest."""
    generator = np.random.default_rng(3)
    drawn = synthetic.draw(generator)
    while len(drawn.decisions) > 8:
        drawn = synthetic.draw(generator)
    pairs = [decision.pairs[-3:] for decision in drawn.decisions]
    prices = [decision.prices[-3:] for decision in drawn.decisions]
    firsts = [len(decision.pairs) - len(of) for decision, of in zip(drawn.decisions, pairs, strict=True)]
    ranges = [range(first, first + len(of)) for first, of in zip(firsts, pairs, strict=True)]
    options = np.array(list(itertools.product(*ranges)))
    accuracy, loss = drawn.response.judge(options)
    total = sum(decision.prices[options[:, i]] for i, decision in enumerate(drawn.decisions))
    limit = float(total.min() + known * np.ptp(total))
    accuracy[total > limit] = UNKNOWN
    return TableFile(
        name="tiny",
        metric=drawn.metric,
        target="edge",
        widths=haq.problem.decision.read_bits((1, 8)),
        float_accuracy=drawn.float_accuracy,
        search_images=1000,
        test_images=1000,
        limits={"half": limit},
        workload=drawn.workload,
        groups=[decision.layers for decision in drawn.decisions],
        cost=drawn.cost,
        noise=drawn.quantization_error,
        pairs=pairs,
        prices=prices,
        accuracy=accuracy,
        loss=loss,
        kl=loss,
        accuracy_test=accuracy,
        loss_test=loss,
        extra={},
    )


def test_made_up_problems_are_problems() -> None:
    for drawn in made_up(6):
        env = envs.MixedPrecisionEnv(drawn)
        env.reset()
        done, info = False, {}
        while not done:
            _, _, done, _, info = env.step(np.array([0.3, -0.2], np.float32))
        assert 1 / drawn.response.classes <= info["accuracy"] < drawn.float_accuracy  # type: ignore[attr-defined]
        options = synthetic.random_within(drawn.decisions, drawn.limit, 50, np.random.default_rng(0))
        cost = sum(decision.prices[options[:, i]] for i, decision in enumerate(drawn.decisions))
        assert (cost <= drawn.limit * (1 + 1e-9)).all()
        accuracy, loss = drawn.response.judge(options)
        pairs = [decision.pairs[option] for decision, option in zip(drawn.decisions, options[0], strict=True)]
        assert drawn.evaluate(drawn.decide(pairs))[:2] == (accuracy[0], loss[0])
        # The loss says the same as the accuracy; what adds up has its best where every decision has.
        assert np.corrcoef(accuracy, loss)[0, 1] < -0.99
        added = without_interactions(drawn).response
        assert isinstance(added, Response)
        least = np.array([[of_decision.sum(1).argmin() for of_decision in added.damage]])
        assert added.judge(least)[0] >= added.judge(options)[0].max() - 1e-12
    assert [one.limit for one in made_up(3)] == [one.limit for one in made_up(6)[:3]]
    assert made_up(1)[0].limit != made_up(1, seed=1)[0].limit


def test_an_enumerated_problem_is_put_within_other_budgets_and_on_other_hardware() -> None:
    file = table()
    generator = np.random.default_rng(0)
    drawn = [pretraining.draw_from(file, generator) for _ in range(8)]
    assert len({one.limit for one in drawn}) == 8
    assert {one.name for one in drawn} > {"tiny on cloud"}
    for one in drawn:
        every = np.array(list(itertools.product(*(range(len(decision.pairs)) for decision in one.decisions))))
        cost = sum(decision.prices[every[:, i]] for i, decision in enumerate(one.decisions))
        accuracy = one.response.judge(every[cost <= one.limit])[0]
        # All that is within the budget is known, and there is something to choose from.
        assert len(accuracy) >= 100
        assert (accuracy != UNKNOWN).all()
        assert np.array_equal(one.response.judge(every)[0], file.accuracy)


def test_the_same_seed_gives_the_same_agent_and_leaves_global_generators_alone() -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index]
    first, again, other = agent("sac", 192), agent("sac", 192), agent("sac", seed=1)
    assert set(first.tensors) == set(again.tensors)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in first.tensors.items())
    assert not all(torch.equal(tensor, other.tensors[name]) for name, tensor in first.tensors.items())
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_an_agent_that_knows_nothing_plays_the_plan() -> None:
    unseen = made_up(3, seed=7)
    untrained = agent(episodes=1)
    for problem in unseen:
        episodes = envs.Episodes(problem)
        episodes.begin(1)
        while not episodes.is_over:
            episodes.take(episodes.planned())
        assert pretraining.zero_shot(problem, untrained) == episodes.options[0].tolist()


def test_critics_learn_which_steps_are_worth_it() -> None:
    trainer = pretraining.Trainer("td3", [32], 0)
    practice = pretraining.Practice(made_up(1)[0], np.random.default_rng(0))
    for _ in range(20):
        trainer.play(practice)
        trainer.learn(critics_alone=True)
    accuracy, seen, actions = practice.play_round(
        lambda observed: np.zeros((len(observed), 2), np.float32), np.random.default_rng(1)
    )
    gained = (accuracy[1:] - accuracy[0]) / practice.unit
    with torch.no_grad():
        values = trainer.critic(*(torch.as_tensor(part[: len(gained)]) for part in (seen, actions)))[0][:, 0].numpy()
    assert np.corrcoef(values, gained)[0, 1] > 0.3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddpg", "td3", "sac"])
def test_what_holds_for_all_problems_is_learned_and_helps_on_those_never_seen(kind: str) -> None:
    unseen = [pretraining.Practice(one, np.random.default_rng(0)) for one in last_layers_alone(20, seed=2)]
    made = pretraining.pretrain({"halves": last_layers_alone(40, seed=1)}, kind, episodes=16000)
    assert made.kept_at > 0
    gained = []
    for practice in unseen:
        chosen = np.array([pretraining.zero_shot(practice.problem, made.agent)])
        gained.append(practice.gained(practice.problem.response.judge(chosen)[0])[0])
    assert sum(one > 0 for one in gained) > 2 * sum(one < 0 for one in gained)
    trained, held_back = made.rows
    assert (trained.held_back, held_back.held_back) == (False, True)
    assert (trained.problems, held_back.problems) == (32, 8)
    assert trained.better > 2 * trained.worse


def test_a_search_begins_with_what_a_pretrained_agent_does() -> None:
    problem, made = haq.Problem.tabular("digres"), agent(seed=3)
    # Its actor asks for something else than the plan.
    tensors = dict(made.tensors)
    tensors["actor/mu.4.bias"] = torch.tensor([0.6, -0.6])
    changed = dataclasses.replace(made, tensors=tensors)
    chosen = pretraining.zero_shot(problem, changed)
    assert chosen != pretraining.zero_shot(problem, made)
    result = haq.solve(problem, "ddpg", evaluations=4, agent=changed)
    assert random_search.policy(problem, chosen) in [trial.policy for trial in result.trials]
    assert result.session.origins[:2] == ["start", "ddpg"]
    assert haq.solve(problem, "ddpg", evaluations=4).session.origins[:2] == ["start", "start"]
    again = haq.solve(problem, "ddpg", evaluations=4, agent=changed)
    assert [trial.policy for trial in again.trials] == [trial.policy for trial in result.trials]


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    made = agent()
    made.write(tmp_path / "agent.safetensors")
    found = AgentFile.read(tmp_path / "agent.safetensors")
    assert found.record == made.record
    assert found.record.trained_on == ["synthetic:2"]
    assert found.record.features == list(envs.FEATURES)
    assert all(torch.equal(tensor, made.tensors[name]) for name, tensor in found.tensors.items())
    content = (tmp_path / "agent.safetensors").read_bytes()
    found.write(tmp_path / "agent.safetensors")
    assert (tmp_path / "agent.safetensors").read_bytes() == content
    assert found.checksum == AgentFile.read(tmp_path / "agent.safetensors").checksum


def changed(path: Path, what: str) -> None:
    """Write a file of an agent in which one thing is wrong."""
    agent().write(path)
    tensors, notes = read_state(path)
    record = json.loads(notes["agent"])
    name = "actor/mu.0.weight"
    if what == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
        return
    if what == "text":
        path.write_text("an agent")
        return
    if what == "newer":
        notes["format"] = "haq-agent-2"
    elif what == "network":
        notes = {"format": "haq-checkpoint-1"}
    elif what == "silent":
        del notes["agent"]
    elif what == "kind":
        record["kind"] = "ppo"
    elif what == "hidden":
        record["hidden"] = [12, 9]
    elif what == "sizes":
        record["hidden"] = [10**9]
    elif what == "feature":
        record["features"][3] = "colour"
    elif what == "fewer":
        del record["features"][-1]
    elif what == "nan":
        tensors[name][0, 0] = float("nan")
    elif what == "double":
        tensors[name] = tensors[name].double()
    elif what == "lacking":
        del tensors[name]
    if "agent" in notes:
        notes["agent"] = json.dumps(record)
    write_safetensors(tensors, path, notes)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("truncated", "truncated or of another kind"),
        ("text", "truncated or of another kind"),
        ("newer", "newer version of haq (haq-agent-2, this one reads haq-agent-1)"),
        ("network", "'haq-checkpoint-1', not 'haq-agent-1'"),
        ("silent", "doesn't say what it is"),
        ("kind", "'kind' is 'ppo'"),
        ("hidden", "doesn't hold the networks that its header tells of"),
        ("sizes", "'hidden.0' is 1000000000"),
        ("feature", "is 'colour', and here it is 'in_channels'"),
        ("fewer", "is missing, and here it is"),
        ("nan", "not finite in actor/mu.0.weight"),
        ("double", "torch.float64"),
        ("lacking", "actor/mu.0.weight is missing"),
    ],
)
def test_a_wrong_file_is_refused_in_a_sentence(tmp_path: Path, what: str, words: str) -> None:
    path = tmp_path / "agent.safetensors"
    changed(path, what)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        haq.solve(haq.Problem.tabular("digres"), "ddpg", evaluations=1, agent=path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 400


def test_only_agents_of_its_kind_start_from_it(tmp_path: Path) -> None:
    problem, made = haq.Problem.tabular("digres"), agent("td3")
    with pytest.raises(ValueError, match="'random' is no agent that could start from a pretrained agent: .* choose td3"):
        haq.solve(problem, "random", evaluations=1, agent=made)
    with pytest.raises(ValueError, match="is a pretrained td3, from which ddpg can't start"):
        haq.solve(problem, "ddpg", evaluations=1, agent=made)
    with pytest.raises(ValueError, match="what the environment 'plan' shows, and 'haq' shows something else"):
        haq.solve(problem, "td3", evaluations=1, agent=made, env="haq")
    with pytest.raises(TypeError, match="agent is a int; it must be the path of a file"):
        haq.solve(problem, "td3", evaluations=1, agent=3)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="there is no"):
        haq.solve(problem, "td3", evaluations=1, agent=tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match=r"must end in \.safetensors"):
        haq.solve(problem, "td3", evaluations=1, agent=tmp_path / "none.zip")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to train on: give names of tables"),
        (["nothing"], "'nothing' is no problem to train on"),
        (["synthetic"], "must be synthetic:N"),
        (["synthetic:1e3"], "from 1 to 10000"),
        (["synthetic:1", "synthetic:1"], "is there twice"),
    ],
)
def test_what_is_no_problem_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretraining.read_problems(words, 0)
