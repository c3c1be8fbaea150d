"""The runtime that reads a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from mmbrecq.backends.base import BaseBackend
from mmbrecq.errors import BackendError
from mmbrecq.graph.structure import nest_outputs
from mmbrecq.registry import BACKENDS


def open_backend(path: str | Path, num_threads: int | None = None) -> BaseBackend:
    """Opens ``path`` in the registered runtime that reads its suffix (``.onnx``, ``.xml``).

    Args:
        path: The exported file.
        num_threads: Threads of one inference, at least 1; None leaves the choice to the runtime.

    Raises:
        BackendError: When no runtime reads the suffix, or as `BaseBackend` has it.
    """
    by_suffix: dict[str, type[BaseBackend]] = {cls.suffix: cls for cls in BACKENDS.module_dict.values()}
    suffix = Path(path).suffix
    if suffix not in by_suffix:
        raise BackendError(f'expected a file ending in {" or ".join(sorted(by_suffix))}, but got {path}')
    return by_suffix[suffix](path, num_threads=num_threads)


def as_arithmetic(backend: BaseBackend) -> Callable[[Tensor], Any]:
    """The backend as a function of the images: its outputs nested as the network's are, on the images' device."""
    names = backend.output_names

    def run(images: Tensor) -> Any:
        outputs = [output.to(images.device) for output in backend(images)]
        return nest_outputs(dict(zip(names, outputs, strict=True)))

    return run
