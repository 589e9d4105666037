"""Models of transformers and timm by reference: saved, loaded, fused, loaded into the class."""

import copy

import pytest
import torch

import fxfuse
from fxfuse.cli.commands import app
from fxfuse.cli.references import file_hashes, load_model
from fxfuse.errors import ReferenceFormatError
from fxfuse.width import evenly
from tests.support.tolerances import FUNCTION


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return folders of two models of transformers, the first with a tokenizer, and of lines."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("hf")
    words = ["<pad>", *(f"w{i}" for i in range(20))]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")
    for name, seed in (("a", 0), ("b", 1)):
        torch.manual_seed(seed)
        sizes = {"vocab_size": 21, "hidden_size": 16, "intermediate_size": 16, "num_labels": 3}
        config = transformers.BertConfig(
            num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16, **sizes
        )
        transformers.BertForSequenceClassification(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    lines = [" ".join(f"w{(i * j) % 20}" for j in range(1, 2 + i % 6)) for i in range(40)]
    (folder / "lines.txt").write_text("\n".join(lines))
    return folder


def test_a_folder_of_transformers_is_a_model_of_the_class_in_its_configuration(folders):
    model = load_model(f"hf:{folders}/a")
    assert type(model).__name__ == "BertForSequenceClassification" and not model.training
    body = load_model(f"hf:{folders}/a?class=BertModel")
    assert torch.equal(body.embeddings.word_embeddings.weight, model.get_input_embeddings().weight)
    assert [*file_hashes([f"hf:{folders}/a"])] == [f"{folders}/a/model.safetensors"]


@pytest.mark.sweep
def test_models_are_fused_on_lines_and_their_class_loads_the_result(folders, tmp_path):
    a, b = f"hf:{folders}/a", f"hf:{folders}/b"
    args = [
        "fuse",
        a,
        b,
        "--data",
        f"text:{folders}/lines.txt",
        "--output",
        str(tmp_path / "f.safetensors"),
    ]
    with pytest.raises(SystemExit) as ended:
        app(args)
    assert not ended.value.code
    fused, model = fxfuse.load(tmp_path / "f.safetensors"), load_model(a)
    model.load_state_dict(fused.state_dict())
    ids = torch.randint(1, 21, (4, 7))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        assert torch.allclose(fused(**given)["logits"], model(**given).logits, atol=FUNCTION)
        model.save_pretrained(tmp_path / "again")
        again = load_model(f"hf:{tmp_path}/again")
        assert torch.equal(again(**given).logits, model(**given).logits)


@pytest.mark.sweep
def test_the_class_is_built_with_the_numbers_that_the_report_gives(folders):
    kind = "?class=BertForTokenClassification"  # the others' pooler widens without a number
    nets = [load_model(f"hf:{folders}/{name}{kind}") for name in "ab"]
    ids = torch.randint(1, 21, (40, 7))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    method = fxfuse.Method(room=evenly)
    wide = fxfuse.fuse(nets, given, width=1.5, method=method)
    changes = wide.meta["fxfuse"].configuration
    assert set(changes) == {"intermediate_size"}
    config = copy.deepcopy(nets[0].config)
    config.intermediate_size = changes["intermediate_size"][1]
    model = type(nets[0])(config).eval()
    model.load_state_dict(wide.state_dict())
    with torch.no_grad():
        assert torch.allclose(wide(**given).logits, model(**given).logits, atol=FUNCTION)


def test_models_of_timm_are_built_by_name():
    pytest.importorskip("timm")
    model = load_model("timm:resnet10t?num_classes=4")
    assert type(model).__module__.startswith("timm.") and not model.training


MISSING = ["hf:/no/such/folder", "hf:{0}/a?class=NoSuchClass", "timm:no_such_net"]


@pytest.mark.parametrize("reference", MISSING)
def test_models_that_are_not_there_are_refused(folders, reference):
    if reference.startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises(ReferenceFormatError, match="cannot be loaded"):
        load_model(reference.format(folders))
