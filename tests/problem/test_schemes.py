"""A problem can be of any scheme, of several by layer, and refuses at the start what means nothing in them."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import haq
import hw_models
import quantizers as Q
from haq.problem.evaluator import Evaluator
from haq.problem.schemes import describe_schemes, schemes_by_layer
from haq.study.config import SearchConfig
from haq.study.result import costs
from haq.study.task import schemes_of
from tests.conftest import brightest, fitted_network, images, small_network

X = images(120, 3)


def searched(scheme: Any, metric: str = "storage", **options: Any) -> haq.Problem:
    return haq.Problem(
        fitted_network(), images(64, 1), (X, brightest(X)), "edge", metric, **{"budget": 0.7, "scheme": scheme, **options}
    )


@pytest.mark.parametrize("scheme", ["linear", "lsq", "pact", "dorefa", "kmeans", Q.KMeans(), {"hidden": "kmeans"}])
def test_policies_are_judged_by_networks_of_the_scheme(scheme: Any) -> None:
    problem = searched(scheme)
    policy = problem.uniform(3)
    by_layer = scheme
    if isinstance(scheme, dict):
        by_layer = dict.fromkeys(problem.workload.names, "linear") | scheme
    by_layer = schemes_by_layer(by_layer, problem.workload.names)
    qnetwork = Q.quantize(problem.network, policy, scheme=by_layer, calibrate=images(64, 1), correction="analytic")
    with torch.no_grad():
        right = (qnetwork(X).argmax(1) == brightest(X)).float().mean().item()
    assert problem.evaluate(policy).accuracy == pytest.approx(right)
    layers = Q.quant_layers(problem.evaluator.network)
    for number, name in enumerate(problem.workload.names):
        errors = problem.schemes[name].quantization_errors(layers[name])
        assert np.array_equal(problem.layer_errors[number][:, :8], [errors[0][:8].tolist(), errors[1][:8].tolist()])
        assert problem.layer_errors[number][:, 9].tolist() == [0, 0]  # float
    result = haq.solve(problem, "greedy", evaluations=30)
    assert problem.within_budget(result.trial.cost)


def test_layers_without_a_scheme_of_their_own_are_linear() -> None:
    problem = searched({"hidden": "lsq"})
    assert [problem.schemes[name].name for name in problem.workload.names] == ["linear"] * 3 + ["lsq", "linear"]
    assert "scheme linear, lsq" in repr(problem)
    assert describe_schemes(problem.schemes) == "linear,hidden=lsq"
    with pytest.raises(ValueError, match="`scheme` names 'hiden', which is no layer of the workload; close: hidden"):
        searched({"hiden": "lsq"})
    with pytest.raises(ValueError, match=r"unknown scheme 'kmean'.* kmeans"):
        searched("kmean")


class Untouched(nn.Module):
    """A network that must not be run but to find its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = small_network()
        self.images = 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        return self.body(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "lsq", "bits": (1, 8)}, "'lsq' of layer 'body.depthwise' has no weights of 1 bit: .* --bits within 2:8"),
        ({"scheme": "lsq", "pinned": {"body.hidden": (1, 8)}}, "layer 'body.hidden' is fixed at 1/8: lsq has no weights"),
        ({"scheme": "kmeans", "metric": "latency"}, "scheme 'kmeans' .* no integers for weights.* --metric storage"),
        ({"scheme": {"body.hidden": "kmeans"}, "metric": "energy"}, "scheme 'kmeans' of layer 'body.hidden' has no integers"),
    ],
)
def test_what_means_nothing_is_refused_before_anything_is_computed(options: dict[str, Any], message: str) -> None:
    network = Untouched()
    with pytest.raises(ValueError, match=message):
        haq.Problem(network, X, (X, brightest(X)), "edge", **options)
    assert network.images == 3  # the first image alone: can it be taken, does it give the same again, and the trace


class OneSided(Q.Linear):  # without a name of its own, so that no other test finds it
    """Inputs of layers that are ever negative can't be given less than four bits."""

    def check(self, weight_bits: int | None, activation_bits: int | None, signed: bool = False) -> None:
        super().check(weight_bits, activation_bits)
        if signed and activation_bits is not None and activation_bits < 4:
            raise ValueError("one-sided needs 4 bits for negative inputs")


def test_pairs_without_a_meaning_are_not_chosen() -> None:
    inputs = X - 0.5  # so that what enters the first layer is negative, too
    problem = haq.Problem(
        small_network(), inputs, (inputs, brightest(X)), "edge", budget=0.7, scheme=OneSided(), pinned={"classifier": (8, 8)}
    )
    decided = zip(problem.workload.names, problem.decisions, strict=True)
    least = {name: decision.pairs[:, 1].min() for name, decision in decided}
    layers = Q.quant_layers(problem.evaluator.network)
    assert [name for name in layers if layers[name].signed] == ["stem", "classifier"]
    assert least == {"stem": 4, "depthwise": 2, "pointwise": 2, "hidden": 2, "classifier": 8}
    assert not problem.means_something(problem.uniform(2))
    result = haq.solve(problem, "random", evaluations=20)
    assert all(trial.policy["stem"][1] >= 4 for trial in result.trials)


def test_codebooks_are_stored_too() -> None:
    linear, kmeans = searched("linear"), searched({"hidden": "kmeans"})
    more = kmeans.table.storage_bytes - linear.table.storage_bytes
    hidden = linear.workload.names.index("hidden")
    # 64 x 16 weights: 2^bits values of 4 bytes, and no step for each of the 16 channels.
    assert more[hidden, :8, 0].tolist() == [4 * min(2**bits, 1024) - 4 * 16 for bits in range(1, 9)]
    assert not np.nan_to_num(np.delete(more, hidden, axis=0)).any()
    assert kmeans.policy_cost(kmeans.uniform(4)) == linear.policy_cost(linear.uniform(4)) + 64 - 64
    everywhere = searched("kmeans")
    stored = hw_models.storage_bytes(everywhere.workload, "kmeans")
    assert np.array_equal(everywhere.table.storage_bytes[:, :8, :8], stored[:, :8, :8])


def test_costs_of_integer_arithmetic_mean_nothing_without_integers() -> None:
    problem = searched({"hidden": "kmeans"})
    assert problem.metrics == ("storage",)
    assert costs(problem, problem.uniform(4))["latency_s"] is None
    assert costs(problem, problem.uniform(4))["storage_bytes"] == problem.policy_cost(problem.uniform(4))
    linear = searched("linear")
    assert linear.metrics == ("latency", "energy", "storage")
    assert None not in costs(linear, linear.uniform(4)).values()


def test_what_is_learned_can_be_trained_after_a_search() -> None:
    problem = searched("lsq")
    network = problem.quantized(problem.uniform(3))
    learned = Q.learned_parameters(network)
    assert learned
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert Q.get_policy(problem.evaluator.network) != Q.get_policy(network)


def test_schemes_of_a_configuration() -> None:
    names = ["a", "b", "c", "d"]

    def named(scheme: str) -> list[str]:
        return [one.name for one in schemes_of(SearchConfig(scheme=scheme, metric="storage"), names).values()]

    assert named("linear") == ["linear"] * 4
    assert named("lsq") == ["linear", "lsq", "lsq", "linear"]
    assert named("lsq,a=lsq,c=kmeans") == ["lsq", "lsq", "kmeans", "linear"]
    assert named("b=kmeans") == ["linear", "kmeans", "linear", "linear"]
    with pytest.raises(ValueError, match="names 'e', which is no layer"):
        named("lsq,e=pact")


def test_a_pickled_evaluator_knows_its_scheme() -> None:
    """A worker gets one."""
    import cloudpickle

    problem = searched("kmeans")
    copy: Evaluator = cloudpickle.loads(cloudpickle.dumps(problem.evaluator))
    assert copy.evaluate(problem.uniform(3)) == problem.evaluate(problem.uniform(3))


def test_zero_points_need_a_target_that_has_them(tmp_path: Path) -> None:
    sentence = (
        "scheme 'linear-asymmetric' of layer 'stem' gives signed inputs zero points, and hardware target 'edge' computes "
        "without any: choose a target that has them, such as cpu, or scheme linear"
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        searched("linear-asymmetric")
    with pytest.raises(ValueError, match="scheme 'linear' of layer 'hidden' gives signed inputs zero points"):
        searched({"hidden": Q.Linear(asymmetric=True)})
    shipped = resources.files("hw_models").joinpath("targets/edge.yaml").read_text()
    (tmp_path / "affine.yaml").write_text(f"{shipped}\nzero_points: true\n")
    target = hw_models.load_target(str(tmp_path / "affine.yaml"))
    network, x = small_network(), images(32) - 0.3
    labels = network(x).argmax(1)
    problem = haq.Problem(network, calibrate=x, search=(x, labels), target=target, scheme="linear-asymmetric")
    assert problem.evaluate(problem.uniform(8)).accuracy > 0.9
    assert float(Q.quant_layers(problem.evaluator.network)["stem"].activation_zero_point[3]) > 0
    with pytest.raises(ValueError, match="hardware target 'bitfusion' computes without any"):
        problem.on("bitfusion", 0.6)
    edge: Any = hw_models.load_target("edge")
    assert edge.zero_points is False


def test_targets_with_zero_points() -> None:
    from hw_models.lut import LookupTarget
    from hw_models.tvm_cpu.target import CpuTarget

    assert CpuTarget.zero_points
    assert LookupTarget.zero_points


def test_layers_that_gptq_cannot_round_are_rounded_to_nearest() -> None:
    problem = searched({"hidden": "kmeans"}, rounding="gptq")
    assert problem.roundings["hidden"] == "nearest"
    assert "gptq" in problem.roundings.values()
    layers = Q.quant_layers(problem.evaluator.network)
    for name, rounding in problem.roundings.items():
        assert (layers[name].weight_offset is not None) == (rounding == "gptq")
    few = haq.Problem(fitted_network(), images(1, 1), (X, brightest(X)), "edge", "storage", 0.7, rounding="gptq")
    assert "nearest" in few.roundings.values()
    with pytest.raises(ValueError, match="rounding .gptq. means nothing to scheme kmeans: choose nearest"):
        searched("kmeans", rounding="gptq")
    ends = dict.fromkeys(Q.ends(problem.workload.names), "linear")
    with pytest.raises(ValueError, match="rounding .gptq. means nothing to scheme kmeans"):
        searched(dict.fromkeys(problem.workload.names, "kmeans") | ends, rounding="gptq")
