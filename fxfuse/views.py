"""What a user sees an alignment by: methods that its class inherits, so that plans stay plain."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from . import display, graphs, pictures

if TYPE_CHECKING:
    import networkx as nx

    from .ir import Alignment


@dataclass(frozen=True)
class LayerFacts:
    """What pictures and graphs say of a layer.

    Attributes:
        kind: What it is made of (`Layer.kind`).
        width: Number of its units.
        parameters: Number of its parameters.
    """

    kind: str
    width: int
    parameters: int


AllFacts = Sequence[Mapping[str, LayerFacts]]


class Views:
    """Views of an alignment: graph, DOT, GraphML and pictures."""

    def to_networkx(self) -> nx.DiGraph:
        """Return a directed graph of all layers: chains, and aligned pairs with their costs.

        Nodes are called `network index:layer name`, inserted ones `network index:+layer name`. They
        have `network`, `index`, `segment`, `label`, `slot`, `layer` and `inserted`, and where known
        `width`, `kind` and `parameters`. Edges have `relation`, "chain" or "aligned", the latter
        with `cost`.
        """
        return graphs.graph_of(cast("Alignment", self))

    def to_dot(self) -> str:
        """Return the graph in the DOT language, segments as clusters."""
        return graphs.dot_of(cast("Alignment", self))

    def save_dot(self, path: str | os.PathLike[str]) -> None:
        """Write the graph in the DOT language."""
        graphs.save_dot(cast("Alignment", self), path)

    def save_graphml(self, path: str | os.PathLike[str]) -> None:
        """Write the graph as GraphML."""
        graphs.save_graphml(cast("Alignment", self), path)

    def draw(self, path: str | os.PathLike[str], removed: Sequence[Collection[str]] = ()) -> None:
        """Write a picture of it, .svg, .png or .pdf; see `fxfuse.draw`."""
        display.draw(cast("Alignment", self), path, removed)

    def draw_costs(self, path: str | os.PathLike[str]) -> None:
        """Write heat maps of the measured layer costs with the chosen path, per segment.

        Raises:
            ArgumentError: If no costs were measured, or the ending is not .svg, .png or .pdf.
        """
        pictures.draw_costs(cast("Alignment", self), path)
