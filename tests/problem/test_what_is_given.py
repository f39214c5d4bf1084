"""Whatever networks, images and labels a problem is given: it says what is right, or in one sentence what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import haq
import hw_models
from haq.problem.evaluator import Evaluator
from tests.conftest import brightest, images, small_network

X, FEW = images(64), images(16, 1)
Y = brightest(X)


def problem(network: nn.Module | None = None, **change: Any) -> haq.Problem:
    given = {"calibrate": FEW, "search": (X, Y), "target": "edge", "budget": 0.9, **change}
    return haq.Problem(network or small_network(), **given)


def refilled() -> Iterator[tuple[Tensor, Tensor]]:
    """Batches that lie in the same memory, as some loaders make them."""
    memory, labels = torch.empty(32, 1, 8, 8), torch.empty(32, dtype=torch.long)
    for part, of_part in zip(X.split(32), Y.split(32), strict=True):
        yield memory.copy_(part), labels.copy_(of_part)


class Compiled(nn.Module):
    """Has what `torch.compile` makes: the network it was made of under this name."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = small_network()


class Uneven(Dataset[tuple[Tensor, int]]):
    """Images of several sizes."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.zeros(1, 8 + index, 8), 0


SAME: dict[str, Callable[[], dict[str, Any]]] = {
    "labels int32": lambda: {"search": (X, Y.int())},
    "labels uint16": lambda: {"search": (X, Y.to(torch.uint16))},
    "all NumPy": lambda: {"search": (X.numpy(), Y.numpy().astype("uint8")), "calibrate": FEW.numpy()},
    "another byte order": lambda: {"search": (X.numpy().astype(">f4"), Y.numpy().astype(">i8"))},
    "flipped twice": lambda: {"search": (X.flip(0).numpy()[::-1], Y.flip(0).numpy()[::-1])},
    "NumPy batches": lambda: {"search": [(X.numpy(), Y.tolist())], "calibrate": [FEW.numpy()]},
    "float64": lambda: {"search": (X.numpy().astype(float), Y), "calibrate": FEW.double()},
    "calibrate with labels": lambda: {"calibrate": (FEW, torch.zeros(16))},
    "one memory": lambda: {"search": refilled()},
    "numbers of NumPy": lambda: {"bits": [np.int64(2), np.int8(8)]},
}


@pytest.mark.parametrize("name", SAME)
def test_other_forms_of_the_same_give_the_same(name: str) -> None:
    plain, other = problem(), problem(**SAME[name]())
    assert other.float_result == plain.float_result
    assert other.evaluate(other.uniform(3)) == plain.evaluate(plain.uniform(3))


def test_halves_become_float32() -> None:
    half, plain = problem(search=(X.half(), Y)), problem(search=(X.half().float(), Y))
    assert half.float_result == plain.float_result


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"search": (X, Y.float())}, ValueError, "`search` has labels of type torch.float32"),
        ({"search": (X, Y[:, None])}, ValueError, r"labels of type torch.int64 and shape \(64, 1\)"),
        ({"search": (X, nn.functional.one_hot(Y, 4))}, ValueError, r"shape \(64, 4\)"),
        ({"search": (X, Y + 1)}, ValueError, "labels such as 4 don't fit .* from 0 to 3"),
        ({"search": (X, Y - 1)}, ValueError, "labels such as -1 don't fit"),
        ({"search": ((X * 255).byte(), Y)}, ValueError, "inputs of type torch.uint8 .* must be torch.float32"),
        ({"search": (np.array([["a"]]), Y)}, ValueError, "an array of type <U1"),
        ({"calibrate": (FEW, FEW)}, ValueError, "a pair of two batches of inputs, .* give batches as a list"),
        ({"calibrate": [{"x": FEW}]}, ValueError, "gave a dict of inputs, and `search` a Tensor"),
        ({"bits": [4, 6, 8]}, TypeError, r"bits is \[4, 6, 8\]; it must be a pair .*: every width from the"),
        ({"pinned": {"stem": (None, None)}}, ValueError, r"'stem' is fixed at float/float .*, which edge can't do"),
        ({"search": (X[:, :, :4].permute(0, 2, 3, 1), Y)}, ValueError, r"can't compute inputs of shape \(1, 4, 8, 1\)"),
        ({"search": (X[0], Y[:1])}, ValueError, r"can't compute inputs of shape \(1, 8, 8\)"),
        ({"calibrate": list(FEW)}, ValueError, r"`calibrate` gave inputs of shape \(1, 8, 8\), and `search` of"),
        ({"search": (X.to_sparse(), Y)}, ValueError, "`search` gave a sparse, nested or meta tensor"),
        ({"search": (X.to("meta"), Y)}, ValueError, "a sparse, nested or meta tensor"),
        ({"search": (X, Y.to("meta"))}, ValueError, "a sparse, nested or meta tensor"),
        ({"search": Uneven()}, ValueError, "a Dataset whose entries make no batch .* of one shape"),
        ({"network": small_network().double()}, ValueError, "is of type torch.float64; .* call network.float()"),
        ({"metric": ["latency"]}, TypeError, r"metric is \['latency'\]; it must be 'latency', 'energy' or 'storage'"),
        ({"network": small_network().half()}, ValueError, "is of type torch.float16"),
        ({"network": small_network().to("meta")}, ValueError, "has parameters without numbers"),
        ({"network": nn.Sequential(nn.Flatten(), nn.LazyLinear(4))}, ValueError, "'1' has parameters without numbers"),
        ({"network": Compiled()}, ValueError, "the network is compiled"),
        ({"network": nn.Sequential(Compiled())}, ValueError, "part '0' is compiled"),
    ],
)
def test_what_means_nothing_is_one_sentence(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message) as error:
        problem(**change)
    assert "\n" not in str(error.value)


def test_the_evaluator_takes_class_numbers_alone() -> None:
    quantized = problem().evaluator.network
    assert torch.equal(Evaluator(quantized, X, Y.short()).labels, Y)
    for labels in (Y.float(), Y[:, None]):
        with pytest.raises(ValueError, match="`labels` has labels of type"):
            Evaluator(quantized, X, labels)


class Gives(nn.Module):
    """A network whose outputs come in some form, and perhaps another one in training."""

    def __init__(self, form: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.form = small_network(), form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.body(x))


class TakesTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = small_network()

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return self.body(x) * scale


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (lambda y: {"logits": y[:, :, None]}, r"shape \(1, 4, 1\)"),
        (lambda y: (y, y), "a tuple"),
        (lambda y: [y], "a list"),
        (lambda y: y[:, :, None], r"shape \(1, 4, 1\)"),
    ],
)
def test_outputs_are_class_scores(form: Callable[[Tensor], Any], words: str, threads: int) -> None:
    message = rf"outputs are class scores of shape \(images, classes\), not {words}"
    with pytest.raises(ValueError, match=message):
        problem(Gives(form))
    made = problem(search=(images(130), brightest(images(130))))
    with pytest.raises(ValueError, match=message.replace("1, 4", r"\d+, 4")):
        made.evaluator.measure(Gives(form).eval())
    made.evaluator.tune = lambda network: Gives(form).eval()
    with pytest.raises(ValueError, match=message.replace("1, 4", r"\d+, 4")):
        made.evaluate(made.uniform(4))


def test_a_network_of_two_inputs_has_no_targets_in_a_pair() -> None:
    with pytest.raises(ValueError, match=r"`search` has no targets, .* beside what the network takes"):
        problem(TakesTwo().eval())


@pytest.mark.parametrize("objective", ["accuracy", "agreement"])
def test_a_single_output_tells_nothing(objective: str) -> None:
    one = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 1)).eval()
    with pytest.raises(ValueError, match=f"'{objective}' needs a network with two outputs or more, not 1"):
        problem(one, objective=objective, search=(X, torch.zeros(64).long()), pinned={})


def test_every_module_keeps_its_mode(network: nn.Module) -> None:
    network.train()
    network.norm.eval()
    modes = [module.training for module in network.modules()]
    before = X.clone(), FEW.clone()
    problem(network)
    assert [module.training for module in network.modules()] == modes
    for fault in ({"search": (X, Y + 1)}, {"search": (X * torch.nan, Y)}):
        with pytest.raises(ValueError, match="fit outputs|finite"):
            problem(network, **fault)
        assert [module.training for module in network.modules()] == modes
    assert torch.equal(X, before[0])
    assert torch.equal(FEW, before[1])


class TakesOneOfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.bright, self.dark = small_network(), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.body(x)
        if x.mean() > 0:
            return self.bright(scores)
        return self.dark(scores)


def test_a_layer_that_only_other_images_reach_is_named() -> None:
    search = torch.cat([images(1) - 2, images(250) + 2])
    with pytest.raises(ValueError, match="layer 'bright' is called for some search images but neither"):
        problem(TakesOneOfTwo().eval(), search=(search, brightest(search)), calibrate=FEW - 2)
    with pytest.raises(ValueError, match="'?bright'?"):
        problem(TakesOneOfTwo().eval(), search=(search, brightest(search)), calibrate=FEW)


class Keeps(nn.Module):
    """Takes off the mean of what it gave before."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.mean = small_network(), torch.zeros(4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        self.mean = 0.9 * self.mean + 0.1 * y.mean(0)
        return y - self.mean


def test_a_network_that_keeps_what_it_gave_is_judged_with_a_warning() -> None:
    network = Keeps().eval()
    with pytest.warns(UserWarning, match="answers the same image differently from call to call"):
        given = problem(network)
    given.evaluate(given.uniform(8))
    assert type(given.evaluator.network.mean) is Tensor  # what follows the network leaves nothing behind


def test_chance_in_a_network_is_said() -> None:
    with pytest.warns(UserWarning, match="differently from call to call"):
        problem(Gives(lambda y: nn.functional.dropout(y, 0.5)))


class WritesOn:
    """A target that goes on writing into the table that it gave."""

    name, description = "writes-on", "for tests"

    def cost_table(self, workload: hw_models.Workload, *, batch: int | None = None) -> hw_models.CostTable:
        self.table = hw_models.load_target("edge").cost_table(workload, batch=batch)
        return self.table


def test_costs_stay_what_they_were() -> None:
    target = WritesOn()
    given = problem(target=target)
    before = given.cost.copy()
    for array in (target.table.latency_s, target.table.storage_bytes):
        assert array is not None
        array[:] = 1.0
    assert np.array_equal(given.cost, before)
    assert given.policy_cost(given.uniform(8)) == given.reference
