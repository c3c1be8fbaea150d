"""Takes models of mmpretrain and mmdet with random weights through mmbrecq and prints a Markdown table of the outcome.

Nothing is downloaded, and no accuracy is measured. Without ``--deploy`` the models are only prepared. With it every
row, a model and a preset in a process of its own, is prepared, calibrated on random images, rounded to nearest,
exported, verified, opened in its runtime and compared with the simulation for one and three images: the rehearsal by
which tools/ptq.py begins, so that what is refused here is refused there before any work.

    python benchmarks/coverage.py
    python benchmarks/coverage.py mmdet::atss/atss_r50_fpn_1x_coco.py mmpretrain::convnext/convnext-tiny_32xb128_in1k.py
    python benchmarks/coverage.py --deploy --work-dir work_dirs/coverage
    python benchmarks/coverage.py --deploy --only swin deit --presets openvino --work-dir work_dirs/coverage
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import reduce
from importlib import import_module
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from zoo import DETECTOR_SIZE, DETECTORS, FAMILIES, LARGER, TRANSFORMER, Family

from mmbrecq.calibration.calibrator import calibrate_activations, calibrate_weights, observing
from mmbrecq.deploy.backends import open_backend
from mmbrecq.deploy.exporters import ONNXExporter, OpenVINOExporter
from mmbrecq.engine.config import run_tool
from mmbrecq.errors import MMBrecqError, first_line
from mmbrecq.graph.components import ImageForward, head_file
from mmbrecq.graph.structure import flatten_outputs
from mmbrecq.graph.tracer import WEIGHTED
from mmbrecq.pipeline import prepare
from mmbrecq.quantizers import BRECQQuantizer, QuantizedGraph, QuantizedModel

CONTEXT = multiprocessing.get_context('fork')
"""Rows start from what this process has imported, which takes longer than most rows."""

FOLDER = r'/\S*/(?=model)'
PRESETS = ('openvino', 'onnxruntime', 'tensorrt')
BATCHES = (1, 3)
AGREES, NOISE, TIMES = 1e-4, 3e-6, 10
"""A row ends well where the squared error of every deployed output over its power is below 1e-4, or below ten times
what noise of 3e-6 on the images makes of the simulation: every layer of random weights amplifies what runtime and
simulation round apart, in MobileNetV2 to 0.01."""


@dataclass
class Row:
    """The outcome of one model with one preset.

    Args:
        model: Name of the config, with its package.
        preset: Of the quantization.
        outcome: ``ok``, ``refused`` (one sentence before any work), or what went wrong.
        message: The sentence, or what was raised.
        layers: Convolutions and linear layers of the model.
        quantized: Those whose weight is on a grid.
        units: Reconstruction units.
        remarks: What stays in float and why, what is one opaque call.
        verify: ``passed`` or the first rules that the file breaks.
        deviation: Squared error over power of the file's outputs, by number of images; of several outputs the worst.
        noise: The same of the simulation with noise on the images, for the same output.
        agrees: Whether the deviations are within bounds.
        integer: Calls of quantized layers that the runtime computes in integers.
        counted: All calls of quantized layers.
        float_kernels: Reason -> number of calls that the runtime computes in float.
        seconds: Of the whole row.
    """

    model: str
    preset: str
    outcome: str = ''
    message: str = ''
    layers: int = 0
    quantized: int = 0
    units: int = 0
    remarks: list[str] = field(default_factory=list)
    verify: str = ''
    deviation: dict[str, float] = field(default_factory=dict)
    noise: float = 0.0
    agrees: bool = True
    integer: int = 0
    counted: int = 0
    float_kernels: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def ends_well(self) -> bool:
        """Returns whether the file is as the simulation, or the model was refused before any work."""
        return self.outcome in ('ok', 'refused')

    def cells(self) -> list[str]:
        """The columns of the table."""
        deviation = ', '.join(f'{value:.0e}' for value in self.deviation.values())
        deviation += f' ({self.noise:.0e})' if self.deviation else ''
        kernels = f'{self.integer} of {self.counted}' if self.counted else ''
        floats = [f'{count} run in float: {why}' for why, count in self.float_kernels.items()]
        outcome = f'{self.outcome}: {re.sub(FOLDER, "", self.message)}' if self.message else self.outcome
        return [
            self.model, self.preset, f'{self.quantized} of {self.layers}', str(self.units),
            '; '.join([*self.remarks, *floats]), self.verify, deviation, kernels, outcome,
        ]  # fmt: skip


HEAD = ['model', 'preset', 'layers quantized', 'units', 'in float, and why', 'verify',
        f'deviation for {" and ".join(map(str, BATCHES))} images (noise)', 'integer kernels', 'outcome']  # fmt: skip


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='*', help='PACKAGE::PATH; a list of detectors, with --deploy of all families')
    parser.add_argument('--size', nargs=2, type=int, metavar=('H', 'W'), help='of the images')
    parser.add_argument('--deploy', action='store_true', help='go on to the exported file in its runtime')
    parser.add_argument('--presets', nargs='+', choices=PRESETS, default=PRESETS)
    parser.add_argument('--only', nargs='+', metavar='WORD', help='models with one of these words in their names')
    parser.add_argument('--again', action='store_true', help='repeat rows that did not end well')
    parser.add_argument('--work-dir', type=Path, help='keeps the rows in rows.jsonl and goes on from there')
    parser.add_argument('--memory', type=float, default=12.0, help='GB of address space that a row may take')
    parser.add_argument('--timeout', type=float, default=900.0, help='seconds that a row may take')
    return parser.parse_args()


def build(name: str) -> nn.Module:
    """The model of a config, without any checkpoint."""
    package, _, path = name.partition('::')
    models = import_module(f'{package}.models')
    init_default_scope(package)
    # one config of mmpretrain imports something, by which mmengine would take it for one in the new style
    cfg = Config.fromfile(Path(models.__path__[0]).parent / '.mim' / 'configs' / path, lazy_import=False)
    # a mapping would be merged into what is there
    for key, value in family_of(name).options.items():
        *parents, last = key.split('.')
        reduce(getitem, parents, cfg.model)[last] = value
    if 'data_preprocessor' in cfg:
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    torch.manual_seed(0)
    return MODELS.build(_without_checkpoints(cfg.model)).eval()


def _without_checkpoints(cfg: Any) -> Any:
    if isinstance(cfg, dict):
        return type(cfg)({k: _without_checkpoints(v) for k, v in cfg.items() if k not in ('init_cfg', 'pretrained')})
    return [_without_checkpoints(item) for item in cfg] if isinstance(cfg, list) else cfg


def enliven(model: nn.Module, images: Tensor) -> None:
    """Draws what starts at zero or next to it, and takes the statistics of BatchNorms from ``images``.

    A network straight from its constructor hides faults: gains of 1e-6 switch branches off, and without statistics
    signals vanish or explode.
    """
    draw = torch.Generator().manual_seed(1)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    with torch.no_grad():
        for parameter in model.parameters():
            # some are memory as it was until they are initialised from a file
            if parameter.is_floating_point() and parameter.numel() and not 1e-2 <= parameter.abs().max() <= 1e3:
                parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        # what cannot run is refused at preparation
        with suppress(Exception):
            ImageForward(model)(images)
        for norm in norms:
            norm.eval()


def prepare_row(name: str, size: tuple[int, int]) -> list[str]:
    """A line of the table of preparation alone."""
    model = build(name)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    layers = {path for path, module in model.named_modules() if isinstance(module, WEIGHTED)}
    try:
        prepared = BRECQQuantizer({'bits': 8}, {'bits': 8}).prepare(model, images)
    except MMBrecqError as error:
        return [name, str(len(layers)), '', '', f'refused: {error}']
    quantized = {layer.name for layer in prepared.layers if not layer.float_reason and layer.unit}
    return [
        name,
        str(len(layers)),
        str(len(quantized & layers)),
        str(len(prepared.region_graphs)),
        '; '.join(remarks(prepared)),
    ]


def remarks(prepared: QuantizedModel) -> list[str]:
    """What stays in float, and what is one call."""
    floats: dict[str, int] = {}
    for layer in prepared.layers:
        if layer.float_reason:
            floats[layer.float_reason] = floats.get(layer.float_reason, 0) + 1
    found = [f'{count} in float: {reason}' for reason, count in floats.items()]
    return found + [f'{path} is one call' for graph in prepared.graphs for path in graph.traced.opaque]


def deploy_row(name: str, preset: str, size: tuple[int, int]) -> Row:
    """Takes one model through everything; what goes wrong is part of the row."""
    row, step = Row(name, preset), 'build'
    try:
        channels = 1 if 'mnist' in name else 3
        images = torch.randn(4, channels, *size, generator=torch.Generator().manual_seed(0))
        model = build(name)
        enliven(model, images)
        row.layers = sum(isinstance(module, WEIGHTED) for module in model.modules())
        step = 'prepare'
        observer = {'type': 'MinMaxObserver'}
        options = {'bits': 8, 'observer': observer}
        prepared = prepare(model, images, BRECQQuantizer(options, options, preset))
        row.remarks, row.units = remarks(prepared), sum(len(graph.units) for graph in prepared.graphs)
        # attention of torch is one module until it is prepared
        row.layers = len(prepared.layers)
        row.quantized = sum(layer.weight_bits is not None for layer in prepared.layers)
        step = 'calibrate'
        calibrate(prepared, images)
        step = 'export'
        with tempfile.TemporaryDirectory() as folder:
            exporter = OpenVINOExporter() if preset == 'openvino' else ONNXExporter()
            paths = exporter.export_all(prepared, images[:2], Path(folder))
            row.verify = 'passed'
            step = 'run'
            compare(row, prepared, paths, images)
        row.outcome = 'ok' if row.agrees else f'deviates by {max(row.deviation.values()):.1g}'
    except MMBrecqError as error:
        row.message, row.outcome = str(error), 'refused'
        if 'breaks the rules' in row.message:
            row.verify, row.outcome = row.message.partition("': ")[2].split(' ')[0], 'breaks rules'
    except Exception as error:
        row.outcome, row.message = f'raw error at {step}', f'{type(error).__name__}: {first_line(error)}'
    return row


def calibrate(prepared: QuantizedModel, images: Tensor) -> None:
    """Finds all grids; heads of a two-stage detector see random features, since no region is proposed at random."""
    calibrate_weights(prepared)
    calibrate_activations(prepared, [images])
    for graph in prepared.region_graphs:
        with torch.no_grad(), observing(prepared, list(graph.quantizers.values())):
            graph(region_features(graph.traced.example, 8))
    prepared.pack()


def region_features(example: Tensor, count: int) -> Tensor:
    """Features of ``count`` regions."""
    return torch.randn(count, *example.shape[1:], generator=torch.Generator().manual_seed(2))


def compare(row: Row, prepared: QuantizedModel, paths: Sequence[Path], images: Tensor) -> None:
    """Runs the files and counts their integer kernels."""
    files = {'': paths[0], **{graph.path: head_file(paths[0], graph.path) for graph in prepared.region_graphs}}
    for graph in prepared.graphs:
        backend = open_backend(files[graph.path], num_threads=1)
        kernels = backend.integer_kernels()
        row.counted, row.integer = row.counted + kernels.quantized, row.integer + kernels.integer
        for reason in kernels.float_layers.values():
            row.float_kernels[reason] = row.float_kernels.get(reason, 0) + 1
        for batch in BATCHES:
            inputs = region_features(graph.traced.example, 8)[:batch] if graph.is_region else images[:batch]
            deployed = dict(zip(backend.output_names, backend(inputs), strict=True))
            judge(row, graph, inputs, deployed)


def judge(row: Row, graph: QuantizedGraph, inputs: Tensor, deployed: Mapping[str, Tensor]) -> None:
    """Holds the deployed outputs against the simulation, and their error against that of a little noise."""
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        simulated = flatten_outputs(graph(inputs.clone()))
        noisy = [
            flatten_outputs(graph(inputs * (1 + NOISE * torch.randn(inputs.shape, generator=draw)))) for _ in '123'
        ]
    errors = {name: relative_error(deployed[name], value) for name, value in simulated.items()}
    noise = {name: max(relative_error(n[name], value) for n in noisy) for name, value in simulated.items()}
    worst = max(errors, key=lambda name: errors[name] / (AGREES + TIMES * noise[name]))
    row.agrees = row.agrees and errors[worst] <= max(AGREES, TIMES * noise[worst])
    batch = str(len(inputs))
    row.deviation[batch] = max(row.deviation.get(batch, 0.0), errors[worst])
    row.noise = max(row.noise, noise[worst])


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Squared error over the power of ``reference``; infinite where shapes differ or a value is no number."""
    if value.shape != reference.shape or not torch.isfinite(value).all():
        return float('inf')
    value, reference = value.double(), reference.double()
    return float(((value - reference) ** 2).sum() / (reference**2).sum().clamp_min(1e-12))


def run_row(name: str, preset: str, args: argparse.Namespace) -> Row:
    """A row in a process of its own, so that a crash or the lack of memory costs one row."""
    size = args.size or [family_of(name).size] * 2
    start = time.perf_counter()
    receiver, sender = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=_send_row, args=(sender, name, preset, tuple(size), int(args.memory * 1e9)))
    process.start()
    sender.close()
    try:
        row = receiver.recv() if receiver.poll(args.timeout) else Row(name, preset, f'not ready in {args.timeout:g} s')
    except EOFError:
        process.join()
        row = Row(name, preset, 'died', f'exit code {process.exitcode}')
    process.kill()
    process.join()
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _send_row(sender: Any, name: str, preset: str, size: tuple[int, int], memory: int) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    sender.send(deploy_row(name, preset, size))


def family_of(name: str) -> Family:
    """The entry of a model in the list of families."""
    package, _, path = name.partition('::')
    families = {f'{family.config}.py': family for family in FAMILIES}
    size = 224 if package == 'mmpretrain' else LARGER.get(path, DETECTOR_SIZE)
    is_transformer = path.partition('/')[0] in ('detr', 'conditional_detr', 'dab_detr', 'deformable_detr', 'dino')
    return families.get(path, Family(path, size, TRANSFORMER if is_transformer else {}))


def deploy_table(args: argparse.Namespace) -> None:
    """Prints the table of ``--deploy`` row by row, then how many rows end well."""
    names = args.configs or [f'mmpretrain::{family.config}.py' for family in FAMILIES]
    names += [] if args.configs else [f'mmdet::{name}' for name in DETECTORS]
    names = [n for n in names if not args.only or any(word in n for word in args.only)]
    for package in {name.partition('::')[0] for name in names}:
        import_module(f'{package}.models')
    kept = args.work_dir / 'rows.jsonl' if args.work_dir else None
    known = {}
    if kept is not None and kept.exists():
        rows = [Row(**json.loads(line)) for line in kept.read_text().splitlines()]
        known = {(row.model, row.preset): row for row in rows}
    print(f'| {" | ".join(HEAD)} |\n|{" --- |" * len(HEAD)}')
    shown = []
    for preset in args.presets:
        for name in names:
            row = known.get((name, preset))
            if row is None or (args.again and not row.ends_well):
                row = run_row(name, preset, args)
                if kept is not None:
                    kept.parent.mkdir(parents=True, exist_ok=True)
                    with kept.open('a') as file:
                        file.write(json.dumps(asdict(row)) + '\n')
            shown.append(row)
            print(f'| {" | ".join(cell.replace("|", "/") for cell in row.cells())} |', flush=True)
    ok, refused = (sum(row.outcome == outcome for row in shown) for outcome in ('ok', 'refused'))
    print(
        f'\n{ok + refused} of {len(shown)} rows end well: {ok} deployed as simulated, {refused} refused before any work'
    )


def main() -> None:
    """Prints the table line by line."""
    args = parse_args()
    if args.deploy:
        deploy_table(args)
        return
    head = ['config', 'layers', 'quantized', 'heads of regions', 'remarks']
    print(f'| {" | ".join(head)} |\n|{" --- |" * len(head)}')
    for name in args.configs or [f'mmdet::{name}' for name in DETECTORS]:
        print(f'| {" | ".join(prepare_row(name, tuple(args.size or (320, 320))))} |', flush=True)


if __name__ == '__main__':
    sys.exit(run_tool(main))
