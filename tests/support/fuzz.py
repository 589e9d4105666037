"""Random small networks out of all of torch.nn and torch.nn.functional, and random calls of fxfuse.

Everything follows from one seed. A network is a list of steps; each is a module or a function with
random arguments, on values of the steps before it. Steps that torch refuses are mostly left out.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import random
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse

MOST = 4096  # elements of a value

CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList)
CONTAINERS += (nn.ParameterDict, nn.Container, nn.DataParallel)
MODULES = sorted(
    (kind for kind in vars(nn).values() if inspect.isclass(kind) and issubclass(kind, nn.Module)),
    key=lambda kind: kind.__name__,
)
MODULES = [kind for kind in MODULES if kind not in CONTAINERS]
FUNCTIONS = sorted(
    name
    for name, value in vars(F).items()
    if callable(value) and not inspect.isclass(value) and not name.startswith("_")
    and getattr(value, "__module__", None) not in ("typing", "torch.overrides", "warnings")
    and name not in ("boolean_dispatch", "assert_int_or_pair")
)  # fmt: skip
WIRING: list[Callable[..., Any]] = [
    lambda a, b: a + b,
    lambda a, b: a * b,
    lambda a, b: a - 0.5 * b,
    lambda a, b: torch.cat([a, b], -1),
    lambda a, b: torch.cat([a, b], 1),
    lambda a, b: torch.stack([a, b], 1),
    lambda a, b: a @ b.transpose(-1, -2),
    lambda a, b: a.flatten(1),
    lambda a, b: a.mean(-1),
    lambda a, b: a.transpose(1, -1),
    lambda a, b: a.unsqueeze(-1),
    lambda a, b: a[:, 0],
    lambda a, b: a[..., ::2],
    lambda a, b: a.relu_(),
    lambda a, b: a.reshape(a.shape[0], -1),
    lambda a, b: a.amax(-1, keepdim=True),
    lambda a, b: a.softmax(-1),
    lambda a, b: a.chunk(2, -1)[0],
    lambda a, b: torch.where(a > 0, a, b),
    lambda a, b: a.argmax(-1),
    lambda a, b: a.cumsum(-1),
    lambda a, b: a.flip(-1),
    lambda a, b: a.sort(-1)[0],
    lambda a, b: torch.einsum("b...,b...->b...", a, b),
    lambda a, b: a.long(),
]
SHAPES = [(6,), (3, 8, 8), (5, 6), (2, 9), (2, 4, 4, 4), (1,), ()]
WORDS = ["mean", "sum", "none", "zeros", "reflect", "circular", "same", "gelu", "tanh", "nearest"]


class Step(nn.Module):
    """One step: a part, function or wiring, with values and numbers as arguments."""

    def __init__(self, run: Any, args: list[Any], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.part = run if isinstance(run, nn.Module) else None
        self.run, self.args, self.kwargs = None if self.part else run, args, kwargs
        for i, arg in enumerate(args):
            if isinstance(arg, Tensor):
                setattr(self, f"tensor{i}", nn.Parameter(arg) if arg.is_floating_point() else arg)

    def forward(self, values: list[Any]) -> Any:
        args = []
        for i, arg in enumerate(self.args):
            if isinstance(arg, Value):
                args.append(values[arg.index])
            else:
                args.append(getattr(self, f"tensor{i}") if isinstance(arg, Tensor) else arg)
        return (self.part or self.run)(*args, **self.kwargs)


class Value:
    """The place of a value among those of a network."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __repr__(self) -> str:
        return f"v{self.index}"


class Network(nn.Module):
    """A random network; see the module."""

    def __init__(self, steps: list[Step], returned: str, picks: list[int]) -> None:
        super().__init__()
        self.steps, self.returned, self.picks = nn.ModuleList(steps), returned, picks

    def forward(self, x: Any) -> Any:
        values = [x]
        for step in self.steps:
            out = step(values)
            values += [*out] if type(out) is tuple else [out]
        last = values[-1]
        if self.returned == "tuple":
            return last, values[self.picks[0] % len(values)]
        if self.returned == "dict":
            return {"a": last, "b": values[self.picks[1] % len(values)]}
        return last

    def extra_repr(self) -> str:
        lines = []
        for step in self.steps:
            name = getattr(step.run, "__name__", "") if step.part is None else repr(step.part)
            args = [a if not isinstance(a, Tensor) else tuple(a.shape) for a in step.args]
            lines.append(f"{name} {args} {step.kwargs}")
        return "\n".join([*lines, f"returns {self.returned}"])


class Maker:
    """Draws networks, data and arguments."""

    def __init__(self, seed: int) -> None:
        self.seed, self.rng = seed, random.Random(seed)

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def number(self, shape: tuple[int, ...]) -> Any:
        """A number that may fit a value of some shape."""
        sizes = [*shape[1:], *shape[1:], 1, 2, 3, 4]
        return self.rng.choice(sizes)

    def like(self, default: Any, shape: tuple[int, ...]) -> Any:
        """A value of the kind of a default."""
        if isinstance(default, bool):
            return self.chance(0.5)
        if isinstance(default, int) or default is None:
            return self.number(shape)
        if isinstance(default, float):
            return self.rng.choice([0.0, 0.1, 0.5, 1.0])
        return self.rng.choice(WORDS) if isinstance(default, str) else default

    def part(self, kind: type[nn.Module], shape: tuple[int, ...]) -> nn.Module:
        """A module of a kind, for values of some shape."""
        args, kwargs = [], {}
        for name, given in inspect.signature(kind.__init__).parameters.items():
            if name == "self" or given.kind in (given.VAR_POSITIONAL, given.VAR_KEYWORD):
                continue
            if given.default is given.empty:
                if "Module" in str(given.annotation) or name.endswith("layer"):
                    args.append(nn.TransformerEncoderLayer(shape[-1], 1, 8, batch_first=True))
                elif "loat" in str(given.annotation):
                    args.append(self.rng.choice([0.1, 0.5]))
                else:
                    args.append(self.number(shape))
            elif name not in ("device", "dtype") and self.chance(0.15):
                kwargs[name] = self.like(given.default, shape)
        return kind(*args, **kwargs)

    def call(self, name: str, values: list[Any]) -> Step:
        """A function of torch.nn.functional with random arguments."""
        function, tensors = getattr(F, name), [i for i, v in enumerate(values) if is_tensor(v)]
        shape = tuple(values[tensors[-1]].shape) if tensors else (2, 3)
        args: list[Any] = [self.pick(tensors)]
        try:
            given = list(inspect.signature(function).parameters.values())[1:]
        except (TypeError, ValueError):  # a function of C++
            count = self.rng.randrange(3)
            args += [
                self.rng.choice([self.number(shape), self.tensor(shape)]) for _ in range(count)
            ]
            return Step(function, args, {})
        kwargs = {}
        for parameter in given:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if parameter.default is parameter.empty and not kwargs:
                is_number = "Tensor" not in str(parameter.annotation)
                known = self.number(shape) if is_number and self.chance(0.7) else None
                other = self.pick(tensors) if self.chance(0.5) else self.tensor(shape)
                args.append(other if known is None else known)
            elif self.chance(0.2):
                kwargs[parameter.name] = self.like(parameter.default, shape)
        return Step(function, args, kwargs)

    def pick(self, tensors: list[int]) -> Value:
        """A value, mostly the last."""
        return Value(tensors[-1] if self.chance(0.7) else self.rng.choice(tensors))

    def tensor(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor that may fit a value of some shape."""
        sizes = self.rng.choice(
            [shape[1:], shape[-1:], shape[1:2], (self.number(shape),) * 2, shape]
        )
        if self.chance(0.2):
            return torch.randint(0, 3, sizes)
        return torch.randn(sizes) / 2

    def step(self, values: list[Any], focus: Any = None) -> Step:
        """A step on the values so far; the focus is the module or function that it takes."""
        tensors = [i for i, v in enumerate(values) if is_tensor(v)]
        shape = tuple(values[tensors[-1]].shape)
        draw = self.rng.random() if focus is None else 0.6 * isinstance(focus, str)
        if draw < 0.45:
            kind = focus or self.rng.choice(MODULES)
            if focus is None and self.chance(0.6):
                kind = self.rng.choice([nn.Linear, nn.Conv2d, nn.Conv1d, nn.LayerNorm, nn.ReLU])
            if kind in (nn.Linear, nn.LayerNorm):
                sizes = (shape[-1], self.number(shape)) if kind is nn.Linear else (shape[-1],)
                part: nn.Module = kind(*sizes)
            else:
                part = self.part(kind, shape)
            names = list(inspect.signature(part.forward).parameters.values())
            count = max(1, sum(p.default is p.empty and p.kind == 1 for p in names))
            return Step(part, [self.pick(tensors) for _ in range(count)], {})
        if draw < 0.75:
            return self.call(focus or self.rng.choice(FUNCTIONS), values)
        return Step(self.rng.choice(WIRING), [self.pick(tensors), self.pick(tensors)], {})

    def inputs(self, shape: tuple[int, ...], count: int, whole: bool) -> Tensor:
        """A batch of inputs."""
        generator = torch.Generator().manual_seed(self.rng.randrange(1 << 30))
        if whole:
            return torch.randint(0, 3, (count, *shape), generator=generator)
        return torch.randn(count, *shape, generator=generator)

    def network(self) -> tuple[Network, tuple[int, ...], bool]:
        """A network, the shape of a sample, and whether it takes whole numbers."""
        focus: Any = (MODULES + FUNCTIONS)[self.seed % len(MODULES + FUNCTIONS)]
        shape = self.rng.choice(SHAPES[:4] if self.chance(0.8) else SHAPES)
        whole = self.chance(0.1)
        values: list[Any] = [self.inputs(shape, 4, whole)]
        steps: list[Step] = []
        tries, wanted = 0, self.rng.randrange(1, 7)
        while len(steps) < wanted and tries < 80:
            tries += 1
            torch.manual_seed(self.rng.randrange(1 << 30))
            wished, step = focus if self.chance(0.5) else None, None
            try:
                step = self.step(values, wished)
                with torch.no_grad():
                    out = step([v.clone() if is_tensor(v) else v for v in values])
            except Exception:
                if step is None or not self.chance(0.005):
                    continue
                steps.append(step)
                break
            new = [*out] if type(out) is tuple else [out]
            small = all(v.numel() <= MOST for v in new if is_tensor(v))
            if small and any(is_tensor(v) for v in new):
                steps.append(step)
                values += new
                focus = None if wished is not None else focus
        returned = self.rng.choice(["last"] * 6 + ["tuple", "dict"])
        net = Network(steps, returned, [self.rng.randrange(9), self.rng.randrange(9)])
        return net.train(self.chance(0.2)), shape, whole

    def data(self, shape: tuple[int, ...], whole: bool) -> Any:
        """Calibration data, mostly good."""
        count = self.rng.choice([1, 2, 8, 16, 16, 16])
        x = self.inputs(shape, count, whole)
        if self.chance(0.75):
            return x
        return self.rng.choice(
            [
                lambda: [x, x],
                lambda: [(x, torch.zeros(count))],
                lambda: [{"x": x}],
                lambda: (b for b in [x, x]),
                lambda: [],
                lambda: iter([]),
                lambda: {"x": x},
                lambda: (x, x),
                lambda: [((x, x), 0)],
                lambda: torch.zeros(0, *shape),
                lambda: x * float("nan"),
                lambda: x[..., :-1] if shape else x,
                lambda: x[:, None],
                lambda: x.long(),
                lambda: x.double(),
                lambda: x.half(),
                lambda: x > 0,
                lambda: x.to(torch.complex64),
                lambda: x.numpy(),
                lambda: [x.numpy()],
                lambda: [x, x[..., :-1]] if shape else [x, None],
                lambda: [x, None],
                lambda: [[]],
                lambda: [x[0]],
                lambda: broken(x),
                lambda: x.to("meta"),
                lambda: x.to_sparse(),
                lambda: x.requires_grad_() if not whole else x,
                lambda: torch.tensor(3.0),
                lambda: torch.ones_like(x),
            ]
        )()

    def garbage(self) -> Any:
        """What is no argument."""
        return self.rng.choice(
            [
                *(None, 0, 3, -1, 0.5, float("nan"), float("inf"), 10**9, True, "x", "auto", b"x"),
                *([], {}, (), [None], ["a"], {"a": 1}, [1, 2], [0.5, 0.5], [1.0, float("nan")]),
                *(object(), len, nn.Linear, nn.Linear(2, 2), torch.zeros(0), torch.tensor(1.0)),
                *(np.zeros(3), np.float32(2), range(2), "0", slice(None), torch.float32, 1j),
            ]
        )


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def broken(x: Tensor) -> Any:
    """Yield a batch, and fail."""
    yield x
    raise KeyError("a sample that is not there")


def quiet() -> None:
    warnings.simplefilter("ignore")


# --- calls of the library -------------------------------------------------------------------------


class Calls:
    """Random calls of every public function on one random network.

    Args:
        seed: Of everything.
        folder: Where files may be written.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self.make, self.folder = Maker(seed), folder
        self.net, self.shape, self.whole = self.make.network()
        self.good = self.make.inputs(self.shape, 8, self.whole)
        self.values: dict[str, list[Callable[[], Any]]] = {
            "models": [self.models],
            "data": [lambda: self.make.data(self.shape, self.whole)],
            "example": [lambda: self.good[:2], lambda: self.make.data(self.shape, self.whole)],
            "labelled": [lambda: (self.good, torch.zeros(8).long()), lambda: [(self.good, 1)]],
            "alignment": [lambda: None, lambda: fxfuse.align([self.net, self.net], self.good)],
            "weights": [lambda: None, lambda: "auto", lambda: [0.3, 0.7], lambda: [0, 1]],
            "width": [lambda: 1.0, lambda: 1.5, lambda: float("inf")],
            "anchor": [lambda: None, lambda: 0, lambda: 1],
            "method": [lambda: None, lambda: self.make.rng.choice(sorted(fxfuse.presets.NAMED))],
            "heads": [lambda: None, fxfuse.heads.Separate, lambda: self.union()],
            "pairs": [lambda: (), lambda: [None], lambda: [[("a", "b")]]],
            "network": [lambda: fxfuse.permute(self.net, self.good)],
            "result": [lambda: fxfuse.fuse([self.net, self.net], self.good)],
            "path": [lambda: str(folder / f"file.{self.make.rng.choice(['png', 'svg', 'json'])}")],
            "loss": [lambda: F.cross_entropy],
            "progress": [lambda: None],
            "factor": [lambda: 2.0, lambda: 1.3],
            "share": [lambda: 0.5, lambda: 0.1],
            "seed": [lambda: 0, lambda: None],
            "noise": [lambda: 0.0, lambda: 0.1],
            "tolerance": [lambda: 1e-4],
            "level": [lambda: 2],
        }
        for name in ("model", "module", "source", "target", "like", "before", "after"):
            self.values[name] = [lambda: self.net, self.other]

    def other(self) -> Any:
        """Another network of the same inputs, or any other one."""
        draw = self.make.rng.random()
        if draw < 0.4:
            return copy.deepcopy(self.net)
        if draw < 0.7:
            again = copy.deepcopy(self.net)
            with torch.no_grad():
                for t in [*again.parameters(), *again.buffers()]:
                    if t.is_floating_point():
                        t.mul_(0.9)
            return again
        if draw < 0.9:
            deeper = copy.deepcopy(self.net)
            deeper.steps.append(Step(nn.ReLU(), [Value(len(deeper.steps))], {}))
            return deeper
        return self.make.network()[0]

    def models(self) -> list[Any]:
        """Networks to fuse."""
        return [self.net, *(self.other() for _ in range(self.make.rng.choice([0, 1, 1, 1, 2])))]

    def union(self) -> Any:
        """Heads with labels."""
        labels = [list(range(self.make.rng.randrange(1, 9))) for _ in range(2)]
        return fxfuse.heads.Union(labels=labels)

    def arguments(self, function: Callable[..., Any], wrong: float = 0.04) -> dict[str, Any]:
        """Arguments of a function, most of them right."""
        arguments = {}
        for name, given in inspect.signature(function).parameters.items():
            if name == "self" or given.kind in (given.VAR_POSITIONAL, given.VAR_KEYWORD):
                continue
            if given.default is not given.empty and not self.make.chance(0.3):
                continue
            choices = self.values.get(name, [self.make.garbage])
            wrong_here = wrong * (name != "progress")  # what a callback raises is the caller's
            choice = self.make.rng.choice(choices)
            choice = self.make.garbage if self.make.chance(wrong_here) else choice
            arguments[name] = choice()
        return arguments

    def again(self, result: Any) -> list[Callable[[], Any]]:
        """What can be done with what a function returned."""
        uses: list[Callable[[], Any]] = [lambda: pickle.loads(pickle.dumps(result))]
        uses += [lambda: copy.deepcopy(result), lambda: str(result), lambda: repr(result)]
        if isinstance(result, torch.fx.GraphModule):
            uses += [lambda: fxfuse.load(self.saved(result))]
            report = result.meta.get("fxfuse")
            return uses if report is None else uses + self.again(report)
        for name in (
            "to_json",
            "to_networkx",
            "draw",
            "save",
            "save_html",
            "summary",
            "_repr_html_",
        ):
            method = getattr(result, name, None)
            if callable(method):
                uses.append(lambda method=method: method(**self.arguments(method)))
        return uses

    def call(self, function: Callable[..., Any]) -> Any:
        """What a function gives for random arguments."""
        return function(**self.arguments(function))

    def saved(self, network: Any) -> str:
        path = str(self.folder / "net.safetensors")
        fxfuse.save(network, path)
        return path


def public() -> dict[str, Callable[..., Any]]:
    """Every public function, by name."""
    functions = {name: getattr(fxfuse, name) for name in fxfuse.__all__}
    functions |= {f"presets.{name}": preset for name, preset in fxfuse.presets.NAMED.items()}
    return {
        name: value
        for name, value in functions.items()
        if callable(value) and not inspect.isclass(value) and name != "debug"
    } | {"Alignment.load": fxfuse.Alignment.load, "Alignment.from_json": fxfuse.Alignment.from_json}


def violations(seed: int, folder: Path, calls: int = 3) -> list[tuple[str, Exception]]:
    """Return what calls on a random network raise that is no error of the library's family."""
    found: list[tuple[str, Exception]] = []

    def tried(name: str, run: Callable[[], Any]) -> Any:
        try:
            return run()
        except fxfuse.FuseError:
            return None
        except Exception as error:
            found.append((name, error))
            return None

    random_calls = Calls(seed, folder)
    rng = random_calls.make.rng
    functions = public()
    for name in rng.sample(sorted(functions), calls):
        arguments = None
        try:
            arguments = random_calls.arguments(functions[name])
        except fxfuse.FuseError:
            continue
        except Exception as error:
            found.append((f"arguments of {name}", error))
            continue
        result = tried(name, partial(functions[name], **arguments))
        if result is not None:
            uses = random_calls.again(result)
            for use in rng.sample(uses, min(2, len(uses))):
                tried(f"a use of what {name} returned", use)
    return found
