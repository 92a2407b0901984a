"""Runs the Python of a documentation page, block after block, as a reader would in `python -m asyncio`.

A comment behind a `print(...)` is what it prints, with `...` for what may differ; it is compared, and the line must be reached. A block that
cannot run carries the reason in a comment on the line before it: `<!-- skip: why -->`. It must still be Python.

Called as a program with the path of a page, it runs that page in an interpreter of its own: `DATABASE_URL` names the database, the working
directory is the reader's.
"""

import ast
import asyncio
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

_BLOCK = re.compile(
    r"(?:^[ ]*<!--[ ]skip:[ ]*(?P<reason>.*?)[ ]*-->\n+)?^(?P<indent>[ ]*)```python[^\n]*\n(?P<code>.*?)^(?P=indent)```",
    re.DOTALL | re.MULTILINE,
)
_PRINTED = re.compile(r"^\s*print\(.*\)  # (?P<text>.+)$")


@dataclass(frozen=True)
class Block:
    """A fenced block of Python, the line it begins on, and why it does not run, if it does not."""

    line: int
    code: str
    reason: str | None

    def promised(self) -> dict[int, str]:
        """Return what the block says it prints, by line."""
        lines = enumerate(self.code.splitlines(), self.line)
        return {number: match["text"] for number, line in lines if (match := _PRINTED.match(line))}


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        yield Block(text.count("\n", 0, match.start("code")) + 1, textwrap.dedent(match["code"]), match["reason"])


def compiled(page: Path, block: Block) -> object:
    """Compile a block so that a traceback names the line of the page."""
    source = "\n" * (block.line - 1) + block.code
    return compile(source, page, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


async def run(page: Path) -> None:
    """Run a page; raises what a block raises, and AssertionError where it does not print what it says."""
    promised = {line: text for block in blocks(page) if block.reason is None for line, text in block.promised().items()}
    kept: set[int] = set()

    def check_printed(*values: object) -> None:
        line, text = sys._getframe(1).f_lineno, " ".join(map(str, values))
        print(text)
        if line in promised:
            pattern = ".*".join(map(re.escape, promised[line].split("...")))
            assert re.fullmatch(pattern, text), f"{page}:{line}: prints {text!r}"
            kept.add(line)

    module = sys.modules["page"] = ModuleType("page")  # models defined in a block look their module up
    module.__dict__["print"] = check_printed
    for block in blocks(page):
        if block.reason is None:
            outcome = eval(compiled(page, block), module.__dict__)  # type: ignore[arg-type]  # a code object
            if inspect.iscoroutine(outcome):
                await outcome
    assert not promised.keys() - kept, f"{page}: never printed on lines {sorted(promised.keys() - kept)}"


if __name__ == "__main__":
    asyncio.run(run(Path(sys.argv[1])))
