"""A run's folder from anywhere is refused in one sentence or read: nothing in it is executed, waited for or written over."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml

from haq import data, deploy, evaluate, finetune, networks, report, robustness, runs, search, sweep, train
from haq.console import errors
from haq.store.files import MOST_HISTORY
from haq.store.records import PolicyRecord, ResultRecord
from haq.study import solving
from hw_models import trust
from tests.commands.test_robustness_command import MODULE, lessen
from tests.conftest import enter

JOB = ["--network", "small_job:network", "--data", "small_job:splits"]
ATTACKED = ["--attacks", "fgsm", "--images", "32", "--workers", "1", "--defensive", "0"]
COMMANDS: dict[str, Callable[[], int]] = {
    "resume": lambda: search.main(["--resume", "run"]),
    "evaluate": lambda: evaluate.main(["run"]),
    "finetune": lambda: finetune.main(["run", "--epochs", "1"]),
    "deploy": lambda: deploy.main(["run", "--to", "onnx"]),
    "robustness": lambda: robustness.main(
        ["run", "--attacks", "fgsm", "--images", "32", "--workers", "1", "--defensive", "0"]
    ),
    "show": lambda: runs.main(["show", "run"]),
    "compare": lambda: runs.main(["compare", "run", "run"]),
    "report": lambda: report.main(["run"]),
    "sweep": lambda: sweep.main(["--resume", "swept"]),
    "train": lambda: train.main([*JOB, "--epochs", "2", "--resume", "--out", "run/net.safetensors"]),
}
MEMORY = 3 * 2**30  # bytes by which a refused folder may make a process grow: far less than any bomb
PATIENCE = 120  # seconds after which a command that waits for a pipe is given up


class Bomb:
    """A pickle that writes a file when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is finished, with networks and attacks; a sweep that isn't; an interrupted training."""
    place = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        _enter(place, patch)
        arguments = [*JOB, "--budget", "0.6", "--solver", "ilp", "--evaluations", "6", "--finetune-epochs", "1"]
        assert search.main([*arguments, "--out", "run"]) == 0
        assert COMMANDS["robustness"]() == 0
        begun = [*JOB, "--hw", "edge", "--budgets", "0.6", "--solvers", "random", "--evaluations", "4"]
        assert sweep.main([*begun, "--out", "swept"]) == 0
        _json(Path("swept/sweep.json"), finished=False)
        Path("swept/edge-0.6-random-seed0/result.json").unlink()
        patch.setattr(networks, "save_checkpoint", _killed)
        with pytest.raises(InterruptedError):
            train.main([*JOB, "--epochs", "2", "--out", "run/net.safetensors"])
    return place


def _killed(*arguments: object) -> None:
    raise InterruptedError


def _enter(place: Path, patch: pytest.MonkeyPatch) -> None:
    enter(place, patch, MODULE)
    lessen(patch)


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A copy of all that was made, in a process that can't grow without bounds."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    _enter(tmp_path, monkeypatch)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else None
    before = resource.getrlimit(resource.RLIMIT_AS)
    if used:
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    ring = signal.signal(signal.SIGALRM, _hangs)
    signal.alarm(PATIENCE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, ring)
    resource.setrlimit(resource.RLIMIT_AS, before)


def _hangs(*arguments: object) -> None:
    raise AssertionError("the command hangs")


def contents(folder: Path) -> dict[str, Any]:
    """All that is in a folder: bytes of small files, where links lead, what else there is."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        elif path.is_file() and path.name != ".lock":
            found[str(path)] = path.stat().st_size if path.stat().st_size > 2**24 else path.read_bytes()
        elif not path.is_file():
            found[str(path)] = path.lstat().st_mode
    return found


def refused(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that must end with one sentence, and change nothing."""
    before = contents(Path())
    capsys.readouterr()
    assert errors.run_command(COMMANDS[command]) == errors.EXIT_BAD_INPUT
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert len(err) < 900
    after = contents(Path())
    assert {key: value for key, value in after.items() if "__pycache__" not in key} == {
        key: value for key, value in before.items() if "__pycache__" not in key
    }
    assert not Path("executed").exists()
    return err


# --- ways to make a file hostile -----------------------------------------------------------------------------------------


def _config(part: str = "settings", **changes: Any) -> None:
    path = Path("run/config.yaml")
    content = yaml.safe_load(path.read_text())
    content[part] = {**content[part], **changes} if isinstance(content[part], dict) else changes["schema"]
    path.write_text(yaml.safe_dump(content))


def _json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _policy(change: Callable[[dict[str, Any]], object]) -> None:
    path = Path("run/policy.json")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _policy_of(layer: str, bits: int) -> dict[str, Any]:
    row = {"name": layer, "weight_bits": bits, "activation_bits": bits}
    return {"schema": "haq-bit-policy", "version": 1, "layers": [row]}


def _budget(change: Callable[[dict[str, Any]], dict[str, Any]] = lambda old: {}, **changes: Any) -> None:
    path = Path("run/result.json")
    budget = json.loads(path.read_text())["budget"]
    _json(path, budget={**budget, **change(budget), **changes})


def _other_policy(layer: str) -> None:
    """A policy that isn't the one that was measured, without a fine-tuned network that would tell."""
    Path("run/checkpoint/quantized.safetensors").unlink()
    _widen(layer)


def _widen(layer: str) -> None:
    """Give the input of a layer other bits: 7, or 6 if it has 7."""

    def change(policy: dict[str, Any]) -> None:
        row = next(row for row in policy["layers"] if row["name"] == layer)
        row["activation_bits"] = 6 if row["activation_bits"] == 7 else 7

    _policy(change)


def _history(change: Callable[[list[list[str]]], object]) -> None:
    path = Path("run/history.csv")
    rows = [line.split(",") for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(",".join(row) + "\n" for row in rows))


def _cell(column: int, value: str) -> Callable[[], None]:
    return lambda: _history(lambda rows: rows[2].__setitem__(column, value))


def _checkpoint(
    tensors: Callable[[dict[str, torch.Tensor]], object] = lambda t: None,
    notes: Callable[[dict[str, str]], object] = lambda n: None,
) -> None:
    path = Path("run/checkpoint/quantized.safetensors")
    held, said = networks.read_state(path)
    tensors(held)
    notes(said)
    path.write_bytes(safetensors.torch.save(held, said))


def _first(tensors: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors["stem.weight"] = change(tensors["stem.weight"])


def _huge(path: str) -> Callable[[], None]:
    """A file of 10 GB that takes no room."""

    def make() -> None:
        with open(path, "ab") as file:
            file.truncate(10 * 10**9)

    return make


def _pipe(path: str) -> Callable[[], None]:
    def make() -> None:
        Path(path).unlink()
        os.mkfifo(path)

    return make


def _folder(path: str) -> Callable[[], None]:
    def make() -> None:
        Path(path).unlink()
        Path(path).mkdir()

    return make


def _put(path: str, content: str | bytes) -> Callable[[], None]:
    return lambda: void(Path(path).write_bytes(content.encode() if isinstance(content, str) else content))


def _out(path: str) -> Callable[[], None]:
    """A link to a file outside, where the run's own is written."""

    def make() -> None:
        Path("outside").write_text("years of work")
        Path(path).unlink(missing_ok=True)
        Path(path).symlink_to(Path("outside").resolve())

    return make


def _named() -> None:
    Path("run/\x1b[2J\nerror").symlink_to("/")


def _link_folder(path: str) -> Callable[[], None]:
    def make() -> None:
        shutil.rmtree(path)
        Path("elsewhere").mkdir()
        Path(path).symlink_to(Path("elsewhere").resolve())

    return make


def void(value: object) -> None:
    return None


def _attacks(change: Callable[[bytes], bytes]) -> None:
    for path in Path("run/robustness").glob("*.npz"):
        path.write_bytes(change(path.read_bytes()))


def _arrays(compress: bool = False, **changes: Any) -> Callable[[], None]:
    def make() -> None:
        for path in Path("run/robustness").glob("*.npz"):
            with np.load(path) as file:
                held = {name: file[name] for name in file.files}
            for name, value in changes.items():
                held[name] = value(held[name]) if callable(value) else value
            (np.savez_compressed if compress else np.savez)(path, **held)

    return make


def _claimed() -> None:
    """An array that says it has 10^12 numbers, in a file of a few bytes."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**12,)})
    for path in Path("run/robustness").glob("*.npz"):
        with zipfile.ZipFile(path) as file:
            held = {name: file.read(name) for name in file.namelist()}
        with zipfile.ZipFile(path, "w") as file:
            for name, content in (held | {"examples.npy": header.getvalue()}).items():
                file.writestr(name, content)


def _header(length: int) -> Callable[[], None]:
    return _put("run/checkpoint/quantized.safetensors", struct.pack("<Q", length) + b"{" + b" " * 1000)


def _state(**changes: Any) -> Callable[[], None]:
    def make() -> None:
        path = Path("run/net.state")
        torch.save(torch.load(path, weights_only=True) | changes, path)

    return make


def _in_own_folder() -> None:
    Path("run/evil.py").write_text("from pathlib import Path\nPath('executed').touch()\n")
    _config(network="run.evil:network")
    Path("run/__init__.py").touch()


def _unfinished(path: str = "run/result.json") -> None:
    Path(path).unlink()


PICKLE = pickle.dumps(Bomb())
ALIASES = "a: &a [lol,lol,lol,lol,lol,lol,lol,lol,lol]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
DEEP = "[" * 100_000 + "]" * 100_000
NAN = float("nan")
LAYERS = 5

CASES: list[tuple[str, str, Callable[[], object], str]] = [
    # what is wrong, the commands that must refuse it, how it is made, what the sentence says
    (
        "config: Python's tags",
        "resume evaluate show",
        _put("run/config.yaml", "!!python/object/apply:os.mkdir [executed]"),
        "it has a tag (!) in line 1, which no file of ours has",
    ),
    ("config: a bomb of aliases", "resume deploy compare", _put("run/config.yaml", ALIASES + "schema: *i\n"), "alias"),
    ("config: a list", "resume finetune", _put("run/config.yaml", "- haq-run-2\n"), "must be a mapping, not a list"),
    ("config: nested 100,000 deep", "resume robustness", _put("run/config.yaml", DEEP), "has 200 kB and was not read"),
    ("config: nested 30,000 deep", "resume show", _put("run/config.yaml", "[" * 30_000), "nested too deeply"),
    ("config: not text", "resume evaluate", _put("run/config.yaml", bytes(range(256))), "is not text in UTF-8"),
    ("config: 10 GB", "resume show", _huge("run/config.yaml"), "has 10 GB and was not read; at most 65.5 kB"),
    ("config: a folder", "resume evaluate show", _folder("run/config.yaml"), "is a folder and was not read"),
    ("config: a pipe", "resume evaluate show", _pipe("run/config.yaml"), "no ordinary file (a pipe or a device)"),
    (
        "config: of a newer version",
        "resume evaluate finetune deploy robustness show",
        lambda: _config("schema", schema="haq-run-3"),
        "made by a newer version of haq (haq-run-3, this one reads haq-run-2): upgrade haq",
    ),
    (
        "config: no schema of ours",
        "resume show",
        lambda: _config("schema", schema="haq-run-one"),
        "its schema is 'haq-run-one'",
    ),
    ("config: an unknown setting", "resume evaluate", lambda: _config(color="red"), "unknown setting 'color'"),
    (
        "config: a setting of another type",
        "resume finetune",
        lambda: _config(evaluations="6"),
        "setting 'evaluations' is '6'; it must be an integer",
    ),
    (
        "config: a list for a setting",
        "resume show",
        lambda: _config(solver=["random"]),
        "'settings' has a list for 'solver'; it must be text",
    ),
    (
        "config: no settings",
        "resume show",
        lambda: _put("run/config.yaml", "schema: haq-run-2\nsettings: 3\n")(),
        "'settings' is 3; it must be a mapping",
    ),
    ("config: a negative count", "resume", lambda: _config(evaluations=-5), "--evaluations is -5"),
    ("config: a network that is a path", "evaluate deploy", lambda: _config(network="../.."), "unknown network '../..'"),
    (
        "config: a network that there isn't",
        "evaluate deploy robustness",
        lambda: _config(network="mobilenet-mni"),
        "mobilenet-mini",
    ),
    ("config: a function of Python's own", "evaluate finetune", lambda: _config(network="os:abort"), "is of Python itself"),
    (
        "config: code in the run's own folder",
        "evaluate deploy robustness",
        _in_own_folder,
        "names network run.evil:network, and code is never called because a file says so: add --trust run.evil:network if",
    ),
    (
        "config: signature of other types",
        "resume evaluate",
        lambda: _config("signature", network=[1]),
        "'signature.network' is a list; it must be text",
    ),
    (
        "config: a machine that isn't one",
        "evaluate",
        lambda: _config("signature", machine="{"),
        "its signature's machine is not JSON",
    ),
    (
        "policy: of another network",
        "evaluate deploy robustness finetune",
        lambda: _policy(lambda p: p["layers"][0].update(name="conv1")),
        "is of another network",
    ),
    (
        "policy: a path for a name",
        "evaluate deploy",
        lambda: _policy(lambda p: p["layers"][0].update(name="../../stem")),
        "is of another network",
    ),
    (
        "policy: 9 bits",
        "evaluate deploy",
        lambda: _policy(lambda p: p["layers"][1].update(weight_bits=9)),
        "run/policy.json is not a bit policy: layer 'depthwise': bits must be an integer from 1 to 8, 16, or null for",
    ),
    (
        "policy: other bits than the fine-tuned network's",
        "evaluate deploy robustness",
        lambda: _policy(lambda p: p["layers"][1].update(weight_bits=1 + p["layers"][1]["weight_bits"] % 8)),
        "put policy.json back as it was, or delete run/checkpoint/quantized.safetensors and use python -m haq.finetune run",
    ),
    ("policy: -1 bits", "evaluate finetune", lambda: _policy(lambda p: p["layers"][1].update(activation_bits=-1)), "not -1"),
    ("policy: bits in quotes", "evaluate", lambda: _policy(lambda p: p["layers"][1].update(weight_bits="4")), "not '4'"),
    (
        "policy: true for bits",
        "evaluate robustness",
        lambda: _policy(lambda p: p["layers"][1].update(weight_bits=True)),
        "not True",
    ),
    (
        "policy: float, which the target can't do",
        "evaluate",
        lambda: _policy(lambda p: p["layers"][1].update(weight_bits=None)),
        "(weights/activations), which edge can't do; it can do 1 to 8 bits",
    ),
    (
        "policy: a number for a name",
        "evaluate",
        lambda: _policy(lambda p: p["layers"][1].update(name=3)),
        "'layers.1.name' is 3; it must be text",
    ),
    ("policy: nested 100,000 deep", "evaluate", _put("run/policy.json", DEEP), "nested too deeply"),
    ("policy: of a newer version", "evaluate deploy", lambda: _policy(lambda p: p.update(version=3)), "upgrade to read it"),
    ("policy: keeps no channels", "evaluate deploy", lambda: _policy(lambda p: p.update(version=2)), "'keep' belongs to"),
    (
        "policy: keeps channels that the network still has",
        "evaluate deploy",
        lambda: _policy(lambda p: p.update(version=2, keep={"nobody": 0.5})),
        "keep",
    ),
    ("policy: 10 GB", "evaluate deploy", _huge("run/policy.json"), "has 10 GB and was not read"),
    ("policy: a pipe", "evaluate deploy", _pipe("run/policy.json"), "a pipe or a device"),
    ("history: 10 GB", "unfinished compare", _huge("run/history.csv"), f"at most {MOST_HISTORY / 1e6:.3g} MB"),
    ("history: a column less", "unfinished", lambda: _history(lambda rows: [row.pop() for row in rows]), "has the columns"),
    (
        "history: a row cut short",
        "unfinished compare",
        lambda: _history(lambda rows: rows[2].pop()),
        "line 3: 8 columns, not 9",
    ),
    ("history: no number", "unfinished compare", _cell(4, "nan"), "line 3: the accuracy is 'nan', not a number from 0 to 1"),
    ("history: below 0", "unfinished", _cell(6, "-1"), "the cost is '-1'"),
    ("history: above 1", "unfinished", _cell(4, "1.5"), "the accuracy is '1.5'"),
    ("history: a huge number", "unfinished", _cell(5, "1" + "0" * 5000), "the loss is '1000"),
    ("history: beyond floats", "unfinished", _cell(5, "1e999"), "the loss is '1e999'"),
    ("history: 9 bits", "unfinished", _cell(2, "8-9-8-8-8"), "the weight bits are '8-9-8-8-8'"),
    ("history: a huge count", "unfinished", _cell(1, "9" * 6000), "the evaluation is '999"),
    (
        "history: of a network of 3 layers",
        "unfinished",
        _cell(3, "8-4-8"),
        f"activation bits of 3 layers, the network has {LAYERS}",
    ),
    ("history: garbage", "unfinished compare", _put("run/history.csv", bytes(range(128, 256)) * 50), "is not text in UTF-8"),
    (
        "history: a row twice",
        "unfinished show",
        lambda: _history(lambda rows: rows.insert(2, rows[1])),
        "line 3: evaluation 1",
    ),
    (
        "history: a row too few",
        "unfinished compare report",
        lambda: _history(lambda rows: rows.pop(2)),
        "line 3: evaluation 3 of ilp, where its evaluation 2 must be",
    ),
    ("history: a NUL byte", "unfinished", _cell(0, "ran\0dom"), "the solver is"),
    (
        "history: a link out of the folder",
        "unfinished",
        _out("run/history.csv"),
        "run/history.csv is a symbolic link out of run",
    ),
    (
        "what is written beside: a link out of the folder",
        "unfinished finetune",
        _out("run/result.json.part"),
        "symbolic link out of run",
    ),
    ("lock: a link out of the folder", "unfinished finetune deploy", _out("run/.lock"), "symbolic link out of run"),
    ("a name that steers the terminal", "unfinished finetune", _named, "run/\\x1b[2J\\nerror is a symbolic link out of run"),
    (
        "checkpoints: in a folder elsewhere",
        "finetune robustness",
        lambda: _link_folder("run/checkpoint")(),
        "symbolic link out of run",
    ),
    ("result: not JSON", "evaluate finetune show", _put("run/result.json", "{'"), "is not the result of a run"),
    ("result: a list", "evaluate show compare", _put("run/result.json", "[]"), "must be an object, not a list"),
    ("result: nested 100,000 deep", "evaluate show", _put("run/result.json", DEEP), "nested too deeply"),
    (
        "result: text for a number",
        "finetune show",
        lambda: _json(Path("run/result.json"), found={"search_accuracy": "1"}),
        "'found.search_accuracy' is '1'; it must be a number",
    ),
    (
        "result: no number",
        "finetune compare",
        lambda: _json(Path("run/result.json"), found={"search_accuracy": NAN, "test_accuracy": 1}),
        "'found.search_accuracy' is nan; it must be a finite number",
    ),
    (
        "result: rivals of another network",
        "evaluate",
        lambda: _json(Path("run/result.json"), rival_policies={"greedy": _policy_of("conv1", 8)}),
        "run/result.json is of another network",
    ),
    (
        "result: of a newer version",
        "evaluate finetune show",
        lambda: _json(Path("run/result.json"), schema="haq-result-7"),
        "upgrade haq",
    ),
    (
        "result: a budget that contradicts itself",
        "finetune show report",
        lambda: _budget(holds=False),
        "'budget.holds' is False, with ",
    ),
    ("result: more used than the limit", "show", lambda: _budget(limit=1e-9), "'budget.holds' is True, with "),
    (
        "result: a fraction of something else",
        "show report",
        lambda: _budget(fraction=0.1),
        "they must be as 'limit' to 'used'",
    ),
    (
        "result: both fractions of something else",
        "show",
        lambda: _budget(lambda old: {"fraction": old["fraction"] / 2, "used_fraction": old["used_fraction"] / 2}),
        "which isn't that fraction of 'uniform8.latency_s'",
    ),
    (
        "result: another cost than was found",
        "show",
        lambda: _budget(lambda old: {"used": old["used"] / 2, "used_fraction": old["used_fraction"] / 2}),
        "it must be 'found.latency_s'",
    ),
    ("result: of another policy", "report", lambda: _other_policy("classifier"), "is not the policy that run/result.json was"),
    ("result: a folder", "evaluate finetune show report", _folder("run/result.json"), "is a folder and was not read"),
    ("result: a pipe", "evaluate finetune show report", _pipe("run/result.json"), "a pipe or a device"),
    ("policy: a pipe", "evaluate report", _pipe("run/policy.json"), "a pipe or a device"),
    ("attacks: a pipe", "report", _pipe("run/robustness/robustness.json"), "a pipe or a device"),
    ("result: 10 GB", "evaluate show", _huge("run/result.json"), "has 10 GB"),
    (
        "sensitivities: of another network",
        "given",
        lambda: _json(Path("run/sensitivity.json"), signature={"network": "0", "data": "0"}),
        "sensitivities of another data: its signature is 0",
    ),
    (
        "sensitivities: another shape",
        "given",
        lambda: _json(Path("run/sensitivity.json"), loss_increases=[{"layers": ["stem"], "weights": [1], "activations": [1]}]),
        "'loss_increases.0.weights' has 1 entries; it must have at least 8",
    ),
    (
        "sensitivities: no number",
        "given",
        lambda: _json(
            Path("run/sensitivity.json"), loss_increases=[{"layers": ["stem"], "weights": [NAN] * 8, "activations": [1] * 8}]
        ),
        "'loss_increases.0.weights.0' is nan; it must be a finite number",
    ),
    (
        "sensitivities: of a newer version",
        "given",
        lambda: _json(Path("run/sensitivity.json"), schema="haq-sensitivity-3"),
        "upgrade haq",
    ),
    ("sensitivities: 10 GB", "given", _huge("run/sensitivity.json"), "has 10 GB"),
    (
        "checkpoint: a pickle",
        "evaluate deploy robustness",
        _put("run/checkpoint/quantized.safetensors", PICKLE),
        "can't be read as a checkpoint",
    ),
    (
        "checkpoint: cut short",
        "evaluate deploy",
        lambda: Path("run/checkpoint/quantized.safetensors").write_bytes(
            Path("run/checkpoint/quantized.safetensors").read_bytes()[:-10]
        ),
        "truncated",
    ),
    ("checkpoint: a header beyond the file", "evaluate", _header(10**12), "can't be read as a checkpoint"),
    ("checkpoint: a header of 90 MB", "evaluate", _header(90 * 10**6), "can't be read as a checkpoint"),
    ("checkpoint: 10 GB", "evaluate deploy", _huge("run/checkpoint/quantized.safetensors"), "has 10 GB"),
    ("checkpoint: a pipe", "evaluate", _pipe("run/checkpoint/quantized.safetensors"), "a pipe or a device"),
    (
        "checkpoint: another shape",
        "evaluate deploy",
        lambda: _checkpoint(lambda t: _first(t, lambda x: x[:3].clone())),
        "1 of another shape (such as stem.weight)",
    ),
    (
        "checkpoint: another type",
        "evaluate deploy",
        lambda: _checkpoint(lambda t: _first(t, torch.Tensor.double)),
        "is torch.float64 of shape",
    ),
    (
        "checkpoint: no numbers",
        "evaluate",
        lambda: _checkpoint(lambda t: _first(t, lambda x: x * NAN)),
        "stem.weight has values that are not finite",
    ),
    (
        "checkpoint: a tensor less",
        "evaluate",
        lambda: _checkpoint(lambda t: t.pop("stem.weight")),
        "1 tensors missing (such as stem.weight)",
    ),
    (
        "checkpoint: 9 bits",
        "evaluate",
        lambda: _checkpoint(notes=lambda n: n.update(policy=json.dumps(_policy_of("stem", 9)))),
        "bits must be 1 to 8, 16 or float, not 9",
    ),
    (
        "checkpoint: a path for a layer",
        "evaluate deploy",
        lambda: _checkpoint(notes=lambda n: n.update(policy=json.dumps(_policy_of("../stem", 8)))),
        "'../stem'",
    ),
    (
        "checkpoint: no policy",
        "evaluate",
        lambda: _checkpoint(notes=lambda n: n.pop("policy")),
        "doesn't hold the network of this run",
    ),
    (
        "checkpoint: of a newer version",
        "evaluate deploy",
        lambda: _checkpoint(notes=lambda n: n.update(format="haq-network-3")),
        "upgrade haq",
    ),
    ("attacks: cut short", "robustness", lambda: _attacks(lambda whole: whole[: len(whole) // 2]), "can't be gone on from"),
    ("attacks: a pickle", "robustness", lambda: _attacks(lambda whole: PICKLE), "can't be gone on from"),
    ("attacks: objects", "robustness", _arrays(attacks=np.array([Bomb()], object)), "it may hold code"),
    ("attacks: another shape", "robustness", _arrays(examples=lambda x: x[:, :, :4]), "examples is float32 of shape"),
    ("attacks: no numbers", "robustness", _arrays(examples=lambda x: x * NAN), "examples has values that are not finite"),
    ("attacks: compressed", "robustness", _arrays(compress=True), "it is compressed"),
    ("attacks: more claimed than there is", "robustness", _claimed, "isn't of the size that it says"),
    (
        "attacks: 10 GB",
        "robustness",
        lambda: [_huge(str(path))() for path in Path("run/robustness").glob("*.npz")],
        "has 10 GB",
    ),
    ("training: a pickle", "train", _put("run/net.state", PICKLE), "can't be resumed from"),
    ("training: a torch file that executes", "train", lambda: torch.save(Bomb(), "run/net.state"), "can't be resumed from"),
    (
        "training: another network's tensors",
        "train",
        _state(module={"stem.weight": torch.zeros(1)}),
        "doesn't fit what goes on from it",
    ),
    ("training: no optimizer", "train", _state(optimizers=[]), "doesn't fit what goes on from it"),
    ("training: no epoch", "train", _state(epoch="1"), "the epoch is no number"),
    ("training: 10 GB", "train", _huge("run/net.state"), "has 10 GB"),
    ("training: a pipe", "train", _pipe("run/net.state"), "a pipe or a device"),
    ("training: a lock that leads out", "train", _out("run/.net.safetensors.lock"), "can't be locked: delete it"),
    ("sweep: a path for a budget", "sweep", lambda: _swept(budgets=["0.6/../../../x"]), "have a '/' in 'edge-0.6/../../../x"),
    ("sweep: a path for a board", "sweep", lambda: _swept(hw=["rpc:../../x:1"]), "have a '/' in"),
    ("sweep: hardware that is a path", "sweep", lambda: _swept(hw=["../../../x"]), "unknown hardware target '../../../x'"),
    ("sweep: a number for hardware", "sweep", lambda: _swept(hw=[3]), "'asked.hw.0' is 3; it must be text"),
    ("sweep: an unknown setting", "sweep", lambda: _swept(settings={"color": "red"}), "unknown setting 'color'"),
    ("sweep: not JSON", "sweep", _put("swept/sweep.json", "{"), "is not the file of a sweep"),
    ("sweep: a list", "sweep", _put("swept/sweep.json", "[1]"), "must be an object"),
    ("sweep: of a newer version", "sweep", lambda: _json(Path("swept/sweep.json"), schema="haq-sweep-3"), "upgrade haq"),
    (
        "sweep: a run that leads out",
        "sweep",
        lambda: _link_folder("swept/edge-0.6-random-seed0")(),
        "symbolic link out of swept",
    ),
]


def _swept(**changes: Any) -> None:
    content = json.loads(Path("swept/sweep.json").read_text())
    _json(Path("swept/sweep.json"), asked={**content["asked"], **changes})


COMMANDS["unfinished"] = COMMANDS["resume"]
COMMANDS["given"] = lambda: search.main([*JOB, "--budget", "0.7", "--solver", "ilp", "--sensitivity", "run", "--out", "new"])


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize(("commands", "make", "sentence"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_it_is_refused_in_one_sentence_and_left_as_it_was(
    commands: str, make: Callable[[], object], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make()
    for command in commands.split():
        if command in ("unfinished", "resume") and Path("run/result.json").exists():
            _unfinished()
        assert sentence in refused(command, capsys), command
    assert not Path("outside").exists() or Path("outside").read_text() == "years of work"
    assert not Path("elsewhere").exists() or not list(Path("elsewhere").iterdir())


CANARY = "from pathlib import Path\nPath('executed').touch()\ndef main(*given, **options):\n    raise SystemExit\n"
CODE = ("canary:main", "run.canary:main", "pytest:main", "torch.distributed.run:main", "antigravity:fly")
COMMANDS["config"] = lambda: search.main(["--config", "run/config.yaml", "--dry-run"])
COMMANDS["sweep config"] = lambda: sweep.main(["--config", "swept/sweep.json", "--dry-run"])


@pytest.fixture
def canary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Code in the current folder and in the run's that tells when it is imported, and nobody who has named it."""
    for folder in (".", "run"):
        Path(folder, "canary.py").write_text(CANARY)
        Path(folder, "conftest.py").write_text(CANARY)
        Path(folder, "__main__.py").write_text(CANARY)
    Path("run/__init__.py").touch()
    monkeypatch.setattr(trust, "_named", {"small_job:network", "small_job:splits"})


@pytest.mark.usefixtures("place", "canary")
@pytest.mark.parametrize("field", ["network", "data", "hw", "solver", "objective", "scheme"])
def test_code_that_only_a_run_names_is_never_called(field: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("run/config.yaml").read_text()
    given = {"network": [f"{name}@run/policy.json" for name in CODE], "scheme": [f"stem={name}" for name in CODE]}
    result = Path("run/result.json").read_text()
    for name, value in zip(CODE, given.get(field, CODE), strict=True):
        Path("run/config.yaml").write_text(before)
        _config(**{field: value})
        commands = ["config"]
        if name == "canary:main":
            commands = ["config", "evaluate", "finetune", "deploy", "robustness", "resume"]
        for command in commands:
            Path("run/result.json").write_text(result)
            if command == "resume":
                _unfinished()
            assert f"run/config.yaml names {field} {name}, " in refused(command, capsys), command


@pytest.mark.usefixtures("place", "canary")
def test_looking_at_a_run_imports_nothing() -> None:
    code = dict.fromkeys(("network", "data", "hw", "solver", "scheme"), "canary:main")
    _config(**code)
    for command in ("show", "compare", "report"):
        assert errors.run_command(COMMANDS[command]) == 0
    assert not Path("executed").exists()


@pytest.mark.usefixtures("place", "canary")
@pytest.mark.parametrize("asked", [{"hw": ["edge", "canary:main"]}, {"solvers": ["canary:main"]}, {"settings": "canary:main"}])
def test_code_that_only_a_sweep_names_is_never_called(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    if "settings" in asked:
        asked = {"settings": {**json.loads(Path("swept/sweep.json").read_text())["asked"]["settings"], "data": "canary:main"}}
    _swept(**asked)
    for command in ("sweep", "sweep config"):
        assert "canary:main, and code is never called because a file says so: add --trust canary:main" in refused(
            command, capsys
        )


@pytest.mark.usefixtures("place", "canary")
def test_code_that_is_trusted_is_called(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(trust, "_named", set())
    assert "names network small_job:network, " in refused("evaluate", capsys)
    one = ["--trust", "small_job:network"]
    assert errors.run_command(lambda: evaluate.main(["run", *one])) == errors.EXIT_BAD_INPUT
    assert "names data small_job:splits, " in capsys.readouterr().err
    assert errors.run_command(lambda: evaluate.main(["run", *one, "--trust", "small_job:splits"])) == 0
    # Commands that are printed to be pasted carry what they need.
    _unfinished()
    capsys.readouterr()
    assert errors.run_command(COMMANDS["show"]) == 0
    assert "haq.search --resume run --trust small_job:network --trust small_job:splits" in capsys.readouterr().out


@pytest.mark.usefixtures("place")
def test_without_malice_every_command_works() -> None:
    """The cases above are refused for what is wrong with them, and for nothing else."""
    for command in ("evaluate", "finetune", "deploy", "robustness", "show", "compare", "sweep", "train", "given"):
        assert errors.run_command(COMMANDS[command]) == 0, command
    _unfinished()
    assert errors.run_command(COMMANDS["resume"]) == 0


@pytest.mark.usefixtures("place")
def test_another_policy_is_told_and_fine_tuned_anew(capsys: pytest.CaptureFixture[str]) -> None:
    float_network = networks.load("small_job:network").module
    assert solving.load("run", float_network)
    _other_policy("pointwise")
    assert evaluate.main(["run"]) in (0, 1)
    assert "is another policy than the one that was found" in " ".join(capsys.readouterr().out.split())
    before = ResultRecord.read(Path("run/result.json"))
    assert finetune.main(["run", "--epochs", "1"]) in (0, 1)
    after = ResultRecord.read(Path("run/result.json"))
    assert after.policy == PolicyRecord.read(Path("run/policy.json"))
    assert (before.policy, before.budget.used) != (after.policy, after.budget.used)
    assert before.found != after.found
    # The cost of what was fine-tuned is that of what it was made of.
    assert after.found.cost("latency") == after.last.cost("latency")
    assert report.main(["run"]) == 0
    assert solving.load("run", float_network)
    _widen("pointwise")
    with pytest.raises(
        ValueError, match=r"run/policy\.json has ./. bits for layer 'pointwise', run/checkpoint.* is of ./.: put"
    ):
        solving.load("run", float_network)


@pytest.mark.usefixtures("place")
def test_a_list_says_which_is_damaged_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("run", "copy")
    Path("copy/history.csv").write_bytes(b"\0\xff")
    assert runs.main(["list", "."]) == 0
    out = capsys.readouterr().out
    assert re.search(r"copy .* damaged", out)
    assert re.search(r"run .* finished", out)
    assert "copy: copy/history.csv is not text in UTF-8" in out


def test_a_checkpoint_of_a_function_of_pythons_own_is_refused(tmp_path: Path) -> None:
    held, notes = {"weight": torch.zeros(10)}, {"format": "haq-checkpoint-1", "network": "os:abort", "classes": "10"}
    notes |= {"input_shape": "[1, 8, 8]", "mean": "[0]", "std": "[1]"}
    path = tmp_path / "net.safetensors"
    path.write_bytes(safetensors.torch.save(held, notes))
    with pytest.raises(ValueError, match="never called because a file says so"):
        networks.load(str(path))
    for changes in ({"classes": "1000000000"}, {"input_shape": "[1, 100000, 100000]"}, {"std": "[0]"}, {"mean": "nan"}):
        path.write_bytes(safetensors.torch.save(held, notes | changes))
        with pytest.raises(ValueError, match="describes no network of its tensors"):
            networks.load(str(path))
    path.write_bytes(safetensors.torch.save(held, notes | {"format": "haq-checkpoint-2"}))
    with pytest.raises(ValueError, match="upgrade haq"):
        networks.load(str(path))
    with pytest.raises(ValueError, match="is of Python itself"):
        data.load("code:interact")
