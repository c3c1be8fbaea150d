"""Quantizes float files by NNCF and by ONNX Runtime's own quantization; `peers.py` runs it in their environment.

Reads `float.xml`, `float.onnx` and the calibration images `calibration-N.npy` of a folder, and writes `nncf.xml` and
`onnxruntime.onnx` beside them. The heads of a two-stage detector have files of their own: `float.HEAD.xml` and so on,
`calibration.HEAD-N.npy` with features of regions. Prints the seconds that each took.

    python benchmarks/peers_quantize.py FOLDER
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

MOVES = frozenset({'Cast', 'Dropout', 'Identity', 'Reshape', 'Transpose'})
"""Operations that may stand between the softmax of an attention and its product with the values."""

REGIONS = 64
"""Features of regions that a head reads at once."""


class Samples:
    """Arrays on disk, a few rows at a time; they may be read again and again.

    Args:
        paths: The ``.npy`` files.
        rows: Rows of a sample.
    """

    def __init__(self, paths: list[Path], rows: int) -> None:
        self.paths, self.rows = paths, rows

    def __iter__(self) -> Iterator[np.ndarray[Any, Any]]:
        for path in self.paths:
            array = np.load(path, mmap_mode='r')
            for start in range(0, len(array), self.rows):
                yield np.array(array[start : start + self.rows], np.float32)

    def __len__(self) -> int:
        return sum(-(-len(np.load(path, mmap_mode='r')) // self.rows) for path in self.paths)


def samples_of(folder: Path, head: str) -> Samples:
    """Returns the calibration images, one at a time, or the features of regions that ``head`` reads."""
    paths = sorted(folder.glob(f'calibration.{head}-*.npy' if head else 'calibration-*.npy'))
    if not paths:
        raise FileNotFoundError(f'expected arrays of calibration images in {folder}, but found none')
    return Samples(paths, REGIONS if head else 1)


def has_attention(graph: Any) -> bool:
    """Returns whether an ONNX graph multiplies the result of a softmax with other values, as transformers do."""
    weights = {tensor.name for tensor in graph.initializer}
    found: set[str] = set()
    for node in graph.node:
        if node.op_type == 'Softmax' or (node.op_type in MOVES and node.input[0] in found):
            found.add(node.output[0])
        elif node.op_type == 'MatMul' and found & set(node.input) and not weights & set(node.input):
            return True
    return False


def quantize_nncf(source: Path, target: Path, samples: Samples) -> None:
    """Quantizes ``float.xml`` by NNCF with its defaults, all samples, and the model type where there is attention."""
    import nncf
    import onnx
    import openvino

    transformer = has_attention(onnx.load(str(source.with_suffix('.onnx')), load_external_data=False).graph)
    quantized = nncf.quantize(
        openvino.Core().read_model(source), nncf.Dataset(samples), subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER if transformer else None,
    )  # fmt: skip
    openvino.save_model(quantized, target, compress_to_fp16=False)


def quantize_onnxruntime(source: Path, target: Path, samples: Samples) -> None:
    """Quantizes ``float.onnx`` by ONNX Runtime: its preprocessing and defaults, with one scale per output channel."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.samples = iter(samples)

        def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
            sample = next(self.samples, None)
            return None if sample is None else {'images': sample}

    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / 'prepared.onnx'
        # its symbolic inference of shapes asks for sympy, and the plain one knows all ranks here
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(prepared, target, Reader(), per_channel=True)


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    folder: Path = parser.parse_args().folder
    peers: dict[str, tuple[str, Callable[[Path, Path, Samples], None]]] = {
        'nncf': ('.xml', quantize_nncf), 'onnxruntime': ('.onnx', quantize_onnxruntime),
    }  # fmt: skip
    for peer, (suffix, quantize) in peers.items():
        start = time.perf_counter()
        for source in sorted(folder.glob(f'float*{suffix}')):
            head = source.name.removeprefix('float').removesuffix(suffix).strip('.')
            target = source.with_name(source.name.replace('float', peer, 1))
            quantize(source, target, samples_of(folder, head))
        print(f'{peer}: {time.perf_counter() - start:.1f} s', flush=True)


if __name__ == '__main__':
    main()
