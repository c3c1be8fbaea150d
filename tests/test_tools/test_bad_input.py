"""What bad input gets: one sentence that names the file, key or layer, a status, and nothing overwritten."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / 'configs' / 'demo' / 'resnet_digits.pth'
QUICK = ('calibration.num_samples=16', 'calibration.batch_size=16', 'evaluations=[]')
"""Bad input is found without an evaluation too."""


@pytest.fixture
def refuse(call: Any, finished: Any) -> Callable[..., str]:
    """The sentence by which a run is refused in a work dir that holds results, all of which stay as they are."""

    def run(config: Path, *options: str) -> str:
        before = finished.contents()
        error: str = call('ptq', config, *QUICK, *options, work_dir=finished.folder).error
        assert finished.contents() == before
        return error

    return run


def test_a_config_that_does_not_exist(refuse: Callable[..., str], tmp_path: Path) -> None:
    path = tmp_path / 'no.py'
    assert refuse(path) == f'{path}: expected a config file, but there is none'


@pytest.mark.parametrize(
    ('name', 'text'),
    [
        ('a.py', 'seed = (1'),
        ('a.py', "_base_ = ['no.py']"),
        ('a.py', 'seed = undefined'),
        ('a.json', '{'),
        ('a.txt', 'seed = 1'),
    ],
)
def test_a_config_that_does_not_parse(refuse: Callable[..., str], tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    assert refuse(path).startswith(f'{path}: the config cannot be read: ')


@pytest.mark.parametrize('key', ['float_checkpoint', 'quantizer', 'calibration', 'test_dataloader'])
def test_a_config_that_lacks_a_key(refuse: Callable[..., str], config: Any, key: str) -> None:
    path = config(f'{key} = None')
    assert refuse(path, f'{key}=None') == f"{path}: expected the key '{key}', but the config has none"


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('quantiser.preset=academic', "unknown key 'quantiser', did you mean 'quantizer'?"),
        ('quantizer=BRECQ', "expected 'quantizer' to be a dict, but got 'BRECQ'"),
        ('exporters=onnx', "expected 'exporters' to be a list, but got 'onnx'"),
        ('seed=one', "expected 'seed' to be an integer, but got 'one'"),
    ],
)
def test_a_key_of_the_wrong_kind(refuse: Callable[..., str], demo: Path, option: str, message: str) -> None:
    assert refuse(demo, option) == f'{demo}: {message}'


@pytest.mark.parametrize('option', ['quantizer.overrides=[dict(pattern="a",bits=4)]', 'seed=[(1]'])
def test_an_option_that_does_not_parse(refuse: Callable[..., str], demo: Path, option: str) -> None:
    assert refuse(demo, option) == f"expected --cfg-options as KEY=VALUE or KEY=[A,B], but got '{option}'"


@pytest.mark.parametrize(
    ('option', 'kind', 'valid'),
    [
        ('quantizer.type', 'quantizer', ['BRECQQuantizer']),
        ('reconstructor.type', 'reconstructor', ['BRECQReconstructor', 'QDropReconstructor']),
        ('reconstructor.loss.type', 'reconstruction loss', ['FisherLoss', 'MSELoss']),
        ('exporters.1.type', 'exporter', ['ONNXExporter', 'OpenVINOExporter']),
        ('quantizer.weight.observer.type', 'observer', ['MinMaxObserver', 'PercentileObserver']),
        ('quantizer.weight.rounding.type', 'fake quant', ['AdaRound', 'NearestRounding']),
        ('test_evaluator.type', 'metric', ['Accuracy', 'ConfusionMatrix']),
        ('test_dataloader.dataset.type', 'dataset', ['CustomDataset', 'ImageNet']),
        ('train_dataloader.dataset.type', 'dataset', ['CustomDataset', 'ImageNet']),
    ],
)
def test_an_unknown_type(refuse: Callable[..., str], demo: Path, option: str, kind: str, valid: list[str]) -> None:
    error = refuse(demo, f'{option}=NoSuchType')
    text, _, listed = error.partition(': expected one of ')
    assert text.endswith(f"unknown {kind} type 'NoSuchType'")
    assert set(valid) <= set(listed.split(', '))


def test_an_unknown_type_of_many(refuse: Callable[..., str], demo: Path) -> None:
    error = refuse(demo, 'model.backbone.type=ResNett')
    assert error.startswith(f"{demo}: unknown model type 'ResNett': expected one of ")
    assert 'the closest are ResNet, ' in error


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ('quantizer.bits=2', "unknown option 'bits' of BRECQQuantizer: expected weight or activation or preset or "),
        ('quantizer.weight.bit=2', "unknown option 'bit' of quantizer.weight: expected bits or per_channel or "),
        ('reconstructor.weights.iters=2', "unknown option 'iters' of reconstructor.weights: expected iterations or "),
        ('exporters=[ONNX]', "expected the config of an exporter to be a dict, but got 'ONNX'"),
        ('calibration.samples=2', "unknown option 'samples' of calibration: expected num_samples or seed or "),
        ('exporters.0.ops=2', "unknown option 'ops' of ONNXExporter: expected filename or opset"),
        ('evaluations=[all]', "expected evaluations to be among ['float', 'nearest', 'weights', 'quantized', "),
        ('quantizer.preset=best', "expected preset to be one of ['academic', 'onnxruntime', 'openvino', 'tensorrt'"),
        ('quantizer.granularity=all', "expected quantizer.granularity to be one of ['layer', 'block', 'stage', "),
        ('reconstructor.cache=ram', "expected reconstructor.cache to be one of ['auto', 'device', 'host', 'disk']"),
    ],
)
def test_an_unknown_option(refuse: Callable[..., str], demo: Path, option: str, message: str) -> None:
    assert refuse(demo, option).startswith(message)


def test_an_unknown_option_of_the_model(refuse: Callable[..., str], demo: Path) -> None:
    error = refuse(demo, 'model.backbone.depht=18')
    assert error == f"{demo}: ResNet.__init__() got an unexpected keyword argument 'depht'"


def test_a_checkpoint_of_another_model(refuse: Callable[..., str], demo: Path, config: Any) -> None:
    # a ResNet-34 has 16 blocks where the file has 8: 5 tensors to each of their two convolutions, counters apart
    error = refuse(demo, 'model.backbone.depth=34')
    assert error.startswith(f'{CHECKPOINT} does not fit the model: 80 missing keys (first: backbone.layer1.2.conv1')
    stages = 'num_stages=3, out_indices=(2,), strides=(1, 2, 2), dilations=(1, 1, 1)'
    error = refuse(config(f'model = dict(backbone=dict({stages}), head=dict(in_channels=64))'))
    assert error.startswith(f'{CHECKPOINT} does not fit the model: 25 unexpected keys (first: backbone.layer4.0.conv1')


def test_a_model_whose_parts_do_not_fit(refuse: Callable[..., str], config: Any) -> None:
    # without its neck the head gets a feature map
    error = refuse(config('model = dict(neck=None)'), 'evaluations=[float]')
    assert error.startswith('ImageClassifier does not run on images of 1 x 3 x 32 x 32: ')
    assert 'shapes cannot be multiplied' in error


@pytest.mark.parametrize('kept', [0.5, 0.999, 0.0])
def test_a_truncated_checkpoint(refuse: Callable[..., str], demo: Path, tmp_path: Path, kept: float) -> None:
    data = CHECKPOINT.read_bytes()
    path = tmp_path / 'cut.pth'
    path.write_bytes(data[: int(kept * len(data))])
    error = refuse(demo, f'float_checkpoint={path}')
    assert error.startswith(f'checkpoint {path} ({path.stat().st_size} bytes) is truncated or no checkpoint')


def test_a_missing_checkpoint(refuse: Callable[..., str], demo: Path, tmp_path: Path) -> None:
    path = tmp_path / 'no.pth'
    assert (
        refuse(demo, f'float_checkpoint={path}')
        == f'checkpoint {path} does not exist; expected a file or an http(s) URL'
    )


def test_weights_that_are_not_finite(refuse: Callable[..., str], demo: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    checkpoint['state_dict']['backbone.layer3.0.conv2.weight'][0, 0, 0, 0] = float('nan')
    path = tmp_path / 'nan.pth'
    torch.save(checkpoint, path)
    error = refuse(demo, f'float_checkpoint={path}')
    assert error == f'backbone.layer3.0.conv2.weight in {path} holds 1 non-finite of 9216 values'


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_missing_data_folder(refuse: Callable[..., str], folder_config: tuple[Path, Path], split: str) -> None:
    config, root = folder_config
    (root / split).rename(root / 'elsewhere')
    error = refuse(config)
    assert str(root / split) in error and ('does not exist' in error or 'cannot be read: No such file' in error)


@pytest.mark.parametrize('split', ['train', 'val'])
def test_an_empty_data_folder(refuse: Callable[..., str], folder_config: tuple[Path, Path], split: str) -> None:
    config, root = folder_config
    for file in (root / split).glob('*/*.png'):
        file.unlink()
    error = refuse(config)
    assert 'Found 0 files in' in error and str(root / split) in error


def test_fewer_calibration_images_than_asked_for(refuse: Callable[..., str], folder_config: tuple[Path, Path]) -> None:
    config, root = folder_config
    error = refuse(config, 'calibration.num_samples=41')
    assert error == f'expected at least 41 images for calibration, but got 40 in {root / "train"}'


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('split', ['train', 'val'])
def test_an_image_that_cannot_be_read(
    refuse: Callable[..., str], folder_config: tuple[Path, Path], split: str, workers: int
) -> None:
    config, root = folder_config
    file = sorted((root / split).glob('*/*.png'))[-1]
    file.write_bytes(file.read_bytes()[:40])
    options = (f'calibration.num_workers={workers}', f'test_dataloader.num_workers={workers}')
    error = refuse(config, 'evaluations=[float]', 'calibration.num_samples=40', *options)
    assert str(file.relative_to(root)) in error and 'cannot be read' in error


def test_calibration_data_that_is_not_finite(refuse: Callable[..., str], demo: Path) -> None:
    # a standard deviation of 0 makes NaN of every pixel that equals the mean
    error = refuse(demo, 'model.data_preprocessor.mean=[0,0,0]', 'model.data_preprocessor.std=[0,0,0]')
    assert error.startswith("expected finite pixels, but got NaN or infinity in 'digits/")


def test_a_pattern_that_matches_no_layer(refuse: Callable[..., str], config: Any) -> None:
    path = config("quantizer = dict(overrides=[dict(pattern='backbone.layer9.*', weight_bits=4)])")
    assert refuse(path) == (
        "expected quantizer.overrides[0].pattern to match a layer, but 'backbone.layer9.*' matches none of 21 "
        '(the first is backbone.conv1)'
    )
    assert refuse(path, 'quantizer.overrides=[]', 'quantizer.blocks=[Bottlenek]') == (
        "expected quantizer.blocks to name a module type or a path, but 'Bottlenek' matches none"
    )


@pytest.mark.parametrize('bits', [1, 9, 0, -4, 4.0, 'four'])
def test_bits_out_of_range(refuse: Callable[..., str], demo: Path, bits: Any) -> None:
    for key in ('weight', 'activation'):
        error = refuse(demo, f'quantizer.{key}.bits={bits}')
        assert error == f"expected quantizer.{key}.bits to be in 2..8 or 'float', but got {bits!r}"


def test_bits_of_an_override_out_of_range(refuse: Callable[..., str], config: Any) -> None:
    path = config("quantizer = dict(overrides=[dict(pattern='backbone.*', weight_bits=16)])")
    assert refuse(path) == "expected quantizer.overrides[0].weight_bits to be in 2..8 or 'float', but got 16"


def test_a_loss_that_stops_being_finite(call: Any, finished: Any, demo: Path) -> None:
    kept = finished.contents()
    outcome = call('ptq', demo, *QUICK, 'reconstructor.weights.bias_lr=1e30', work_dir=finished.folder)
    assert outcome.error == "the loss of unit 'backbone.conv1' is inf at iteration 1"
    assert_kept(finished, kept, {'reconstruction.pth'})


@pytest.mark.parametrize(('package', 'suffix'), [('openvino', '.xml'), ('onnxruntime', '.onnx'), ('onnx', '.onnx')])
def test_a_package_of_the_export_that_is_not_installed(
    refuse: Callable[..., str], call: Any, finished: Any, demo: Path, monkeypatch: pytest.MonkeyPatch, package: str,
    suffix: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)
    missing = f'but {package} is not installed; install it with: pip install "mmbrecq[deploy]"'
    # before the work, not after it, and before that of a search, too; OpenVINO's exporter takes onnx as well
    assert refuse(demo, 'search.budgets.size=0.1x').endswith(missing)
    assert refuse(demo).endswith(missing)
    assert call('test', demo, finished.folder / 'deploy' / f'model{suffix}').error.endswith(missing)


def test_a_disk_that_is_full_while_caching(
    call: Any, finished: Any, demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, count = finished.contents(), iter(range(100))

    def reserve(descriptor: int, offset: int, length: int) -> None:
        if next(count) == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'posix_fallocate', reserve)
    options = ('reconstructor.weights.iterations=2', 'reconstructor.cache=disk')
    error = call('ptq', demo, *QUICK, *options, work_dir=finished.folder).error
    assert error.startswith(f'{finished.folder} cannot hold ') and error.endswith('No space left on device')
    assert 'B of activations' in error
    assert_kept(finished, kept, {'reconstruction.pth'})
    done = torch.load(finished.folder / 'reconstruction.pth', weights_only=True)['meta']['units_done']
    assert 0 < len(done) < 10
    assert not list(finished.folder.glob('.*'))


def test_a_disk_too_small_for_the_cache_is_found_before_the_work(
    refuse: Callable[..., str], demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('mmbrecq.reconstruction.cache.shutil.disk_usage', lambda path: Usage())
    error = refuse(demo, 'reconstructor.cache=disk')
    assert error.startswith('expected room for ') and error.endswith(
        'use fewer calibration images, cache_dtype bfloat16 or another cache'
    )


class Usage:
    free = 0


def test_a_disk_that_is_full_while_saving(call: Any, finished: Any, demo: Path, full_disk: Any) -> None:
    kept = finished.contents()
    with full_disk(100_000):
        # no exporters: the rehearsal would write files of its own, in the system's folder for them
        options = ('exporters=[]', 'reconstructor.weights.iterations=2')
        outcome = call('ptq', demo, *QUICK, *options, work_dir=finished.folder)
    assert outcome.error == f'cannot write {finished.folder}/reconstruction.pth: File too large'
    assert_kept(finished, kept, {'reconstruction.pth'})
    assert not list(finished.folder.glob('.*'))


def test_a_disk_that_is_full_for_the_log_too(call: Any, finished: Any, demo: Path, full_disk: Any) -> None:
    kept = finished.contents()
    # the log is longer: what it loses is not worth a word of the logging module
    with full_disk(5000):
        error = call('ptq', demo, *QUICK, 'exporters=[]', work_dir=finished.folder).error
    assert error == f'cannot write {finished.folder}/report.html: File too large'
    assert_kept(finished, kept)


def test_a_work_dir_that_cannot_be_made(call: Any, demo: Path, tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('mine')
    for folder, reason in ((tmp_path / 'file', 'File exists'), (tmp_path / 'file' / 'below', 'Not a directory')):
        assert call('ptq', demo, work_dir=folder).error == f'work dir {folder} cannot be made: {reason}'
    assert (tmp_path / 'file').read_text() == 'mine'


def test_an_image_of_the_report_that_cannot_be_read(call: Any, folder_config: tuple[Path, Path]) -> None:
    """The first test image is one that the report draws, evaluated or not."""
    config, root = folder_config
    sorted((root / 'val').rglob('*.png'))[0].write_bytes(b'no image')
    assert 'cannot be read' in call('ptq', config, *QUICK).error


@pytest.mark.parametrize(('sent', 'status'), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interruption_keeps_what_was_saved(finished: Any, demo: Path, sent: signal.Signals, status: int) -> None:
    kept = finished.contents()
    options = ('reconstructor.weights.iterations=100', *QUICK)
    command = [sys.executable, str(ROOT / 'tools' / 'ptq.py'), str(demo), '--work-dir', str(finished.folder)]
    tool = subprocess.Popen(
        [*command, '--cfg-options', *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts what runs in its background deaf to Ctrl-C, and children inherit that
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert tool.stdout is not None
    for line in tool.stdout:
        if 'weights 3/10' in line:
            break
    time.sleep(0.1)
    tool.send_signal(sent)
    _, err = tool.communicate(timeout=60)
    assert tool.returncode == status
    assert err == 'interrupted: what was saved so far is in the work dir; --resume goes on with it\n'
    assert_kept(finished, kept, {'reconstruction.pth'})
    done = torch.load(finished.folder / 'reconstruction.pth', weights_only=True)['meta']['units_done']
    assert ['weights', 'backbone.layer1.0'] in [list(pair) for pair in done]
    assert not list(finished.folder.glob('.*'))


def assert_kept(finished: Any, before: dict[str, bytes], but: set[str] = frozenset()) -> None:  # type: ignore[assignment]
    """What a run that began to work must not touch: the results of another one."""
    after = finished.contents()
    results = {
        'quantized.pth',
        'reconstruction.pth',
        'notes.txt',
        *(name for name in before if name.startswith('deploy')),
    }
    for name in results - but:
        assert after[name] == before[name], name
