"""One real run of a traced network with every ATen operator mirrored on unit labels.

The run goes node by node, so each operator, shape and label is known by the fx node it belongs to.
Working below `torch.nn`, it sees the same few dozen operators however a network is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from .labels import LabelRun, Ledger, TensorAxis, varying
from .modes import is_choice
from .operators import mirror
from .progress import Tick, counted, silent
from .tracing import Interpreter, plain_modes, tensors_in

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
    """Name the running node, and keep what is known of its value for after the run."""

    def __init__(self, module: fx.GraphModule, run: LabelRun, tick: Tick) -> None:
        super().__init__(module)
        self.steps = counted(range(len(module.graph.nodes)), tick)
        self.graph_module, self.labelled = module, run
        self.layers: dict[str, list[Tensor]] = {}
        self.outputs: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        run, shapes = self.labelled, self.labelled.book.shapes
        run.node = n.name
        next(self.steps)
        value = super().run_node(n)
        if n.op == "placeholder" and OPEN in n.meta:
            run.open(value, n.meta[OPEN])
        if n.op == "output" or is_choice(self.graph_module, n):  # given the outputs of both modes
            given, _ = self.fetch_args_kwargs_from_env(n)
            self.outputs += [layer for t in tensors_in(given) for layer in run.of(t).layers]
        if n.op != "output" and isinstance(value, Tensor):
            shapes[n.name] = tuple(value.shape)
            self.layers[n.name] = [x for x in run.of(value).layers if len(varying(x)) == 1]
        elif n.op != "output" and tensors_in(value):
            shapes[n.name] = ()
        return value


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Take the forms of attention and recurrent layers that show what they are made of."""
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


def label_network(
    module: fx.GraphModule, example: tuple[Tensor, ...], tick: Tick = silent
) -> Ledger:
    """Run a traced network once, in eval mode, on labels and return the ledger.

    The fused attention kernels hide their structure, so the run takes their plain forms. What the
    network reads and returns is fixed, unless its graph says otherwise: the units of an output node
    with `OPEN` in its meta are free, if they lie along one axis, and those of a placeholder with it
    along the axis it gives.

    Args:
        module: Traced network; not modified, its modes are restored.
        example: Input tensors.
        tick: Called with the share of the nodes that is done.
    """
    modes = {m: m.training for m in module.modules()}
    with plain_modes():
        run = LabelRun([*module.named_parameters(), *module.named_buffers()])
    module.eval()
    try:
        with plain_modes(), _plain_kernels(), torch.no_grad(), _MirrorMode(run):
            interpreter = _NodeInterpreter(module, run, tick)
            interpreter.run(*example)
    finally:
        for m, mode in modes.items():
            m.training = mode
    _freeze_outputs(run, module, interpreter.outputs)
    run.freeze_unused()
    for node, layers in interpreter.layers.items():
        axes = [TensorAxis(node, varying(x)[0], x.flatten().numpy()) for x in layers]
        run.book.features[node] = axes
    return run.book


def _freeze_outputs(run: LabelRun, module: fx.GraphModule, outputs: list[Tensor]) -> None:
    """Freeze what a network returns; where it is cut, only units that are no single axis."""
    if OPEN not in module.graph.output_node().meta:
        run.freeze(outputs, "an output of the network")
    elif len(outputs) > 1 or any(len(varying(layer)) > 1 for layer in outputs):
        run.freeze(outputs, "laid out along several axes where the network is cut")
