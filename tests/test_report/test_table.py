"""The terminal table shows the summary's own values, in plain text where there is no terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mmbrecq.report.summary import LayerBits, Metrics, Summary
from mmbrecq.report.table import print_table, render_table


def cells(text: str) -> list[list[str]]:
    """Splits the Markdown table into rows of stripped cells, without header and rule."""
    lines = [line for line in text.splitlines() if line.startswith('|')]
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[2:]]


def test_cells_match_the_values(summary: Summary) -> None:
    assert cells(render_table(summary)) == [
        ['float', '82.00', '-', '98.50', '-', '11.2 MB', '-'],
        ['nearest rounding', '12.34', '-69.66', '54.32', '-44.18', '832 kB', '-'],
        ['BRECQ weights', '81.50', '-0.50', '98.25', '-0.25', '832 kB', '-'],
        ['BRECQ full', '81.02', '-0.98', '98.00', '-0.50', '832 kB', '-'],
        ['deployed in ONNX Runtime', '81.01', '-0.99', '98.01', '-0.49', '-', '3 of 3'],
        ['deployed in OpenVINO', '81.04', '-0.96', '98.02', '-0.48', '-', '2 of 3'],
    ]


def test_title_and_caption(summary: Summary) -> None:
    lines = render_table(summary).splitlines()
    assert lines[0] == 'W2A4, ResNet-18, preset openvino, seed 7'
    assert lines[-1] == (
        'model size: 11.2 MB float, 832 kB quantized (13.5x smaller); 1 of 2 units kept at nearest rounding'
    )


def test_header_has_the_evaluators_names(summary: Summary) -> None:
    header = next(line for line in render_table(summary).splitlines() if line.startswith('|'))
    names = [cell.strip() for cell in header.strip('|').split('|')]
    assert names == ['stage', 'accuracy/top1', 'to float', 'accuracy/top5', 'to float', 'size', 'integer kernels']


def test_the_first_metrics_of_many_uncut_and_markup_in_names() -> None:
    names = [f'coco/[bold]bbox_mAP_{i}' for i in range(12)]
    text = render_table(Summary(model='[red]m[/red]', metrics=Metrics(float=dict.fromkeys(names, 0.365))))
    assert [name in text for name in names] == [True] * 3 + [False] * 9
    assert '[red]m[/red]' in text
    assert len(cells(text)) == 1
    assert cells(text)[0].count('0.365') == 3
    assert text.endswith('the report has 9 more metrics\n')
    assert 'more metrics' not in render_table(Summary(metrics=Metrics(float=dict.fromkeys(names[:3], 0.365))))


def test_empty_and_partial_runs_render() -> None:
    assert cells(render_table(Summary())) == [['no result yet', '']]
    partial = Summary(bits={'fc': LayerBits(4, None)}, metrics=Metrics(nearest={'accuracy/top1': 50.0}))
    assert cells(render_table(partial)) == [['nearest rounding', '50.00', '-', '-']]
    assert render_table(partial).startswith('W4A32\n')


def test_print_is_plain_where_there_is_no_terminal(summary: Summary, capsys: pytest.CaptureFixture[str]) -> None:
    file = io.StringIO()
    print_table(summary, Console(file=file, force_terminal=False))
    assert file.getvalue() == render_table(summary)
    assert '\x1b' not in file.getvalue()


def test_print_is_styled_on_a_terminal(summary: Summary) -> None:
    file = io.StringIO()
    print_table(summary, Console(file=file, force_terminal=True, color_system='standard', width=140))
    assert '\x1b[1m' in file.getvalue()
    assert '81.02' in file.getvalue()
    assert '-0.98' in file.getvalue()


def test_names_are_no_markup_on_a_terminal() -> None:
    file = io.StringIO()
    summary = Summary(
        model='[red]m', metrics=Metrics(float={'[red]top1': 0.5}, deployed={'[red]rt': {'[red]top1': 0.5}})
    )
    print_table(summary, Console(file=file, force_terminal=True, color_system=None, width=140))
    assert file.getvalue().count('[red]') == 3
