"""What a search has chosen, in the terminal."""

from __future__ import annotations

from collections import Counter

from mmbrecq.report.rows import format_bytes
from mmbrecq.search.bits import ChosenBits
from mmbrecq.search.problem import BitProblem
from mmbrecq.sensitivity.table import SensitivityTable


def describe_choice(chosen: ChosenBits, table: SensitivityTable, problem: BitProblem) -> str:
    """A line for every layer, then the predicted loss and what is spent of every budget."""
    fixed = {layer.name: layer.bits[0] for layer in table.layers if layer.name not in chosen.bits}
    width = max(len(layer.name) for layer in table.layers)
    lines = []
    for layer in table.layers:
        bits = chosen.bits.get(layer.name) or fixed[layer.name] or 32
        note = '' if layer.name in chosen.bits else '  as the config has it'
        lines.append(f'{layer.name:<{width}}  {bits:>2} {"#" * min(bits, 8)}{note}')
    counts = Counter(chosen.bits.values())
    shares = ', '.join(f'{count} at {bits}' for bits, count in sorted(counts.items()))
    lines += ['', f'bits of {len(chosen.bits)} layers: {shares}', f'predicted loss: {chosen.loss:.4g} ({table.kind})']
    for name, spent in chosen.spent.items():
        cost = problem.costs[name]
        budget = '' if cost.budget == float('inf') else f', budget {format_cost(cost.budget, cost.unit)}'
        share = spent / chosen.float_costs[name] if chosen.float_costs[name] else 0.0
        lines.append(f'{name}: {format_cost(spent, cost.unit)}, {share:.3g}x of float{budget}')
    return '\n'.join(lines) + '\n'


def format_cost(value: float, unit: str) -> str:
    """A cost with its unit; bytes as the report has them."""
    return format_bytes(round(value)) if unit == 'bytes' else f'{value:.4g} {unit}'.rstrip()
