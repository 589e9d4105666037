"""Data classes to JSON values and back, checked."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxfuse._schema import in_words, parsed, read, written
from fxfuse.errors import ArgumentError
from tests.support.json_values import JSON


@dataclass(frozen=True)
class Inner:
    name: str | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class Outer:
    count: int
    sure: bool
    parts: tuple[Inner, ...]
    pair: tuple[int, str] = (1, "a")
    table: dict[str, float] | None = None
    free: Any = None
    names: frozenset[str] = frozenset()
    unwritten: set = field(default_factory=set, compare=False, metadata={"written": False})


INNER = st.builds(
    Inner, st.none() | st.text(), st.lists(st.floats(allow_nan=False), max_size=3).map(tuple)
)


OUTER = st.builds(
    Outer,
    st.integers(),
    st.booleans(),
    st.lists(INNER, max_size=2).map(tuple),
    st.tuples(st.integers(), st.text()),
    st.none() | st.dictionaries(st.text(), st.floats(allow_nan=False), max_size=2),
    names=st.frozensets(st.text(), max_size=2),
    unwritten=st.just({1}),
)


@given(OUTER)
def test_what_is_written_is_read_again(value):
    text = json.dumps(written(value), allow_nan=False)
    assert read(Outer, parsed(text, "it"), "it") == value


@given(OUTER)
def test_what_has_its_default_may_be_left_out(value):
    short = written(value, defaults=False)
    assert read(Outer, short, "it") == value
    assert ("pair" in short) == (value.pair != (1, "a")) and "count" in short


def test_numbers_that_json_lacks_are_read_again():
    numbers = read(tuple[float, ...], written((math.nan, math.inf, -math.inf)), "it")
    assert math.isnan(numbers[0]) and numbers[1:] == (math.inf, -math.inf)


@given(st.sampled_from(sorted(set(Outer.__dataclass_fields__) - {"unwritten"})), JSON)
def test_any_value_is_accepted_or_refused(key, value):
    whole = written(Outer(1, True, (Inner("a", (1.0,)),), table={}))
    try:
        assert isinstance(read(Outer, whole | {key: value}, "it"), Outer)
    except ArgumentError as error:
        assert error.where.startswith(f"it.{key}")


GOOD = written(Outer(1, True, (Inner("a", (1.0,)),)))


@pytest.mark.parametrize(
    ("change", "where", "expected"),
    [
        ({"count": "1"}, "it.count", "a whole number"),
        ({"count": True}, "it.count", "a whole number"),
        ({"sure": 1}, "it.sure", "true or false"),
        ({"parts": {}}, "it.parts", "a list of an object with 'name', 'values'"),
        ({"parts": [{"name": 1, "values": []}]}, "it.parts[0].name", "a text in quotes"),
        ({"parts": [{"name": "a", "values": [1, "x"]}]}, "it.parts[0].values[1]", "a number"),
        ({"parts": [{"name": "a"}]}, "it.parts[0]", "an object with 'name', 'values'"),
        ({"pair": [1]}, "it.pair", "2 entries"),
        ({"table": {"a": None}}, "it.table.a", "a number"),
        ({"more": 1}, "it", "an object with 'count'"),
    ],
)
def test_errors_name_the_place_and_what_belongs_there(change, where, expected):
    with pytest.raises(ArgumentError) as caught:
        read(Outer, GOOD | change, "it")
    assert caught.value.where == where and caught.value.expected.startswith(expected)


@pytest.mark.parametrize(
    "text", ["", "{", "{'a': 1}", '{"a": 1, "a": 2}', "[NaN]", "[" * 9999, "9" * 9999, "[1,]"]
)
def test_text_that_is_not_json_is_refused(text):
    with pytest.raises(ArgumentError, match="not JSON"):
        parsed(text, "it")


def test_long_values_are_shown_shortened():
    with pytest.raises(ArgumentError) as caught:
        read(int, ["x" * 500], "it")
    assert len(caught.value.met) < 120 and in_words(int | None) == "a whole number or null"
