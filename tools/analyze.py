"""Measures what every layer loses at every number of bits, for tools/search.py to choose from.

Every unit is reconstructed at every candidate number of bits (search.candidates, by default 2, 4 and 8), and the rise
of the loss is measured with one layer alone quantized, and with two layers of a unit at the fewest bits. The work dir
then holds sensitivity.json, sensitivity.html and the reconstructed states; a run that was stopped goes on where it was.

With --quick nothing is reconstructed: the grid of every weight and activation is switched on by itself over a few
images, and a table says which ones cost the outputs most.
"""

from __future__ import annotations

import argparse
import sys

from mmbrecq.distributed import join_processes
from mmbrecq.engine.bit_search import analyze, print_grid_losses
from mmbrecq.engine.config import add_common_arguments, load_config, run_tool


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file, as for tools/ptq.py')
    parser.add_argument('--quick', action='store_true', help='only print what every grid costs, in a minute or so')
    add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Runs the analysis."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    join_processes(args.launcher, cfg.get('env_cfg', {}).get('dist_cfg'))
    cfg.launcher = args.launcher
    (print_grid_losses if args.quick else analyze)(cfg, args.config)


if __name__ == '__main__':
    sys.exit(run_tool(main))
