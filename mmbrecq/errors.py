"""Defines the errors that a user can mend; each message is one sentence that names the file, key or layer."""

from pathlib import Path
from traceback import extract_tb


class MMBrecqError(Exception):
    """Base of all errors raised on purpose; ``tools/`` prints its message and exits with status 2."""


class ConfigError(MMBrecqError, ValueError):
    """Raised when a config does not exist, does not parse, or holds an unknown or invalid option."""


class PatternError(ConfigError):
    """Raised when a layer pattern of the config matches no layer of the model."""


class CheckpointError(MMBrecqError):
    """Raised when a checkpoint is missing, truncated, unsafe to load, or belongs to another model."""


class DataError(MMBrecqError):
    """Raised when images are missing, unreadable or fewer than asked for, or hold non-finite values."""


class NonFiniteError(MMBrecqError):
    """Raised when a weight, an activation or a loss stops being finite."""


class GraphError(MMBrecqError):
    """Raised when a model cannot be traced or prepared."""


class ExportError(MMBrecqError):
    """Raised when a graph cannot be exported, or the exported file breaks a rule of its backend."""


class BackendError(MMBrecqError):
    """Raised when a runtime refuses a file."""


class DependencyError(MMBrecqError, ImportError):
    """Raised when a package that the work needs is missing or of another version."""


class StorageError(MMBrecqError):
    """Raised when a file or a cache cannot be written: no space left, or no permission."""


class ProcessError(MMBrecqError):
    """Raised when processes that work as one do not agree."""


class TableError(MMBrecqError):
    """Raised when a table of losses or costs lacks a layer, or holds what no loss or cost can be."""


class BudgetError(MMBrecqError):
    """Raised when no choice of bits keeps a budget."""


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's text that has content, without a final full stop.

    Of an error without a text it returns the type, and the file and the line that raised it.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # OpenVINO opens each message with the C++ source line that raised it
    content = [line for line in lines if not line.startswith(('Exception from', 'Check '))]
    raised = [f' in {Path(frame.filename).name}, line {frame.lineno}' for frame in extract_tb(error.__traceback__)]
    return (content or lines or [type(error).__name__ + ''.join(raised[-1:])])[0].rstrip('.')
