"""Runs a Python program as somebody else would: an interpreter of its own, warnings as errors, no settings of ours."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_RUN_SECONDS = 240
_OURS = ("CAR_CONTROL_PLANE_", "DATABASE_URL", "PG")


async def run_python(*arguments: str | Path, cwd: Path, given: bytes = b"", **environment: str) -> str:
    """Return what the program printed, both streams together, with `given` as its input; fail with it when the program does."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", *arguments),
        cwd=cwd,
        env={
            **{name: value for name, value in os.environ.items() if not name.startswith(_OURS)},
            "PYTHONPATH": str(ROOT),
            **environment,
        },
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = await asyncio.wait_for(process.communicate(given), _RUN_SECONDS)
    except TimeoutError:
        process.kill()
        output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()
