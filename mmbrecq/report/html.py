"""``report.html``: one self-contained page about one run."""

from __future__ import annotations

import os
from pathlib import Path

from mmbrecq.report import sections
from mmbrecq.report.charts import escape
from mmbrecq.report.choice import choice_of_bits
from mmbrecq.report.style import CSS
from mmbrecq.report.summary import Summary

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render_html(summary: Summary, date: str = '', folder: Path | None = None) -> str:
    """Returns the page: inline style and SVG, no script, nothing loaded from anywhere.

    Args:
        summary: The run; what it has not measured yet is left out.
        date: When the run took place, as it shall be shown.
        folder: The run's, where its pictures are; None for none.
    """
    title = ' '.join(part for part in (summary.bits_label, summary.model or Path(summary.config).stem) if part)
    title = title or 'Quantization'
    body = (
        _header(summary, title, date),
        sections.tiles(summary),
        sections.warnings(summary),
        sections.results(summary),
        '' if folder is None else sections.pictures(summary, folder),
        sections.side_by_side(sections.times(summary), sections.sizes(summary)),
        sections.reconstruction(summary),
        choice_of_bits(summary),
        sections.layer_bits(summary),
        sections.side_by_side(sections.float_layers(summary), sections.deployment(summary)),
        sections.provenance(summary),
    )
    return page(title, ''.join(part + chr(10) for part in body if part), 'summary.json')


def page(title: str, body: str, numbers: str) -> str:
    """A whole page in the style of the report.

    Args:
        title: As text.
        body: As markup.
        numbers: Name of the file that has the same numbers.
    """
    # The policy makes "nothing loaded from anywhere" hold even for text that slipped through unescaped.
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{escape(title)} - mmbrecq</title><style>{CSS}</style></head>\n'
        f'<body><main>{body}'
        f'<footer>Written by mmbrecq; the same numbers are in {escape(numbers)}.</footer></main></body></html>\n'
    )


def write_report(summary: Summary, path: str | os.PathLike[str], date: str = '') -> None:
    """Writes :func:`render_html` to ``path``, whole or not at all.

    Raises:
        StorageError: Where the file cannot be written; the previous one survives.
    """
    from mmbrecq.runs.storage import write_text_atomic

    write_text_atomic(render_html(summary, date, Path(path).parent), Path(path))


def _header(summary: Summary, title: str, date: str) -> str:
    chips = [
        f'preset {summary.preset}' if summary.preset else '',
        '' if summary.seed is None else f'seed {summary.seed}',
        f'{summary.calibration.num_samples:,} calibration images' if summary.calibration.num_samples else '',
        date,
    ]
    items = ''.join(f'<li>{escape(chip)}</li>' for chip in chips if chip)
    label = f'<li class="strong">{escape(summary.bits_label)}</li>' if summary.bits_label else ''
    heading = title.removeprefix(summary.bits_label).strip() or title
    return (
        f'<header><p class="eyebrow">mmbrecq, post-training quantization</p><h1>{escape(heading)}</h1>'
        f'<code>{escape(summary.config)}</code><ul class="chips" aria-label="Settings">{label}{items}</ul></header>'
    )
