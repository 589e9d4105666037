"""Checks of a graph: is it consistent, and does it compute the same as another?

Outputs that differ are traced back to the first node that differs.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from .._checked import checked
from ..errors import NotEquivalent, PassError, TraceError
from .calls import Example, ToCall
from .compare import TOLERANCE, relative_error
from .inputs import Inputs
from .state import names_of, sizes_of
from .trace import Interpreter, run_once, trace
from .wrappers import unwrapped


def lint(module: fx.GraphModule) -> None:
    """Check what `graph.lint` does not: modules agree with their parameters, and all are used.

    Raises:
        PassError: Naming the first module that is wrong.
    """
    module.graph.lint()
    for path, part in module.named_modules():
        for name, size in sizes_of(part).items():
            value = getattr(part, name)
            if (tuple(value) if isinstance(value, (tuple, list)) else value) != size:
                raise _wrong(path, f"{name} is {value}, but its parameters say {size}")
        for name, tensor in _vectors(part):
            if len(tensor) != _outputs(part):
                raise _wrong(path, f"a {name} of {len(tensor)} values for {_outputs(part)} outputs")
    used = {str(n.target) for n in module.graph.nodes if n.op in ("call_module", "get_attr")}
    taken: set[int] = set()
    unused: dict[int, str] = {}
    for path, tensor in names_of(module):
        if any(path == u or path.startswith(u + ".") for u in used):
            taken.add(id(tensor))
        else:
            unused[id(tensor)] = path
    for key, path in unused.items():
        if key not in taken:
            raise _wrong(path, "nothing in the graph uses it")


def _vectors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the tensors of a module that hold one value for each unit it writes."""
    if _outputs(module) is None:
        return []
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = [(name, getattr(module, name, None)) for name in names]
    return [(name, t) for name, t in tensors if t is not None and t.dim() == 1]


def _outputs(module: nn.Module) -> int | None:
    sizes = sizes_of(module)
    keys = ("out_channels", "out_features", "num_features", "num_channels")
    return next((sizes[key] for key in keys if key in sizes), None)


def _wrong(path: str, what: str) -> PassError:
    return PassError(
        what,
        where=f"module '{path}'",
        expected="modules whose attributes, parameters and graph agree",
        do="report it with what FXFUSE_DEBUG=3 writes: a pass left the graph inconsistent",
    )


@checked()
def verify(
    before: nn.Module,
    after: nn.Module,
    example: Example,
    tolerance: float = TOLERANCE,
    *,
    inputs: ToCall | None = None,
) -> None:
    """Check that two networks compute the same in eval mode.

    Args:
        before: A network; not modified.
        after: A network made from it; not modified.
        example: One batch as the networks take it.
        tolerance: Largest difference of an output, relative to the largest value in it.
        inputs: From the example to args, kwargs of forward, where it is no batch as usual.

    Raises:
        NotEquivalent: If outputs differ. It names the first node of `after` whose value differs
            from that of the node of the same name in `before`, and the pass that made it. Units in
            another order count as a difference.
        DataError: If a network refuses the example.

    Example:
        >>> from torch.fx import symbolic_trace
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> changed = symbolic_trace(nn.Sequential(net[0], nn.Sigmoid()))
        >>> try:
        ...     verify(net, changed, torch.ones(2, 4))
        ... except NotEquivalent as error:
        ...     print(error.where)
        Sequential and Sequential; first at node '_1' (1; reads _0)
    """
    models = [unwrapped(m) for m in (before, after)]
    names = [type(m).__name__ for m in (before, after)]
    pairs = [_copy_as_graph(m, Inputs.of(m, example, inputs), n) for m, n in zip(models, names)]
    error = relative_error(*(run_once(m, x, name) for (m, x), name in zip(pairs, names)))
    if error <= tolerance:
        return
    where = " and ".join(names)
    graphs = [(m.eval(), x) for m, x in pairs if isinstance(m, fx.GraphModule)]
    node = _divergence(graphs, tolerance) if len(graphs) == 2 else None
    raise NotEquivalent(
        f"outputs that differ by {error:.2e} relative",
        where=f"{where}; first at {node}" if node else f"{where}, at the outputs",
        expected=f"at most {tolerance:.0e}",
        do="look at what that node reads and at its parameters in both networks",
    )


def _copy_as_graph(
    model: nn.Module, inputs: Inputs, name: str
) -> tuple[nn.Module, tuple[Any, ...] | Inputs]:
    """Return a copy of a network with its inputs; a graph, if it can be traced."""
    if isinstance(model, fx.GraphModule):  # tracing it again would lose the origins of its nodes
        return copy.deepcopy(model), inputs.by_place(model)
    try:
        return trace(model, inputs, name), inputs.tensors
    except TraceError:
        return copy.deepcopy(model), inputs


def require_equal(
    before: nn.Module, after: fx.GraphModule, example: tuple[Tensor, ...], who: str
) -> float:
    """Compare two networks in eval mode; return the relative error.

    Raises:
        NotEquivalent: With the size of the difference and the first node that differs.
    """
    error = relative_error(run_once(before, example, who), run_once(after, example, who))
    if error <= TOLERANCE:
        return error
    where = first_divergence(before, after, example) if isinstance(before, fx.GraphModule) else None
    raise NotEquivalent(
        f"outputs that differ by {error:.2e} relative",
        where=f"{who}; first at {where}" if where else who,
        expected=f"at most {TOLERANCE:.0e}",
        do="report it with the two networks; your models were not changed",
    )


def first_divergence(
    before: fx.GraphModule, after: fx.GraphModule, example: tuple[Tensor, ...]
) -> str | None:
    """Describe the first node of `after` whose value differs from `before`'s; None if none does."""
    return _divergence([(before, example), (after, example)], TOLERANCE)


def _divergence(graphs: Sequence[tuple[fx.GraphModule, Any]], tolerance: float) -> str | None:
    """Describe the first node of the second graph whose value differs from the first one's.

    Nodes are compared by name; an inserted node, with the node behind which it was inserted.
    """
    runs = [Interpreter(module, garbage_collect_values=False) for module, _ in graphs]
    with torch.no_grad():
        for run, (_, example) in zip(runs, graphs):
            run.run(*example)
    old, new = ({node.name: value for node, value in run.env.items()} for run in runs)
    for node in graphs[1][0].graph.nodes:
        name = node.name if node.name in old else node.meta.get("neutral_to")
        if name not in old or node.op == "output":
            continue
        values = [
            [t for t in tree_leaves(v) if isinstance(t, Tensor)]
            for v in (old[name], new[node.name])
        ]
        if relative_error(*values) > tolerance:
            made_by, sources = node.meta.get("origin", ("", ()))
            origin = f" <- {made_by} from {', '.join(sources)}" if made_by else ""
            inputs = ", ".join(n.name for n in node.all_input_nodes)
            return f"node '{node.name}' ({node.target}; reads {inputs}){origin}"
    return None
