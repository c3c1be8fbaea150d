"""Measures what every layer loses at every number of bits, for tools/search.py to choose from.

Every unit is reconstructed at every candidate number of bits (search.candidates, by default 2, 4 and 8), and the rise
of the loss is measured with one layer alone quantized, and with two layers of a unit at the fewest bits. The work dir
then holds sensitivity.json, sensitivity.html and the reconstructed states; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmbrecq.engine.config import add_common_arguments, build_runner, load_config, resolve_checkpoint, run_tool
from mmbrecq.quantizers.options import parse_options
from mmbrecq.report.sensitivity import write_sensitivities
from mmbrecq.search import SearchOptions
from mmbrecq.sensitivity import split_search


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
    cfg.launcher = args.launcher
    analysis, choice = split_search(cfg.get('search', {}))
    parse_options(SearchOptions, choice, 'search')
    loop = {key: cfg[key] for key in ('quantizer', 'reconstructor', 'calibration')}
    loop.update(
        type='mmbrecq.AnalysisLoop',
        float_checkpoint=resolve_checkpoint(cfg.float_checkpoint, args.config),
        search=analysis,
    )
    table = build_runner(cfg, args.config, loop).test()
    write_sensitivities(table, args.config, Path(cfg.work_dir) / 'sensitivity.html')


if __name__ == '__main__':
    sys.exit(run_tool(main))
