import json

import pytest
import torch

from fishmask.data import Examples, encode, rated_words, read_examples, read_table
from fishmask.errors import FishError
from fishmask.hub import load_tokenizer
from tests import tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(str(tiny.model_folder(tmp_path_factory.mktemp("data") / "model")))


def test_csv_honours_quotes_and_tsv_does_not(tmp_path):
    (tmp_path / "a.csv").write_text('text,label\n"one, ""two""",x\n')
    (tmp_path / "a.tsv").write_text('text\tlabel\n"one\tx\n')
    assert read_table(tmp_path / "a.csv") == {"text": ['one, "two"'], "label": ["x"]}
    assert read_table(tmp_path / "a.tsv") == {"text": ['"one'], "label": ["x"]}


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbftext\tlabel\r\nfine\tx\r\n")
    assert read_table(tmp_path / "a.tsv") == {"text": ["fine"], "label": ["x"]}


def test_jsonl_keeps_numbers_as_written(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine", "label": 1}\n\n{"label": 0, "text": "grim"}\n')
    assert read_table(tmp_path / "a.jsonl") == {"text": ["fine", "grim"], "label": ["1", "0"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "text\tlabel\none\n", "row 2 has 1 fields, the header has 2"),
        ("a.csv", "text,label\n", "at least one row"),
        ("a.jsonl", '{"text": 1}\nnonsense\n', "line 2 is not JSON"),
        ("a.jsonl", '{"text": 1}\n{"word": 1}\n', "line 2 has the fields"),
        ("a.jsonl", "[1]\n", "not an object"),
    ],
)
def test_a_damaged_table_is_refused_with_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(FishError, match=message):
        read_table(tmp_path / name)


def test_a_table_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "a.tsv").write_bytes("text\nschön\n".encode("latin-1"))
    with pytest.raises(FishError, match="not UTF-8 at byte 8"):
        read_table(tmp_path / "a.tsv")


def test_an_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.csv, \.tsv, \.jsonl, got \.xlsx"):
        read_table(tmp_path / "a.xlsx")


def test_a_missing_column_lists_those_there_are(tmp_path):
    path = tiny.table(tmp_path / "a.tsv")
    with pytest.raises(ValueError, match="no column 'sentence', 'score'; it has: text, label"):
        read_examples(path, "sentence", "score")


def test_labels_become_sorted_classes_or_numbers(tmp_path):
    (tmp_path / "a.tsv").write_text("t\tname\twhole\trating\nx\tgood\t10\t1.5\ny\tbad\t9\t-2\n")
    names = read_examples(tmp_path / "a.tsv", "t", "name")
    assert (names.targets, names.classes) == ([1, 0], ("bad", "good"))
    assert read_examples(tmp_path / "a.tsv", "t", "whole").classes == ("10", "9")
    ratings = read_examples(tmp_path / "a.tsv", "t", "rating")
    assert (ratings.targets, ratings.classes) == ([1.5, -2.0], ())
    assert read_examples(tmp_path / "a.tsv", "t", "whole", task="regression").targets == [10.0, 9.0]
    assert read_examples(tmp_path / "a.tsv", "t", "rating", task="classification").classes == ("-2", "1.5")


def test_labels_that_do_not_suit_the_task_are_refused(tmp_path):
    (tmp_path / "a.tsv").write_text("t\tname\tsame\tnan\nx\tgood\tz\tnan\ny\tbad\tz\t1.0\n")
    with pytest.raises(ValueError, match="finite number in every row"):
        read_examples(tmp_path / "a.tsv", "t", "name", task="regression")
    with pytest.raises(ValueError, match="finite number"):
        read_examples(tmp_path / "a.tsv", "t", "nan", task="regression")
    with pytest.raises(ValueError, match="at least two classes, found only 'z'"):
        read_examples(tmp_path / "a.tsv", "t", "same")
    with pytest.raises(ValueError, match=r"labels \['good'\] are not among the classes"):
        read_examples(tmp_path / "a.tsv", "t", "name", classes=("bad", "poor"))


def test_no_rated_word_is_in_two_parts():
    parts = {part: rated_words(part) for part in ("train", "validation", "test")}
    words = {part: {word.casefold() for word in examples.texts} for part, examples in parts.items()}
    assert not words["train"] & words["validation"]
    assert not words["train"] & words["test"]
    assert not words["validation"] & words["test"]
    counts = [len(examples) for examples in parts.values()]
    assert sum(counts) > 7500
    assert [round(count / sum(counts), 1) for count in counts] == [0.7, 0.1, 0.2]
    assert all(-4 <= rating <= 4 for examples in parts.values() for rating in examples.targets)


def test_every_epoch_has_every_example_once(tokenizer):
    data = encode(
        Examples(["a day", "fine", "the house is warm"] * 9, targets=[0, 1, 1] * 9, classes=("x", "y")), tokenizer, 16
    )
    for batches in (data.shuffled(4, seed=1), data.in_order(4)):
        assert sorted(row for rows in batches for row in rows) == list(range(27))
        assert [len(rows) for rows in batches].count(4) == 6
    assert data.shuffled(4, seed=1) == data.shuffled(4, seed=1) != data.shuffled(4, seed=2)


def test_a_sample_is_exact_sorted_by_length_and_repeatable(tokenizer):
    data = encode(Examples(["a day", "fine", "the house is warm"] * 9), tokenizer, 16)
    batches = list(data.sample(10, 4, seed=3))
    assert [len(batch["input_ids"]) for batch in batches] == [4, 4, 2]
    lengths = [int(n) for batch in batches for n in batch["attention_mask"].sum(dim=1)]
    assert lengths == sorted(lengths)
    again = list(data.sample(10, 4, seed=3))
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))


def test_a_batch_equals_what_the_tokenizer_itself_pads(tokenizer):
    texts, pairs = ["a day", "fine", "the house is warm"], ["warm", "the river", "cold"]
    data = encode(Examples(texts, pairs, [0.5, 1.0, -1.0]), tokenizer, 16)
    batch = data.batch([2, 0])
    expected = tokenizer([texts[2], texts[0]], [pairs[2], pairs[0]], padding=True, return_tensors="pt")
    assert {name: t.tolist() for name, t in expected.items()} == {
        n: t.tolist() for n, t in batch.items() if n != "labels"
    }
    assert torch.equal(batch["labels"], torch.tensor([-1.0, 0.5]))


def test_full_padding_gives_one_width_and_shuffles_freely(tokenizer):
    texts = ["a day", "fine", "the house is warm", "a " * 30] * 9
    long, wide = (encode(Examples(texts, targets=[0, 1, 1, 0] * 9, classes=("x", "y")), tokenizer, 16, p)
                  for p in ("longest", "max"))  # fmt: skip
    batches = wide.shuffled(4, seed=1)
    assert all(wide.batch(rows)["input_ids"].shape == (4, 16) for rows in batches)
    assert {batch["attention_mask"].shape[1] for batch in wide.sample(36, 4, seed=0)} == {16}
    assert len({long.batch(rows)["input_ids"].shape[1] for rows in long.shuffled(4, seed=1)}) > 1
    # The rows of a batch are drawn whatever their lengths: some of all four lengths come together.
    lengths = [len({wide.lengths[row] for row in rows}) for rows in batches]
    assert max(lengths) >= 3 > max(len({long.lengths[row] for row in rows}) for rows in long.shuffled(4, seed=1))
    assert sorted(row for rows in batches for row in rows) == list(range(36))
    assert batches == wide.shuffled(4, seed=1) != wide.shuffled(4, seed=2)
    # What is padded is padding: nothing else about an example changes.
    narrow, padded = long.batch([0]), wide.batch([0])
    width = narrow["input_ids"].shape[1]
    assert padded["attention_mask"].sum() == width and (padded["input_ids"][0, width:] == tokenizer.pad_token_id).all()
    assert all(torch.equal(padded[name][:, :width], narrow[name]) for name in narrow if name != "labels")


def test_texts_are_cut_off(tokenizer):
    assert encode(Examples(["a day is a day is a day"]), tokenizer, 5).lengths == [5]


def test_json_lines_of_glue_like_pairs(tmp_path):
    rows = [{"one": "a day", "two": "fine", "y": "yes"}, {"one": "warm", "two": "cold", "y": "no"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    examples = read_examples(tmp_path / "a.jsonl", "one", "y", pair="two")
    assert (examples.texts, examples.pairs, examples.targets) == (["a day", "warm"], ["fine", "cold"], [1, 0])
