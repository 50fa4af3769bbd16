"""The model as the calibration runs it: weights and biases of the layers are inputs.

One graph then serves every level, stage by stage: a stage is what can be computed once the layers
before it have been quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from ..onnx_graph import graphs
from ..onnx_graph.assemble import rebuild
from ..onnx_graph.ir import HeavyLayer, LayerPlan, LayerUse

_SQUASHING = ("Softmax", "LogSoftmax", "Sigmoid", "Identity", "Flatten", "Reshape")
"""Operators that lose nothing an answer depends on, but may hide how sure it is."""

_WEIGHT, _BIAS = "bapq.weight.", "bapq.bias."


@dataclass(frozen=True)
class Stage:
    """Nodes that can run, in order, and the layers whose inputs are known after them."""

    nodes: tuple[onnx.NodeProto, ...]
    layers: tuple[HeavyLayer, ...]
    reads: frozenset[str]
    """Computed tensors that the nodes read from earlier stages."""
    writes: frozenset[str]
    """Tensors that later stages, the layers or the model's outputs read."""
    live: frozenset[str]
    """Tensors of this and earlier stages that are read after this one."""


class Reference:
    """A model's graph with standard operators that read the layers' weights as inputs."""

    def __init__(self, model: onnx.ModelProto, plan: LayerPlan) -> None:
        self._model = model
        self._plan = plan
        taken = graphs.names(model.graph)
        operators: dict[int, list[onnx.NodeProto]] = {
            id(node): [] for layer in plan.layers for use in layer.uses for node in _own(use)
        }
        for layer in plan.layers:
            for use in layer.uses:
                operators[id(use.node)] = self._operator(layer, use, taken)
        self.graph = rebuild(model.graph, operators)
        self._layers = {
            _weight_name(layer, use): layer for layer in plan.layers for use in layer.uses
        }
        self._initializers: dict[str, onnx.TensorProto] = {}
        replaced = {name for layer in plan.layers for name in layer.initializers}
        reads = set(graphs.uses(self.graph))
        for tensor in model.graph.initializer:
            if tensor.name in reads or tensor.name not in replaced:
                self._initializers[tensor.name] = tensor
        self._sparse = {item.values.name: item for item in model.graph.sparse_initializer}

    def judged_tensors(self) -> list[str]:
        """The model's float32 outputs; of one that a Softmax or Sigmoid makes, what goes into it.

        Probabilities of a sure classifier hide errors until they flip an answer; its scores do not.
        """
        judged = [
            logits_tensor(self.graph, item.name)
            for item in self.graph.output
            if item.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        ]
        return list(dict.fromkeys(judged))

    def stages(self) -> Iterator[Stage]:
        """The stages in order; the last one has no layers."""
        pending = [layer for layer in self._plan.layers if observed(layer)]
        unobserved = tuple(layer for layer in self._plan.layers if not observed(layer))
        quantized = {layer.name for layer in unobserved}
        computed = {item.name for item in self.graph.input}
        computed |= set(self._initializers) | set(self._sparse)
        rest = [(node, self.needs(node)) for node in self.graph.node]
        planned: list[tuple[list[onnx.NodeProto], tuple[HeavyLayer, ...]]] = []
        if unobserved:
            planned.append(([], unobserved))
        while rest:
            nodes, later = [], []
            for node, needs in rest:
                weights = {name for name in needs if name in self._layers}
                biases = {name for name in needs if name.startswith(_BIAS)}
                known = {self._layers[name].name for name in weights} <= quantized
                if known and needs - weights - biases <= computed:
                    nodes.append(node)
                    computed.update(name for name in node.output if name)
                else:
                    later.append((node, needs))
            ready = tuple(layer for layer in pending if _input(layer) in computed)
            if not nodes and not ready:
                raise ValueError("the graph is not in topological order")
            pending = [layer for layer in pending if _input(layer) not in computed]
            quantized |= {layer.name for layer in ready}
            planned.append((nodes, ready))
            rest = later
        outputs = {item.name for item in self.graph.output} | set(self.judged_tensors())
        yield from self._with_names(planned, outputs)

    def _with_names(
        self,
        planned: list[tuple[list[onnx.NodeProto], tuple[HeavyLayer, ...]]],
        outputs: set[str],
    ) -> Iterator[Stage]:
        """Add the tensors that pass from one stage to the next."""
        read_after: list[set[str]] = []
        needed = set(outputs)
        for nodes, _ in reversed(planned):
            read_after.append(set(needed))
            for node in nodes:
                needed |= self.needs(node)
        constant = set(self._initializers) | set(self._sparse)
        computed = {item.name for item in self.graph.input}
        for (nodes, layers), after in zip(planned, reversed(read_after), strict=True):
            needs = {name for node in nodes for name in self.needs(node)}
            writes = {name for node in nodes for name in node.output if name}
            reads = (needs & computed) - constant
            computed |= writes
            wanted = after | {_input(layer) for layer in layers if observed(layer)}
            live = (wanted & computed) - constant
            yield Stage(
                tuple(nodes), layers, frozenset(reads), frozenset(writes & wanted), frozenset(live)
            )

    def model_of(
        self,
        nodes: Iterable[onnx.NodeProto],
        inputs: dict[str, np.ndarray],
        outputs: Iterable[str],
    ) -> onnx.ModelProto:
        """Make a model of some nodes; `inputs` are examples of what they read besides weights."""
        nodes = list(nodes)
        part = onnx.GraphProto(name="stage", node=nodes)
        needs = set().union(*(self.needs(node) for node in nodes))
        for name in sorted(needs):
            if name in self._initializers and name not in inputs:
                part.initializer.append(self._initializers[name])
            elif name in self._sparse:
                part.sparse_initializer.append(self._sparse[name])
            elif name in self._layers or name.startswith(_BIAS):
                part.input.append(_value(name, onnx.TensorProto.FLOAT))
        for name, example in inputs.items():
            part.input.append(_value(name, helper.np_dtype_to_tensor_dtype(example.dtype)))
        part.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        result = onnx.ModelProto(ir_version=self._model.ir_version, graph=part)
        result.opset_import.extend(self._model.opset_import)
        return result

    def weight_inputs(self, nodes: Iterable[onnx.NodeProto]) -> list[HeavyLayer]:
        """The layers that these nodes read."""
        needs = set().union(*(self.needs(node) for node in nodes))
        found = {layer.name: layer for name, layer in self._layers.items() if name in needs}
        return list(found.values())

    def needs(self, node: onnx.NodeProto) -> set[str]:
        """The names that a node reads, and those that its bodies read from outside."""
        needs = {name for name in node.input if name}
        for body in graphs.bodies(node):
            inner = {name for part in graphs.walk(body) for n in part.node for name in n.output}
            inner |= {item.name for part in graphs.walk(body) for item in part.input}
            inner |= {item.name for part in graphs.walk(body) for item in part.initializer}
            needs |= set(graphs.uses(body)) - inner
        return needs

    @staticmethod
    def _operator(layer: HeavyLayer, use: LayerUse, taken: set[str]) -> list[onnx.NodeProto]:
        """Make standard nodes for one use of a layer: the product and its bias.

        For what the operator does behind them, the model's own nodes are still there.
        """
        weight, bias = _weight_name(layer, use), _BIAS + layer.name
        x, y = use.activation_input, _own(use)[-1].output[0]
        if use.operator == "Gather":
            return [helper.make_node("Gather", [weight, x], [y])]
        if use.operator == "MatMul":
            product = graphs.fresh_name(f"{y}_MatMul", taken)
            return [
                helper.make_node("MatMul", [x, weight], [product]),
                helper.make_node("Add", [product, bias], [y]),
            ]
        if use.operator == "Gemm":
            return [helper.make_node("Gemm", [x, weight, bias], [y], transB=1)]
        node = helper.make_node("Conv", [x, weight, bias], [y])
        node.attribute.extend(use.node.attribute)
        return [node]


def _own(use: LayerUse) -> tuple[onnx.NodeProto, ...]:
    """The nodes of the product and its bias."""
    return use.replaced[: len(use.replaced) - len(use.behind)]


def logits_tensor(graph: onnx.GraphProto, output: str) -> str:
    """The tensor behind the Softmax, Sigmoid or change of shape that makes an output."""
    producers = {name: node for node in graph.node for name in node.output}
    while output in producers and producers[output].op_type in _SQUASHING:
        output = producers[output].input[0]
    return output


def observed(layer: HeavyLayer) -> bool:
    """Whether some use of the layer has an input that can be seen from outside."""
    return any(not use.is_body for use in layer.uses)


def observed_use(layer: HeavyLayer) -> LayerUse:
    """The use that calibration looks at: the first that can be seen."""
    return next(use for use in layer.uses if not use.is_body)


def _input(layer: HeavyLayer) -> str:
    return observed_use(layer).activation_input


def weight_feeds(
    layer: HeavyLayer, weight: np.ndarray, bias: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Bring a weight (rows, columns) and bias (rows,) into the form that `Reference` reads."""
    rows = len(weight)
    feeds = {_BIAS + layer.name: np.zeros(rows, np.float32) if bias is None else bias}
    for use in layer.uses:
        name = _weight_name(layer, use)
        if name in feeds:
            continue
        form = weight
        if use.conv is not None:
            form = weight.reshape(rows, *use.conv.kernel, -1).transpose(0, 3, 1, 2)
            form = form[:, :, 0] if use.conv.dimensions == 1 else form
        elif use.operator == "MatMul":
            form = weight.T
        feeds[name] = np.ascontiguousarray(form, np.float32)
    return feeds


def _weight_name(layer: HeavyLayer, use: LayerUse) -> str:
    """The name of a layer's weight in the form that a use reads; tied uses may read several."""
    if use.conv is not None:
        form = "x".join(map(str, use.conv.kernel[-use.conv.dimensions :]))
    else:
        form = "columns" if use.operator == "MatMul" else "rows"
    return f"{_WEIGHT}{form}.{layer.name}"


def _value(name: str, element_type: int) -> onnx.ValueInfoProto:
    """Describe a tensor of any shape."""
    info = onnx.ValueInfoProto(name=name)
    info.type.tensor_type.elem_type = element_type
    return info
