"""Things are found by name: our own, an installed package's and `module:Name`; what is wrong gets one sentence."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import hw_models
from hw_models.registry import BUILT_IN, Registry, import_by_name, requires
from tests.hw_models.conftest import break_packages, install

GROUP = "haq.wheels"
BUILTIN: dict[str, tuple[Any, str]] = {
    "round": ("collections:OrderedDict", "rolls"),
    "square": (42, "stands"),
}


def registry(**options: Any) -> Registry[Any]:
    return Registry("wheel", GROUP, BUILTIN, **options)


def test_our_own_are_found_by_name() -> None:
    wheels = registry(forms={"lib:NAME": "a wheel of lib"})
    assert wheels.names() == tuple(wheels) == ("round", "square")
    assert "round" in wheels
    assert "lib:NAME" not in wheels
    assert wheels.get("round").__name__ == "OrderedDict"
    assert wheels.get("square") == 42
    assert wheels.rows() == [
        ("round", BUILT_IN, "rolls"),
        ("square", BUILT_IN, "stands"),
        ("lib:NAME", BUILT_IN, "a wheel of lib"),
    ]
    assert repr(wheels) == "Registry(wheel: round, square)"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ruond", r"unknown wheel 'ruond'; did you mean round\? Known: round, square, lib:NAME or module:Name"),
        ("xyz", "unknown wheel 'xyz'; did you mean one of these"),
        ("lib:x", r"unknown wheel 'lib:x'; did you mean lib:NAME\?"),
        ("squar:", r"unknown wheel 'squar:'; did you mean square"),
        ("../a:b", r"unknown wheel '../a:b'"),
        ("C:\\wheel", r"unknown wheel"),
        ("a\x1b[31m\n", r"unknown wheel 'a\\x1b\[31m\\n'"),
    ],
)
def test_unknown_names_list_the_close_ones_and_how_else_to_give_one(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        registry(forms={"lib:NAME": "a wheel of lib"}).get(name)
    assert str(caught.value).isprintable()


def test_listing_imports_nothing(installed: Path) -> None:
    install(installed, "broken_wheels", GROUP, {"oval": "broken_wheels:Oval"}, "raise ZeroDivisionError")
    wheels = registry()
    assert wheels.names() == ("round", "square", "oval")
    assert wheels.rows()[2] == ("oval", "broken_wheels 1.5", "Wheels of all kinds")
    assert "broken_wheels" not in sys.modules


def test_installed_packages_offer_more(installed: Path) -> None:
    code = "class Oval:\n    class Small:\n        turn = 3\n    turn = 2\n"
    install(installed, "oval_wheels", GROUP, {"oval": "oval_wheels:Oval", "small": "oval_wheels:Oval.Small"}, code)
    wheels = registry(check=requires("turn"))
    assert wheels.get("oval").turn == 2
    assert wheels.get("small", modules=False).turn == 3


def test_an_installed_package_does_not_take_our_names(installed: Path) -> None:
    install(installed, "other_wheels", GROUP, {"square": "other_wheels:Square"}, "Square = 0")
    wheels = registry()
    assert wheels.get("square") == 42
    assert wheels.rows()[2].line == "not used, the name is taken: give other_wheels:Square"


def test_a_name_that_two_packages_offer_is_no_name(installed: Path) -> None:
    install(installed, "left_wheels", GROUP, {"oval": "left_wheels:Oval"}, "Oval = 1")
    install(installed, "right_wheels", GROUP, {"oval": "right_wheels:Oval"}, "Oval = 2")
    wheels = registry()
    assert wheels.names() == ("round", "square", "oval")
    with pytest.raises(ValueError, match=r"offered by left_wheels 1\.5 and right_wheels 1\.5: give left_wheels:Oval"):
        wheels.get("oval")
    assert wheels.get("right_wheels:Oval") == 2


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("import haq_is_not_there", ImportError, "ModuleNotFoundError: No module named 'haq_is_not_there'"),
        ("raise ZeroDivisionError('no\\n\\x1bwheel')", ImportError, r"ZeroDivisionError: no \\x1bwheel"),
        ("import sys; sys.exit('usage: wheel')", ImportError, "SystemExit: usage: wheel"),
        ("wheel =", ImportError, "SyntaxError: invalid syntax"),
        ("Ovale = 1", ValueError, "has no 'Oval'; close: Ovale"),
        ("class Oval: pass", ValueError, "can't be used: it lacks turn and brake"),
        ("class Oval: turn = 1", ValueError, "can't be used: it lacks brake"),
    ],
)
@pytest.mark.parametrize("how", ["installed", "module"])
def test_what_is_wrong_with_a_plug_in_is_said_in_one_sentence(
    code: str, error: type[Exception], message: str, how: str, installed: Path, request: pytest.FixtureRequest
) -> None:
    package = f"wrong_wheels_{abs(hash(request.node.name))}"
    install(installed, package, GROUP, {"oval": f"{package}:Oval"}, code)
    wheels = registry(check=requires("turn", "brake"))
    name = "oval" if how == "installed" else f"{package}:Oval"
    with pytest.raises(error, match=message) as caught:
        wheels.get(name)
    sentence = str(caught.value)
    assert sentence.startswith(f"wheel '{name}'")
    assert sentence.isprintable()


def test_an_entry_point_without_its_module(installed: Path) -> None:
    install(installed, "hollow_wheels", GROUP, {"oval": "hollow_wheels_inside:Oval"})
    with pytest.raises(ImportError, match=r"wheel 'oval' of hollow_wheels 1\.5 can't be imported: .*hollow_wheels_inside"):
        registry().get("oval")


def test_a_module_of_the_current_folder(here: Path) -> None:
    wheels = registry()
    with pytest.raises(ValueError, match="no module 'wheels_of_mine' can be imported; did you mean"):
        wheels.get("wheels_of_mine:Oval")
    # A file that is younger than the failed attempt is found all the same.
    (here / "wheels_of_mine.py").write_text("class Oval: turn = 1\nNothing = None\n")
    assert wheels.get("wheels_of_mine:Oval").turn == 1
    assert wheels.get("wheels_of_mine:Oval.turn") == 1
    with pytest.raises(ValueError, match="close: Nothing"):
        wheels.get("wheels_of_mine:Nothing")
    with pytest.raises(ValueError, match=r"no module 'wheels_of_mine\.small' can be imported"):
        wheels.get("wheels_of_mine.small:Oval")


def test_a_name_out_of_a_file_imports_no_module(here: Path) -> None:
    (here / "wheels_of_others.py").write_text("raise SystemExit")
    with pytest.raises(ValueError, match="only imported if you name it yourself, never because a file does"):
        registry().get("wheels_of_others:Oval", modules=False)
    assert "wheels_of_others" not in sys.modules


def test_a_form_is_never_taken_for_a_module(here: Path) -> None:
    (here / "lib.py").write_text("Oval = 1")
    assert registry().get("lib:Oval") == 1
    with pytest.raises(ValueError, match=r"unknown wheel 'lib:Oval'; did you mean lib:NAME\?"):
        registry(forms={"lib:NAME": "a wheel of lib"}).get("lib:Oval")


def test_modules_of_python_itself_are_refused() -> None:
    for name in ("os:abort", "code:interact", "os.path:join"):
        with pytest.raises(ValueError, match=f"'{name}' is of Python itself, where there is no wheel; give module:Name"):
            registry().get(name)
        with pytest.raises(ValueError, match="is of Python itself"):
            import_by_name(name, "wheel")
    with pytest.raises(ValueError, match="'mine' is no known wheel, and no module:Name either"):
        import_by_name("mine", "wheel")


def test_names_and_reasons_that_would_steer_a_terminal_are_escaped(installed: Path) -> None:
    install(installed, "bell_wheels", GROUP, {"bell\a": "bell_wheels:Oval"})
    wheels = registry()
    assert wheels.names()[2] == "bell\a"
    assert wheels.rows()[2].name == "bell\\x07"
    assert repr(wheels) == r"Registry(wheel: round, square, bell\x07)"
    with pytest.raises(ValueError, match=r"did you mean bell\\x07\?"):
        wheels.get("bel")


def test_a_line_can_wait_until_it_is_wanted() -> None:
    def describe() -> str:
        asked.append(1)
        return "rolls"

    asked: list[int] = []
    wheels: Registry[int] = Registry("wheel", GROUP, {"round": (1, describe)})
    assert (wheels.get("round"), asked) == (1, [])
    assert wheels.rows() == [("round", BUILT_IN, "rolls")]


def test_torch_is_not_imported_until_a_network_is_traced() -> None:
    code = "import sys, hw_models, hw_models.registry; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "hw_models.registry" in done.stdout.split()
    assert not {"torch", "numpy", "pydantic"} & set(done.stdout.split())
    code = "import sys, hw_models; hw_models.load_target('edge'); hw_models.target_rows(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "hw_models.bismo" in done.stdout.split()
    assert "torch" not in done.stdout.split()


def test_all_that_the_package_offers_is_listed_and_there() -> None:
    assert dir(hw_models) == sorted(hw_models.__all__)
    for name in hw_models.__all__:
        assert getattr(hw_models, name) is not None
    code = "import hw_models; print(hw_models.bitfusion.Shape.__name__, hasattr(hw_models, 'nonsense'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["Shape", "False"]
    with pytest.raises(AttributeError, match="module 'hw_models' has no attribute 'nonsense'"):
        _ = hw_models.nonsense


def test_a_broken_package_is_named_and_all_others_are_found(
    installed: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(vars(logging.getLogger("haq")), "said_of_packages", set())
    install(installed, "sound", GROUP, {"steel": "sound:Steel"}, "Steel = 3")
    break_packages(installed, GROUP)
    wheels = registry()
    assert wheels.names() == ("round", "square", "elm", "fir", "steel")
    assert wheels.get("steel") == 3
    assert [row for row in wheels.rows() if row.origin != BUILT_IN] == [
        ("elm", "no_metadata-1.dist-info, whose METADATA is broken", "no:Thing"),
        ("fir", "no_utf8_metadata-1.dist-info, whose METADATA is broken", "no:Thing"),
        ("steel", "sound 1.5", "Wheels of all kinds"),
    ]
    with pytest.raises(ImportError, match="^wheel 'elm' of no_metadata-1.dist-info, whose METADATA is broken can't be"):
        wheels.get("elm")
    with pytest.raises(ValueError, match="unknown wheel 'oak'"):
        wheels.get("oak")
    Registry("wheel", "haq.other_wheels", {}).names()
    assert sorted(record.getMessage().partition(":")[0] for record in caplog.records) == [
        "'ash' of no_value 1 is left out",
        "installed package no_equals is broken and left out, its entry_points.txt can't be read",
        "installed package no_utf8 is broken and left out, its entry_points.txt can't be read",
    ]
