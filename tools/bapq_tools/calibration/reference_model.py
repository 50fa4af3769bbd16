"""The model as the calibration runs it: weights and biases of the layers are inputs.

One graph then serves every level, stage by stage: a stage is what can be computed once the layers
before it have been quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..onnx_graph import graphs
from ..onnx_graph.assemble import add_initializers_of_bodies, rebuild
from ..onnx_graph.ir import ConvGeometry, HeavyLayer, LayerPlan, LayerUse
from .body_taps import Tap, recorded, tapped

_SQUASHING = ("Softmax", "LogSoftmax", "Sigmoid", "Identity", "Flatten", "Reshape")
"""Operators that lose nothing an answer depends on, but may hide how sure it is."""

_SOFTMAX = ("Softmax", "LogSoftmax")

_WEIGHT, _BIAS = "bapq.weight.", "bapq.bias."


@dataclass(frozen=True)
class Observation:
    """Where the input of a layer is seen: a tensor, or what taps in bodies recorded of it."""

    use: LayerUse
    tensors: tuple[str, ...]
    """The input itself, or values and shapes as each `Tap` names them."""

    @classmethod
    def inside(cls, use: LayerUse, taps: Iterable[Tap]) -> Observation:
        """That of a use inside a body, and of others in other bodies that are like it."""
        return cls(use, tuple(name for tap in taps for name in (tap.values, tap.shapes)))

    @property
    def key(self) -> tuple[tuple[str, ...], ConvGeometry | None]:
        """A key that is equal for layers that multiply the same rows."""
        return self.tensors, self.use.conv

    def inputs(self, tensors: Mapping[str, Any]) -> list[np.ndarray]:
        """The inputs, one for each time that the layer ran."""
        found = [tensors[name] for name in self.tensors]
        if len(found) == 1:
            return found
        pairs = zip(found[::2], found[1::2], strict=True)
        return [each for values, shapes in pairs for each in recorded(values, shapes)]


@dataclass(frozen=True)
class Stage:
    """Nodes that can run, in order, and the layers whose inputs are known after them."""

    nodes: tuple[onnx.NodeProto, ...]
    layers: tuple[HeavyLayer, ...]
    observations: Mapping[str, Observation]
    """Where the inputs of the layers are seen, by layer name; those of some cannot be."""
    reads: frozenset[str]
    """Computed tensors that the nodes read from earlier stages."""
    writes: frozenset[str]
    """Tensors that later stages, the layers or the model's outputs read."""
    live: frozenset[str]
    """Tensors of this and earlier stages that are read after this one."""
    in_float: frozenset[str] | None = None
    """None, or where the stage only looks into bodies, which run again when all their layers are
    quantized: the names of the layers in them that are not quantized yet."""


@dataclass
class _PlannedStage:
    """A stage whose tensors are not named yet."""

    nodes: list[onnx.NodeProto]
    layers: tuple[HeavyLayer, ...] = ()
    observations: dict[str, Observation] = field(default_factory=dict)
    in_float: frozenset[str] | None = None


class _Waiting:
    """Things that wait for names to be known, in an order."""

    def __init__(self, needs: Sequence[Iterable[str]]) -> None:
        self.missing = [set(names) for names in needs]
        """What each still waits for; empty sets for those that were ready."""
        self._by_name: dict[str, list[int]] = {}
        for index, names in enumerate(self.missing):
            for name in names:
                self._by_name.setdefault(name, []).append(index)
        self._ready = [index for index, names in enumerate(self.missing) if not names]
        self.left = len(self.missing)
        """How many have not been ready yet."""

    def know(self, names: Iterable[str]) -> None:
        """Take note of names."""
        for name in names:
            for index in self._by_name.pop(name, ()):
                self.missing[index].discard(name)
                if not self.missing[index]:
                    self._ready.append(index)

    def ready(self) -> list[int]:
        """Those that have all they waited for, each told once, in order."""
        found, self._ready = sorted(self._ready), []
        self.left -= len(found)
        return found


class Reference:
    """A model's graph with standard operators that read the layers' weights as inputs."""

    def __init__(self, model: onnx.ModelProto, plan: LayerPlan) -> None:
        self._model = model
        self._plan = plan
        self._needs: dict[int, tuple[onnx.NodeProto, frozenset[str]]] = {}  # by identity
        self._taken = taken = graphs.names(model.graph)
        operators: dict[int, list[onnx.NodeProto]] = {
            id(node): [] for layer in plan.layers for use in layer.uses for node in _own(use)
        }
        for layer in plan.layers:
            for use in layer.uses:
                operators[id(use.node)] = self._operator(layer, use, taken)
        self.graph = rebuild(model.graph, operators)
        add_initializers_of_bodies(model.graph, self.graph)
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

    def softmax_inputs(self) -> frozenset[str]:
        """The judged tensors that go into a Softmax: a constant added to a row changes nothing."""
        through = {"Identity", "Flatten", "Reshape"}
        readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.graph.node:
            for name in node.input:
                readers.setdefault(name, []).append(node)

        def ends_in_softmax(name: str) -> bool:
            return any(
                node.op_type in _SOFTMAX
                or (node.op_type in through and ends_in_softmax(node.output[0]))
                for node in readers.get(name, [])
            )

        outputs = {item.name for item in self.graph.output}
        judged = set(self.judged_tensors()) - outputs
        return frozenset(name for name in judged if ends_in_softmax(name))

    def stages(self) -> Iterator[Stage]:
        """The stages in order; the last one has no layers."""
        pending = list(self._plan.layers)
        seen = {
            layer.name: Observation(use, (use.activation_input,))
            for layer in pending
            for use in reversed(_telling_uses(layer))
            if not use.is_body
        }
        nodes = _Waiting([self.needs(node) for node in self.graph.node])
        layers = _Waiting([set(_tensors(seen.get(layer.name))) for layer in pending])
        known = {item.name for item in self.graph.input}
        known |= set(self._initializers) | set(self._sparse)
        quantized: set[str] = set()
        planned: list[_PlannedStage] = []
        while nodes.left:
            stage = _PlannedStage([])
            while known:
                layers.know(known)
                nodes.know(known)
                new = [self.graph.node[index] for index in nodes.ready()]
                stage.nodes.extend(new)
                known = {name for node in new for name in node.output if name}
            ready = [self._plan.layers[index] for index in layers.ready()]
            stage.layers = tuple(layer for layer in ready if layer.name not in quantized)
            stage.observations = {layer.name: seen[layer.name] for layer in stage.layers}
            if not stage.nodes and not stage.layers:
                pending = [layer for layer in pending if layer.name not in quantized]
                stage = self._inside(nodes, pending)
            planned.append(stage)
            for layer in stage.layers:
                quantized.add(layer.name)
                known |= weight_inputs(layer)
        outputs = {item.name for item in self.graph.output} | set(self.judged_tensors())
        yield from self._with_names(planned, outputs)

    def _inside(self, nodes: _Waiting, pending: list[HeavyLayer]) -> _PlannedStage:
        """Look into a node that waits for layers in its bodies: at the first input of such."""
        blocked = (
            index
            for index, missing in enumerate(nodes.missing)
            if missing and all(name.startswith((_WEIGHT, _BIAS)) for name in missing)
        )
        index = next(blocked, None)
        if index is None:
            raise ValueError("the graph is not in topological order")
        node = self.graph.node[index]
        names = {self._layers[name].name for name in self.needs(node) if name in self._layers}
        waiting = [layer for layer in pending if layer.name in names]
        uses = _uses_in_bodies(waiting[0])
        nodes_with_taps, found = tapped(node, uses, self._taken)
        if found:
            places = {_place(use) for use, _ in found}
            taps = [tap for _, tap in found]
            same = {
                layer.name: Observation.inside(others[0], taps)
                for layer in waiting
                if (others := _uses_in_bodies(layer))
                if places <= (own := {_place(use) for use in others})
                if len(own) == len(uses)
            }
            layers = tuple(layer for layer in waiting if layer.name in same)
            in_float = frozenset(layer.name for layer in waiting)
            return _PlannedStage(nodes_with_taps, layers, same, in_float)
        return _PlannedStage([], (waiting[0],))

    def _with_names(self, planned: list[_PlannedStage], outputs: set[str]) -> Iterator[Stage]:
        """Add the tensors that pass from one stage to the next."""
        last_read = dict.fromkeys(outputs, len(planned))
        needs = [set().union(*map(self.needs, each.nodes)) for each in planned]
        for number, each in enumerate(planned):
            after = (name for seen in each.observations.values() for name in seen.tensors)
            for names, place in ((needs[number], number), (after, number + 1)):
                for name in names:
                    last_read[name] = max(last_read.get(name, 0), place)
        live = {item.name for item in self.graph.input}
        for number, each in enumerate(planned):
            reads = needs[number] & live
            outputs = {name for node in each.nodes for name in node.output if name}
            writes = {name for name in outputs if last_read.get(name, 0) > number}
            live = {name for name in live | writes if last_read.get(name, 0) > number}
            yield Stage(
                tuple(each.nodes),
                each.layers,
                each.observations,
                frozenset(reads),
                frozenset(writes),
                frozenset(live),
                each.in_float,
            )

    def model_of(
        self,
        nodes: Iterable[onnx.NodeProto],
        inputs: Mapping[str, onnx.TypeProto],
        outputs: Iterable[str],
        constants: Mapping[str, np.ndarray] = MappingProxyType({}),
    ) -> onnx.ModelProto:
        """Make a model of some nodes; `inputs` are the types of what they read besides weights.

        Weights are inputs, too, but those in `constants`.
        """
        nodes = list(nodes)
        part = onnx.GraphProto(name="stage", node=nodes)
        needs = set().union(*(self.needs(node) for node in nodes))
        for name in sorted(needs):
            if name in constants:
                part.initializer.append(numpy_helper.from_array(constants[name], name))
            elif name in self._initializers and name not in inputs:
                part.initializer.append(self._initializers[name])
            elif name in self._sparse:
                part.sparse_initializer.append(self._sparse[name])
            elif name in self._layers or name.startswith(_BIAS):
                part.input.append(_value(name, onnx.TensorProto.FLOAT))
        part.input.extend(onnx.ValueInfoProto(name=n, type=kind) for n, kind in inputs.items())
        part.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        result = onnx.ModelProto(ir_version=self._model.ir_version, graph=part)
        result.opset_import.extend(self._model.opset_import)
        return result

    def input_types(self) -> dict[str, onnx.TypeProto]:
        """The types of the model's inputs, of any size."""
        types = {}
        for item in self.graph.input:
            kind = types[item.name] = onnx.TypeProto()
            kind.CopyFrom(item.type)
            if kind.HasField("tensor_type"):
                kind.tensor_type.ClearField("shape")
        return types

    def layers_of(self, nodes: Iterable[onnx.NodeProto]) -> list[HeavyLayer]:
        """The layers whose weights these nodes read."""
        needs = set().union(*(self.needs(node) for node in nodes))
        found = {self._layers[n].name: self._layers[n] for n in needs if n in self._layers}
        return [found[name] for name in sorted(found)]

    def needs(self, node: onnx.NodeProto) -> frozenset[str]:
        """The names that a node reads, and those that its bodies read from outside."""
        if id(node) not in self._needs:
            needs = {name for name in node.input if name}
            for body in graphs.bodies(node):
                inner = {name for part in graphs.walk(body) for n in part.node for name in n.output}
                inner |= {item.name for part in graphs.walk(body) for item in part.input}
                inner |= {item.name for part in graphs.walk(body) for item in part.initializer}
                needs |= set(graphs.uses(body)) - inner
            self._needs[id(node)] = node, frozenset(needs)
        return self._needs[id(node)][1]

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


def _tensors(observation: Observation | None) -> tuple[str, ...]:
    return observation.tensors if observation else ("",)  # no tensor has this name


def _telling_uses(layer: HeavyLayer) -> list[LayerUse]:
    """The uses whose input tells what matters: of a gathered table, which rows are read."""
    return [use for use in layer.uses if not layer.gathered or use.operator == "Gather"]


def _uses_in_bodies(layer: HeavyLayer) -> list[LayerUse]:
    """Those of the telling uses that stand in bodies, one for each input."""
    uses = {_place(use): use for use in reversed(_telling_uses(layer)) if use.is_body}
    return list(reversed(uses.values()))


def _place(use: LayerUse) -> tuple[int, str, bool]:
    """What is equal for uses of one input; indices of a Gather are recorded in a form of theirs."""
    return id(use.graph), use.activation_input, use.operator == "Gather"


def weight_inputs(layer: HeavyLayer) -> set[str]:
    """The names that `weight_feeds` gives values to."""
    return {_weight_name(layer, use) for use in layer.uses} | {_BIAS + layer.name}


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
