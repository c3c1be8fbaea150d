"""Runs mixed precision for the tools: measures sensitivities, chooses bits, writes the config that has them."""

import copy
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.runner.base_loop import BaseLoop
from torch.utils.data import DataLoader

from mmbrecq import pipeline
from mmbrecq.building import build, parse_options
from mmbrecq.data import build_calibration_set
from mmbrecq.data.images import collect_images
from mmbrecq.data.source import has_annotations
from mmbrecq.deploy.backends import build_exporters
from mmbrecq.distributed import process_count
from mmbrecq.engine.config import build_runner, resolve_checkpoint
from mmbrecq.engine.evaluation import HeldOut, check_classes, task_loss_of
from mmbrecq.engine.hooks import HookCaller, ReconstructionLoggerHook, ReconstructionProgressHook
from mmbrecq.errors import ConfigError, DependencyError
from mmbrecq.mixed_precision.chosen_bits import load_rounding
from mmbrecq.mixed_precision.diagnosis import GridLosses
from mmbrecq.mixed_precision.search import bits
from mmbrecq.mixed_precision.search.bits import SearchOptions, SearchResult
from mmbrecq.mixed_precision.search.nsga2 import find_front
from mmbrecq.mixed_precision.sensitivity.measure import STAGE, Analyzer
from mmbrecq.mixed_precision.sensitivity.table import SensitivityTable
from mmbrecq.reconstruction.reconstructor import BaseReconstructor
from mmbrecq.reconstruction.stages import Stage, StageOptions, Task
from mmbrecq.registry import COST_MODELS, LOOPS, QUANTIZERS, SEARCHERS
from mmbrecq.report.html import write_grids, write_sensitivities
from mmbrecq.report.rows import format_cost
from mmbrecq.report.table import choice_text, grid_text
from mmbrecq.runs.checkpoint import load_float_checkpoint
from mmbrecq.runs.identity import describe_inputs, first_difference
from mmbrecq.schema import save_json

TABLE = 'sensitivity.json'
LOOKED_AT = 16
"""Images that a quick analysis looks at."""


@LOOPS.register_module()
class AnalysisLoop(BaseLoop):
    """Measures what every layer loses at every number of bits; ``sensitivity.json`` has it.

    Args:
        runner: mmengine's runner.
        dataloader: The test data, whose classes are compared with the model's; no image of it is read.
        evaluator: The test evaluator, which mmengine passes to every loop; it is not used.
        float_checkpoint: Path or URL of the float weights.
        quantizer: Config of the quantizer.
        reconstructor: Config of the reconstructor, whose first pass has the options of the reconstruction.
        calibration: Options of the calibration images.
        search: Options of :class:`SearchOptions`, whose budgets are checked.
        quick: Whether to measure only what every grid costs alone, from a few images; ``grids.json`` has it.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: DataLoader[Any] | dict[str, Any],
        evaluator: Any,
        float_checkpoint: str,
        quantizer: Mapping[str, Any],
        reconstructor: Mapping[str, Any],
        calibration: Mapping[str, Any],
        search: Mapping[str, Any],
        quick: bool = False,
    ) -> None:
        super().__init__(runner, dataloader)
        self.quick = quick
        self.float_checkpoint, self.calibration = float_checkpoint, dict(calibration)
        build(QUANTIZERS, dict(quantizer))  # bad options are refused before any work
        self.quantizer = dict(quantizer)
        self.options = parse_options(SearchOptions, search, 'search')
        build(SEARCHERS, dict(self.options.searcher))
        first: Mapping[str, Any] = reconstructor.get('weights', reconstructor.get('joint', {}))
        options = parse_options(StageOptions, {**first, 'drop_prob': 0.0}, 'the first pass of the reconstructor')
        shared = ('loss', 'mirror', 'cache', 'cache_dtype', 'memory_limit')
        common = {key: reconstructor[key] for key in shared if key in reconstructor}
        self.reconstructor = BaseReconstructor(**common)
        self.reconstructor.stages = (Stage(STAGE, options, True, False, independent=True),)
        for hook in (ReconstructionLoggerHook, ReconstructionProgressHook):
            runner.register_hook(hook())

    def run(self) -> SensitivityTable | GridLosses:
        """Returns the measured sensitivities, which ``sensitivity.json`` holds too."""
        if self.quick:
            return self._measure_grids()
        self.load()
        # a budget that cannot be kept is refused before the work, not after it
        costs = [build(COST_MODELS, dict(model)) for model in self.options.costs]
        analyzer = Analyzer(
            self.prepare, self.reconstructor, self.options, Path(self.runner.work_dir), self._inputs(),
            HookCaller(self.runner), lambda table: bits.check_budgets(table, costs, self.options.budgets),
        )  # fmt: skip
        table = analyzer.run()
        self.runner.logger.info(f'sensitivities: {analyzer.path}')
        return table

    def _inputs(self) -> dict[str, str]:
        """Returns what the figures of an analysis depend on, once everything is loaded."""
        count = len(self.images)
        return {
            **describe_inputs(self.runner.cfg, self.runner.model, self.images, self.runner.seed or 0),
            'overrides': str(self.quantizer.get('overrides', ())),
            'candidates': str(sorted(self.options.candidates, key=str)),
            'activation candidates': str(sorted(self.options.activation_candidates)),
            'loss': self.options.loss,
            'images': f'{self.options.images or count} of {count}',
        }

    def _measure_grids(self) -> GridLosses:
        self._load_images()
        found = pipeline.find_grid_losses(self.runner.model, self.images, self.quantizer)
        save_json(found, Path(self.runner.work_dir) / 'grids.json')
        return found

    def _load_images(self) -> None:
        model = self.runner.model
        check_classes(model, self.dataloader.dataset)
        load_float_checkpoint(model, self.float_checkpoint)
        self._set = build_calibration_set(self.runner.cfg, self.calibration)
        room = self.reconstructor.image_room(Path(self.runner.work_dir))
        self.images, self._set = collect_images(model, self._set, room)

    def load(self) -> None:
        """Loads the float weights, the calibration images, and those on which a drop is to be measured."""
        if bits.DROP in self.options.budgets:
            # what is missing is told before the work
            self.held_out = HeldOut(self.runner, self.calibration, self.options.held_out)
        self._load_images()
        model = self.runner.model
        found = pipeline.find_fallback(model, self.images, self.quantizer)
        if found is not None:
            self.quantizer['overrides'] = [*self.quantizer.get('overrides', ()), *found.overrides()]
        asked = self.reconstructor.criterion.needs_fisher or self.options.loss == 'fisher'
        self._annotated = asked and has_annotations(self._set.batches())

    def begin_drops(self, inputs: Mapping[str, str]) -> None:
        """Loads everything and measures the float model; ConfigError where ``inputs`` of an analysis are others."""
        self.load()
        if (difference := first_difference(inputs, self._inputs())) is not None:
            raise ConfigError(
                f'expected the config and images of the analysis to measure a drop with, but {difference}'
            )
        self.held_out.measure_float(self.runner.model)

    def drop(self, chosen: SearchResult, states: Path, cost: str) -> float:
        """Returns the drop of chosen bits in points, with the rounding of the analysis; prints it beside their cost."""
        bits = self.quantizer['weight']['bits']
        model = self.prepare(bits, None, chosen.overrides(), activations=True).model
        load_rounding(model, states, chosen.bits)
        with model.quantization(weights=True, activations=True):
            drop = self.held_out.drop(model.model)
        spent = format_cost(chosen.spent[cost], chosen.units[cost])
        print(f'{cost} {spent}, predicted loss {chosen.predicted:.4g}: drops by {drop:.4g} points', flush=True)
        return drop

    def prepare(
        self,
        bits: int,
        activation_bits: int | None,
        overrides: Sequence[Mapping[str, Any]] = (),
        activations: bool = False,
    ) -> Task:
        """Returns a copy of the model that :meth:`load` read, prepared, with calibrated weights.

        ``activation_bits`` None stands for the config's; ``overrides`` are appended to the config's, and
        ``activations`` are calibrated, too, where that is asked for.
        """
        model = copy.deepcopy(self.runner.model)
        config = {**self.quantizer, 'weight': {**self.quantizer['weight'], 'bits': bits}}
        config['overrides'] = [*self.quantizer.get('overrides', ()), *overrides]
        if activation_bits is not None:
            config['activation'] = {**(self.quantizer.get('activation') or {}), 'bits': activation_bits}
        prepared = pipeline.prepare(model, self.images, build(QUANTIZERS, config))
        loss = task_loss_of(model) if self._annotated else None
        task = Task(prepared, self.images, self._set.batches, loss, self.runner.seed or 0, Path(self.runner.work_dir))
        pipeline.calibrate(task, activations=activations)
        return task


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
    points = bits.drop_budget(budgets)
    table = table if points is None else table.with_float()
    problem = bits.build_problem(table, models, budgets)
    seed, states = cfg.randomness['seed'], table_path.parent / 'states'
    search = partial(build(SEARCHERS, dict(options.searcher)).search, seed=seed)
    describe = partial(bits.describe_choice, table, models, problem)
    if points is None:
        result, cost = describe(search(problem)), next(iter(budgets))
    else:
        cost = bits.cost_to_lower(problem.costs, budgets)
        own = cfg.copy()
        own.search = {**(cfg.get('search') or {}), 'budgets': budgets}
        loop = build_runner(own, path, _loop(own, path)).test_loop
        loop.begin_drops(table.inputs)
        choice, trials = bits.find_cheapest(
            problem, cost, search, lambda choice: loop.drop(describe(choice), states, cost), points
        )
        result = describe(choice)
        result.metric, result.held_out, result.trials = loop.held_out.metric, len(loop.held_out), trials
    result.asked = {name: str(amount) for name, amount in budgets.items()}
    result.images, result.inputs, result.front_cost = table.images, table.inputs, cost
    result.states = os.path.relpath(states, out.parent)
    try:
        result.front = find_front(problem, cost, seed)
    except DependencyError as error:
        print(f'no front in the report: {error}')
    checkpoint = resolve_checkpoint(cfg.float_checkpoint, path)
    bits.write_bit_config(out, Path(path), checkpoint, result, cfg.quantizer.get('overrides', ()))
    print(f'{choice_text(result, table)}config: {out}')
    return result


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
