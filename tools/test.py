"""Measures a quantized checkpoint (quantized.pth) or an exported file (.onnx, .xml) on the config's test data."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmbrecq.distributed import join_processes
from mmbrecq.engine.bit_search import search_options
from mmbrecq.engine.config import add_common_arguments, build_runner, load_config, resolve_checkpoint, run_tool
from mmbrecq.errors import CheckpointError


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file with which the model was quantized')
    parser.add_argument('checkpoint', help='quantized.pth, or an exported .onnx or .xml')
    parser.add_argument('--show-dir', help='draw float and quantized predictions of some images side by side, here')
    add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Prints the metrics."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    if not Path(args.checkpoint).is_file():
        raise CheckpointError(f'{args.checkpoint}: expected a checkpoint or an exported file, but there is none')
    join_processes(args.launcher, cfg.get('env_cfg', {}).get('dist_cfg'))
    cfg.launcher = args.launcher
    options = search_options(cfg)
    loop = {'type': 'mmbrecq.QuantizedTestLoop', 'checkpoint': args.checkpoint, 'quantizer': cfg.quantizer}
    # where tools/ptq.py itself has searched, the bits are in the checkpoint alone
    loop['own_bits'] = bool(options.budgets) and not options.result
    if args.show_dir:
        loop['show_dir'] = args.show_dir
        loop['float_checkpoint'] = resolve_checkpoint(cfg.float_checkpoint, args.config)
    build_runner(cfg, args.config, loop).test()


if __name__ == '__main__':
    sys.exit(run_tool(main))
