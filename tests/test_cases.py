"""Acceptance: small models of kinds that go wrong, kept beside the checkout, each by the contract written with them."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import mmbrecq
from mmbrecq.errors import MMBrecqError

DATA = Path(os.environ.get('MMBRECQ_DATA', Path(__file__).resolve().parents[2] / 'shared' / 'data'))
CASES = DATA.parent / 'cases' / 'models.py'
PRESETS = ('openvino', 'onnxruntime', 'tensorrt')


def load_cases() -> dict[str, Any]:
    if not CASES.is_file():
        return {}
    spec = importlib.util.spec_from_file_location('shared_cases', CASES)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.CASES)


@pytest.mark.skipif(not CASES.is_file(), reason=f'there is no {CASES}')
@pytest.mark.parametrize(('name', 'preset'), [(name, PRESETS[i % len(PRESETS)]) for i, name in enumerate(load_cases())])
def test_a_case_is_right_or_refused(name: str, preset: str, tmp_path: Path) -> None:
    build = load_cases()[name]
    images = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    try:
        quantized = mmbrecq.quantize(build(), images, preset=preset, method='nearest')
    except MMBrecqError as error:
        assert 20 < len(str(error)) < 400 and '\n' not in str(error)
        return
    with torch.no_grad():
        wanted = build()(images.clone())
    error = float((quantized(images.clone()) - wanted).square().mean() / wanted.var(0).mean())
    assert error < 0.06
    quantized.export(tmp_path / ('case.xml' if preset == 'openvino' else 'case.onnx'), images)
    assert max(deviation.error for deviation in quantized.deviations) < 1e-4
