"""Chooses the bits of every layer within budgets, from what tools/analyze.py has measured.

The budgets are of the cost models in search.costs, by default size and bitops: --budget size=0.1x is a tenth of the
float model, size=1.2MB and latency=3ms are amounts. It writes a config that tools/ptq.py takes as it is.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mmbrecq.building import build
from mmbrecq.engine.config import add_common_arguments, load_config, resolve_checkpoint, run_tool
from mmbrecq.errors import ConfigError
from mmbrecq.quantizers.options import parse_options
from mmbrecq.registry import COST_MODELS, SEARCHERS
from mmbrecq.report.bits import describe_choice
from mmbrecq.search import SearchOptions, build_problem, chosen_bits, parse_budgets, write_bit_config
from mmbrecq.sensitivity import SensitivityTable, split_search


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
    _, search = split_search(cfg.get('search', {}))
    options = parse_options(SearchOptions, search, 'search')
    budgets = {**options.budgets, **parse_budgets(args.budget)}
    if not budgets:
        raise ConfigError('expected --budget NAME=AMOUNT, or search.budgets in the config, but got neither')
    path = Path(args.table or Path(cfg.work_dir) / 'sensitivity.json')
    table = SensitivityTable.load(path)
    table.check_complete(path)
    models = [build(COST_MODELS, dict(model)) for model in options.costs]
    problem = build_problem(table, models, budgets)
    choice = build(SEARCHERS, dict(options.searcher)).search(problem, cfg.get('seed') or 0)
    chosen = chosen_bits(table, models, problem, choice)
    out = Path(args.out or Path(cfg.work_dir) / 'bits.py')
    asked = ', '.join(f'{name} {amount}' for name, amount in budgets.items())
    write_bit_config(
        out,
        Path(args.config),
        resolve_checkpoint(cfg.float_checkpoint, args.config),
        chosen.bits,
        cfg.quantizer.get('overrides', ()),
        f'Bits chosen for {asked}',
    )
    print(f'{describe_choice(chosen, table, problem)}config: {out}')


if __name__ == '__main__':
    sys.exit(run_tool(main))
