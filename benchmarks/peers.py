"""Compares files that mmbrecq, NNCF and ONNX Runtime's own quantization made of the same networks and images.

Prints three Markdown tables: `accuracy`, of the deployed files, by the config's own evaluator; `latency`, of one image
at a time; `graphs`, in what the execution graphs of OpenVINO differ. NNCF and ONNX Runtime's quantization read the
float file that mmbrecq exports and the calibration images that it draws, with their defaults, in an environment of
their own, which is made below ~/.cache/mmbrecq by the versions of `peers_requirements.txt`.

A network is a config of mmbrecq, or, with random weights and for its latency alone, a config of mmpretrain or mmdet,
`PACKAGE::PATH`, after an `@` the side of its images.

    python benchmarks/peers.py benchmarks/recipes/nearest_w8a8-openvino_vit-tiny_in1k.py --presets openvino onnxruntime
    python benchmarks/peers.py mmdet::retinanet/retinanet_r50_fpn_1x_coco.py@320 --parts latency graphs --threads 1 2
    python benchmarks/peers.py CONFIG --work-dir DIR --reuse --parts latency
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import accuracy
import coverage
import numpy as np
import peers_latency
import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmbrecq import pipeline, quantize
from mmbrecq.api import TARGETS
from mmbrecq.calibration.regions import REGIONS_PER_IMAGE, RegionCapture
from mmbrecq.data import build_calibration_set
from mmbrecq.data.groups import grouped
from mmbrecq.data.images import collect_images, example_of
from mmbrecq.deploy.backends import DeployedModel
from mmbrecq.deploy.exporters import ONNXExporter, OpenVINOExporter
from mmbrecq.engine.config import (
    add_cfg_options,
    add_debug,
    build_runner,
    load_config,
    resolve_checkpoint,
    run_tool,
)
from mmbrecq.engine.evaluation import evaluate
from mmbrecq.errors import ConfigError, MMBrecqError
from mmbrecq.graph.components import pre_hooks
from mmbrecq.quantizers import BRECQQuantizer
from mmbrecq.runs.checkpoint import load_float_checkpoint

HERE = Path(__file__).resolve().parent
PARTS = ('accuracy', 'latency', 'graphs')
PEERS = {'.xml': 'nncf.xml', '.onnx': 'onnxruntime.onnx'}
NEAREST = "reconstructor = dict(_delete_=True, type='NearestReconstructor')\n"
RANDOM_IMAGES = 16


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('networks', nargs='+', help='config files, or PACKAGE::PATH[@SIDE] for random weights')
    parser.add_argument('--presets', nargs='+', choices=TARGETS, help="of mmbrecq's files; by default the config's own")
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=PARTS)
    parser.add_argument('--metric', help='of the evaluator; by default its first')
    parser.add_argument('--threads', nargs='+', type=int, default=[1], help='of a latency; 0 leaves it to the runtime')
    parser.add_argument('--seconds', type=float, default=20, help='for the latencies of one network')
    parser.add_argument('--dynamic', action='store_true', help='leave the free axes of the files free for a latency')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/peers'))
    parser.add_argument('--reuse', action='store_true', help='take files that are there from the work dir')
    parser.add_argument('--python', type=Path, help="interpreter of an environment that has the peers' packages")
    add_cfg_options(parser)
    add_debug(parser)
    return parser.parse_args()


@dataclass
class Network:
    """A network and the folder of its files.

    Args:
        name: As it stands on the command line.
        folder: Holds the float files, those of the peers, and runs of mmbrecq.
        presets: Presets of mmbrecq's files; empty for the config's own.
        options: Overrides of the config.
    """

    name: str
    folder: Path
    presets: Sequence[str]
    options: dict[str, Any]

    @property
    def is_random(self) -> bool:
        """Tells whether the network has random weights."""
        return '::' in self.name

    @property
    def label(self) -> str:
        """Returns what the tables call it."""
        return self.name if self.is_random else Path(self.name).stem

    @cached_property
    def config(self) -> Config:
        """The config of mmbrecq."""
        return load_config(self.name, self.options, str(self.folder / 'work'))

    @property
    def targets(self) -> list[str]:
        """The presets of mmbrecq's files."""
        if self.presets or self.is_random:
            return list(self.presets) or ['openvino']
        own = self.config.quantizer.get('preset', 'academic')
        if own not in TARGETS:
            raise ConfigError(f"expected --presets for {self.name}, since '{own}' has no runtime of its own")
        return [own]

    def run_folder(self, preset: str, kind: str) -> Path:
        """Returns the work dir of mmbrecq's run, ``nearest`` or ``config``; the two may be the same run."""
        plain = self.is_random or self.config.reconstructor['type'] == 'NearestReconstructor'
        return self.folder / f'{"nearest" if plain else kind}_{preset}-seed0'

    def file(self, preset: str, kind: str) -> Path:
        """Returns mmbrecq's file."""
        return self.run_folder(preset, kind) / 'deploy' / f'model{TARGETS[preset]}'


def environment() -> Path:
    """Returns the interpreter of the peers' environment, which is made first where it is missing."""
    requirements = HERE / 'peers_requirements.txt'
    key = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    folder = Path.home() / '.cache' / 'mmbrecq' / f'peers-{key}'
    python, complete = folder / 'bin' / 'python', folder / 'complete'
    if not complete.exists():
        print(f'makes {folder}', file=sys.stderr)
        subprocess.run([sys.executable, '-m', 'venv', '--clear', folder], check=True)
        subprocess.run([python, '-m', 'pip', 'install', '--quiet', '-r', requirements], check=True)
        complete.touch()
    return python


def derived_config(network: Network, preset: str, kind: str) -> Path:
    """Writes the config of a run of mmbrecq: the network's own, for a preset, reconstructed or rounded to nearest."""
    exporter = 'OpenVINOExporter' if TARGETS[preset] == '.xml' else 'ONNXExporter'
    checkpoint = resolve_checkpoint(network.config.float_checkpoint, network.name)
    checkpoint = checkpoint if '://' in checkpoint else str(Path(checkpoint).resolve())
    path = network.folder / f'{kind}_{preset}.py'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'_base_ = [{str(Path(network.name).resolve())!r}]\nfloat_checkpoint = {checkpoint!r}\n'
        f'quantizer = dict(preset={preset!r})\nexporters = [dict(type={exporter!r})]\nevaluations = []\n'
        + (NEAREST if kind == 'nearest' else '')
    )
    return path


def write_float(model: nn.Module, images: Any, batches: Callable[[], Any], folder: Path) -> None:
    """Exports a float model, and writes the calibration images, and the features of regions that its heads read."""
    prepared = pipeline.prepare(pipeline.copy_model(model), images, BRECQQuantizer({'bits': 'float'}, None, 'openvino'))
    pipeline.pack(prepared)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob('calibration*.npy'):
        stale.unlink()
    for exporter in (OpenVINOExporter('float.xml'), ONNXExporter('float.onnx')):
        pipeline.export(prepared, exporter, example_of(images), folder)
    for number, part in enumerate(grouped(images).parts):
        np.save(folder / f'calibration-{number:04d}.npy', part.cpu().numpy())
    heads = {head.path: prepared.model.get_submodule(head.path) for head in prepared.region_graphs}
    counts = dict.fromkeys(heads, 0)

    def note(path: str, args: tuple[Any, ...]) -> None:
        regions: Tensor = args[0][:: max(1, len(args[0]) // REGIONS_PER_IMAGE)]
        np.save(folder / f'calibration.{path}-{counts[path]:04d}.npy', regions.cpu().numpy())
        counts[path] += 1

    if heads:
        with pre_hooks(heads, note):
            RegionCapture(prepared, images, batches, 0).observe()


def write_peers(folder: Path, python: Path) -> None:
    """Lets the peers quantize the float files."""
    log = folder / 'peers.log'
    with log.open('w') as console:
        command = [python, HERE / 'peers_quantize.py', folder]
        done = subprocess.run(command, stdout=console, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f'the peers failed, see {log}; its last words are: {log.read_text().strip().splitlines()[-1]}')


def write_random(network: Network, is_made: bool, python: Path) -> None:
    """Writes all files of a network with random weights, calibrated on random images and rounded to nearest."""
    name, _, side = network.name.partition('@')
    size = int(side or 224)
    images = torch.randn(RANDOM_IMAGES, 3, size, size, generator=torch.Generator().manual_seed(0))
    model = coverage.build(name)
    coverage.enliven(model, images[:4])
    if not is_made:
        write_float(model, images, list, network.folder)
        write_peers(network.folder, python)
    for preset in network.targets:
        quantize(model, images, preset=preset, method='nearest').export(network.file(preset, 'nearest'))


def write_trained(network: Network, is_made: bool, args: argparse.Namespace, python: Path) -> None:
    """Writes all files of a config of mmbrecq."""
    if not is_made:
        runner = runner_of(network)
        load_float_checkpoint(runner.model, resolve_checkpoint(network.config.float_checkpoint, network.name))
        calibration = build_calibration_set(runner.cfg, dict(network.config.calibration))
        images, share = collect_images(runner.model, calibration)
        write_float(runner.model, images, share.batches, network.folder)
        write_peers(network.folder, python)
    options = sys.argv[sys.argv.index('--cfg-options') + 1 :] if network.options else []
    run = argparse.Namespace(work_dir=network.folder, label='', reuse=args.reuse, cfg_options=options)
    for preset in network.targets:
        for kind in sorted({network.run_folder(preset, kind).name.partition('_')[0] for kind in ('nearest', 'config')}):
            accuracy.run(str(derived_config(network, preset, kind)), 0, run)


def write_files(network: Network, args: argparse.Namespace, python: Path) -> None:
    """Writes all files of a network; with ``--reuse`` those that are missing."""
    made = [network.folder / name for name in ('float.xml', 'float.onnx', *PEERS.values())]
    own = [network.file(preset, kind) for preset in network.targets for kind in ('nearest', 'config')]
    is_made = args.reuse and all(path.exists() for path in made)
    if is_made and all(path.exists() for path in own):
        return
    if network.is_random:
        write_random(network, is_made, python)
    else:
        write_trained(network, is_made, args, python)


def runner_of(network: Network) -> Any:
    """Returns a runner with the model, the test data and the evaluator of a config."""
    loop = {'type': 'mmbrecq.QuantizedTestLoop', 'checkpoint': '', 'quantizer': network.config.quantizer}
    return build_runner(network.config, network.name, loop)


def accuracy_rows(network: Network, args: argparse.Namespace) -> list[list[str]]:
    """Measures all files of a network with the config's evaluator."""
    runner, known = runner_of(network), {}

    def measure(path: Path) -> str:
        if path not in known:
            DeployedModel(runner.model, path).attach()
            metrics = evaluate(runner.model, runner.test_loop.dataloader, runner.test_loop.evaluator, path.stem)
            known[path] = args.metric or next(iter(metrics)), metrics
        metric, metrics = known[path]
        return accuracy.spread([metrics[metric]])

    rows = []
    for preset in network.targets:
        others = [measure(network.folder / name) for name in ('float.xml', *PEERS.values())]
        own = [measure(network.file(preset, kind)) for kind in ('nearest', 'config')]
        metric = known[network.folder / 'float.xml'][0]
        rows.append([f'{network.label}, {metric}', preset, *others, *own])
    return rows


def latency_rows(network: Network, args: argparse.Namespace) -> list[list[str]]:
    """Measures one image at a time on all files of a runtime, in turn."""
    image = np.load(network.folder / 'calibration-0000.npy', mmap_mode='r')[:1].copy()
    rows = []
    for preset in network.targets:
        suffix = TARGETS[preset]
        for threads in args.threads:
            files = {'float32': network.folder / f'float{suffix}'}
            files |= {'bfloat16': files['float32']} if suffix == '.xml' else {}
            files |= {'peer': network.folder / PEERS[suffix], 'mmbrecq': network.file(preset, 'config')}
            seconds = args.seconds / len(args.threads) / len(network.targets)
            times = peers_latency.measure(files, image, threads, seconds, args.dynamic)
            rows.append([network.label, preset, str(threads or 'all'), *peers_latency.cells(times)])
    return rows


def graph_rows(network: Network, args: argparse.Namespace) -> list[list[str]]:
    """Compares the execution graphs of the files for OpenVINO."""
    if 'openvino' not in network.targets:
        return []
    shape = np.load(network.folder / 'calibration-0000.npy', mmap_mode='r').shape[1:]
    paths = (network.folder / PEERS['.xml'], network.file('openvino', 'config'))
    peer, own = (peers_latency.operations(path, None if args.dynamic else (1, *shape)) for path in paths)
    names = sorted(name for name in {*peer, *own} if peer[name] != own[name])
    return [[network.label, ' '.join(name), str(peer[name]), str(own[name])] for name in names]


TABLES: dict[str, tuple[Sequence[str], Callable[[Network, argparse.Namespace], list[list[str]]]]] = {
    'accuracy': (
        ('network, metric', 'preset', 'float, OpenVINO', 'NNCF, OpenVINO', "ONNX Runtime's own, ONNX Runtime",
         'mmbrecq, nearest', 'mmbrecq, as the config says'),
        accuracy_rows,
    ),
    'latency': (('network', 'preset', 'threads', *peers_latency.COLUMNS), latency_rows),
    'graphs': (('network', 'operation in OpenVINO', 'NNCF', 'mmbrecq'), graph_rows),
}  # fmt: skip


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table; a row may be shorter than its head."""
    lines = [head, ['---'] * len(head), *([*row, *[''] * (len(head) - len(row))] for row in rows)]
    return '\n'.join(f'| {" | ".join(cell.replace("|", "/") for cell in line)} |' for line in lines)


def main() -> None:
    """Prints the tables; a network that cannot be compared has the reason in its row."""
    args = parse_args()
    tables: dict[str, list[list[str]]] = {part: [] for part in args.parts}
    python: Path = args.python or environment()
    for name in args.networks:
        stem = name.replace('::', '-').replace('/', '-') if '::' in name else Path(name).stem
        network = Network(name, (args.work_dir / stem).resolve(), args.presets or (), args.cfg_options or {})
        try:
            write_files(network, args, python)
            for part, rows in tables.items():
                if part == 'accuracy' and network.is_random:
                    rows.append([network.label, 'skipped: random weights'])
                else:
                    rows += TABLES[part][1](network, args)
        except (MMBrecqError, SystemExit) as error:
            for rows in tables.values():
                rows.append([network.label, f'skipped: {error}'])
    for part, rows in tables.items():
        print(f'\n{part}:\n\n{markdown(TABLES[part][0], rows)}', flush=True)


if __name__ == '__main__':
    sys.exit(run_tool(main))
