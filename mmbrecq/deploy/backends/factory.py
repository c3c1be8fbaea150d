"""The runtime that reads a file."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mmbrecq.building import build
from mmbrecq.dependencies import require
from mmbrecq.deploy.backends.base import BaseBackend, KernelCount
from mmbrecq.errors import BackendError
from mmbrecq.graph.components import attach, head_file, region_heads, set_forward
from mmbrecq.graph.structure import nest_outputs
from mmbrecq.registry import BACKENDS, EXPORTERS


def open_backend(path: str | Path, num_threads: int | None = None) -> BaseBackend:
    """Opens ``path`` in the registered runtime that reads its suffix (``.onnx``, ``.xml``), as `BaseBackend` has it.

    BackendError is raised for other suffixes, too.
    """
    by_suffix: dict[str, type[BaseBackend]] = {cls.suffix: cls for cls in BACKENDS.module_dict.values()}
    suffix = Path(path).suffix
    if suffix not in by_suffix:
        raise BackendError(f'expected a file ending in {" or ".join(sorted(by_suffix))}, but got {path}')
    return by_suffix[suffix](path, num_threads=num_threads)


def build_exporters(configs: Iterable[Any]) -> list[Any]:
    """Builds the exporters of a config; raises before any work where their packages, or a runtime, are missing."""
    exporters = [build(EXPORTERS, config) for config in configs]
    for exporter in exporters:
        for backend in BACKENDS.module_dict.values():
            if backend.suffix == exporter.suffix:
                require(backend.package)
    return exporters


def as_forward(backend: BaseBackend) -> Callable[[Tensor], Any]:
    """The backend as a function of the images: its outputs nested as the network's are, on the images' device."""
    names = backend.output_names

    def run(images: Tensor) -> Any:
        outputs = [output.to(images.device) for output in backend(images)]
        return nest_outputs(dict(zip(names, outputs, strict=True)))

    return run


class DeployedModel:
    """The exported files of an OpenMMLab model, opened: ``path`` reads images, and heads of regions lie beside it."""

    def __init__(self, model: nn.Module, path: Path) -> None:
        self.model = model
        self.image_backend = open_backend(path)
        self.heads = {head.path: open_backend(head_file(path, head.path)) for head in region_heads(model)}

    @property
    def name(self) -> str:
        """The runtime's name."""
        return self.image_backend.name

    def attach(self) -> None:
        """Makes the model run the files wherever it would have run its components."""
        attach(self.model, as_forward(self.image_backend))
        for path, backend in self.heads.items():
            set_forward(self.model.get_submodule(path), as_forward(backend))

    def integer_kernels(self) -> KernelCount:
        """Counts the quantized layers of all files that run in integers."""
        backends = {'': self.image_backend, **self.heads}
        counts = [backend.integer_kernels() for backend in backends.values()]
        float_layers = {
            f'{path}:{layer}' if path else layer: reason
            for path, count in zip(backends, counts, strict=True)
            for layer, reason in count.float_layers.items()
        }
        return KernelCount(sum(c.quantized for c in counts), sum(c.integer for c in counts), float_layers)
