"""Chooses the bits of every layer within budgets, from what tools/analyze.py has measured.

The budgets are of the cost models in search.costs, by default size and bitops: --budget size=0.1x is a tenth of the
float model, size=1.2MB and latency=3ms are amounts. With drop=1.0 the cheapest bits are chosen that lose at most one
point of accuracy, measured on held-out calibration images. It writes a config that tools/ptq.py takes as it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmbrecq.engine.bit_search import TABLE, choose_bits
from mmbrecq.engine.config import add_common_arguments, load_config, run_tool
from mmbrecq.mixed_precision.search.bits import parse_budgets


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file with which the sensitivities were measured')
    parser.add_argument('--budget', nargs='+', default=[], metavar='NAME=AMOUNT', help='for example size=0.1x')
    parser.add_argument('--table', help='what tools/analyze.py wrote (default: sensitivity.json in the work dir)')
    parser.add_argument('--out', help='config file to write (default: bits.py in the work dir)')
    add_common_arguments(parser)
    return parser.parse_args()


def main() -> None:
    """Searches, prints the choice and writes the config."""
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options, args.work_dir)
    folder = Path(cfg.work_dir)
    choose_bits(
        cfg,
        args.config,
        parse_budgets(args.budget),
        Path(args.table or folder / TABLE),
        Path(args.out or folder / 'bits.py'),
    )


if __name__ == '__main__':
    sys.exit(run_tool(main))
