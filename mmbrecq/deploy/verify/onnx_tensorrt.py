"""T1 to T6: what TensorRT asks of a Q/DQ ONNX file.

Source: NVIDIA's TensorRT guide, "Explicit Quantization", the recommendations on Q/DQ placement.
"""

from mmbrecq.deploy.verify.onnx_graph import CONV_OPS, QUANTIZATION_OPS, Faults, Node, OnnxGraph
from mmbrecq.deploy.verify.onnx_structure import check_concat_grids, title

# TensorRT fuses these into the convolution before them.
FUSED_OPS = frozenset({'BatchNormalization', 'Clip', 'LeakyRelu', 'PRelu', 'Relu'})


def check_int8(graph: OnnxGraph) -> Faults:
    """T1: int8 only, zero-points 0, and no Clip of integers, which TensorRT does not have."""
    for node in graph.of_type(*QUANTIZATION_OPS):
        container = graph.zero_point_range(node)
        if container != (-128, 127):
            found = 'another type' if container is None else f'integers of {container[0]}..{container[1]}'
            yield node.name, f'expected int8, but got {found}'
        elif graph.zero_point(node).any():
            worst = graph.zero_point(node)[graph.zero_point(node) != 0].flat[0]
            yield node.name, f'expected zero-points 0, but got {worst}'
    for node in graph.activation_quantizers():
        clip = graph.integer_clip(node)
        if clip is not None:
            yield clip.name, f'expected a Clip of real values before {title(node)}, but got one of integers behind it'


def check_per_tensor(graph: OnnxGraph) -> Faults:
    """T2: activations have one scale per tensor."""
    for node in graph.activation_quantizers():
        scale = graph.scale(node)
        if scale is not None and scale.size != 1:
            yield node.name, f'expected one scale per tensor, but got {scale.size}'


def check_inputs(graph: OnnxGraph) -> Faults:
    """T3: a convolution or linear layer has Q/DQ on its input and its weight, or, left in float, on neither."""
    for layer in graph.layers():
        data = graph.quantized_sources(layer.data) is not None
        if data != (layer.weight_dq is not None):
            found = 'the input' if data else 'the weight'
            yield layer.node.name, f'expected Q/DQ on input and weight, but only {found} has it'


def check_fusions(graph: OnnxGraph) -> Faults:
    """T4: no Q/DQ between a convolution and the BatchNorm or ReLU after it, or the Pad before it."""
    for conv in graph.of_type(*CONV_OPS):
        for quantizer in graph.consumers(conv.outputs[0]):
            if quantizer.op != 'QuantizeLinear':
                continue
            for fused in graph.readers_behind(quantizer):
                if fused.op in FUSED_OPS and not _narrows_a_grid(graph, fused):
                    between = f'{title(conv)} and {title(fused)}'
                    yield quantizer.name, f'expected no Q/DQ between {between}, but got {quantizer.name!r}'
        before = graph.quantizer(graph.producer(conv.input(0)))
        pad = None if before is None else graph.producer(before.input(0))
        if before is not None and pad is not None and pad.op == 'Pad':
            yield before.name, f'expected no Q/DQ between {title(pad)} and {title(conv)}, but got {before.name!r}'


def _narrows_a_grid(graph: OnnxGraph, node: Node) -> bool:
    """Whether a Clip belongs to the Q after it, so that it is no activation function."""
    readers = graph.consumers(node.outputs[0])
    return any(reader.op == 'QuantizeLinear' and graph.grid_clip(reader) is node for reader in readers)


def check_residuals(graph: OnnxGraph) -> Faults:
    """T5: a residual add reads one convolution directly, and everything else through Q/DQ.

    Without a Q behind it, or with an input in float, the sum is computed in float whatever else comes before it. A
    residual stream that is nowhere quantized may be such an input.
    """
    quantized = {layer.node for layer in graph.layers() if layer.weight_dq is not None and layer.node.op in CONV_OPS}
    for add in graph.of_type('Add'):
        computed = [tensor for tensor in add.inputs if graph.constant(tensor) is None]
        if len(computed) != 2:
            continue
        direct = [graph.producer(tensor) in quantized for tensor in computed]
        through = [_conv_behind_qdq(graph, tensor, quantized) for tensor in computed]
        if sum(direct) == 2:
            yield add.name, 'expected Q/DQ on the shortcut, but both inputs come straight from convolutions'
        elif sum(direct) == 1:
            shortcut = computed[direct.index(False)]
            found = graph.producer(shortcut)
            readers = [] if found is None or found.op != 'Add' else graph.consumers(found.outputs[0])
            is_stream = bool(readers) and all(reader.op != 'QuantizeLinear' for reader in readers)
            if graph.quantized_sources(shortcut) is None and _is_quantized(graph, add) and not is_stream:
                yield add.name, f'expected Q/DQ on the shortcut, but it comes from {title(found)}'
        elif any(through) and all(graph.quantized_sources(tensor) is not None for tensor in computed):
            conv = title(next(node for node in through if node is not None))
            message = 'but no input comes straight from a convolution'
            yield add.name, f'expected no Q/DQ between {conv} and the add, {message}'


def _is_quantized(graph: OnnxGraph, node: Node) -> bool:
    """Returns whether a Q reads the value, or what an activation function makes of it."""
    readers, fused = graph.consumers(node.outputs[0]), FUSED_OPS - {'BatchNormalization'}
    return any(r.op == 'QuantizeLinear' or (r.op in fused and _is_quantized(graph, r)) for r in readers)


def _conv_behind_qdq(graph: OnnxGraph, tensor: str, convs: set[Node]) -> Node | None:
    """The convolution that ``tensor`` comes from through one Q/DQ, with the Clip of its grid, and nothing else."""
    quantizer = graph.quantizer(graph.producer(tensor))
    if quantizer is None:
        return None
    source = graph.producer((graph.grid_clip(quantizer) or quantizer).input(0))
    return source if source in convs else None


def check_concats(graph: OnnxGraph) -> Faults:
    """T6: the inputs of a Concat are all quantized on one grid, or none is."""
    for concat in graph.of_type('Concat'):
        sources = [graph.quantized_sources(tensor) for tensor in concat.inputs if graph.constant(tensor) is None]
        quantized = [source for source in sources if source is not None]
        if quantized and len(quantized) != len(sources):
            yield concat.name, f'expected Q/DQ on all inputs or none, but {len(quantized)} of {len(sources)} have it'
    yield from check_concat_grids(graph)
