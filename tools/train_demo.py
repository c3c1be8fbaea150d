"""Trains a float model of a demo and writes its checkpoint: weights and a little meta data.

With --config configs/demo/retinanet_scenes.py --out configs/demo/retinanet_scenes.pth it is the small RetinaNet.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from mmbrecq.building import explain_build_error
from mmbrecq.engine.config import add_debug, run_tool
from mmbrecq.errors import ConfigError
from mmbrecq.version import __version__

DEMO = Path(__file__).resolve().parents[1] / 'configs' / 'demo'


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--config', type=Path, default=DEMO / 'resnet_digits.py', help='float config (%(default)s)')
    parser.add_argument('--out', type=Path, default=DEMO / 'resnet_digits.pth', help='checkpoint (%(default)s)')
    add_debug(parser)
    return parser.parse_args()


def train(cfg: Config) -> tuple[Runner, dict[str, float]]:
    """Trains and evaluates by mmengine's Runner; the log goes to a temporary work dir, checkpoints nowhere."""
    with tempfile.TemporaryDirectory() as work_dir:
        cfg.work_dir = work_dir
        cfg.default_hooks = {'checkpoint': None}
        try:
            runner = Runner.from_cfg(cfg)
        except Exception as error:
            raise ConfigError(f'{cfg.filename}: {explain_build_error(error)}') from error
        runner.train()
        metrics = {name: float(value) for name, value in runner.val_loop.run().items()}
    return runner, metrics


def save_weights(runner: Runner, metrics: dict[str, float], path: Path) -> None:
    """Writes ``{'state_dict', 'meta'}``, float32 and on the CPU, beside ``path``, then renames it into place."""
    state = {name: value.detach().cpu().contiguous() for name, value in runner.model.state_dict().items()}
    meta = {
        'mmbrecq_version': __version__,
        'dataset_meta': {'classes': list(runner.train_dataloader.dataset.metainfo['classes'])},
        'metrics': metrics,
    }
    partial = path.with_suffix('.partial')
    torch.save({'state_dict': state, 'meta': meta}, partial)
    os.replace(partial, path)


def main() -> None:
    """Trains, evaluates and saves."""
    args = parse_args()
    runner, metrics = train(Config.fromfile(args.config))
    save_weights(runner, metrics, args.out)
    size = args.out.stat().st_size / 1e6
    print(f'{args.out}: {metrics}, {size:.2f} MB')


if __name__ == '__main__':
    sys.exit(run_tool(main))
