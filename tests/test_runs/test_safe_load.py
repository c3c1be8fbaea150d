from __future__ import annotations

import os
import pickle
import sys
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer, MessageHub

from mmbrecq.errors import CheckpointError, DependencyError
from mmbrecq.runs.checkpoint import Dropped, read_checkpoint

ZOO = Path(os.environ.get('MMBRECQ_DATA', Path(__file__).parents[3] / 'shared' / 'data')).parent / 'zoo'


class Evil:
    """Leaves a file behind when a careless reader unpickles it."""

    def __init__(self, call: Any, *args: Any) -> None:
        self.reduced = (call, args)

    def __reduce__(self) -> Any:
        return self.reduced


@pytest.fixture
def training_checkpoint(tmp_path: Path) -> Path:
    """What mmengine's CheckpointHook writes: weights, a message hub of buffers, NumPy scalars and an optimizer."""
    hub = MessageHub.get_instance('a training')
    for value in (3.0, 1.0, 2.0):
        hub.update_scalar('train/loss', np.float32(value))
    hub.update_info('dataset_meta', {'palette': np.arange(6).reshape(2, 3), 'classes': ('a', 'b')})
    checkpoint = {
        'meta': {'epoch': 3, 'best': np.float64(0.5), 'seed': np.int64(7), 'extra': ConfigDict(a={'b': 1})},
        'state_dict': OrderedDict(weight=torch.arange(4.0)),
        'message_hub': hub.state_dict(),
        'optimizer': {'state': defaultdict(dict), 'param_groups': [{'lr': np.float16(0.25), 'ok': np.bool_(True)}]},
    }
    torch.save(checkpoint, tmp_path / 'epoch_3.pth')
    return tmp_path / 'epoch_3.pth'


def test_mmengines_training_checkpoint(training_checkpoint: Path) -> None:
    with pytest.raises(pickle.UnpicklingError, match='Weights only load failed'):
        torch.load(training_checkpoint, weights_only=True)
    checkpoint = read_checkpoint(training_checkpoint)
    assert checkpoint['state_dict']['weight'].tolist() == [0, 1, 2, 3]
    meta, hub = checkpoint['meta'], checkpoint['message_hub']
    assert meta['epoch'] == 3 and meta['extra'] == {'a': {'b': 1}}
    assert hub['runtime_info']['dataset_meta']['classes'] == ('a', 'b')
    dropped = [meta['best'], hub['log_scalars']['train/loss'], hub['runtime_info']['dataset_meta']['palette']]
    assert all(isinstance(value, Dropped) and not vars(value) for value in dropped)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(training_checkpoint, weights_only=True)  # the wider list does not outlive the call


@pytest.mark.parametrize('module', ['numpy.core', 'numpy._core'])
def test_files_of_either_numpy(training_checkpoint: Path, tmp_path: Path, module: str) -> None:
    names = (b'numpy._core.multiarray', b'numpy.core.multiarray')
    path = tmp_path / 'renamed.pth'
    torch.save(torch.load(training_checkpoint, weights_only=False), path, _use_new_zipfile_serialization=False)
    buffer = path.read_bytes()  # without a zip's checksum around it
    for name in names:
        buffer = buffer.replace(name, f'{module}.multiarray'.encode())
    path.write_bytes(buffer)
    assert f'{module}.multiarray'.encode() in path.read_bytes()
    assert isinstance(read_checkpoint(path)['meta']['best'], Dropped)


@pytest.mark.parametrize(
    ('call', 'name'),
    [
        ((os.system, 'touch {mark}'), r'\w+\.system'),
        ((eval, "open('{mark}', 'w')"), r'(?:builtins\.)?eval'),
        ((setattr, HistoryBuffer, 'mean', 'text'), 'setattr'),
    ],
)
def test_a_file_that_asks_for_more_is_refused(tmp_path: Path, call: tuple[Any, ...], name: str) -> None:
    mark = tmp_path / 'ran'
    args = [arg.format(mark=mark) if isinstance(arg, str) else arg for arg in call[1:]]
    torch.save({'state_dict': {'weight': torch.ones(1)}, 'meta': Evil(call[0], *args)}, tmp_path / 'evil.pth')
    with pytest.raises(CheckpointError, match=rf'^checkpoint .*evil\.pth asks for {name}, which is not on the list'):
        read_checkpoint(tmp_path / 'evil.pth')
    assert not mark.exists()


def test_attributes_are_not_read(tmp_path: Path) -> None:
    torch.save({'state_dict': {}, 'meta': Evil(getattr, 'text', 'format')}, tmp_path / 'a.pth')
    assert isinstance(read_checkpoint(tmp_path / 'a.pth')['meta'], Dropped)


def test_arrays_of_objects_are_not_built(tmp_path: Path) -> None:
    torch.save({'a': np.array([None, {}], dtype=object)}, tmp_path / 'objects.pth')
    assert isinstance(read_checkpoint(tmp_path / 'objects.pth')['a'], Dropped)


@pytest.mark.parametrize(('kept', 'zipped'), [(0.5, True), (0.99, True), (0.5, False), (0, True), (0.01, False)])
def test_truncated(training_checkpoint: Path, tmp_path: Path, kept: float, zipped: bool) -> None:
    path = tmp_path / 'cut.pth'
    torch.save({'state_dict': {'weight': torch.rand(2000)}}, path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()[: int(path.stat().st_size * kept)]
    path.write_bytes(content)
    expected = rf'^checkpoint .*cut\.pth \({len(content)} bytes\) is truncated or no checkpoint: torch.load says .+$'
    with pytest.raises(CheckpointError, match=expected) as caught:
        read_checkpoint(path)
    assert '\n' not in str(caught.value) and 'weights_only' not in str(caught.value)


@pytest.mark.parametrize('content', [b'<html>Not found</html>', b'\x89PNG\r\n', bytes(range(256)) * 8, b'PK\x03\x04 x'])
def test_not_a_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / 'a.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match=r'a\.pth.* is truncated or no checkpoint') as caught:
        read_checkpoint(tmp_path / 'a.pth')
    assert '\n' not in str(caught.value)


def test_missing_folder_and_other_type(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'^checkpoint .*none\.pth does not exist; expected a file or an http'):
        read_checkpoint(tmp_path / 'none.pth')
    with pytest.raises(CheckpointError, match=r'^checkpoint .* is a folder; expected a file'):
        read_checkpoint(tmp_path)
    torch.save([torch.ones(1)], tmp_path / 'list.pth')
    with pytest.raises(CheckpointError, match=r'^expected .*list\.pth to hold a dict of weights, but got list$'):
        read_checkpoint(tmp_path / 'list.pth')


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for variable in ('http_proxy', 'HTTP_PROXY'):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    monkeypatch.setattr(SimpleHTTPRequestHandler, 'log_message', lambda *args: None)
    (tmp_path / 'www').mkdir()
    httpd = ThreadingHTTPServer(('127.0.0.1', 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path / 'www')))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{httpd.server_port}'
    httpd.shutdown()
    httpd.server_close()


def test_url_is_downloaded_once(tmp_path: Path, server: str) -> None:
    torch.save({'state_dict': {'weight': torch.ones(2)}}, tmp_path / 'www' / 'resnet-0a1b2c3d.pth')
    for _ in range(2):
        checkpoint = read_checkpoint(f'{server}/resnet-0a1b2c3d.pth')
        assert checkpoint['state_dict']['weight'].tolist() == [1, 1]
        (tmp_path / 'www' / 'resnet-0a1b2c3d.pth').unlink(missing_ok=True)
    assert (tmp_path / 'cache' / 'hub' / 'checkpoints' / 'resnet-0a1b2c3d.pth').is_file()


def test_url_that_fails(server: str) -> None:
    with pytest.raises(CheckpointError, match=r'^cannot download http://.*/none\.pth to .*: HTTP Error 404') as caught:
        read_checkpoint(f'{server}/none.pth')
    assert '\n' not in str(caught.value)
    with pytest.raises(CheckpointError, match=r'^cannot download http://127.0.0.1:9/a\.pth to .*: .*refused'):
        read_checkpoint('http://127.0.0.1:9/a.pth')


@pytest.mark.skipif(not ZOO.is_dir(), reason=f'no {ZOO}; set MMBRECQ_DATA to the data folder beside it')
@pytest.mark.parametrize('name', ['resnet18_cifar10', 'retinanet_r18_bccd', 'faster_rcnn_r18_bccd', 'yolox_bccd'])
def test_checkpoints_of_real_trainings(name: str) -> None:
    checkpoint = read_checkpoint(ZOO / f'{name}.pth')
    weights = checkpoint['state_dict'].values()
    assert sum(weight.numel() for weight in weights) * 4 == pytest.approx((ZOO / f'{name}.pth').stat().st_size, rel=0.3)


@pytest.mark.parametrize('name', ['weights.safetensors', 'a1b2c3'])
def test_a_file_of_safetensors_whatever_its_name(tmp_path: Path, name: str) -> None:
    safetensors = pytest.importorskip('safetensors.torch')
    weights = {'weight': torch.arange(6.0).reshape(2, 3), 'half': torch.ones(2, dtype=torch.bfloat16)}
    safetensors.save_file(weights, tmp_path / name)
    found = read_checkpoint(tmp_path / name)
    assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=f'{name} .{len(data) - 1} bytes. is truncated or not of safetensors: '):
        read_checkpoint(tmp_path / name)


def test_safetensors_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / 'weights.safetensors').touch()
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    with pytest.raises(DependencyError, match='safetensors is not installed; .*: pip install safetensors$'):
        read_checkpoint(tmp_path / 'weights.safetensors')
