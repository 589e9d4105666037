"""Texts, tables and arrays on disk as batches: lines, rows of JSON, .npz, datasets."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from ..graph.calls import LABELS
from .pretrained import package, tokenizer_for

Row = Mapping[str, Any]
TEXT = "text"  # the field of a line


class Table:
    """Rows, and what makes a batch of some of them: a mapping with tensors.

    Args:
        rows: Each a mapping from the names of fields.
        models: References of the models, whose tokenizer takes texts.
        reference: Of the data.
        field: The field that holds the text; the only one with a text if not given.
        tokenizer: The folder of the tokenizer, if it is not that of the models.
        length: Tokens of a text, at most; as many as the tokenizer says if not given.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        models: Sequence[str],
        reference: str,
        field: str | None = None,
        tokenizer: str | None = None,
        length: int | None = None,
    ) -> None:
        self.rows, self.reference, self.length = rows, reference, length
        self.texts = [k for k, v in rows[0].items() if isinstance(v, str)] if len(rows) else []
        self.field = field or (self.texts[0] if len(self.texts) == 1 else None)
        if self.texts and self.field not in self.texts:
            raise self._wrong(f"texts in the fields {self.texts}", "say which: ?field=NAME")
        self._tokenizer: Callable[..., Mapping[str, Tensor]] | None = None
        if self.texts:
            self._tokenizer = tokenizer_for(models, tokenizer, reference)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return rows as one batch: tokens of the texts, and numbers by their names."""
        tensors: dict[str, Tensor] = {}
        if self._tokenizer is not None:
            options = {"max_length": self.length} if self.length is not None else {}
            texts = [row[str(self.field)] for row in rows]
            made = self._tokenizer(
                texts, padding=True, truncation=True, return_tensors="pt", **options
            )
            tensors.update(made)
        for name in rows[0]:
            if name not in self.texts:
                tensors[name] = self._numbers(name, [row.get(name) for row in rows])
        return dict(sorted(tensors.items(), key=lambda item: LABELS in item[0]))

    def _numbers(self, name: str, values: Sequence[Any]) -> Tensor:
        try:
            return torch.stack([torch.as_tensor(value) for value in values])
        except (TypeError, ValueError, RuntimeError) as error:
            raise self._wrong(
                f"a field '{name}' that is no tensor: {error}", "give it the same size in all rows"
            ) from error

    def _wrong(self, met: str, do: str) -> DataError:
        expected = "rows with one text, or with numbers by the names of the models' arguments"
        return DataError(met, where=f"'{self.reference}'", expected=expected, do=do)


def rows_of_text(path: str) -> list[Row]:
    """Return the lines of a file; of one that ends in .jsonl, what each holds.

    Raises:
        ValueError: If a line is no object of JSON.
        OSError: If the file cannot be read.
    """
    lines = [x for x in Path(path).read_text(encoding="utf-8").splitlines() if x.strip()]
    if not path.endswith(".jsonl"):
        return [{TEXT: line} for line in lines]
    rows = [json.loads(line) for line in lines]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line that is no object of JSON")
    return rows


def rows_of_arrays(path: str) -> list[Row]:
    """Return the rows of the arrays of a .npz file, by their names.

    Raises:
        ValueError: If arrays differ in length, or hold objects.
        OSError: If the file cannot be read.
    """
    with np.load(path, allow_pickle=False) as arrays:
        tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if len({len(t) if t.dim() else 0 for t in tensors.values()}) != 1:
        raise ValueError("arrays of different lengths")
    count = len(next(iter(tensors.values())))
    return [{name: t[i] for name, t in tensors.items()} for i in range(count)]


def rows_of_dataset(path: str, reference: str, split: str | None) -> Sequence[Row]:
    """Return the rows of a dataset that `save_to_disk` wrote.

    Raises:
        ValueError: If it has splits and none is named.
        OSError: If it cannot be read.
    """
    found = package("datasets", reference).load_from_disk(path)
    if isinstance(found, Mapping):
        if split not in found:
            raise ValueError(f"the splits {[*found]}, of which one has to be named: ?split=NAME")
        found = found[split]
    rows: Sequence[Row] = found
    return rows
