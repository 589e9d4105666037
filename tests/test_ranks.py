"""Several processes that fuse together: what one process would make of all samples, or an error."""

import os
import warnings
from multiprocessing import get_context

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

import fxfuse
from fxfuse._ranks import require_alike
from fxfuse.alignment import OfActivations
from fxfuse.calibration import Calibration, apart
from fxfuse.errors import DataError, ProcessError
from fxfuse.refit import LeastSquares
from tests.support.nets import randomise, stages

LENGTH = 45


def images():
    numbers = torch.Generator().manual_seed(3)
    return torch.randn(LENGTH, 3, 8, 8, generator=numbers, dtype=torch.float64)


def nets():
    shapes = (([4, 4], [5]), ([3], [4]))
    return [randomise(stages(*s), k).double() for k, s in enumerate(shapes)]


def spread(a, b):
    return float((a.std() - b.std()).abs())


OTHER = fxfuse.Method(layer_cost=OfActivations(spread, 20), refit=LeastSquares(gram=1 << 13))
DRAWN = fxfuse.Method(refit=LeastSquares(rows=2))
WAYS = {"default": {}, "rows of all": {"method": OTHER}}
SLOW = {  # by more processes only
    "chosen weights": {"weights": "auto", "method": DRAWN},
    "heads": {"heads": fxfuse.heads.Separate()},
    "clafusion": {"method": "clafusion"},
    "regmean": {"method": "regmean"},
}


def shares_of(data, world):
    """Unequal shares of samples, and the order of one process that reads one of each in turn."""
    bounds = [0, *(LENGTH * (2 * k + 1) // (2 * world) for k in range(1, world)), LENGTH]
    shares = [data[a:b] for a, b in zip(bounds, bounds[1:])]
    longest = range(max(map(len, shares)))
    return shares, torch.stack([s[j] for j in longest for s in shares if j < len(s)])


def fused_in_all(rank, world, folder):
    models, x = nets(), images()
    ways = WAYS if world == 2 else WAYS | SLOW
    results = {name: fxfuse.fuse(models, x, **way) for name, way in ways.items()}
    shares, _ = shares_of(x, world)
    loader = DataLoader(TensorDataset(shares[rank]), 7)
    results["shares"] = fxfuse.fuse(models, loader)
    for name, fused in results.items():
        torch.save(fused.state_dict(), folder / f"{name} {rank}")


def refused_in_all(rank, world, folder):
    models, x = nets(), images()
    with pytest.raises(ProcessError, match="different models"):
        fxfuse.fuse([models[0], randomise(stages([4, 4], [5]), rank).double()], x)
    with pytest.raises(DataError, match="an order of its own"):
        Calibration(x.roll(rank, 0))
    with pytest.raises(DataError, match="the same samples first"):
        Calibration([x[:9], x[9:] + rank])
    with pytest.raises(ProcessError, match="different counts"):
        require_alike([rank], "counts")
    with apart():
        assert Calibration(x[rank:]).samples == LENGTH - rank
    limited = Calibration(x, 11)
    assert limited.samples == 11 and sum(len(c[0]) for c in limited.own(2)) == len(limited.numbers)
    assert torch.equal(torch.cat([c[0] for c in limited.chunks(4)]), x[:11])
    assert not limited.first(1).spread and len(next(limited.first(1).own(4))[0]) == 1


def dies_in_the_last(rank, world, folder):
    def batches():
        yield images()[:20]
        if rank == world - 1:
            os._exit(1)
        yield images()[20:]

    with pytest.raises(ProcessError, match="failed"):
        fxfuse.save(fxfuse.fuse(nets(), batches()), folder / "fused.safetensors")


def _work(rank, world, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    for step in (fused_in_all, refused_in_all, dies_in_the_last):
        step(rank, world, folder)
        (folder / f"{step.__name__} {rank}").touch()


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.sweep)])
def done(request, tmp_path_factory):
    """The folder in which the processes have done all that they do together, and their number."""
    world, folder = request.param, tmp_path_factory.mktemp("ranks")
    context = get_context("fork")  # they need no imports of their own
    processes = [context.Process(target=_work, args=(k, world, folder)) for k in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    return world, folder


@pytest.mark.parametrize("name", [*WAYS, *SLOW, "shares"])
def test_the_result_is_that_of_one_process_on_all_samples(done, name):
    world, folder = done
    if world == 2 and name in SLOW:
        pytest.skip("by three processes")
    data = shares_of(images(), world)[1] if name == "shares" else images()
    expected = fxfuse.fuse(nets(), data, **(WAYS | SLOW).get(name, {})).state_dict()
    for rank in range(world):
        state = torch.load(folder / f"{name} {rank}", weights_only=True)
        for tensor, wanted in expected.items():
            apart_by = (state[tensor] - wanted).abs().max()
            assert apart_by <= 1e-6 * max(wanted.abs().max(), 1), (tensor, apart_by)


def test_processes_that_do_not_work_on_the_same_are_refused(done):
    world, folder = done
    assert all((folder / f"refused_in_all {rank}").exists() for rank in range(world))


def test_a_process_that_dies_ends_all_and_nothing_is_written(done):
    world, folder = done
    assert all((folder / f"dies_in_the_last {rank}").exists() for rank in range(world - 1))
    assert not list(folder.glob("*.safetensors"))
