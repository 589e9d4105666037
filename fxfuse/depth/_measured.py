"""Find values that make a layer neutral by running it, where no rule gives them.

The parameters that write last on each path of a layer are set to zero; then the layer may add
nothing, or multiply by one. If it adds a constant, a bias takes it off; a gate is opened or closed
by a bias. What a layer computes then depends on no weight any more, so one run shows it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..calibration.norms import tensors_for
from ..graph.modes import eval_mode
from ..graph.state import fill, tensor_at
from ..graph.trace import Interpreter
from ..spaces.network import Network
from ._insert import AbsentLayer
from ._neutral import SATURATED, last_writers

CLOSE = 1e-6  # of the largest value: how near to its entry a neutral layer's value is


def settle(network: Network, layer: AbsentLayer) -> bool:
    """Give a layer values with which it hands on what it reads; False if none are found.

    Args:
        network: The network; its tensors are edited, unless in vain.
        layer: A layer that it has in name only.
    """
    writers = _writers(network, layer)
    names = {name for of_node in writers for name in of_node}
    names |= {t for n in layer.nodes if n in network.norms for t in network.tensors.get(n, ())}
    outside = {t for n, ts in network.tensors.items() if n not in layer.nodes for t in ts}
    if not writers or names & outside:
        return False
    before = {name: tensor_at(network.module, name).detach().clone() for name in names}
    run = _LayerRun(network, layer)
    for _ in _candidates(network, layer, writers, run):
        if run.error() <= CLOSE:
            return True
    for name, value in before.items():
        fill(network.module, name, value)
    return False


def _candidates(
    network: Network, layer: AbsentLayer, writers: Sequence[list[str]], run: _LayerRun
) -> Iterator[None]:
    """Set the values of a layer to each that may make it neutral."""
    for node in layer.nodes:
        if node in layer.carriers[1:] and node in network.norms:
            for name, value in tensors_for(network.norms[node], 1.0, 0.0).items():
                fill(network.module, name, value)
    for name in (name for of_node in writers for name in of_node):
        fill(network.module, name, 0.0)
    yield
    biases = [name for of_node in writers for name in of_node if _is_bias(network, name)]
    for name in biases:
        for value in (SATURATED, -SATURATED):
            fill(network.module, name, value)
            yield
        fill(network.module, name, 0.0)
        zero = run.offset()
        fill(network.module, name, 1.0)
        slope = run.offset() - zero
        fill(network.module, name, 0.0 if not slope else -zero / slope)
        yield
        fill(network.module, name, 0.0)


def _is_bias(network: Network, name: str) -> bool:
    return tensor_at(network.module, name).dim() == 1


def _writers(network: Network, layer: AbsentLayer) -> list[list[str]]:
    """Return the last parameters on each path through a layer, from its end to its entry."""
    nodes, writers = network.nodes, dict[fx.Node, list[str]]()
    made = {nodes[layer.entry]}  # of what the layer reads; masks and their like are not
    for node in (nodes[n] for n in nodes if n in layer.nodes):
        if not made.isdisjoint(node.all_input_nodes):
            made.add(node)
    tail = {n for n in layer.carriers[1:] if n in network.norms}
    waiting, seen = [nodes[layer.carriers[-1]]], set[fx.Node]()
    while waiting:
        node = waiting.pop()
        if node in seen or node not in made or node.name not in layer.nodes:
            continue
        seen.add(node)
        names = [] if node.name in tail else last_writers(network, node)
        names = [n for n in names if isinstance(tensor_at(network.module, n), torch.nn.Parameter)]
        if names:
            writers[node] = names
        if not names or network.adds(node):
            waiting += network.inputs_of(node)
    return list(writers.values())


class _LayerRun(Interpreter):
    """A layer on the example, run again and again with other values."""

    def __init__(self, network: Network, layer: AbsentLayer) -> None:
        super().__init__(network.module, garbage_collect_values=False)
        self.args_iter = iter([t.clone() for t in network.example])
        self.entry, self.end = network.nodes[layer.entry], network.nodes[layer.carriers[-1]]
        nodes = list(network.module.graph.nodes)
        self.inside = [n for n in nodes if n.name in layer.nodes]
        behind = nodes[: nodes.index(self.inside[-1]) + 1]
        with eval_mode(network.module), torch.no_grad():
            for node in behind:
                self.env[node] = self.run_node(node)
        self.read = self._value(self.entry).clone()

    def _value(self, node: fx.Node) -> Tensor:
        value: Any = self.env[node]
        assert isinstance(value, Tensor), f"the value of {node.name} is no tensor"
        return value

    def written(self) -> Tensor:
        """Run the layer and return what it hands on."""
        self.env[self.entry] = self.read.clone()
        with torch.no_grad():
            for node in self.inside:
                self.env[node] = self.run_node(node)
        return self._value(self.end)

    def error(self) -> float:
        """Return how far the layer is from handing on what it reads, relative to that."""
        written = self.written()
        if written.shape != self.read.shape:
            return float("inf")
        largest = float(self.read.abs().max().clamp(min=1e-30))
        return float((written - self.read).abs().max()) / largest

    def offset(self) -> float:
        """Return what the layer adds to what it reads, on average."""
        written = self.written()
        return float((written - self.read).mean()) if written.shape == self.read.shape else 0.0
