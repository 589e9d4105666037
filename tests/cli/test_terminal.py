"""What a terminal shows, and what a pipe receives."""

import io

import pytest
import torch
from rich.console import Console

import fxfuse
from fxfuse.cli.terminal import show_alignment, show_inspection, stages
from tests.support.nets import mlp, residual


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)


def shown(where):
    return where.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_stages_are_shown_on_a_terminal_only(terminal):
    where = console(terminal)
    with stages(where) as report:
        report("trace", 0.0)
        report("refit", 0.5)
        report("refit", 1.0)
    assert ("trace" in shown(where) and "refit" in shown(where)) == terminal
    assert terminal or not shown(where)


def test_a_stage_that_is_left_counts_as_done():
    where = console(True)
    with stages(where) as report:
        report("trace", 0.0)
        report("refit", 0.2)
    last = shown(where).rsplit("trace", 1)[1]
    assert last.count("━" * 40) == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_tables_fit_into_80_columns_and_keep_brackets(terminal):
    net = residual((6, 2), (8, 2))
    inspection = fxfuse.inspect(net, torch.randn(2, 3, 16, 16))
    where = console(terminal)
    show_inspection(where, inspection)
    text = shown(where)
    assert all(len(line) <= 80 for line in text.splitlines())
    squeezed = "".join(c for c in text if c.isalnum() or c in "[].")
    for layer in inspection.layers:
        assert layer.name in squeezed and layer.kind.split()[-1] in squeezed
    assert all(space.name in squeezed for space in inspection.spaces)
    assert f"{inspection.frozen[0].tensor}[{inspection.frozen[0].dim}]" in squeezed


@pytest.mark.parametrize("terminal", [True, False])
def test_an_alignment_names_both_networks_layers(terminal):
    nets = [mlp(6, 8, 7, 5, 3), mlp(6, 6, 4, 3)]
    alignment = fxfuse.align(nets, torch.randn(40, 6))
    where = console(terminal)
    show_alignment(where, alignment)
    assert "+" in shown(where) and f"{alignment.segments[0].cost_of(1, 0):.4f}" in shown(where)
    if not terminal:
        assert shown(where) == f"{alignment}\n"
