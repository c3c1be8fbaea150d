"""The diagonal plus low-rank Fisher information against dense matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmbrecq.errors import NonFiniteError
from mmbrecq.graph.units import ReconstructionUnit
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction import FisherLowRankLoss, MSELoss
from mmbrecq.reconstruction.batches import MicroBatches, UnitData
from mmbrecq.reconstruction.cache import ActivationCache
from mmbrecq.reconstruction.low_rank import diagonal_and_factors, low_rank_weights
from mmbrecq.reconstruction.streams import Streams
from mmbrecq.reconstruction.supervision import Rest, Supervision
from mmbrecq.reconstruction.values import MemoryValues
from mmbrecq.registry import LOSSES


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_registered() -> None:
    assert LOSSES.get('FisherLowRankLoss') is FisherLowRankLoss


def test_a_matrix_of_the_rank_of_the_errors_is_found() -> None:
    half = random(4, 3, 10)
    dense = half.transpose(1, 2) @ half
    errors = random(4, 3, 10, seed=1)
    _, factors = diagonal_and_factors(errors, errors @ dense)
    torch.testing.assert_close(factors.transpose(1, 2) @ factors, dense, rtol=1e-3, atol=1e-3)


def test_of_a_larger_rank_it_knows_what_the_errors_see_and_no_more() -> None:
    half = random(1, 10, 10)
    dense = half.transpose(1, 2) @ half
    errors = random(1, 2, 10, seed=1)
    # an error twice says as much as once
    doubled = torch.cat([errors, 2 * errors[:, :1]], 1)
    _, factors = diagonal_and_factors(doubled, doubled @ dense)
    found = factors.transpose(1, 2) @ factors
    torch.testing.assert_close(errors @ found, errors @ dense, rtol=1e-3, atol=1e-3)
    assert float(torch.linalg.eigvalsh((dense - found).double()).min()) > -1e-3


def test_the_diagonal_of_a_diagonal_matrix() -> None:
    values = torch.tensor([3.0, 1.0, 0.5])
    errors = torch.tensor([[[1.0, -2.0, 1.5], [2.0, 1.0, -1.0]]])
    diagonal, _ = diagonal_and_factors(errors, errors * values)
    # elements with small errors count a little less
    torch.testing.assert_close(diagonal, values[None], rtol=0.02, atol=0.0)


def test_an_error_of_nothing_weighs_nothing() -> None:
    diagonal, factors = diagonal_and_factors(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5))
    assert not diagonal.any() and not factors.any()


@pytest.mark.parametrize('shape', [(5, 6), (5, 7, 3), (5, 4, 2, 3)])
@pytest.mark.parametrize('share', [0.0, 0.3, 1.0])
def test_the_loss_is_the_quadratic_form(shape: tuple[int, ...], share: float) -> None:
    output, target, fisher = random(*shape), random(*shape, seed=1), random(shape[0], 3, *shape[1:], seed=2)
    found = FisherLowRankLoss(2, share)(output, target, fisher)
    total = 0.0
    for error, weight in zip((output - target).double(), fisher.double(), strict=True):
        diagonal, *factors = weight.flatten(1)
        dense = share * torch.diag(diagonal) + (1 - share) * sum(torch.outer(u, u) for u in factors)
        total += float(error.flatten() @ dense @ error.flatten())
    assert float(found) == pytest.approx(total / len(output), rel=1e-5)


Start = tuple[Streams, ReconstructionUnit, UnitData[Any]]


def at_first_block(model: QuantizedModel, host: ActivationCache, images: Tensor) -> Start:
    """The streams with the inputs of the first block, and what that is trained on."""
    graph = model.image_graph
    streams = Streams(graph, graph.units, host.hold(images), host, 7)
    for index, unit in enumerate(graph.units):
        outputs = streams.run(unit, streams.float_inputs(unit), weights=False, activations=False)
        if unit.name == 'backbone.first':
            return streams, unit, UnitData(streams.quantized_inputs(unit), streams.float_inputs(unit), outputs)
        streams.advance(index, outputs, streams.run(unit, streams.quantized_inputs(unit), True, True))
    raise AssertionError


@pytest.mark.parametrize('rank', [1, 3])
def test_responses_are_products_with_the_fisher_information(
    prepared: Callable[..., QuantizedModel], host: ActivationCache, images: Tensor, rank: int
) -> None:
    """For errors so small that no rectifier notices: ``J^T (diag(p) - p p^T) J`` of every image, up to one factor."""
    streams, unit, data = at_first_block(prepared(), host, images)
    supervision = Supervision(streams, rank, 0.0, 1.0)
    rest, target = supervision.rest(unit), data.targets[0][:]
    # zeros, of which the pooling behind takes any, stay zeros
    errors = [2e-3 * target * random(*target.shape, seed=seed) for seed in range(rank)]
    with_rest = replace(data, network_outputs=[supervision._outputs[name] for name in rest.outputs])
    runs = [[MemoryValues(target + error, target.device)] for error in errors]
    fisher = low_rank_weights(with_rest, rest.distance, runs, host, MicroBatches(unit.name, 7))[0][:]
    exact, found = [], []
    for i in range(len(images)):
        x = target[i : i + 1].clone().requires_grad_(True)
        with torch.enable_grad():
            logits = rest([x], [])[0][0]
        jacobian = torch.stack([torch.autograd.grad(y, x, retain_graph=True)[0].flatten() for y in logits])
        p, own = logits.detach().softmax(0), torch.stack([error[i].flatten() for error in errors])
        exact.append(own @ jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian @ own.T)
        factors = fisher[i, 1:].flatten(1) @ own.T
        found.append(factors.T @ factors)
    scale = sum(form[0, 0] for form in exact) / sum(form[0, 0] for form in found)
    for one, other in zip(found, exact, strict=True):
        assert float((scale * one - other).norm() / other.norm()) < 0.15


@pytest.mark.parametrize('share', [0.0, 1.0])
def test_the_error_before_learning_counts_as_the_plain_one(
    prepared: Callable[..., QuantizedModel], host: ActivationCache, images: Tensor, share: float
) -> None:
    loss = FisherLowRankLoss(3, share)
    streams, unit, data = at_first_block(prepared(), host, images)
    quantized = streams.run(unit, data.quantized_inputs, weights=True, activations=True)
    data, kept = Supervision(streams, 3, 0.0, 1.0).add_to(data, unit, loss, MSELoss(), quantized, True)
    assert kept is loss
    found = data.mean_loss(quantized, loss, 7)
    assert found == pytest.approx(float(MSELoss()(quantized[0][:], data.targets[0][:])), rel=1e-3)


def test_gradients_that_are_not_finite(
    prepared: Callable[..., QuantizedModel], host: ActivationCache, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rest, 'distance', lambda self, x, *_: x[0].sum() * float('nan'))
    with pytest.raises(NonFiniteError, match=r"expected finite gradients of the outputs at unit 'backbone.first'"):
        streams, unit, data = at_first_block(prepared(), host, images)
        Supervision(streams, 2, 0.0, 1.0).add_to(data, unit, FisherLowRankLoss(2), MSELoss(), data.targets, True)
