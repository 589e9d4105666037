"""Affine maps of random geometry."""

import torch
from hypothesis import strategies as st

from fxfuse.calibration.affine import Affine


@st.composite
def maps(draw):
    """Return a linear map or convolution and an input for it, in float64."""
    n = draw(st.integers(0, 3))
    groups = draw(st.sampled_from([1, 2])) if n else 1
    kernel = [draw(st.integers(1, 3)) for _ in range(n)]
    geometry = [[draw(st.integers(low, 2)) for _ in range(n)] for low in (1, 0, 1)]
    torch.manual_seed(draw(st.integers(0, 99)))
    weight = torch.randn(4, draw(st.integers(1, 2)), *kernel, dtype=torch.float64)
    bias = torch.randn(4, dtype=torch.float64)
    affine = Affine(weight, bias, *map(tuple, geometry), groups)
    shape = (3, affine.inputs, *[6, 7, 5][:n]) if n else (3, 5, affine.inputs)
    return affine, torch.randn(shape, dtype=torch.float64)
