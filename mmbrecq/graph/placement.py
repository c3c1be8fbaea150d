"""Finds the positions at which activations are quantized.

A value is quantized where it is produced, once, after the activation function or residual add that its target computes
together with the convolution. Values that no layer reads on a grid, and the outputs of the network, stay in float. So
does a residual stream of which layers read normalised values alone: single values of it are hundreds of times as large
as the others (Sun et al., Massive Activations in Large Language Models, COLM 2024), and a grid that reaches them has no
levels for the rest.
"""

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn

from mmbrecq.fake_quants.ops import UNBOUNDED
from mmbrecq.graph.layers import PRODUCTS
from mmbrecq.graph.layers import is_constant as follows_from_no_input
from mmbrecq.graph.roles import Roles, joined
from mmbrecq.graph.symbolic import evaluate, operation, sources_of
from mmbrecq.graph.tracer import TRANSPOSED
from mmbrecq.presets import Preset

FLAT = 0.003
"""How much an activation function may still change where it counts as constant."""


@dataclass(frozen=True)
class QuantizerPosition:
    """Describes values that share one activation quantizer.

    Args:
        name: Name of the quantizer, unique in the graph.
        nodes: Producers of the values; several where a concatenation demands equal scales.
        layers: Paths of the convolutions and linear layers that read the values.
        non_negative: Whether no value can be negative.
        float_readers: Nodes that go on reading the values in float: a value that also leaves the network does so in
            float, where the target computes an activation function within a layer, nothing comes between the two, and
            a module that could not be traced quantizes what its layers read itself.
        full_scale: Whether the scale keeps all its bits. A sum or an average of values on grids with short scales lies,
            every two hundredth time or so, exactly midway between two integers, and there runtimes round as they will.
        per_channel: Whether every channel has a scale of its own.
        eight_bits: Whether the values have 8 bits whatever is asked for: those of several grids, which come to one with
            next to no loss, and what kernels read that have no fewer bits.
        symmetric: Whether a kernel needs signed integers with zero-point 0.
        shifts: Whether a zero-point may be taken from the values: no layer computes them, and the biases of those that
            read them make up for it.
        bounds: Beyond these the functions that alone read the values tell none apart.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    layers: tuple[str, ...]
    non_negative: bool
    float_readers: frozenset[fx.Node] = frozenset()
    full_scale: bool = False
    per_channel: bool = False
    eight_bits: bool = False
    symmetric: bool = False
    shifts: bool = False
    bounds: tuple[float, float] = UNBOUNDED


def find_positions(roles: Roles, preset: Preset) -> list[QuantizerPosition]:
    """Returns the positions of a graph in the order of its nodes."""
    quantized = [n for n in roles.graph.nodes if _is_quantized(n, roles, preset)]
    partial = _partial_concats(roles, set(quantized)) if preset.equal_concat else set()
    quantized = [n for n in quantized if not all(_leads_to(user, partial, roles) for user in n.users)]
    # where others read the same moved values on their grid, a concatenation reads all on one
    mixed = {
        c for c in partial if not all(_reads_apart(s, partial, roles) for s in set(roles.sources(c)) & set(quantized))
    }
    # so does one that is part of it
    mixed |= {c for c in partial if mixed & set(roles.consumers(c, lambda u: roles.moves_only(u) and u not in mixed))}
    joined = set(quantized).union(s for c in mixed for s in roles.sources(c) if roles.is_tensor(s))
    partial, quantized = partial.difference(mixed), [n for n in roles.graph.nodes if n in joined]
    groups = _concat_groups(roles, quantized) if preset.equal_concat else [[n] for n in quantized]
    by_channel = _with_channel_scales([group[0] for group in groups if len(group) == 1], roles, preset)
    positions = []

    def reads_float(user: fx.Node, node: fx.Node) -> bool:
        is_summed = preset.add_operands == 'shortcut' and _is_summed_within(user, node, quantized, roles)
        return is_summed or _reads_float(user, node, roles, preset) or _leads_to(user, partial, roles)

    for group in groups:
        layers = {str(c.target): None for n in group for c in roles.consumers(n) if roles.is_weighted(c)}
        non_negative = all(roles.non_negative(n) for n in group)
        readers = frozenset(u for n in group for u in n.users if reads_float(u, n))
        first, per_channel = group[0], group[0] in by_channel
        # what a target computes of them between folded scales is float, and rounded as it is here
        is_folded = per_channel and preset.folds_channel_scales
        full_scale = not is_folded and any(_combines_grids(n, set(quantized), roles) for n in group)
        values = first.name, tuple(group), tuple(layers), non_negative, readers, full_scale, per_channel
        bounds = _bounds((user for node in group for user in node.users), roles)
        shifts = preset.folds_zero_points and not per_channel and _can_shift(set(group), readers, roles, preset)
        positions.append(QuantizerPosition(*values, roles.is_concat(first), shifts=shifts, bounds=bounds))
    return positions + _operands(roles, quantized, preset)


def _bounds(readers: Iterable[fx.Node], roles: Roles) -> tuple[float, float]:
    """Returns the bounds beyond which the functions that read a value are constant, as far as they reach."""
    found = [_bounds_of(reader, roles) if roles.is_activation(reader) else UNBOUNDED for reader in readers]
    return (min(low for low, _ in found), max(high for _, high in found)) if found else UNBOUNDED


def _bounds_of(activation: fx.Node, roles: Roles) -> tuple[float, float]:
    """Returns the bounds beyond which a function is constant, by its values."""
    points = torch.cat([torch.tensor([-1e4]), torch.linspace(-16, 16, 513), torch.tensor([1e4])])
    try:
        values = evaluate(activation, lambda _: points, roles.model)
    except (RuntimeError, TypeError):
        # its channels have numbers of their own
        return UNBOUNDED
    if not values.isfinite().all() or bool(((values - values[0]).abs() <= FLAT).all()):
        return UNBOUNDED
    bounds = []
    for outer, end in ((0, -math.inf), (-1, math.inf)):
        is_near = (values - values[outer]).abs() <= FLAT
        inner = int((~is_near).nonzero()[outer]) + (1 if outer else -1)
        bounds.append(float(points[inner]) if abs(float(points[inner])) <= 16 else end)
    return bounds[0], bounds[1]


def _can_shift(group: set[fx.Node], float_readers: Collection[fx.Node], roles: Roles, preset: Preset) -> bool:
    """Returns whether values can be moved by a constant before their Q at no cost, and layers take it back.

    The constant would part a layer from its activation function or sum, and a pooling, which targets have in integers,
    from its Q. What moves the values is read by layers alone.
    """
    fused = [n for n in group if _is_in_layer(n, roles) or roles.operation(n) in (*(preset.fuses or ()), 'mean')]
    users = [user for node in group for user in node.users if user not in float_readers]
    moving = [user for user in users if roles.is_weighted(user) or roles.moves_only(user)]
    if fused or not moving or any(n.op in ('placeholder', 'get_attr') or 'pool' in roles.operation(n) for n in group):
        return False
    apart = not any(_is_in_layer(user, roles) for user in users if user not in moving)
    return apart and all(_takes_shift(user, group, roles) for user in moving)


def _is_in_layer(node: fx.Node, roles: Roles) -> bool:
    """Returns whether ``node`` is a layer, or a sum that is computed within one."""
    inputs = node.all_input_nodes if roles.is_add(node) else [node]
    return any(map(roles.is_weighted, inputs))


def _takes_shift(user: fx.Node, group: set[fx.Node], roles: Roles) -> bool:
    """Returns whether the biases of all layers to which ``user`` moves values can make up for a constant in them."""
    if roles.is_weighted(user):
        return not roles.pads(user) and not isinstance(roles.module(user), TRANSPOSED)
    sources = {n for n in roles.sources(user) if roles.is_tensor(n) or n.op == 'get_attr'}
    only = roles.moves_only(user) and not roles.pads(user) and sources <= group and bool(user.users)
    return only and all(_takes_shift(reader, group, roles) for reader in user.users)


def _operands(roles: Roles, quantized: list[fx.Node], preset: Preset) -> list[QuantizerPosition]:
    """Returns the positions of what products of activations read, but for what lies on a grid already."""
    known, scores = set(quantized), preset.products == 'scores'
    found: dict[fx.Node, None] = {}
    for node in roles.graph.nodes if preset.products != 'none' else ():
        operands = [n for n in node.all_input_nodes if roles.is_tensor(n) and not follows_from_no_input(n)]
        if operation(node) not in (*PRODUCTS, 'einsum') or len(operands) != 2:
            continue
        origins = {n: roles.sources(n) if roles.moves_only(n) else [n] for n in operands}
        new = [n for n in operands if n not in known and known.isdisjoint(origins[n])]
        if not scores or (len(new) == 2 and _is_score(node, roles)):
            found.update(dict.fromkeys(new))
    return [
        QuantizerPosition(n.name, (n,), (), not scores and roles.non_negative(n), eight_bits=scores, symmetric=scores)
        for n in found
    ]


def _is_score(product: fx.Node, roles: Roles) -> bool:
    """Returns whether a softmax reads the product, scaled or masked or not."""
    way = ('add', 'sub', 'mul', 'div', 'where', 'maskedfill')
    found = roles.consumers(product, lambda user: roles.moves_only(user) or roles.operation(user) in way)
    return operation(product) in PRODUCTS and any(roles.operation(reader) == 'softmax' for reader in found)


def _is_quantized(node: fx.Node, roles: Roles, preset: Preset) -> bool:
    is_constant = node.op == 'get_attr' and torch.is_floating_point(node.meta['example'])
    if not (roles.is_tensor(node) or is_constant) or roles.moves_only(node):
        return preset.quantizes_concat and roles.is_concat(node) and _joins_grids(node, roles)
    consumers = list(roles.consumers(node))
    if is_constant:
        # such as learned queries
        return any(roles.is_weighted(c) for c in consumers)
    if all(_is_outside(c, preset) for c in consumers) or _is_fused(node, roles, preset):
        return False
    if any(roles.is_weighted(c) for c in consumers):
        return True
    if node.op == 'placeholder':
        return False
    if roles.is_add(node):
        return not _stays_float(node, roles)
    if roles.operation(node) == 'sigmoid' and _is_inverted(node, roles):
        return False
    if roles.is_activation(node):
        # what is only normalised next gains nothing by a grid, but as the output of an integer layer
        return preset.conv_outputs or not all(map(roles.is_norm, consumers))
    if preset.conv_outputs and roles.is_weighted(node):
        # a linear layer is an integer operator whatever follows it
        return not isinstance(roles.module(node), nn.Linear)
    adds = [c for c in consumers if roles.is_add(c)]
    return preset.add_operands == 'shortcut' and any(_is_shortcut(node, add, roles) for add in adds)


def _joins_grids(concat: fx.Node, roles: Roles) -> bool:
    """Returns whether a layer reads values of several producers right behind the concatenation."""
    readers = roles.consumers(concat, lambda user: roles.moves_only(user) and not roles.is_concat(user))
    return len(set(roles.sources(concat))) > 1 and any(map(roles.is_weighted, readers))


def _stays_float(add: fx.Node, roles: Roles) -> bool:
    """Returns whether a sum belongs to a residual stream of which layers read normalised values alone.

    Its readers are found through nodes that move or scale it, or add a constant.
    """
    found = roles.consumers(add, lambda user: roles.moves_only(user) or roles.is_affine(user))
    readers = [reader for reader in found if reader.op != 'output']
    if any(roles.is_weighted(reader) for reader in readers):
        return False
    return any(roles.is_norm(r) for r in readers) or all(roles.is_add(r) and _stays_float(r, roles) for r in readers)


def _is_inverted(node: fx.Node, roles: Roles) -> bool:
    """Returns whether a logarithm takes a sigmoid back: of coordinates, which 256 levels would move by pixels."""
    way = ('clamp', 'clampmin', 'sub', 'rsub', 'div', 'detach')
    found = roles.consumers(node, lambda user: roles.moves_only(user) or roles.operation(user) in way)
    return any(roles.operation(reader) == 'log' for reader in found)


def _with_channel_scales(quantized: list[fx.Node], roles: Roles, preset: Preset) -> set[fx.Node]:
    """Returns the values whose channels have a scale each.

    Where scales are folded, these include the outputs of convolutions from which the others are computed, or which
    activation functions in float alone read.
    """
    if not preset.depthwise_per_channel:
        return set()
    read = {node for node in quantized if _is_read_by_channel(node, roles, preset)}
    if preset.folds_channel_scales:
        convolutions = [node for node in quantized if roles.is_convolution(node)]
        read |= {n for n in convolutions if _becomes(n, read, roles) or _is_activated_in_float(n, roles, preset)}
    return read


def _is_read_by_channel(node: fx.Node, roles: Roles, preset: Preset) -> bool:
    """Returns whether the layers that read the value are depthwise convolutions, with its channels where they are.

    Where scales are folded, nothing else reads it on its grid, and the target computes it in float or as the output of
    a convolution.
    """
    readers = list(roles.consumers(node))
    if not preset.folds_channel_scales:
        readers = [reader for reader in readers if roles.is_weighted(reader)]
    elif roles.operation(node) in (preset.fuses or ()):
        return False
    else:
        readers = [r for r in readers if not (r in node.users and _reads_float(r, node, roles, preset))]
    within = set(roles.consumers(node, roles.moves_pixels))
    return bool(readers) and all(roles.is_depthwise(reader) and reader in within for reader in readers)


def _becomes(node: fx.Node, read: set[fx.Node], roles: Roles) -> bool:
    """Returns whether only functions in float read the value, and they compute a value of ``read``."""
    if any(roles.is_weighted(u) or roles.is_add(u) or roles.moves_only(u) or u.op == 'output' for u in node.users):
        return False
    return any(user in read or _becomes(user, read, roles) for user in node.users)


def _is_activated_in_float(node: fx.Node, roles: Roles, preset: Preset) -> bool:
    """Returns whether only activation functions read the value that the target has in float alone."""
    own = (*(preset.fuses or ()), *preset.computes)
    return all(roles.is_activation(user) and roles.operation(user) not in own for user in node.users)


def _reads_float(user: fx.Node, node: fx.Node, roles: Roles, preset: Preset) -> bool:
    """Returns whether ``user`` goes on reading the value of ``node`` in float where a layer reads it on a grid.

    It does where the target computes it within the layer ``node``, whose value has other readers too.
    """
    is_inner = roles.is_weighted(node) and roles.operation(user) in preset.fuses_beside
    return is_inner or _is_outside(user, preset)


def _is_outside(user: fx.Node, preset: Preset) -> bool:
    """Returns whether ``user`` is the network's output, or an opaque module, whose layers have their own quantizers.

    A product with a constant that is no layer counts too: targets would take it for a layer with a weight in float.
    """
    if operation(user) in PRODUCTS and any(map(follows_from_no_input, user.args[-2:])):
        return True
    opaque = any(layer != user.target for layer in user.meta.get('layers', ()))
    return user.op == 'output' or (opaque and not preset.conv_outputs)


def _combines_grids(node: fx.Node, quantized: set[fx.Node], roles: Roles) -> bool:
    """Returns whether the value is computed from quantized values alone, and by no layer."""
    if roles.is_weighted(node):
        return False
    inputs = [n for n in node.all_input_nodes if roles.is_tensor(n)]
    return bool(inputs) and all(n in quantized or _combines_grids(n, quantized, roles) for n in inputs)


def _is_fused(node: fx.Node, roles: Roles, preset: Preset) -> bool:
    """Returns whether the only reader is an activation function that is computed together with this layer or add."""
    user, *others = node.users
    is_fusible = not others and roles.is_activation(user) and (roles.is_weighted(node) or roles.is_add(node))
    return is_fusible and (preset.fuses is None or roles.operation(user) in preset.fuses)


def _is_shortcut(node: fx.Node, add: fx.Node, roles: Roles) -> bool:
    """Returns whether ``add`` is computed within a convolution, and reads ``node`` beside it.

    Of two layers it is computed within the one at the end of the longer branch. Where it stays in float, only the
    second of two layers counts.
    """
    layers = [n for n in add.all_input_nodes if roles.is_weighted(n)]
    if len(layers) > 1:
        before = [sum(map(roles.is_weighted, sources_of(layer))) for layer in layers]
        # of branches of one length it is the later one
        return node is layers[before[0] >= before[1]]
    within = [layer for layer in layers if layer is not node and not isinstance(roles.module(layer), nn.Linear)]
    return bool(within) and not _stays_float(add, roles)


def _partial_concats(roles: Roles, quantized: set[fx.Node]) -> set[fx.Node]:
    """Returns the concatenations of which some inputs are quantized for other readers: they read all in float."""
    concats = [n for n in roles.graph.nodes if roles.is_concat(n)]
    unread = [concat for concat in concats if not any(map(roles.is_weighted, roles.consumers(concat)))]
    return {
        concat for concat in unread if any(roles.is_tensor(s) and s not in quantized for s in roles.sources(concat))
    }


def _reads_apart(source: fx.Node, concats: set[fx.Node], roles: Roles) -> bool:
    """Returns whether what moves the values of ``source`` reaches ``concats`` alone, or none of them."""
    moves = [user for user in source.users if roles.moves_only(user) and user not in concats]
    reached = [set(roles.consumers(user, lambda u: roles.moves_only(u) and u not in concats)) for user in moves]
    return all(found <= concats or not found & concats for found in reached)


def _leads_to(user: fx.Node, concats: set[fx.Node], roles: Roles) -> bool:
    """Returns whether the values that ``user`` moves reach nothing else than ``concats``."""
    moves = roles.moves_only(user) and bool(user.users)
    return user in concats or (moves and all(_leads_to(u, concats, roles) for u in user.users))


def _is_summed_within(add: fx.Node, layer: fx.Node, quantized: list[fx.Node], roles: Roles) -> bool:
    """Returns whether ``add`` is computed within ``layer``, which it reads beside quantized values."""
    if not roles.is_add(add) or not roles.is_weighted(layer) or _is_shortcut(layer, add, roles):
        return False
    others = [source for source in roles.sources(add) if source is not layer]
    return bool(others) and all(other in quantized for other in others)


def _concat_groups(roles: Roles, quantized: list[fx.Node]) -> list[list[fx.Node]]:
    """Merges the values that meet in concatenations."""
    pairs = []
    for concat in (n for n in roles.graph.nodes if roles.is_concat(n)):
        sources = [s for s in roles.sources(concat) if s in quantized]
        pairs += [(sources[0], other) for other in sources[1:]]
    return joined(pairs, quantized)
