from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.registry import init_default_scope
from torch.utils.data import DataLoader

from mmbrecq.data.source import explain_data_error, explained_data_errors
from mmbrecq.errors import DataError

pytest.importorskip('mmpretrain')
from mmpretrain.datasets import CustomDataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    init_default_scope('mmpretrain')
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'broken.png').write_bytes(b'no image')
    return tmp_path


def raised_by_loader(folder: Path, num_workers: int, **load: Any) -> Exception:
    pipeline = [{'type': 'LoadImageFromFile', **load}, {'type': 'PackInputs'}]
    dataset = CustomDataset(data_root=str(folder), pipeline=pipeline, test_mode=True)
    with pytest.raises(Exception) as caught:
        list(DataLoader(dataset, num_workers=num_workers, collate_fn=pseudo_collate))
    return caught.value


@pytest.mark.parametrize('num_workers', [0, 1])
def test_damaged_image(folder: Path, num_workers: int) -> None:
    error = explain_data_error(raised_by_loader(folder, num_workers))
    assert isinstance(error, DataError)
    assert str(error) == f'images cannot be read: failed to load image: {folder}/a/broken.png'


@pytest.mark.parametrize('num_workers', [0, 1])
@pytest.mark.parametrize('backend', ['cv2', 'pillow'])
def test_empty_image(folder: Path, num_workers: int, backend: str) -> None:
    (folder / 'a' / 'broken.png').write_bytes(b'')
    error = explain_data_error(raised_by_loader(folder, num_workers, imdecode_backend=backend))
    assert str(error).startswith('images cannot be read: ') and '\n' not in str(error)


@pytest.mark.parametrize('num_workers', [0, 1])
def test_image_given_up_by_the_pipeline(folder: Path, num_workers: int) -> None:
    (folder / 'a' / 'broken.png').write_bytes(b'')
    error = explain_data_error(raised_by_loader(folder, num_workers, ignore_empty=True))
    assert str(error).startswith('images cannot be read: Test time pipline should not get `None`')


def test_empty_and_missing_folders(folder: Path) -> None:
    (folder / 'a' / 'broken.png').unlink()
    with pytest.raises(RuntimeError) as empty:
        CustomDataset(data_root=str(folder), data_prefix='')
    text = str(explain_data_error(empty.value))
    assert text.startswith('images cannot be read: Found 0 files in subfolders of: ') and f'{folder}/' in text
    with pytest.raises(FileNotFoundError) as missing:
        CustomDataset(data_root=str(folder / 'none'), data_prefix='')
    assert str(explain_data_error(missing.value)) == f'{folder}/none/ cannot be read: No such file or directory'
    with pytest.raises(FileNotFoundError) as missing:
        BaseDataset(ann_file=str(folder / 'none.json'))
    assert str(explain_data_error(missing.value)) == f'{folder}/none.json cannot be read: No such file or directory'


def test_other_errors_are_not_explained() -> None:
    for error in (ValueError('shape'), KeyError('img'), RuntimeError('CUDA out of memory'), OSError('no number')):
        assert explain_data_error(error) is None
    ours = DataError('image a.png cannot be read')
    assert explain_data_error(ours) is ours
    from_worker = DataError(
        'Caught DataError in DataLoader worker process 0.\n  File "x"\nmmbrecq.errors.DataError: image a'
    )
    assert str(explain_data_error(from_worker)) == 'image a'
    no_entry = PermissionError(13, 'Permission denied', 'a.png')
    assert str(explain_data_error(no_entry)) == 'a.png cannot be read: Permission denied'


def test_an_explained_error_passes_as_it_is() -> None:
    ours = DataError('image a.png cannot be read')
    with pytest.raises(DataError) as caught, explained_data_errors():
        raise ours
    # a cause of its own, which the tools follow to the end, would have none
    assert caught.value is ours and ours.__cause__ is None
    with pytest.raises(DataError) as caught, explained_data_errors():
        raise AssertionError('failed to load image: a.png')
    assert isinstance(caught.value.__cause__, AssertionError)
