"""Values that JSON lacks: each kind is written, and read back as it was."""

import json
import math
from collections import namedtuple

import pytest
import torch

from fxfuse.io._values import (
    KINDS,
    Wrong,
    class_of_tuples,
    contiguous,
    data_of,
    function_named,
    in_memory_order,
    kind_of,
    memory_order,
    tensor_of,
)

Pair = namedtuple("Pair", "main aux")


def write(value):
    """Write a value as the codec does, which handles what JSON knows by itself."""
    if isinstance(value, list):
        return [write(part) for part in value]
    finite = isinstance(value, float) and math.isfinite(value)
    if finite or value is None or isinstance(value, (bool, int, str)):
        return value
    kind = kind_of(value)
    return {kind: KINDS[kind].write(value, write)}


def read(written):
    if isinstance(written, list):
        return [read(part) for part in written]
    if not isinstance(written, dict):
        return written
    ((kind, plain),) = written.items()
    return KINDS[kind].read(plain, read)


VALUES = {
    "float": math.inf,
    "complex": 1.5 - 2j,
    "dtype": torch.bfloat16,
    "memory_format": torch.channels_last,
    "layout": torch.strided,
    "device": torch.device("cuda:1"),
    "range": range(2, 9, 3),
    "ellipsis": ...,
    "slice": slice(None, 3, 2),
    "size": torch.Size((2, 3)),
    "tuple": (1, (None, "a"), [2.5, {"b": ()}]),
    "set": {"a", "b", 3},
    "dict": {"a": 1, (2, 3): slice(1)},
    "function": torch.relu,
}


@pytest.mark.parametrize("kind", VALUES)
def test_every_kind_comes_back_through_json(kind):
    value = VALUES[kind]
    assert kind_of(value) == kind
    again = read(json.loads(json.dumps(write(value), allow_nan=False)))
    assert again == value and type(again) is type(value)


def test_there_is_a_value_of_every_kind():
    assert set(VALUES) | {"namedtuple"} == set(KINDS)


def test_named_tuples_come_back_as_a_class_of_their_own():
    again = read(write(Pair(1, (2,))))
    assert again == (1, (2,)) and again.aux == (2,) and type(again).__name__ == "Pair"
    assert type(again) is type(read(write(Pair(3, 4)))) is class_of_tuples("Pair", ("main", "aux"))


def test_sets_are_written_in_one_order():
    names = [f"name {i}" for i in range(20)]
    assert write(set(names)) == write(frozenset(reversed(names)))


@pytest.mark.parametrize(
    "name, fields", [("a b", ("x",)), ("A", ("x y",)), ("A", ("_x",)), (1, ())]
)
def test_names_that_would_be_code_make_no_class(name, fields):
    with pytest.raises((Wrong, ValueError)):
        class_of_tuples(name, fields)


@pytest.mark.parametrize("kind", ["dtype", "layout", "memory_format"])
@pytest.mark.parametrize("name", ["load", "Tensor", "no_such", "__builtins__", 3])
def test_constants_of_torch_are_looked_up_as_what_they_are(kind, name):
    with pytest.raises(Wrong):
        KINDS[kind].read(name, read)


def test_only_functions_that_may_be_called_are_written_and_read():
    assert function_named("torch.relu") is torch.relu
    with pytest.raises(Wrong, match="not allowed"):
        function_named("torch.load")
    with pytest.raises(Wrong, match="torch.serialization.load"):
        write(torch.load)


def test_tensors_are_their_bytes_type_and_shape():
    data = "AACAPwAAAEA=", "float32", (2, 1)
    assert torch.equal(tensor_of(*data), torch.tensor([[1.0], [2.0]]))
    assert data_of(torch.tensor([[1.0], [2.0]])) == data
    assert tensor_of("", "int64", (0, 3)).shape == (0, 3)


@pytest.mark.parametrize(
    "data", [("AACAPw==", "float32", (2,)), ("", "float32", (1,)), ("?", "a", ())]
)
def test_bytes_that_do_not_fit_are_refused(data):
    with pytest.raises((Wrong, ValueError, RuntimeError)):
        tensor_of(*data)


def test_axes_in_memory_are_told_from_the_outermost_and_restored():
    image = torch.ones(2, 3, 4, 5)
    assert memory_order(image) == [0, 1, 2, 3]
    last = image.to(memory_format=torch.channels_last)
    assert memory_order(last) == [0, 2, 3, 1]
    assert in_memory_order(contiguous(last), (0, 2, 3, 1)).stride() == last.stride()
    assert memory_order(torch.ones(2, 3).T) == [1, 0]
