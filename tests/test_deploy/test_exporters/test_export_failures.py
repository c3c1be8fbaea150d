from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from small_models import conv, images, net, packed, residual
from torch import Tensor, nn

from mmbrecq.deploy.exporters import ONNXExporter, OpenVINOExporter
from mmbrecq.deploy.exporters.base import BaseExporter
from mmbrecq.errors import DependencyError, ExportError, StorageError
from mmbrecq.quantizers import QuantizedModel

EXPORTERS = [ONNXExporter, OpenVINOExporter]


def broken() -> QuantizedModel:
    """A model whose file breaks rule C1."""
    model = packed(residual(), 'openvino')
    with torch.no_grad():
        model.image_graph.quantizers['activation_quantizers.inputs'].scale.fill_(float('nan'))
    return model


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize('exporter', EXPORTERS)
def test_file_that_breaks_a_rule_is_not_left_behind(tmp_path: Path, exporter: type[BaseExporter]) -> None:
    path = tmp_path / f'model{exporter.suffix}'
    with pytest.raises(ExportError, match=f"^{re.escape(str(path))} breaks the rules of preset 'openvino': C1 "):
        exporter().export(broken().image_graph, images(2), tmp_path)
    assert content(tmp_path) == {}


@pytest.mark.parametrize('exporter', EXPORTERS)
def test_earlier_export_survives_one_that_fails(tmp_path: Path, exporter: type[BaseExporter]) -> None:
    exporter().export(packed(residual(), 'openvino').image_graph, images(2), tmp_path)
    before = content(tmp_path)
    with pytest.raises(ExportError):
        exporter().export(broken().image_graph, images(2), tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize('exporter', EXPORTERS)
def test_export_replaces_an_earlier_one(tmp_path: Path, exporter: type[BaseExporter]) -> None:
    exporter().export(packed(residual(), 'openvino').image_graph, images(2), tmp_path)
    before = content(tmp_path)
    exporter().export(packed(residual(), 'openvino', 3, 8).image_graph, images(2), tmp_path)
    after = content(tmp_path)
    assert after.keys() == before.keys() and after != before


@pytest.mark.parametrize('exporter', EXPORTERS)
def test_operator_without_onnx_form(
    tmp_path: Path, exporter: type[BaseExporter], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = packed(residual(), 'openvino')

    def forward(x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(x)

    monkeypatch.setattr(model.image_graph.compiled, 'forward', forward)
    with pytest.raises(ExportError, match='^the graph cannot be written as ONNX: .*bessel_j0'):
        exporter().export(model.image_graph, images(2), tmp_path)
    assert content(tmp_path) == {}


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x + 1

    @staticmethod
    def symbolic(g: Any, x: Any) -> Any:
        return g.op('Shift', x, by_i=x)


class _Shifted(nn.Module):
    """Cannot be traced."""

    def forward(self, x: Tensor) -> Any:
        if type(x) is not Tensor:
            raise TypeError('expected a tensor')
        return _Shift.apply(x)


def test_an_argument_that_is_no_constant_is_told_with_what_is_one_call(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = net(lambda self, x: self.last(self.odd(self.conv(x))), conv=conv(), odd=_Shifted(), last=conv(4, 2))
    message = (
        r'written as ONNX: an operation computes an argument that its ONNX form has as a constant; '
        r"'backbone.odd' is one call \(_Shifted cannot be traced: .*\)$"
    )
    prepared = packed(model, 'openvino')
    with pytest.raises(ExportError, match=message):
        ONNXExporter().export(prepared.image_graph, images(2), tmp_path)
    assert capfd.readouterr().out == ''


def test_graph_that_openvino_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path) -> None:
        raise RuntimeError('unsupported operation\nat some line')

    monkeypatch.setattr(openvino, 'convert_model', refuse)
    with pytest.raises(ExportError, match='^OpenVINO cannot convert the graph: unsupported operation$'):
        OpenVINOExporter().export(packed(residual(), 'openvino').image_graph, images(2), tmp_path)
    assert content(tmp_path) == {}


@pytest.mark.parametrize('package', ['onnx', 'openvino'])
def test_what_openvino_takes_is_not_installed(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DependencyError, match=f'{package} is not installed; install it with: pip install '):
        OpenVINOExporter()


@pytest.mark.parametrize('exporter', EXPORTERS)
def test_file_in_the_place_of_the_folder(tmp_path: Path, exporter: type[BaseExporter]) -> None:
    folder = tmp_path / 'deploy'
    folder.write_text('mine')
    with pytest.raises(StorageError, match=f'^cannot write {re.escape(str(folder))}/model.*: '):
        exporter().export(packed(residual(), 'openvino').image_graph, images(2), folder)
    assert folder.read_text() == 'mine'


def test_disk_without_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Path, 'write_bytes', full)
    message = f'cannot write {tmp_path / "model.onnx"}: No space left on device'
    with pytest.raises(StorageError, match=f'^{re.escape(message)}$'):
        ONNXExporter().export(packed(residual(), 'onnxruntime').image_graph, images(2), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_layer_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is held against the number of layers that the torch model has."""
    model = packed(residual(), 'openvino')
    weight = np.float32(model.model.backbone.down.weight.detach())
    torch.nn.utils.parametrize.remove_parametrizations(model.model.backbone.down, 'weight', leave_parametrized=True)
    assert np.array_equal(model.model.backbone.down.weight.detach(), weight)
    with pytest.raises(ExportError, match='C5 .*: expected 5 quantized convolution and linear layers, but got 4'):
        ONNXExporter().export(model.image_graph, images(2), tmp_path)


def test_weight_of_more_bits_is_noticed(tmp_path: Path) -> None:
    model = packed(residual(), 'openvino', 2, 8)
    codes = dict(model.model.named_parameters())['backbone.conv1.parametrizations.weight.original0']
    with torch.no_grad():
        codes[0, 0, 0, 0] = 100
    with pytest.raises(ExportError, match=r'C6 /conv1/.*: expected integers in -2\.\.1, but got -1\.\.100'):
        ONNXExporter().export(model.image_graph, images(2), tmp_path)


def test_activation_of_more_bits_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(residual(), 'onnxruntime', 8, 4)
    monkeypatch.setattr(model.image_graph.quantizers['activation_quantizers.backbone_relu1'], '_clip', lambda: None)
    with pytest.raises(ExportError, match=r'C7 /backbone_relu1/.*: expected the integers 0\.\.15, but got 0\.\.255'):
        ONNXExporter().export(model.image_graph, images(2), tmp_path)
