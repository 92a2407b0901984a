"""Every example runs as it lies there, with nothing set up."""

from pathlib import Path

import pytest

from tests.quality.programs import ROOT, run_python

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def test_there_are_examples() -> None:
    assert {"fastapi_app.py", "import_tenants.py", "quickstart.py"} <= {example.name for example in EXAMPLES}


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
async def test_an_example_runs_with_nothing_set_up(example: Path, tmp_path: Path) -> None:
    """No DATABASE_URL, no .env, another working directory: what someone has who just downloaded the file."""
    assert await run_python(example, cwd=tmp_path), "an example shows what it does"
