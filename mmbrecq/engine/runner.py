"""Adapts mmengine's runner: it prints little at its start, and writes no file before the loop does."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.device import get_device
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from torch import nn


class ToolRunner(Runner):
    """A runner that writes environment, config and hooks to the log file alone."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """Builds mmengine's logger; it prints warnings alone until :meth:`log_environment`."""
        logger = super().build_logger(*args, **kwargs)
        self._consoles = [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]
        self._console_levels = [handler.level for handler in self._consoles]
        for handler in self._consoles:
            handler.setLevel(max(handler.level, logging.WARNING))
        return logger

    def log_environment(self) -> None:
        """Lets the logger print what the config's ``log_level`` asks for."""
        for handler, level in zip(self._consoles, self._console_levels, strict=True):
            handler.setLevel(level)

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        """Returns the model on its device, never in DistributedDataParallel, since the model is not trained."""
        return model.to(get_device())

    def dump_config(self) -> None:
        """Writes nothing: the config of an earlier run stays until the loop has checked its input."""


@contextmanager
def silent_logging_failures() -> Iterator[None]:
    """Prevents a log file that cannot be written, on a full disk, from filling the terminal with tracebacks."""
    before = logging.raiseExceptions
    logging.raiseExceptions = False
    try:
        yield
    finally:
        logging.raiseExceptions = before
