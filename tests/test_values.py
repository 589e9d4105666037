"""Values that JSON lacks."""

import pytest
import torch

from fxfuse.values import CONTAINERS, PLAIN, Wrong, function_named, kind_of_tuple, tensor_of


def test_named_tuples_of_one_name_and_fields_are_of_one_class():
    kind = kind_of_tuple("Both", ("main", "aux"))
    assert kind is kind_of_tuple("Both", ("main", "aux")) and kind(1, 2).aux == 2
    assert CONTAINERS["namedtuple"](["Both", ["main", "aux"], [1, 2]]) == kind(1, 2)


@pytest.mark.parametrize(
    "name, fields", [("a b", ("x",)), ("A", ("x y",)), ("A", ("_x",)), (1, ())]
)
def test_names_that_would_be_code_make_no_class(name, fields):
    with pytest.raises((Wrong, ValueError)):
        kind_of_tuple(name, fields)


@pytest.mark.parametrize("kind", ["dtype", "layout", "memory_format"])
@pytest.mark.parametrize("name", ["load", "Tensor", "no_such", "__builtins__", 3])
def test_types_are_looked_up_as_what_they_are(kind, name):
    with pytest.raises(Wrong):
        PLAIN[kind](name)


def test_functions_are_those_that_may_be_called():
    assert function_named("torch.relu") is torch.relu
    with pytest.raises(Wrong, match="not allowed"):
        function_named("torch.load")


def test_tensors_are_of_their_bytes_and_shape():
    assert torch.equal(tensor_of("AACAPwAAAEA=", "float32", (2, 1)), torch.tensor([[1.0], [2.0]]))
    assert tensor_of("", "int64", (0, 3)).shape == (0, 3)
    for data, dtype, shape in (
        ("AACAPw==", "float32", (2,)),
        ("", "float32", (1,)),
        ("?", "a", ()),
    ):
        with pytest.raises((Wrong, ValueError, RuntimeError)):
            tensor_of(data, dtype, shape)
