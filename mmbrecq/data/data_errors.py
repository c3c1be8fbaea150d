"""What goes wrong while OpenMMLab's datasets load images, in one sentence that names the file."""

from __future__ import annotations

import re

from mmbrecq.errors import DataError

_NOT_DECODED = re.compile(r'failed to load image: (.+)')
_NO_FILES = re.compile(r"Found 0 files in subfolders of: (?:\{'\w+': )?'?([^'}]*)'?\}?\. Supported")
_NO_SUCH_FILE = re.compile(r"No such file or directory: '(.+)'")
_NO_DATA = 'Test time pipline should not get `None`'  # the spelling is mmengine's


def explain_data_error(exc: BaseException) -> DataError | None:
    """Translates an exception of a data loader, raised in this process or passed on from a worker.

    Args:
        exc: What building or iterating a loader raised.

    Returns:
        The error to raise in its place, or None where ``exc`` does not tell of missing or unreadable images.
    """
    message = last_line(exc)
    if isinstance(exc, DataError):
        return exc if message == str(exc) else DataError(message)
    if match := _NOT_DECODED.search(message):
        return DataError(f'image {match[1]} cannot be read: it is no image, or damaged')
    if match := _NO_FILES.search(message):
        return DataError(f'no images found in the folders of {match[1]}')
    if match := _NO_SUCH_FILE.search(message):
        return DataError(f'{match[1]} does not exist')
    if isinstance(exc, OSError) and exc.filename is not None:
        return DataError(f'{exc.filename} cannot be read: {exc.strerror}')
    if _NO_DATA in message:
        return DataError('an image cannot be read: the pipeline returned nothing for it')
    if 'imdecode' in message or 'cannot identify image file' in message:
        return DataError(f'an image cannot be decoded: {message}')
    return None


def last_line(exc: BaseException) -> str:
    """The message of ``exc``; of one from a worker process, whose message is a traceback, the original message."""
    lines = str(exc).strip().splitlines() or [type(exc).__name__]
    if not lines[0].startswith('Caught '):
        return ' '.join(line.strip() for line in lines)
    return re.sub(r'^[\w.]+: ', '', lines[-1].strip())
