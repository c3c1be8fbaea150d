"""Files that cannot be checked, the error that stops an export, and the command."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import graphs
import numpy as np
import onnx
import pytest

from mmbrecq.deploy.verify import PRESETS, RULES, ExpectedQuantization, Violation, check_file, verify_file
from mmbrecq.errors import ConfigError, DependencyError, ExportError


def test_table_of_rules() -> None:
    assert list(RULES) == [f'{c}{i}' for c, n in zip('CTOV', (9, 6, 3, 7), strict=True) for i in range(1, n + 1)]
    assert all(rule.onnx or rule.ir for rule in RULES.values())
    assert all(rule.description and rule.source for rule in RULES.values())
    assert set(PRESETS) == {'academic', 'onnxruntime', 'openvino', 'tensorrt'}


def test_unknown_preset_lists_the_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="preset of academic, onnxruntime, openvino, tensorrt, but got 'ort'"):
        verify_file(tmp_path / 'net.onnx', 'ort')


@pytest.mark.parametrize('content', [b'', b'not a model', bytes(range(256))])
@pytest.mark.parametrize(('suffix', 'kind'), [('.onnx', 'an ONNX model'), ('.xml', 'an OpenVINO IR')])
def test_unreadable_file(tmp_path: Path, content: bytes, suffix: str, kind: str) -> None:
    path = tmp_path / f'net{suffix}'
    path.write_bytes(content)
    with pytest.raises(ExportError, match=f'net{suffix}: expected {kind}, but could not read it') as error:
        verify_file(path, 'academic')
    assert '\n' not in str(error.value)


def test_truncated_file(tmp_path: Path) -> None:
    path = graphs.save(graphs.chain(), tmp_path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ExportError, match='could not read it'):
        verify_file(path, 'academic')


def test_missing_file_and_other_suffix(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r'net\.onnx: expected an exported file, but there is none'):
        verify_file(tmp_path / 'net.onnx', 'academic')
    with pytest.raises(ExportError, match=r"expected an \.onnx or \.xml file, but got suffix '\.pth'"):
        verify_file(tmp_path / 'net.pth', 'academic')


def test_control_flow_is_refused(tmp_path: Path) -> None:
    model = graphs.chain()
    branch = onnx.helper.make_graph([onnx.helper.make_node('Identity', ['x'], ['i'])], 'branch', [], [])
    graphs.add_tensor(model, 'yes', np.array(True))
    model.graph.node.append(
        onnx.helper.make_node('If', ['yes'], ['o'], name='choice', then_branch=branch, else_branch=branch)
    )
    with pytest.raises(ExportError, match=r"expected no control flow, but got node 'choice' \(If\)"):
        verify_file(graphs.save(model, tmp_path), 'academic')


@pytest.mark.parametrize(('suffix', 'package'), [('.onnx', 'onnx'), ('.xml', 'openvino')])
def test_missing_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, package: str) -> None:
    (tmp_path / f'net{suffix}').touch()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError, match=rf'{package} is not installed; .*: pip install "mmbrecq\[deploy\]"'):
        verify_file(tmp_path / f'net{suffix}', 'academic')


def test_check_file_names_the_first_and_counts_the_others(tmp_path: Path) -> None:
    path = graphs.save(graphs.chain(), tmp_path)
    check_file(path, 'onnxruntime', ExpectedQuantization(3))
    with pytest.raises(ExportError, match=r"rules of preset 'tensorrt': T1 in_Q: expected int8.*; and 7 more$"):
        check_file(path, 'tensorrt')


def test_unnamed_nodes_are_known_by_their_output(tmp_path: Path) -> None:
    model = graphs.chain()
    graphs.set_tensor(model, 'a1_scale', np.float32(0))
    for node in model.graph.node:
        node.name = ''
    violations = verify_file(graphs.save(model, tmp_path), 'academic')
    assert violations[0] == Violation('C1', 'a1_Q_out', 'expected finite scales > 0, but got 0')


@pytest.fixture(scope='module')
def tool() -> ModuleType:
    path = Path(__file__).parents[3] / 'tools' / 'verify.py'
    spec = importlib.util.spec_from_file_location('verify_tool', path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tool_status_and_output(tmp_path: Path, tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(graphs.save(graphs.chain(), tmp_path))
    assert tool.main([path, '--preset', 'openvino']) == 0
    assert 'no violation(s) of the rules of preset openvino (C1, C2,' in capsys.readouterr().out
    assert tool.main([path, '--preset', 'tensorrt']) == 1
    assert capsys.readouterr().out.splitlines()[0] == 'T1 in_Q: expected int8, but got integers of 0..255'
    with pytest.raises(ExportError, match='expected an exported file, but there is none'):
        tool.main([str(tmp_path / 'none.onnx'), '--preset', 'academic'])


def test_tool_lists_rules_and_asks_for_a_preset(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(['--list-rules']) == 0
    assert len(capsys.readouterr().out.splitlines()) == len(RULES)
    assert tool.main(['--list-rules', '--preset', 'tensorrt']) == 0
    assert len(capsys.readouterr().out.splitlines()) == 15
    for argv in (['net.onnx'], ['net.onnx', '--preset', 'ort']):
        with pytest.raises(SystemExit) as stop:
            tool.main(argv)
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert all(preset in message for preset in PRESETS)
