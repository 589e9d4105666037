"""The page of operators: it has what torch.nn calls, each with the rule of today."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

DOCS = Path(__file__).parents[2] / "docs"
_spec = importlib.util.spec_from_file_location("fxfuse_docs_operators", DOCS / "operators.py")
page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(page)


def rows():
    lines = [line for line in page.PAGE.read_text().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_each_row_says_what_the_table_of_rules_says():
    for name, rule, callers in rows():
        assert callers and rule in (page.rule_of(name.strip("`"), p) for p in (True, False)), name


@pytest.mark.skipif(
    TorchVersion(torch.__version__) < (2, 14), reason="older versions call a few other operators"
)
def test_what_torch_nn_calls_has_a_row():
    known = {name.strip("`") for name, _, _ in rows()}
    assert set(page.of_torch_nn(range(0, 290, 3))) <= known


def test_an_operator_without_a_rule_has_a_reason():
    bare = [name for name, rule, _ in rows() if rule == "no rule"]
    assert not bare
