"""The sections of the report: each turns one part of the summary into HTML, or into '' where it is still empty."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from mmbrecq.report.charts import bits_bar, escape, loss_chart, meter, stacked_bar
from mmbrecq.report.rows import (
    ResultRow,
    decimals,
    format_bytes,
    format_difference,
    format_loss,
    format_metric,
    format_ratio,
    format_seconds,
    kept_words,
    metric_names,
    result_rows,
    runtime_name,
)
from mmbrecq.report.summary import Summary, UnitRecord

_STEPS = ('prepare', 'calibrate', 'reconstruct', 'evaluate', 'export')
_PHASES = {
    'weights': 'Weight rounding, unit by unit',
    'activations': 'Activation step sizes, unit by unit',
    'joint': 'Rounding and step sizes together, unit by unit',
    'network': 'Step sizes, scales and biases, the network as one unit',
    '': 'Reconstruction, unit by unit',
}
# Per phase: where the loss before comes from, and what becomes of a unit that got worse
_STARTS = {
    'activations': ('step sizes of the calibration', 'they keep the step sizes of the calibration'),
    'network': ('what was learned unit by unit', 'it is kept'),
    '': ('nearest rounding', 'they keep nearest rounding'),
}


def section(title: str, *parts: str, kind: str = '') -> str:
    """Returns a headed section; '' where all parts are empty."""
    body = ''.join(parts)
    start = f'<section class="{kind}">' if kind else '<section>'
    return f'{start}<h2>{escape(title)}</h2>{body}</section>' if body else ''


def side_by_side(*sections: str) -> str:
    """Returns sections in columns where the page is wide enough."""
    present = [text for text in sections if text]
    return f'<div class="pair">{"".join(present)}</div>' if present else ''


def html_table(head: Sequence[tuple[str, str]], rows: Iterable[str], compact: bool = True) -> str:
    """Returns a table that scrolls sideways on its own.

    Args:
        head: Text and CSS class of each column's header.
        rows: Rows, as markup.
        compact: Tight rows.
    """
    columns = ''.join(f'<th scope="col" class="{kind}">{escape(text)}</th>' for text, kind in head)
    table = '<table class="compact">' if compact else '<table>'
    return f'<div class="scroll">{table}<thead><tr>{columns}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def tiles(summary: Summary) -> str:
    """Returns the numbers a reader looks for first: metric, size, time, memory; those that are known."""
    made, rows, size = [], result_rows(summary), summary.model_size_bytes
    if summary.metrics.quantized:
        metric, final = next(iter(summary.metrics.quantized.items()))
        digits, reference = decimals(rows, metric), summary.metrics.float.get(metric)
        note = f'{metric}, {format_difference(final, reference, digits)} to float {format_metric(reference, digits)}'
        made.append((format_metric(final, digits), note if reference is not None else metric))
    if size.quantized is not None:
        ratio = format_ratio(size.float, size.quantized) or 'model size'
        made.append((format_bytes(size.quantized), f'{ratio} than {format_bytes(size.float)}' if size.float else ratio))
    if summary.seconds.total is not None:
        made.append((format_seconds(summary.seconds.total), 'for the whole run'))
    if summary.peak_memory_bytes.host is not None:
        device = summary.peak_memory_bytes.device
        on_device = f', {format_bytes(device)} on the device' if device else ''
        made.append((format_bytes(summary.peak_memory_bytes.host), f'peak host memory{on_device}'))
    tile = '<div class="tile"><strong>{}</strong><span>{}</span></div>'
    body = ''.join(tile.format(escape(number), escape(note)) for number, note in made)
    return f'<div class="tiles">{body}</div>' if made else ''


def warnings(summary: Summary) -> str:
    """Returns the run's warnings, and a word where it has not ended."""
    texts = list(summary.warnings)
    if not summary.finished:
        texts.insert(0, 'The run has not ended: what follows is what it has measured so far.')
    return section('Please note', _list(texts), kind='warn')


def results(summary: Summary) -> str:
    """Returns the result table: a row per stage, a bar per metric."""
    rows = result_rows(summary)
    metrics = metric_names(rows)
    head = [('Stage', ''), *((metric, 'metric') for metric in metrics), ('Size', 'num'), ('Integer kernels', 'num')]
    body = [
        f'<tr class="{row.stage}"><th scope="row">{escape(row.label)}</th>'
        + ''.join(_metric_cell(row, rows, metric, summary) for metric in metrics)
        + f'<td class="num">{format_bytes(row.size)}</td><td class="num">{_kernels(row)}</td></tr>'
        for row in rows
    ]
    note = '<p class="note">Small: the difference to float. Nearest rounding has the same bits.</p>'
    return section('Results', note, html_table(head, body, compact=False)) if rows else ''


def pictures(summary: Summary, folder: Path) -> str:
    """Returns the pictures of predictions, within the page; '' where there are none."""
    found = [folder / name for name in summary.pictures if (folder / name).is_file()]
    images = [
        f'<img alt="Predictions on {escape(path.stem)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for path in found
    ]
    note = '<p class="note">Left: the float model. Right: the quantized model, simulated.</p>'
    return section('What the two models see', note, f'<div class="pictures">{"".join(images)}</div>') if images else ''


def _metric_cell(row: ResultRow, rows: list[ResultRow], metric: str, summary: Summary) -> str:
    digits, value = decimals(rows, metric), row.metrics.get(metric)
    text = format_metric(value, digits)
    if value is None or not math.isfinite(value):
        return f'<td class="metric">{text}</td>'
    if row.stage != 'float':
        text += f'<small>{format_difference(value, summary.metrics.float.get(metric), digits)}</small>'
    largest = max((r.metrics[metric] for r in rows if math.isfinite(r.metrics.get(metric, math.nan))), default=0.0)
    return f'<td class="metric">{text}{meter(value, largest, row.stage)}</td>'


def _kernels(row: ResultRow) -> str:
    if row.kernels is None:
        return '-'
    kind = 'ok' if row.kernels.integer == row.kernels.quantized else 'failed'
    return f'<span class="{kind}">{row.kernels.integer} of {row.kernels.quantized}</span>'


def reconstruction(summary: Summary) -> str:
    """Returns a section per phase: the losses before and after as a chart and as a table."""
    phases = dict.fromkeys(unit.phase for unit in summary.units)
    return ''.join(_phase(phase, [unit for unit in summary.units if unit.phase == phase]) for phase in phases)


def _phase(phase: str, units: list[UnitRecord]) -> str:
    before, return_to = _STARTS.get(phase, _STARTS[''])
    kept = sum(unit.kept_nearest for unit in units)
    word = f' {kept} of {len(units)} units did not get better; {return_to}.' if kept else ''
    dot = '<li><svg viewBox="0 0 12 12" aria-hidden="true"><circle class="{}" cx="6" cy="6" r="5"/></svg>{}</li>'
    label = f'Loss of {len(units)} units before and after, on a log scale; the table below has the numbers.'
    head = [('Unit', ''), ('Layers', ''), ('Before', 'num'), ('After', 'num')]
    relative = any(unit.power > 0 for unit in units)
    head += [('Of its output', 'num')] if relative else []
    head += [('Iterations', 'num'), ('Time', 'num')]
    return section(
        _PHASES.get(phase, phase),
        f'<p class="note">Distance to the output of the float unit, on a log scale; left is better.{word}</p>',
        f'<ul class="legend">{dot.format("before", f"before ({before})")}{dot.format("after", "after")}</ul>',
        f'<div class="scroll">{loss_chart(units, label)}</div>',
        html_table([*head, ('Note', '')] if kept else head, [_unit_row(unit, bool(kept), relative) for unit in units]),
    )


def _unit_row(unit: UnitRecord, with_note: bool, with_relative: bool) -> str:
    badge = f'<span class="badge">{kept_words(unit)}</span>' if unit.kept_nearest else ''
    note = f'<td>{badge}</td>' if with_note else ''
    percent = f'{100 * unit.loss_after / unit.power:.2g} %' if unit.power > 0 else ''
    relative = f'<td class="num">{percent}</td>' if with_relative else ''
    # The unit's own name in front of each layer would only repeat the first column.
    layers = ', '.join(layer.removeprefix(f'{unit.name}.') for layer in unit.layers)
    return (
        f'<tr><th scope="row" class="mono">{escape(unit.name)}</th><td class="mono">{escape(layers)}</td>'
        f'<td class="num">{format_loss(unit.loss_before)}</td><td class="num">{format_loss(unit.loss_after)}</td>'
        f'{relative}<td class="num">{unit.iterations:,}</td>'
        f'<td class="num">{format_seconds(unit.seconds)}</td>{note}</tr>'
    )


def layer_bits(summary: Summary) -> str:
    """Returns the bits of each layer as coloured bars, with a count of each combination."""
    unit_of = {layer: unit.name for unit in summary.units if unit.phase != 'network' for layer in unit.layers}
    rows = [
        f'<tr><th scope="row" class="mono">{escape(layer)}</th><td class="mono">{escape(unit_of.get(layer, ""))}</td>'
        f'<td>{bits_bar(bits.weight)}</td><td>{bits_bar(bits.activation)}</td></tr>'
        for layer, bits in summary.bits.items()
    ]
    counts = Counter(f'W{b.weight or 32}A{b.activation or 32}' for b in summary.bits.values())
    words = ', '.join(f'{count} at {label}' for label, count in counts.most_common())
    head = [('Layer', ''), ('Unit', ''), ('Weight bits', ''), ('Activation bits', '')]
    note = f'<p class="note">{len(rows)} quantized layers: {escape(words)}.</p>'
    return section('Bits per layer', note, html_table(head, rows)) if rows else ''


def float_layers(summary: Summary) -> str:
    """Returns the layers that stay in float with the reason, or says that there are none."""
    if not summary.float_layers:
        text = '<p class="note">None: every convolution and linear layer is quantized.</p>' if summary.bits else ''
        return section('Layers kept in float', text)
    split = [entry.partition(': ') for entry in summary.float_layers]
    rows = [f'<tr><th scope="row" class="mono">{escape(a)}</th><td>{escape(b)}</td></tr>' for a, _, b in split]
    return section('Layers kept in float', html_table([('Layer', ''), ('Why', '')], rows))


def times(summary: Summary) -> str:
    """Returns the seconds of each step as one stacked bar and a list."""
    steps = [(name, getattr(summary.seconds, name)) for name in _STEPS]
    parts = [(name, float(value)) for name, value in steps if value]
    if summary.seconds.total is not None:
        rest = summary.seconds.total - sum(value for _, value in parts)
        # Less than one part in a hundred is the clock's reading, not a step.
        parts += [('other', rest)] if rest > 0.01 * summary.seconds.total else []
    if not parts:
        return ''
    words = [f'{name} {format_seconds(value)}' for name, value in parts]
    swatch = '<li><svg viewBox="0 0 12 12" aria-hidden="true"><rect class="t{}" width="12" height="12"/></svg>{}</li>'
    legend = ''.join(swatch.format(i, escape(word)) for i, word in enumerate(words))
    bar = stacked_bar(parts, 'Time of each step: ' + ', '.join(words))
    return section('Time', bar, f'<ul class="legend">{legend}</ul>')


def sizes(summary: Summary) -> str:
    """Returns model size and peak memory."""
    size, memory = summary.model_size_bytes, summary.peak_memory_bytes
    ratio = format_ratio(size.float, size.quantized)
    pairs = [
        ('Float model', size.float, ''),
        ('Quantized model', size.quantized, ratio),
        ('Peak host memory', memory.host, ''),
        ('Peak device memory', memory.device, ''),
    ]
    rows = [_pair_row(name, format_bytes(count), note) for name, count, note in pairs if count is not None]
    return section('Size and memory', html_table([('What', ''), ('Size', 'num'), ('Gain', '')], rows)) if rows else ''


def deployment(summary: Summary) -> str:
    """Returns the verdict of the static verifier on each exported file, and the kernel count of each runtime."""
    checks = [(name, verdict, verdict == 'passed') for name, verdict in summary.verify.items()]
    for runtime, count in summary.integer_kernels.items():
        text = f'{count.integer} of {count.quantized} quantized layers run in integers'
        checks.append((runtime_name(runtime), text, count.integer == count.quantized))
    rows = [
        f'<tr><th scope="row">{escape(name)}</th><td class="{"ok" if good else "failed"}">{escape(text)}</td></tr>'
        for name, text, good in checks
    ]
    return section('Deployment', html_table([('File or runtime', ''), ('Check', '')], rows)) if rows else ''


def provenance(summary: Summary) -> str:
    """Returns what is needed to run it again: config, seed, calibration, versions."""
    calibration = summary.calibration
    pairs = [('Config', summary.config), ('Seed', '' if summary.seed is None else str(summary.seed))]
    if calibration.num_samples:
        pairs += [('Calibration images', f'{calibration.num_samples:,}'), ('Their ids', calibration.ids_file)]
    pairs += [('Reconstruction loss', summary.loss), *summary.versions.items()]
    rows = [_pair_row(name, value, mono=True) for name, value in pairs if value]
    return section('To run it again', html_table([('What', ''), ('Value', '')], rows)) if rows else ''


def _pair_row(name: str, value: str, note: str | None = None, mono: bool = False) -> str:
    kind = 'mono' if mono else 'num'
    last = '' if note is None else f'<td>{escape(note)}</td>'
    return f'<tr><th scope="row">{escape(name)}</th><td class="{kind}">{escape(value)}</td>{last}</tr>'


def _list(texts: Sequence[str]) -> str:
    return f'<ul>{"".join(f"<li>{escape(text)}</li>" for text in texts)}</ul>' if texts else ''
