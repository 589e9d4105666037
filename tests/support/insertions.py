"""One network's layer inserted into another network."""

from fxfuse.alignment.layers import partition
from fxfuse.depth._insert import insert_layers
from fxfuse.depth._neutral import Insertion
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network
from tests.support.nets import randomise


def network(net, x, seed=0):
    return Network.of("net", trace(randomise(net, seed)), (x,))


def layer_of(network, name):
    layers = {layer.name: layer for s in partition(network) for layer in s.layers}
    return layers[name]


def insert(into, template, name, after, times=1):
    """Put a template's layer behind a node of another network; return the edited module."""
    insertion = Insertion(template, layer_of(template, name), into, after)
    return insert_layers(into, [insertion] * times)[0]


def new_nodes(into, module):
    """The nodes that an edited module has beside those of the network it was made of."""
    old = {n.name for n in into.module.graph.nodes}
    return [n for n in module.graph.nodes if n.name not in old]
