"""Where rdkv keeps what it makes once (converted models, calibrations), and writes that are all or nothing."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial-"  # prefix of what is still being written
ABANDONED_AFTER = 24 * 3600.0  # seconds until somebody else's unfinished write counts as left behind


def home() -> Path:
    """``$RDKV_HOME``, else ``rdkv`` in ``$XDG_CACHE_HOME``, else ``~/.cache/rdkv``; not created here."""
    if explicit := os.environ.get("RDKV_HOME"):
        return Path(explicit).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "rdkv"


def write_file(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` holds either all of it or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """The name of a file to write beside ``path``, which becomes ``path``, on the disk, if the block ends well."""
    partial = path.with_name(f"{PARTIAL}{secrets.token_hex(8)}")
    try:
        partial.touch(exist_ok=False)
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # a library may have put a file of its own there, for the owner alone
        _sync(partial)
        os.replace(partial, path)
        with contextlib.suppress(OSError):  # not every file system can
            _sync(path.parent)  # the name, too
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill, which becomes ``path`` if the block ends well.

    If another process made ``path`` meanwhile, theirs stays and ours is dropped.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path.parent)
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=path.parent))
    try:
        yield partial
        try:
            os.replace(partial, path)
        except OSError:  # a folder that is not empty cannot be replaced
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(PARTIAL + "*"):
        with contextlib.suppress(OSError):
            if time.time() - folder.stat().st_mtime > ABANDONED_AFTER:
                shutil.rmtree(folder, ignore_errors=True)
