"""Records of experiments as tables and plots."""

import json

import pytest
import results


def record(seed, after=50.0, digest="x", **more):
    epochs = [{"test": after - 10, "seconds": 1.0}, {"test": after, "seconds": 1.0}]
    rows = [
        {"name": "both", "before": 60.0},
        {"name": "A", "parameters": 1234, "before": 40.0, "after": after, "epochs": epochs},
    ]
    data = {"classes": 10, "size": 8, "train": 9, "test": 9, "source": "drawn", "sha256": digest}
    return {
        "question": "asked",
        "pair": "p",
        "scale": "tiny",
        "seed": seed,
        "rows": rows,
        "data": data,
        "recipes": {"train": {"epochs": 3}, "tune": {"epochs": 2}},
        "versions": {"torch": "1"},
        "hardware": {"processor": "cpu", "accelerator": "none"},
        "processor_seconds": 60.0,
    } | more


def write(folder, *records):
    for one in records:
        name = f"asked-{one['pair']}-{one['scale']}-seed{one['seed']}.json"
        (folder / name).write_text(json.dumps(one))


TABLE = results.starts_beside({10: {"A": (1.5, 2.5)}})


def test_a_table_has_means_over_seeds_and_the_papers_figures(tmp_path):
    write(tmp_path, record(0, 50.0), record(1, 52.0))
    paths = results.render(tmp_path, "asked", "What?", TABLE)
    assert sorted(p.name for p in paths) == ["asked-p-tiny.md", "asked-p-tiny.png"]
    text = (tmp_path / "asked-p-tiny.md").read_text()
    assert "| A | 1,234 | 40.0 ± 0.0 | 51.0 ± 1.0 | 1.5 | 2.5 |" in text
    assert "| both |  | 60.0 ± 0.0 |  |  |  |" in text
    assert "seeds 0, 1" in text
    assert text.startswith("# What?")
    assert (tmp_path / "asked-p-tiny.png").stat().st_size > 5000


def test_pairs_and_scales_get_tables_of_their_own(tmp_path):
    write(tmp_path, record(0), record(0, pair="q"), record(0, scale="small"))
    results.render(tmp_path, "asked", "What?", TABLE)
    names = ["asked-p-small.md", "asked-p-tiny.md", "asked-q-tiny.md"]
    assert sorted(p.name for p in tmp_path.glob("*.md")) == names


def test_a_table_says_where_parents_come_from(tmp_path):
    write(tmp_path, record(0, parents=["a.safetensors", "b.safetensors"]))
    results.render(tmp_path, "asked", "What?", TABLE)
    text = (tmp_path / "asked-p-tiny.md").read_text()
    assert "parents from a.safetensors and b.safetensors, every start for 2 epochs" in text


def test_pairs_that_the_paper_does_not_have_stand_alone(tmp_path):
    write(tmp_path, record(0, pair=results.OWN_PAIRS[0]))
    path = results.render(tmp_path, "asked", "What?", TABLE)[-1]
    assert "| A | 1,234 | 40.0 | 50.0 |\n" in path.read_text()
    assert "paper" not in path.read_text()


OTHER = {
    "images": {"digest": "y"},
    "parents": {"parents": ["a.safetensors", "b.safetensors"]},
    "recipes": {"recipes": {"train": {"epochs": 9}, "tune": {"epochs": 2}}},
}


@pytest.mark.parametrize("what", OTHER)
def test_records_of_another_basis_are_left_out(what, tmp_path):
    write(tmp_path, record(0), record(1, 90.0, **OTHER[what]))
    results.render(tmp_path, "asked", "What?", TABLE)
    text = (tmp_path / "asked-p-tiny.md").read_text()
    assert "seeds 0:" in text
    assert "| A | 1,234 | 40.0 | 50.0 |" in text


def test_records_that_are_none_are_named(tmp_path):
    (tmp_path / "asked-p-tiny-seed0.json").write_text("{")
    with pytest.raises(results.DataError, match="no record"):
        results.render(tmp_path, "asked", "What?", TABLE)


def test_every_question_has_its_script():
    import importlib

    for name in results.QUESTIONS:
        assert importlib.import_module(name).QUESTION.name == name
