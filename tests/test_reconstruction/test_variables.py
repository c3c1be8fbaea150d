from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmbrecq.fake_quants.bias import bias_correction
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction import Stage, StageOptions
from mmbrecq.reconstruction.variables import Variables

Prepare = Callable[..., QuantizedModel]
RATES = {'lr': 0.1, 'bias_lr': 0.2, 'weight_scale_lr': 0.3, 'activation_lr': 0.4}


def variables_of(model: QuantizedModel, rounding: bool = True, scale: bool = True, **options: Any) -> Variables:
    unit = model.image_graph.units[1]
    stage = Stage('joint', StageOptions(**{**RATES, **options}), rounding, scale)
    return Variables(unit.module, model.image_graph.unit_weights(unit), model.image_graph.unit_quantizers(unit), stage)


def rates(variables: Variables) -> dict[float, int]:
    """Number of tensors by learning rate."""
    return {lr: len(parameters) for parameters, lr, _ in variables.groups}


def state_of(model: QuantizedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def disturb(variables: Variables, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameters, _, _ in variables.groups:
        for parameter in parameters:
            parameter.data.add_(torch.rand(parameter.shape, generator=generator))


@pytest.mark.parametrize(
    ('rounding', 'scale', 'options', 'expected'),
    [
        (True, False, {}, {0.1: 1, 0.2: 2, 0.3: 2}),
        (False, True, {}, {0.2: 2, 0.3: 2, 0.4: 2}),
        (True, True, {}, {0.1: 1, 0.2: 2, 0.3: 2, 0.4: 2}),
        (True, False, {'bias_lr': 0.0, 'weight_scale_lr': 0.0}, {0.1: 1}),
        (False, True, {'bias_lr': 0.0, 'weight_scale_lr': 0.0}, {0.4: 2}),
        (False, False, {'bias_lr': 0.0, 'weight_scale_lr': 0.0}, {}),
    ],
)
def test_what_is_learned(prepared: Prepare, rounding: bool, scale: bool, options: Any, expected: Any) -> None:
    """The block has two layers, whose rounding is one vector, and two activation quantizers."""
    variables = variables_of(prepared(), rounding, scale, **options)
    assert rates(variables) == expected
    assert all(p.requires_grad for parameters, _, _ in variables.groups for p in parameters)


def test_a_fixed_step_size_is_not_learned(prepared: Prepare) -> None:
    model = prepared()
    quantizer = model.image_graph.unit_quantizers(model.image_graph.units[1])[0]
    quantizer.fixed = True
    assert rates(variables_of(model)) == {0.1: 1, 0.2: 2, 0.3: 2, 0.4: 1}
    assert not quantizer.scale.requires_grad


def test_only_rounding_keeps_its_learning_rate(prepared: Prepare) -> None:
    for _, lr, schedule in variables_of(prepared()).groups:
        assert schedule(0.0) == 1
        assert schedule(1.0) == pytest.approx(1 if lr == RATES['lr'] else 0)


def test_other_units_are_left_alone(prepared: Prepare) -> None:
    model = prepared()
    before = state_of(model)
    variables = variables_of(model)
    disturb(variables)
    variables.finish()
    changed = {name for name, tensor in state_of(model).items() if not torch.equal(tensor, before[name])}
    own = ('backbone.first.', 'activation_quantizers.relu_1.', 'activation_quantizers.relu_2.')
    assert changed
    assert all(name.startswith(own) for name in changed)


def test_finishing_fixes_everything(prepared: Prepare) -> None:
    model = prepared()
    names = set(state_of(model))
    variables = variables_of(model)
    disturb(variables)
    variables.finish()
    unit = model.image_graph.units[1]
    assert set(state_of(model)) == names
    for module, fake_quant in model.image_graph.unit_weights(unit):
        correction = bias_correction(module)
        assert correction is not None
        assert not correction.offset.requires_grad
        assert correction.offset.abs().min() > 0
        assert not list(fake_quant.parameters())
    assert not any(p.requires_grad for q in model.image_graph.unit_quantizers(unit) for p in q.parameters())
