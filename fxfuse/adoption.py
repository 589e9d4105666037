"""Give networks of one structure one graph: node for node and name for name."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .errors import PairingError
from .modes import Mode
from .network import Network
from .progress import Tick, silent
from .segments import describe
from .tracing import run_once


def adopt(network: Network, module: fx.GraphModule, shape: Network, tick: Tick = silent) -> Network:
    """Give a network the graph and names of another of the same structure.

    What is done of it is told to `tick`.

    Raises:
        PairingError: If the structures differ.
    """
    nodes, wanted = list(module.graph.nodes), list(shape.module.graph.nodes)
    root: dict[str, object] = {}
    origin: dict[str, str] = {}
    serves: dict[str, str] = {}
    for i, (own, other) in enumerate(zip(nodes, wanted)):
        if other.op not in ("call_module", "get_attr"):
            continue
        target = str(other.target)
        if own.op == other.op:
            root[target] = _fetch(module, str(own.target))
            alike = origin.setdefault(target, str(own.target)) == str(own.target)
            alike &= serves.setdefault(str(own.target), target) == target
            if not alike and not isinstance(root[target], Mode):
                raise _differs(network, shape, i, own, other)
        else:  # the same step spelled as a function: a module without weights serves as well
            root[target] = copy.deepcopy(_fetch(shape.module, target))
    if len(nodes) != len(wanted):
        i = next((i for i, (a, b) in enumerate(zip(nodes, wanted)) if a.op != b.op), 0)
        raise _differs(network, shape, i, nodes[i], wanted[i])
    graph = copy.deepcopy(shape.module.graph)
    for own, node in zip(nodes, graph.nodes):
        _take_settings(own, node)
    module = fx.GraphModule(root, graph, type(module).__name__).eval()
    for target in root:
        _keep_out_of_state(shape.module, module, target)
    run_once(module, network.example, f"{network.name} with the graph of {shape.name}")
    adopted = Network.of(network.name, module, network.example, tick)
    for i, (own, other) in enumerate(zip(module.graph.nodes, wanted)):
        if describe(adopted, own) != describe(shape, other):
            raise _differs(network, shape, i, nodes[i], other)
    return adopted


def _keep_out_of_state(known: nn.Module, module: nn.Module, path: str) -> None:
    """Leave a buffer out of state dictionaries where the known network leaves it out."""
    owner, _, leaf = path.rpartition(".")
    if leaf in known.get_submodule(owner)._non_persistent_buffers_set:
        module.get_submodule(owner)._non_persistent_buffers_set.add(leaf)


def _take_settings(own: fx.Node, node: fx.Node) -> None:
    """Give a node the literal arguments (sizes, rates) of the node it stands for."""
    if (own.op, len(own.args), [*own.kwargs]) == (node.op, len(node.args), [*node.kwargs]):
        alike = own.op == "call_module" or own.target == node.target
        pair = [
            tree_flatten((n.args, n.kwargs), lambda x: isinstance(x, fx.Node)) for n in (own, node)
        ]
        (mine, layout), (theirs, other) = pair
        if alike and layout == other:
            leaves = [_setting(a, b) for a, b in zip(mine, theirs)]
            node.args, node.kwargs = tree_unflatten(leaves, other)


def _setting(own: Any, known: Any) -> Any:
    """Return an argument with the literals of one and the nodes of another, also in slices."""
    if isinstance(own, slice) and isinstance(known, slice):
        ends = zip((own.start, own.stop, own.step), (known.start, known.stop, known.step))
        return slice(*(_setting(a, b) for a, b in ends))
    return known if isinstance(own, fx.Node) or isinstance(known, fx.Node) else own


def _fetch(module: nn.Module, path: str) -> object:
    owner, _, leaf = path.rpartition(".")
    return getattr(module.get_submodule(owner), leaf)


def _differs(
    network: Network, shape: Network, at: int, own: fx.Node, other: fx.Node
) -> PairingError:
    return PairingError(
        "structures that differ beside their aligned layers",
        where=f"node {at}: '{own.name}' of {network.name} against '{other.name}' of {shape.name}",
        expected="the same steps (pooling, flattening, dropout, shared modules) around the layers",
        do="fuse networks of one family, written in the same way",
    )
