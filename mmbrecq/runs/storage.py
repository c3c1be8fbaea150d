"""Files that are either written whole or left as they were: write beside, flush to the disk, rename."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mmbrecq.errors import StorageError

# What torch.save says when its file object refused bytes and the OSError behind it did not reach Python
_TORCH_WRITE_FAILURES = ('PytorchStreamWriter', 'unexpected pos')


def save_atomic(obj: Any, path: str | os.PathLike[str]) -> None:
    """Writes ``obj`` with ``torch.save`` and makes missing folders; a previous file at ``path`` survives any failure.

    Raises:
        StorageError: The file cannot be written: no space left, no permission, a file in the place of a folder.
    """
    with replacing(path) as partial, partial.open('wb') as file:
        torch.save(obj, file)


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
        reason = _write_failure(error)
        if reason is None:
            raise
        raise StorageError(f'cannot write {target}: {reason}') from error


def _write_failure(error: BaseException) -> str | None:
    """Says in a few words why the system refused to write; None where ``error`` is of another kind."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if not isinstance(error, RuntimeError) or not any(mark in str(error) for mark in _TORCH_WRITE_FAILURES):
        return None
    # torch.save closes its archive while the OSError of the write passes, and fails there with one of its own
    if isinstance(error.__context__, OSError):
        return _write_failure(error.__context__)
    return 'the disk took only a part of the data'
