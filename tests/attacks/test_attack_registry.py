"""Attacks are found by name, by `module:Name` and in installed packages, and take part in the worst case."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import quantizers as Q
from haq.attacks import ATTACKS, masking
from haq.attacks.assessment import assess
from haq.attacks.base import ATTACK_BUDGETS, BACKWARD, AttackBudget
from haq.attacks.classifier import Classifier
from haq.attacks.suite import check_names, suite
from haq.attacks.threat_model import ThreatModel
from tests.conftest import brightest, fitted_network, images, small_network

SHORT = AttackBudget(steps=2, restarts=1, apgd=2, targets=2, queries=5, draws=2)
X = images(40, seed=3)
Y = brightest(X)
CODE = """
import torch
from haq.attacks.base import BLACK, EvaluationAttack

TEXT = "no attack"


class Grey(EvaluationAttack):
    '''Every image becomes as grey as it may.'''

    knows = BLACK
    efforts = ("standard",)

    def perturb(self, images, labels):
        return images + (0.5 - images).clamp(-self.threat.eps, self.threat.eps)


class Lazy(EvaluationAttack):
    '''An attack without an attack.'''


class Many(Grey):
    '''For a network with many classes.'''

    least_classes = 100
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A current folder with an attack in it that nobody has installed, and efforts of a few steps."""
    (tmp_path / "shades.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in ("shades", "shady"):
        monkeypatch.setitem(sys.modules, module, None)
        del sys.modules[module]
    for name in ATTACK_BUDGETS:
        monkeypatch.setitem(ATTACK_BUDGETS, name, SHORT)
    monkeypatch.setattr(masking, "CURVE", (1, 8))
    monkeypatch.setattr(masking, "CURVE_STEPS", 2)


def install(folder: Path, points: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a package with attacks into a folder, as pip does."""
    metadata = folder / "shady-1.5.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: shady\nVersion: 1.5\nSummary: Shades of grey\n")
    (metadata / "entry_points.txt").write_text(f"[haq.attacks]\n{points}\n")
    (folder / "shady.py").write_text(CODE)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder)])


def test_the_modes_are_those_of_the_quantizers() -> None:
    assert (*Q.BACKWARD, "twin") == BACKWARD
    modes = {f"pgd-{mode}" for mode in BACKWARD if mode != "hard"}
    assert modes < set(ATTACKS)


def test_naming_attacks_imports_neither_torch_nor_foolbox() -> None:
    code = (
        "import sys; from haq.attacks import ATTACKS; import haq.attacks.suite, haq.attacks.threat_model; ATTACKS.rows();"
        "print(*(set(sys.modules) & {'torch', 'foolbox', 'numpy'}))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split() == []


def test_every_attack_of_ours_can_be_made() -> None:
    """Each name of the registry gives attacks of that name on a network where it makes sense."""
    network = Q.quantize(small_network(), Q.BitPolicy.uniform(small_network(), w=4, a=4), calibrate=images(16))
    sources = {"a": Classifier(small_network()), "b": Classifier(small_network(1))}
    for name, _, line in ATTACKS.rows():
        assert line
        if name == "transfer-NAME":
            continue
        backward = "hard" if name == "pgd-ste" else "ste"
        plan = suite(name, Classifier(network), ThreatModel(), 10, sources=sources, backward=backward)
        expected = ["transfer-a", "transfer-b"] if name == "transfer" else [name]
        assert [one.name for one in plan] == expected


def test_an_attack_of_the_users_takes_part_in_the_worst_case() -> None:
    """It is run after the effort's, found as `module:Name`, and counts image by image."""
    network = fitted_network()
    victim = Classifier(network)
    found = assess(network, X, Y, eps=0.1, attacks="quick,shades:Grey")
    without = assess(network, X, Y, eps=0.1, attacks="quick")
    assert list(found.attacks) == [*without.attacks, "shades:Grey"]
    assert {name: found.attacks[name] for name in without.attacks} == without.attacks
    left = torch.stack([victim.right(X, Y), *found.right.values()]).all(0)
    assert found.worst == float(left.double().mean())

    alone = assess(network, X, Y, eps=0.5, attacks="shades:Grey,fgsm")
    grey = torch.full_like(X, 0.5)
    assert torch.equal(alone.right["shades:Grey"], victim.right(grey, Y) & victim.right(X, Y))
    assert alone.worst <= alone.attacks["shades:Grey"] < alone.clean
    # A black box that finds more than gradients is a sign of masking.
    names = [check.name for check in alone.checks]
    assert "gradients find what black boxes and transfer find" in names


def test_an_installed_attack_has_a_name_and_belongs_to_its_efforts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "installed", "grey = shady:Grey\nmany = shady:Many", monkeypatch)
    victim, threat = Classifier(small_network()), ThreatModel()

    def names(asked: str) -> list[str]:
        return [one.name for one in suite(asked, victim, threat, 4)]

    assert "grey" not in names("quick")
    assert names("standard")[-2:] == ["square", "grey"]
    assert names("pgd,grey,quick,grey")[-2:] == ["square", "grey"]
    assert ("grey", "shady 1.5", "Shades of grey") in [tuple(row) for row in ATTACKS.rows()]
    with pytest.raises(ValueError, match="many needs at least 100 classes, the network has 4: use pgd and apgd-ce"):
        names("many")


def test_what_an_edited_attack_finds_is_computed_anew(tmp_path: Path) -> None:
    """What was kept of an attack is of its file as it was then."""
    options = {"eps": 0.3, "attacks": "fgsm,shades:Grey", "folder": tmp_path / "kept"}
    before = assess(fitted_network(), X, Y, **options)  # type: ignore[arg-type]
    assert assess(fitted_network(), X, Y, **options).summary() == before.summary()  # type: ignore[arg-type]
    assert len(list((tmp_path / "kept").iterdir())) == 1
    (tmp_path / "shades.py").write_text(CODE.replace("return images + ", "return images + 0.0 * "))
    del sys.modules["shades"]
    after = assess(fitted_network(), X, Y, **options)  # type: ignore[arg-type]
    assert len(list((tmp_path / "kept").iterdir())) == 2
    assert after.attacks["fgsm"] == before.attacks["fgsm"]
    assert after.attacks["shades:Grey"] == after.clean > before.attacks["shades:Grey"]


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("fgsm,pdg", ValueError, "unknown attack 'pdg'; known: quick, standard, full, or some of noise, fgsm, "),
        ("fgsm,pdg", ValueError, "did you mean pgd"),
        ("shades:Gray", ValueError, "attack 'shades:Gray': module shades has no 'Gray'; close: Grey"),
        ("shades:Lazy", ValueError, "attack 'shades:Lazy' can't be used: it lacks perturb"),
        ("shades:TEXT", ValueError, "attack 'shades:TEXT' can't be used: it lacks make, run, perturb, passes, knows, efforts"),
        ("no_such:Thing", ValueError, "no module 'no_such' can be imported"),
        ("broken:Thing", ImportError, "attack 'broken:Thing' can't be imported: NameError: name 'nothing' is not defined"),
        ("wrong:Wrong", ImportError, "Wrong.knows is 'grey box'; it must be one of white box, black box, noise"),
        ("hard:Hard", ImportError, "Hard.efforts is 'full'; it must be a tuple of some of quick, standard, full"),
        ("quick,full", ValueError, "attacks 'quick,full' name the efforts quick and full: choose one"),
    ],
)
def test_bad_attacks_are_told_in_a_sentence(names: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    """Before any network is loaded."""
    (tmp_path / "broken.py").write_text("nothing\n")
    begin = "from haq.attacks.base import EvaluationAttack\n"
    (tmp_path / "wrong.py").write_text(f"{begin}class Wrong(EvaluationAttack):\n    knows = 'grey box'\n")
    (tmp_path / "hard.py").write_text(f"{begin}class Hard(EvaluationAttack):\n    efforts = 'full'\n")
    with pytest.raises(error) as found:
        check_names(names)
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_a_broken_package_is_named_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "installed", "grey = shady:Gone", monkeypatch)
    with pytest.raises(ValueError, match="attack 'grey' of shady 1.5: module shady has no 'Gone'"):
        check_names("standard")
    check_names("pgd,transfer-twin,transfer")
