"""Quantizes a float model by block reconstruction (BRECQ), exports it and reports what came of it.

The work dir then holds quantized.pth, deploy/ (the exported files), report.html, summary.json, layers.txt, the ids of
the calibration images and the log.

With search=dict(budgets=dict(size='0.1x')) in the config, the bits of every layer are chosen first: what
tools/analyze.py and tools/search.py do, in the folder search of the work dir.
"""

from __future__ import annotations

import argparse
import sys

from mmbrecq.distributed import join_processes
from mmbrecq.engine.bit_search import chosen_bits, search_options
from mmbrecq.engine.config import add_common_arguments, build_runner, load_config, resolve_checkpoint, run_tool


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file: a base config of mmpretrain or mmdet, a checkpoint, a preset')
    parser.add_argument(
        '--resume', action='store_true',
        help='go on with an interrupted run of the same config: units that are done are taken from the work dir',
    )  # fmt: skip
    parser.add_argument(
        '--dry-run', action='store_true',
        help='rehearse on a few images, print what would be quantized, how long and in how much memory, and stop',
    )  # fmt: skip
    add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Runs the whole job."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    join_processes(args.launcher, cfg.get('env_cfg', {}).get('dist_cfg'))
    cfg.launcher = args.launcher
    searched = chosen_bits(cfg, args.config)
    keys = ('quantizer', 'reconstructor', 'calibration', 'exporters', 'evaluations')
    loop = {key: cfg[key] for key in keys if key in cfg}
    loop.update(
        type='mmbrecq.PTQLoop',
        float_checkpoint=resolve_checkpoint(cfg.float_checkpoint, args.config),
        config_name=args.config,
        resume=args.resume,
        dry_run=args.dry_run,
    )
    if searched is not None:
        loop.update(search_result=str(searched), reuse_states=search_options(cfg).reuse)
    build_runner(cfg, args.config, loop).test()


if __name__ == '__main__':
    sys.exit(run_tool(main, '; --resume goes on with it'))
