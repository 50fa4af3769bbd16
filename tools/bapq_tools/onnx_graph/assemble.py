"""Writes the bank's graph: chunk operators in place of the heavy nodes, their weights gone."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bapq_edge.bank.graph_file import check_graph
from bapq_edge.engine.graph import RUN_INPUT
from bapq_edge.errors import BankFormatError, UnsupportedModelError

from . import graphs
from .ir import Function, HeavyLayer, LayerPlan, LayerUse
from .plain_nodes import PLAIN_OPERATORS, PlainNode, find_plain_nodes

DOMAIN = "bapq"
DOMAIN_VERSION = 1
NO_CLIP_HIGH = float(np.finfo(np.float32).max)
NO_CLIP_LOW = -NO_CLIP_HIGH
"""Bounds that clip nothing: attributes hold no infinities."""

_FUNCTIONS: tuple[Function | None, ...] = (None, "hard_swish", "silu", "gelu", "gelu_tanh")
"""In the order of `bapq_function` of native/src/kernels/kernels.h."""

_AUTO_PAD = {"NOTSET": 0, "SAME_UPPER": 1, "SAME_LOWER": 2}

_MIB = 1 << 20


def reads_layer(node: onnx.NodeProto) -> bool:
    """Whether the node of a bank's graph is an operator on one of the bank's layers."""
    return node.domain == DOMAIN and node.op_type not in PLAIN_OPERATORS


def assemble(model: onnx.ModelProto, plan: LayerPlan) -> bytes:
    """Make the bank's graph, as a serialized ONNX model; `model` stays as it is.

    `plan` is that of `find_layers` for this very model; a layer's bias may have been set since.

    Raises:
        UnsupportedModelError: what stays in float is too large for one file, or the model uses the
            name of our own input, or operators of a domain that banks do not admit.
    """
    taken = graphs.names(model.graph)
    if RUN_INPUT in taken:
        raise UnsupportedModelError(
            f"the model has a tensor named {RUN_INPUT!r}, which banks use; rename it"
        )
    plain_nodes = list(find_plain_nodes(model, plan.ranks))  # held: protobuf's identities last so
    operators = _operators(model, plan, plain_nodes, taken)
    result = onnx.ModelProto(ir_version=model.ir_version)
    for name in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        setattr(result, name, getattr(model, name))
    result.metadata_props.extend(model.metadata_props)
    result.opset_import.extend(model.opset_import)
    result.opset_import.add(domain=DOMAIN, version=DOMAIN_VERSION)
    result.graph.CopyFrom(rebuild(model.graph, operators))
    if operators:
        raise ValueError("the plan was made for another model")
    result.graph.input.append(helper.make_tensor_value_info(RUN_INPUT, TensorProto.INT64, []))
    graphs.remove_dead(result.graph)
    _add_initializers(model.graph, result.graph)
    try:
        found: bytes = result.SerializeToString(deterministic=True)
    except ValueError as error:
        left = sum(len(tensor.raw_data) for tensor in graphs.tensors(result.graph))
        raise UnsupportedModelError(
            f"{left // _MIB} MiB of weights stay in float; one graph file holds at most 2048 MiB"
        ) from error
    try:
        check_graph(found, "the graph without its layers")
    except BankFormatError as error:
        raise UnsupportedModelError(f"no device would open the bank: {error}") from None
    return found


def split_residuals(graph: onnx.GraphProto) -> None:
    """Put the sums that operators took over, with their clips, back behind the operators."""
    taken = graphs.names(graph)
    for part in graphs.walk(graph):
        nodes: list[onnx.NodeProto] = []
        for node in part.node:
            nodes.append(node)
            if not reads_layer(node) or len(node.input) < 3:
                continue
            output, residual = node.output[0], node.input.pop()
            product, total, raised = (
                graphs.fresh_name(f"{output}_{what}", taken) for what in ("product", "sum", "low")
            )
            node.output[0] = product
            bounds = {}
            for item in node.attribute:
                if item.name in ("clip_low", "clip_high"):
                    bounds[item.name] = graphs.fresh_name(f"{output}_{item.name}", taken)
                    limit = np.array(item.f, np.float32)
                    part.initializer.append(numpy_helper.from_array(limit, bounds[item.name]))
                    item.f = NO_CLIP_LOW if item.name == "clip_low" else NO_CLIP_HIGH
            nodes.append(helper.make_node("Add", [product, residual], [total]))
            nodes.append(helper.make_node("Max", [total, bounds["clip_low"]], [raised]))
            nodes.append(helper.make_node("Min", [raised, bounds["clip_high"]], [output]))
        graphs.replace_nodes(part, nodes)


def drop_replaced(model: onnx.ModelProto, plan: LayerPlan) -> onnx.ModelProto:
    """Drop the weights that only the layers' nodes read: the plan holds them.

    `model` is used up: its weights go, and the plan is led over to the nodes of the new one.
    """
    nothing: list[onnx.NodeProto] = []
    replaced = {
        id(node): nothing for layer in plan.layers for use in layer.uses for node in use.replaced
    }
    read = graphs.uses(rebuild(model.graph, replaced))
    dropped = {name for layer in plan.layers for name in layer.initializers if not read[name]}
    for part in graphs.walk(model.graph):
        graphs.delete_where(part.initializer, lambda tensor: tensor.name in dropped)
    # Protobuf keeps the memory of what was deleted as long as the model lives.
    light = onnx.ModelProto()
    light.CopyFrom(model)
    parts, nodes = {}, {}
    for old, new in zip(graphs.walk(model.graph), graphs.walk(light.graph), strict=True):
        parts[id(old)] = new
        nodes.update({id(a): b for a, b in zip(old.node, new.node, strict=True)})
    for layer in plan.layers:
        layer.uses = tuple(
            dataclasses.replace(
                use,
                node=nodes[id(use.node)],
                replaced=tuple(nodes[id(node)] for node in use.replaced),
                behind=tuple(nodes[id(node)] for node in use.behind),
                graph=parts[id(use.graph)],
            )
            for use in layer.uses
        )
    return light


def _operators(
    model: onnx.ModelProto, plan: LayerPlan, plain_nodes: list[PlainNode], taken: set[str]
) -> dict[int, list[onnx.NodeProto]]:
    """Make what stands in place of each node of the plan and each plain one, by its identity."""
    operators: dict[int, list[onnx.NodeProto]] = {}
    replaced = {id(node) for layer in plan.layers for use in layer.uses for node in use.replaced}
    # ORT refuses a graph in which two custom operators, or one and another node, share a name.
    node_names = {
        node.name
        for part in graphs.walk(model.graph)
        for node in part.node
        if id(node) not in replaced
    }
    for index, layer in enumerate(plan.layers):
        for use in layer.uses:
            operators.update((id(node), []) for node in use.replaced)
            name = graphs.fresh_name(use.node.name or layer.name, node_names)
            # Not before the last of them, where all that it reads is computed.
            operators[id(use.replaced[-1])] = _operator(index, layer, use, name, taken)
    for plain in plain_nodes:
        if id(plain.node) not in replaced:
            name = graphs.fresh_name(plain.node.name or plain.node.output[0], node_names)
            operators[id(plain.node)] = [_plain_operator(plain, name)]
    return operators


def _plain_operator(plain: PlainNode, name: str) -> onnx.NodeProto:
    return helper.make_node(
        plain.node.op_type,
        [plain.source, RUN_INPUT, *plain.constants],
        [plain.node.output[0]],
        name=name,
        domain=DOMAIN,
        **plain.attributes,
    )


def _operator(
    index: int, layer: HeavyLayer, use: LayerUse, name: str, taken: set[str]
) -> list[onnx.NodeProto]:
    """Make the operator, behind a Cast of the indices if it is a Gather."""
    attributes: dict[str, Any] = {"layer": index}
    source, before = use.activation_input, []
    if use.operator == "Gather":
        # ORT removes the Cast where the indices are int64 already.
        source = graphs.fresh_name(f"{use.output}_indices", taken)
        cast = helper.make_node("Cast", [use.activation_input], [source], to=TensorProto.INT64)
        before.append(cast)
    else:
        attributes["use_bias"] = int(layer.bias is not None)
        attributes["function"] = _FUNCTIONS.index(use.function)
        attributes["clip_low"] = max(use.activation.low, NO_CLIP_LOW)
        attributes["clip_high"] = min(use.activation.high, NO_CLIP_HIGH)
    if use.conv is not None:
        conv = use.conv
        attributes["group"] = conv.group
        attributes["auto_pad"] = _AUTO_PAD[conv.auto_pad]
        attributes["kernel_h"], attributes["kernel_w"] = conv.kernel
        attributes["stride_h"], attributes["stride_w"] = conv.strides
        attributes["dilation_h"], attributes["dilation_w"] = conv.dilations
        for side, pad in zip(("top", "left", "bottom", "right"), conv.pads, strict=True):
            attributes[f"pad_{side}"] = pad
    node = helper.make_node(
        use.operator,
        [source, RUN_INPUT, *([use.residual] if use.residual else [])],
        [use.output],
        name=name,
        domain=DOMAIN,
        **attributes,
    )
    return [*before, node]


def rebuild(graph: onnx.GraphProto, operators: dict[int, list[onnx.NodeProto]]) -> onnx.GraphProto:
    """Copy the graph with other nodes in place of some, by identity, and no initializers.

    What was put in place is taken out of `operators`.
    """
    result = onnx.GraphProto(name=graph.name, doc_string=graph.doc_string)
    for field in ("input", "output", "value_info", "sparse_initializer"):
        getattr(result, field).extend(getattr(graph, field))
    for node in graph.node:
        if id(node) in operators:
            result.node.extend(operators.pop(id(node)))
            continue
        copy = result.node.add()
        for field in ("name", "op_type", "domain", "doc_string"):
            setattr(copy, field, getattr(node, field))
        copy.input.extend(node.input)
        copy.output.extend(node.output)
        for item in node.attribute:
            if item.type == onnx.AttributeProto.GRAPH:
                body = rebuild(item.g, operators)
                copy.attribute.add(name=item.name, type=item.type, g=body)
            else:
                copy.attribute.append(item)
    return result


def _add_initializers(source: onnx.GraphProto, target: onnx.GraphProto) -> None:
    """Copy the initializers that the rebuilt graph, or a body in it, still reads."""
    read = graphs.uses(target)
    target.initializer.extend(tensor for tensor in source.initializer if read[tensor.name])
    add_initializers_of_bodies(source, target)


def add_initializers_of_bodies(source: onnx.GraphProto, target: onnx.GraphProto) -> None:
    """Copy the initializers of bodies that the rebuilt graph still reads."""
    source_bodies = {
        (tuple(node.output), item.name): item.g
        for node in source.node
        for item in node.attribute
        if item.type == onnx.AttributeProto.GRAPH
    }
    for node in target.node:
        for item in node.attribute:
            if item.type == onnx.AttributeProto.GRAPH:
                _add_initializers(source_bodies[tuple(node.output), item.name], item.g)
