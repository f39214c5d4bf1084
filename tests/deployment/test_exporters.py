"""`haq deploy RUN --to NAME` writes with any exporter: ours, an installed package's, one's own; and says what it can't."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import quantizers as Q
from haq import deploy, networks, search
from haq.console.errors import EXIT_BAD_INPUT, run_command
from haq.deployment import EXPORTERS
from haq.deployment.exporter import Exporter, lacking
from tests.commands.test_search_command import MODULE, QUICK
from tests.conftest import enter

PLUG_IN = """
from haq.deployment.exporter import Exporter, Verdict

class Text(Exporter):
    name, summary, output = "text", "bits as text", "bits.txt"
    def check(self, network):
        pass
    def export(self, network, graph, images, path, *, notes, options, on_progress):
        import quantizers as Q
        assert not network.training
        assert images.dim() == 4
        lines = [f"{layer} {w} {a}" for layer, (w, a) in Q.get_policy(network).items()]
        path.write_text("\\n".join([*graph.layers, *sorted(notes), *lines]))
    def compare(self, network, graph, samples, path):
        count = sum(len(labels) for _, labels in samples.test())
        return Verdict(True, (("images", str(count)), ("compared", str(len(samples.compared)))))

class Half:
    name, summary, output = "half", "lacks most of it", "half"
    def export(self, *arguments): pass

class Hollow(Exporter):
    name, summary, output = "hollow", "has no methods", "hollow"
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run in it, by the integer programme."""
    place = tmp_path_factory.mktemp("deployed")
    with pytest.MonkeyPatch.context() as patch:
        enter(place, patch, MODULE)
        assert run_command(lambda: search.main([*QUICK, "--solver", "ilp", "--out", "run"])) == 0
    return place


@pytest.fixture
def place(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter(finished, monkeypatch, MODULE)
    return finished


def call(*arguments: str) -> int:
    return run_command(lambda: deploy.main(["run", *arguments]))


def test_ours_are_what_they_are_listed_as() -> None:
    for name in EXPORTERS:
        exporter = EXPORTERS.get(name)
        assert exporter.name == name
        assert issubclass(exporter, Exporter)
        assert not lacking(exporter)
        assert (name, "built in", exporter.summary) in EXPORTERS.rows()


def test_an_exporter_of_ones_own_and_of_an_installed_package(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "more_formats.py").write_text(PLUG_IN)
    about = tmp_path / "more_formats-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: more-formats\nVersion: 1.0\nSummary: more formats\n")
    points = "text = more_formats:Text\nhalf = more_formats:Half\nhollow = more_formats:Hollow\n"
    (about / "entry_points.txt").write_text(f"[haq.exporters]\n{points}")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    assert ("text", "more-formats 1.0", "more formats") in EXPORTERS.rows()
    policy = Q.BitPolicy.from_json("run/policy.json")
    for to, out in (("text", Path("run/bits.txt")), ("more_formats:Text", tmp_path / "made" / "bits.txt")):
        options = ["--to", to]
        if out.parent != Path("run"):
            options += ["--out", str(out)]
        assert call(*options) == 0
        printed = " ".join(capsys.readouterr().out.split())
        assert f"written: {out} (fine-tuned)" in printed
        assert "images 64 compared 64" in printed
        lines = out.read_text().splitlines()
        assert lines[-len(policy) :] == [f"{layer} {w} {a}" for layer, (w, a) in policy.items()]
        assert lines[: len(policy)] == list(policy)
        out.unlink()
    for name, message in (
        ("half", "exporter 'half' can't be used: it lacks check and compare"),
        ("hollow", "exporter 'hollow' can't be used: it lacks check, export and compare"),
        ("onxx", "unknown exporter 'onxx'; did you mean onnx"),
        ("more_formats:Txt", "module more_formats has no 'Txt'; close: Text"),
    ):
        assert call("--to", name) == EXIT_BAD_INPUT
        err = capsys.readouterr().err
        assert message in " ".join(err.split())


def test_a_scheme_that_cannot_be_deployed_is_told_before_anything_is_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx")
    monkeypatch.setattr("haq.deployment.graph.capture", lambda *given: pytest.fail("captured"))
    before = sorted(path.name for path in Path("run").iterdir())
    for to in ("tvm", "onnx", "qonnx"):
        assert call("--to", to, "--scheme", "kmeans") == EXIT_BAD_INPUT
        err = " ".join(capsys.readouterr().err.split())
        assert "layer 'depthwise' can't be deployed: weights of scheme 'kmeans'" in err
    assert sorted(path.name for path in Path("run").iterdir()) == before


def test_another_scheme_than_the_runs_own(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    printed: dict[str, Any] = {}
    for scheme in ("linear", "lsq"):
        out = tmp_path / f"{scheme}.onnx"
        assert call("--to", "onnx", "--scheme", scheme, "--out", str(out), "--json") in (0, 1)
        printed[scheme] = json.loads(capsys.readouterr().out)
        assert out.is_file()
        assert printed[scheme]["written"] == str(out)
    # The network was fine-tuned in the run's own scheme, which is the linear one.
    assert printed["linear"]["fine_tuned"]
    assert not printed["lsq"]["fine_tuned"]
    assert (tmp_path / "linear.onnx").read_bytes() != (tmp_path / "lsq.onnx").read_bytes()


def test_what_was_fine_tuned_in_another_scheme_is_deployed_in_it(
    place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    from haq.study.search_run import SearchRun

    path = Path("run/checkpoint/quantized.safetensors")
    kept = path.read_bytes()
    run = SearchRun.load(Path("run"))
    loaded = run.load_network()
    names = list(run.load_policy())
    schemes = dict.fromkeys(names, "lsq") | {names[0]: "linear", names[-1]: "linear"}
    policy = {name: (max(2, w or 2), max(2, a or 2)) for name, (w, a) in run.load_policy().items()}
    lsq = Q.quantize(loaded.network.module, policy, scheme=schemes, calibrate=loaded.calibration())
    run.save_checkpoint(lsq, loaded)
    try:
        for scheme, tuned in (([], True), (["--scheme", "lsq"], True), (["--scheme", "linear"], False)):
            assert call("--to", "onnx", *scheme, "--out", str(tmp_path / "net.onnx"), "--json") in (0, 1)
            assert json.loads(capsys.readouterr().out)["fine_tuned"] == tuned
    finally:
        path.write_bytes(kept)


def test_options_that_an_exporter_does_not_take(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, name in ((["--threads", "2"], "threads"), (["--target", "generic"], "target"), (["--cold"], "cold")):
        assert call("--to", "onnx", *options) == EXIT_BAD_INPUT
        err = capsys.readouterr().err
        assert f"--{name} is for networks whose kernels are measured (--to tvm), not for --to onnx" in " ".join(err.split())


FLAVOURED = """
from haq.deployment.exporter import Exporter, Verdict

class Flavoured(Exporter):
    name, summary, output = "flavoured", "a file of several kinds", "flavoured.txt"
    options, flavours = ("flavour",), ("vanilla", "chocolate")
    def check(self, network):
        pass
    def export(self, network, graph, images, path, *, notes, options, on_progress):
        path.write_text(str(options.get("flavour")))
    def compare(self, network, graph, samples, path):
        return Verdict(True, ())
"""


def test_what_a_file_is_for_is_given_to_exporters_that_have_several_kinds(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "flavoured_job.py").write_text(FLAVOURED)
    monkeypatch.syspath_prepend(tmp_path)
    to = ["--to", "flavoured_job:Flavoured", "--out", str(tmp_path / "out.txt")]
    for options, sentence in (
        (
            ["--to", "tvm", "--for", "vanilla"],
            "--for vanilla is for formats that have files of several kinds; --to tvm has",
        ),
        (
            [*to, "--for", "vanila"],
            "--for is 'vanila'; did you mean vanilla? What --to flavoured_job:Flavoured can write",
        ),
        ([*to, "--residuals", "8"], "--residuals 8 can't be written by --to flavoured_job:Flavoured"),
        ([*to, "--residuals", "7"], "--residuals is '7'. Known: 8, float"),
    ):
        assert call(*options) == EXIT_BAD_INPUT
        assert sentence in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "out.txt").exists()
    for options, written in (([], "None"), (["--for", "vanilla", "--residuals", "float"], "vanilla")):
        assert call(*to, *options) == 0
        assert (tmp_path / "out.txt").read_text() == written


def test_a_run_is_exported_for_executorch(place: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "net.pt2"
    assert call("--to", "executorch", "--residuals", "8", "--out", str(out), "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["same_answers"]
    assert printed["compared"]["same answer as in PyTorch"].startswith("64 of 64 test images")
    assert set(printed["by_residuals"]) == {"8", "float"}
    assert out.is_file()


def test_printed_commands_are_quoted(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def note(folder: Path, command: str) -> Any:
        asked.append(command)
        raise ValueError("enough")

    monkeypatch.setattr("haq.store.lock.writing", note)
    monkeypatch.setattr("hw_models.trust._named", set())  # what other tests named
    Path("a run; rm").symlink_to("run")
    assert run_command(lambda: deploy.main(["a run; rm", "--to", "onnx"])) == EXIT_BAD_INPUT
    assert asked == ["python -m haq.deploy 'a run; rm' --to onnx"]


def test_the_help_needs_no_torch() -> None:
    code = "import sys; from haq import deploy; deploy.main(['--help'])"
    hidden = f"import sys; sys.modules['torch'] = None; {code}"
    done = subprocess.run([sys.executable, "-c", hidden], capture_output=True, text=True, check=False)
    assert not done.stderr
    assert done.returncode == 0
    assert "--scheme" in done.stdout
    assert re.search(r"--to NAME", done.stdout)


def test_a_file_of_networks_is_needed_by_no_exporter(tmp_path: Path) -> None:
    """What is exported is the network in memory: a quantized file that is read again gives the same ONNX file."""
    onnx = pytest.importorskip("haq.deployment.onnx")
    pytest.importorskip("onnx")
    from haq.deployment.graph import capture
    from tests.conftest import images, small_network

    module = small_network()
    qnetwork = Q.quantize(module, Q.BitPolicy.uniform(module, 4, 4), calibrate=images(16)).eval()
    networks.save_quantized(tmp_path / "q.safetensors", qnetwork)
    again = networks.load_quantized(tmp_path / "q.safetensors", module=module)
    for name, network in (("one", qnetwork), ("two", again)):
        onnx.export(capture(network, images(1)), network, tmp_path / f"{name}.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


TIMED = """
from haq.deployment.exporter import Exporter, Verdict

class Timed(Exporter):
    name, summary, output = "timed", "nothing, but so fast", "timed.txt"
    latency_s, machine = 0.0, {"processor": "Z80"}
    def check(self, network):
        pass
    def export(self, network, graph, images, path, *, notes, options, on_progress):
        path.write_text("")
    def compare(self, network, graph, samples, path):
        return Verdict(True, (), self.latency_s, self.machine)
"""


@pytest.mark.parametrize(
    ("factor", "provenance", "machine", "words"),
    [
        (1.1, "estimated", None, ""),
        (
            0.5,
            "estimated",
            None,
            "is 50.00 % below the {} that the run has for this policy, estimated for edge: that is",
        ),
        (1.5, "measured on Z80", "Z80", "is 50.00 % above the {} that the run has for this policy, measured for edge on this"),
        (1.5, "measured on Z81", "Z81", "measured for edge, on another machine"),
        (0.85, "measured on Z80", "Z80", ""),
    ],
)
def test_a_latency_far_from_the_runs_is_said(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    factor: float,
    provenance: str,
    machine: str | None,
    words: str,
) -> None:
    """Beyond 20 %, with what is estimated and what measured, and where."""
    enter(tmp_path, monkeypatch, MODULE)
    shutil.copytree(finished / "run", tmp_path / "run")
    (tmp_path / "timed_job.py").write_text(TIMED)
    monkeypatch.delitem(sys.modules, "timed_job", raising=False)
    import timed_job  # type: ignore[import-not-found]

    problem = json.loads(Path("run/problem.json").read_text())
    predicted = json.loads(Path("run/result.json").read_text())["found"]["latency_s"]
    problem["target"]["provenance"] = provenance
    Path("run/problem.json").write_text(json.dumps(problem))
    if machine is not None:
        config = yaml.safe_load(Path("run/config.yaml").read_text())
        config["signature"]["machine"] = json.dumps({"processor": machine})
        Path("run/config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(timed_job.Timed, "latency_s", factor * predicted)
    assert call("--to", "timed_job:Timed") == 0
    printed = " ".join(capsys.readouterr().out.split())
    kind = provenance.split()[0]
    assert f"latency, {kind} by the run {1e6 * predicted:.1f} us (edge" in printed
    assert ("The latency that was measured here" in printed) == bool(words)
    assert words.format(f"{1e6 * predicted:.1f} us") in printed
