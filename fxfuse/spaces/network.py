"""A network under work: its graph, the example it is analysed on, and what its nodes do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from .._progress import part
from ..ir import Spaces
from ._labelling import OPEN as OPEN
from ._labelling import label_network
from ._ledger import Property, Step
from ._solve import spaces_of


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
        norms: Node that normalises with running statistics -> its tensors by role, and `eps`.
        operators: Node -> the operators that it runs, except those that only hand values on.
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

    @classmethod
    def of(cls, name: str, module: fx.GraphModule, example: tuple[Tensor, ...]) -> Network:
        """Analyse a traced network."""
        with part(0.0, 0.8):
            ledger = label_network(module, example)
        outputs = ledger.outputs.items()
        return cls(
            name,
            module,
            example,
            spaces_of(ledger),
            ledger.shapes,
            {node: tuple(dict.fromkeys(dim for dim, _ in axes)) for node, axes in outputs},
            ledger.weights,
            ledger.tensors,
            ledger.norms,
            ledger.steps,
        )

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
        reached: set[fx.Node] = set()
        for node in self.module.graph.nodes:
            if node.op == "placeholder" or reached.intersection(node.all_input_nodes):
                reached.add(node)
        return {n.name for n in reached}

    def feature_axis(self, node: fx.Node | str) -> int | None:
        """Return the axis of a node's output along which its units lie; None unless it is one."""
        axes = self.features.get(node if isinstance(node, str) else node.name, ())
        return axes[0] if len(axes) == 1 else None

    def steps(self, node: fx.Node | str) -> list[Step]:
        """Return the operators that a node runs, except those that only hand values on."""
        return self.operators.get(node if isinstance(node, str) else node.name, [])

    def contractions(self, node: fx.Node | str) -> list[Step]:
        """Return the operators of a node that sum products, as convolutions do."""
        return [step for step in self.steps(node) if Property.CONTRACTS in step.properties]

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

    def _only(self, node: fx.Node | str, properties: Property) -> bool:
        """Tell whether a node does something, and only what has one of some properties."""
        steps = self.steps(node)
        return bool(steps) and all(step.properties & properties for step in steps)
