"""Spells transposed and 3-D convolutions out as 2-D ones, which are layers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from . import graphs
from .heavy_nodes import MIN_WEIGHTS
from .node_rewriter import NodeRewriter

_OLDEST_OPSET = 11
"""The first with all that is written here: the order of DepthToSpace, Pad with inputs."""

_END = np.iinfo(np.int64).max
"""Behind the last index of any axis."""

Nodes = list[onnx.NodeProto]


@dataclass(frozen=True)
class _Axis:
    """One axis of a transposed convolution, as a plain one of stride 1 and what is cut off it.

    With stride s, the plain one gives s outputs for each place, which are then put side by side.
    """

    stride: int
    taps: int
    """Of the plain kernel."""
    dilation: int
    """Of the plain kernel."""
    spacing: int
    """Of the given taps among all that all outputs of a place have; zeros are between them."""
    pads: tuple[int, int]
    """Of the plain one's input; negative ones are cut off."""
    cut: tuple[int, int]
    """Outputs that are not wanted, at both ends."""


class Convolutions(NodeRewriter):
    """Rewrites ConvTranspose and Conv of three dimensions."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__(model)
        if self.opset >= _OLDEST_OPSET:
            self.writers = {("", "ConvTranspose"): self._transposed, ("", "Conv"): self._deep}
        else:
            self.writers = {}

    # Transposed

    def _transposed(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        weight, bias = self._constants(node, scope)
        if weight is None or weight.ndim not in (3, 4):
            return None
        axes = _axes(node, weight.shape[2:])
        strides = [axis.stride for axis in axes or ()]
        sizes = None if len({*strides}) == 1 else self._sizes(node.input[0])
        if axes is None or (len({*strides}) > 1 and sizes is None):
            return None
        group = graphs.attribute(node, "group", 1)
        kernel = _plain_kernel(weight, group, axes)
        inputs = [node.input[0], self.constant(kernel, f"{node.input[1]}_plain")]
        if bias is not None:
            spread = np.repeat(bias, math.prod(strides))
            inputs.append(self.constant(spread, f"{node.input[2]}_plain"))
        nodes: Nodes = []
        output = self.name(f"{node.output[0]}_plain")
        at: dict[str, Any] = {
            "kernel_shape": [axis.taps for axis in axes],
            "dilations": [axis.dilation for axis in axes],
            "pads": [axis.pads[end] for end in (0, 1) for axis in axes],
            "group": group,
        }
        nodes.append(helper.make_node("Conv", inputs, [output], node.name, **at))
        channels = weight.shape[1] * group
        output = self._side_by_side(nodes, output, channels, axes, sizes)
        if any(any(axis.cut) for axis in axes):
            ends = [-axis.cut[1] or _END for axis in axes]
            bounds = [axis.cut[0] for axis in axes], ends, range(2, 2 + len(axes))
            names = [self.integers([*values], f"{output}_bounds") for values in bounds]
            self.apply(nodes, "Slice", [output, *names])
        nodes[-1].output[0] = node.output[0]
        return nodes

    def _side_by_side(
        self,
        nodes: Nodes,
        source: str,
        channels: int,
        axes: list[_Axis],
        sizes: list[int] | None,
    ) -> str:
        """Move the outputs of one place from channels to the axes: the last numbers of each."""
        strides = [axis.stride for axis in axes]
        if math.prod(strides) == 1:
            return source
        if len(strides) == 2 and strides[0] == strides[1]:
            at = {"blocksize": strides[0], "mode": "CRD"}
            return self.apply(nodes, "DepthToSpace", [source], **at)
        if len(strides) == 1:
            places, order, whole = [-1], [0, 1, 3, 2], [-1]
        else:
            assert sizes is not None
            places = [
                size + sum(axis.pads) - (axis.taps - 1) * axis.dilation
                for size, axis in zip(sizes, axes, strict=True)
            ]
            order = [0, 1, 4, 2, 5, 3]
            whole = [place * stride for place, stride in zip(places, strides, strict=True)]
        apart = self.integers([0, channels, *strides, *places], f"{source}_apart")
        result = self.apply(nodes, "Reshape", [source, apart])
        result = self.apply(nodes, "Transpose", [result], perm=order)
        together = self.integers([0, channels, *whole], f"{source}_together")
        return self.apply(nodes, "Reshape", [result, together])

    # Three dimensions

    def _deep(self, node: onnx.NodeProto, scope: graphs.Scope) -> Nodes | None:
        """The images that one output image is made of become channels of one image."""
        weight, bias = self._constants(node, scope)
        if weight is None or weight.ndim != 5 or graphs.attribute(node, "group", 1) != 1:
            return None
        if graphs.attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID", b""):
            return None
        rows, channels, depth, *kernel = weight.shape
        strides = graphs.attribute(node, "strides") or [1] * 3
        dilations = graphs.attribute(node, "dilations") or [1] * 3
        pads = graphs.attribute(node, "pads") or [0] * 6
        nodes: Nodes = []
        x = self.apply(nodes, "Transpose", [node.input[0]], perm=[0, 2, 1, 3, 4])
        if pads[0] or pads[3]:
            ends = [0, pads[0], 0, 0, 0, 0, pads[3], 0, 0, 0]
            x = self.apply(nodes, "Pad", [x, self.integers(ends, f"{x}_pads")])
        stack = self._stack(nodes, x, depth, dilations[0], strides[0])
        images = self._reshaped(nodes, stack, [-1, depth * channels], (stack, 3, 5))
        flat = weight.transpose(0, 2, 1, 3, 4).reshape(rows, depth * channels, *kernel)
        inputs = [images, self.constant(flat, f"{node.input[1]}_plain")]
        inputs += [] if bias is None else [node.input[2]]
        output = self.name(f"{node.output[0]}_images")
        of_image: dict[str, Any] = {
            "kernel_shape": kernel,
            "strides": strides[1:],
            "dilations": dilations[1:],
            "pads": [*pads[1:3], *pads[4:6]],
        }
        nodes.append(helper.make_node("Conv", inputs, [output], node.name, **of_image))
        result = self._reshaped(nodes, output, (stack, 0, 2), [rows], (output, 2, 4))
        self.apply(nodes, "Transpose", [result], perm=[0, 2, 1, 3, 4])
        nodes[-1].output[0] = node.output[0]
        return nodes

    def _stack(self, nodes: Nodes, x: str, depth: int, dilation: int, stride: int) -> str:
        """(batch, images, channels, ...) to (batch, output images, depth * channels, ...)."""
        parts = []
        for tap in range(depth):
            begin, end = tap * dilation, -(depth - 1 - tap) * dilation or _END
            bounds = [self.integers([at], f"{x}_tap") for at in (begin, end, 1, stride)]
            parts.append(self.apply(nodes, "Slice", [x, *bounds]))
        return self.apply(nodes, "Concat", parts, axis=2)

    def _reshaped(self, nodes: Nodes, x: str, *sizes: list[int] | tuple[str, int, int]) -> str:
        """Reshape to sizes of which some are those of axes (begin to end) of tensors."""
        parts = []
        for size in sizes:
            if isinstance(size, list):
                parts.append(self.integers(size, f"{x}_size"))
                continue
            source, begin, end = size
            shape = self.apply(nodes, "Shape", [source])
            bounds = [self.integers([at], f"{source}_axis") for at in (begin, end)]
            parts.append(self.apply(nodes, "Slice", [shape, *bounds]))
        return self.apply(nodes, "Reshape", [x, self.apply(nodes, "Concat", parts, axis=0)])

    def _constants(
        self, node: onnx.NodeProto, scope: graphs.Scope
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Weight and bias; no weight where it is not worth a layer or a part is computed."""
        weight = scope.constant(node.input[1])
        bias = scope.constant(node.input[2]) if len(node.input) > 2 and node.input[2] else None
        if len(node.input) > 2 and node.input[2] and bias is None:
            return None, None
        if weight is None or weight.data_type != TensorProto.FLOAT:
            return None, None
        if graphs.tensor_size(weight) < MIN_WEIGHTS:
            return None, None
        return graphs.tensor_array(weight), None if bias is None else graphs.tensor_array(bias)

    def _sizes(self, name: str) -> list[int] | None:
        """Height and width, if both are fixed."""
        sizes = (self.shapes.get(name) or ())[2:]
        numbers = [size for size in sizes if isinstance(size, int)]
        return numbers if sizes and len(numbers) == len(sizes) else None


def _axes(node: onnx.NodeProto, kernel: tuple[int, ...]) -> list[_Axis] | None:
    """What each axis becomes; None where sizes are given that pads must be found for."""
    count = len(kernel)
    strides = graphs.attribute(node, "strides") or [1] * count
    dilations = graphs.attribute(node, "dilations") or [1] * count
    more = graphs.attribute(node, "output_padding") or [0] * count
    pads = graphs.attribute(node, "pads") or [0] * (2 * count)
    auto_pad = graphs.attribute(node, "auto_pad", b"NOTSET")
    if graphs.attribute(node, "output_shape"):
        return None
    axes = []
    for at, taps in enumerate(kernel):
        stride, extent = strides[at], (taps - 1) * dilations[at] + 1
        begin, end = pads[at], pads[at + count]
        if auto_pad in (b"SAME_UPPER", b"SAME_LOWER"):  # as many outputs as places times stride
            total = more[at] + extent - stride
            half = total // 2
            begin, end = (half, total - half)[:: 1 if auto_pad == b"SAME_UPPER" else -1]
        elif auto_pad not in (b"NOTSET", b""):
            begin = end = 0
        if begin < 0 or end < 0:
            return None
        axes.append(_axis(stride, taps, dilations[at], extent, more[at], (begin, end)))
    return axes


def _axis(
    stride: int, taps: int, dilation: int, extent: int, more: int, pads: tuple[int, int]
) -> _Axis:
    spacing = 1
    if stride > 1:  # zeros take the place of dilation
        taps, dilation, spacing = -(-(extent + more) // stride), 1, dilation
        pads = pads[0], stride * taps - extent - more + pads[1]
    elif more:
        pads = pads[0], pads[1] - more
    reach = (taps - 1) * dilation
    whole = [min(pad // stride, reach) for pad in pads]
    cut = [pad - stride * places for pad, places in zip(pads, whole, strict=True)]
    return _Axis(
        stride, taps, dilation, spacing, (reach - whole[0], reach - whole[1]), (cut[0], cut[1])
    )


def _plain_kernel(weight: np.ndarray, group: int, axes: list[_Axis]) -> np.ndarray:
    """Turn (inputs, outputs of a group, taps...) into the weights of the plain convolution.

    Its outputs are those of each group, and for each of them the strides of the axes.
    """
    count, sizes = len(axes), [axis.taps * axis.stride for axis in axes]
    dense = np.zeros((*weight.shape[:2], *sizes), np.float32)
    given = zip(axes, weight.shape[2:], strict=True)
    places = [slice(0, (taps - 1) * axis.spacing + 1, axis.spacing) for axis, taps in given]
    dense[(slice(None), slice(None), *places)] = weight
    parts = [part for axis in axes for part in (axis.taps, axis.stride)]
    split = dense.reshape(group, -1, weight.shape[1], *parts)
    taps_at, strides_at = range(3, 3 + 2 * count, 2), range(4, 4 + 2 * count, 2)
    turned = np.flip(split, (*taps_at,)).transpose(0, 2, *strides_at, 1, *taps_at)
    return np.reshape(turned, (-1, turned.shape[2 + count], *[axis.taps for axis in axes]))
