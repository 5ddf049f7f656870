"""The nine tasks in the layout of GLUE's own files and of the hub, with small tables."""

import builtins
import sys
from pathlib import Path

import pytest

from fishmask.data import Examples
from fishmask.errors import FishError
from fishmask.glue import TASKS, glue_task, hold_out, read_diagnostic, read_glue, take, task_score, tasks_in

SHARED = Path(__file__).parents[2] / "shared" / "data" / "glue"

# Header and first rows as published, columns that are not read shortened. CoLA's train and dev have no header.
MNLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"
MNLI_ROW = ["63735", "63735n", "slate", "( ( a ) )", "( ( b ) )", "(ROOT (S))", "(ROOT (NP))"]
MNLI_LABELS = [f"label{n}" for n in range(1, 6)]
STSB = "index genre filename year old_index source1 source2 sentence1 sentence2"
STSB_ROW = ["main-captions", "MSRvid", "2012test", "0001", "none", "none"]
TABLES: dict[str, list[str]] = {
    "CoLA/train": ["gj04\t1\t\tOur friends won't buy this analysis.", "gj04\t0\t*\tThey drank the pub."],
    "CoLA/dev": ["gj04\t1\t\tThe sailors rode the breeze clear of the rocks."],
    "CoLA/test": ["index\tsentence", '0\tBill whistled "past the house.', "1\tThe car honked."],
    "SST-2/train": ["sentence\tlabel", "hide new secretions from the parental units \t0", 'the "best film \t1'],
    "SST-2/dev": ["sentence\tlabel", "it 's a charming journey . \t1"],
    "SST-2/test": ["index\tsentence", "0\tuneasy mishmash of styles and genres .", "1\ta b"],
    "MRPC/train": [
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        '1\t702876\t702977\tAmrozi accused "the witness".\t"the witness", Amrozi said.',
        '0\t2108705\t2108831\tYucaipa owned it.\t"Yucaipa bought it.',
    ],
    "MRPC/dev": ["\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String", "1\t1355540\t1355592\tHe said.\tShe said."],
    "MRPC/test": ["index\t#1 ID\t#2 ID\t#1 String\t#2 String", "0\t1089874\t1089925\tPCCW's Jane\tCurrent Jane"],
    "STS-B/train": [
        "\t".join([*STSB.split(), "score"]),
        "\t".join(["0", *STSB_ROW, "A plane is taking off.", 'An air "plane is.', "5.000"]),
        "\t".join(["1", *STSB_ROW, "A man is playing a flute.", "A man is playing.", "3.8"]),
    ],
    "STS-B/dev": ["\t".join([*STSB.split(), "score"]), "\t".join(["0", *STSB_ROW, "A hard hat.", "A hat.", "0"])],
    "STS-B/test": ["\t".join(STSB.split()), "\t".join(["0", *STSB_ROW, "A girl is styling.", "A girl is brushing."])],
    "QQP/train": [
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "133273\t213221\t213222\tHow is life?\tWhat's life?\t0",
        '227767\t336684\t336685\t"Is the book the best ever?',  # one row, cut in two as in the published file
        '"\tWas he a real historical figure?\t0',
        "402555\t536040\t536041\tHow do I learn?\t\t1",
    ],
    "QQP/dev": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "201359\t303345\t303346\tWhy?\tHow?\t1"],
    "QQP/test": ["id\tquestion1\tquestion2", "0\tWould the idea work?\tShould I?", "1\tWho?\tWhom?"],
    "MNLI/train": [
        "\t".join([*MNLI.split(), "sentence1", "sentence2", "label1", "gold_label"]),
        "\t".join(["0", "31193", *MNLI_ROW[1:], "Conceptually cream.", "Product.", "neutral", "neutral"]),
        "\t".join(["1", "31193", *MNLI_ROW[1:], "you know", "You lose.", "entailment", "entailment"]),
        "\t".join(["2", "31193", *MNLI_ROW[1:], "One of ours.", "No member.", "neutral", "contradiction"]),
    ],
    "MNLI/dev_matched": [
        "\t".join([*MNLI.split(), "sentence1", "sentence2", *MNLI_LABELS, "gold_label"]),
        "\t".join(["0", *MNLI_ROW, "The new rights.", "Everyone.", *["neutral"] * 5, "entailment"]),
    ],
    "MNLI/dev_mismatched": [
        "\t".join([*MNLI.split(), "sentence1", "sentence2", *MNLI_LABELS, "gold_label"]),
        "\t".join(["0", *MNLI_ROW, "Your bill.", "The bill.", *["neutral"] * 5, "contradiction"]),
        "\t".join(["1", *MNLI_ROW, "A letter.", "Letters.", *["neutral"] * 5, "neutral"]),
    ],
    "MNLI/test_matched": [
        "\t".join([*MNLI.split(), "sentence1", "sentence2"]),
        "\t".join(["0", *MNLI_ROW, "Hierbas.", "Hierbas is a name."]),
    ],
    "MNLI/test_mismatched": [
        "\t".join([*MNLI.split(), "sentence1", "sentence2"]),
        "\t".join(["0", *MNLI_ROW, "What have you.", "Nothing."]),
    ],
    "QNLI/train": [
        "index\tquestion\tsentence\tlabel",
        "0\tWhen did it appear?\tDigimon appeared.\tnot_entailment",
        "1\tWhich?\tWhen MANPADS is used.\tentailment",
    ],
    "QNLI/dev": ["index\tquestion\tsentence\tlabel", "0\tWhat came?\tAs of that day.\tentailment"],
    "QNLI/test": ["index\tquestion\tsentence", "0\tWhat seldom?\tIt uses steam.", "1\tWho?\tHe."],
    "RTE/train": [
        "index\tsentence1\tsentence2\tlabel",
        "0\tNo weapons.\tWeapons.\tnot_entailment",
        "1\ta\tb\tentailment",
    ],
    "RTE/dev": ["index\tsentence1\tsentence2\tlabel", "0\tDana Reeve.\tAn accident.\tnot_entailment"],
    "RTE/test": ["index\tsentence1\tsentence2", "0\tMangla was summoned.\tMangla died.", "1\tc\td", "2\te\tf"],
    "WNLI/train": ["index\tsentence1\tsentence2\tlabel", "0\tI stuck a pin.\tThe carrot had a hole.\t1", "1\ta\tb\t0"],
    "WNLI/dev": ["index\tsentence1\tsentence2\tlabel", "0\tThe drain is clogged.\tThe hair is.\t0"],
    "WNLI/test": ["index\tsentence1\tsentence2", "0\tMaude and Dora.\tHorses ran."],
    "diagnostic/diagnostic": ["index\tsentence1\tsentence2", "0\tThe cat sat.\tThe cat did not sit.", "1\tA\tB"],
}


def write(folder: Path, end: str = "\n") -> Path:
    for name, lines in TABLES.items():
        path = folder / f"{name}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes("".join(line + end for line in lines).encode())
    return folder


@pytest.fixture(params=["\n", "\r\n"], ids=["lf", "crlf"])
def folder(tmp_path, request):
    return write(tmp_path / "glue", request.param)


@pytest.mark.parametrize(
    ("name", "targets", "classes", "first"),
    [
        ("CoLA", [1, 0], ("0", "1"), ("Our friends won't buy this analysis.", None)),
        ("SST-2", [0, 1], ("0", "1"), ("hide new secretions from the parental units ", None)),
        ("MRPC", [1, 0], ("0", "1"), ('Amrozi accused "the witness".', '"the witness", Amrozi said.')),
        ("STS-B", [5.0, 3.8], (), ("A plane is taking off.", 'An air "plane is.')),
        ("QQP", [0, 1], ("0", "1"), ("How is life?", "What's life?")),
        ("MNLI", [1, 0, 2], ("entailment", "neutral", "contradiction"), ("Conceptually cream.", "Product.")),
        ("QNLI", [1, 0], ("entailment", "not_entailment"), ("When did it appear?", "Digimon appeared.")),
        ("RTE", [1, 0], ("entailment", "not_entailment"), ("No weapons.", "Weapons.")),
        ("WNLI", [1, 0], ("0", "1"), ("I stuck a pin.", "The carrot had a hole.")),
    ],
)
def test_train_files(folder, name, targets, classes, first):
    found = read_glue(folder, TASKS[name], "train")[""]
    assert (found.targets, found.classes) == (targets, classes)
    assert (found.texts[0], found.pairs and found.pairs[0]) == first


@pytest.mark.parametrize("name", TASKS)
def test_dev_and_test_files(folder, name):
    task = TASKS[name]
    parts = ("_matched", "_mismatched") if name == "MNLI" else ("",)
    dev, test = read_glue(folder, task, "dev"), read_glue(folder, task, "test")
    assert tuple(dev) == tuple(test) == parts
    for suffix in parts:
        assert len(dev[suffix]) == len(dev[suffix].targets) == len(TABLES[f"{name}/dev{suffix}"]) - (name != "CoLA")
        assert len(test[suffix]) == len(TABLES[f"{name}/test{suffix}"]) - 1
        assert test[suffix].targets is None and (test[suffix].pairs is None) == (task.pair is None)
        assert "\r" not in test[suffix].texts[0] + (test[suffix].pairs or [""])[0]


def test_both_dev_files_of_mnli(folder):
    dev = read_glue(folder, TASKS["MNLI"], "dev")
    assert dev["_matched"].targets == [0] and dev["_mismatched"].targets == [2, 1]
    assert (dev["_mismatched"].texts[1], dev["_mismatched"].pairs[1]) == ("A letter.", "Letters.")


def test_quotes_and_spaces_are_text(folder):
    assert read_glue(folder, TASKS["CoLA"], "test")[""].texts[0] == 'Bill whistled "past the house.'
    assert read_glue(folder, TASKS["SST-2"], "train")[""].texts[1] == 'the "best film '
    assert read_glue(folder, TASKS["QQP"], "train")[""].pairs == ["What's life?", ""]  # published so


def test_the_diagnostic_set_is_there_or_not(folder, tmp_path):
    found = read_diagnostic(folder)
    assert (found.texts, found.pairs, found.targets) == (["The cat sat.", "A"], ["The cat did not sit.", "B"], None)
    assert read_diagnostic(tmp_path) is None


def test_tasks_by_their_names_and_by_what_is_there(folder, tmp_path):
    assert tasks_in(folder) == list(TASKS.values())
    assert tasks_in(tmp_path) == []
    assert glue_task("sst2") is glue_task("SST-2") is TASKS["SST-2"]
    assert glue_task("sts-b") is TASKS["STS-B"] and glue_task("cola") is TASKS["CoLA"]
    with pytest.raises(ValueError, match=r"no GLUE task 'boolq'; expected one of CoLA, SST-2"):
        glue_task("boolq")


def test_damaged_and_missing_files_are_named(folder):
    (folder / "RTE" / "dev.tsv").unlink()
    with pytest.raises(FishError, match=r"RTE.dev\.tsv does not exist; expected a folder in GLUE's layout"):
        read_glue(folder, TASKS["RTE"], "dev")
    (folder / "WNLI" / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\ta\tb\n")
    with pytest.raises(FishError, match="row 2 has 3 fields, the header has 4"):
        read_glue(folder, TASKS["WNLI"], "dev")
    (folder / "QNLI" / "dev.tsv").write_text("index\tquestion\tsentence\tlabel\n0\ta\tb\tmaybe\n")
    with pytest.raises(ValueError, match=r"labels \['maybe'\] are not among the classes"):
        read_glue(folder, TASKS["QNLI"], "dev")
    with pytest.raises(FishError, match=r"missing.*does not exist"):
        read_glue(folder / "missing", TASKS["QNLI"], "dev")


def test_qqp_with_too_many_cut_rows_is_damaged(folder):
    path = folder / "QQP" / "train.tsv"
    path.write_text(path.read_text() + "cut\n" * 99)
    with pytest.raises(FishError, match=r"train\.tsv: 101 of 104 lines do not have as many fields as the first"):
        read_glue(folder, TASKS["QQP"], "train")
    path.write_bytes(b"id\tquestion\n1\t\xff\n")
    with pytest.raises(FishError, match="not UTF-8 at byte 14"):
        read_glue(folder, TASKS["QQP"], "train")


@pytest.mark.skipif(not SHARED.is_dir(), reason="the GLUE files are not here")
@pytest.mark.parametrize(
    ("name", "train", "dev", "share"), [("RTE", 2490, 277, 131), ("MRPC", 3668, 408, 279), ("SST-2", 67349, 872, 444)]
)
def test_the_published_files(name, train, dev, share):
    found = read_glue(SHARED, TASKS[name], "dev")[""]
    assert len(found) == dev and sum(found.targets) == share
    assert len(read_glue(SHARED, TASKS[name], "train")[""]) == train


# -- the hub ----------------------------------------------------------------------------------------------------------

HUB_TEXTS = {"MRPC": ("sentence1", "sentence2"), "MNLI": ("premise", "hypothesis"), "AX": ("premise", "hypothesis")}


def hub_copy(folder: Path, source: Path, names=tuple(TASKS)) -> Path:
    """Write the same rows in the hub's layout: cola/train-00000-of-00001.parquet and so on, and a README of them."""
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    card = ["---", "configs:"]

    def add(hub: str, split: str, examples: Examples, texts: tuple[str, ...], regression: bool) -> None:
        (folder / hub).mkdir(parents=True, exist_ok=True)
        unknown = [-1.0 if regression else -1] * len(examples)
        kind = arrow.float32() if regression else arrow.int64()
        columns = dict(zip(texts, (examples.texts, examples.pairs), strict=False))
        columns["label"] = arrow.array(unknown if examples.targets is None else examples.targets, kind)
        columns["idx"] = arrow.array(range(len(examples)), arrow.int32())
        parquet.write_table(arrow.table(columns), folder / hub / f"{split}-00000-of-00001.parquet")
        card.extend([f"  - split: {split}", f"    path: {hub}/{split}-*"])

    for name in names:
        task = TASKS[name]
        card.extend([f"- config_name: {task.hub}", "  data_files:"])
        for part, split in (("train", "train"), ("dev", "validation"), ("test", "test")):
            for suffix, examples in read_glue(source, task, part).items():
                add(task.hub, split + suffix, examples, HUB_TEXTS.get(name, task.texts), not task.classes)
    card.extend(["- config_name: ax", "  data_files:"])
    add("ax", "test", read_diagnostic(source), HUB_TEXTS["AX"], False)
    (folder / "README.md").write_text("\n".join([*card, "---", ""]))
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_a_copy_of_the_hub_gives_the_same_examples(tmp_path, cache, capfd):
    source = write(tmp_path / "glue")
    copy = hub_copy(tmp_path / "hub", source)
    assert tasks_in(copy) == list(TASKS.values())
    for task in TASKS.values():
        for part in ("train", "dev", "test"):
            ours, theirs = read_glue(copy, task, part), read_glue(source, task, part)
            assert tuple(ours) == tuple(theirs)
            for suffix, found in ours.items():
                expected = theirs[suffix]
                assert (found.texts, found.pairs, found.classes) == (expected.texts, expected.pairs, expected.classes)
                assert found.targets == (None if part == "test" else pytest.approx(expected.targets))
    assert read_diagnostic(copy) == read_diagnostic(source)
    assert capfd.readouterr() == ("", "")  # no bars of another library in ours


def test_a_damaged_copy_is_refused(tmp_path, cache):
    from pyarrow import parquet

    source = write(tmp_path / "glue")
    copy = hub_copy(tmp_path / "hub", source, ["RTE", "WNLI"])
    path = copy / "rte" / "validation-00000-of-00001.parquet"
    parquet.write_table(parquet.read_table(path).set_column(2, "label", [[7]]), path)
    with pytest.raises(FishError, match=r"rte, validation: labels must be 0 to 1, got \[7\]"):
        read_glue(copy, TASKS["RTE"], "dev")
    path = copy / "wnli" / "train-00000-of-00001.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(FishError, match=r"cannot read .*hub, wnli, train: .*expected a data set like nyu-mll/glue"):
        read_glue(copy, TASKS["WNLI"], "train")
    (copy / "README.md").unlink()
    with pytest.raises(FishError, match=r"cannot read .*hub, rte, train: .*expected a data set like nyu-mll/glue"):
        read_glue(copy, TASKS["RTE"], "train")


def test_a_missing_datasets_package_is_named(monkeypatch):
    load = builtins.__import__

    def without(name, *rest):
        if name == "datasets":
            raise ImportError(name)
        return load(name, *rest)

    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(FishError, match=r"from the hub needs datasets: pip install 'fishmask\[glue\]'"):
        read_glue("nyu-mll/glue", TASKS["RTE"], "train")


# -- splits and scores ------------------------------------------------------------------------------------------------


def examples(count: int) -> Examples:
    return Examples([f"t{i}" for i in range(count)], [f"p{i}" for i in range(count)], list(range(count)), ("a", "b"))


def test_the_held_out_rows_are_always_the_same_and_never_trained_on():
    train, held = hold_out(examples(50), 0.2)
    assert (train, held) == hold_out(examples(50), 0.2)
    assert len(train) == 40 and len(held) == 10 and not set(train.texts) & set(held.texts)
    assert [int(text[1:]) for text in held.texts] == held.targets == sorted(held.targets)
    assert held.pairs == [f"p{i}" for i in held.targets] and held.classes == ("a", "b")
    few = hold_out(examples(50), 0.5, rows=10)
    assert len(few[0]) == len(few[1]) == 5
    assert len(hold_out(examples(30_000))[1]) == 2000
    for share in (0.01, 0.99):
        assert [len(part) for part in hold_out(examples(2), share)] == [1, 1]
    with pytest.raises(FishError, match="at least two training examples"):
        hold_out(examples(1))
    for wrong in ({"share": 1.0}, {"share": 0.0}, {"rows": 1}):
        with pytest.raises(ValueError, match=r"such as 0\.1|at least 2 rows"):
            hold_out(examples(5), **wrong)


def test_taking_rows_keeps_what_belongs_together():
    found = take(Examples(["a", "b", "c"]), [2, 0])
    assert found == Examples(["c", "a"])


def test_the_score_of_a_task_is_the_mean_of_its_metrics():
    assert task_score(TASKS["CoLA"], {"": {"mcc": 0.3, "accuracy": 0.8}}) == {"score": 0.3, "mcc": 0.3}
    mrpc = task_score(TASKS["MRPC"], {"": {"f1": 0.9, "accuracy": 0.8, "mcc": 0.1}})
    assert mrpc == {"score": pytest.approx(0.85), "f1": 0.9, "accuracy": 0.8}
    mnli = task_score(TASKS["MNLI"], {"_matched": {"accuracy": 0.8}, "_mismatched": {"accuracy": 0.7}})
    assert mnli == {"score": pytest.approx(0.75), "accuracy_matched": 0.8, "accuracy_mismatched": 0.7}
    assert task_score(TASKS["STS-B"], {"": {"pearson": 0.9, "spearman": 0.7, "mse": 2.0}})["score"] == 0.8
