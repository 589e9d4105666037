"""Room for couplings that choose their widths: a host before, no spare units after."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

import fxfuse
from fxfuse.coupling.mixing import Couplings
from fxfuse.coupling.plans import CouplingMethod
from fxfuse.coupling.problem import Problem
from fxfuse.ir import Coupling
from fxfuse.refit import AsMixed
from fxfuse.width.growth import with_host
from tests.support.nets import Tokens, build, data_shape, gap, mlp, outputs, randomise
from tests.support.problems import problem_of
from tests.support.sweeps import some
from tests.support.tolerances import FUNCTION

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))


def test_a_host_has_room_up_to_a_limit_and_never_for_more_than_all_units():
    nets = [randomise(mlp(6, 8, 4, 3), 1), randomise(mlp(6, 5, 4, 3), 2)]
    for limit, sizes in ((1.0, [8, 4]), (1.5, [12, 6]), (9.0, [13, 8])):
        problem = with_host(problem_of(nets, X), limit)
        assert [s.size for s in problem.structure.spaces] == sizes
        assert problem.weights == (0.5, 0.5, 0.0) and problem.lead == 0
        assert set(problem.base.values()) == {2}


def test_heads_and_units_under_norms_keep_the_anchors_units():
    nets = [randomise(Tokens(), seed) for seed in (1, 2)]
    problem = with_host(problem_of(nets, torch.randn(4, 3, 8, 8)), 2.0)
    grown = [name for name, base in problem.base.items() if base == 2]
    assert [problem.structure.spaces[name].size for name in grown] == [24]
    kept = [name for name in problem.base if name not in grown]
    assert all(problem.base[n] == 0 for n in kept) and len(kept) == 4


@dataclass(frozen=True)
class SideBySide(CouplingMethod):
    """Put the units of the networks behind each other, with some places left empty."""

    gap: int = 1

    @property
    def room(self):
        return 9.0

    def __call__(self, problem: Problem, evidence):
        maps = {}
        for name, spaces in problem.spaces.items():
            size = problem.structure.spaces[name].size
            start = [0, spaces[0].size]
            for k, space in enumerate(spaces):
                shape = size, space.size
                place = np.arange(space.size) + start[k] if k < 2 else np.zeros(0, int)
                ones = np.ones(len(place)), (place, np.arange(len(place)))
                scale = 1 / problem.weights[k] if k < 2 else 1.0
                write = csr_array(ones, shape=shape)
                maps[name, k] = Coupling(write * scale, csr_array(write.T))
        return Couplings(problem, maps)


@pytest.mark.parametrize("name", some(["plain", "batch norm"], "plain"))
def test_networks_side_by_side_compute_the_mean_of_their_outputs(name):
    nets, data = [build(name, seed)[0] for seed in (1, 2)], torch.randn(8, *data_shape(name))
    method = fxfuse.Method(coupling=SideBySide(), refit=AsMixed())
    fused = fxfuse.fuse(nets, data, weights=[1, 3], method=method)
    mean = 0.25 * outputs(nets[0], data) + 0.75 * outputs(nets[1], data)
    assert float((outputs(fused, data) - mean).abs().max()) < FUNCTION * float(mean.abs().max())


def test_units_that_nothing_writes_are_left_out():
    net = randomise(mlp(6, 8, 7, 3), 1)
    fused = fxfuse.presets.fedma([net, net, net], X)
    assert [p.shape for p in fused.parameters()] == [p.shape for p in net.parameters()]
    assert gap(net, fused, X) < FUNCTION
    report = fused.meta["fxfuse"]
    assert len(report.weights) == 3 and replace(report, seconds={}).spaces[0].size == 8
