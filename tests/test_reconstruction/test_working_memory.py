from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction.stages import Stage, StageOptions
from mmbrecq.reconstruction.working_memory import (
    BASE,
    FIXED_WEIGHT,
    HEADROOM,
    LEARNED_WEIGHT,
    Footprint,
    ObservedUnit,
    fitting_images,
    iteration_bytes,
    measure_footprint,
    observed_units,
    working_memory,
)

Prepare = Callable[..., QuantizedModel]
UNIT = Footprint(saved=1000, largest=400, inputs=200, outputs=300, weights=50)


class Opaque(nn.Module):
    """Two layers with a product between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(10, 30), nn.Linear(30, 5)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        wide = self.first(x)
        return (self.second(wide * wide.cos()),)


class Tuple(nn.Module):
    """Returns its input as the only output of a unit."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x,)


def stage(rounding: bool = True, **options: object) -> Stage:
    return Stage('weights', StageOptions(**options), rounding, not rounding)  # type: ignore[arg-type]


def test_what_a_module_saves() -> None:
    module = Opaque()
    # a view of more: of that, only what is read counts
    inputs = torch.randn(100, 10)[:4]
    found = measure_footprint(module, [inputs], [module.first.weight, module.second.weight])
    # wide, its cosine and their product
    assert found == Footprint(saved=3 * 30 * 4, largest=30 * 4, inputs=10 * 4, outputs=5 * 4, weights=450)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_nothing_is_kept_of_a_measured_unit() -> None:
    """The exponential saves its own output, which would keep the operation, and that the output."""
    made: list[weakref.ref[Tensor]] = []

    class Exponential(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            out = x.exp()
            made.append(weakref.ref(out))
            return (out * 2,)

    module = nn.Sequential(nn.Linear(10, 30).requires_grad_(False), Exponential())
    measure_footprint(module, [torch.randn(4, 10)], [])
    gc.collect()
    assert made[-1]() is None


def test_outputs_of_layers_that_gradients_are_taken_from() -> None:
    module = Opaque()
    found = measure_footprint(module, [torch.randn(4, 10)], [], [module.second])
    assert found.saved == (3 * 30 + 5) * 4
    assert not module.second._forward_hooks


def test_statistics_of_a_normalisation_have_no_gradient() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), Tuple()).eval()
    # what the normalisation reads, and its statistics
    assert 4 * 25 * 4 <= measure_footprint(module, [torch.randn(2, 3, 5, 5)], []).saved < 4 * 25 * 4 + 50


def test_what_has_no_form_on_shapes_alone_is_run() -> None:
    class Counting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * int(x.isfinite().all())

    module = nn.Sequential(nn.Linear(10, 30), Counting(), nn.Linear(30, 5), Tuple()).requires_grad_(False)
    found = measure_footprint(module, [torch.empty(4, 10, device='meta')], [])
    assert found == measure_footprint(module, [torch.randn(4, 10)], []) and found.largest == 30 * 4


def test_the_module_survives_an_error() -> None:
    module = Opaque()
    with pytest.raises(RuntimeError):
        measure_footprint(module, [torch.randn(4, 11)], [])
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_step_grows_with_its_images() -> None:
    one, two, ten = (iteration_bytes(UNIT, stage(), images, fisher=False) for images in (1, 2, 10))
    assert ten - two == 8 * (two - one)
    # at least what is saved, the batch, and gradients of the largest tensor and of the outputs
    assert two - one > 1000 + 200 + 300 + 2 * 400 + 300


def test_what_makes_a_step_larger() -> None:
    plain = iteration_bytes(UNIT, stage(), 10, fisher=False)
    fixed = iteration_bytes(UNIT, stage(rounding=False), 10, fisher=False)
    assert plain - fixed == 50 * (LEARNED_WEIGHT - FIXED_WEIGHT)
    assert iteration_bytes(UNIT, stage(), 10, fisher=True) >= plain + 10 * 300
    # the pool of masks is larger than a tensor by a million elements, of a byte each
    assert iteration_bytes(UNIT, stage(drop_prob=0.5), 10, fisher=False) >= plain + 10 * 200 + (10 * 100 + 2**20)


def test_what_observing_takes() -> None:
    # inputs and outputs, and the largest of what comes between: float32 values, their bins and a copy of these
    none, one, two = (ObservedUnit('unit', UNIT, 3).bytes_of(images) for images in (0, 1, 2))
    assert one - none >= 200 + 300 + 400 + 3 * 400
    assert two - none == pytest.approx(2 * (one - none), abs=2)
    # an observer keeps no batch of more than 2^20 values, and counts no more at once
    many, more = (ObservedUnit('unit', UNIT, quantizers).bytes_of(10**6) for quantizers in (1, 2))
    assert more - many == HEADROOM * 4 * 2**20
    regions = ObservedUnit('head', UNIT, 3, inputs=512)
    assert regions.bytes_of(2) == ObservedUnit('unit', UNIT, 3).bytes_of(1024)


def test_as_many_images_as_have_room_are_observed() -> None:
    units = [ObservedUnit('small', UNIT, 1), ObservedUnit('large', Footprint(10**7, 10**6, 10**6, 10**6, 1), 1)]
    assert fitting_images(units, 2**40) == fitting_images([], 0) == 64
    assert fitting_images(units, units[1].bytes_of(16)) == 16
    assert fitting_images(units, units[1].bytes_of(16) - 1) == 8
    # with no room for one, the plan refuses
    assert fitting_images(units, 0) == 1


def test_units_without_quantizers_observe_nothing(prepared: Prepare) -> None:
    model = prepared()
    found = observed_units(model.image_graph, model.image_graph.units, inputs=3)
    assert {unit.name: unit.quantizers for unit in found} == {
        u.name: len(u.quantizers) for u in model.image_graph.units if u.quantizers
    }
    assert len(found) < len(model.image_graph.units) and {unit.inputs for unit in found} == {3}


@pytest.mark.parametrize('fisher', [False, True])
def test_units_of_a_model(prepared: Prepare, fisher: bool) -> None:
    model = prepared()
    found = {
        name: size for size, name in working_memory(model.image_graph, model.image_graph.units, stage(), 24, fisher)
    }
    assert set(found) == {unit.name for unit in model.image_graph.units} | ({'net0'} if fisher else set())
    # of a block over 8 x 8: the inputs of both convolutions, and their outputs in the ReLU and in the sum
    assert found['backbone.first'] - BASE >= HEADROOM * 24 * 3 * 6 * 64 * 4
    assert found['backbone.first'] > found['backbone.second'] > found['head.fc'] > BASE
    assert not any(quantizer.enabled for quantizer in model.image_graph.quantizers.values())
