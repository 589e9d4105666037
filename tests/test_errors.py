"""The family of errors: four parts each, kept by copying and pickling."""

import copy
import inspect
import pickle

import pytest

from fxfuse import errors
from fxfuse.errors import ArgumentError, FuseError, NotEquivalent, PassError

KINDS = [k for k in vars(errors).values() if inspect.isclass(k) and issubclass(k, FuseError)]
PARTS = dict(where="layer 'a.b'", expected="a sum", do="add one")


def test_text_has_the_four_parts_in_order():
    text = str(FuseError("no sum", **PARTS))
    assert text.splitlines() == [
        "no sum",
        "  where: layer 'a.b'",
        "  expected: a sum",
        "  to do: add one",
    ]


@pytest.mark.parametrize("missing", PARTS)
def test_no_part_can_be_left_out(missing):
    with pytest.raises(TypeError, match=missing):
        FuseError("no sum", **{k: v for k, v in PARTS.items() if k != missing})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("again", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_every_kind_survives_copying_and_pickling(kind, again):
    error = again(kind("no sum", **PARTS))
    assert type(error) is kind
    assert str(error) == str(kind("no sum", **PARTS))
    assert (error.met, error.where, error.expected, error.do) == ("no sum", *PARTS.values())


def test_wrong_arguments_are_value_errors_and_false_claims_are_pass_errors():
    assert issubclass(ArgumentError, ValueError)
    assert issubclass(NotEquivalent, PassError)
    assert not issubclass(PassError, ValueError)


def test_every_kind_says_what_it_is_for():
    assert len(KINDS) > 8
    assert all(kind.__doc__ and kind.__doc__.endswith(".") or kind is FuseError for kind in KINDS)
