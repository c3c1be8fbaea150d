from pathlib import Path

import pytest
import torch

from mmbrecq import threads
from mmbrecq.threads import limit_threads, processors


def group(root: Path, path: str, files: dict[str, str]) -> None:
    folder = root / path
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)


@pytest.fixture
def sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.os, 'sched_getaffinity', lambda _: set(range(16)), raising=False)


@pytest.mark.usefixtures('sixteen')
@pytest.mark.parametrize(
    ('groups', 'membership', 'expected'),
    [
        ({'': {'cpu.max': 'max 100000\n'}}, '0::/\n', 16),
        ({'': {'cpu.max': '150000 100000\n'}}, '0::/\n', 2),
        # the tightest of all around it counts
        ({'a': {'cpu.max': '300000 100000\n'}, 'a/b': {'cpu.max': '800000 100000\n'}}, '0::/a/b\n', 3),
        # the path of the host is not there within a container
        ({'': {'cpu.max': '400000 100000\n'}}, '0::/docker/1234\n', 4),
        ({'cpu,cpuacct/x': {'cpu.cfs_quota_us': '200000\n', 'cpu.cfs_period_us': '100000\n'}}, '4:cpu,cpuacct:/x\n', 2),
        ({'cpu/x': {'cpu.cfs_quota_us': '-1\n', 'cpu.cfs_period_us': '100000\n'}}, '7:memory:/x\n4:cpu:/x\n', 16),
        ({}, '', 16),
    ],
)
def test_processors_of_a_control_group(
    tmp_path: Path, groups: dict[str, dict[str, str]], membership: str, expected: int
) -> None:
    for path, files in groups.items():
        group(tmp_path / 'cgroup', path, files)
    (tmp_path / 'self').write_text(membership)
    assert processors(tmp_path / 'cgroup', tmp_path / 'self') == expected


def test_affinity_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.os, 'sched_getaffinity', lambda _: {3, 5}, raising=False)
    assert processors(tmp_path, tmp_path / 'none') == 2


@pytest.mark.usefixtures('sixteen')
@pytest.mark.parametrize(('given', 'expected'), [(None, 1), ('7', 2)])
def test_the_limit_is_torchs_unless_the_environment_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str | None, expected: int
) -> None:
    before = torch.get_num_threads()
    group(tmp_path, '', {'cpu.max': '50000 100000'})
    (tmp_path / 'self').write_text('0::/\n')
    monkeypatch.delenv('OMP_NUM_THREADS', raising=False)
    if given is not None:
        monkeypatch.setenv('OMP_NUM_THREADS', given)
    try:
        torch.set_num_threads(2)
        monkeypatch.setattr(threads, 'processors', lambda: processors(tmp_path, tmp_path / 'self'))
        limit_threads()
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
