"""Copies of the migration scripts, to add revisions to."""

import shutil
from pathlib import Path
from textwrap import dedent, indent

ROOT = Path(__file__).resolve().parents[2]
HEAD = "004_completed_operations"

_REVISION = """\
import sqlalchemy as sa
from alembic import op

revision = {revision!r}
down_revision = {head!r}


def upgrade() -> None:
{upgrade}


def downgrade() -> None:
{downgrade}
"""


def copy_scripts(directory: Path) -> Path:
    """Copy `alembic.ini` and the folder it names; return where that is now."""
    shutil.copy(ROOT / "alembic.ini", directory)
    shutil.copytree(ROOT / "alembic", directory / "alembic", ignore=shutil.ignore_patterns("__pycache__"))
    return directory / "alembic"


def add_revision(scripts: Path, revision: str, upgrade: str, downgrade: str = "pass") -> None:
    """Write a revision that follows the head."""
    bodies = {
        "upgrade": indent(dedent(upgrade).strip(), "    "),
        "downgrade": indent(dedent(downgrade).strip(), "    "),
    }
    script = _REVISION.format(revision=revision, head=HEAD, **bodies)
    (scripts / "versions" / f"{revision}.py").write_text(script, encoding="utf-8")
