"""A problem on a chip with capabilities: no policy leaves them, and the quantizers are the chip's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import haq
import hw_models
import quantizers as Q
from haq.problem.schemes import full_range, obeying
from hw_models.widths import PLACES, WIDTHS, place_of
from quantizers.functional import row
from tests.conftest import brightest, fitted_network, images

PAIRS = {"pairs": ["8/8", "4/8", "4/4"], "kinds": {"depthwise": ["8/8"]}}
X = images(48, 3)


class Chip:
    """Milliseconds by the product of the widths, for every layer at every pair."""

    description, provenance = "a chip", "measured"

    def __init__(self, capabilities: Any = None, name: str = "chip") -> None:
        self.capabilities = capabilities
        self.name = name

    def cost_table(self, workload: hw_models.Workload, *, batch: int | None = None) -> hw_models.CostTable:
        cost = np.outer(WIDTHS, WIDTHS) * 1e-3
        latency = np.broadcast_to(cost, (len(workload), PLACES, PLACES)).copy()
        return hw_models.CostTable(self.name, "measured", workload, 1, latency, None, hw_models.storage_bytes(workload))


def problem_on(capabilities: Any, **options: Any) -> haq.Problem:
    inputs = options.pop("inputs", X)
    return haq.Problem(
        fitted_network(), inputs, (X, brightest(X)), Chip(capabilities), **{"budget": 0.7, "bits": None, **options}
    )


@pytest.fixture(scope="module")
def problem() -> haq.Problem:
    return problem_on(PAIRS)


def test_nothing_but_what_the_chip_has_can_be_chosen(problem: haq.Problem) -> None:
    chosen = {tuple(pair) for decision in problem.decisions for pair in decision.pairs.tolist()}
    assert chosen == {(8, 8), (4, 8), (4, 4)}
    depthwise = problem.workload.names.index("depthwise")
    [decision] = [decision for decision in problem.decisions if depthwise in decision.layers]
    assert decision.pairs.tolist() == [[8, 8]]
    with pytest.raises(ValueError, match="chip can't do layer 'depthwise' at w4/a4; it can do 8/8"):
        problem.table.price(*problem.bit_arrays(problem.uniform(4)))
    assert problem.policy_cost(problem.uniform(4)) == np.inf
    assert not problem.means_something(problem.uniform(4))


@pytest.mark.parametrize("solver", ["random", "greedy", "ilp", "evolution", "exhaustive"])
def test_no_solver_leaves_what_the_chip_has(solver: str, problem: haq.Problem) -> None:
    policy = haq.solve(problem, solver, evaluations=12, seed=0).policy
    for name, layer in zip(problem.workload.names, problem.workload.layers, strict=True):
        allowed = {(8, 8), (4, 8), (4, 4)}
        if layer.kind == "depthwise":
            allowed = {(8, 8)}
        assert policy[name] in allowed
    assert problem.within_budget(problem.policy_cost(policy))


def test_16_bits_and_float_where_the_chip_has_them() -> None:
    problem = problem_on(
        {"pairs": ["8/8", "4/8"], "kinds": {"pointwise": ["16/16", "8/8"], "linear": ["float", "8/8"]}}, budget="1s"
    )
    by_layer = {problem.workload.names[d.layers[0]]: d.pairs.tolist() for d in problem.decisions}
    assert by_layer["pointwise"] == [[8, 8], [16, 16]]
    assert by_layer["hidden"] == [[8, 8], [32, 32]]
    assert by_layer["stem"] == [[8, 8]]
    result = haq.solve(problem, "random", evaluations=4, seed=1)
    assert problem.within_budget(problem.policy_cost(result.policy))


def test_scales_of_a_chip_with_one_per_tensor_that_shifts() -> None:
    problem = problem_on({**PAIRS, "per_channel_weights": False, "power_of_two_scales": True})
    assert all(scheme.options()["per_channel"] is False for scheme in problem.schemes.values())
    policy = haq.solve(problem, "random", evaluations=2, seed=0).policy
    network = problem.quantized(policy)
    for name, layer in Q.quant_layers(network).items():
        assert layer.weight_bits is not None
        step = problem.schemes[name].weight_step(layer, layer.weight_bits)
        assert step.numel() == 1
        for scale in (step, row(layer.activation_scale, layer.activation_bits)):
            assert torch.equal(scale, torch.exp2(torch.log2(scale).round()))
        levels = layer.quantized_weight().detach() / step
        assert torch.equal(levels, levels.round())
    plain = problem_on(PAIRS)
    # Stored is one scale per layer, where others have one per channel.
    eights = problem.bit_arrays(problem.uniform(8))
    saved = sum(4 * (layer.out_channels - 1) for layer in problem.workload.layers)
    assert problem.table.price(*eights).storage_bytes == plain.table.price(*eights).storage_bytes - saved
    assert Q.quant_layers(plain.quantized(policy))["pointwise"].weight_scale.shape[1] > 1


def test_integers_of_the_sign_that_the_chip_has() -> None:
    signed = problem_on({"activation_sign": "signed"})
    assert all(layer.scheme.has_signed_inputs(layer, 8) for layer in _layers(signed))
    unsigned = problem_on({**PAIRS, "activation_sign": "unsigned", "layers": {"last": ["8/float"]}}, budget=1.0)
    assert not any(layer.scheme.has_signed_inputs(layer, 8) for layer in _layers(unsigned)[:-1])
    # Nothing is there between the last two layers, so the last one has negative inputs.
    assert haq.solve(unsigned, "random", evaluations=1, seed=0).policy["classifier"] == (8, None)


def _layers(problem: haq.Problem) -> list[Any]:
    return list(Q.quant_layers(problem.evaluator.network).values())


def test_negative_inputs_of_a_chip_without_signs() -> None:
    """With zero points they are what they are; without, only float is left, and a layer that hasn't it is named."""
    negative = X - 0.5
    problem = problem_on({"activation_sign": "unsigned", "zero_points": True}, inputs=negative)
    stem = Q.quant_layers(problem.evaluator.network)["stem"]
    assert problem.schemes["stem"].has_zero_points
    assert problem.schemes["stem"].zero_point(stem, 8) > 0
    with pytest.raises(
        ValueError, match="layer 'stem' has no pair of widths on chip, which can do .*8/8: its input is negative in places"
    ):
        problem_on({**PAIRS, "activation_sign": "unsigned"}, inputs=negative)


def test_sums_that_can_overflow_are_refused() -> None:
    problem = problem_on({"pairs": ["8/8", "4/8", "4/4", "2/4"], "accumulator_bits": 18}, pinned={}, budget=1.0)
    names = problem.workload.names
    # The hidden layer sums 64 products: 127 x 255 x 64 needs 21 bits and a sign, 7 x 255 x 64 just 17 and a sign.
    hidden = problem.table.pairs_of(names.index("hidden"))
    assert hidden == [(2, 4), (4, 4), (4, 8)]
    assert problem.policy_cost(problem.uniform(8)) == np.inf
    with pytest.raises(
        ValueError, match="'chip': layer 'stem' has no pair of widths: its sums of 9 products need accumulators"
    ):
        problem_on({"pairs": ["8/8"], "kinds": {"linear": ["float"]}, "accumulator_bits": 18})


def test_integers_that_reach_further_are_counted_so() -> None:
    """LSQ's weights of 2 bits are -2 to 1."""
    content = {"pairs": ["2/8", "8/8", "float"], "accumulator_bits": 13}
    found = {}
    for scheme in ("linear", "lsq"):
        made = problem_on(content, scheme=scheme, metric="storage", pinned={}, budget=1.0)
        found[scheme] = made.table.supported[made.workload.names.index("pointwise"), place_of(2), place_of(8)]
    # 16 x 1 x 255 takes 12 bits and a sign, 16 x 2 x 255 one more.
    assert found == {"linear": True, "lsq": False}
    assert full_range({"a": Q.Linear(), "b": Q.Scheme.named("lsq"), "c": Q.KMeans()}) == {"b"}


@pytest.mark.parametrize(
    ("scheme", "content", "message"),
    [
        (
            "dorefa",
            {"power_of_two_scales": True},
            "'dorefa' of layer 'b' can't do what hardware target 'chip' needs: .*powers of",
        ),
        ("lsqplus", {"power_of_two_scales": True}, "'lsqplus' of layer 'b' .*powers of two"),
        ("dorefa", {"accumulator_bits": 24}, "'dorefa' of layer 'b' .*integers of more bits than their width"),
        ("pact", {"activation_sign": "signed"}, "'pact' of layer 'b' .*signed integers for all activations"),
    ],
)
def test_a_scheme_that_can_not_obey_is_named(scheme: str, content: Any, message: str) -> None:
    schemes = {"a": Q.Linear(), "b": Q.Scheme.named(scheme)}
    with pytest.raises(ValueError, match=f"^scheme {message}") as caught:
        obeying(schemes, Chip(content))
    assert str(caught.value).isprintable()


def test_schemes_stay_what_they_are_where_nothing_is_asked() -> None:
    schemes = {"a": Q.Linear(), "b": Q.Scheme.named("lsq"), "c": Q.KMeans()}
    for target in (Chip(), Chip(PAIRS), hw_models.load_target("edge")):
        made = obeying(schemes, target)
        assert all(made[name] is scheme for name, scheme in schemes.items())
    one = Q.Linear()
    shared = obeying({"a": one, "b": one}, Chip({"power_of_two_scales": True}))
    assert shared["a"] is shared["b"]
    assert shared["a"] == Q.Linear(power_of_two=True)


def test_another_chip_needs_other_quantizers(problem: haq.Problem) -> None:
    assert problem.on(Chip({"pairs": ["8/8", "2/8"]}, "other"), 0.9).target.name == "other"
    with pytest.raises(ValueError, match="^other wants weights or activations quantized otherwise than chip"):
        problem.on(Chip({**PAIRS, "power_of_two_scales": True}, "other"), 0.7)


def test_a_function_named_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: nn.Module) -> None:
    (tmp_path / "chip_of_mine.py").write_text(
        "def latency(layer, w, a):\n    return layer.macs * w * a * 1e-12\n"
        "latency.capabilities = {'pairs': ['8/8', '4/8', '4/4']}\n"
    )
    monkeypatch.chdir(tmp_path)
    found = haq.Problem(fitted_network(), X, (X, brightest(X)), "chip_of_mine:latency", budget=0.6)
    policy = haq.solve(found, "greedy", evaluations=5).policy
    assert set(policy.values()) <= {(8, 8), (4, 8), (4, 4)}
