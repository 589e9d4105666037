"""What a report of a fusion says."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array, eye_array

import fxfuse
from fxfuse.depth.shorten import Shorten
from fxfuse.errors import ArgumentError
from fxfuse.fusion.assemble import describe
from fxfuse.ir import Coupling, LayerFit
from fxfuse.report import CouplingReport
from fxfuse.report.html import page_of
from fxfuse.report.report import Nearness
from tests.support.nets import mlp, randomise

X = torch.randn(80, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def nets():
    return [randomise(mlp(6, 8, 7, 3), 0).eval(), randomise(mlp(6, 5, 3), 1).eval()]


@pytest.fixture(scope="module")
def report(nets):
    return fxfuse.fuse(nets, X).meta["fxfuse"]


def described(matrix):
    matrix = csr_array(matrix)
    return describe(Coupling(matrix, csr_array(matrix.T)))


@given(st.permutations(range(6)))
def test_permutations_are_told_from_identities(order):
    coupling = described(eye_array(6).tocsr()[np.array(order)])
    stays = np.mean(np.array(order) == np.arange(6))
    assert coupling.kind == ("identity" if stays == 1 else "permutation")
    assert (coupling.mass, coupling.identity) == (1.0, pytest.approx(stays))


def test_other_couplings_have_their_names():
    assert described(np.eye(4, 3)).kind == "one to one" and described(np.eye(4, 3)).mass == 0.75
    assert described(np.array([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])).kind == "merging"
    assert described(np.full((2, 2), 0.5)) == CouplingReport("soft", 1.0, 0.5)
    assert described(np.zeros((3, 2))) == CouplingReport("absent", 0.0, 0.0)


def test_spaces_say_how_each_network_takes_part(report):
    for space in report.spaces:
        assert space.sizes[report.anchor] == space.size
        assert space.couplings[report.anchor].kind == "identity"
        assert len(space.sizes) == len(space.couplings) == 2
    assert report.spaces[0].sizes == (8, 5)


def test_maps_are_kept_within_a_limit(nets, report, monkeypatch, tmp_path):
    assert set(report.maps) == {(s.name, k) for s in report.spaces for k in (0, 1)}
    monkeypatch.setattr("fxfuse.fusion.assemble.KEPT", 16)
    limited = fxfuse.fuse(nets, X).meta["fxfuse"]
    assert 0 < sum(m.nnz for m in limited.maps.values()) <= 16
    missing = next(s.name for s in report.spaces if (s.name, 1) not in limited.maps)
    with pytest.raises(ArgumentError, match="not kept"):
        limited.draw_coupling(missing, tmp_path / "a.svg")
    assert not list(tmp_path.iterdir())


def test_pictures_of_a_fusion(report, tmp_path):
    report.draw_coupling(report.spaces[0].name, tmp_path / "a.svg")
    assert "Sequential 1 to the fused network" in (tmp_path / "a.svg").read_text()
    report.draw_coupling(report.spaces[0].name, tmp_path / "b.svg", network=0)
    assert (tmp_path / "a.svg").read_bytes() != (tmp_path / "b.svg").read_bytes()
    report.draw_fits(tmp_path / "c.svg")


def test_versions_and_memory_are_recorded(report):
    assert {"fxfuse", "torch", "python", "POT"} <= set(report.versions)
    assert set(report.memory) <= set(report.seconds)
    assert all(peak > 1 << 20 for peak in report.memory.values())


def test_it_is_copied_and_pickled_with_the_network(nets):
    fused = fxfuse.fuse(nets, X)
    report = fused.meta["fxfuse"]
    for meta in (copy.deepcopy(fused).meta, pickle.loads(pickle.dumps(fused.meta))):
        assert meta["fxfuse"] == report and set(meta["fxfuse"].maps) == set(report.maps)


def test_removed_layers_are_named(nets, report):
    assert report.removed == ()
    short = fxfuse.fuse(nets, X, method=fxfuse.Method(balancing=Shorten())).meta["fxfuse"]
    assert [len(names) for names in short.removed] == [1, 0]
    assert short.removed[0] < {name for name in short.alignment.facts[0]}


def test_facts_count_widths_and_parameters(nets, report):
    deep, shallow = report.alignment.facts
    assert [f.width for f in deep.values()] == [8, 7, 3]
    total = [sum(f.parameters for f in facts.values()) for facts in (deep, shallow)]
    assert total == [sum(p.numel() for p in n.parameters()) for n in nets]


def test_the_text_fits_a_screen_and_ends_with_what_to_do(report):
    poor = tuple(LayerFit(f"layer{i}", 0.01 * i, 1.0) for i in range(40))
    for changed in (report, replace(report, layers=poor), replace(report, warnings=("a; try b",))):
        lines = str(changed).splitlines()
        assert len(lines) <= 24 and lines[-1].startswith("next: ")
    text = str(replace(report, layers=poor, warnings=()))
    assert "layer0" in text and "layer5" not in text and "and 35 more" in text
    assert "more samples" in text and "warning says" in str(replace(report, warnings=("a",)))


def test_the_dearest_layers_come_first_and_those_not_timed_do_not_count(report):
    assert report.dearest and all(layer.seconds > 0 for layer in report.layers)
    timed = [LayerFit(f"layer{i}", 0.9, 1.0, seconds=float(i % 7)) for i in range(20)]
    dearest = replace(report, layers=tuple(timed)).dearest
    assert len(dearest) == 10 and [layer.seconds for layer in dearest[:4]] == [6, 6, 5, 5]
    assert timed[0] == replace(timed[0], seconds=9.0)


def test_the_verdict_counts_the_networks_that_are_farther_away(report):
    near = Nearness(True, 9, True, 0.1, (0.2, 0.05), (False, True))
    assert replace(report, nearness=None).verdict == ""
    assert "than 1 of 2 networks: 0.1 nats" in replace(report, nearness=near).verdict
    near = replace(near, networks=(0.2, 0.3))
    assert "than every network" in replace(report, nearness=near).verdict
    page = page_of(replace(report, nearness=near, warnings=()), {}, {})
    assert page.index("than every network") < page.index("<table")
    page = page_of(replace(report, nearness=near, warnings=("beware <b>",)), {}, {})
    assert "than every network" not in page and "beware &lt;b&gt;" in page


def test_rows_say_what_each_network_the_ensemble_and_the_fused_one_cost(nets, report):
    sizes = [sum(p.numel() for p in n.parameters()) for n in nets]
    work = [6 * 8 + 8 * 7 + 7 * 3, 6 * 5 + 5 * 3]
    assert [c.parameters for c in (*report.costs, report.cost)] == [*sizes, sizes[0]]
    assert [c.multiply_adds for c in (*report.costs, report.cost)] == [*work, work[0]]
    rows = {name: cells for name, *cells in report.rows}
    assert list(rows) == [*report.alignment.names, "ensemble", "fused"]
    both = [str(sum(sizes)), str(sum(work)), "0 nats"]
    assert rows["ensemble"] == both and rows["fused"][:2] == [str(sizes[0]), str(work[0])]
    assert report.table in str(report) and "on 80 samples" in report.table
    alone = replace(report, weights=(1.0, 0.0))
    assert alone.rows[2][1] == str(sizes[0]), "what has no share is not run in the ensemble"


def test_what_is_not_known_of_a_network_is_left_out(report):
    bare = replace(report, costs=(), cost=None)
    assert "parameters" not in bare.table and "ensemble" in bare.table
    assert "ensemble" not in replace(report, nearness=None).table
    assert replace(bare, nearness=None).summary[-1] in str(replace(bare, nearness=None))
    page = page_of(replace(bare, nearness=None), {}, {})
    assert ">20.3k<" not in page and "fused" in page


def test_notebooks_show_text_and_picture(report):
    shown = report._repr_html_()
    assert "next: " in shown and "<svg" in shown and report.alignment._repr_html_() in shown
