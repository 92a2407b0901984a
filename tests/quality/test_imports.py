"""What importing costs and reaches: the package is cheap, and its floors hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.quality.programs import ROOT

HEAVY = {
    "alembic",
    "asyncpg",
    "cryptography",
    "opentelemetry",
    "pydantic",
    "pytest",
    "rich",
    "sqlalchemy",
    "sqlmodel",
    "typer",
}


def loaded_after(code: str) -> set[str]:
    """Run the code in a fresh interpreter and return the top-level modules it has then."""
    report = "import sys, json; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; {report}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(json.loads(done.stdout))


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_after("import car_control_plane") & HEAVY == set()


def test_an_error_class_can_be_had_without_sqlalchemy() -> None:
    assert loaded_after("from car_control_plane import StaleWriteError") & HEAVY == set()


@pytest.mark.parametrize("name", ["Tenant", "TenantRepository", "init_db"])
def test_using_the_library_does_not_load_its_edges(name: str) -> None:
    """Alembic, the terminal and the test libraries are paid for by those who use them."""
    assert loaded_after(f"from car_control_plane import {name}") & {"alembic", "pytest", "rich", "typer"} == set()


def test_the_embedded_servers_supervisor_needs_the_standard_library_and_the_errors_only() -> None:
    """It starts without site-packages, and each start waits for it."""
    program = (
        "import sys; sys.path.append(sys.argv[1]); import car_control_plane.embedded.supervisor; "
        "print(*(name for name in sys.modules if name.partition('.')[0] not in sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program, ROOT], capture_output=True, text=True, check=True)
    package = {"embedded", "embedded.binaries", "embedded.supervisor", "errors"}
    ours = {"car_control_plane", *(f"car_control_plane.{name}" for name in package)}
    assert set(done.stdout.split()) - {"__main__"} == ours


def test_imports_point_strictly_downwards() -> None:
    """The contract stands in pyproject.toml; it is exhaustive, so a new module without a floor fails here too."""
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
