"""A loss weighted by the Fisher information of a unit's outputs, diagonal plus low rank, from responses to errors."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mmbrecq.building import check_number, expect
from mmbrecq.data.groups import batches_of, grouped
from mmbrecq.distributed import mean_over
from mmbrecq.errors import NonFiniteError
from mmbrecq.reconstruction.batches import MicroBatches, OutputTerm, UnitData
from mmbrecq.reconstruction.cache import ActivationCache
from mmbrecq.reconstruction.values import CachedValues, Values
from mmbrecq.registry import LOSSES

MOST_ERRORS = 3
"""Errors whose responses can be told apart: of the unit and those before it, of the unit, and of its weights."""
CUTOFF = 1e-3
"""Curvature along a combination of errors, over the largest, below which it is taken for noise."""
FLOOR = 1e-2
"""Square of an error over their mean square, below which the response of an element says nothing about it."""


@LOSSES.register_module()
class FisherLowRankLoss:
    r"""Quadratic form of the error in the Fisher information, diagonal plus low rank (Wu et al., FIMA-Q, CVPR 2025).

    By the paper, an error :math:`e` of a unit's outputs makes a divergence of the network's outputs from the float ones
    of about :math:`e^T F e / 2`, and the gradient of the divergence at the quantized outputs is its response,
    :math:`g = F e`. So :math:`g g^T / (g^T e)` is the part of :math:`F` that the error sees, and :math:`|g / e|` stands
    for its diagonal; the loss is a mixture of both forms. Ours are: a form of its own for each image; several errors
    :math:`E = [e_1 .. e_k]`, of the unit with all before it, of the unit alone and of its weights alone, with responses
    :math:`G`, whose low-rank part is Nyström's :math:`G (E^T G)^+ G^T`, the paper's for one; a diagonal
    :math:`\sum_r |g_r e_r| / \sum_r e_r^2`; and the scale: of the error before learning, both forms are
    :class:`~mmbrecq.reconstruction.losses.MSELoss`. For a network with other outputs than one vector of scores the
    divergence is the squared error of each output over its power.

    Args:
        rank: Number of errors, 1 to 3.
        diagonal: Share of the diagonal form in the loss, in [0, 1].
    """

    needs_fisher = False

    def __init__(self, rank: int = 3, diagonal: float = 0.5) -> None:
        valid = type(rank) is int and 1 <= rank <= MOST_ERRORS
        expect(valid, f'rank of FisherLowRankLoss in 1..{MOST_ERRORS}', rank)
        check_number(diagonal, '[0, 1]', 'diagonal of FisherLowRankLoss')
        self.rank, self.diagonal = rank, diagonal

    def __call__(self, output: Tensor, target: Tensor, fisher: Tensor | None = None) -> Tensor:
        """Returns a scalar; ``fisher`` is ``(N, 1 + rank, C, ...)``, the diagonal and the factors of the rest."""
        assert fisher is not None
        error = output - target
        of_diagonal = (error.square() * fisher[:, 0]).sum()
        of_factors = (error.unsqueeze(1) * fisher[:, 1:]).flatten(2).sum(2).square().sum()
        return (self.diagonal * of_diagonal + (1 - self.diagonal) * of_factors) / len(output)


def low_rank_weights(
    data: UnitData[Any], loss: OutputTerm, runs: Sequence[Sequence[Values]], cache: ActivationCache, micro: MicroBatches
) -> list[CachedValues]:
    """Returns for each output of a unit the diagonal and the factors of its Fisher information, ``(N, 1 + k, C, ...)``.

    ``loss`` is the distance of the outputs of the network from the float ones, which ``data`` has with all else that it
    reads; ``runs`` are the outputs of the unit with ``k`` different errors, the first that before learning.
    NonFiniteError is raised if a response is not finite.
    """
    targets = data.targets
    shapes = [grouped(target).parts[0].sample_shape for target in targets]
    weights = [cache.allocate((len(t), 1 + len(runs), *s), like=t) for t, s in zip(targets, shapes, strict=True)]
    forms = torch.zeros(3, dtype=torch.float64)

    def write(batch: slice, images: int) -> None:
        found = torch.zeros_like(forms)
        for start in range(batch.start, batch.stop, images):
            part = slice(start, min(start + images, batch.stop))
            errors, responses = _responses(data.read(part), loss, [[x[part] for x in run] for run in runs])
            for weight, es, gs in zip(weights, errors, responses, strict=True):
                diagonal, factors = diagonal_and_factors(es.flatten(2), gs.flatten(2))
                weight.write(
                    part.start, torch.cat([diagonal.unsqueeze(1), factors], 1).view(len(es), -1, *es.shape[2:])
                )
                first = es[:, 0].flatten(1)
                found += torch.stack([
                    first.square().sum() * es.shape[2] / first.shape[1],
                    (first.square() * diagonal).sum(),
                    (first.unsqueeze(1) * factors).sum(2).square().sum(),
                ]).cpu()  # fmt: skip
        forms.add_(found)

    batches = batches_of(targets[0], micro.images)
    for batch in batches:
        micro.run(partial(write, batch))
    plain, of_diagonal, of_factors = (mean_over(float(form), len(data)) for form in forms)
    if not all(0 <= form < float('inf') for form in (plain, of_diagonal, of_factors)):
        raise NonFiniteError(f"expected finite gradients of the outputs at unit '{micro.unit}', but they are not")
    scales = [plain / max(of_diagonal, 1e-30), *[(plain / max(of_factors, 1e-30)) ** 0.5] * len(runs)]
    for weight, shape in zip(weights, shapes, strict=True):
        for batch in batches:
            part = weight[batch]
            weight.write(batch.start, part * part.new_tensor(scales).view(-1, *[1] * len(shape)))
    return weights


def diagonal_and_factors(errors: Tensor, responses: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the diagonal ``(N, D)`` and the factors ``(N, k, D)`` of forms from ``k`` errors and their responses.

    The form of the factors gives back all responses, if those are of one form: ``U^T U e = g``.

    Example:
        >>> errors = torch.tensor([[[1.0, 0.0]]])
        >>> diagonal_and_factors(errors, errors @ torch.tensor([[4.0, 2.0], [2.0, 1.0]]))[1]
        tensor([[[2., 1.]]])
    """
    # the form does not depend on the length of an error, the cutoff would
    size = errors.norm(dim=2, keepdim=True).clamp_min(1e-30)
    errors, responses = errors / size, responses / size
    squares = errors.square().sum(1)
    diagonal = (errors * responses).abs().sum(1) / (squares + FLOOR * squares.mean(1, keepdim=True)).clamp_min(1e-30)
    products = errors.double() @ responses.double().transpose(1, 2)
    products = torch.nan_to_num(products + products.transpose(1, 2)) / 2
    curvatures, directions = torch.linalg.eigh(products)
    kept = curvatures > CUTOFF * curvatures[:, -1:].clamp_min(1e-30)
    mix = directions * torch.where(kept, curvatures.clamp_min(1e-38).rsqrt(), 0).unsqueeze(1)
    return diagonal, mix.transpose(1, 2).to(responses.dtype) @ responses


def _responses(
    batch: UnitData[Tensor], distance: OutputTerm, runs: Sequence[Sequence[Tensor]]
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns for each output of a unit its errors and their responses, image by image, ``(n, k, C, ...)``."""
    responses = []
    for run in runs:
        with torch.enable_grad():
            outputs = [output.detach().requires_grad_(True) for output in run]
            # a response is that of each image
            loss = len(batch) * distance(outputs, batch.beside, batch.network_outputs)
        responses.append(torch.autograd.grad(loss, outputs, allow_unused=True, materialize_grads=True))
    errors = [[o - t for o, t in zip(run, batch.targets, strict=True)] for run in runs]
    stacked = [[torch.stack(x, 1) for x in zip(*of_runs, strict=True)] for of_runs in (errors, responses)]
    return stacked[0], stacked[1]
