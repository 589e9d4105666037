"""A network under work: its graph, the example it is analysed on, its ledger and its spaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from .interpreter import label_network
from .ir import Spaces
from .labels import Facts
from .progress import Tick, part, silent
from .ties import spaces_of


@dataclass(frozen=True, eq=False)
class Network:
    """One traced network with everything the stages ask about it.

    Attributes:
        name: How it is called in reports and errors.
        module: Its graph, private to this library.
        example: The inputs it was analysed on.
        book: What the labelled run found.
        spaces: Its unit spaces.
    """

    name: str
    module: fx.GraphModule
    example: tuple[Tensor, ...]
    book: Facts
    spaces: Spaces

    @classmethod
    def of(
        cls,
        name: str,
        module: fx.GraphModule,
        example: tuple[Tensor, ...],
        tick: Tick = silent,
    ) -> Network:
        """Analyse a traced network; `tick` is called with the share that is done."""
        book = label_network(module, example, part(tick, 0.0, 0.8))
        return cls(name, module, example, book.facts(), spaces_of(book))

    def inputs_of(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes whose tensors a node reads, parameters and sizes left out."""
        return [n for n in node.all_input_nodes if self.carries_data(n)]

    def carries_data(self, node: fx.Node) -> bool:
        """Tell whether a node computes a tensor, or several, from the network's inputs."""
        if node.op == "placeholder":
            return True
        return node.op not in ("get_attr", "output") and node.name in self.book.shapes

    def fed(self) -> set[str]:
        """Return the nodes that the network's inputs reach."""
        found: set[fx.Node] = set()
        for node in self.module.graph.nodes:
            if node.op == "placeholder" or found.intersection(node.all_input_nodes):
                found.add(node)
        return {n.name for n in found}

    def steps(self, node: fx.Node | str) -> list[tuple[Any, ...]]:
        """Return the descriptors of the operators that a node runs."""
        return self.book.ops.get(node if isinstance(node, str) else node.name, [])

    def rules(self, node: fx.Node | str) -> set[str]:
        """Return the kinds of operators that a node runs."""
        return {step[0] for step in self.steps(node)} - {"opaque"}

    def is_norm(self, node: fx.Node) -> bool:
        """Tell whether a node only normalises."""
        rules = self.rules(node)
        return bool(rules) and rules <= {"batch_norm", "layer_norm", "group_norm"}

    def is_activation(self, node: fx.Node) -> bool:
        """Tell whether a node applies a function to each value of one tensor, without weights."""
        alone = len(self.inputs_of(node)) == 1 and node.name not in self.book.tensors
        return alone and self.rules(node) == {"pointwise"}

    def is_idle(self, node: fx.Node) -> bool:
        """Tell whether a node does nothing in eval mode, as dropout does."""
        return not self.rules(node) and node.op not in ("placeholder", "get_attr", "output")
