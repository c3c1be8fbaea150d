"""mmengine's runner, quiet at its start and without a file in the work dir before the loop has one to write."""

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
    """A runner whose long account of environment, config and hooks goes to the log file alone."""

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
        """The model on its device, never in DistributedDataParallel: no step of it is a training step of the model."""
        return model.to(get_device())

    def dump_config(self) -> None:
        """Writes nothing: the config of an earlier run stays until the loop knows that this one has good input."""


@contextmanager
def silent_logging_failures() -> Iterator[None]:
    """Keeps a log file that cannot be written, the disk being full, from filling the terminal with tracebacks."""
    before = logging.raiseExceptions
    logging.raiseExceptions = False
    try:
        yield
    finally:
        logging.raiseExceptions = before
