from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmbrecq.errors import CheckpointError, NonFiniteError
from mmbrecq.runs.checkpoint import load_float_checkpoint, load_quantized_checkpoint, read_checkpoint

ZOO = Path(os.environ.get('MMBRECQ_DATA', Path(__file__).parents[3] / 'shared' / 'data')).parent / 'zoo'


def make_model(channels: int = 3) -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(1, channels, 2), bn=nn.BatchNorm2d(channels)))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) * 9)
    return model


def assert_same(model: nn.Module, expected: dict[str, Tensor]) -> None:
    own = model.state_dict()
    assert own.keys() == expected.keys()
    for name, tensor in own.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.fixture
def weights() -> dict[str, Tensor]:
    return randomised(make_model()).state_dict()


@pytest.mark.parametrize('layout', ['state_dict', 'model', 'bare', 'ddp'])
def test_where_the_weights_are(tmp_path: Path, weights: Any, layout: str) -> None:
    path = tmp_path / 'a.pth'
    meta = {'epoch': 3}
    if layout == 'ddp':
        torch.save({'state_dict': {f'module.{name}': value for name, value in weights.items()}, 'meta': meta}, path)
    else:
        torch.save(weights if layout == 'bare' else {layout: weights, 'meta': meta}, path)
    model = make_model()
    load_float_checkpoint(model, path)
    assert_same(model, weights)


def test_half_precision_arrives_in_the_models_dtype(tmp_path: Path, weights: Any) -> None:
    torch.save(
        {name: value.half() if value.is_floating_point() else value for name, value in weights.items()}, tmp_path / 'a'
    )
    model = make_model()
    load_float_checkpoint(model, tmp_path / 'a')
    assert model.get_parameter('conv.weight').dtype == torch.float32
    torch.testing.assert_close(
        model.get_parameter('conv.weight'), weights['conv.weight'], rtol=1e-3, atol=1e-3, check_dtype=False
    )


def test_keys_that_cannot_matter(tmp_path: Path, weights: Any) -> None:
    """No batch count (as before torch 0.4.1), a preprocessor's mean, and the raw weights that mmcv 1 left behind."""
    kept = {name: value for name, value in weights.items() if 'num_batches' not in name}
    raw = {f'ema_{name.replace(".", "_")}': torch.full_like(value, -1) for name, value in weights.items()}
    torch.save({'state_dict': {**kept, **raw, 'data_preprocessor.mean': torch.ones(3, 1, 1)}}, tmp_path / 'a.pth')
    model = make_model()
    load_float_checkpoint(model, tmp_path / 'a.pth')
    assert_same(model, {**weights, 'bn.num_batches_tracked': torch.tensor(0)})
    torch.save({'state_dict': {**weights, 'ema_other_weight': torch.ones(1)}}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match=r'fit the model: 1 unexpected key \(first: ema_other_weight\)$'):
        load_float_checkpoint(model, tmp_path / 'a.pth')


def test_a_misfit_is_counted_and_named(tmp_path: Path, weights: Any) -> None:
    path = tmp_path / 'other.pth'
    torch.save({'state_dict': {'head.fc': torch.ones(1), **weights}}, path)
    with pytest.raises(CheckpointError, match=r'^\S*other\.pth does not fit the model: 1 unexpected key \(first: head'):
        load_float_checkpoint(make_model(), path)
    torch.save({'state_dict': {'fc.a': torch.ones(1)}}, path)
    expected = r'model: 6 missing keys \(first: conv.weight, conv.bias\), 1 unexpected key \(first: fc.a\)$'
    with pytest.raises(CheckpointError, match=expected):
        load_float_checkpoint(make_model(), path)
    torch.save({'state_dict': {**weights, 'fc.a': torch.ones(1)}}, path)
    expected = (
        r'model: 1 unexpected key \(first: fc.a\), 6 keys of another shape '
        r'\(first: conv.weight expected \(5, 1, 2, 2\) but got \(3, 1, 2, 2\)\)$'
    )
    with pytest.raises(CheckpointError, match=expected):
        load_float_checkpoint(make_model(5), path)


def test_a_file_without_weights(tmp_path: Path) -> None:
    for content in ({'meta': {'a': 1}, 'optimizer': {}}, {'state_dict': {}, 'meta': 1}, {'state_dict': [1], 'meta': 1}):
        torch.save(content, tmp_path / 'a.pth')
        with pytest.raises(
            CheckpointError, match=r'^expected \S*a\.pth to hold a state_dict, but got the keys \w+, \w+'
        ):
            load_float_checkpoint(make_model(), tmp_path / 'a.pth')


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_non_finite_weights(tmp_path: Path, weights: Any, value: float) -> None:
    weights['bn.running_var'][1] = value
    torch.save({'state_dict': weights}, tmp_path / 'a.pth')
    for load in (load_float_checkpoint, load_quantized_checkpoint):
        with pytest.raises(NonFiniteError, match=r'^bn\.running_var in \S*a\.pth holds 1 non-finite of 3 values$'):
            load(make_model(), tmp_path / 'a.pth')


def test_module_versions_reach_the_modules_hooks(tmp_path: Path) -> None:
    seen = []

    class Versioned(nn.Linear):
        _version = 7

        def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
            seen.append(local_metadata.get('version'))
            state_dict[f'{prefix}weight'] = state_dict.pop(f'{prefix}old', state_dict.get(f'{prefix}weight'))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    model = nn.Sequential(Versioned(2, 2))
    weights = model.state_dict()
    weights['0.old'] = weights.pop('0.weight') * 0 + 5
    torch.save({'state_dict': weights}, tmp_path / 'a.pth')
    load_float_checkpoint(model, tmp_path / 'a.pth')
    assert seen == [7] and (model[0].weight == 5).all()


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    model = make_model()
    model.register_buffer('grid', torch.tensor([-2, 1], dtype=torch.int8))
    torch.save({'state_dict': randomised(model).state_dict(), 'meta': {'bits': 2}}, tmp_path / 'q.pth')
    return tmp_path / 'q.pth'


def test_quantized_goes_round_bit_for_bit(quantized: Path) -> None:
    model = make_model()
    model.register_buffer('grid', torch.zeros(2, dtype=torch.int8))
    load_quantized_checkpoint(model, quantized)
    assert_same(model, read_checkpoint(quantized)['state_dict'])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'bn.num_batches_tracked': None}, r'1 missing key \(first: bn.num_batches_tracked\)$'),
        ({'data_preprocessor.mean': torch.ones(1)}, r'1 unexpected key \(first: data_preprocessor.mean\)$'),
        (
            {'grid': torch.zeros(3, dtype=torch.int8)},
            r'1 key of another shape \(first: grid expected \(2,\) but got \(3,\)\)$',
        ),
        (
            {'grid': torch.zeros(2, dtype=torch.uint8)},
            r'1 key of another dtype \(first: grid expected torch.int8 but got torch.uint8\)$',
        ),
        (
            {'conv.bias': torch.zeros(3).half()},
            r'1 key of another dtype \(first: conv.bias expected torch.float32 but got',
        ),
    ],
)
def test_quantized_is_strict(quantized: Path, change: dict[str, Any], message: str) -> None:
    checkpoint = read_checkpoint(quantized)
    state = {**checkpoint['state_dict'], **change}
    torch.save({'state_dict': {name: value for name, value in state.items() if value is not None}}, quantized)
    model = make_model()
    model.register_buffer('grid', torch.zeros(2, dtype=torch.int8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r'^\S*q\.pth does not fit the quantized model: ' + message):
        load_quantized_checkpoint(model, quantized)
    assert_same(model, before)


class Points(Dataset[Any]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {'inputs': torch.full((2,), float(index))}


class Regression(BaseModel):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.bn = nn.Linear(2, 1), nn.BatchNorm1d(1)

    def forward(self, inputs: Any, mode: str = 'tensor') -> Any:
        output = self.bn(self.fc(torch.stack(inputs)))
        return {'loss': (output - 3).square().mean()} if mode == 'loss' else output


def test_averaged_weights_of_a_real_training(tmp_path: Path) -> None:
    """mmengine's own loop with its EMAHook: the average is loaded, not the raw weights."""
    torch.manual_seed(0)
    runner = Runner(
        model=Regression(),
        work_dir=str(tmp_path),
        train_dataloader={'dataset': Points(), 'batch_size': 4, 'sampler': {'type': 'DefaultSampler', 'shuffle': True}},
        train_cfg={'by_epoch': True, 'max_epochs': 2},
        optim_wrapper={'optimizer': {'type': 'Adam', 'lr': 0.1}},
        param_scheduler={'type': 'CosineAnnealingLR', 'T_max': 2},
        custom_hooks=[{'type': 'EMAHook', 'momentum': 0.3, 'update_buffers': True}],
        default_hooks={
            'checkpoint': {'type': 'CheckpointHook', 'interval': 1},
            'logger': {'type': 'LoggerHook', 'interval': 1},
        },
        default_scope='mmengine',
        experiment_name='averaged_weights',
        log_level='ERROR',
    )
    runner.train()
    averaged = next(hook for hook in runner.hooks if hasattr(hook, 'ema_model')).ema_model.module.state_dict()
    assert not torch.equal(averaged['fc.weight'], runner.model.state_dict()['fc.weight'])
    model = Regression()
    load_float_checkpoint(model, tmp_path / 'epoch_2.pth')
    assert_same(model, averaged)


@pytest.mark.skipif(not ZOO.is_dir(), reason=f'no {ZOO}; set MMBRECQ_DATA to the data folder beside it')
def test_real_models(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('mmpretrain')
    monkeypatch.setenv('MMBRECQ_DATA', str(ZOO.parent / 'data'))
    for name, other in (('resnet18_cifar10', 'mobilenetv2_cifar10'), ('mobilenetv2_cifar10', 'resnet18_cifar10')):
        cfg = Config.fromfile(ZOO / f'{name}.py')
        init_default_scope('mmpretrain')
        model = MODELS.build(cfg.model)
        load_float_checkpoint(model, ZOO / f'{name}.pth')
        assert_same(model, torch.load(ZOO / f'{name}.pth', weights_only=True)['state_dict'])
        with pytest.raises(
            CheckpointError, match=rf'{other}\.pth does not fit the model: \d+ missing keys .*, \d+ unexp'
        ):
            load_float_checkpoint(model, ZOO / f'{other}.pth')
