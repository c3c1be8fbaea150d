"""What a search has chosen, in the terminal."""

from __future__ import annotations

from collections import Counter

from mmbrecq.mixed_precision.search.bits import SearchResult
from mmbrecq.mixed_precision.sensitivity.table import SensitivityTable
from mmbrecq.report.rows import format_bytes


def choice_text(chosen: SearchResult, table: SensitivityTable) -> str:
    """A line for every layer, then the predicted loss and what is spent of every budget."""
    fixed = {layer.name: layer.bits[0] for layer in table.layers if layer.name not in chosen.bits}
    width = max(len(layer.name) for layer in table.layers)
    lines = []
    for layer in table.layers:
        bits = (chosen.bits.get(layer.name) if layer.name in chosen.bits else fixed[layer.name]) or 32
        inputs = chosen.activation_bits.get(layer.name)
        note = '' if layer.name in chosen.bits else '  as the config has it'
        note = note if inputs is None else f'  input {inputs} {"#" * inputs}'
        lines.append(f'{layer.name:<{width}}  {bits:>2} {"#" * min(bits, 8):<8}{note}'.rstrip())
    counts = Counter('float' if bits is None else bits for bits in chosen.bits.values())
    shares = ', '.join(f'{count} at {bits}' for bits, count in sorted(counts.items(), key=str))
    lines += [
        '',
        f'bits of {len(chosen.bits)} layers: {shares}',
        f'predicted loss: {chosen.predicted:.4g} ({chosen.kind})',
    ]
    for name, spent in chosen.spent.items():
        unit = chosen.units[name]
        budget = f', budget {format_cost(chosen.budgets[name], unit)}' if name in chosen.budgets else ''
        share = spent / chosen.float_costs[name] if chosen.float_costs[name] else 0.0
        lines.append(f'{name}: {format_cost(spent, unit)}, {share:.3g}x of float{budget}')
    return '\n'.join(lines) + '\n'


def format_cost(value: float, unit: str) -> str:
    """A cost with its unit; bytes as the report has them."""
    return format_bytes(round(value)) if unit == 'bytes' else f'{value:.4g} {unit}'.rstrip()
