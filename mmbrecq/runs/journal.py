"""The file from which an interrupted run continues: finished units, what they have learned, what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import master_only
from torch import nn

from mmbrecq.distributed import on_main
from mmbrecq.errors import CheckpointError, first_line
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.reconstruction.callbacks import Callback, Progress
from mmbrecq.reconstruction.results import FinishedUnit, UnitResult, unit_state
from mmbrecq.reconstruction.stages import Stage
from mmbrecq.runs.identity import first_difference
from mmbrecq.runs.storage import save_atomic


class Journal(Callback):
    """Keeps ``reconstruction.pth``; each version is written beside the last one and renamed.

    Args:
        path: The file.
        model: Owner of all modules whose states are kept.
        identity: What the run depends on, each setting in words.
        config_text: The config, for a person to read.

    Attributes:
        units: What is done, by stage and name.
        metrics: What was measured, by name of the evaluation.
        observed: Images that are observed at once, None before that is planned.
        fallback: Overrides of a quantizer that the run has found itself, None before it has looked.
    """

    def __init__(self, path: Path, model: nn.Module, identity: Mapping[str, str], config_text: str) -> None:
        self.path, self.model, self.identity, self.config_text = path, model, dict(identity), config_text
        self.units: dict[tuple[str, str], FinishedUnit] = {}
        self.metrics: dict[str, dict[str, float]] = {}
        self.observed: int | None = None
        self.fallback: list[dict[str, str]] | None = None

    def load(self) -> bool:
        """Loads the file of an interrupted run in every process; returns False where there is none.

        Raises:
            CheckpointError: The file cannot be read, or is of another config, seed or float weights; what differs is
                named.
        """
        found = on_main(self._read)
        if found is None:
            return False
        self.units, self.metrics, self.observed, self.fallback = found
        return True

    def _read(self) -> tuple[Any, ...] | None:
        for partial in self.path.parent.glob(f'.{self.path.name}.*.partial'):
            # of a process that was killed while it wrote
            partial.unlink(missing_ok=True)
        if not self.path.exists():
            return None
        try:
            saved = torch.load(self.path, map_location='cpu', weights_only=True)
            meta = saved['meta']
            units = [FinishedUnit(UnitResult(**unit['result']), unit['state']) for unit in saved['units']]
            identity, metrics = dict(meta['identity']), dict(meta['metrics'])
        except Exception as error:
            raise CheckpointError(
                f'{self.path}: expected the state of an interrupted run, but it cannot be read: '
                f'{type(error).__name__}: {first_line(error)}'
            ) from error
        difference = first_difference(identity, self.identity)
        if difference is not None:
            raise CheckpointError(
                f'{self.path} is of another run: {difference}; go on as it was begun, or start again without --resume'
            )
        done = {(unit.result.stage, unit.result.name): unit for unit in units}
        return done, metrics, meta.get('observed'), meta.get('fallback')

    def after_unit(self, stage: Stage, unit: ReconstructionUnit, result: UnitResult, progress: Progress) -> None:
        self.units[result.stage, result.name] = FinishedUnit(result, unit_state(self.model, unit))
        self.save()

    @master_only
    def save(self) -> None:
        """Writes the file, in the first process; StorageError where that fails, and the version before stays."""
        units: list[Any] = [{'result': asdict(unit.result), 'state': unit.state} for unit in self.units.values()]
        meta = {
            'identity': self.identity, 'metrics': self.metrics, 'observed': self.observed, 'config': self.config_text,
            'units_done': list(self.units), 'fallback': self.fallback,
        }  # fmt: skip
        save_atomic({'units': units, 'meta': meta}, self.path)
