"""Heat maps, bars and curves."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array, eye_array, random_array

from fxfuse.errors import ArgumentError
from fxfuse.fusion.barrier import Barrier
from fxfuse.ir import Alignment, LayerFit, SegmentAlignment
from fxfuse.report.plots import draw_coupling, draw_fits, near_diagonal
from tests.support.alignments import EXAMPLE


@given(st.permutations(range(9)))
def test_ordering_undoes_a_permutation(order):
    matrix = csr_array(eye_array(9).tocsr()[np.array(order)])
    assert (matrix[near_diagonal(matrix)].toarray() == np.eye(9)).all()


@given(st.integers(1, 8), st.integers(1, 8), st.floats(0, 1), st.integers(0, 99))
def test_ordering_keeps_every_row_even_if_some_are_empty(rows, columns, density, seed):
    matrix = csr_array(random_array((rows, columns), density=density, random_state=seed))
    assert sorted(near_diagonal(matrix)) == list(range(rows))


def test_costs_are_drawn_with_the_names_of_the_layers(tmp_path):
    EXAMPLE.draw_costs(tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()  # matplotlib writes texts as comments, too
    assert all(f"<!-- {name} -->" in text for name in ("a1", "a2", "a3", "b1", "b2"))


def test_pairs_that_never_match_can_be_drawn(tmp_path):
    inf = float("inf")
    segment = SegmentAlignment("x", 0, (("a", "b"), ("c", None)), (None, ((0.5,), (inf,))))
    Alignment((segment,), ("$p$", "q_{")).draw_costs(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_an_alignment_without_costs_is_refused(tmp_path):
    segment = SegmentAlignment("x", 0, (("a",), ("b",)), (None, None))
    with pytest.raises(ArgumentError, match="without measured costs"):
        Alignment((segment,), ("p", "q")).draw_costs(tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("matrix", [csr_array((3, 2)), csr_array(np.ones((4, 5))), eye_array(99)])
def test_couplings_of_any_density_can_be_drawn(tmp_path, matrix):
    draw_coupling(matrix, tmp_path / "a.svg", "title & $more_")
    assert "sorted by their partners" in (tmp_path / "a.svg").read_text()


def test_fits_below_zero_are_drawn_too(tmp_path):
    fits = [LayerFit("stage.conv1", 0.9, 0.1), LayerFit("stage.conv2", -3.0, float("inf"))]
    draw_fits(fits, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "<!-- stage.conv1 -->" in text and "0.90" in text
    with pytest.raises(ArgumentError, match="without refitted layers"):
        draw_fits([], tmp_path / "b.svg")


def test_a_barrier_is_drawn(tmp_path):
    Barrier((0.0, 1.0), (1.0, 2.0), (50.0, 60.0), ("a", "b")).draw(tmp_path / "a.svg")
    assert "weight of b (the rest: a)" in (tmp_path / "a.svg").read_text()
    with pytest.raises(ArgumentError, match="jpg"):
        Barrier((0.0, 1.0), (1.0, 2.0), (50.0, 60.0), ("a", "b")).draw(tmp_path / "a.jpg")
