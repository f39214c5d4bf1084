"""Small things that many tests share: one thread, a network that is searched in milliseconds, and a problem made of it."""

from __future__ import annotations

import copy
import functools
import gc
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor, nn

import haq
import quantizers as Q
from tests import second_device

# Torch learns of devices once, before it first computes a gradient: whichever tests are run, and in which order.
second_device.register()

REFERENCE = Path(__file__).resolve().parents[2] / "shared" / "reference"

# The files that take longest, the longest first. Processes take files in turn, so one of these is never begun last.
LONG = (
    "study/test_exact_resume.py",
    "deployment/test_deployment.py",
    "study/test_cluster.py",
    "solvers/test_solvers.py",
    "study/test_workers.py",
    "solvers/test_agents.py",
    "solvers/test_joint_search.py",
    "commands/test_prune_and_quantize.py",
    "deployment/test_pruned_networks.py",
    "commands/test_hostile_runs.py",
    "attacks/test_robustness_assessment.py",
    "commands/test_command_line.py",
    "quantizers/test_quantizers_in_training.py",
    "test_published_networks.py",
    "commands/test_robustness_command.py",
    "study/test_sweep.py",
    "commands/test_search_command.py",
    "store/test_locks.py",
    "training/test_adversarial_training.py",
    "deployment/test_onnx_export.py",
    "deployment/test_integer_programs.py",
    "hw_models/test_measured_latency.py",
    "store/test_full_disk.py",
    "problem/test_objectives.py",
    "problem/test_robust_objective.py",
    "solvers/test_sensitivities.py",
    "reporting/test_report_in_a_browser.py",
    "commands/test_moved_runs.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the files of `LONG` come first, and then those with most tests."""
    counts = Counter(item.path for item in items)
    home = Path(__file__).parent

    def place(item: pytest.Item) -> tuple[int, int]:
        name = os.path.relpath(item.path, home)
        if name in LONG:
            return LONG.index(name), 0
        return len(LONG), -counts[item.path]

    items.sort(key=place)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keep what was imported out of every garbage collection."""
    gc.collect()
    gc.freeze()


# A test never asserts seconds: this machine may be busy.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    # Two threads on a busy core are slower than one, and the suite's networks are tiny.
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def pictures_once() -> Iterator[None]:
    """Draw the same policy of the same problem once: a picture takes a quarter of a small search."""
    from haq.reporting import pictures
    from haq.store import files
    from haq.study import picture, search_steps
    from haq.study.task import outline

    drawn: dict[tuple[str, Q.BitPolicy], bytes] = {}

    def save_picture(problem: haq.Problem, policy: Q.BitPolicy, path: Path, described: dict[str, Any] | None = None) -> None:
        key = json.dumps(described or outline(problem)), policy
        if key not in drawn:
            pictures.save(picture.draw_policy(problem, policy, described), path)
            drawn[key] = path.read_bytes()
        files.write(path, drawn[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_steps, "save_picture", save_picture)
        yield


def small_network(seed: int = 0) -> nn.Module:
    """A dense, a depthwise, a pointwise and a linear layer twice over, for 1x8x8 images and 4 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential()
        network.add_module("stem", nn.Conv2d(1, 16, 3, 2, 1, bias=False))
        network.add_module("norm", nn.BatchNorm2d(16))
        network.add_module("relu", nn.ReLU(inplace=True))
        network.add_module("depthwise", nn.Conv2d(16, 16, 3, 1, 1, groups=16))
        network.add_module("relu2", nn.ReLU())
        network.add_module("pointwise", nn.Conv2d(16, 16, 1))
        network.add_module("relu3", nn.ReLU())
        network.add_module("pool", nn.AdaptiveAvgPool2d(2))
        network.add_module("flatten", nn.Flatten())
        network.add_module("hidden", nn.Linear(64, 16))
        network.add_module("classifier", nn.Linear(16, 4))
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.data *= 2.5  # as it comes, the network answers the same to every image
    return network.eval()


def images(count: int, seed: int = 0) -> Tensor:
    """Four grey quarters each, and a little noise, in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    quarters = torch.rand(count, 1, 2, 2, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return 0.8 * quarters + 0.2 * torch.rand(count, 1, 8, 8, generator=generator)


def brightest(x: Tensor) -> Tensor:
    """Which quarter of each image is brightest: four classes that the small network can learn."""
    return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1).argmax(1)


def fitted(network: nn.Module, steps: int = 150) -> nn.Module:
    """The network itself, after some steps of learning `brightest`: about nine in ten are right then."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = images(2000, seed=7)
        labels = brightest(x)
        optimizer = torch.optim.Adam(network.train().parameters(), lr=3e-3)
        for _ in range(steps):
            batch = torch.randint(len(x), (64,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), labels[batch]).backward()
            optimizer.step()
    optimizer.zero_grad()
    return network.eval()


@functools.cache
def _fitted_small(seed: int) -> nn.Module:
    return fitted(small_network(seed))


def fitted_network(seed: int = 0) -> nn.Module:
    """The small network, fitted; a copy of its own for each caller."""
    return copy.deepcopy(_fitted_small(seed))


def enter(place: Path, patch: pytest.MonkeyPatch, module: str) -> None:
    """Make a folder the current one, with a job of one's own in it, as the module small_job."""
    (place / "small_job.py").write_text(module)
    patch.chdir(place)
    patch.setattr(sys, "path", [str(place), *sys.path])
    patch.delitem(sys.modules, "small_job", raising=False)


@pytest.fixture
def network() -> nn.Module:
    return small_network()


@pytest.fixture
def problem(network: nn.Module) -> haq.Problem:
    return make_problem(network)


def make_problem(
    network: nn.Module,
    budget: float | str = 0.6,
    metric: str = "latency",
    correction: str | None = None,
    scheme: str | Q.Scheme = "linear",
) -> haq.Problem:
    """The network's own float predictions are the labels: float accuracy is 1, and every bit taken away can be seen.

    With corrected biases so small a network would lose nothing at most policies, and solvers would have nothing to learn.
    """
    inputs = images(96)
    with torch.inference_mode():
        labels = network(inputs).argmax(1).clone()
    return haq.Problem(
        network,
        calibrate=images(32, 1),
        search=(inputs, labels),
        target="edge",
        metric=metric,
        budget=budget,
        correction=correction,
        scheme=scheme,
    )


@pytest.fixture
def reference() -> Path:
    """The folder of reference tables; tests that need the whole files are skipped where it isn't."""
    if not REFERENCE.is_dir():
        pytest.skip("the reference tables are not beside this checkout")
    return REFERENCE
