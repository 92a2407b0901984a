"""Every task of the project, in the environment it is called from: `nox` runs the daily check, `nox -l` lists the rest.

`.ci/run` calls these sessions too, so that a check is written down once.
"""

import difflib
import os
import shutil
import sys
import tempfile
from pathlib import Path

import nox

nox.options.default_venv_backend = "none"  # the caller's environment: `uv run nox`, or an activated one
nox.options.sessions = ["check"]
nox.options.error_on_missing_interpreters = False

# Called as `.venv/bin/nox` without activation, the tools beside it are meant, not those of the machine.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

COVERED_WHOLLY = ("errors.py", "dsn.py", "encryption/*")
"""Modules where an untested branch is a wrong error or a leaked password."""

LOCK = (
    *("uv", "pip", "compile", "pyproject.toml", "--quiet", "--universal", "--python-version", "3.11"),
    *(
        "--extra",
        "aws",
        "--extra",
        "cli",
        "--extra",
        "embedded",
        "--extra",
        "otel",
        "--extra",
        "speed",
        "--extra",
        "vault",
    ),
    *("--generate-hashes", "--no-annotate", "--no-emit-index-url", "--no-emit-find-links"),
    *("--custom-compile-command", "nox -s lock"),
)


@nox.session
def check(session: nox.Session) -> None:
    """Run what every change must pass: format, lint, layers, types, tests."""
    for name in ("format", "lint", "layers", "types", "tests"):
        session.notify(name, posargs=["--check"] if name == "format" else [])


@nox.session(name="format")
def format_(session: nox.Session) -> None:
    """Format the tree; with `-- --check` only say what would change."""
    session.run("ruff", "format", *session.posargs, ".", external=True)


@nox.session
def lint(session: nox.Session) -> None:
    """Lint the tree; with `-- --fix` mend what can be mended."""
    session.run("ruff", "check", *session.posargs, ".", external=True)


@nox.session
def layers(session: nox.Session) -> None:
    """Check that imports point strictly downwards (docs/adr/0009-floors.md)."""
    session.run("lint-imports", external=True)


@nox.session
def types(session: nox.Session) -> None:
    """Check the types twice: mypy strictly over everything, pyright over what users import."""
    session.run("mypy", external=True)
    session.run("pyright", external=True)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; arguments after `--` go to pytest."""
    session.run("pytest", *session.posargs, external=True)


@nox.session
def coverage(session: nox.Session) -> None:
    """Report the coverage of the last `pytest --cov` and refuse what is below the limits."""
    session.run("coverage", "report", "--fail-under=95", external=True)
    for module in COVERED_WHOLLY:
        session.run("coverage", "report", f"--include=car_control_plane/{module}", "--fail-under=100", external=True)


@nox.session
def matrix(session: nox.Session) -> None:
    """Run the schema and integration tests against the servers named after `--`, one DSN each.

    The tests make databases of their own there and drop them.
    """
    if not session.posargs:
        session.error("name at least one server: nox -s matrix -- postgresql://postgres@127.0.0.1:5432/postgres")
    for dsn in session.posargs:
        session.run("pytest", "tests/schema", "tests/integration", "--pg=url", "--pg-url", dsn, external=True)


@nox.session
def containers(session: nox.Session) -> None:
    """Run the schema and integration tests against a server in a Docker container."""
    session.run("pytest", "tests/schema", "tests/integration", "--pg=container", *session.posargs, external=True)


@nox.session
def bench(session: nox.Session) -> None:
    """Run the benchmarks and print their tables; arguments after `--` go to them."""
    session.run("python", "benchmarks/run", *session.posargs, external=True)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation; with `-- serve` show it on a local port instead."""
    if session.posargs:
        session.run("mkdocs", *session.posargs, external=True)
        return
    with tempfile.TemporaryDirectory() as site:
        quiet = {"NO_MKDOCS_2_WARNING": "1"}
        session.run("mkdocs", "build", "--strict", "--quiet", "--site-dir", site, env=quiet, external=True)


@nox.session
def reference(session: nox.Session) -> None:
    """Write the reference pages that come from code: settings, commands, errors, schema."""
    session.run("python", "docs/generate_reference.py", *session.posargs, external=True)


@nox.session
def build(session: nox.Session) -> None:
    """Build both distributions, install the wheel alone in a fresh environment, and migrate a database with it."""
    shutil.rmtree("dist", ignore_errors=True)
    session.run("uv", "build", "--quiet", external=True)
    (wheel,) = Path("dist").resolve().glob("*.whl")
    with tempfile.TemporaryDirectory() as scratch:  # outside of the checkout, or its sources would be imported
        Path(scratch).chmod(0o755)  # root's PostgreSQL runs as somebody else, who must reach its data
        environment = Path(scratch, "environment")
        scripts = environment / ("Scripts" if os.name == "nt" else "bin")
        session.run("uv", "venv", "--quiet", "--python", sys.executable, str(environment), external=True)
        session.run(
            *("uv", "pip", "install", "--quiet", "--python", str(environment), f"{wheel}[cli,embedded]"), external=True
        )
        session.chdir(scratch)
        settings = {"DATABASE_URL": f"embedded:{scratch}/data", "PYTHONWARNINGS": "error"}
        for command in ("--help", "db upgrade", "db check", "db drift", "tenant list", "db downgrade base --yes"):
            session.run(str(scripts / "car-cp"), *command.split(), env=settings, external=True)


@nox.session
def lock(session: nox.Session) -> None:
    """Write requirements.txt; with `-- --check` only say whether it still fits pyproject.toml, `-- --upgrade` for newer pins."""
    locked = Path("requirements.txt")
    if session.posargs != ["--check"]:
        session.run(*LOCK, *session.posargs, "--output-file", str(locked), external=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch, locked.name)
        shutil.copy(locked, fresh)  # uv keeps the pins it finds there, so only a change of pyproject.toml shows
        session.run(*LOCK, "--output-file", str(fresh), external=True)
        difference = "\n".join(
            difflib.unified_diff(locked.read_text().splitlines(), fresh.read_text().splitlines(), lineterm="")
        )
    if difference:
        session.error(f"requirements.txt does not fit pyproject.toml; run `nox -s lock`\n{difference}")
