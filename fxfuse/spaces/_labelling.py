"""One real run of a traced network, with every ATen operator repeated on unit labels.

The run goes node by node, so that each operator, shape and label is known by its node. It watches
operators below `torch.nn`, where there are the same few dozen however a network is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .._progress import tell
from ..graph.modes import is_choice
from ..graph.state import movable_floats_of
from ..graph.trace import Interpreter, eval_mode, tensors_in, without_autocast
from ._labels import LabelRun, varying
from ._ledger import Ledger
from .operators import mirror

OPEN = "open"  # key of the meta of an output whose units are free; of an input, with their axis


class _MirrorMode(TorchDispatchMode):
    def __init__(self, run: LabelRun) -> None:
        TorchDispatchMode.__init__(self)
        self.run = run

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the default wraps every call, which imports the whole compiler: 2 s, 300 MB

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        first = next((a for a in args if isinstance(a, Tensor)), None)
        before = () if first is None else tuple(first.shape)
        out = func(*args, **(kwargs or {}))
        mirror(self.run, func, args, kwargs or {}, out, before)
        return out


class _NodeInterpreter(Interpreter):
    """Tell the run which node it is in; keep the labels of all values until the end."""

    def __init__(self, module: fx.GraphModule, run: LabelRun) -> None:
        super().__init__(module)
        self.done, self.steps = 0, len(module.graph.nodes)
        self.graph_module, self.labelled = module, run
        self.layers: dict[str, list[Tensor]] = {}
        self.outputs: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        run, shapes = self.labelled, self.labelled.ledger.shapes
        run.node = n.name
        value = super().run_node(n)
        self.done += 1
        tell(self.done / self.steps)
        if n.op == "placeholder" and OPEN in n.meta:
            run.open(value, n.meta[OPEN])
        if n.op == "output" or is_choice(
            self.graph_module, n
        ):  # a choice reads those of both modes
            returned, _ = self.fetch_args_kwargs_from_env(n)
            self.outputs += [layer for t in tensors_in(returned) for layer in run.of(t).layers]
        if n.op != "output" and isinstance(value, Tensor):
            shapes[n.name] = tuple(value.shape)
            self.layers[n.name] = [x for x in run.of(value).layers if len(varying(x)) == 1]
        elif n.op != "output" and tensors_in(value):
            shapes[n.name] = ()
        return value


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Let attention and recurrent layers run as the operators they are made of, not as one."""
    mkldnn: Any = torch.backends.mkldnn  # its switches are descriptors
    fastpath, fused = torch.backends.mha.get_fastpath_enabled(), mkldnn.enabled
    torch.backends.mha.set_fastpath_enabled(False)
    mkldnn.enabled = False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        mkldnn.enabled = fused


def label_network(module: fx.GraphModule, example: tuple[Tensor, ...]) -> Ledger:
    """Run a traced network once in eval mode, on labels too, and return what was written down.

    What the network reads and returns is fixed, unless its graph says otherwise: with `OPEN` in the
    meta of its output node, the units that it returns are free if they lie along one axis; with
    `OPEN` in the meta of a placeholder, so are the units along the axis given there.

    Args:
        module: Traced network; not modified.
        example: Input tensors.
    """
    with without_autocast(), eval_mode(module):
        run = LabelRun(movable_floats_of(module).items())
        with _plain_kernels(), torch.no_grad(), _MirrorMode(run):
            interpreter = _NodeInterpreter(module, run)
            interpreter.run(*example)
    _freeze_outputs(run, module, interpreter.outputs)
    run.freeze_unused()
    for node, layers in interpreter.layers.items():
        run.ledger.outputs[node] = [(varying(x)[0], x.flatten().numpy()) for x in layers]
    return run.ledger


def _freeze_outputs(run: LabelRun, module: fx.GraphModule, outputs: list[Tensor]) -> None:
    """Freeze what a network returns; where it is cut, only units along several axes."""
    if OPEN not in module.graph.output_node().meta:
        run.freeze(outputs, "an output of the network")
    elif len(outputs) > 1 or any(len(varying(layer)) > 1 for layer in outputs):
        run.freeze(outputs, "laid out along several axes where the network is cut")
