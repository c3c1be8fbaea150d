from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from mmbrecq.reconstruction.layout import laid_out, memory_format


class Block(nn.Module):
    def __init__(self, groups: int, flatten: bool = False) -> None:
        super().__init__()
        self.conv, self.flatten = nn.Conv2d(4, 4, 3, groups=groups), flatten

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.view(y.size(0), -1) if self.flatten else y


@pytest.mark.parametrize(
    ('block', 'expected'),
    [
        (Block(4), torch.channels_last),
        (Block(1), torch.contiguous_format),
        (Block(2), torch.contiguous_format),
        (Block(4, flatten=True), torch.contiguous_format),
    ],
    ids=['depthwise', 'dense', 'grouped', 'flattened'],
)
def test_depthwise_units_have_channels_innermost(block: nn.Module, expected: torch.memory_format) -> None:
    assert memory_format(fx.symbolic_trace(block)) == expected


def test_a_module_that_is_no_graph_stays_as_it_is() -> None:
    assert memory_format(Block(4)) == torch.contiguous_format


def test_images_are_laid_out_and_vectors_are_not() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert laid_out(x, torch.contiguous_format) is x
    last = laid_out(x, torch.channels_last)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last, x)
    vectors = torch.randn(2, 3)
    assert laid_out(vectors, torch.channels_last) is vectors
