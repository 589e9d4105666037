"""What guests say of a value: what their features tell, and nothing where these tell nothing."""

import torch

from fxfuse.calibration.positions import draw_positions
from fxfuse.refit._guests import _mapped, among

SAMPLE = draw_positions(1, [torch.arange(200)], 200, 200)


def rows(units, seed):
    x = torch.randn(200, units, generator=torch.Generator().manual_seed(seed))
    return SAMPLE.joined([x[SAMPLE.at[0]]])


def test_a_linear_function_of_the_features_is_told():
    features = rows(5, 0)
    values = features @ rows(5, 1)[:5, :3].repeat(1, 1) + 2
    assert torch.allclose(_mapped(features, values, SAMPLE), values, atol=1e-3)


def test_features_that_tell_nothing_have_no_say():
    assert _mapped(rows(5, 0), rows(3, 1), SAMPLE) is None


def test_guests_have_their_share():
    values = torch.ones(2, 3)
    among(values, [(0.25, torch.zeros(2, 3)), (0.25, 3 * torch.ones(2, 3))])
    assert torch.equal(values, torch.full((2, 3), 1.25))
