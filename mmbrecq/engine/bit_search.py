"""Runs mixed precision for the tools: measures sensitivities, chooses bits, writes the config that has them."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmbrecq.building import build, parse_options
from mmbrecq.deploy.backends import build_exporters
from mmbrecq.distributed import process_count
from mmbrecq.engine.analysis_loop import AnalysisLoop
from mmbrecq.engine.config import build_runner, resolve_checkpoint
from mmbrecq.errors import ConfigError, DependencyError
from mmbrecq.mixed_precision.diagnosis import GridLosses
from mmbrecq.mixed_precision.search import bits
from mmbrecq.mixed_precision.search.bits import SearchOptions, SearchResult
from mmbrecq.mixed_precision.search.drop import cost_to_lower, drop_budget, find_cheapest
from mmbrecq.mixed_precision.search.nsga2 import find_front
from mmbrecq.mixed_precision.search.problem import BitProblem, Choices
from mmbrecq.mixed_precision.sensitivity.table import SensitivityTable
from mmbrecq.registry import COST_MODELS, SEARCHERS
from mmbrecq.report.html import write_grids, write_sensitivities
from mmbrecq.report.rows import format_cost
from mmbrecq.report.table import choice_text, grid_text

TABLE = 'sensitivity.json'
LOOKED_AT = 16
"""Images that a quick analysis looks at."""


def search_options(cfg: Config) -> SearchOptions:
    """Returns the options of the search in the config's ``search``; ConfigError for an unknown option."""
    return parse_options(SearchOptions, cfg.get('search') or {}, 'search')


def analyze(cfg: Config, path: str) -> SensitivityTable:
    """Measures the sensitivities of the config at ``path`` into its work dir, or continues an interrupted analysis."""
    if process_count() > 1:
        raise ConfigError(
            f'expected one process to choose bits, but got {process_count()}: run tools/analyze.py and tools/search.py '
            'in one, and tools/ptq.py in several with the config that they write'
        )
    table: SensitivityTable = build_runner(cfg, path, _loop(cfg, path)).test()
    write_sensitivities(table, path, Path(cfg.work_dir) / 'sensitivity.html')
    return table


def print_grid_losses(cfg: Config, path: str) -> None:
    """Prints what every grid of the config at ``path`` costs the outputs alone; ``grids.html`` has a chart of it."""
    count = int(cfg.calibration.get('num_samples', LOOKED_AT))
    cfg.calibration.num_samples = min(count, LOOKED_AT)
    found: GridLosses = build_runner(cfg, path, {**_loop(cfg, path), 'quick': True}).test()
    write_grids(found, path, Path(cfg.work_dir) / 'grids.html')
    print(grid_text(found))


def _loop(cfg: Config, path: str) -> dict[str, Any]:
    search_options(cfg)
    loop = {key: cfg[key] for key in ('quantizer', 'reconstructor', 'calibration')}
    loop.update(
        type='mmbrecq.AnalysisLoop',
        float_checkpoint=resolve_checkpoint(cfg.float_checkpoint, path),
        search=dict(cfg.get('search') or {}),
    )
    return loop


def choose_bits(
    cfg: Config, path: str, budgets: Mapping[str, str | float], table_path: Path, out: Path
) -> SearchResult:
    """Chooses bits within budgets, prints them, and writes the config ``out`` and ``search.json`` beside it.

    ``budgets`` are those of the command line, which override those of the config.
    """
    options = search_options(cfg)
    budgets = {**options.budgets, **budgets}
    if not budgets:
        raise ConfigError('expected --budget NAME=AMOUNT, or search.budgets in the config, but got neither')
    table = SensitivityTable.load(table_path)
    table.check_complete(table_path)
    models = [build(COST_MODELS, dict(model)) for model in options.costs]
    points = drop_budget(budgets)
    table = table if points is None else table.with_float()
    problem = bits.build_problem(table, models, budgets)
    seed = cfg.randomness['seed']
    search = partial(build(SEARCHERS, dict(options.searcher)).search, seed=seed)
    describe = partial(bits.describe_choice, table, models, problem)
    if points is None:
        result, cost = describe(search(problem)), next(iter(budgets))
    else:
        cost = cost_to_lower(problem.costs, budgets)
        own = cfg.copy()
        own.search = {**(cfg.get('search') or {}), 'budgets': budgets}
        loop = build_runner(own, path, _loop(own, path)).test_loop
        loop.begin_drops(table.inputs)
        result = _within_drop(loop, problem, cost, search, describe, table_path.parent / 'states', points)
    result.asked = {name: str(amount) for name, amount in budgets.items()}
    result.images, result.inputs = table.images, table.inputs
    result.states = os.path.relpath(table_path.parent / 'states', out.parent)
    result.front_cost = cost
    try:
        result.front = find_front(problem, result.front_cost, seed)
    except DependencyError as error:
        print(f'no front in the report: {error}')
    asked = ', '.join(f'{name} {amount}' for name, amount in budgets.items())
    checkpoint = resolve_checkpoint(cfg.float_checkpoint, path)
    bits.write_bit_config(
        out, Path(path), checkpoint, result, cfg.quantizer.get('overrides', ()), f'Bits chosen for {asked}'
    )
    print(f'{choice_text(result, table)}config: {out}')
    return result


def _within_drop(
    loop: AnalysisLoop,
    problem: BitProblem,
    cost: str,
    search: Callable[[BitProblem], Choices],
    describe: Callable[[Choices], SearchResult],
    states: Path,
    points: float,
) -> SearchResult:
    """Finds the cheapest choice whose drop, as the loop measures it, is within ``points``; prints what it evaluates."""

    def measure(choice: Choices) -> float:
        tried = describe(choice)
        drop = loop.drop(tried, states)
        spent = format_cost(tried.spent[cost], tried.units[cost])
        print(f'{cost} {spent}, predicted loss {tried.predicted:.4g}: drops by {drop:.4g} points', flush=True)
        return drop

    choice, trials = find_cheapest(problem, cost, search, measure, points)
    found = describe(choice)
    found.metric, found.held_out, found.trials = loop.held_out.metric, len(loop.held_out), trials
    return found


def chosen_bits(cfg: Config, path: str) -> Path | None:
    """Returns the file of the bits that were chosen for a run, None where the config asks for none.

    Where it asks for a search, the sensitivities are measured and the bits chosen here, and set in ``cfg``.
    """
    options = search_options(cfg)
    if options.result:
        found = Path(path).parent / options.result
        if not found.is_file():
            raise ConfigError(f"{path}: expected the file of search.result, but there is none: '{found}'")
        return found
    if not options.budgets:
        return None
    build_exporters(cfg.get('exporters', ()))  # a missing package is found now, not after the search
    own = cfg.copy()
    own.work_dir = str(Path(cfg.work_dir) / 'search')
    analyze(own, path)
    folder = Path(own.work_dir)
    result = choose_bits(own, path, {}, folder / TABLE, folder / 'bits.py')
    cfg.quantizer.overrides = [*cfg.quantizer.get('overrides', ()), *result.overrides()]
    return folder / bits.RESULT
