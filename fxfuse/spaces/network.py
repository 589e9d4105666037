"""A network under work: its graph, the example it is analysed on, and what its nodes do.

What they do comes from one real run, with every ATen operator repeated on unit labels. The run
goes node by node, so that each operator, shape and label is known by its node. It watches
operators below `torch.nn`, where there are the same few dozen however a network is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .._progress import part, tell
from ..graph.modes import eval_mode, is_choice, is_leaf
from ..graph.state import movable_of, state_values_of, tensor_at, tensors_of
from ..graph.structures import tensors_in
from ..graph.trace import Interpreter, without_autocast
from ..ir import Space, Spaces
from ._confirm import confirmed
from ._labels import LabelRun, Ledger, Property, Step, varying
from ._values import Exits
from .operators import mirror

OPEN = "open"  # key of the meta of an output whose units are free; of an input, with their axis


class _MirrorMode(TorchDispatchMode):
    def __init__(self, run: LabelRun) -> None:
        TorchDispatchMode.__init__(self)
        self.run = run

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the default wraps every call, which imports the whole compiler: 2 s, 300 MB

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        first = next((a for a in args if isinstance(a, Tensor)), None)
        before = () if first is None or first.is_nested else tuple(first.shape)
        out = func(*args, **(kwargs or {}))
        mirror(self.run, func, args, kwargs or {}, out, before)
        return out


class _NodeInterpreter(Interpreter):
    """Tell the run which node it is in; keep the labels of all values until the end."""

    def __init__(self, module: fx.GraphModule, run: LabelRun) -> None:
        super().__init__(module)
        self.done, self.steps = 0, len(module.graph.nodes)
        self.graph_module, self.labelled = module, run
        self.layers: dict[str, list[Tensor]] = {}
        self.unread: dict[str, Tensor] = {}  # values whose labels are known once they are read
        self.outputs: list[Tensor] = []
        self.loose: set[fx.Node] = set()  # nodes with numbers that other inputs would change

    def _inputs(self, n: fx.Node) -> list[Tensor]:
        """Return the tensors that a node can read."""
        inputs = tensors_in(self.fetch_args_kwargs_from_env(n))
        if n.op == "call_module":
            inputs += tensors_of(self.graph_module.get_submodule(str(n.target))).values()
        return inputs

    def _settle(self, n: fx.Node, value: Any) -> None:
        """Note what a node returned that no operator made."""
        values = self.labelled.values
        if n.op == "placeholder":
            for tensor in tensors_in(value):
                values.make(tensor, varies=True)
        elif n.op != "output":
            values.meet(tensors_in(value))
            if values.loose and not isinstance(value, Tensor):
                self.loose.add(n)

    def run_node(self, n: fx.Node) -> Any:
        run, shapes = self.labelled, self.labelled.ledger.shapes
        run.node = n.name
        run.values.enter(self._inputs(n), loose=not self.loose.isdisjoint(n.all_input_nodes))
        value = super().run_node(n)
        self._settle(n, value)
        self.done += 1
        tell(self.done / self.steps)
        if n.op == "placeholder" and OPEN in n.meta:
            run.open(value, n.meta[OPEN])
        if n.op == "output" or is_choice(
            self.graph_module, n
        ):  # a choice reads those of both modes
            returned, _ = self.fetch_args_kwargs_from_env(n)
            self.outputs += [layer for t in tensors_in(returned) for layer in run.of(t).layers]
        if n.op != "output" and isinstance(value, Tensor):
            shapes[n.name] = tuple(value.shape)
            if run.held(value).loose:
                self.unread[n.name] = value
            self.layers[n.name] = along_one_axis(run, value)
        elif n.op != "output" and tensors_in(value):
            shapes[n.name] = ()
        return value


def along_one_axis(run: LabelRun, value: Tensor) -> list[Tensor]:
    """Return the layers of a value that vary along one axis, as far as they are known."""
    return [x for x in run.held(value).layers if len(varying(x)) == 1]


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Let attention and recurrent layers run as the operators they are made of, not as one."""
    mkldnn: Any = torch.backends.mkldnn  # its switches are descriptors; `flags` warns of TF32
    fastpath, fused = torch.backends.mha.get_fastpath_enabled(), mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    mkldnn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        mkldnn.enabled = fused


def label_network(module: fx.GraphModule, example: tuple[Tensor, ...]) -> Ledger:
    """Run a traced network once in eval mode, on labels too, and return what was written down.

    What the network reads and returns is fixed, unless its graph says otherwise: with `OPEN` in the
    meta of its output node, the units that it returns are free if they lie along one axis; with
    `OPEN` in the meta of a placeholder, so are the units along the axis given there.

    Args:
        module: Traced network; not modified.
        example: Input tensors.
    """
    with without_autocast(), eval_mode(module):
        run = LabelRun(movable_of(module).items())
        state = {id(t) for t in state_values_of(module).values()}
        versions = {name: b._version for name, b in module.named_buffers(remove_duplicate=False)}
        for tensor in _given(module):
            run.values.make(tensor, varies=id(tensor) in state)
        with plain_kernels(), torch.no_grad(), _MirrorMode(run), Exits(run.values):
            interpreter = _NodeInterpreter(module, run)
            interpreter.run(*example)
        run.ledger.updated = frozenset(
            name for name, before in versions.items() if tensor_at(module, name)._version != before
        )
    _freeze_outputs(run, module, interpreter.outputs)
    run.freeze_unused()
    for node, value in interpreter.unread.items():
        interpreter.layers[node] = along_one_axis(run, value)
    for node, layers in interpreter.layers.items():
        run.ledger.outputs[node] = [(varying(x)[0], x.flatten().numpy()) for x in layers]
    outputs = run.ledger.outputs
    run.ledger.written = [x for n in fed_by_inputs(module) for _, x in outputs.get(n, ())]
    return run.ledger


def fed_by_inputs(module: fx.GraphModule) -> set[str]:
    """Return the nodes that a network's inputs reach."""
    reached: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or reached.intersection(node.all_input_nodes):
            reached.add(node)
    return {n.name for n in reached}


def _given(module: nn.Module) -> list[Tensor]:
    """Return the tensors that a network has before it runs, those that are no state included."""
    attributes = [vars(part) for part in module.modules()]
    return [*tensors_of(module).values(), *tensors_in(attributes)]


def _freeze_outputs(run: LabelRun, module: fx.GraphModule, outputs: list[Tensor]) -> None:
    """Freeze what a network returns; where it is cut, only units along several axes."""
    if OPEN not in module.graph.output_node().meta:
        run.freeze(outputs, "an output of the network")
    elif len(outputs) > 1 or any(len(varying(layer)) > 1 for layer in outputs):
        run.freeze(outputs, "laid out along several axes where the network is cut")


def analyse(module: fx.GraphModule, example: tuple[Tensor, ...]) -> tuple[Ledger, Spaces]:
    """Label a traced network, and return the units that other inputs, too, show to be free."""
    ledger = label_network(module, example)
    return ledger, confirmed(module, example, ledger)


@dataclass(frozen=True, eq=False)
class Network:
    """A traced network, with its unit spaces and what each of its nodes does.

    Attributes:
        name: Its name in reports and errors.
        module: Its graph, private to this library.
        example: The inputs it was analysed on.
        spaces: Its unit spaces.
        shapes: Node -> the shape of its output; empty for an output of several tensors.
        features: Node -> the axes of its output along which there are units, fixed ones included.
        weights: Node -> the parameters that it contracts with its input.
        tensors: Node -> every parameter and buffer that it touches.
        norms: Node that normalises with running statistics -> its tensors by role, and `eps`. A
            part that was kept whole is none, whatever norms there are inside.
        operators: Node -> the operators that it runs, except those that only hand values on.
        updated: The buffers that it writes to as it runs.
    """

    name: str
    module: fx.GraphModule
    example: tuple[Tensor, ...]
    spaces: Spaces
    shapes: dict[str, tuple[int, ...]]
    features: dict[str, tuple[int, ...]]
    weights: dict[str, list[str]]
    tensors: dict[str, list[str]]
    norms: dict[str, dict[str, str | float]]
    operators: dict[str, list[Step]]
    updated: frozenset[str] = frozenset()

    @classmethod
    def of(cls, name: str, module: fx.GraphModule, example: tuple[Tensor, ...]) -> Network:
        """Analyse a traced network."""
        with part(0.0, 0.8):
            ledger, spaces = analyse(module, example)
        outputs = ledger.outputs.items()
        return cls(
            name,
            module,
            example,
            spaces,
            ledger.shapes,
            {node: tuple(dict.fromkeys(dim for dim, _ in axes)) for node, axes in outputs},
            ledger.weights,
            ledger.tensors,
            {node: roles for node, roles in ledger.norms.items() if len(ledger.steps[node]) == 1},
            ledger.steps,
            ledger.updated,
        )

    def with_single_units(self, other: Network) -> Network:
        """Return this network with a space of one unit where another has several.

        Along an axis of one position, labels do not show whether a unit lies there or what is to
        stay; a network of the same structure and another width does.

        Args:
            other: A network of the same structure.
        """
        had = {s.signature for s in self.spaces}
        single = [
            alone
            for space in other.spaces
            if space.signature not in had and (alone := self._single_unit(space)) is not None
        ]
        if not single:
            return self
        free = {(axis.tensor, axis.dim) for space in single for axis in space.axes}
        frozen = tuple(f for f in self.spaces.frozen if (f.tensor, f.dim) not in free)
        beside = (s for s in self.spaces if not free.issuperset((a.tensor, a.dim) for a in s.axes))
        spaces = Spaces((*beside, *single), frozen, self.spaces.sizes)
        features = dict(self.features)
        for axis in (axis for space in single for axis in space.features):
            features[axis.tensor] = other.features[axis.tensor]
        return replace(self, spaces=spaces, features=features)

    def _single_unit(self, space: Space) -> Space | None:
        """Return the space of one unit in the places of another network's space, if it fits."""
        sizes = [self.spaces.sizes.get((a.tensor, a.dim)) for a in space.axes]
        shapes = [self.shapes.get(a.tensor, ()) for a in space.features]
        sizes += [s[a.dim] if a.dim < len(s) else None for a, s in zip(space.features, shapes)]
        places = (*space.axes, *space.features)
        alone = all(n == axis.index.shape[1] for axis, n in zip(places, sizes))
        if not space.axes or not alone or space.parent is not None or space.blocks is not None:
            return None
        axes, features = (
            tuple(replace(a, index=np.arange(a.index.shape[1])[None]) for a in part)
            for part in (space.axes, space.features)
        )
        return Space(space.name, 1, axes, features)

    @property
    def nodes(self) -> dict[str, fx.Node]:
        """The nodes of its graph by name, in order."""
        return {n.name: n for n in self.module.graph.nodes}

    def inputs_of(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes whose tensors a node reads, parameters and sizes left out."""
        return [n for n in node.all_input_nodes if self.carries_data(n)]

    def carries_data(self, node: fx.Node) -> bool:
        """Tell whether a node computes a tensor, or several, from the network's inputs."""
        if node.op == "placeholder":
            return True
        return node.op not in ("get_attr", "output") and node.name in self.shapes

    def fed(self) -> set[str]:
        """Return the nodes that the network's inputs reach."""
        return fed_by_inputs(self.module)

    def feature_axis(self, node: fx.Node | str) -> int | None:
        """Return the axis of a node's output along which its units lie; None unless it is one."""
        axes = self.features.get(node if isinstance(node, str) else node.name, ())
        return axes[0] if len(axes) == 1 else None

    def samples_axes(self, node: fx.Node | str) -> list[int]:
        """Return the axes of a node's output that can hold the samples: as many as the example."""
        shape = self.shapes.get(node if isinstance(node, str) else node.name, ())
        return [axis for axis, size in enumerate(shape) if size == len(self.example[0])]

    def steps(self, node: fx.Node | str) -> list[Step]:
        """Return the operators that a node runs, except those that only hand values on."""
        return self.operators.get(node if isinstance(node, str) else node.name, [])

    def contractions(self, node: fx.Node | str) -> list[Step]:
        """Return the operators of a node that sum products, as convolutions do."""
        return [step for step in self.steps(node) if Property.CONTRACTS in step.properties]

    def form(self, node: fx.Node | str) -> str:
        """Return what a node does, whatever its widths and spelling, with a bias or without."""
        steps, name = self.steps(node), node if isinstance(node, str) else node.name
        if len(self.contractions(node)) != 1 or not self.weights.get(name):
            return repr(steps)
        beside = Property.ADDS | Property.MOVES  # adds the bias, arranges the operands
        return repr([(s.word or s.name, s.settings) for s in steps if not s.properties & beside])

    def adds(self, node: fx.Node | str) -> bool:
        """Tell whether a node only adds."""
        return self._only(node, Property.ADDS)

    def multiplies(self, node: fx.Node | str) -> bool:
        """Tell whether a node only multiplies, value by value."""
        return self._only(node, Property.MULTIPLIES)

    def commutes(self, node: fx.Node | str) -> bool:
        """Tell whether a node computes the same from its inputs in another order."""
        return self._only(node, Property.COMMUTES)

    def joins(self, node: fx.Node | str) -> bool:
        """Tell whether a node only puts tensors side by side."""
        return self._only(node, Property.JOINS)

    def may_be_view(self, node: fx.Node | str) -> bool:
        """Tell whether a node hands on its input's values, elsewhere or as they are."""
        return not self.steps(node) or self._only(node, Property.MOVES)

    def moves_or_resamples(self, node: fx.Node | str) -> bool:
        """Tell whether a node hands on its input's values elsewhere, or pooled, or interpolated."""
        return self._only(node, Property.MOVES | Property.RESAMPLES)

    def is_elementwise(self, node: fx.Node | str) -> bool:
        """Tell whether each value that a node computes depends on one place of its inputs."""
        return self._only(node, Property.ELEMENTWISE)

    def is_norm(self, node: fx.Node | str) -> bool:
        """Tell whether a node only normalises."""
        return self._only(node, Property.NORMALISES)

    def normalises_across_units(self, node: fx.Node | str) -> bool:
        """Tell whether a node normalises several units together, as LayerNorm does."""
        return any(Property.ACROSS_UNITS in step.properties for step in self.steps(node))

    def is_activation(self, node: fx.Node) -> bool:
        """Tell whether a node applies a function to each value of one tensor, without weights."""
        alone = len(self.inputs_of(node)) == 1 and node.name not in self.tensors
        return alone and self.is_elementwise(node)

    def is_idle(self, node: fx.Node) -> bool:
        """Tell whether a node does nothing in eval mode, as dropout does."""
        return not self.steps(node) and node.op not in ("placeholder", "get_attr", "output")

    def is_opaque(self, node: fx.Node) -> bool:
        """Tell whether a node calls a part whose own Python runs, which may look at values."""
        return node.op == "call_module" and not is_leaf(self.module.get_submodule(str(node.target)))

    def hands_on(self, node: fx.Node) -> bool:
        """Tell whether a node hands on its one input as it is, in eval mode."""
        inputs = self.inputs_of(node)
        alone = self.is_idle(node) and len(inputs) == 1 and bool(self.shapes.get(node.name))
        return alone and self.shapes[node.name] == self.shapes.get(inputs[0].name)

    def _only(self, node: fx.Node | str, properties: Property) -> bool:
        """Tell whether a node does something, and only what has one of some properties."""
        steps = self.steps(node)
        return bool(steps) and all(step.properties & properties for step in steps)
