"""The page is well-formed, self-contained, escaped, and readable half-way through a run."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmbrecq.reconstruction.results import UnitResult
from mmbrecq.report.html import render_html, write_report, write_sensitivities
from mmbrecq.report.summary import LayerBits, Metrics, ModelSize, Seconds, Summary

VOID = {'meta', 'img'}
LOADS = {'src', 'href', 'xlink:href', 'srcset', 'data', 'action', 'poster', 'background'}


class Page(HTMLParser):
    """Parses strictly: each end tag closes the tag opened last."""

    def __init__(self, markup: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.feed(markup)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == 'table':
            self.tables.append([])
        elif tag == 'tr':
            self.tables[-1].append([])
        elif tag in ('td', 'th'):
            self.tables[-1][-1].append('')
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if 'style' in self.open:
            return
        self.texts.append(data)
        if 'td' in self.open or ('th' in self.open and self.tables):
            self.tables[-1][-1][-1] += data

    @property
    def text(self) -> str:
        return '\n'.join(self.texts)


def test_page_shows_every_part(summary: Summary) -> None:
    page = Page(render_html(summary, date='2025-11-21'))
    for text in (
        'ResNet-18', 'W2A4', 'preset openvino', 'seed 7', '2025-11-21', '1,024', 'calibration_ids.json',
        'configs/brecq/resnet/resnet18_brecq-w2a4.py', '11.2 MB', '832 kB', '13.5x smaller', '1.24 GB', '4 min 00 s',
        'No kernel below 8 bits.', 'head.aux', 'excluded by a pattern: head.*', 'V3: relu_4', 'torch', '2.11.0',
        '2 of 3 quantized layers run in integers', 'reconstruct 3 min 10 s', 'other 5.00 s', 'kept nearest',
    ):  # fmt: skip
        assert text in page.text, text
    assert 'has not ended' not in page.text


def test_result_table_has_the_values(summary: Summary) -> None:
    results = Page(render_html(summary)).tables[0]
    assert results[0] == ['Stage', 'accuracy/top1', 'accuracy/top5', 'Size', 'Integer kernels']
    assert results[1] == ['float', '82.00', '98.50', '11.2 MB', '-']
    assert results[2] == ['nearest rounding', '12.34-69.66', '54.32-44.18', '832 kB', '-']
    assert results[6] == ['deployed in OpenVINO', '81.04-0.96', '98.02-0.48', '-', '2 of 3']


def test_first_numbers_are_those_of_the_quantized_model(summary: Summary) -> None:
    text = Page(render_html(summary)).text
    assert '81.02\naccuracy/top1, -0.98 to float 82.00\n' in text
    summary.metrics.quantized = {}
    assert 'to float 82.00' not in Page(render_html(summary)).text


def test_unit_tables_have_the_losses(summary: Summary) -> None:
    tables = [table for table in Page(render_html(summary)).tables if table[0][0] == 'Unit']
    assert [row[2:] for row in tables[0][1:]] == [
        ['0.5', '0.05', '2.5 %', '2,000', '12.5 s', ''],
        ['0.02', '0.03', '3 %', '2,000', '9.50 s', 'kept nearest'],
    ]
    assert tables[0][2][:2] == ['backbone.layer1.0', 'conv1']
    assert tables[1][1:] == [['backbone.conv1', 'backbone.conv1', '0.4', '0.3', '500', '3.50 s']]


def test_bits_table_has_each_layer(summary: Summary) -> None:
    page = Page(render_html(summary))
    table = next(table for table in page.tables if table[0][-1] == 'Activation bits')
    assert table[1:] == [
        ['backbone.conv1', 'backbone.conv1', '8', '4'],
        ['backbone.layer1.0.conv1', 'backbone.layer1.0', '2', '4'],
        ['backbone.layer1.0.conv2', '', '2', 'float'],
    ]
    assert '3 quantized layers: 1 at W8A4, 1 at W2A4, 1 at W2A32.' in page.text


def test_nothing_is_loaded_and_nothing_runs(summary: Summary) -> None:
    summary.warnings.append('see https://example.com/guide')
    markup = render_html(summary)
    page = Page(markup)
    assert not [attrs for _, attrs in page.tags if LOADS & set(attrs) or any(key.startswith('on') for key in attrs)]
    assert not {'script', 'link', 'iframe', 'img', 'object', 'embed', 'base', 'form'} & {tag for tag, _ in page.tags}
    style = re.findall('<style>(.*?)</style>', markup, re.DOTALL)
    assert len(style) == 1
    assert not re.search(r'url\(|@import|//', style[0])
    assert re.findall(r'\w+://[^\s<"]+', markup) == ['https://example.com/guide']
    assert "default-src 'none'" in markup


def test_style_covers_light_dark_and_paper(summary: Summary) -> None:
    markup = render_html(summary)
    assert '@media screen and (prefers-color-scheme: dark)' in markup
    assert '@media print' in markup
    style = markup.partition('<style>')[2].partition('</style>')[0]
    assert style.count('{') == style.count('}')
    defined = re.findall(r'(--[\w-]+):', style)
    assert set(re.findall(r'var\((--[\w-]+)\)', style)) == set(defined)
    assert all(defined.count(name) == 2 for name in defined)
    for used in [f'.b{bits} {{' for bits in range(2, 9)] + [f'.t{i} {{' for i in range(6)]:
        assert used in style


def test_every_text_of_a_run_is_escaped() -> None:
    evil = '<script>alert(1)</script>"\'&'
    summary = Summary(
        config=evil, model=evil, preset=evil, seed=1, versions={evil: evil},
        metrics=Metrics(float={evil: 1.0}, quantized={evil: 0.5}, deployed={evil: {evil: 0.5}}),
        seconds=Seconds(prepare=1.0, total=2.0), units=[UnitResult(evil, evil, (evil,), 1.0, 0.5, 1, 1.0, False)],
        bits={evil: LayerBits(2, 4)}, float_layers=[f'{evil}: {evil}'], warnings=[evil], verify={evil: evil},
    )  # fmt: skip
    summary.calibration.num_samples, summary.calibration.ids_file = 1, evil
    markup = render_html(summary, date=evil)
    assert '<script' not in markup
    page = Page(markup)
    assert sum(text.count(evil) for text in page.texts) >= 15
    assert all('alert' not in key for _, attrs in page.tags for key in attrs)


def test_accessible(summary: Summary) -> None:
    page = Page(render_html(summary))
    drawings = [attrs for tag, attrs in page.tags if tag == 'svg']
    assert drawings
    spoken = [attrs for attrs in drawings if attrs.get('aria-hidden') != 'true']
    assert len(spoken) == 3
    assert all(attrs['role'] == 'img' and attrs['aria-label'] for attrs in spoken)
    assert all(attrs.get('scope') in ('row', 'col') for tag, attrs in page.tags if tag == 'th')
    assert all(all(cell for cell in table[0]) for table in page.tables)
    assert ('html', {'lang': 'en'}) in page.tags
    assert [tag for tag, _ in page.tags].count('h1') == 1


UNDRAWN = UnitResult('u', 'weights', (), math.nan, 0.0, 1, 1.0, False)


@pytest.mark.parametrize(
    'strip',
    [
        lambda s: Summary(),
        lambda s: Summary(config=s.config, metrics=Metrics(float=s.metrics.float)),
        lambda s: replace(s, metrics=Metrics(quantized=s.metrics.quantized), seconds=Seconds(reconstruct=3.0)),
        lambda s: replace(s, units=[], bits={}, seconds=Seconds(total=0.0)),
        lambda s: replace(s, units=[UNDRAWN], model_size_bytes=ModelSize(quantized=5)),
        lambda s: replace(s, metrics=Metrics(float={'m': math.nan}, quantized={'m': math.nan})),
        lambda s: replace(s, metrics=Metrics(float={'m': 0.0}, quantized={'n': -1.0})),
    ],
)
def test_partial_runs_render(summary: Summary, strip: Callable[[Summary], Summary]) -> None:
    partial = strip(summary)
    text = Page(render_html(partial)).text
    assert ('The run has not ended' in text) == (partial.seconds.total is None)
    assert 'nan' not in text
    assert 'None' not in text.replace('None: every', '')


def test_no_float_layer_is_said_in_words(summary: Summary) -> None:
    words = 'every convolution and linear layer is quantized'
    assert words not in Page(render_html(summary)).text
    assert words in Page(render_html(replace(summary, float_layers=[]))).text


def test_report_file_is_written_whole(summary: Summary, tmp_path: Path) -> None:
    path = tmp_path / 'report.html'
    write_report(summary, path, '2025-11-21')
    assert path.read_text(encoding='utf-8') == render_html(summary, '2025-11-21')
    assert [entry.name for entry in tmp_path.iterdir()] == ['report.html']


def test_pictures_are_within_the_page(summary: Summary, tmp_path: Path) -> None:
    """The bytes of the files themselves; one that is gone is left out, and a page without a folder has none."""
    content = b'\x89PNG any bytes'
    (tmp_path / 'pictures').mkdir()
    (tmp_path / 'pictures' / '00_cell.png').write_bytes(content)
    summary.pictures = ['pictures/00_cell.png', 'pictures/01_gone.png']
    write_report(summary, tmp_path / 'report.html')
    images = [attrs for tag, attrs in Page((tmp_path / 'report.html').read_text()).tags if tag == 'img']
    assert [attrs['alt'] for attrs in images] == ['Predictions on 00_cell']
    kind, _, encoded = str(images[0]['src']).partition(',')
    assert kind == 'data:image/png;base64'
    assert base64.b64decode(encoded) == content
    assert not [tag for tag, _ in Page(render_html(summary)).tags if tag == 'img']


def test_sensitivities_are_drawn_and_told(tmp_path: Path) -> None:
    table: Any = SimpleNamespace(
        kind='divergence', units={'a.b': 'a'}, activation_loss={'<c>': {4: 1e-4}}, searched=['a.b', '<c>'],
        loss={'a.b': {2: 0.5, 4: 0.01, 32: 0.0}, '<c>': {2: 0.0}},
    )  # fmt: skip
    write_sensitivities(table, 'configs/net.py', tmp_path / 'sensitivity.html')
    page = Page((tmp_path / 'sensitivity.html').read_text())
    weights, activations = page.tables
    assert weights[1:] == [['a.b', 'a', '0.5', '0.01'], ['<c>', '', '0', 'nan']]
    assert activations == [['layer', 'unit', '4 bits'], ['<c>', '', '0.0001']]
    dots = [attrs for tag, attrs in page.tags if tag == 'circle' and attrs.get('cy') != '12']
    assert [dot['class'] for dot in dots] == ['b2', 'b4', 'b2', 'b4']
