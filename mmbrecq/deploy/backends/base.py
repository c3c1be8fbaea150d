"""What every runtime offers: tensors in, tensors out, and a count of the layers that run in integers."""

import statistics
import time
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mmbrecq.dependencies import require
from mmbrecq.errors import BackendError, MMBrecqError, first_line

WARM_UP, FEWEST_RUNS, BURST = 2, 3, 0.01

NAMED = 3
"""Most layers that a sentence names for one reason."""


@dataclass(frozen=True)
class KernelCount:
    """The quantized layers of a file, and those among them that its runtime executes with integer arithmetic.

    Args:
        quantized: Calls of convolutions and linear layers whose weight is stored as integers.
        integer: Those that the runtime's own execution graph computes in 8-bit integers.
        float_layers: Names of the others in the order of the file, each with the reason.
    """

    quantized: int = 0
    integer: int = 0
    float_layers: dict[str, str] = field(default_factory=dict)

    def describe(self, runtime: str) -> str:
        """Returns the count in words, with the reasons of layers in float and the first of each."""
        named: dict[str, list[str]] = {}
        for name, why in self.float_layers.items():
            named.setdefault(why, []).append(name)
        words = f'{runtime} runs {self.integer} of {self.quantized} quantized layers in integers'
        for why, names in named.items():
            more = f' and {len(names) - NAMED} more' if len(names) > NAMED else ''
            words += f'; in float, since {why}: {", ".join(names[:NAMED])}{more}'
        return words


class BaseBackend(metaclass=ABCMeta):
    """Opens an exported file in a runtime; the call runs the graph.

    Args:
        path: The exported file.
        num_threads: Threads of one inference, at least 1; None leaves the choice to the runtime.

    Raises:
        BackendError: When the file is missing, has another suffix or is refused by the runtime, or when
            ``num_threads`` is below 1.
        DependencyError: When the runtime is not installed.
    """

    name: ClassVar[str]
    """The runtime's name as it stands in reports."""
    suffix: ClassVar[str]
    """File name suffix that this runtime reads, with its dot."""
    package: ClassVar[str]
    """Import name of the runtime."""
    input_names: list[str]
    """Names of the inputs, in the order of the call."""
    output_names: list[str]
    """Names of the outputs, in the order of the result."""

    def __init__(self, path: str | Path, num_threads: int | None = None) -> None:
        self.path = Path(path)
        self.num_threads = num_threads
        if self.path.suffix != self.suffix:
            raise BackendError(f'{self.name} expected a file ending in {self.suffix}, but got {self.path}')
        if not self.path.is_file():
            raise BackendError(f'{self.name} cannot open {self.path}: no such file')
        if num_threads is not None and num_threads < 1:
            raise BackendError(f'{self.name} expected num_threads of at least 1 or None, but got {num_threads}')
        require(self.package)
        try:
            self._load()
        except MMBrecqError:
            raise
        except Exception as error:  # the runtimes share no exception type
            raise BackendError(f'{self.name} refuses {self.path}: {first_line(error)}') from error

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        """Runs the graph once.

        Args:
            *inputs (Tensor): One tensor per name in ``input_names``, in that order, any float dtype and device;
                the first axis is the batch and may have any length if the file leaves it dynamic.

        Returns:
            Float32 CPU tensors, one per name in ``output_names``; each owns its memory.

        Raises:
            BackendError: When the number of inputs is wrong, or the runtime refuses their shapes.
        """
        if len(inputs) != len(self.input_names):
            raise BackendError(
                f'{self.path} expected {len(self.input_names)} inputs ({", ".join(self.input_names)}), '
                f'but got {len(inputs)}'
            )
        arrays = [x.detach().to('cpu', torch.float32).contiguous().numpy() for x in inputs]
        try:
            outputs = self._run(arrays)
        except Exception as error:  # the runtimes share no exception type
            shapes = ', '.join(f'{name} {list(a.shape)}' for name, a in zip(self.input_names, arrays, strict=True))
            raise BackendError(f'{self.name} cannot run {self.path} on {shapes}: {first_line(error)}') from error
        return [torch.from_numpy(np.array(out, dtype=np.float32)) for out in outputs]

    def seconds(self, *inputs: Tensor) -> float:
        """Median time of the runs of 10 ms, three at least, after two that are not timed.

        The inputs are those of a call; handing them over, and the outputs, is not in the time.
        """
        arrays = [x.detach().to('cpu', torch.float32).contiguous().numpy() for x in inputs]
        run = self._bound(arrays)
        for _ in range(WARM_UP):
            run()
        spent: list[float] = []
        while len(spent) < FEWEST_RUNS or sum(spent) < BURST:
            start = time.perf_counter()
            run()
            spent.append(time.perf_counter() - start)
        return statistics.median(spent)

    def _bound(self, arrays: Sequence[np.ndarray[Any, Any]]) -> Callable[[], object]:
        """What runs the graph on these arrays; where the runtime can, it leaves the outputs in memory of its own."""
        return lambda: self._run(arrays)

    @abstractmethod
    def integer_kernels(self) -> KernelCount:
        """Counts the quantized layers that run in integers, read from the runtime's own execution graph."""

    @abstractmethod
    def _load(self) -> None:
        """Imports the runtime, compiles the file once, and sets the names of inputs and outputs."""

    @abstractmethod
    def _run(self, arrays: Sequence[np.ndarray[Any, Any]]) -> Sequence[np.ndarray[Any, Any]]:
        """Runs float32 C-contiguous arrays, ordered as ``input_names``; returns arrays ordered as ``output_names``."""
