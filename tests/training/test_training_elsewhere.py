"""Training on another device than the CPU: as on the CPU, bit for bit, and everything random is drawn by the CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import quantizers as Q
from haq import data, networks, training
from haq.problem.objective import Objective
from haq.store.checkpoint import Checkpoint
from haq.training import Adversary
from tests import second_device
from tests.conftest import brightest, fitted_network, images, small_network
from tests.training.test_any_objective import ByName, Pixels, Segmenter, SquaredError, made, pixels, regression

second_device.register()  # before anything is computed: torch learns of devices once


@pytest.fixture(autouse=True)
def elsewhere() -> Iterator[None]:
    second_device.drawn.clear()
    yield
    assert not second_device.drawn


def job(name: str) -> tuple[networks.Network, data.Split, Objective | None]:
    """A network, its samples and what it is judged by, on the CPU."""
    if name == "classes":
        x = (255 * images(96)).to(torch.uint8)
        return networks.Network("own", fitted_network(), (1, 8, 8)), data.Split(x, brightest(x.float())), None
    if name == "by name":
        return networks.Network("own", made(ByName), ()), data.Split(*regression("dict")), SquaredError()
    return networks.Network("own", made(Segmenter), ()), data.Split(*pixels(48)), Pixels()


def tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    found = {**module.state_dict(), **Q.quantizer_state(module)}
    return {name: tensor.detach().to("cpu") for name, tensor in found.items()}


def same(one: nn.Module, other: nn.Module) -> bool:
    kept = tensors(other)
    return all(torch.equal(value, kept[name]) for name, value in tensors(one).items())


@pytest.mark.parametrize("name", ["classes", "by name", "pixels"])
def test_training_is_the_same(name: str, tmp_path: Path) -> None:
    found = []
    for device in ("cpu", second_device.DEVICE):
        network, split, objective = job(name)
        network.module.to(device)
        config = training.TrainConfig(2, 0.01, 0, batch_size=32, optimizer="AdamW")
        judge = None
        if objective is not None:
            judge = training.judge_of(network, split, objective=objective)
        state = Checkpoint(tmp_path / f"{device[:3]}-state", {})
        module = copy.deepcopy(network.module)
        training.fit(network, split, config, module=module, objective=objective, judge=judge, state=state)
        again = copy.deepcopy(network.module)
        training.fit(network, split, config, module=again, objective=objective, judge=judge, state=state)
        assert same(module, again)
        assert {parameter.device.type for parameter in module.parameters()} == {torch.device(device).type}
        found.append(module)
    assert same(*found)


@pytest.mark.parametrize("name", ["classes", "by name", "pixels"])
def test_fine_tuning_is_the_same(name: str) -> None:
    found = []
    outcomes: list[Any] = []
    for device in ("cpu", second_device.DEVICE):
        network, split, objective = job(name)
        inputs = network.preprocess(split.take(torch.arange(32))[0])
        qnetwork = Q.quantize(network.module, Q.BitPolicy.uniform(network.module, w=3, a=3), calibrate=[(inputs, None)])
        qnetwork = qnetwork.to(device)
        network.module.to(device)
        options: dict[str, Any] = {"epochs": 2, "objective": objective, "on_outcome": outcomes.append}
        if name == "classes":
            options["adversary"] = Adversary("rfgsm", 0.05)
        found.append(training.finetune(network, qnetwork, split, seed=0, **options))
    assert same(*found)
    assert outcomes[0] == outcomes[1]


def test_measuring_is_the_same() -> None:
    found = []
    for device in ("cpu", second_device.DEVICE):
        network, split, _ = job("classes")
        network.module.to(device)
        other = small_network(1).to(device)
        found.append((training.accuracy(network, split), training.agreement(network, split, other)))
        training.refresh_norms(network, other, split)
        found[-1] += (tuple(tensors(other)["norm.running_mean"].tolist()),)
    assert found[0] == found[1]
