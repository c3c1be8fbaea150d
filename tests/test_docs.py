"""The pages in docs/ say what the code does: their examples run, and their tables are the code's."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope

from mmbrecq.building import build
from mmbrecq.data.images import CalibrationOptions
from mmbrecq.deploy.exporters import ONNXExporter, OpenVINOExporter
from mmbrecq.deploy.verify import RULES
from mmbrecq.engine.config import KEYS, NEEDED
from mmbrecq.engine.ptq_loop import EVALUATIONS
from mmbrecq.fake_quants.weight import AdaRound
from mmbrecq.mixed_precision.costs.measured import MeasuredLatency
from mmbrecq.mixed_precision.costs.models import BitSerialAccelerator, LatencyTable
from mmbrecq.mixed_precision.search.bits import SearchOptions
from mmbrecq.mixed_precision.search.genetic import GeneticSearcher
from mmbrecq.mixed_precision.search.integer import IntegerProgram
from mmbrecq.observers import HistogramObserver, MovingAverageObserver, MSEObserver, PercentileObserver
from mmbrecq.presets import PRESETS
from mmbrecq.quantizers.brecq import BRECQQuantizer
from mmbrecq.quantizers.options import ActivationOptions, FallbackOptions, Override, WeightOptions
from mmbrecq.quantizers.quantized_model import QuantizedModel
from mmbrecq.reconstruction import (
    BRECQReconstructor,
    FisherLoss,
    FisherLowRankLoss,
    NearestReconstructor,
    QDropReconstructor,
    StageOptions,
)
from mmbrecq.registry import EXPORTERS, QUANTIZERS, RECONSTRUCTORS

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / 'docs'
REFERENCE = {
    'Quantizer: `BRECQQuantizer`': BRECQQuantizer,
    '`quantizer.weight`': WeightOptions,
    '`quantizer.activation`': ActivationOptions,
    '`quantizer.overrides`': Override,
    '`quantizer.fallback`': FallbackOptions,
    'Rounding: `AdaRound`': AdaRound,
    '`MovingAverageObserver`': MovingAverageObserver,
    '`PercentileObserver`': PercentileObserver,
    '`MSEObserver`': MSEObserver,
    '`HistogramObserver`': HistogramObserver,
    'Reconstructor: `BRECQReconstructor`': BRECQReconstructor,
    'Reconstructor: `QDropReconstructor`': QDropReconstructor,
    'Reconstructor: `NearestReconstructor`': NearestReconstructor,
    'Passes': StageOptions,
    'Loss: `FisherLoss`': FisherLoss,
    'Loss: `FisherLowRankLoss`': FisherLowRankLoss,
    '`search`': SearchOptions,
    'Searcher: `GeneticSearcher`': GeneticSearcher,
    'Searcher: `IntegerProgram`': IntegerProgram,
    'Cost model: `LatencyTable`': LatencyTable,
    'Cost model: `MeasuredLatency`': MeasuredLatency,
    'Cost model: `BitSerialAccelerator`': BitSerialAccelerator,
    '`calibration`': CalibrationOptions,
    'Exporter: `ONNXExporter`': ONNXExporter,
    'Exporter: `OpenVINOExporter`': OpenVINOExporter,
}
SUPPLIED = {'qtype', 'shape'}
"""Arguments that the quantizer gives, not a config."""


def read(page: str) -> str:
    return (DOCS / page).read_text(encoding='utf-8')


def sections(page: str) -> dict[str, str]:
    """Text below every heading, by the heading's own text."""
    parts = re.split(r'^#+ (.+)$', read(page), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> Iterator[list[str]]:
    """Cells of the table rows of a section, without its head."""
    lines = [line for line in text.splitlines() if line.startswith('|')]
    for line in lines[2:]:
        yield [cell.strip() for cell in line.strip('|').split(' | ')]


def examples() -> dict[str, str]:
    """Whole configs of the guide, by the path that their first line names."""
    blocks = re.findall(r'```python\n# (configs/\S+\.py)\n(.*?)```', read('write_a_config.md'), re.DOTALL)
    return dict(blocks)


def example_config(path: str, folder: Path) -> Config:
    """The example as a file at its path in a copy of ``configs/``."""
    shutil.copytree(ROOT / 'configs' / '_base_', folder / 'configs' / '_base_')
    file = folder / path
    file.parent.mkdir(parents=True)
    file.write_text(examples()[path], encoding='utf-8')
    return Config.fromfile(file)


def prepare(cfg: Config) -> QuantizedModel:
    """The model of ``cfg`` with random weights, prepared on small images."""
    mmpretrain = pytest.importorskip('mmpretrain.registry', reason='the examples quantize models of mmpretrain')
    init_default_scope('mmpretrain')
    model = mmpretrain.MODELS.build({**cfg.model, 'data_preprocessor': cfg.data_preprocessor})
    model.eval()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images, mode='tensor')
        prepared: QuantizedModel = build(QUANTIZERS, cfg.quantizer).prepare(model, images)
        torch.testing.assert_close(prepared(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    return prepared


def test_every_python_block_of_the_guide_is_a_whole_config() -> None:
    assert len(examples()) == 4
    assert read('write_a_config.md').count('```python') == 4


@pytest.mark.parametrize('path', examples())
def test_examples_are_new_configs_that_build(path: str, tmp_path: Path) -> None:
    assert not (ROOT / path).exists()
    cfg = example_config(path, tmp_path)
    assert set(NEEDED) <= set(cfg)
    build(RECONSTRUCTORS, cfg.reconstructor)
    assert [build(EXPORTERS, exporter) for exporter in cfg.exporters]
    assert cfg.float_checkpoint.startswith('https://download.openmmlab.com/') and cfg.float_checkpoint.endswith('.pth')


def test_mobilenetv3_example(tmp_path: Path) -> None:
    path = 'configs/brecq/mobilenetv3/brecq_w4a8-openvino_mobilenetv3-small_in1k.py'
    cfg = example_config(path, tmp_path)
    prepared = prepare(cfg)

    bits = {layer.name: (layer.weight_bits, layer.activation_bits) for layer in prepared.layers}
    eight = {name for name, layer_bits in bits.items() if layer_bits == (8, 8)}
    assert eight == {
        'backbone.layer0.conv', 'head.layers.0.fc', 'head.layers.1.fc', *(name for name in bits if '.se.' in name)
    }  # fmt: skip
    assert {layer_bits for name, layer_bits in bits.items() if name not in eight} == {(4, 8)}
    assert len(bits) == 54 and not prepared.image_graph.traced.opaque
    blocks = [unit.name for unit in prepared.image_graph.units if len(unit.layers) > 1]
    assert blocks == [f'backbone.layer{i}' for i in range(1, 12)]
    assert prepared.preset is PRESETS['openvino']
    assert build(RECONSTRUCTORS, cfg.reconstructor).stages[0].options.round_weight == 0.1


def test_resnext_example(tmp_path: Path) -> None:
    prepared = prepare(example_config('configs/brecq/resnext/brecq_w4a4_resnext50-32x4d_in1k.py', tmp_path))
    names = [unit.name for unit in prepared.image_graph.units if len(unit.layers) > 1]
    assert names == [f'backbone.layer{i}.{j}' for i, count in enumerate((3, 4, 6, 3), 1) for j in range(count)]


def test_qdrop_example_replaces_the_reconstructor(tmp_path: Path) -> None:
    cfg = example_config('configs/brecq/resnet/qdrop_w2a4_resnet18_in1k.py', tmp_path)
    (stage,) = build(RECONSTRUCTORS, cfg.reconstructor).stages
    assert stage.name == 'joint'
    assert (stage.options.iterations, stage.options.drop_prob, stage.options.activation_lr) == (20000, 0.5, None)


def test_short_recipe_example(tmp_path: Path) -> None:
    cfg = example_config('configs/brecq/mobilenetv2/qdrop_w4a4_mobilenetv2_in1k.py', tmp_path)
    stages = build(RECONSTRUCTORS, cfg.reconstructor).stages
    assert [(stage.name, stage.options.iterations) for stage in stages] == [('joint', 500), ('network', 100)]
    assert cfg.quantizer.weight == {'bits': 4, 'rounding': {'type': 'StraightThrough'}}


@pytest.mark.parametrize('heading', REFERENCE)
def test_reference_has_every_option_with_its_default(heading: str) -> None:
    documented = {
        name.strip('`'): default.strip('`') for name, _, default, _ in rows(sections('config_reference.md')[heading])
    }
    assert {name: literal(default) for name, default in documented.items()} == options_of(REFERENCE[heading])


def test_reference_has_every_heading_tested() -> None:
    with_tables = {heading for heading, text in sections('config_reference.md').items() if '| option |' in text}
    assert with_tables == set(REFERENCE)


def test_reference_has_every_top_level_key() -> None:
    table = {row[0].strip('`'): row[2].strip('`') for row in rows(sections('config_reference.md')['Top-level keys'])}
    assert set(table) == set(KEYS)
    assert {key for key, default in table.items() if default == 'required'} == set(NEEDED)
    assert literal(table['evaluations']) == EVALUATIONS


def test_preset_table_has_the_grids() -> None:
    table = {row[0].strip('`'): row[1:] for row in rows(sections('presets.md')['Grids'])}
    assert set(table) == set(PRESETS)
    for name, preset in PRESETS.items():
        weights = [preset.weight_qtype(bits, True, 0, None) for bits in (8, 4)]
        activations = [
            preset.activation_qtype(bits, non_negative, None, False)
            for bits in (8, 4)
            for non_negative in (True, False)
        ]
        expected = [f'{q.quant_min}..{q.quant_max}{"" if q.symmetric else " any"}' for q in (*weights, *activations)]
        assert table[name] == expected, name


def test_preset_table_has_the_places() -> None:
    table = list(rows(sections('presets.md')['Where activations are quantized']))
    columns = [PRESETS[name] for name in ('academic', 'onnxruntime', 'openvino', 'tensorrt')]
    assert table[0][1:] == ['all functions' if preset.fuses is None else 'ReLU, ReLU6' for preset in columns]
    operands = {'none': 'no', 'all': 'both operands', 'shortcut': "the shortcut's"}
    assert table[3][1:] == [operands[preset.add_operands] for preset in columns]
    assert table[5][1:] == ['yes' if preset.conv_outputs else 'no' for preset in columns]
    assert table[6][1:] == ['yes' if preset.equal_concat else 'no' for preset in columns]


def test_preset_page_lists_the_rules() -> None:
    listed = [tuple(row) for row in rows(sections('presets.md')['The verifier'])]
    assert listed == [(name, rule.description, rule.source) for name, rule in RULES.items()]


@pytest.mark.parametrize('page', sorted(path.name for path in DOCS.glob('*.md')))
def test_links_lead_somewhere(page: str) -> None:
    text = read(page)
    for target in re.findall(r'\]\((?!https?://)([^)#]+)', text):
        assert (DOCS / target).exists(), f'{page} links to {target}'


def options_of(cls: Any) -> dict[str, Any]:
    """Options of a class that a config may give, with their defaults; ``'required'`` where there is none."""
    defaults = {}
    factories = {f.name: f.default_factory for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
    for name, parameter in inspect.signature(cls).parameters.items():
        if name in SUPPLIED:
            continue
        if factories.get(name, dataclasses.MISSING) is not dataclasses.MISSING:
            defaults[name] = factories[name]()  # type: ignore[operator]
        else:
            defaults[name] = 'required' if parameter.default is inspect.Parameter.empty else parameter.default
    return defaults


def literal(text: str) -> Any:
    return text if text == 'required' else ast.literal_eval(text)
