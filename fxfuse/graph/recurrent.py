"""Recurrent modules of several layers, taken apart into modules of one layer, and put together.

A layer of a recurrent module can be absent in another network, like any other; so modules of
unlike depth are taken apart. What a forward reads of their last states is read of their outputs
then: the state of the last layer is its output at the last step, or at the first, backwards.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from .modes import eval_mode

KINDS = (nn.RNN, nn.LSTM, nn.GRU)
RATE = "rate_between_layers"  # attribute of a layer that was taken out of a module of several

_ZEROS = (torch.zeros, torch.zeros_like, "new_zeros")


def depths_of(module: fx.GraphModule) -> list[int]:
    """Return how many layers each recurrent module of a graph has, in the order of its calls."""
    return [part.num_layers for _, part in _calls(module)]


def _calls(module: fx.GraphModule) -> list[tuple[fx.Node, nn.RNNBase]]:
    calls: list[tuple[fx.Node, nn.RNNBase]] = []
    for node in module.graph.nodes:
        part = module.get_submodule(str(node.target)) if node.op == "call_module" else None
        if isinstance(part, KINDS):
            calls.append((node, part))
    return calls


def take_apart(module: fx.GraphModule, example: Sequence[Tensor]) -> None:
    """Make modules of one layer of all recurrent modules of a graph, in place.

    Left whole are those that are given states which may not be zero, or whose last states are read
    in ways that depend on how many layers there are.

    Args:
        module: The graph.
        example: Inputs to run it on.
    """
    calls = _calls(module)
    whole = {node.target for node, part in calls if not _can_be_taken_apart(node, part)}
    calls = [(node, part) for node, part in calls if node.target not in whole]
    if not calls:
        return
    ranks, layers = _ranks(module, example), dict[str, list[str]]()
    of_calls = [ranks[node.all_input_nodes[0]] for node, _ in calls]
    for (node, part), rank in zip(calls, of_calls):
        path = str(node.target)
        if path not in layers:
            module.set_submodule(path, nn.Module())
            layers[path] = [f"{path}.{k}" for k in range(part.num_layers)]
            for k, name in enumerate(layers[path]):
                module.add_submodule(name, _layer_of(part, k))
        _call_layers(node, part, layers[path], rank)
    module.graph.lint()
    module.recompile()


def _can_be_taken_apart(node: fx.Node, part: nn.RNNBase) -> bool:
    given = node.args[1:] or tuple(node.kwargs.values())
    states = [n for n in tree_leaves(given) if n is not None]
    zeros = all(isinstance(n, fx.Node) and n.target in _ZEROS for n in states)
    plain = type(part) in KINDS and {*part._flat_weights_names} <= {*part._parameters}
    reads = len(node.args) > 0 and all(
        _picks(n, 0) or _reads_last_state(n, part) for n in node.users
    )
    return plain and zeros and reads


def _picks(node: fx.Node, index: int) -> bool:
    picked = node.args[1] if node.target is operator.getitem else None
    return isinstance(picked, int) and picked == index


def _reads_last_state(node: fx.Node, part: nn.RNNBase) -> bool:
    """Tell whether a node picks the last states, and only the last layer's are read of these."""
    if not _picks(node, 1):
        return False
    if isinstance(part, nn.LSTM):
        return all(_picks(n, 0) and all(_direction(u, part) for u in n.users) for n in node.users)
    return all(_direction(user, part) for user in node.users)


def _direction(node: fx.Node, part: nn.RNNBase) -> int:
    """Return 1 if a node picks the last layer's forward state, 2 if the other; 0 if neither."""
    if node.target is not operator.getitem:
        return 0
    first, *rest = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    directions = 1 + part.bidirectional
    if not isinstance(first, int) or any(x != slice(None) for x in rest):
        return 0
    number = first % (part.num_layers * directions) - (part.num_layers - 1) * directions
    return max(number + 1, 0)


class _Ranks(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.ranks: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.ranks[n] = value.dim()
        return value


def _ranks(module: fx.GraphModule, example: Sequence[Tensor]) -> dict[fx.Node, int]:
    """Return the rank of each tensor that a graph computes."""
    interpreter = _Ranks(module)
    with eval_mode(module), torch.no_grad():
        interpreter.run(*(t.clone() for t in example))
    return interpreter.ranks


def _call_layers(node: fx.Node, part: nn.RNNBase, paths: Sequence[str], rank: int) -> None:
    """Call the layers one by one in place of a module."""
    graph, value = node.graph, node.args[0]
    with graph.inserting_before(node):
        for path in paths:
            value = graph.call_function(operator.getitem, (graph.call_module(path, (value,)), 0))
        assert isinstance(value, fx.Node)
        for user in list(node.users):
            if _picks(user, 0):
                user.replace_all_uses_with(value)
                continue
            for states in [*user.users] if isinstance(part, nn.LSTM) else [user]:
                for state in list(states.users):
                    last = _last_state(value, part, _direction(state, part), rank)
                    state.replace_all_uses_with(last)
    _erase_unread([node, *_readers(node)])


def _last_state(out: fx.Node, part: nn.RNNBase, direction: int, rank: int) -> fx.Node:
    """Read the last state of one direction from the outputs."""
    graph, axis = out.graph, 1 if part.batch_first and rank == 3 else 0
    state = graph.call_method("select", (out, axis, -1 if direction == 1 else 0))
    if not part.bidirectional:
        return state
    halves = graph.call_method("chunk", (state, 2, -1))
    return graph.call_function(operator.getitem, (halves, direction - 1))


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        yield user
        yield from _readers(user)


def _erase_unread(nodes: Sequence[fx.Node]) -> None:
    """Erase nodes that nothing reads any more, and the zeros that only they read."""
    for node in reversed(list(dict.fromkeys(nodes))):
        zeros = [n for n in node.all_input_nodes if n.target in _ZEROS]
        node.graph.erase_node(node)
        for n in zeros:
            if not n.users:
                n.graph.erase_node(n)


def _like(part: nn.RNNBase, inputs: int, layers: int, rate: float = 0.0) -> Any:
    """Return a module of the same settings without values, for other inputs and layers."""
    own: dict[str, Any] = {}
    if isinstance(part, nn.LSTM):
        own["proj_size"] = part.proj_size
    if isinstance(part, nn.RNN):
        own["nonlinearity"] = part.nonlinearity
    settings: dict[str, Any] = {"bias": part.bias, "batch_first": part.batch_first, "dropout": rate}
    settings |= {"bidirectional": part.bidirectional, "device": "meta", **own}
    kind: Any = type(part)
    return kind(inputs, part.hidden_size, layers, **settings).train(part.training)


def _layer_of(part: nn.RNNBase, k: int) -> nn.RNNBase:
    """Return one layer of a module, with its parameters."""
    names = [n for n in part._flat_weights_names if n.removesuffix("_reverse").endswith(f"_l{k}")]
    inputs = getattr(part, f"weight_ih_l{k}").shape[1]
    layer: nn.RNNBase = _like(part, inputs, 1)
    for name in names:
        setattr(layer, name.replace(f"_l{k}", "_l0"), getattr(part, name))
    setattr(layer, RATE, part.dropout)
    return layer


# --- put together ---------------------------------------------------------------------------------


def put_together(module: fx.GraphModule) -> None:
    """Undo `take_apart` in place: layers that follow each other are one module again.

    Layers of unlike widths stay apart: no module of torch has them.
    """
    stacks: dict[tuple[str, ...], str] = {}
    for chain in _chains(module):
        parts: list[Any] = [module.get_submodule(str(node.target)) for node in chain]
        paths = tuple(str(node.target) for node in chain)
        home = next(path.rpartition(".")[0] for path in paths if "." in path)
        if len({part.hidden_size for part in parts}) > 1:
            continue
        if paths not in stacks:
            stacks[paths] = home
            module.set_submodule(home, _stack_of(parts))
        last = next(iter(chain[-1].users))
        with module.graph.inserting_before(chain[0]):
            called = module.graph.call_module(home, chain[0].args)
            last.replace_all_uses_with(module.graph.call_function(operator.getitem, (called, 0)))
        for node in reversed(chain):
            _erase_unread([node, *node.users])
    if stacks:
        module.delete_all_unused_submodules()
        module.recompile()


def _chains(module: fx.GraphModule) -> list[list[fx.Node]]:
    """Return the calls of layers that were taken out of one module, or inserted between them."""
    chains: list[list[fx.Node]] = []
    for node, part in _calls(module):
        if not hasattr(part, RATE):
            continue
        ends = {next(iter(chain[-1].users)): chain for chain in chains}
        (read,) = node.all_input_nodes
        chain = ends.get(read)
        if chain is not None and len(read.users) == 1 and _one_home([*chain, node]):
            chain.append(node)
        else:
            chains.append([node])
    return [chain for chain in chains if any("." in str(node.target) for node in chain)]


def _one_home(chain: Sequence[fx.Node]) -> bool:
    """Tell whether layers are of one module; those that were inserted have names without dots."""
    paths = [str(node.target) for node in chain]
    return len({path.rpartition(".")[0] for path in paths if "." in path}) <= 1


def _stack_of(parts: Sequence[nn.RNNBase]) -> nn.RNNBase:
    rate = getattr(parts[0], RATE) if len(parts) > 1 else 0.0
    stack: nn.RNNBase = _like(parts[0], parts[0].input_size, len(parts), rate)
    for k, part in enumerate(parts):
        for name in part._flat_weights_names:
            setattr(stack, name.replace("_l0", f"_l{k}"), getattr(part, name))
    return stack
