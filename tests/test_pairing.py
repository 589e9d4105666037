import pytest
import torch
from nets import Pooled, Residual, conv, mlp, randomise, residual, stages
from torch import nn

from fxfuse.errors import PairingError
from fxfuse.network import Network
from fxfuse.pairing import pair_segments
from fxfuse.segments import partition
from fxfuse.tracing import trace

IMAGES = torch.randn(2, 3, 8, 8)


def paired(*nets):
    models = [randomise(net, seed) for seed, net in enumerate(nets)]
    found = [Network.of(f"net {i}", trace(n), (IMAGES,)) for i, n in enumerate(models)]
    return pair_segments(found, [partition(n) for n in found])


def test_a_stem_and_a_stage_pair_as_segments_of_their_own():
    names = [
        [[x.name for x in s.layers] for s in one]
        for one in paired(residual((6, 3)), residual((6, 1)))
    ]
    assert names == [
        [["0.0"], ["0.0"]],
        [["1.0", "1.1", "1.2"], ["1.0"]],
        [["2.fc"], ["2.fc"]],
    ]


def test_runs_that_differ_stay_one_segment():
    a = nn.Sequential(conv(3, 6), Residual(6, 6), conv(6, 6), Pooled(6, 3))
    b = nn.Sequential(conv(3, 6), Residual(6, 6), Pooled(6, 3))
    assert [len(one[0].layers) for one in paired(a, b)] == [3, 1]


@pytest.mark.parametrize(
    ("a", "b", "segment"),
    [
        (lambda: stages([4], [4]), lambda: stages([4], [4], [4]), 3),
        (lambda: residual((4, 2)), lambda: stages([4, 4], [4]), 2),
        (lambda: residual((4, 1), (4, 1)), lambda: residual((4, 1)), 2),
        (lambda: stages([4], hidden=(7,)), lambda: stages([4]), 2),
        (lambda: stages([4], norm=True), lambda: stages([4], norm=False), 1),
    ],
)
def test_networks_that_do_not_pair_are_shown_side_by_side_from_the_first_difference(a, b, segment):
    with pytest.raises(PairingError) as caught:
        paired(a(), b())
    error = caught.value
    assert error.where == f"segment {segment}, the first that differs"
    lines = error.met.splitlines()
    heads = [i for i, line in enumerate(lines) if line.startswith("  segments of net")]
    assert len(heads) == 2
    first = [line for line in lines[heads[0] + 1 : heads[1]] if "made of" not in line]
    assert first[0].lstrip("> ").startswith("8x8 positions: ")
    assert [i + 1 for i, line in enumerate(first) if ">>" in line] == [segment] * (
        len(first) >= segment
    )


def test_a_perceptron_does_not_pair_with_a_convolutional_network():
    class Reshaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(192, 8, 3)

        def forward(self, x):
            return self.net(x.flatten(1))

    with pytest.raises(PairingError, match="made of linear, relu"):
        paired(Reshaped(), stages([4]))


def test_layers_that_can_only_pair_out_of_order_are_refused():
    a = nn.Sequential(conv(3, 4), conv(4, 4, 5), conv(4, 4), Pooled(4, 3))
    b = nn.Sequential(conv(3, 4), conv(4, 4), conv(4, 4, 5), Pooled(4, 3))
    with pytest.raises(PairingError, match="segments do not pair") as caught:
        paired(a, b)
    assert caught.value.met.count(">>") == 2, "both lists, each with the segment that differs"


def test_plain_layers_do_not_pair_with_blocks():
    with pytest.raises(PairingError):
        paired(residual((4, 2), stem=4), stages([4, 4, 4]))
