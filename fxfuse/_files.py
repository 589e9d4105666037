"""Files written in one step: at any time, the old file or the whole new one is there."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from .errors import WriteError


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in place in one step.

    Whatever ends the run in between, `path` is the old file or the whole new one. If the process is
    killed, the hidden temporary file stays behind; in all other cases it is removed.

    Raises:
        WriteError: If the file cannot be written.
    """
    try:
        _write_beside(path, write)
    except (OSError, SafetensorError) as error:  # the latter wraps the former in its own name
        raise WriteError(
            f"a file that cannot be written: {error}",
            where=str(path),
            expected="a folder that can be written to, with enough space",
            do="choose another path, or make room; a file that was there is unchanged",
        ) from error


def _write_beside(path: Path, write: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # the name comes before the file: an interrupt in between would otherwise leave the file behind
    temporary = path.with_name(f".{path.stem}-{secrets.token_urlsafe(6)}{path.suffix}")
    try:
        temporary.open("xb").close()  # gives it the rights of any new file
        write(temporary)
        with open(temporary, "rb+") as whole:
            os.fsync(whole.fileno())  # some file systems rename before they write
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text as UTF-8, in one step.

    Raises:
        WriteError: If the file cannot be written.
    """

    def write(temporary: Path) -> None:
        temporary.write_bytes(text.encode())

    write_atomically(Path(path), write)
