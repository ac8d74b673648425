import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path


def is_held_out(key: str) -> bool:
    """Whether the document of this key belongs to the held-out twentieth: a fixed share by hash."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") % 20 == 0


def python_stdlib(held_out: bool) -> Iterator[tuple[str, str]]:
    """(path, source) of every module of the running interpreter's standard library, in sorted order of path.

    Left out: tests, installed packages, and `encodings` and `pydoc_data`, which are generated tables.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__"}
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        path = file.relative_to(root)
        if skip.isdisjoint(path.parts) and is_held_out(path.as_posix()) == held_out:
            yield path.as_posix(), file.read_text(encoding="utf-8", errors="replace")
