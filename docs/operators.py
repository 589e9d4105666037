"""The page of operators: every ATen operator that networks call, and what is known of its units.

    python docs/operators.py    # writes docs/operators.md; needs torchvision and timm

Networks of torchvision and timm run on the meta device, without data; modules and functions of
torch.nn run in small random networks, those that the tests draw.
"""

from __future__ import annotations

import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from fxfuse.spaces import operators  # noqa: E402
from tests.support.fuzz import FUNCTIONS, MODULES, Maker  # noqa: E402

PAGE = HERE / "operators.md"
HEAD = """# Operators

Each ATen operator that the networks of torchvision and timm, and the modules and functions of
torch.nn, were seen to call; what it does to units; and who called it. An operator that ATen tags as
pointwise needs no row of its own. Where there is no rule, the units that go in stay in place, and
those that come out are no units: the network is right, and less free.

Written by `python docs/operators.py`. [How units are found](concepts/spaces.md).

| operator | what it does to units | called by |
| --- | --- | --- |
"""
# Why an operator has no rule; the first whose word is in the name.
REASONS = {
    "linalg": "no rule: each number of a factorisation depends on all, in their order",
    "inverse": "no rule: each number of an inverse depends on all, in their order",
    "rand": "no rule: chance, another at each call",
    "bernoulli": "no rule: chance, another at each call",
    "exponential": "no rule: chance, another at each call",
    "normal": "no rule: chance, another at each call",
    "uniform": "no rule: chance, another at each call",
    "conv_tbc": "no rule: a layout that no module of torch.nn has",
    "eye": "no rule: a constant, another number at each place",
    "resize": "no rule: what memory held before is used anew",
    "dropout": "no rule: chance, in training only",
    "backward": "no rule: gradients are not looked at",
    "loss": "no rule: labels are numbers of classes, which stay in place",
    "fractional": "no rule: places are drawn at random",
    "local_scalar": "no rule: a number leaves torch, and what is done with it is not seen",
    "scatter": "no rule: places depend on a mask's order",
    "lstm": "no rule of its own: it is seen as the operators that it is made of",
    "gru": "no rule of its own: it is seen as the operators that it is made of",
}


class Called(TorchDispatchMode):
    """Notes the names of operators, as the table has them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: dict[str, bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            name = func._overloadpacket.__name__
            name = name.rstrip("_") if func._schema.is_mutable else name
            self.names[name] = torch.Tag.pointwise in func.tags
        return func(*args, **(kwargs or {}))


def of_torch_nn(seeds: Iterable[int] = range(3 * len(MODULES + FUNCTIONS))) -> dict[str, bool]:
    """Return what random networks of torch.nn call; each module and function has its seeds."""
    called = Called()
    with called, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed in seeds:
            Maker(seed).network()
    return called.names


def _torchvision() -> Iterator[tuple[nn.Module, torch.Tensor]]:
    from torchvision import models

    shapes = {models: (224, 224), models.segmentation: (64, 64), models.video: (16, 112, 112)}
    for module, shape in shapes.items():
        for name in models.list_models(module=module):
            larger = module is models.video and name.startswith(("mvit", "swin", "s3d"))
            size = (16, 224, 224) if larger else shape
            bare = {"weights_backbone": None} if module is models.segmentation else {}
            yield (
                _built(partial(models.get_model, **bare), name),
                torch.empty(2, 3, *size, device="meta"),
            )


def _built(make: Callable[[str], nn.Module], name: str) -> nn.Module:
    """Build a network without data; one that computes while it is built, with data first."""
    try:
        with torch.device("meta"):
            return make(name)
    except NotImplementedError:
        return make(name).to("meta")


def _timm() -> Iterator[tuple[nn.Module, torch.Tensor]]:
    import timm

    for module in timm.list_modules():
        names = timm.list_models(module=module)
        if names:
            net: Any = _built(timm.create_model, names[0])
            size = net.pretrained_cfg.get("input_size", (3, 224, 224))
            yield net, torch.empty(2, *size, device="meta")


def of_networks(networks: Any) -> tuple[dict[str, bool], int]:
    """Return what networks call that can run without data, and how many these are."""
    called, count = Called(), 0
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for net, x in networks():
            try:
                with called, torch.device("meta"):
                    net.eval()(x)
                count += 1
            except Exception as error:  # some need data to choose their way
                print(f"left out: {type(net).__name__}: {error}"[:120])
    return called.names, count


def rule_of(name: str, pointwise: bool) -> str:
    """Return what an operator does to units, in words."""
    row = operators.OPERATORS.get(name)
    if row is None and pointwise:
        row = operators.OTHER_ELEMENTWISE
    if row is not None and row.rule is not operators.rules.unknown:
        return (row.rule.__doc__ or "").splitlines()[0].rstrip(".")
    return next((why for word, why in REASONS.items() if word in name), "no rule")


def table(called: dict[str, dict[str, bool]]) -> str:
    """Return the page.

    Args:
        called: For each collection, the operators that it calls, and whether they are pointwise.
    """
    callers: dict[str, list[str]] = defaultdict(list)
    pointwise: dict[str, bool] = {}
    for collection, names in called.items():
        for name, points in names.items():
            callers[name].append(collection)
            pointwise[name] = points
    rows = [
        f"| `{name}` | {rule_of(name, pointwise[name])} | {', '.join(callers[name])} |"
        for name in sorted(callers)
    ]
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    torchvision, timm = of_networks(_torchvision), of_networks(_timm)
    PAGE.write_text(
        table({"torch.nn": of_torch_nn(), "torchvision": torchvision[0], "timm": timm[0]})
    )
    print(f"{torchvision[1]} networks of torchvision, {timm[1]} of timm")
