"""Checks that trust no one: lint beyond fx's own, equality of outputs, first divergence."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from ..errors import NotEquivalent, PassError, TraceError
from .state import sizes_of, tensors_of
from .trace import Example, Interpreter, as_example, run_once, trace

TOLERANCE = 1e-4  # relative, of the largest output, in float32


def lint(module: fx.GraphModule) -> None:
    """Check what `graph.lint` does not: that modules agree with their parameters and are used.

    Raises:
        PassError: Naming the first module that is wrong.
    """
    module.graph.lint()
    for path, part in module.named_modules():
        for name, size in sizes_of(part).items():
            held = getattr(part, name)
            if (tuple(held) if isinstance(held, (tuple, list)) else held) != size:
                raise _wrong(path, f"{name} is {held}, but its parameters say {size}")
        for name, tensor in _vectors(part):
            if len(tensor) != _outputs(part):
                raise _wrong(path, f"a {name} of {len(tensor)} values for {_outputs(part)} outputs")
    used = {str(n.target) for n in module.graph.nodes if n.op in ("call_module", "get_attr")}
    for path in tensors_of(module):
        if not any(path == u or path.startswith(u + ".") for u in used):
            raise _wrong(path, "nothing in the graph uses it")


def _vectors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the tensors of a module that hold one value per unit it writes."""
    if _outputs(module) is None:
        return []
    names = ("weight", "bias", "running_mean", "running_var")
    found = [(name, getattr(module, name, None)) for name in names]
    return [(name, t) for name, t in found if t is not None and t.dim() == 1]


def _outputs(module: nn.Module) -> int | None:
    sizes = sizes_of(module)
    keys = ("out_channels", "out_features", "num_features", "num_channels")
    return next((sizes[key] for key in keys if key in sizes), None)


def _wrong(path: str, what: str) -> PassError:
    return PassError(
        what,
        where=f"module '{path}'",
        expected="modules whose attributes, parameters and graph agree",
        do="a pass left the graph inconsistent: report it with FXFUSE_DEBUG=3 output",
    )


def relative_error(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the largest difference of outputs, relative to the largest value of the first."""
    worst = 0.0
    for x, y in zip(a, b):
        x, y = x.detach(), y.detach()
        if x.shape != y.shape:
            return float("inf")
        if not x.is_floating_point():
            worst = max(worst, float(not torch.equal(x, y)))
        elif x.numel():
            difference = (x.double() - y.double()).abs().max()
            error = float(difference / x.double().abs().max().clamp(min=1e-12))
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst if len(a) == len(b) else float("inf")


def verify(
    before: nn.Module, after: nn.Module, example: Example, tolerance: float = TOLERANCE
) -> None:
    """Check that two networks compute the same in eval mode.

    Args:
        before: A network; not modified.
        after: What was made of it; not modified.
        example: Inputs, a tensor or a tuple of tensors.
        tolerance: Largest difference of an output, relative to the largest value in it.

    Raises:
        NotEquivalent: If outputs differ. It names the first node of `after` whose value is not that
            of the node of the same name in `before`, and what made it; units in another order count
            as a difference there.
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
    inputs, pair = as_example(example), [_own(m) for m in (before, after)]
    names = [type(m).__name__ for m in (before, after)]
    outputs = [run_once(m, inputs, name) for m, name in zip(pair, names)]
    error = relative_error(*outputs)
    if error <= tolerance:
        return
    where = " and ".join(names)
    graphs = [m.eval() for m in pair if isinstance(m, fx.GraphModule)]
    node = first_divergence(graphs[0], graphs[1], inputs, tolerance) if len(graphs) == 2 else None
    raise NotEquivalent(
        f"outputs that differ by {error:.2e} relative",
        where=f"{where}; first at {node}" if node else f"{where}, at the outputs",
        expected=f"at most {tolerance:.0e}",
        do="look at what that node reads and at its parameters in both networks",
    )


def _own(model: nn.Module) -> nn.Module:
    """Return a copy of a network, as a graph if it can be traced."""
    if isinstance(model, fx.GraphModule):
        return copy.deepcopy(model)  # tracing it again would lose where its nodes are from
    try:
        return trace(model, type(model).__name__)
    except TraceError:
        return copy.deepcopy(model)


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
        do="report it with the two networks; the inputs were not changed",
    )


class _Recorder(Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n.name] = value
        return value


def first_divergence(
    before: fx.GraphModule,
    after: fx.GraphModule,
    example: tuple[Tensor, ...],
    tolerance: float = TOLERANCE,
) -> str | None:
    """Return the first node of `after`, with its origin, whose value differs from `before`'s.

    Nodes correspond by name; an inserted node is compared with the node it was inserted after.
    """
    recorders = [_Recorder(m) for m in (before, after)]
    with torch.no_grad():
        for recorder in recorders:
            recorder.run(*example)
    old, new = (r.values for r in recorders)
    for node in after.graph.nodes:
        origin = node.meta.get("origin", ("", ()))
        name = node.name if node.name in old else node.meta.get("neutral_to")
        if name not in old or node.op == "output":
            continue
        pair = [
            [t for t in tree_leaves(v) if isinstance(t, Tensor)]
            for v in (old[name], new[node.name])
        ]
        if relative_error(*pair) > tolerance:
            made = f" <- {origin[0]} from {', '.join(origin[1])}" if origin[0] else ""
            inputs = ", ".join(n.name for n in node.all_input_nodes)
            return f"node '{node.name}' ({node.target}; reads {inputs}){made}"
    return None
