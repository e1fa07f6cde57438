"""A finished graph in the operations that ONNX has for its patterns: means, biases, clips, hard sigmoid, hard swish."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from se_flax.export.onnx_graph import Graph, Node


def simplify(graph: Graph) -> Graph:
    """The same function in fewer operations, without what nothing reads; the last operation is the result."""
    for rules in _PASSES:
        graph = _rewritten(graph, rules)
    return graph


@dataclass
class _Known:
    """What a rule may ask about the operations before its own."""

    graph: Graph
    readers: Counter[str]
    made: dict[str, Node] = field(default_factory=dict)
    convolutions: dict[str, str] = field(default_factory=dict)

    def by(self, name: str, *ops: str) -> Node | None:
        """The operation that made a tensor, if it is one of these."""
        node = self.made.get(name)
        return node if node is not None and node.op in ops else None

    def constant(self, name: str) -> np.ndarray | None:
        return self.graph.constants.get(name)

    def scalar(self, name: str) -> float | None:
        value = self.constant(name)
        return float(value) if value is not None and value.ndim == 0 else None

    def with_constant(self, node: Node) -> tuple[str, np.ndarray] | None:
        """The other input and the constant of an operation of two inputs; a divisor is one, a dividend is not."""
        first, second = node.inputs
        for x, name in ((first, second), (second, first))[: 1 if node.op == "Div" else 2]:
            if (value := self.constant(name)) is not None:
                return x, value
        return None

    def with_scalar(self, node: Node | None) -> tuple[str, float] | None:
        found = None if node is None else self.with_constant(node)
        return (found[0], float(found[1])) if found is not None and found[1].ndim == 0 else None


Rule = Callable[[_Known, Node], "Node | str | None"]
"""Gives what takes an operation's place: another one, or the name of a tensor that is there; None if it stays."""


def _rewritten(graph: Graph, rules: Mapping[str, Sequence[Rule]]) -> Graph:
    known = _Known(replace(graph, nodes=[]), Counter(name for node in graph.nodes for name in node.inputs))
    instead: dict[str, str] = {}
    for node in graph.nodes:
        node = replace(node, inputs=tuple(instead.get(name, name) for name in node.inputs))
        found: Node | str | None = node
        while isinstance(found, Node):
            node = found
            found = next((r for rule in rules.get(node.op, ()) if (r := rule(known, node)) is not None), None)
        if found is not None:
            instead[node.outputs[0]] = found
            continue
        known.graph.nodes.append(node)
        known.made |= dict.fromkeys(node.outputs, node)
        if node.op == "Conv":
            known.convolutions[_convolution_key(node, node.inputs[0])] = node.outputs[0]
    return _read(known.graph)


def _read(graph: Graph) -> Graph:
    """What the last operation depends on."""
    nodes, wanted = [], set(graph.nodes[-1].outputs)
    for node in reversed(graph.nodes):
        if wanted & set(node.outputs):
            nodes.append(node)
            wanted |= set(node.inputs)
    constants = {name: value for name, value in graph.constants.items() if name in wanted}
    return replace(graph, nodes=nodes[::-1], constants=constants)


def _product(known: _Known, node: Node) -> Node | str | None:
    """(x * a) / b and (x * a) * b are one product, and x itself where a / b is 1: a mean is a sum over its count."""
    outer = known.with_constant(node)
    inner = known.with_scalar(known.by(outer[0], "Mul")) if outer else None
    if outer is None or inner is None:
        return None
    number = outer[1].astype(np.float64)
    factor = inner[1] / number if node.op == "Div" else inner[1] * number
    if factor.ndim == 0 and abs(factor - 1) < 1e-7:
        return inner[0]
    return Node("Mul", (inner[0], known.graph.name(factor.astype(outer[1].dtype))), node.outputs, {})


def _clip(known: _Known, node: Node) -> Node | None:
    """min(max(x, low), high)."""
    high = known.with_scalar(node)
    inner = known.by(high[0], "Max", "Relu") if high else None
    if high is None or inner is None:
        return None
    low = (inner.inputs[0], 0.0) if inner.op == "Relu" else known.with_scalar(inner)
    if low is None:
        return None
    limits = (known.graph.name(np.asarray(limit, np.float32)) for limit in (low[1], high[1]))
    return Node("Clip", (low[0], *limits), node.outputs, {})


def _hard_sigmoid(known: _Known, node: Node) -> Node | None:
    """clip(x + a, 0, b) / b."""
    divided = known.with_scalar(node)
    clip = known.by(divided[0], "Clip") if divided else None
    if divided is None or clip is None:
        return None
    x = known.with_scalar(known.by(clip.inputs[0], "Add"))
    if x is None or known.scalar(clip.inputs[1]) != 0 or known.scalar(clip.inputs[2]) != divided[1]:
        return None
    return Node("HardSigmoid", x[:1], node.outputs, {"alpha": 1 / divided[1], "beta": x[1] / divided[1]})


def _hard_swish(known: _Known, node: Node) -> Node | None:
    """Product of x and its hard sigmoid, with the slope of 1/6 that ONNX fixes."""
    for x, gate in (node.inputs, node.inputs[::-1]):
        made = known.by(gate, "HardSigmoid")
        if made is not None and made.inputs == (x,) and made.attributes == {"alpha": 1 / 6, "beta": 0.5}:
            return Node("HardSwish", (x,), node.outputs, {})
    return None


def _bias(known: _Known, node: Node) -> Node | None:
    """A constant per channel, added to a convolution or a matrix product that nothing else reads."""
    added = known.with_constant(node)
    made = known.by(added[0], "Conv", "Gemm") if added else None
    if added is None or made is None or len(made.inputs) != 2 or known.readers[added[0]] != 1:
        return None
    kernel, value = known.constant(made.inputs[1]), added[1]
    if kernel is None or value.ndim != kernel.ndim or value.size != value.shape[1]:
        return None
    features = kernel.shape[0 if made.op == "Conv" else 1]
    bias = known.graph.name(np.broadcast_to(value.reshape(-1), features))
    return replace(made, inputs=(*made.inputs, bias), outputs=node.outputs)


def _mean_behind(known: _Known, node: Node) -> Node | None:
    """A 1x1 convolution of a map's mean is the mean of the map's convolution, where there is one already."""
    mean = known.by(node.inputs[0], "GlobalAveragePool")
    kernel = known.constant(node.inputs[1])
    one_by_one = kernel is not None and kernel.shape[2:] == (1, 1) and node.attributes.get("group", 1) == 1
    if mean is None or not one_by_one or set(node.attributes.get("strides", [1])) != {1}:
        return None
    if any(node.attributes.get("pads", ())):
        return None
    there = known.convolutions.get(_convolution_key(node, mean.inputs[0]))
    return None if there is None else Node("GlobalAveragePool", (there,), node.outputs, {})


def _convolution_key(node: Node, x: str) -> str:
    return repr((x, node.inputs[1:], sorted(node.attributes.items())))


_PASSES: Sequence[Mapping[str, Sequence[Rule]]] = (
    {"Div": [_product, _hard_sigmoid], "Mul": [_product, _hard_sigmoid, _hard_swish], "Min": [_clip]},
    {"Add": [_bias]},
    {"Conv": [_mean_behind]},
)
"""Rules by the operation that they look at, pass after pass: each starts without what the last one left unread."""
