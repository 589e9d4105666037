"""Contractions inside one node: the gates of recurrent cells.

Such a node contracts several weights, some of them at every step of a sequence, and no value of the
graph shows it. Its operators do. What each weight reads and gives is recorded as the node runs, in
the parents and in the fused network, and the weight is fitted to the mean of what the parents'
give, summed over all places of its use: gates are linear in the input and the state before. Where
two contractions end in one sum, the later one is fitted to what the sum lacks.

Through the state, each correction changes what all weights read next. So it is kept, whole or in
part, only if it takes the node nearer to the parents on samples held out, states run anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from .._ranks import total_of
from ..calibration.least_squares import InputSums, Sums
from ..calibration.moments import moments_of_rows
from ..calibration.positions import HELD_OUT
from ..calibration.run import Run
from ..graph.compare import TOLERANCE
from ..graph.state import tensor_at
from ..graph.structures import tensors_in
from ..ir import LayerFit
from ..spaces.network import Network, plain_kernels
from ..spaces.operators import adds, contracts
from ._shared import Use, best_joint_correction
from ._targets import Targets, in_units

ROUNDS = 2  # passes over the weights of a node: a state follows what was fitted behind it
STEPS = (1.0, 0.5, 0.25)  # parts of a correction that are tried
WIDEST = 1 << 10  # inputs of a weight whose products are taken
ROUNDING = 1e-5  # share of its root mean square by which a target that is met may be missed
ROWS = 24  # positions per weight of a unit, those held out included, at most
_ALL: Mapping[str, float] = {}


@dataclass(eq=False)
class Rows:
    """What one weight reads and gives in one run of a node, all its uses one after another.

    Attributes:
        x: `(positions, inputs)`.
        z: `(positions, units)`, with the bias if one is added at once.
        added: What is then added to it, of the same shape, zeros where nothing is.
        bias: The bias.
    """

    x: Tensor
    z: Tensor
    added: Tensor
    bias: str | None


@dataclass(eq=False)
class _Use:
    weight: str
    out: Tensor  # held, so that its memory is not given to another
    x: Tensor
    z: Tensor
    at: Tensor | None  # the positions that are kept
    added: Tensor | None = None
    bias: str | None = None


class _Recorder(TorchDispatchMode):
    """Note what contractions with parameters read and give.

    Args:
        network: The network.
        node: The node that will run.
        keep: By weight, the share of positions to keep; they are the same in every network.
    """

    def __init__(self, network: Network, node: fx.Node, keep: Mapping[str, float]) -> None:
        TorchDispatchMode.__init__(self)
        tensors = {n: tensor_at(network.module, n).detach() for n in network.tensors[node.name]}
        self.weights = {n: tensors[n] for n in _own_weights(network, node.name)}
        self.biases = {n: t for n, t in tensors.items() if t.dim() == 1}
        self.keep, self.draws = keep, {n: torch.Generator().manual_seed(0) for n in self.weights}
        self.uses: dict[int, _Use] = {}  # by the address of what they gave
        self.counts = dict.fromkeys(self.weights, 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        operands, ends = tensors_in((args, kwargs or {})), []
        if adds(func):
            ends = [self.uses[a] for a in map(_address, operands) if a in self.uses]
        before = [t.clone() for t in operands] if ends else []
        out = func(*args, **(kwargs or {}))
        if contracts(func) and isinstance(out, Tensor):
            self._contracted(operands, out)
        elif ends and isinstance(out, Tensor):
            last = max(ends, key=[*self.uses.values()].index)  # it lacks what the others give
            self._added(last, operands, before)
        return out

    def _contracted(self, operands: Sequence[Tensor], out: Tensor) -> None:
        for name, weight in self.weights.items():
            turned = weight.T
            read = [t for t in operands if t.dim() == 2 and not _is(t, turned)]
            if len(read) != 1 or not any(_is(t, turned) for t in operands):
                continue
            biases = [n for n, b in self.biases.items() if any(_is(t, b) for t in operands)]
            expected = read[0] @ turned
            if biases:
                expected = expected + self.biases[biases[0]]
            if expected.shape == out.shape and _alike(expected, out):
                at = self._chosen(name, len(out))
                x, z = _rows(read[0], at).clone(), _rows(out, at).clone()
                bias = biases[0] if biases else None
                self.uses[_address(out)] = _Use(name, out, x, z, at, bias=bias)

    def _chosen(self, name: str, rows: int) -> Tensor | None:
        """Return the positions of one use that are kept; None for all."""
        self.counts[name] += rows
        share = self.keep.get(name, 1.0)
        if share >= 1:
            return None
        return (torch.rand(rows, generator=self.draws[name]) < share).nonzero().flatten()

    def _added(self, use: _Use, operands: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        mine = next(i for i, t in enumerate(operands) if _address(t) == _address(use.out))
        others = [t for i, t in enumerate(before) if i != mine]
        if len(others) != 1 or operands[mine].numel() != use.out.numel() or use.added is not None:
            return
        other = operands[1 - mine]
        bias = next((n for n, b in self.biases.items() if _is(other, b)), None)
        if bias is not None and use.bias is None:
            use.bias, use.z = bias, use.z + others[0]
        elif others[0].shape == use.out.shape:
            use.added = _rows(others[0], use.at)


def _rows(value: Tensor, at: Tensor | None) -> Tensor:
    return value if at is None else value[at.to(value.device)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is(tensor: Tensor, parameter: Tensor) -> bool:
    """Tell whether a tensor is a parameter, and not a copy of it."""
    same = tensor.data_ptr() == parameter.data_ptr() and tensor.stride() == parameter.stride()
    return same and tensor.shape == parameter.shape


def _alike(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * b.abs().max().clamp(min=1e-30))


def recorded(
    run: Run, node: fx.Node, keep: Mapping[str, float] = _ALL
) -> tuple[dict[str, Rows], Any]:
    """Return what the weights inside a node read and give, in the order of their first use.

    The node's value is returned, too.

    Args:
        run: A network that is about to run the node.
        node: The node.
        keep: By weight, the share of its positions to return, if not all.
    """
    recorder = _Recorder(run.network, node, keep)
    with plain_kernels(), recorder:
        value = run.peek(node)
    found: dict[str, list[_Use]] = {}
    for use in recorder.uses.values():
        found.setdefault(use.weight, []).append(use)
    return {name: _joined(uses) for name, uses in found.items()}, value


def _held_out_values(run: Run, node: fx.Node, value: Any) -> dict[str, Tensor]:
    """Return the units that a node hands on, by the node that shows them, of samples held out."""
    network, found = run.network, dict[str, Tensor]()
    run.env[node] = value
    try:
        for user in (node, *node.users):
            axis = network.feature_axis(user)
            if axis is None or (user is not node and network.inputs_of(user) != [node]):
                continue
            shown = value if user is node else run.peek(user)
            axes = [a for a in network.samples_axes(user) if shown.shape[a] == run.samples]
            if axes and axes[0] != axis:
                held = torch.arange(run.samples, device=shown.device)[HELD_OUT - 1 :: HELD_OUT]
                found[user.name] = shown.index_select(axes[0], held)
    finally:
        run.env.pop(node)
    return found


def _positions_in(run: Run, node: fx.Node) -> dict[str, int]:
    """Return at how many positions each weight inside a node is used."""
    names = run.network.weights[node.name]
    recorder = _Recorder(run.network, node, dict.fromkeys(names, 0.0))
    with plain_kernels(), recorder:
        run.peek(node)
    return recorder.counts


def _joined(uses: Sequence[_Use]) -> Rows:
    added = [u.added if u.added is not None else torch.zeros_like(u.z) for u in uses]
    biases = {u.bias for u in uses}
    return Rows(
        torch.cat([u.x for u in uses]),
        torch.cat([u.z for u in uses]),
        torch.cat(added),
        biases.pop() if len(biases) == 1 else None,
    )


def inner_nodes(network: Network, aims: Collection[str]) -> list[str]:
    """Return the nodes in which weights are fitted: those that use a weight several times.

    Where each is used once, as in attention, fits took as long as the rest of the sweep, and gained
    nothing on the one pair that was tried.

    Args:
        network: The fused network.
        aims: The nodes that are fitted as one contraction.
    """
    names = [
        name
        for name, node in network.nodes.items()
        if name not in aims and node.op == "call_module" and not network.is_opaque(node)
        if len(network.contractions(name)) > 1 and _own_weights(network, name)
    ]
    run = Run(network, network.example)
    repeating = []
    with torch.no_grad():
        for node in network.nodes.values() if names else ():
            if node.name in names and _uses_again(run, node):
                repeating.append(node.name)
            run.step(node)
    return repeating


def _uses_again(run: Run, node: fx.Node) -> bool:
    """Tell whether a node that a network is about to run uses some weight several times."""
    weights = _own_weights(run.network, node.name)
    recorder = _Recorder(run.network, node, dict.fromkeys(weights, 0.0))
    with plain_kernels(), recorder:
        run.peek(node)
    return len({use.weight for use in recorder.uses.values()}) < len(recorder.uses)


def _own_weights(network: Network, node: str) -> list[str]:
    """Return the matrices that a node contracts and that no other node uses."""
    elsewhere = {t for name, tensors in network.tensors.items() for t in tensors if name != node}
    weights = (w for w in network.weights.get(node, ()) if w not in elsewhere)
    return [w for w in weights if tensor_at(network.module, w).dim() == 2]


@dataclass(eq=False)
class Wanted:
    """What the weights inside a node are to give: the mean of what the parents' give.

    Attributes:
        targets: Brings values to the fused network's units.
        node: The node.
        batches: How many batches it will be called for.
        keep: By weight, the share of positions that are looked at.
    """

    targets: Targets
    node: str
    batches: int
    keep: dict[str, float] = field(default_factory=dict)

    def __call__(self, runs: Sequence[Run | None]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the means of one batch: by weight, `(positions, units)`, and of held-out values.

        Args:
            runs: The parents, about to run the node; None for one without a share.
        """
        having = [None if run is None or run.lacks(self.node) else run for run in runs]
        first = next((run for run in having if run is not None), None)
        if first is None:
            return {}, {}
        if not self.keep:
            self._choose(first)
        rows: list[Mapping[str, Rows]] = []
        shown: list[Mapping[str, Tensor]] = []
        for run in having:
            given: dict[str, Rows] = {}
            values: dict[str, Tensor] = {}
            if run is not None:
                node = run.network.nodes[self.node]
                given, value = recorded(run, node, self.keep)
                values = _held_out_values(run, node, value)
            rows.append(given)
            shown.append(values)
        names = dict.fromkeys(name for each in rows for name in each)
        means = {n: _mean(self.targets, n, [each.get(n) for each in rows]) for n in names}
        return {n: mean for n, mean in means.items() if mean is not None}, self._values(shown)

    def _values(self, shown: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Return the mean of the values that the node hands on."""
        base, found = self.targets.problem.structure, dict[str, Tensor]()
        weight = _own_weights(base, self.node)[0]
        for name in dict.fromkeys(name for each in shown for name in each):
            axis = base.feature_axis(name)
            if axis is not None and self.targets.fits(name, axis):
                values = [each.get(name) for each in shown]
                found[name] = self.targets.mix(name, weight, axis, values)
        return found

    def _choose(self, run: Run) -> None:
        base = self.targets.problem.structure
        for name, count in _positions_in(run, run.network.nodes[self.node]).items():
            inputs = tensor_at(base.module, name).shape[1]
            wide = inputs > WIDEST
            self.keep[name] = 0.0 if wide else ROWS * inputs / max(self.batches * count, 1)


def _mean(targets: Targets, weight: str, rows: Sequence[Rows | None]) -> Tensor | None:
    shares, couplings = targets.problem.shares(weight), targets.couplings
    base, total = targets.problem.structure, None
    mass = np.zeros(base.spaces.sizes[weight, 0])
    for k, (share, given) in enumerate(zip(shares, rows)):
        if not share or given is None:
            continue
        matrix = couplings.axis_map(weight, 0, k)
        part = share * in_units(torch.as_tensor(matrix.toarray()), given.z + given.added, 1)
        if total is not None and part.shape != total.shape:
            return None
        total = part if total is None else total + part
        has = np.ones_like(mass)
        for space, axis in base.spaces.places.get((weight, 0), ()):
            has[axis.index] = couplings.maps[space.name, k].given[:, None]
        mass += share * has
    return None if total is None else total / torch.as_tensor(np.where(mass > 0, mass, 1)).to(total)


Runs = Callable[[], Iterator[tuple[int, Run]]]  # goes over the fused network's batches at the node


@dataclass(eq=False)
class Inside:
    """The weights inside a node of the fused network, on their way to what is wanted of them.

    Args:
        network: The fused network.
        node: The node.
        wanted: What each weight, and the node, is to give, of each batch (see `Wanted`).
        keep: By weight, the share of positions that these are of.
        runs: Takes the fused network's batches to the node, one by one.
        ridges: See `LeastSquares`.
    """

    network: Network
    node: fx.Node
    wanted: Sequence[tuple[Mapping[str, Tensor], Mapping[str, Tensor]]]
    keep: Mapping[str, float]
    runs: Runs
    ridges: Sequence[float]
    held: list[dict[str, Tensor]] = field(default_factory=list)  # which rows are held out
    biases: dict[str, str | None] = field(default_factory=dict)

    def __call__(self) -> LayerFit | None:
        """Fit all weights, in the order of their use; None if nothing can be fitted."""
        self.held = [_held_out(run, self.node, self.keep) for _, run in self.runs()]
        problems, error = self._problems()
        names = [name for name, use in problems.items() if _is_missed(use)]
        if not problems:
            return None
        ridge = math.inf
        for _ in range(ROUNDS):
            moved = False
            for name in names:
                found = best_joint_correction([problems[name]], 0.0, self.ridges)
                if found.weight is None:
                    continue
                for step in STEPS:
                    before = self._move(name, problems[name], step * found.weight[0], step)
                    tried, missed = self._problems()
                    if missed < error:
                        problems, error, ridge, moved = tried, missed, found.ridge, True
                        break
                    self._restore(before)
            if not moved:
                break
        return LayerFit(self.node.name, 1 - error, ridge)

    def _problems(self) -> tuple[dict[str, Use], float]:
        """Return the regression of each weight as the node runs now, and how far it is off.

        That is the squared error of what it hands on, on samples held out, relative to its size.
        """
        sums: dict[str, list[Sums]] = {}
        goals: dict[str, list[Tensor]] = {}
        missed = size = 0.0
        for batch, run in self.runs():
            (means, values), (read, value) = self.wanted[batch], recorded(run, self.node, self.keep)
            for name, given in _held_out_values(run, self.node, value).items():
                if name in values and values[name].shape == given.shape:
                    missed += float((values[name] - given).double().square().sum())
                    size += float(values[name].double().square().sum())
            for name, rows in read.items():
                goal, held = means.get(name), self.held[batch].get(name)
                if goal is None or held is None or goal.shape != rows.z.shape or not len(goal):
                    continue
                self.biases[name] = rows.bias
                left = goal - rows.z - rows.added
                parts = sums.setdefault(
                    name, [Sums(InputSums(rows.bias is not None)) for _ in "ab"]
                )
                for part, chosen in zip(parts, (~held, held)):
                    x, r = rows.x[chosen][None].double(), left[chosen][None].double()
                    part.inputs.add(x)
                    part.add(x, r)
                goals.setdefault(name, []).append(goal)
        found = {}
        for name, (fit, apart) in sums.items():
            power = _power(torch.cat(goals[name]), fit.inputs.centred)
            fit, apart = (s.summed(s.inputs.summed()) for s in (fit, apart))
            if fit.inputs.count and apart.inputs.count and power:
                found[name] = Use(fit, apart, power)
        missed, size = total_of(missed), total_of(size)
        return found, missed / size if size else _error(found)

    def _move(self, name: str, use: Use, correction: Tensor, step: float) -> dict[str, Tensor]:
        """Correct a weight and its bias; return what they were."""
        module, fit = self.network.module, use.fit
        weight = tensor_at(module, name)
        before = {name: weight.detach().clone()}
        bias = self.biases[name]
        if bias is not None:
            vector, inputs = tensor_at(module, bias), fit.inputs
            before[bias] = vector.detach().clone()
            shift = step * fit.r[0, 0] - inputs.x[0, 0] @ correction
            vector.data.add_((shift / inputs.count).to(vector))
        weight.data.add_(correction.T.to(weight))
        return before

    def _restore(self, before: Mapping[str, Tensor]) -> None:
        for name, value in before.items():
            tensor_at(self.network.module, name).data.copy_(value)


def _is_missed(use: Use) -> bool:
    """Tell whether a weight misses what is wanted of it by more than rounding."""
    return _squares(use.fit) > ROUNDING**2 * use.power


def _error(problems: Mapping[str, Use]) -> float:
    """Return how far the weights are from what is wanted, on samples held out."""
    return sum(_squares(use.held) / use.power for use in problems.values()) / max(len(problems), 1)


def _squares(sums: Sums) -> float:
    return float(sums.rr.sum()) / max(sums.inputs.count, 1)


def _power(goal: Tensor, centred: bool) -> float:
    moments = moments_of_rows(goal)
    values = moments.variance if centred else moments.rms**2
    count = total_of(len(goal))
    return total_of(float(values.sum()) * len(goal)) / count


def _held_out(run: Run, node: fx.Node, keep: Mapping[str, float]) -> dict[str, Tensor]:
    """Tell which positions of each weight inside a node belong to samples that are held out.

    They are those that change with the inputs of these samples, however the node lays them out.
    """
    network = run.network
    before, _ = recorded(run, node, keep)
    held = torch.arange(run.samples) % HELD_OUT == HELD_OUT - 1
    if run.samples < HELD_OUT:
        return {}
    changed = before
    for source in network.inputs_of(node):
        value = run.value_of(source.name)
        axes = network.samples_axes(source)
        axes = [a for a in axes if value.shape[a] == run.samples] if _numbers(value) else []
        if axes:
            moved = value.movedim(axes[0], 0).clone()
            moved[held.to(moved.device)] += 1 + moved[held.to(moved.device)].abs()
            changed = _recorded_with(run, node, keep, source, moved.movedim(0, axes[0]))
            break
    return {
        name: (changed[name].x != rows.x).any(1)
        if name in changed
        else torch.zeros(len(rows.x)) > 0
        for name, rows in before.items()
    }


def _numbers(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _recorded_with(
    run: Run, node: fx.Node, keep: Mapping[str, float], source: fx.Node, value: Tensor
) -> dict[str, Rows]:
    """Return what is recorded if another node had another value."""
    before = run.env[source]
    run.env[source] = value
    try:
        return recorded(run, node, keep)[0]
    finally:
        run.env[source] = before
