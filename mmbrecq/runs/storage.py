"""Files that are either written whole or left as they were: write beside, flush to the disk, rename."""

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mmbrecq.errors import StorageError


def save_atomic(obj: Any, path: str | os.PathLike[str]) -> None:
    """Writes ``obj`` with ``torch.save`` and makes missing folders; a previous file at ``path`` survives any failure.

    Raises:
        StorageError: The file cannot be written: no space left, no permission, a file in the place of a folder.
    """
    # of a file that refuses bytes torch does not tell why
    content = io.BytesIO()
    torch.save(obj, content)
    with replacing(path) as partial:
        partial.write_bytes(content.getbuffer())


def write_text_atomic(text: str, path: str | os.PathLike[str]) -> None:
    """Writes ``text`` as UTF-8, newlines as they are; fails as :func:`save_atomic` does."""
    with replacing(path) as partial:
        partial.write_bytes(text.encode())


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path beside ``path`` to write to, and replaces ``path`` by that file when the block ends well.

    When the block raises, Ctrl-C included, the partial file is removed and ``path`` stays as it was. The exception is
    raised unchanged, but as a StorageError where the system refused to write.
    """
    target = Path(path)
    partial = target.with_name(f'.{target.name}.{os.getpid()}.partial')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        # a rename may reach the disk before the data it names; after a power cut the file would be empty
        with partial.open('rb+') as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if not isinstance(error, OSError):
            raise
        raise StorageError(f'cannot write {target}: {error.strerror or error}') from error
