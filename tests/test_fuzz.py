"""No public function raises anything but the library's errors, for any model, data or argument."""

import traceback

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fxfuse
from fxfuse.errors import ArgumentError, DataError
from tests.support.fuzz import FUNCTIONS, MODULES, violations

QUICK, LONG = 15, 3000


def require_none(seed, folder):
    found = violations(seed, folder)
    for name, error in found:
        print(f"seed {seed}, {name}:")
        traceback.print_exception(error)
    assert not found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("fuzz")
        patch.chdir(path)  # where functions write that are given any name
        yield path


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=QUICK)
@given(st.integers(0, 10**6))
def test_only_errors_of_the_family_are_raised(folder, seed):
    require_none(seed, folder)


@pytest.mark.sweep
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(10))
def test_only_errors_of_the_family_are_raised_on_thousands_of_models(folder, part):
    for seed in range(part * LONG, (part + 1) * LONG):
        require_none(seed, folder)


def test_networks_are_drawn_from_all_of_torch():
    assert len(MODULES) > 140 and len(FUNCTIONS) > 120


X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


class NoRows(nn.Module):
    """A layer that reads no values, beside one that does."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.a(x) + self.b(x[:0]).sum(0)


def broken():
    yield X
    raise RuntimeError("a file is gone")


WORKS = {
    "no layers": lambda: fxfuse.fuse([nn.ReLU(), nn.ReLU()], X),
    "no layers, permuted": lambda: fxfuse.permute(nn.Identity(), X),
    "one network, layer by layer": lambda: fxfuse.fuse([net()], X, method="otfusion"),
    "a negative seed": lambda: fxfuse.permute(net(), X, seed=-1),
    "no layers, by signs of changes": lambda: fxfuse.presets.ties([nn.ReLU()] * 3, X),
    "a layer that reads no values": lambda: fxfuse.fuse([NoRows().eval(), NoRows().eval()], X),
}
REFUSED = {
    "data without values": (DataError, lambda: fxfuse.fuse([net(), net(1)], X.to("meta"))),
    "sparse data": (DataError, lambda: fxfuse.fuse([net(), net(1)], X.to_sparse())),
    "a loader that fails": (DataError, lambda: fxfuse.fuse([net(), net(1)], broken())),
    "inputs that fail": (DataError, lambda: fxfuse.fuse([net(), net(1)], X, inputs=nn.Linear)),
    "names of no network": (ArgumentError, lambda: fxfuse.compare({"a": net()}, X, ensemble=["b"])),
    "a loss that fails": (
        DataError,
        lambda: fxfuse.barrier([net(), net(1)], X, [(X, torch.zeros(20).long())], loss=max),
    ),
}


@pytest.mark.parametrize("case", WORKS)
def test_odd_networks_work(case):
    assert WORKS[case]() is not None


@pytest.mark.parametrize("case", REFUSED)
def test_odd_arguments_are_refused_in_four_parts(case):
    kind, call = REFUSED[case]
    with pytest.raises(kind) as caught:
        call()
    assert all([caught.value.met, caught.value.where, caught.value.expected, caught.value.do])
