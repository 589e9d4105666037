"""What a network computes in training mode only: kept in its graph, and left out of it again.

The graph of a network serves both of its modes. Small modules in it know the mode: `Mode` gives a
flag, `Rate` a number, `Choice` one of two outputs, and a `Tap` stands where a head that only
training uses branches off. Eval mode runs such heads too, so that they are analysed and fused like
the rest. It runs them on copies, so that nothing they write reaches the outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from .hooks import has_hooks
from .module import Graph
from .state import buffers_kept


class Mode(nn.Module):
    """A training flag that follows the mode of the network."""

    called = "training_mode"

    def forward(self, *records: Any) -> bool:
        """Return whether the module is in training mode.

        Args:
            records: What training has recorded before. It has no effect; but a pass that copies a
                step and its flag thereby copies what it recorded, too.
        """
        return self.training


class Rate(Mode):
    """A number that follows the mode, as the rate of a dropout that only training has."""

    called = "training_rate"

    def forward(self, evaluating: float, training: float, *records: Any) -> float:  # type: ignore[override]
        """Return the number of the module's mode; `records` are as for `Mode`."""
        return training if self.training else evaluating


class Choice(Mode):
    """A choice between the outputs of the two modes."""

    called = "training_output"

    def forward(self, evaluating: Any, training: Any) -> Any:
        """Return the value of the module's mode."""
        return training if self.training else evaluating


class Tap(Mode):
    """Where a branch for training leaves: in eval mode it must not write to what it reads."""

    called = "training_input"

    def forward(self, value: Any) -> Any:
        """Return the value; in eval mode, a copy of it."""
        if self.training:
            return value
        return tree_map(lambda part: part.clone() if isinstance(part, Tensor) else part, value)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a network into eval mode for a while; then it is as it was.

    Each part gets its own mode back, and each buffer that a forward wrote to its values.
    """
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with buffers_kept(module):
            yield
    finally:
        for part, training in modes.items():
            part.training = training


def is_leaf(module: nn.Module) -> bool:
    """Tell whether a module is one node: those of torch are, unless they only call their parts.

    One with hooks is looked into, so that what they compute is part of the graph.
    """
    if isinstance(module, Mode):
        return True
    of_torch = type(module).__module__.startswith(("torch.nn.", "torch.ao.nn."))
    return of_torch and not only_calls_parts(module) and not has_hooks(module)


def only_calls_parts(module: nn.Module) -> bool:
    """Tell whether a module of torch has no tensors of its own, as `nn.TransformerEncoder`."""
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(True for _ in module.children()) and not own


def only_in_training(module: fx.GraphModule) -> set[fx.Node]:
    """Return the nodes that eval mode has no use for, as the taps and the choice tell.

    Nothing but the graph says which they are. A network that was emitted, saved or traced again
    therefore still has its heads.
    """
    nodes = list(module.graph.nodes)
    behind_taps: set[fx.Node] = set()
    for node in nodes:
        kind = _mode_of(module, node)
        if kind is Tap or kind is None and behind_taps.intersection(node.all_input_nodes):
            behind_taps.add(node)
    needed: set[fx.Node] = set()
    for node in reversed(nodes):
        unread = not node.users and node not in behind_taps
        if node.op == "output":
            returned = tree_leaves(_evaluated(module, node))
            needed.update(n for n in returned if isinstance(n, fx.Node))
        elif node in needed or unread:
            needed.update([node, *node.all_input_nodes])
    return {node for node in nodes if node.op != "output"} - needed


def evaluating_part(module: fx.GraphModule) -> fx.GraphModule | None:
    """Return a network without what only training computes; None if it computes nothing such.

    Args:
        module: A traced network; the result shares its tensors.
    """
    extra = {node.name for node in only_in_training(module)}
    graph = copy.deepcopy(module.graph)
    graph.output_node().args = (_evaluated(module, graph.output_node()),)
    for node in reversed(graph.nodes):
        if node.name in extra:
            graph.erase_node(node)
    return Graph(module, graph, type(module).__name__) if extra else None


def is_choice(module: fx.GraphModule, node: fx.Node) -> bool:
    """Tell whether a node chooses between the outputs of the two modes."""
    return _mode_of(module, node) is Choice


def cut_to(module: fx.GraphModule, part: fx.GraphModule) -> None:
    """Reduce a network, in place, to a part of it that shares its tensors."""
    module.graph = part.graph
    module.delete_all_unused_submodules()
    kept = {id(t) for t in [*part.parameters(), *part.buffers()]}
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name in [n for n, t in table.items() if t is not None and id(t) not in kept]:
                del table[name]


def _evaluated(module: fx.GraphModule, output: fx.Node) -> Any:
    """Return what a graph returns in eval mode."""
    result = output.args[0]
    if isinstance(result, fx.Node) and is_choice(module, result):
        return result.args[0]
    return result


def _mode_of(module: fx.GraphModule, node: fx.Node) -> type[Mode] | None:
    """Return the kind of mode module that a node calls, None if it calls no such module."""
    part = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return type(part) if isinstance(part, Mode) else None
