"""Random alignments, some of them of networks and layers with awkward names."""

from hypothesis import strategies as st

from fxfuse.ir import Alignment, LayerFacts, SegmentAlignment

NASTY = ["<b>&amp;", 'a"b', "c'd", "$x_1$", "e\\n", "\u00e9\u4e2d", "x\x01y", "</script>", "]]>"]
PARTS = st.one_of(st.sampled_from(NASTY), st.text("abcxyz012_", min_size=1, max_size=9))


@st.composite
def alignments(draw):
    count = draw(st.integers(1, 3))
    segments, number = [], 0
    facts = [{} for _ in range(count)]
    for _ in range(draw(st.integers(1, 3))):
        depth, reference = draw(st.integers(1, 5)), draw(st.integers(0, count - 1))
        prefix = draw(st.sampled_from(["", "stage.", "a.b.c."])) + draw(PARTS)
        slots, costs = [], []
        for k in range(count):
            size = depth if k == reference else draw(st.integers(1, depth))
            places = sorted(draw(st.permutations(range(depth)))[:size])
            row = [None] * depth
            for i in places:
                number += 1
                row[i] = f"{prefix}.{draw(PARTS)}{number}"
                facts[k][row[i]] = LayerFacts(draw(PARTS), number, 100 * number)
            cost = st.one_of(st.floats(0, 3), st.just(float("inf")))
            rows = st.tuples(*[cost] * size)
            measured = k != reference and draw(st.booleans())
            costs.append(draw(st.tuples(*[rows] * depth)) if measured else None)
            slots.append(tuple(row))
        segment = SegmentAlignment(draw(PARTS), reference, tuple(slots), tuple(costs))
        segments.append(_finite(segment))
    names = tuple(f"{draw(PARTS)} {k}" for k in range(count))
    return Alignment(tuple(segments), names, tuple(facts) if draw(st.booleans()) else ())


def _finite(segment):
    """Give the chosen pairs finite costs, as an aligner does."""
    costs = []
    for k, matrix in enumerate(segment.costs):
        rows = None if matrix is None else [list(row) for row in matrix]
        places = [i for i, name in enumerate(segment.slots[k]) if name is not None]
        for j, i in enumerate(places if rows else ()):
            rows[i][j] = min(rows[i][j], 9.0)
        costs.append(None if rows is None else tuple(map(tuple, rows)))
    return SegmentAlignment(segment.label, segment.reference, segment.slots, tuple(costs))


def layers_of(alignment):
    """Every layer, as `(index of its network, name)`."""
    return [
        (k, name)
        for s in alignment.segments
        for k, row in enumerate(s.slots)
        for name in row
        if name is not None
    ]


EXAMPLE = Alignment(
    (
        SegmentAlignment(
            "8x8 positions", 0, (("a1", "a2", "a3"), ("b1", None, "b2")), (None, ((0.1, 0.9),) * 3)
        ),
        SegmentAlignment("features", 0, (("a4",), ("b3",)), (None, None)),
    ),
    ("deep", "shallow"),
    (
        {f"a{i}": LayerFacts("linear, relu", 10 * i, 1000 * i) for i in range(1, 5)},
        {f"b{i}": LayerFacts("linear, relu", 5 * i, 500 * i) for i in range(1, 4)},
    ),
)
