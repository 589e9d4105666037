"""The Python blocks of a page, run one after the other as a reader would run them.

    python docs/run_pages.py docs/tutorials/first.md    # runs them and writes their output

A block of `text` behind a Python block is what the block prints. What is printed is compared with
it up to numbers and spaces, which differ between machines.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

BLOCK = re.compile(r"```python\n(.*?)```\n(\n```text\n(.*?)```\n)?", re.DOTALL)
NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?")


def without_numbers(text: str) -> str:
    """Return a text with its numbers replaced and its spaces and rules made equal.

    Example:
        >>> without_numbers("fused   98.8 %, 1,024 units")
        'fused # %, # units'
    """
    return " ".join(NUMBER.sub("#", re.sub(r"[-=]{3,}", "---", text)).split())


def run(text: str, name: str, heard: Callable[[str, str | None], None]) -> str:
    """Run the blocks of a page in one namespace, in an empty folder; return the page as it is now.

    Args:
        text: The page.
        name: What to call it in tracebacks.
        heard: Called with what each block printed and what the page says, None if nothing.
    """
    namespace: dict[str, object] = {"__name__": "page"}
    parts, at, here = [], 0, os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for block in BLOCK.finditer(text):
                line = text[: block.start(1)].count("\n")
                code = compile("\n" * line + block[1], name, "exec")
                with contextlib.redirect_stdout(io.StringIO()) as out:
                    exec(code, namespace)
                printed = out.getvalue()
                heard(printed, block[3])
                shown = f"\n```text\n{printed.rstrip()}\n```\n" if block[2] is not None else ""
                parts += [text[at : block.start()], f"```python\n{block[1]}```\n{shown}"]
                at = block.end()
        finally:
            os.chdir(here)
    return "".join([*parts, text[at:]])


def main() -> None:
    """Run the named pages, and write into them what their blocks print."""
    for path in map(Path, sys.argv[1:]):
        path.write_text(run(path.read_text(), str(path), lambda printed, said: None))
        print(path)


if __name__ == "__main__":
    main()
