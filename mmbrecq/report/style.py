"""The style sheet of ``report.html``: light, dark, and light again on paper."""

from __future__ import annotations

_LIGHT = """
  --page: #f6f6f3; --card: #ffffff; --ink: #14140f; --soft: #55544e; --faint: #6f6e67; --line: #e4e3dc;
  --track: #efeee9; --accent: #2a78d6; --accent-soft: #b7d3f6; --before: #a3a299; --kept: #a86200; --kept-soft: #fbe3bd;
  --good: #0c7a3e; --bad: #c23230; --warn-card: #fff6e3; --warn-line: #edcf91;
  --b2: #a9cbf3; --b3: #8ab8ee; --b4: #6aa3e8; --b5: #4a8de0; --b6: #2f78d2; --b7: #215fae; --b8: #17477f;
  --t0: #2a78d6; --t1: #1baf7a; --t2: #eda100; --t3: #4a3aa7; --t4: #e34948; --t5: #85847c;
  color-scheme: light;
"""

_DARK = """
  --page: #141413; --card: #1d1d1b; --ink: #f3f2ec; --soft: #c0bfb5; --faint: #8f8e85; --line: #33322f;
  --track: #2a2a27; --accent: #5598ea; --accent-soft: #274a76; --before: #8f8e85; --kept: #eba432; --kept-soft: #57411b;
  --good: #3fbf7a; --bad: #f07a76; --warn-card: #2d2616; --warn-line: #6a5423;
  --b2: #1d4778; --b3: #235894; --b4: #2b6ab1; --b5: #377ecf; --b6: #5598ea; --b7: #86b6ef; --b8: #b7d3f6;
  --t0: #3987e5; --t1: #199e70; --t2: #c98500; --t3: #9085e9; --t4: #e66767; --t5: #8f8e85;
  color-scheme: dark;
"""

_RULES = """
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); line-height: 1.5;
  font: 15px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif; }
main { max-width: 980px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 30px; line-height: 1.2; margin: 2px 0 6px; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 17px; margin: 0 0 4px; }
p { margin: 4px 0 12px; }
code, .mono, .chart .name { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace; }
code, .mono { font-size: 13px; overflow-wrap: anywhere; }
.eyebrow { color: var(--faint); font-size: 13px; margin: 0; }
.note { color: var(--soft); font-size: 13.5px; max-width: 72ch; }
.chips { display: flex; flex-wrap: wrap; gap: 8px; margin: 12px 0 0; padding: 0; list-style: none; }
.chips li { border: 1px solid var(--line); background: var(--card); border-radius: 999px; padding: 2px 12px;
  font-size: 13px; }
.chips li.strong { background: #2a6cc2; border-color: #2a6cc2; color: #fff; font-weight: 600; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 20px 24px;
  margin-top: 16px; }
section.warn { background: var(--warn-card); border-color: var(--warn-line); }
section ul { margin: 6px 0 0; padding-left: 20px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 16px; margin-top: 24px; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px 18px; }
.tile span { display: block; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.tile strong { display: block; font-size: 26px; line-height: 1.3; font-weight: 650; letter-spacing: -.01em; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(320px, 1fr)); gap: 16px; margin-top: 16px; }
.pair section { margin-top: 0; min-width: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); font-size: 13.5px; padding-bottom: 6px; }
th, td { text-align: left; padding: 7px 16px 7px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--soft); font-size: 13px; font-weight: 500; vertical-align: bottom; }
tbody th { font-weight: 500; }
tbody tr:last-child > * { border-bottom: 0; }
tr.quantized > * { font-weight: 650; }
.num { text-align: right; white-space: nowrap; }
.compact th, .compact td { padding-top: 4px; padding-bottom: 4px; font-size: 13.5px; vertical-align: baseline; }
.compact .mono { font-size: 12.5px; } .compact th.mono { white-space: nowrap; }
.metric { min-width: 150px; }
.metric small { color: var(--soft); font-weight: 400; font-size: 13px; margin-left: 8px; }
.meter { display: block; width: 100%; height: 7px; margin-top: 4px; }
.meter .track { fill: var(--track); } .meter .fill { fill: var(--accent); }
.meter.float .fill, .meter.nearest .fill { fill: var(--before); }
.bits { display: flex; align-items: center; gap: 8px; min-width: 110px; }
.bits svg { flex: 1; height: 12px; min-width: 60px; } .bits b { font-weight: 500; min-width: 3.2ch; text-align: right; }
.bits .track { fill: var(--track); }
.b2 { fill: var(--b2); } .b3 { fill: var(--b3); } .b4 { fill: var(--b4); }
.b5 { fill: var(--b5); }
.b6 { fill: var(--b6); } .b7 { fill: var(--b7); } .b8 { fill: var(--b8); }
.chart { display: block; width: 100%; min-width: 560px; height: auto; margin: 8px 0 4px; }
.chart text { font-size: 12px; fill: var(--soft); font-family: inherit; }
.chart .name, .chart .factor { fill: var(--ink); } .chart .grid { stroke: var(--line); stroke-width: 1; }
.span { fill: var(--accent-soft); } .after { fill: var(--accent); }
.before { fill: var(--card); stroke: var(--before); stroke-width: 2; }
.measured { fill: var(--kept); }
.kept .span { fill: var(--kept-soft); } .kept .after { fill: var(--kept); }
.chart .kept .factor, .badge { fill: var(--kept); color: var(--kept); }
.badge { font-size: 12px; font-weight: 600; white-space: nowrap; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; padding: 0; margin: 4px 0; font-size: 13px;
  color: var(--soft); }
section .legend { padding: 0; }
.legend svg { width: 12px; height: 12px; vertical-align: -1px; margin-right: 6px; }
.stack { display: block; width: 100%; height: 20px; margin: 12px 0 10px; }
.stack rect { stroke: var(--card); stroke-width: 2px; vector-effect: non-scaling-stroke; }
.t0 { fill: var(--t0); } .t1 { fill: var(--t1); } .t2 { fill: var(--t2); } .t3 { fill: var(--t3); }
.t4 { fill: var(--t4); } .t5 { fill: var(--t5); }
.ok { color: var(--good); font-weight: 600; } .failed { color: var(--bad); font-weight: 600; }
.pictures { display: flex; flex-wrap: wrap; gap: 12px; margin: 8px 0 4px; }
.pictures img { max-width: 100%; height: auto; border: 1px solid var(--line); }
footer { color: var(--faint); font-size: 13px; margin-top: 24px; }
@media print {
  main { max-width: none; padding: 0; } section, .tile { break-inside: auto; border-color: #ccc; }
  tr, .tile, .chart { break-inside: avoid; } h2 { break-after: avoid; } .scroll { overflow: visible; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""

# Dark is for screens only: paper stays light.
CSS = f':root {{{_LIGHT}}}\n@media screen and (prefers-color-scheme: dark) {{ :root {{{_DARK}}} }}\n{_RULES}'
