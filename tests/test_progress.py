"""Shares of a job, and of its parts."""

import io
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxfuse
from fxfuse._progress import Clock, counted, heard_by, part, rounds, tell
from fxfuse.coupling.c2m3 import CycleConsistent
from fxfuse.coupling.transport import InPlace, LayerByLayer
from fxfuse.coupling.weight_matching import MergeMany, WeightMatching, WeightTransport
from fxfuse.coupling.zipit import Zip
from fxfuse.depth.shorten import Shorten
from fxfuse.refit.moments import MatchMoments
from tests.support.nets import mlp, randomise


@given(st.lists(st.integers(0, 5), max_size=6))
def test_shares_of_parts_rise_to_one(sizes):
    seen = []
    with heard_by(seen.append):
        for size in counted(sizes):
            assert list(counted(range(size))) == list(range(size))
    assert seen == sorted(seen) and len(seen) == sum(sizes) + len(sizes)
    assert not sizes or seen[-1] == pytest.approx(1)


def test_rounds_leave_room_for_more():
    seen = []
    with heard_by(seen.append):
        for _ in rounds(100):
            list(counted("ab"))
    assert seen[:4] == [0.25, 0.5, 0.625, 0.75] and seen == sorted(seen) and seen[-1] <= 1
    assert len(list(rounds(3))) == 3


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_part_lies_where_it_is_said_to(start, end, share):
    seen = []
    with heard_by(seen.append), part(start, end):
        tell(share)
    assert np.isclose(seen[0], start + (end - start) * share)


def test_nobody_hears_what_is_told_outside_a_job():
    seen = []
    tell(0.1)
    with heard_by(seen.append):
        tell(0.3)
    tell(0.5)
    assert seen == [0.3]


def test_the_listener_is_the_old_one_again_after_an_error_or_a_break():
    seen = []
    with heard_by(seen.append):
        with pytest.raises(ZeroDivisionError), part(0.5, 1.0):
            raise ZeroDivisionError
        items = counted("ab")
        next(items)
        items.close()
        tell(1.0)
    assert seen == [1.0]


EQUAL = [mlp(6, 8, 7, 3), mlp(6, 8, 7, 3)]
UNEQUAL = [mlp(6, 8, 8, 7, 3), mlp(6, 6, 4, 3)]


COUPLINGS = [
    (UNEQUAL, fxfuse.Method()),
    (UNEQUAL, fxfuse.Method(coupling=LayerByLayer())),
    (UNEQUAL, fxfuse.Method(coupling=WeightTransport())),
    (UNEQUAL, fxfuse.Method(coupling=Zip())),
    (EQUAL, fxfuse.Method(coupling=InPlace())),
    (EQUAL, fxfuse.Method(coupling=WeightMatching())),
    (EQUAL, fxfuse.Method(coupling=MergeMany())),
    (EQUAL, fxfuse.Method(coupling=CycleConsistent())),
    (UNEQUAL, fxfuse.Method(balancing=Shorten(), refit=MatchMoments())),
]


@pytest.mark.parametrize(("nets", "method"), COUPLINGS)
def test_every_stage_that_may_take_long_says_how_far_it_is(nets, method):
    nets, seen = [randomise(n, i) for i, n in enumerate(nets)], []
    x = torch.randn(40, 6)
    fxfuse.fuse(nets, x, method=method, progress=lambda *step: seen.append(step))
    stages = [
        *("trace and find spaces", "balance depths", "couple units", "emit"),
        *(("measure units", "refit") if method.coupling.view else ()),
    ]
    for stage in stages:
        shares = [share for name, share in seen if name == stage]
        assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] <= 1.0
        assert any(0 < share < 1 for share in shares) or stage in ("measure units", "refit"), stage


def test_looking_at_one_network_says_how_far_it_is():
    seen = []
    fxfuse.inspect(mlp(6, 8, 3), torch.randn(2, 6), progress=lambda *step: seen.append(step))
    shares = [share for _, share in seen]
    assert {name for name, _ in seen} == {"trace and find spaces"}
    assert shares == sorted(shares) and len(set(shares)) > 4


class Screen(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_drawn_on_a_terminal_and_a_line_for_each_stage_elsewhere(monkeypatch, terminal):
    screen = Screen(terminal)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    clock = Clock(True)
    for stage in ("first", "second"):
        with clock.stage(stage):
            tell(0.5)
    shown = screen.getvalue()
    assert ("50%" in shown) == ("\r" in shown) == terminal
    lines = [line.rpartition("\r")[2].split() for line in shown.split("\n")[:-1]]
    assert [line[0] for line in lines] == ["first", "second"]
    assert all(line[-1] == "s" for line in lines)


@pytest.mark.parametrize("silent", [None, False])
def test_nothing_is_drawn_unless_asked_for(capsys, silent):
    net, x = randomise(mlp(4, 5, 3), 0), torch.randn(20, 4)
    fxfuse.fuse([net, net], x, progress=silent)
    assert capsys.readouterr() == ("", "")
    fxfuse.align([net, net], x, progress=True)
    fxfuse.inspect(net, x, progress=True)
    assert "align layers" in capsys.readouterr().err
