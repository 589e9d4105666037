"""An exactly widened copy of a network, made without the library's own maps."""

import torch

import fxfuse


def widened(net, wide, example):
    """Fill a twice as wide network so that it computes what `net` computes.

    Unit `u` becomes units `u` and `u + n`. What reads them takes a third from one and two thirds
    from the other. The two copies give equal values.
    """
    narrow, broad = (fxfuse.find_spaces(n, example) for n in (net, wide))
    wide_by_places = {s.signature: s for s in broad}
    state = dict(net.state_dict())
    for space in narrow:
        other = wide_by_places[space.signature]
        assert other.size == 2 * space.size
        for axis in space.axes:
            target = next(a for a in other.axes if (a.tensor, a.dim) == (axis.tensor, axis.dim))
            state[axis.tensor] = _double(state[axis.tensor], axis, target.index)
    wide.load_state_dict(state)
    return wide.eval()


def _double(tensor, axis, index):
    size = tensor.shape[axis.dim]
    doubled = torch.zeros_like(torch.cat([tensor, tensor], axis.dim))
    for u, positions in enumerate(axis.index):
        for copy, share in ((u, 1 / 3), (u + len(axis.index), 2 / 3)):
            for old, new in zip(positions, index[copy]):
                column = tensor.select(axis.dim, old) * (share if axis.reads else 1.0)
                doubled.select(axis.dim, int(new)).copy_(column)
    assert doubled.shape[axis.dim] == 2 * size
    return doubled
