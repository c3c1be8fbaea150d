"""Shows a bar with a message and the time left on a terminal, and nothing elsewhere."""

import io
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from operator import length_hint
from typing import TypeVar

from mmengine.dist import is_main_process
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar('T')


class ProgressBar(Progress):
    """Shows one bar of ``total`` items, as a context manager."""

    def __init__(self, title: str, total: int) -> None:
        console = Console(stderr=True)
        super().__init__(
            TextColumn('{task.description}'), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            TextColumn('left'), TimeRemainingColumn(), TextColumn('{task.fields[message]}'),
            console=console, transient=True, disable=not console.is_terminal or not is_main_process(),
        )  # fmt: skip
        self._bar = self.add_task(title, total=total, message='')

    def show(self, completed: int, message: str = '') -> None:
        """Moves the bar to ``completed`` items and shows ``message`` beside it."""
        self.update(self._bar, completed=completed, message=message)


def track(items: Iterable[T], title: str, total: int | None = None) -> Iterator[T]:
    """Yields ``items`` under a bar."""
    sys.stdout.flush()
    with ProgressBar(title, length_hint(items) if total is None else total) as bar:
        for done, item in enumerate(items, start=1):
            yield item
            bar.show(done)


@contextmanager
def without_chatter() -> Iterator[None]:
    """Hides the output of libraries: COCO's API prints and times all that it does."""
    with redirect_stdout(io.StringIO()):
        yield
