"""Every benchmark runs, against the library as it is: figures nobody can produce any more are worth nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import GROUPS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_a_group_runs_and_writes_its_figures(group: str, server_dsn: str, tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    run = subprocess.run(
        [sys.executable, "benchmarks/run", group, "--quick", "--rounds", "1", "--dsn", server_dsn, "--json", figures],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    written = json.loads(figures.read_text(encoding="utf-8"))
    assert written["facts"]["quick"] is True
    assert list(written["groups"]) == [group]
    lines = written["groups"][group]
    assert lines
    for line in lines:
        assert line["what"] in run.stdout
