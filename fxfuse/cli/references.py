"""Models and data from the references that the command line takes.

A model is `package.module:factory[?key=value&...][@checkpoint]`, with a checkpoint of safetensors
or of `torch.save`; `hf:PATH`, a folder of transformers; `timm:NAME[?...][@checkpoint]`; or a file
that `fxfuse.save` wrote. Data are `imagefolder:PATH[?size=..&mean=..&std=..]`, `mnist:PATH`,
`text:PATH[?field=..&tokenizer=..&length=..]` (lines, or .jsonl), `npz:PATH`,
`dataset:PATH[?split=..]` or `package.module:factory[?...]`.
"""

from __future__ import annotations

import ast
import importlib
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import parse_qsl

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .._files import sha256_of
from ..errors import DataError, FuseError, ReferenceFormatError
from ..io.checkpoints import load_weights
from ..io.save import load
from .pretrained import HF, TIMM, of_timm, of_transformers, weights_in
from .tables import Row, Table, rows_of_arrays, rows_of_dataset, rows_of_text

_LARGEST = 1 << 28  # numbers in one sample
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def load_model(reference: str) -> nn.Module:
    """Build a model from its reference, in eval mode, with its checkpoint's weights if given.

    A reference that is the path of a `.safetensors` file is a network that fxfuse saved. Nothing is
    downloaded, unless transformers or timm do so by themselves.

    Raises:
        ReferenceFormatError: If the reference cannot be resolved.
        CheckpointError: If the checkpoint cannot be read or does not fit.
    """
    if is_network_file(reference):
        return load(reference).eval()
    if reference.startswith(HF):
        path, options = _split_options(reference.removeprefix(HF), reference)
        return of_transformers(path, options, reference).eval()
    factory, _, checkpoint = reference.partition("@")
    if factory.startswith(TIMM):
        name, options = _split_options(factory.removeprefix(TIMM), reference)
        model: Any = of_timm(name, options, reference)
    else:
        model = _resolved(factory, reference)
    if not isinstance(model, nn.Module):
        raise _unresolved(reference, f"the factory returned a {type(model).__name__}")
    if checkpoint:
        load_weights(model, checkpoint)
    return model.eval()


def is_network_file(reference: str) -> bool:
    """Tell whether a reference of a model is the path of a file that holds a network."""
    return "@" not in reference and reference.endswith(".safetensors")


def load_data(reference: str, batch: int = 50, seed: int = 0, models: Sequence[str] = ()) -> Any:
    """Return calibration data from its reference: batches as `fuse` takes them.

    Samples come in an order drawn with `seed`, but those of a factory.

    Args:
        reference: Of the data.
        batch: Samples of one batch.
        seed: Of the order.
        models: References of the models, whose tokenizer takes texts.

    Raises:
        ReferenceFormatError: If the reference cannot be resolved.
        DataError: If there is nothing to read where it points.
    """
    kind, _, rest = reference.partition(":")
    if kind not in (*_PICTURES, *_TABLES):
        return _resolved(reference, reference)
    path, options = _split_options(rest, reference)
    try:
        if kind in _TABLES:
            rows = _TABLES[kind](path, reference, options)
            dataset: Any = Table(rows, models, reference, **options)
        else:
            dataset = _PICTURES[kind](path, **options)
    except FuseError:
        raise
    except TypeError as error:
        raise _unresolved(reference, str(error)) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"data that cannot be read: {error}",
            where=reference,
            expected="a folder of class folders of images, torchvision's MNIST folder, a file of "
            "lines, of JSON lines or of arrays, or a dataset that save_to_disk wrote",
            do="check the path",
        ) from error
    order = torch.Generator().manual_seed(seed)
    joined = dataset.batch if kind in _TABLES else _collate
    mixed = len(dataset) > 0  # a loader refuses to mix nothing
    return DataLoader(dataset, batch, shuffle=mixed, generator=order, collate_fn=joined)


def load_example(reference: str, samples: int = 2) -> Tensor:
    """Make an input from its shape without the batch axis, such as `3x224x224` or `77:int64`.

    Floating-point inputs are drawn with a fixed seed, others are zero.

    Raises:
        ReferenceFormatError: If it is not a shape, or an implausibly large one.
    """
    sizes, _, kind = reference.partition(":")
    try:
        shape = [int(size) for size in sizes.split("x")]
        dtype = getattr(torch, kind or "float32")
        if min(shape) < 1 or math.prod(shape) > _LARGEST or not isinstance(dtype, torch.dtype):
            raise ValueError(reference)
        if not dtype.is_floating_point:
            return torch.zeros(samples, *shape, dtype=dtype)
        numbers = torch.Generator().manual_seed(0)
        return torch.randn(samples, *shape, generator=numbers).to(dtype)
    except (ValueError, AttributeError, RuntimeError) as error:
        raise ReferenceFormatError(
            f"an input that cannot be made: '{reference}'",
            where="--input",
            expected="sizes with an x between them, and a type if it is not float32",
            do="leave the batch axis out: 3x224x224, or 77:int64 for token numbers",
        ) from error


def file_hashes(references: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of each checkpoint that references of models name, by its path."""
    paths: list[str] = []
    for reference in references:
        if reference.startswith(HF):
            paths += weights_in(reference)
        else:
            whole = is_network_file(reference)
            paths.append(reference if whole else reference.partition("@")[2])
    return {path: sha256_of(path) for path in paths if path}


def _resolved(spec: str, reference: str) -> Any:
    """Return what `package.module:name[?options]` names: the object, or what it makes if called."""
    path, options = _split_options(spec, reference)
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise _unresolved(reference, "it has no 'package.module:factory'")
    if "" not in sys.path:
        sys.path.insert(0, "")  # modules in the current folder, as `python -m` has it
    try:
        target: Any = importlib.import_module(module_name)
        for part in name.split("."):
            target = getattr(target, part)
    except (Exception, SystemExit) as error:  # the module's own code runs here
        raise _unresolved(reference, f"{type(error).__name__}: {error}") from error
    if isinstance(target, nn.Module) or not callable(target):
        if options:
            raise _unresolved(reference, f"{name} takes no options, as it is not a factory")
        return target
    try:
        return target(**options)
    except (Exception, SystemExit) as error:
        raise _unresolved(reference, f"{name} failed: {error}") from error


def _split_options(spec: str, reference: str) -> tuple[str, dict[str, Any]]:
    path, _, query = spec.partition("?")
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
    except ValueError as error:
        raise _unresolved(reference, str(error)) from error
    return path, {key: _literal(value) for key, value in pairs}


def _literal(text: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of backslashes that escape nothing
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return text


def _unresolved(reference: str, reason: str) -> ReferenceFormatError:
    return ReferenceFormatError(
        f"a reference that cannot be resolved: {reason}",
        where=f"'{reference}'",
        expected="package.module:factory[?key=value&...][@checkpoint], for models also a "
        ".safetensors file that fxfuse wrote, hf:PATH or timm:NAME[@checkpoint], and for data "
        "imagefolder:PATH, mnist:PATH, text:PATH, npz:PATH or dataset:PATH",
        do="try the import in Python; quote '?' and '&' in the shell",
    )


def _image_folder(
    path: str, size: int | None = None, mean: Any = _IMAGENET["mean"], std: Any = _IMAGENET["std"]
) -> Any:
    from torchvision import datasets, transforms

    steps = [] if size is None else [transforms.Resize(size), transforms.CenterCrop(size)]
    steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    return datasets.ImageFolder(path, transforms.Compose(steps))


def _mnist(path: str) -> Any:
    from torchvision import datasets, transforms

    steps = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
    return datasets.MNIST(path, train=True, transform=transforms.Compose(steps))


def _collate(samples: list[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    shapes = {tuple(image.shape) for image, _ in samples}
    if len(shapes) > 1:
        raise DataError(
            f"images of different sizes: {sorted(shapes)[:3]}",
            where="the image folder",
            expected="images of one size",
            do="give a size: imagefolder:PATH?size=224",
        )
    images, labels = zip(*samples)
    return torch.stack(images), torch.tensor(labels)


_PICTURES = {"imagefolder": _image_folder, "mnist": _mnist}
_TABLES: dict[str, Callable[[str, str, dict[str, Any]], Sequence[Row]]] = {
    "text": lambda path, reference, options: rows_of_text(path),
    "npz": lambda path, reference, options: rows_of_arrays(path),
    "dataset": lambda path, reference, options: rows_of_dataset(
        path, reference, options.pop("split", None)
    ),
}
