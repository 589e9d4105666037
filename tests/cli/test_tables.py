"""Texts, rows and arrays on disk become batches by name, labels last."""

import json

import numpy as np
import pytest
import torch

from fxfuse.cli.references import load_data
from fxfuse.errors import DataError, ReferenceFormatError


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Return the folder of a tokenizer that knows the words one to nine."""
    pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tokens")
    words = ["<pad>", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>").save_pretrained(folder)
    return folder


def test_lines_are_tokenized_and_padded(tmp_path, tokens):
    (tmp_path / "a.txt").write_text("one two three\n\nfour\nfive six\n")
    (batch,) = load_data(f"text:{tmp_path}/a.txt?tokenizer={tokens}")
    order = batch["input_ids"][:, 0].argsort()
    assert batch["input_ids"][order].tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert batch["attention_mask"][order].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    (short,) = load_data(f"text:{tmp_path}/a.txt", models=[f"hf:{tokens}"])
    assert short["input_ids"].shape == (3, 3)
    (short,) = load_data(f"text:{tmp_path}/a.txt?length=2", models=[f"hf:{tokens}"])
    assert short["input_ids"].shape == (3, 2)


def test_rows_of_json_have_a_text_and_numbers_by_name(tmp_path, tokens):
    rows = [{"label": i, "title": "nine", "body": "one two"} for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (batch,) = load_data(f"text:{tmp_path}/a.jsonl?field=body&tokenizer={tokens}")
    assert batch["input_ids"].tolist() == [[1, 2]] * 3
    assert sorted(batch["label"].tolist()) == [0, 1, 2]
    assert [*batch][-1] == "label"
    with pytest.raises(DataError, match="texts in the fields"):
        load_data(f"text:{tmp_path}/a.jsonl?tokenizer={tokens}")


def test_arrays_are_read_by_name(tmp_path):
    x, y = np.random.rand(120, 4).astype(np.float32), np.arange(120)
    np.savez(tmp_path / "a.npz", labels=y, x=x)
    batches = list(load_data(f"npz:{tmp_path}/a.npz", seed=3))
    assert [len(b["x"]) for b in batches] == [50, 50, 20] and [*batches[0]] == ["x", "labels"]
    found, order = (torch.cat([b[name] for b in batches]) for name in ("x", "labels"))
    assert torch.equal(found, torch.from_numpy(x)[order])
    assert sorted(order.tolist()) == y.tolist() != order.tolist()


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("none.txt", None, "cannot be read"),
        ("a.jsonl", "[1]", "no object of JSON"),
        ("b.jsonl", "no json", "cannot be read"),
        ("c.jsonl", '{"x": [1]}\n{"x": [1, 2]}', "no tensor"),
        ("d.jsonl", '{"x": [1]}\n{"y": [1]}', "no tensor"),
    ],
)
def test_files_that_are_no_rows_are_refused(tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=told):
        list(load_data(f"text:{tmp_path}/{name}"))


def test_arrays_of_different_lengths_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros(3), y=np.zeros(4))
    with pytest.raises(DataError, match="different lengths"):
        load_data(f"npz:{tmp_path}/a.npz")


def test_texts_ask_for_a_tokenizer(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "a.txt").write_text("one")
    for ending in ("", f"?tokenizer={tmp_path}"):
        with pytest.raises(ReferenceFormatError, match="tokenizer"):
            load_data(f"text:{tmp_path}/a.txt{ending}")


def test_datasets_on_disk_are_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"x": [[1.0, 2.0], [3.0, 4.0]], "label": [0, 1]})
    datasets.DatasetDict({"train": made}).save_to_disk(str(tmp_path))
    (batch,) = load_data(f"dataset:{tmp_path}?split=train")
    assert sorted(batch["x"].tolist()) == [[1, 2], [3, 4]]
    with pytest.raises(DataError, match="split"):
        load_data(f"dataset:{tmp_path}")
