"""Where a network of another structure meets the fused one."""

import torch
from torch import nn

from fxfuse.coupling.guests import guest_of
from tests.support.nets import conv, randomise
from tests.support.problems import network

X = torch.randn(4, 3, 12, 12)


def pooled(*parts, width):
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 2))


def met(host, guest):
    nets = [network(randomise(net), X) for net in (host, guest)]
    return guest_of(nets[1], nets[0], 0.5).places


def test_the_last_layers_of_the_last_resolution_meet_and_the_outputs():
    host = pooled(conv(3, 4), conv(4, 4), conv(4, 5, stride=2), width=5)
    guest = pooled(conv(3, 6), conv(6, 7, stride=2), conv(7, 8), conv(8, 9), width=9)
    assert met(host, guest) == {
        "_2_1": ("_3_1", 1),
        "_5": ("_6", None),
    }


def test_a_resolution_that_only_one_has_is_passed_over():
    host = pooled(conv(3, 4), conv(4, 5, stride=2), conv(5, 6, stride=2), width=6)
    guest = pooled(conv(3, 4), conv(4, 5, stride=2), width=5)
    assert met(host, guest) == {"_1_1": ("_1_1", 1), "_5": ("_4", None)}


def test_networks_without_a_resolution_in_common_meet_at_the_outputs():
    assert met(pooled(conv(3, 4), width=4), pooled(conv(3, 4, stride=2), width=4)) == {
        "_3": ("_3", None)
    }
