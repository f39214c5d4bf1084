"""What the README shows is taken from what its first command prints."""

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from experiments import readme_job

PRINTED = """\
Bits per layer on edge; latency in us, estimated

 layer          bits
 ───────────────────
 stem             8*

mobilenet-mini on fashion-mnist-12k, edge
\x20\x20\x20
                          test         search
                      accuracy       accuracy   \x20
 policy             (measured)     (measured)
 ─────────────────────────────────────────────
 float                 92.30 %        92.90 %
   fine-tuned          91.85 %        92.30 %
\x20\x20\x20
2,000 test and 2,000 search images
"""
TABLE = """\
                          test         search
                      accuracy       accuracy
 policy             (measured)     (measured)
 ─────────────────────────────────────────────
 float                 92.30 %        92.90 %
   fine-tuned          91.85 %        92.30 %"""


def test_the_table_of_results_is_found() -> None:
    assert readme_job.table_of(PRINTED) == TABLE
    with pytest.raises(ValueError, match="no table of policies"):
        readme_job.table_of("nothing\n")


def test_the_command_is_the_first_one_of_the_readme() -> None:
    readme = (readme_job.ROOT / "README.md").read_text(encoding="utf-8")
    assert readme_job.first_command(readme) == ["python", "-m", "haq.search", "--hw", "edge"]
    with pytest.raises(ValueError, match="no block of commands"):
        readme_job.first_command("# haq\n")
    with pytest.raises(ValueError, match="it must begin with python"):
        readme_job.first_command(f"{readme_job.MARK}\n```bash\nmake\n```\n")


def test_table_and_picture_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(words: list[str], cwd: str, env: dict[str, str], **options: Any) -> Any:
        assert words[1:] == ["-m", "haq.search", "--hw", "edge"]
        assert env["COLUMNS"] == "80"
        made = Path(cwd) / "runs" / "edge"
        made.mkdir(parents=True)
        (made / "policy.png").write_bytes(b"picture")
        return SimpleNamespace(returncode=0, stdout=PRINTED)

    monkeypatch.setattr(subprocess, "run", run)
    assert readme_job.main(["--out", str(tmp_path / "docs")]) == 0
    assert (tmp_path / "docs" / "policy.png").read_bytes() == b"picture"
    text = (tmp_path / "docs" / "main_job.txt").read_text(encoding="utf-8")
    assert text.startswith(TABLE + "\n\n")
    assert " cores of " in text
    monkeypatch.setattr(subprocess, "run", lambda *given, **options: SimpleNamespace(returncode=2, stdout=""))
    with pytest.raises(RuntimeError, match="ended with 2"):
        readme_job.main(["--out", str(tmp_path / "docs")])
