"""Schemes are found by name: our own, those of installed packages, and `module:Name` if a person names it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import quantizers as Q
from tests.conftest import images
from tests.hw_models.conftest import break_packages

TERNARY = '''
import torch
import quantizers as Q


class Ternary(Q.Scheme):
    """Weights are -1, 0 or +1 times their mean magnitude at every width; inputs are rounded to 2^-bits."""

    summary = "three levels"
    needs_data = False

    def __init__(self, threshold=0.5):
        self.threshold = threshold

    def options(self):
        return {"threshold": self.threshold}

    def start(self, layer):
        return {"mean": torch.ones(())}

    def calibrate(self, layer, observer):
        layer.mean.copy_(layer.weight.abs().mean())

    def weight(self, layer, bits):
        return layer.mean * layer.weight.sign() * (layer.weight.abs() > self.threshold * layer.mean)

    def activation(self, layer, x, bits):
        return (x * 2**bits).round() / 2**bits
'''
Install = Callable[[str, str, str], None]


@pytest.fixture(autouse=True)
def the_same_schemes_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Q.Scheme, "known", dict(Q.Scheme.known))


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Install a package of one module that offers one scheme."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def make(name: str, place: str, code: str) -> None:
        module = place.partition(":")[0]
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{module}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.5\nSummary: Few levels\n")
        (info / "entry_points.txt").write_text(f"[quantizers.schemes]\n{name} = {place}\n")

    yield make
    for module in set(sys.modules) - before:
        if module.startswith("plugged"):
            del sys.modules[module]


def test_our_own_are_listed_with_a_line_each() -> None:
    names = Q.scheme_names()
    assert {"linear", "dorefa", "pact", "lsq", "lsqplus", "kmeans", "binary", "main-subsidiary"} <= set(names)
    assert len(names) == len(set(names))
    for row in Q.scheme_rows():
        if row.name in Q.Scheme.known:
            assert row.origin == "built in"
            assert row.line
            assert "\n" not in row.line
            assert Q.Scheme.named(row.name).name == row.name


def test_an_installed_scheme_is_listed_without_being_imported(install: Install) -> None:
    install("ternary", "plugged_listed:Ternary", "raise RuntimeError('imported')")
    assert "ternary" in Q.scheme_names()
    assert ("ternary", "plugged_listed 1.5", "Few levels") in Q.scheme_rows()
    assert "plugged_listed" not in sys.modules


def test_an_installed_scheme_does_all_that_ours_do(install: Install, network: nn.Module) -> None:
    install("ternary", "plugged_ternary:Ternary", TERNARY)
    policy = Q.BitPolicy.uniform(network, w=2, a=4)
    qnetwork = Q.quantize(network, policy, scheme="ternary", calibrate=images(32))
    layers = Q.quant_layers(qnetwork)
    assert {layer.scheme.name for layer in layers.values()} == {"ternary"}
    for layer in layers.values():
        assert len(layer.quantized_weight().unique()) <= 3
        of_weights, of_activations = layer.scheme.quantization_errors(layer)
        made = layer.quantized_weight()
        expected = (made - layer.weight).square().sum() / layer.weight.square().sum()
        assert of_weights[:8].tolist() == pytest.approx([expected.item()] * 8, rel=1e-5)
        assert (of_activations[:8].diff() < 0).all()
        assert layer.scheme.storage_overhead_bytes(4) == 0
        with pytest.raises(ValueError, match="^weights of scheme 'ternary' are no multiples of a step$"):
            layer.scheme.integer_weights(layer)
        with pytest.raises(ValueError, match="^activations of scheme 'ternary' are no multiples of a step$"):
            layer.scheme.integer_activations(layer)
    records = Q.scheme_records(qnetwork)
    assert records["stem"] == {"name": "ternary", "options": {"threshold": 0.5}}
    del Q.Scheme.known["ternary"]  # as in another process
    again = Q.quantize(network, policy, scheme=Q.schemes_from_records(records), state=Q.quantizer_state(qnetwork))
    assert torch.equal(again(images(4)), qnetwork(images(4)))
    assert torch.equal(Q.float_copy(again)(images(4)), network(images(4)))


def test_a_scheme_of_a_module_is_named_by_a_person_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: nn.Module
) -> None:
    (tmp_path / "plugged_mine.py").write_text(TERNARY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.delitem(sys.modules, "plugged_mine", raising=False)
    name = "plugged_mine:Ternary"
    record = {"stem": {"name": name, "options": {"threshold": 0.7}}}
    with pytest.raises(ValueError, match="unknown scheme 'plugged_mine:Ternary'.*only imported if you name it yourself"):
        Q.Scheme.named(name, modules=False)
    with pytest.raises(ValueError, match="layer 'stem': unknown scheme.*only imported if you name it yourself"):
        Q.schemes_from_records(record)
    assert "plugged_mine" not in sys.modules
    scheme = Q.Scheme.named(name)
    assert scheme.name == name
    # What was named once is known: a file may say it, too.
    assert Q.schemes_from_records(record)["stem"].options() == {"threshold": 0.7}
    assert Q.quantize(network, Q.BitPolicy.uniform(network, 2, 4), scheme=name)(images(2)).isfinite().all()
    assert name in Q.scheme_names()


def test_a_scheme_that_fails_to_import_is_one_sentence(install: Install) -> None:
    install("broken", "plugged_broken:Ternary", "import a_module_that_there_is_not")
    with pytest.raises(ImportError) as caught:
        Q.Scheme.named("broken")
    sentence = str(caught.value)
    assert sentence.startswith("scheme 'broken' of plugged_broken 1.5 can't be imported from plugged_broken:Ternary: ")
    assert "a_module_that_there_is_not" in sentence
    assert "\n" not in sentence


def test_a_missing_class_is_named(install: Install) -> None:
    install("absent", "plugged_absent:Quaternary", TERNARY)
    with pytest.raises(ImportError, match="scheme 'absent' of plugged_absent 1.5.*has no 'Quaternary'"):
        Q.Scheme.named("absent")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("class Thing: pass", "no subclass of quantizers.Scheme"),
        ("Thing = 3", "no subclass of quantizers.Scheme"),
        ("import quantizers as Q\nclass Thing(Q.Scheme): pass", "lacks start and calibrate and weight and activation"),
        (TERNARY.replace("def activation(", "def activate(").replace("Ternary", "Thing"), "lacks activation"),
        (TERNARY.replace("threshold=0.5", "threshold").replace("Ternary", "Thing"), "without options.*threshold"),
    ],
)
def test_what_a_scheme_lacks_is_named_at_once(install: Install, network: nn.Module, code: str, message: str) -> None:
    install("lacking", "plugged_lacking:Thing", code)
    for ask in (Q.Scheme.named, lambda name: Q.quantize(network, Q.BitPolicy.uniform(network, 2, None), scheme=name)):
        with pytest.raises(ValueError, match=f"^scheme 'lacking' can't be .*{message}"):
            ask("lacking")


def test_names_that_are_taken_or_offered_twice(install: Install) -> None:
    """Ours come first; of two packages' none, and the sentence says what to do."""
    install("lsq", "plugged_lsq:Ternary", TERNARY)
    assert type(Q.Scheme.named("lsq")) is Q.LSQ
    rows = [row for row in Q.scheme_rows() if row.name == "lsq"]
    assert [row.origin for row in rows] == ["built in", "plugged_lsq 1.5"]
    assert rows[1].line == "not used, the name is taken: give plugged_lsq:Ternary"
    assert Q.scheme_names().count("lsq") == 1
    install("twice", "plugged_first:Ternary", TERNARY)
    install("twice", "plugged_second:Ternary", TERNARY)
    with pytest.raises(
        ValueError, match="'twice' is offered by plugged_first 1.5 and plugged_second 1.5: give plugged_first:T"
    ):
        Q.Scheme.named("twice")


def test_what_cannot_be_found_again_is_not_recorded(network: nn.Module) -> None:
    class Unnamed(Q.Linear):
        pass

    class Holding(Q.Linear, name="holding"):
        pass

    class Plain(Q.Scheme, name="plain"):
        start, calibrate, weight, activation = Q.DoReFa.start, Q.DoReFa.calibrate, Q.DoReFa.weight, Q.DoReFa.activation
        needs_data = False

        def __init__(self, strength: float = 1.0) -> None:
            self.strength = strength

    policy = Q.BitPolicy.uniform(network, 4, None)
    with pytest.raises(ValueError, match="layer 'stem': class Unnamed can't be recorded: it has no name of its own"):
        Q.scheme_records(Q.quantize(network, policy, scheme=Unnamed()))
    with pytest.raises(ValueError, match="layer 'stem': scheme 'plain' holds strength: give it a method `options`"):
        Q.scheme_records(Q.quantize(network, policy, scheme="plain"))
    records = Q.scheme_records(Q.quantize(network, policy, scheme=Holding("max")))
    assert Q.schemes_from_records(records)["stem"] == Holding("max")


def test_unknown_names_list_the_close_ones(install: Install) -> None:
    install("ternary", "plugged_close:Ternary", TERNARY)
    with pytest.raises(ValueError, match="unknown scheme 'linaer'; did you mean linear.* known: linear.*ternary, or module"):
        Q.Scheme.named("linaer")
    with pytest.raises(ValueError, match="did you mean ternary"):
        Q.Scheme.named("ternari")
    assert "plugged_close" not in sys.modules


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "given by layer, not as list"),
        ({"a": "linear"}, "layer 'a': the record of a scheme must have a name and options"),
        ({"a": {"name": "linear"}}, "layer 'a'.*name and options"),
        ({"a": {"name": 3, "options": {}}}, "layer 'a'.*a text as name"),
        ({"a": {"name": "linear", "options": []}}, "layer 'a'.*options by name"),
        ({"a": {"name": "linaer", "options": {}}}, "layer 'a': unknown scheme 'linaer'; did you mean linear"),
        ({"a": {"name": "lsq", "options": {"calibration": "mse"}}}, "layer 'a': scheme 'lsq' doesn't take the options"),
        ({"a": {"name": "linear", "options": {"calibration": "x"}}}, "layer 'a': unknown calibration 'x'"),
        ({"a": {"name": "os:system", "options": {}}}, "layer 'a'.*only imported if you name it yourself"),
    ],
)
def test_records_that_are_none_are_refused(records: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Q.schemes_from_records(records)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["this:x", "antigravity:x", "os:getcwd", "os.path:join"])
def test_a_module_of_python_itself_is_not_imported(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=f"^scheme '{name}' can't be imported: {name} is of Python itself; give module:Name$"):
        Q.Scheme.named(name)
    assert "this" not in sys.modules
    assert "antigravity" not in sys.modules
    assert not capsys.readouterr().out


def test_a_broken_package_is_named_and_all_others_are_found(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(vars(logging.getLogger("haq")), "said_of_packages", set())
    install("ternary", "plugged_sound:Ternary", TERNARY)
    break_packages(tmp_path, "quantizers.schemes")
    assert {"ternary", "elm", "fir"} <= set(Q.scheme_names())
    assert not {"oak", "ash"} & set(Q.scheme_names())
    assert Q.Scheme.named("ternary").name == "ternary"
    rows = Q.scheme_rows()
    assert ("ternary", "plugged_sound 1.5", "Few levels") in rows
    assert ("elm", "no_metadata-1.dist-info, whose METADATA is broken", "no:Thing") in rows
    assert ("fir", "no_utf8_metadata-1.dist-info, whose METADATA is broken", "no:Thing") in rows
    assert sorted(record.getMessage().partition(":")[0] for record in caplog.records) == [
        "'ash' of no_value 1 is left out",
        "installed package no_equals is broken and left out, its entry_points.txt can't be read",
        "installed package no_utf8 is broken and left out, its entry_points.txt can't be read",
    ]
