"""What a unit has learned: copied, put back, refused where it is another unit's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mmbrecq.errors import CheckpointError
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction.results import load_unit_state, unit_state

Prepare = Callable[..., QuantizedModel]


def tensors(model: QuantizedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def disturb(model: QuantizedModel, index: int) -> None:
    """Changes all that a unit can learn."""
    for module, fake_quant in model.image_graph.unit_weights(model.image_graph.units[index]):
        fake_quant.codes.add_(1)
        fake_quant.scale.mul_(1.5)
        module.parametrizations['bias'][0].offset.data.add_(0.25)  # type: ignore[index, union-attr]
    for quantizer in model.image_graph.unit_quantizers(model.image_graph.units[index]):
        quantizer.scale.data.mul_(2)
        quantizer.zero_point.add_(1)


def test_what_was_learned_comes_back_bit_for_bit(prepared: Prepare) -> None:
    model = prepared()
    before = tensors(model)
    state = unit_state(model.model, model.image_graph.units[1])
    for _ in range(2):
        disturb(model, 1)
        changed = {name.rpartition('.')[2] for name, tensor in tensors(model).items() if not tensor.equal(before[name])}
        assert changed == {'codes', 'scale', 'offset', 'zero_point'}
        load_unit_state(model.model, model.image_graph.units[1], state)
        after = tensors(model)
        assert after.keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


def test_other_units_are_left_alone(prepared: Prepare) -> None:
    model = prepared()
    state = unit_state(model.model, model.image_graph.units[1])
    disturb(model, 0)
    before = tensors(model)
    load_unit_state(model.model, model.image_graph.units[1], state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())


def test_another_units_state_is_refused(prepared: Prepare) -> None:
    model = prepared()
    block = next(i for i, unit in enumerate(model.image_graph.units) if len(unit.layers) == 2)
    other = next(unit for unit in model.image_graph.units if len(unit.layers) == 1)
    before = tensors(model)
    with pytest.raises(CheckpointError, match=f"expected the state of unit '{other.name}', but it does not fit at '"):
        load_unit_state(model.model, other, unit_state(model.model, model.image_graph.units[block]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(model).items())
