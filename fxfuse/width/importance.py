"""How much the units of a network count, by which a narrower one chooses those that it keeps.

An importance is a function `(network, data) -> scores`, by space. Scores of different spaces are
comparable: those of `magnitude` and `activation` are relative to the average unit of their space,
those of `taylor` are changes of the network's outputs.

References:
    Li et al. 2017, pruning by the norms of filters.
    Molchanov et al. 2019, first-order Taylor expansion. Difference: no labels are read. What would
    change is measured on the outputs, in directions drawn at random; of class probabilities these
    are gradients at labels drawn from the network's own predictions (the Fisher information).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .._progress import tell
from ..calibration.data import Calibration
from ..calibration.distance import is_logits
from ..calibration.norms import fold_norms, foldable_norms
from ..calibration.run import Run, working_batch
from ..coupling.measure import View, points_of
from ..coupling.mixing import turned
from ..graph.structures import tensors_in
from ..ir import Axis
from ..spaces.network import Network

Scores = dict[str, np.ndarray]  # by space, of its units

Importance = Callable[[Network, Calibration], Scores]


def magnitude(network: Network, data: Calibration | None = None) -> Scores:
    """Score units by the norm of the weights that write them, with norms folded in.

    Heads have no weights of their own; they are as strong as the units inside them together.

    Args:
        network: The network.
        data: Not read.

    Returns:
        By space, `(units,)` scores relative to the space's mean.
    """
    state = fold_norms(network, foldable_norms(network))
    contracted = {t for names in network.weights.values() for t in names}
    scores: Scores = {}
    for space in network.spaces:
        total = np.zeros(space.size)
        for axis in space.axes:
            if not axis.reads and axis.tensor in contracted:
                rows = np.moveaxis(state[axis.tensor].astype(float), axis.dim, 0)
                if axis.groups > 1:  # the outputs of a transposed convolution, group by group
                    rows = turned(state[axis.tensor].astype(float), axis.groups)
                squares = (rows.reshape(len(rows), -1) ** 2).sum(1)
                total += squares[axis.index].sum(1) / max(squares.sum(), 1e-30)
        scores[space.name] = np.sqrt(total)
    return {name: _relative(s) for name, s in _with_blocks(network, scores).items()}


def activation(network: Network, data: Calibration) -> Scores:
    """Score units by the root mean square of their values on the data, behind activations.

    Args:
        network: The network.
        data: Unlabelled inputs.

    Returns:
        By space, `(units,)` scores relative to the space's mean. Units that no node shows, as
        inside attention in one module, are scored by `magnitude`.
    """
    places = _places(network)
    squares: dict[tuple[str, str], np.ndarray] = {}
    for batch in data.chunks(working_batch([network])):
        run = Run(network, batch)
        with torch.no_grad():
            for node in network.module.graph.nodes:
                value = run.step(node)
                for name, axis in places.get(node.name, ()):
                    others = tuple(d for d in range(value.dim()) if d != axis.dim)
                    added = value.float().abs().square().mean(others).double().cpu().numpy()
                    known = squares.get((node.name, name), 0.0)
                    samples = data.samples_in(batch)
                    squares[node.name, name] = known + samples * added[axis.index].sum(1)
    scores: Scores = {space.name: np.zeros(space.size) for space in network.spaces}
    for (_, name), total in squares.items():
        scores[name] += total / max(float(total.sum()), 1e-30)
    roots = {name: _relative(np.sqrt(s)) for name, s in scores.items()}
    roots = _with_hidden(network, roots, {name for _, name in squares})
    return {name: _relative(s) for name, s in _with_blocks(network, roots).items()}


def taylor(network: Network, data: Calibration) -> Scores:
    """Score units by how much the outputs would change, to first order, if their values were 0.

    Of logits this is the divergence of class probabilities (nats, twice), of other outputs the
    squared error; both are averaged over the samples.

    Args:
        network: The network.
        data: Unlabelled inputs.

    Returns:
        By space, `(units,)` mean squared changes, summed over the places of the space. Units that
        no node shows are scored by `magnitude`, on average like the others.
    """
    places = _places(network)
    scores: Scores = {space.name: np.zeros(space.size) for space in network.spaces}
    generator, seen = torch.Generator().manual_seed(0), 0
    for batch in data.chunks(working_batch([network])):
        gates = _gradients(network, batch, places, generator)
        for node, gradient in gates.items():
            for name, axis in places[node]:
                scores[name] += _squares(gradient, axis)
        seen += data.samples_in(batch)
        tell(seen / data.samples)
    means = {name: total / data.samples for name, total in scores.items()}
    shown = {name for axes in places.values() for name, _ in axes}
    return _with_blocks(network, _with_hidden(network, means, shown), power=1)


def _relative(scores: np.ndarray) -> np.ndarray:
    """Return scores relative to their mean."""
    relative: np.ndarray = scores / max(float(scores.mean()), 1e-30) if len(scores) else scores
    return relative


def _with_hidden(network: Network, scores: Scores, shown: set[str]) -> Scores:
    """Score units that no node shows by magnitude, on average like the others."""
    written = magnitude(network)
    parents = {s.parent for s in network.spaces}
    means = [float(scores[name].mean()) for name in shown]
    average = sum(means) / max(len(means), 1) or 1.0
    hidden = {n: average * w for n, w in written.items() if n not in shown | parents}
    return {**scores, **hidden}


def _with_blocks(network: Network, scores: Scores, power: int = 2) -> Scores:
    """Give blocks without scores of their own those of the units inside them together."""
    scores = dict(scores)
    for inner in network.spaces:
        parent = inner.parent
        if parent is not None and inner.blocks is not None and not scores[parent].any():
            size = network.spaces[parent].size
            scores[parent] = np.bincount(inner.blocks, scores[inner.name] ** power, size)
    return scores


def _places(network: Network) -> dict[str, list[tuple[str, Axis]]]:
    """Return, by node, the spaces whose units are looked at there, and where they lie.

    These are the places where coupling methods compare them: behind norms, adds and activations.
    """
    points, fed = {*points_of(network, View(activated=True)).values()}, network.fed()
    places: dict[str, list[tuple[str, Axis]]] = {}
    for space in network.spaces:
        shown = [a for a in space.features if a.tensor in fed]
        for axis in [a for a in shown if a.tensor in points] or shown[:1]:
            places.setdefault(axis.tensor, []).append((space.name, axis))
    return places


def _gradients(
    network: Network,
    batch: tuple[Tensor, ...],
    places: dict[str, list[tuple[str, Axis]]],
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return, by node, the value times its gradient of one random direction of the outputs."""
    run, gates = Run(network, batch), {}
    outputs: list[Tensor] = []
    with torch.enable_grad():
        for node in network.module.graph.nodes:
            value = run.step(node)
            if node.op == "output":
                outputs = [t for t in tensors_in(value) if t.requires_grad]
            elif node.name in places and node in run.env:
                gate = gates[node.name] = torch.ones_like(value, requires_grad=True)
                run.env[node] = value * gate
        total = sum((t * _direction(t.detach(), generator)).sum() for t in outputs)
        if not isinstance(total, Tensor) or not gates:
            return {}
        of_gates = torch.autograd.grad(total, [*gates.values()], allow_unused=True)
    return {node: g.detach() for node, g in zip(gates, of_gates) if g is not None}


def _direction(output: Tensor, generator: torch.Generator) -> Tensor:
    """Draw a direction: of logits, the gradient of the log-probability of a label drawn by them."""
    if is_logits(output):
        p = output.float().softmax(1)
        labels = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
        return (torch.zeros_like(p).scatter_(1, labels, 1.0) - p).to(output)
    return torch.randn(output.shape, generator=generator).to(output)


def _squares(gradient: Tensor, axis: Axis) -> np.ndarray:
    """Return the squared effect `(units,)` of each unit, summed over the samples."""
    others = tuple(d for d in range(1, gradient.dim()) if d != axis.dim)
    effect = (gradient.sum(others) if others else gradient).double().cpu().numpy()
    effect = effect[None] if axis.dim == 0 else effect  # units where samples would lie
    squares: np.ndarray = np.square(effect[:, axis.index].sum(2)).sum(0)
    return squares
