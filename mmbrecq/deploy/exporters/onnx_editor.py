"""Changes an exported ONNX graph in place."""

from typing import Any

import numpy as np

from mmbrecq.deploy.verify.onnx_graph import Array, OnnxGraph


class OnnxEditor(OnnxGraph):
    """Changes an ``onnx.ModelProto`` in place, and is a view of it that shows the nodes as they were before."""

    def __init__(self, model: Any) -> None:
        super().__init__(model, 'the exported graph')
        self.proto = model.graph
        self.makers = {name: node for node in self.proto.node for name in node.output}
        """The node of the graph itself that writes a tensor."""

    def store(self, name: str, values: Array | np.generic) -> str:
        """Adds a constant and returns its name."""
        from onnx import numpy_helper

        self.constants[name] = np.asarray(values)
        self.proto.initializer.append(numpy_helper.from_array(self.constants[name], name))
        return name

    def index(self, node: Any) -> int:
        """Returns the position of a node in the graph."""
        return list(self.proto.node).index(node)

    def insert(self, index: int, op: str, inputs: list[str], output: str, name: str, **attributes: Any) -> str:
        """Adds a node at a position, and returns its output."""
        from onnx import helper

        self.makers[output] = helper.make_node(op, inputs, [output], name=name, **attributes)
        self.proto.node.insert(index, self.makers[output])
        return output

    def drop_unread(self, *ops: str) -> None:
        """Removes what no node reads: Constant and DequantizeLinear nodes, those of ``ops``, and initializers."""
        graph = self.proto
        read = {name for node in graph.node for name in node.input} | {*self.outputs}
        droppable = [node for node in graph.node if node.op_type in ('Constant', 'DequantizeLinear', *ops)]
        if unread := [node for node in droppable if node.output[0] not in read]:
            for node in unread:
                graph.node.remove(node)
            self.drop_unread(*ops)
        for tensor in [t for t in graph.initializer if t.name not in read]:
            graph.initializer.remove(tensor)
