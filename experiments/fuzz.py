"""Read files that nobody vouches for, by the thousand: no code may run, nothing may be raised but one sentence.

    python -m experiments.fuzz [--inputs N] [--kinds NAME ...] [--seed N]

Sound files (hardware in YAML, a table of measurements, checkpoints, a run, a deployed network) are changed at random, by bytes
and by values, by hypothesis, and read as a user would read them. Each input is read in a process of its own, forked, which may
neither grow without bounds nor take for ever. An audit hook in it notices when a module is imported that only the input names,
and when a program or a connection is started. Printed is what became of the inputs, and what one of them took at most.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import pickle
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import hypothesis
import torch
import yaml
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table
from torch import nn

import hw_models
from experiments.shared import add_columns
from haq import data, deploy, evaluate, networks, runs, search
from haq.console.errors import run_command
from haq.networks import Network
from haq.networks.building import names_of
from haq.reporting import reading
from haq.study.config import SearchConfig
from haq.study.search_run import SearchRun
from hw_models import trust

CANARY = "open('executed', 'w').close()\ndef main(*given, **options): raise SystemExit\nCanary = main\n"
CAPABILITIES = """
capabilities:
  pairs: [8/8, 4/8, [4, 4]]
  kinds: {linear: {weights: [4, 8], activations: "6:8"}}
  layers: {first: {weights: 8}, last: [8/8], "3": [8/8]}
  per_channel_weights: false
  zero_points: false
  activation_sign: unsigned
  power_of_two_scales: true
  accumulator_bits: 16
  on_overflow: wider
  overflow_cost: 2.0
"""
KINDS = ("hardware", "table", "config", "checkpoint", "torch", "run", "deployed")
MEMORY, CPU_S, WALL_S = 500 * 10**6, 5.0, 60  # that an input may take; the last only tells what hangs
HEADROOM = 3 * 2**30  # bytes of addresses beyond those of the first process; what is touched is measured
OWN = ("experiments.fuzz:network", "experiments.fuzz:splits")  # the run's, which was named
CODE = ("canary:main", "canary:Canary", "antigravity:fly", "pytest:main", "torch.distributed.run:main", "os:system")
FORBIDDEN = ("canary", "antigravity", "this", "turtledemo", "torch.distributed.run", "idlelib", "pytest")
STARTED = ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "socket.connect")
HOSTILE: tuple[Any, ...] = (
    *CODE,
    *("", " ", "x" * 5000, "[/bold]", "[red]x", "\x1b[31m", "a\nb", "a\u202eb", "\ud7ff", "../../etc/passwd"),
    *("/proc/self/environ", "lut:/proc/self/environ", "imagefolder:/", "/dev/zero"),
    *("timm:vit_giant_patch14_224", "timm:hf-hub:a/b", "!!python/name:os"),
    *(0, -1, 1, 2**31, 2**63, 10**30, -(10**400), 1e308, -1e-308, float("nan"), float("inf"), True, False, None),
    *([], {}, [[]], [0] * 100, {"a": 1}, {"": None}, [None]),
)
BYTES = (
    *(b"", b"\0", b"\xff\xfe", b"\x80", b"*a &a ", b"<<: ", b"[" * 3000, b"{" * 300, b"9" * 500),
    b"!!python/object/apply:os.system [x]",
)


class Outcome(NamedTuple):
    """What became of one input."""

    verdict: str  # "read", "refused", or what must not be
    sentence: str
    cpu_s: float
    memory: int  # bytes by which reading it made a process grow


@dataclass
class Kind:
    """One kind of files: how it is made wrong, and how it is read.

    Attributes:
        name: What it is.
        files: The sound files, or folders, of which one is changed.
        read: Reads what was changed; raises what its readers raise.
        outcomes: What became of the inputs so far.
    """

    name: str
    files: list[Path]
    read: Callable[[Path], object]
    outcomes: list[Outcome] = field(default_factory=list)


def network() -> Network:
    """Make the network of the run: four layers, for 1x8x8 images and 4 classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [nn.Conv2d(1, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Flatten()]
        module = nn.Sequential(*parts, nn.Linear(128, 16), nn.ReLU(), nn.Linear(16, 4))
    return Network("small", module.eval(), (1, 8, 8))


def splits() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Make the data of the run: noise, and what the network says of it."""
    made = {}
    for seed, name in enumerate(("train", "search", "test")):
        images = torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        labels = network().module(images).argmax(1)
        labels[:4] = torch.arange(4)
        made[name] = images, labels
    return made


def changed(content: bytes, draw: Callable[[Any], Any]) -> bytes:
    """Change bytes at random places: cut off, put in, taken out, written over, or said twice."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 64)))
        how = draw(st.sampled_from(("cut", "insert", "delete", "overwrite", "repeat", "flip")))
        new = draw(st.sampled_from(BYTES))
        if how == "cut":
            content = content[:start]
        elif how == "insert":
            content = content[:start] + new + content[start:]
        elif how == "delete":
            content = content[:start] + content[end:]
        elif how == "overwrite":
            content = content[:start] + new + content[start + len(new) :]
        elif how == "repeat":
            content = content[:end] + content[start:]
        else:
            content = content[:start] + bytes(byte ^ 1 << (start % 8) for byte in content[start:end]) + content[end:]
    return content


def replaced(value: Any, draw: Callable[[Any], Any]) -> Any:
    """Put something hostile in place of a value somewhere in plain data, or take it away."""
    for _ in range(draw(st.integers(1, 3))):
        place: Any = value
        holder: Any = None
        key: Any = None
        while isinstance(place, (dict, list)) and place and draw(st.integers(0, 5)):
            holder = place
            keys: Any = range(len(place))
            if isinstance(place, dict):
                keys = sorted(place)
            key = draw(st.sampled_from(keys))
            place = place[key]
        new = copy.deepcopy(draw(st.sampled_from(HOSTILE)))  # it may be changed in the next round
        does_replace = draw(st.booleans())
        if holder is None:
            if does_replace:
                value = new
            return value
        if does_replace:
            holder[key] = new
        else:
            del holder[key]
    return value


def make_wrong(path: Path, draw: Callable[[Any], Any]) -> None:
    """Change a file: its bytes, or the values in it, if it is of a form that is known."""
    content = path.read_bytes()
    if draw(st.integers(0, 2)) == 0:
        path.write_bytes(changed(content, draw))
    elif path.suffix in (".yaml", ".json"):
        load: Callable[[bytes], Any] = json.loads
        dump: Callable[..., str] = json.dumps
        if path.suffix == ".yaml":
            load, dump = yaml.safe_load, yaml.safe_dump
        path.write_text(dump(replaced(load(content), draw)), encoding="utf-8", errors="surrogatepass")
    elif path.suffix == ".safetensors":
        size = int.from_bytes(content[:8], "little")
        header = json.dumps(replaced(json.loads(content[8 : 8 + size]), draw)).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])
    elif path.suffix == ".pt":
        torch.save(draw(st.sampled_from(wrong_states())), path)
    else:
        rows = [line.split(",") for line in content.decode().splitlines()]
        row = rows[draw(st.integers(0, len(rows) - 1))]
        row[draw(st.integers(0, len(row) - 1))] = str(draw(st.sampled_from(HOSTILE)))
        path.write_text("\n".join(map(",".join, rows)), encoding="utf-8", errors="surrogatepass")


class Bomb:
    """A pickle that starts a program when it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def wrong_states() -> list[Any]:
    """Make what a torch file may hold that is no state dict of the network, and what may be taken for one."""
    state = network().module.state_dict()
    weight = state["0.weight"]
    odd = [
        *(weight.to(kind) for kind in (torch.complex64, torch.bool, torch.int8, torch.float16, torch.float8_e4m3fn)),
        *(
            weight * float("nan"),
            weight.to("meta"),
            weight.to_sparse(),
            torch.zeros(1).expand(10**6, 10**6),
            torch.zeros(10**9, 0),
        ),
        *(torch.zeros(()), weight[..., None], weight.permute(3, 2, 1, 0), None, "x", 3, {}, [weight]),
    ]
    made: list[Any] = [{**state, "0.weight": value} for value in odd]
    made += [dict(enumerate(state.values())), {"model": state}, {"model_state_dict": state, "epoch": 1}, {"state_dict": {}}]
    made += [
        {f"module.{key}": value for key, value in state.items()},
        [],
        None,
        Bomb(),
        {"0.weight": Bomb()},
        {"a": {"b": {}}},
    ]
    return made


def read_hardware(path: Path) -> None:
    """Read hardware from YAML, and price the network on it; the same file as a configuration."""
    target = hw_models.load_target(str(path))
    target.cost_table(hw_models.trace(network().module, torch.zeros(1, 1, 8, 8)))


def read_table(path: Path) -> None:
    """Read a table of measurements, and price the network by it."""
    hw_models.load_target(f"lut:{path}").cost_table(hw_models.trace(network().module, torch.zeros(1, 1, 8, 8)))


def read_config(path: Path) -> None:
    """Take a search's options from a file, and load what it names."""
    config = SearchConfig.from_options({}, path)
    networks.load(config.network)
    data.load(config.data)


def read_checkpoint(path: Path) -> None:
    """Read a checkpoint by itself, or as the weights of a network, and as a quantized network."""
    if path.suffix == ".pt":
        networks.load(f"{OWN[0]}@{path}")
        return
    networks.load(str(path))
    if networks.holds_quantized(path):
        networks.load_quantized(path)


def read_run(folder: Path) -> None:
    """Do with a run what a user would do: look at it, measure it again, go on with it."""
    runs.main(["show", str(folder)])
    reading.read_folder(folder)
    run = SearchRun.load(folder)
    task = run.build()
    run.check(task)
    run.load_checkpoint(task)
    if run.finished:
        evaluate.main([str(folder)])
    else:
        search.main(["--resume", str(folder)])


def read_deployed(folder: Path) -> None:
    """Load a deployed network, and ask it."""
    deploy.load(folder)(torch.zeros(2, 1, 8, 8))


def sound_files(place: Path, kinds: list[str]) -> list[Kind]:
    """Make sound files of every kind.

    Args:
        place: The folder that they go to; it becomes the current one.
        kinds: The kinds that are asked for.

    Returns:
        The kinds, each with its files.
    """
    os.chdir(place)
    Path("canary.py").write_text(CANARY)
    trust.trust(*OWN)
    targets = Path(hw_models.__file__).parent / "targets"
    hardware = [Path(shutil.copy(path, place)) for path in sorted(targets.glob("*.yaml"))]
    rows = [f"{name},{w},{a},{w * a}" for name in ("0", "3", "6", "8") for w in range(1, 9) for a in range(1, 9)]
    Path("table.csv").write_text("\n".join(["layer,w_bits,a_bits,latency_us", *rows]))
    shapes = ("conv,1,8,3,2,1,8", "pointwise,8,8,1,1,1,4x4", "linear,128,16,,,,1", "linear,16,4,1,1,1,")
    header = "kind,in_channels,out_channels,kernel,stride,groups,input_size,w_bits,a_bits,latency_us"
    pairs = ("8,8,3", "4,8,2", "16,float,9")
    Path("shapes.csv").write_text("\n".join([header, *(f"{shape},{pair}" for shape in shapes for pair in pairs)]))
    able = Path("able.yaml")
    able.write_text((targets / "edge.yaml").read_text(encoding="utf-8") + CAPABILITIES)
    hardware.append(able)
    named = networks.load(OWN[0])
    networks.save_checkpoint(named, Path("own.safetensors"))
    networks.save_checkpoint(networks.load(pretrained=False), Path("ours.safetensors"))
    torch.save(named.module.state_dict(), "own.pt")
    asked = ["--network", OWN[0], "--data", OWN[1], "--budget", "0.6", "--solver", "random", "--evaluations", "6"]
    call(lambda: search.main([*asked, "--finetune-epochs", "1", "--out", "run"]))
    shutil.copytree("run", "cut")
    Path("cut/result.json").unlink()
    shutil.copy("run/checkpoint/quantized.safetensors", "quantized.safetensors")
    made = [
        Kind("hardware (YAML)", hardware, read_hardware),
        Kind("table", [Path("table.csv"), Path("shapes.csv")], read_table),
        Kind("config", [Path(shutil.copy("run/config.yaml", "config.yaml"))], read_config),
        Kind("checkpoint", [Path(f"{name}.safetensors") for name in ("own", "ours", "quantized")], read_checkpoint),
        Kind("torch file", [Path("own.pt")], read_checkpoint),
        Kind("run", [Path("run"), Path("cut")], read_run),
    ]
    if "deployed" in kinds:
        call(lambda: deploy.main(["run", "--out", "deployed"]))
        made.append(Kind("deployed network", [Path("deployed")], read_deployed))
    return [kind for kind in made if not kinds or any(kind.name.startswith(name) for name in kinds)]


def call(command: Callable[[], int]) -> None:
    """Call a command in a process of its own, so that this one stays as small as it is."""
    child = os.fork()
    if not child:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            status = run_command(command)
        os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise ValueError("the sound files can't be made: see the error above")


def change_one(kind: Kind, draw: Callable[[Any], Any], place: Path) -> Path:
    """Copy one of a kind's files into a folder and change it; of a folder, a file in it."""
    chosen = draw(st.sampled_from(kind.files))
    path = place / chosen.name
    if chosen.is_dir():
        shutil.copytree(chosen, path)
        inside = sorted(one for one in path.rglob("*") if one.is_file() and not one.name.startswith(("events", ".")))
        wrong = draw(st.sampled_from(inside))
        if wrong.suffix in (".png", ".so", ".npz", ".state"):
            wrong.write_bytes(changed(wrong.read_bytes(), draw))
        else:
            make_wrong(wrong, draw)
    else:
        shutil.copy(chosen, path)
        make_wrong(path, draw)
    return path


def read_in_child(kind: Kind, path: Path) -> Outcome:
    """Read an input in a process of its own, and tell what became of it."""
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        os.close(told)
        _read(kind, path, tell)
    os.close(tell)
    with os.fdopen(told, "rb") as pipe:
        content = pipe.read()
    _, status, used = os.wait4(child, 0)
    verdict, sentence, before = "KILLED", f"status {status}", used.ru_maxrss * 1024
    with suppress(EOFError, pickle.UnpicklingError):
        verdict, sentence, before = pickle.loads(content)
    cpu_s = used.ru_utime + used.ru_stime
    grown = max(0, used.ru_maxrss * 1024 - before)
    if Path("executed").exists():
        verdict = "CODE"
    elif cpu_s > CPU_S and verdict in ("read", "refused"):
        verdict = "SLOW"
    elif grown > MEMORY and verdict in ("read", "refused"):
        verdict = "MEMORY"
    return Outcome(verdict, sentence, cpu_s, grown)


def _read(kind: Kind, path: Path, tell: int) -> None:
    """Read an input within limits, tell what became of it, and end the process."""
    # What a fork shares is only counted once it is used.
    before = _memory(1)
    most = _memory(0) + HEADROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.alarm(WALL_S)
    noticed: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in STARTED or (event == "import" and arguments[0] in FORBIDDEN):
            noticed.append(f"{event} {arguments[:1]}")

    sys.addaudithook(hook)
    verdict, sentence = "read", ""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            # As a command would: only what was named may be imported.
            with trust.command():
                kind.read(path)
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            verdict, sentence = "refused", str(error)
            if not sentence or len(sentence) > 2000:
                verdict = "NO SENTENCE"
        except BaseException as error:
            verdict, sentence = "TRACEBACK", "".join(traceback.format_exception(error)[-3:])
    if noticed:
        verdict, sentence = "CODE", "; ".join(noticed)
    os.write(tell, pickle.dumps((verdict, sentence[:3000], before)))
    os._exit(0)


def _memory(column: int) -> int:
    """Return how much memory this process has, in bytes: addresses (column 0), or what is there (column 1)."""
    return int(Path("/proc/self/statm").read_text().split()[column]) * resource.getpagesize()


def fuzz(kinds: list[Kind], count: int, seed: int, on_input: Callable[[Kind, Outcome], None] = lambda kind, one: None) -> None:
    """Read wrong inputs, as many of every kind, and keep what became of them.

    Args:
        kinds: The kinds.
        count: How many inputs there are of all kinds together.
        seed: What everything random comes from.
        on_input: Told each of them.
    """
    each = -(-count // len(kinds))
    for kind in kinds:
        # Of equal inputs hypothesis reads one, so that a round may be of fewer.
        while len(kind.outcomes) < each:
            _round(kind, each - len(kind.outcomes), seed, on_input)
            seed += 1


def _round(kind: Kind, count: int, seed: int, on_input: Callable[[Kind, Outcome], None]) -> None:
    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.data())
    def read_one(drawn: st.DataObject) -> None:
        with tempfile.TemporaryDirectory(dir=".") as folder:
            outcome = read_in_child(kind, change_one(kind, drawn.draw, Path(folder)))
        kind.outcomes.append(outcome)
        on_input(kind, outcome)

    read_one()


def table_of(kinds: list[Kind]) -> Table:
    """Put what became of the inputs into a table."""
    table = Table(title="Files that nobody vouches for")
    add_columns(table, ("kind", "inputs", "read", "refused", "anything else", "most memory", "most CPU time"), ("kind",))
    for kind in kinds:
        counts = Counter(outcome.verdict for outcome in kind.outcomes)
        others = {verdict: count for verdict, count in counts.items() if verdict not in ("read", "refused")}
        table.add_row(
            kind.name,
            str(len(kind.outcomes)),
            str(counts["read"]),
            str(counts["refused"]),
            ", ".join(f"{verdict} {count}" for verdict, count in others.items()) or "none",
            f"{max(outcome.memory for outcome in kind.outcomes) / 1e6:.0f} MB",
            f"{max(outcome.cpu_s for outcome in kind.outcomes):.1f} s",
        )
    return table


def main(arguments: list[str] | None = None) -> int:
    """Read wrong inputs of every kind, and print what became of them; 1 if anything but a sentence did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=2000, metavar="N")
    parser.add_argument("--kinds", nargs="*", default=KINDS)
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # what is forked has no other thread
    console = Console()
    for library in ("timm", "torchvision", "pytorchcv"):
        names_of(library)  # imported once, not by every child
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        kinds = sound_files(Path(place), options.kinds)

        def on_input(kind: Kind, outcome: Outcome) -> None:
            if outcome.verdict not in ("read", "refused"):
                console.print(f"{kind.name}: {outcome.verdict}: {outcome.sentence}", markup=False, highlight=False)

        fuzz(kinds, options.inputs, options.seed, on_input)
        os.chdir("/")
    console.print(table_of(kinds))
    console.print(f"{sum(len(kind.outcomes) for kind in kinds):,} inputs in {time.monotonic() - began:.0f} s")
    return int(any(outcome.verdict not in ("read", "refused") for kind in kinds for outcome in kind.outcomes))


if __name__ == "__main__":
    sys.exit(run_command(main))
