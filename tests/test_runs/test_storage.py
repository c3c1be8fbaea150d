from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mmbrecq.errors import StorageError
from mmbrecq.runs.storage import replacing, save_atomic, write_text_atomic

LIMIT = 100_000
TOO_LARGE = {'weight': torch.zeros(LIMIT)}


def test_saves_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / 'new' / 'folder' / 'a.pth'
    for value in (1.0, 2.0):
        save_atomic({'weight': torch.full((3,), value)}, path)
        assert torch.load(path, weights_only=True)['weight'].tolist() == [value] * 3
    assert os.listdir(path.parent) == ['a.pth']


def test_text_is_written_as_it_is(tmp_path: Path) -> None:
    write_text_atomic('Größe\r\nµ\n', tmp_path / 'report.html')
    assert (tmp_path / 'report.html').read_bytes() == b'Gr\xc3\xb6\xc3\x9fe\r\n\xc2\xb5\n'
    # As open() would leave it: readable by others where the umask says so
    (tmp_path / 'plain').touch()
    assert (tmp_path / 'report.html').stat().st_mode == (tmp_path / 'plain').stat().st_mode


def test_a_write_that_fails_leaves_the_previous_file(tmp_path: Path, full_disk: Any) -> None:
    path = tmp_path / 'quantized.pth'
    save_atomic({'weight': torch.ones(2)}, path)
    with full_disk(LIMIT), pytest.raises(StorageError, match=r'^cannot write .*quantized\.pth: File too large$'):
        save_atomic(TOO_LARGE, path)
    assert torch.load(path, weights_only=True)['weight'].tolist() == [1, 1]
    write_text_atomic('before', tmp_path / 'summary.json')
    with full_disk(LIMIT), pytest.raises(StorageError, match=r'^cannot write .*summary\.json: File too large$'):
        write_text_atomic('x' * 2 * LIMIT, tmp_path / 'summary.json')
    assert (tmp_path / 'summary.json').read_text() == 'before'
    assert sorted(os.listdir(tmp_path)) == ['quantized.pth', 'summary.json']


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='the system has no /dev/full')
def test_no_space_left(tmp_path: Path) -> None:
    path = tmp_path / 'a.pth'
    path.write_bytes(b'before')
    expected = r'^cannot write .*a\.pth: No space left on device$'
    with pytest.raises(StorageError, match=expected), replacing(path) as partial:
        partial.symlink_to('/dev/full')
        partial.write_bytes(bytes(LIMIT))
    assert path.read_bytes() == b'before' and os.listdir(tmp_path) == ['a.pth']


def test_a_file_in_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / 'work_dir').write_text('a file')
    with pytest.raises(StorageError, match=r'^cannot write .*a\.pth: (File exists|Not a directory)$'):
        save_atomic({}, tmp_path / 'work_dir' / 'a.pth')
    with pytest.raises(StorageError, match=r'^cannot write .*b\.pth: Not a directory$'):
        save_atomic({}, tmp_path / 'work_dir' / 'below' / 'b.pth')


def test_a_folder_in_the_place_of_the_file(tmp_path: Path) -> None:
    (tmp_path / 'a.pth' / 'kept').mkdir(parents=True)
    with pytest.raises(StorageError, match=r'^cannot write .*a\.pth: Is a directory$'):
        save_atomic({}, tmp_path / 'a.pth')
    assert os.listdir(tmp_path) == ['a.pth']


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match=r'^cannot write .*a\.pth: Permission denied$'):
        save_atomic({}, tmp_path / 'a.pth')


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError('another one'), ValueError('no')])
def test_other_errors_pass_and_leave_nothing(tmp_path: Path, error: Any) -> None:
    path = tmp_path / 'a.txt'
    path.write_text('before')
    with pytest.raises(error if isinstance(error, type) else type(error)), replacing(path) as partial:
        partial.write_text('half')
        raise error
    assert path.read_text() == 'before' and os.listdir(tmp_path) == ['a.txt']
