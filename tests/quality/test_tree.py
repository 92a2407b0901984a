"""What must not stand in the repository, however it got there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.quality.programs import ROOT

# Written so that this file does not match itself.
FORBIDDEN = {
    "the host of a package registry": r"https?://[\w.-]*(?:py[p]i\b|python[h]osted|npm[j]s|registry\.[n]pm|deb\.[d]ebian|crates\.[i]o)",
    "a path of one machine": r"(?<![\w.~-])/(?:wor[k]|roo[t]|hom[e]/\w+|User[s]/\w+|var/tm[p])/",
    "a merge conflict": r"^(?:<{7}|>{7}) ",
    "a note to a tracker nobody else has": r"\bissue \d+\b",
    "a private key": r"BEGIN (?:RSA |EC |OPENSSH )?PRIVATE KEY",
}


def listed_files() -> list[Path]:
    """Return every file that is, or would be, committed."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout: an unpacked source distribution has nothing to commit")
    command = [git, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_holds(what: str) -> None:
    pattern = re.compile(FORBIDDEN[what], re.MULTILINE | re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in listed_files()
        if (match := pattern.search(path.read_text(encoding="utf-8", errors="replace")))
    ]
    assert found == []


def test_every_file_is_utf8_with_unix_line_ends_and_no_byte_order_mark() -> None:
    for path in listed_files():
        content = path.read_bytes()
        assert b"\r\n" not in content, path
        assert not content.startswith(b"\xef\xbb\xbf"), path
        content.decode("utf-8")


def test_no_lock_file_is_committed() -> None:
    """It would name registries; requirements.txt is the hash-locked set."""
    assert [path for path in listed_files() if path.name in {"uv.lock", "poetry.lock", "Pipfile.lock"}] == []


def test_every_requirement_is_pinned_and_hashed() -> None:
    blocks = re.split(r"\n(?=\S)", (ROOT / "requirements.txt").read_text(encoding="utf-8"))
    pins = [block for block in blocks if not block.startswith("#")]
    assert len(pins) > 20
    for block in pins:
        assert re.match(r"[a-z0-9-]+==[\w.]+ ", block), block.splitlines()[0]
        assert "--hash=sha256:" in block, block.splitlines()[0]


def test_the_scripts_folder_does_not_shadow_alembic() -> None:
    assert not (ROOT / "alembic" / "__init__.py").exists()
