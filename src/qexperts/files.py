"""Files that this package keeps: where, and how they are written."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

__all__ = ["cache_directory", "replace", "unwritable"]


def cache_directory() -> Path:
    """$QEXPERTS_CACHE_DIR, or qexperts in the user's cache directory; where nothing can be if there is none."""
    given = os.environ.get("QEXPERTS_CACHE_DIR")
    if given:
        return Path(given)
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user id without a home
        cache = Path(os.devnull)
    return cache / "qexperts"


def unwritable(directory: str | os.PathLike[str]) -> str | None:
    """Why no file can be made in a directory, or None."""
    try:
        with tempfile.TemporaryFile(dir=directory):
            return None
    except OSError as error:
        return error.strerror


def replace(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace a file at once: whoever reads it finds this content or that before, never a part."""
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        part.write_bytes(content)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
