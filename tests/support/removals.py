"""Layers removed from a network."""

from fxfuse.alignment.layers import partition
from fxfuse.calibration.data import Calibration
from fxfuse.depth._removal import MergeIntoNext, plan_removals, remove_layers
from fxfuse.graph.passes import canonical
from fxfuse.graph.trace import trace
from fxfuse.spaces.network import Network


def network_of(net, data):
    return Network.of("net", canonical(trace(net), (data[:2],)), (data[:2],))


def layers_of(network):
    return [x for s in partition(network) for x in s.layers]


def removals_at(network, at):
    """Plan to remove the layers of some indices."""
    layers = layers_of(network)
    return plan_removals(layers, {layers[i].name for i in at})


def removed(network, at, strategy):
    """The module of a network without the layers of some indices."""
    removals = removals_at(network, at)
    return remove_layers(network.module, network.example, network, removals, strategy)


def merged(net, data, at, gate):
    return removed(network_of(net, data), at, MergeIntoNext(gate, Calibration(data)))
