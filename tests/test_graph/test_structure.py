from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch

from mmbrecq.errors import GraphError
from mmbrecq.graph.structure import flatten_outputs, nest_outputs, split_outputs


def tensors(count: int) -> list[torch.Tensor]:
    return [torch.full((1, 2), float(i)) for i in range(count)]


def values(nested: Any) -> Any:
    return float(nested[0, 0]) if isinstance(nested, torch.Tensor) else [values(item) for item in nested]


def test_a_single_tensor_is_output() -> None:
    (only,) = tensors(1)
    assert flatten_outputs(only) == {'output': only}
    assert nest_outputs({'output': only}) is only


def test_a_detector_with_levels() -> None:
    flat = flatten_outputs((tensors(12)[:11], tensors(2)))
    assert list(flat)[:2] == ['output_0_0', 'output_0_1'] and list(flat)[-3:] == [
        'output_0_10',
        'output_1_0',
        'output_1_1',
    ]
    # a runtime may list its outputs in another order, and 10 comes before 2 as text
    nested = nest_outputs(dict(sorted(flat.items(), reverse=True)))
    assert isinstance(nested, tuple) and isinstance(nested[0], list)
    assert values(nested) == [[float(i) for i in range(11)], [0.0, 1.0]]


def test_a_tuple_of_tensors_and_deeper_ones() -> None:
    a, b, c = tensors(3)
    assert values(nest_outputs(flatten_outputs([a, b]))) == [0.0, 1.0]
    assert values(nest_outputs(flatten_outputs((a, ([b], c))))) == [0.0, [[1.0], 2.0]]
    assert values(nest_outputs(flatten_outputs((a,)))) == [0.0]


def test_outputs_that_are_none_leave_gaps() -> None:
    a, b, c = tensors(3)
    first, gap, levels = nest_outputs(flatten_outputs((a, None, [b, None, c])))
    assert first is a and gap is None and levels == [b, None, c]


def test_a_dict_of_tensors() -> None:
    a, b, c = tensors(3)
    flat = flatten_outputs({'maps': [a, b], 'scores': c})
    assert flat == {'output_maps_0': a, 'output_maps_1': b, 'output_scores': c}


@pytest.mark.parametrize(
    ('outputs', 'message'),
    [
        ((torch.zeros(1), 'text'), 'but output_1 is a str'),
        ([torch.zeros(1, dtype=torch.complex64)], 'real tensors, but output_0 is a complex tensor'),
        ({'maps': [torch.zeros(1)], 'maps_0': torch.zeros(1)}, 'names of their own, but got several output_maps_0'),
    ],
)
def test_what_cannot_be_an_output_is_refused(outputs: Any, message: str) -> None:
    with pytest.raises(GraphError, match=message):
        flatten_outputs(outputs)


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclass
class Result:
    scores: Any
    hidden: Any = None


class Fields(OrderedDict[str, Any]):
    """A dict whose keys are attributes, as the outputs of Hugging Face's models."""

    def __init__(self, **values: Any) -> None:
        super().__init__(values)
        vars(self).update(values)


def test_outputs_of_classes_are_flat_and_come_back_as_they_were() -> None:
    a, b, c, d = tensors(4)
    outputs = Fields(pair=Pair(a, None), result=Result([b]), more=({3: c}, d))
    names = ['output_pair_0', 'output_result_scores_0', 'output_more_0_3', 'output_more_1']
    assert list(flatten_outputs(outputs)) == names
    plain, restore = split_outputs(outputs)
    assert plain == {'pair': (a, None), 'result': {'scores': [b], 'hidden': None}, 'more': ({3: c}, d)}
    assert type(plain) is dict and type(plain['pair']) is tuple
    found = restore(plain)
    assert found == outputs and found.result == Result([b])
    assert [type(part) for part in (found, found.pair, found.more)] == [Fields, Pair, tuple]
