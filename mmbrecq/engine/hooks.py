"""Hooks of mmengine's kind that observe a reconstruction and show it.

A hook in the config's ``custom_hooks`` may define ``before_reconstruct_stage``, ``before_reconstruct_unit``,
``after_reconstruct_step``, ``after_reconstruct_unit`` and ``after_reconstruct_stage``. They get the runner and, by
name, what the methods of :class:`~mmbrecq.reconstruction.callbacks.Callback` get. ``after_reconstruct``, which gets the
runner, is called after the last pass, and where an error or Ctrl-C ends the reconstruction before that.
"""

from functools import partial
from inspect import signature
from typing import Any

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.progress import ProgressBar
from mmbrecq.reconstruction.callbacks import EVENTS, Callback, Progress
from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.reconstruction.stages import Stage
from mmbrecq.registry import HOOKS
from mmbrecq.report.rows import format_seconds


@HOOKS.register_module()
class ReconstructionLoggerHook(Hook):
    """Writes one log line per unit."""

    def before_reconstruct_stage(self, runner: Runner, stage: Stage, progress: Progress, **_: Any) -> None:
        options = stage.options
        runner.logger.info(
            f'reconstruction of {stage.name}: {progress.count} units, {options.iterations} iterations of '
            f'{options.batch_size} images each{f"; {progress.done} units are done" if progress.done else ""}'
        )

    def after_reconstruct_unit(self, runner: Runner, result: UnitResult, progress: Progress, **_: Any) -> None:
        kept = ', worse than before: kept as it was' if result.kept_nearest else ''
        relative = ' -> '.join(f'{100 * loss:.2g}' for loss in result.relative_losses)
        rest = f', about {format_seconds(progress.seconds_left)} left' if progress.seconds_left else ''
        runner.logger.info(
            f'{result.stage} {progress.done}/{progress.count} {result.name}: loss {result.loss_before:.4g} -> '
            f'{result.loss_after:.4g}, {relative} % of its output, {result.iterations} iterations, '
            f'{result.seconds:.1f} s{kept}{rest}'
        )


@HOOKS.register_module()
class ReconstructionScalarsHook(Hook):
    """Passes losses to the backends of the config's visualizer, such as TensorBoard.

    ``<stage>/<unit>`` is the loss over the iterations of a unit. ``<stage>/before`` and ``<stage>/after`` are the
    losses of all units, in their order, relative to the power of their outputs.
    """

    priority = 'LOW'

    @master_only
    def after_reconstruct_step(
        self, runner: Runner, stage: Stage, unit: ReconstructionUnit, step: int, loss: float
    ) -> None:
        runner.visualizer.add_scalar(f'{stage.name}/{unit.name}', loss, step)

    @master_only
    def after_reconstruct_unit(self, runner: Runner, result: UnitResult, progress: Progress, **_: Any) -> None:
        for word, loss in zip(('before', 'after'), result.relative_losses, strict=True):
            runner.visualizer.add_scalar(f'{result.stage}/{word}', loss, progress.done)


@HOOKS.register_module()
class ReconstructionProgressHook(Hook):
    """Shows a bar per unit with its loss and the time left."""

    # the bar goes before the logger writes its line
    priority = 'ABOVE_NORMAL'

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None

    def before_reconstruct_unit(self, runner: Runner, stage: Stage, unit: ReconstructionUnit) -> None:
        self._bar = ProgressBar(f'{stage.name} {unit.name}', stage.options.iterations)
        self._bar.start()

    def after_reconstruct_step(self, runner: Runner, step: int, loss: float, **_: Any) -> None:
        if self._bar is not None:
            self._bar.show(step, f'loss {loss:.4g}')

    def after_reconstruct(self, runner: Runner, **_: Any) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    after_reconstruct_unit = after_reconstruct


class HookCaller(Callback):
    """Calls the hooks of the runner for every event of a reconstruction, with its arguments by name."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        for event in EVENTS:
            setattr(self, event, partial(self._call, event))

    def _call(self, event: str, *values: Any) -> None:
        _, *names = signature(getattr(Callback, event)).parameters
        self.runner.call_hook(event.replace('_', '_reconstruct_', 1), **dict(zip(names, values, strict=True)))
