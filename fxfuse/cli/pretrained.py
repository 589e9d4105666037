"""Models of transformers and timm, and the tokenizer that belongs to a model; both are optional."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import FuseError, ReferenceFormatError

HF, TIMM = "hf:", "timm:"


def package(name: str, reference: str) -> Any:
    """Return an optional package, or refuse the reference that asks for it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ReferenceFormatError(
            f"a reference that needs the package {name}, which is not there: {error}",
            where=f"'{reference}'",
            expected="an environment that has it",
            do=f"pip install {name}",
        ) from error


def of_transformers(path: str, options: dict[str, Any], reference: str) -> nn.Module:
    """Return a model that `save_pretrained` wrote, of the class that its configuration names.

    Args:
        path: The folder.
        options: Of `from_pretrained`; `class` names another class of transformers.
        reference: For errors.

    Raises:
        ReferenceFormatError: If there is no such model.
    """
    library = package("transformers", reference)
    try:
        config = library.AutoConfig.from_pretrained(path)
        named = options.pop("class", None) or next(iter(config.architectures or ()), "AutoModel")
        model: nn.Module = getattr(library, named).from_pretrained(path, **options)
    except Exception as error:  # the library has errors of many kinds
        raise _unloadable(error, reference, "a folder that save_pretrained wrote") from error
    return model


def of_timm(name: str, options: dict[str, Any], reference: str) -> nn.Module:
    """Return a model of timm by its name; its weights are random unless `pretrained` is an option.

    Raises:
        ReferenceFormatError: If there is no such model.
    """
    library = package("timm", reference)
    try:
        model: nn.Module = library.create_model(name, **options)
    except Exception as error:
        raise _unloadable(error, reference, "the name of a model, as timm.list_models()") from error
    return model


def tokenizer_for(references: Sequence[str], given: str | None, data: str) -> Any:
    """Return the tokenizer of the models of some references, which have to agree.

    Args:
        references: Of the models.
        given: The folder of a tokenizer, if the data name one.
        data: The reference of the data, for errors.

    Raises:
        ReferenceFormatError: If there is none, or the models have tokenizers that differ.
    """
    library = package("transformers", data)
    paths = [given] if given else [folder_of(r) for r in references if r.startswith(HF)]
    if not paths:
        raise _no_tokenizer("texts without a tokenizer", data)
    try:
        tokenizers = [library.AutoTokenizer.from_pretrained(path) for path in paths]
    except Exception as error:
        raise _unloadable(error, data, "a folder with a tokenizer beside the model") from error
    if any(t.get_vocab() != tokenizers[0].get_vocab() for t in tokenizers):
        raise _no_tokenizer(f"tokenizers that differ: {', '.join(map(str, paths))}", data)
    if tokenizers[0].pad_token is None:
        tokenizers[0].pad_token = tokenizers[0].eos_token
    return tokenizers[0]


def folder_of(reference: str) -> str:
    """Return the folder that a reference `hf:PATH[?options]` names."""
    return reference.removeprefix(HF).partition("?")[0]


def weights_in(reference: str) -> list[str]:
    """Return the files of weights in the folder of a reference `hf:PATH`."""
    return sorted(map(str, Path(folder_of(reference)).glob("*.safetensors")))


def _no_tokenizer(met: str, data: str) -> ReferenceFormatError:
    return ReferenceFormatError(
        met,
        where=f"'{data}'",
        expected="one tokenizer, that of the models hf:PATH",
        do="name its folder: text:PATH?tokenizer=FOLDER",
    )


def _unloadable(error: Exception, reference: str, expected: str) -> FuseError:
    said = str(error).strip().split("\n")[0][:200]
    return ReferenceFormatError(
        f"what cannot be loaded: {type(error).__name__}: {said}",
        where=f"'{reference}'",
        expected=expected,
        do="load it in Python, and mend what fails there",
    )
