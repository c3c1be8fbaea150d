"""Measures what every layer loses at every number of bits, for tools/search.py to choose from.

Every unit is reconstructed at every candidate number of bits (search.candidates, by default 2, 4 and 8), and the rise
of the loss is measured with one layer alone quantized, and with two layers of a unit at the fewest bits. The work dir
then holds sensitivity.json, sensitivity.html and the reconstructed states; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import sys

from mmbrecq.distributed import join_processes
from mmbrecq.engine.bit_search import analyze
from mmbrecq.engine.config import add_common_arguments, load_config, run_tool


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file, as for tools/ptq.py')
    add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Runs the analysis."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    join_processes(args.launcher, cfg.get('env_cfg', {}).get('dist_cfg'))
    cfg.launcher = args.launcher
    analyze(cfg, args.config)


if __name__ == '__main__':
    sys.exit(run_tool(main))
