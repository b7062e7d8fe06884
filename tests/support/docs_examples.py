"""The Python code of the README and the docs."""

import pathlib
import re
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: pathlib.Path) -> list[str]:
    return BLOCK.findall(page.read_text())


def run(page: pathlib.Path, first: int | None = None) -> dict[str, Any]:
    """The names that a page's code blocks define, of the first few or of all."""
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    for number, block in enumerate(blocks(page)[:first]):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)
    return namespace
