"""The documentation is true: its Python runs, its links lead somewhere, its generated pages are fresh."""

import re
from pathlib import Path

import pytest

from tests.quality import pages
from tests.quality.programs import ROOT, run_python

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
TOP = sorted(ROOT.glob("*.md"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.reason is None for block in pages.blocks(page))], ids=name_of
)
async def test_the_python_of_a_page_runs(page: Path, own_database: str, tmp_path: Path) -> None:
    await run_python(pages.__file__, page, cwd=tmp_path, DATABASE_URL=own_database)


@pytest.mark.parametrize("page", [page for page in PAGES if any(pages.blocks(page))], ids=name_of)
def test_a_block_that_does_not_run_says_why_and_is_still_python(page: Path) -> None:
    for block in pages.blocks(page):
        assert pages.compiled(page, block)
        assert block.reason is None or len(block.reason) > 10, f"{name_of(page)}:{block.line}"


def test_the_guides_are_run() -> None:
    """So that a change of the fence or of the runner does not quietly run nothing."""
    run = {name_of(page): sum(block.reason is None for block in pages.blocks(page)) for page in PAGES}
    assert run["docs/tutorial.md"] >= 5
    assert sum(run.values()) >= 25


@pytest.mark.parametrize("page", TOP, ids=name_of)
def test_links_of_a_top_page_lead_to_a_file(page: Path) -> None:
    """Those between pages of docs/ are checked by `mkdocs build --strict`."""
    targets = re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


async def test_the_generated_pages_are_fresh() -> None:
    await run_python("docs/generate_reference.py", "--check", cwd=ROOT)
