"""Labelled text: tables of the user's own, the embedded rated words, and batches of tokens.

Three steps, each plain data: a table (columns of strings), :class:`Examples` (texts and targets), and
:class:`Encoded` (token numbers), which hands out padded batches.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fishmask.errors import FishError

Table = dict[str, list[str]]
Part = Literal["train", "validation", "test"]
Task = Literal["auto", "classification", "regression"]
SUFFIXES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Examples:
    """Texts with their targets.

    Attributes:
        texts: One text per example.
        pairs: The second text of each example, or None when there is only one.
        targets: Class numbers, or floats for regression; None when the labels are unknown.
        classes: The name of each class number; empty for regression.
    """

    texts: list[str]
    pairs: list[str] | None = None
    targets: list[int] | list[float] | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)


def read_table(path: str | Path, columns: Sequence[str] = ()) -> Table:
    """Read a table of text, one list of strings per column.

    The suffix decides the format: ``.csv`` (quoted as usual), ``.tsv`` (no quoting at all, as in GLUE), both with a
    header line, or ``.jsonl`` (one object per line). The encoding is UTF-8.

    Args:
        path: The file.
        columns: The names of the columns of a ``.csv`` or ``.tsv`` without a header line.

    Raises:
        ValueError: The suffix is none of these.
        FishError: The file is empty, or a row does not fit the header.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: expected a table ending in {', '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}")
    try:
        # utf-8-sig: spreadsheets, and GLUE's own MRPC, begin with a byte-order mark.
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(_rows_jsonl(path, file) if path.suffix == ".jsonl" else _rows_of_text(path.suffix, file))
    except UnicodeDecodeError as error:
        raise FishError(f"{path}: not UTF-8 at byte {error.start}; save the table in UTF-8") from error
    if columns:
        rows.insert(0, list(columns))
    if len(rows) < 2:
        raise FishError(f"{path}: expected a header and at least one row, found {len(rows)} line(s)")
    header, *body = rows
    for number, row in enumerate(body, start=2):
        if len(row) != len(header):
            raise FishError(f"{path}: row {number} has {len(row)} fields, the header has {len(header)}")
    return {name: [row[column] for row in body] for column, name in enumerate(header)}


def _rows_of_text(suffix: str, file: Any) -> Iterator[list[str]]:
    if suffix == ".tsv":
        return (line.rstrip("\r\n").split("\t") for line in file if line.strip())
    return (row for row in csv.reader(file) if row)


def _rows_jsonl(path: Path, file: Any) -> Iterator[list[str]]:
    header: list[str] = []
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise FishError(f"{path}: line {number} is not JSON ({error.msg})") from error
        if not isinstance(record, dict):
            raise FishError(f"{path}: line {number} is not an object with named fields")
        if not header:
            header = list(record)
            yield header
        if set(record) != set(header):
            raise FishError(f"{path}: line {number} has the fields {sorted(record)}, the first line {sorted(header)}")
        yield [value if isinstance(value := record[name], str) else json.dumps(value) for name in header]


def read_examples(
    path: str | Path,
    text: str,
    label: str | None = None,
    *,
    pair: str | None = None,
    task: Task = "auto",
    classes: Sequence[str] = (),
) -> Examples:
    """Read labelled examples from a table.

    Args:
        path: A table that :func:`read_table` reads.
        text: The column of the texts.
        label: The column of the labels; None when they are unknown.
        pair: The column of the second texts, for tasks on two sentences.
        task: "auto" takes a column of numbers with a decimal point for regression, everything else for classes.
        classes: Names of the classes in their order, as found in the training data; by default the labels, sorted.

    Raises:
        ValueError: A column is missing (the message lists those there are), or a label does not suit the task.
    """
    return examples_of(read_table(path), str(path), text, label, pair=pair, task=task, classes=classes)


def examples_of(
    table: Table,
    name: str,
    text: str,
    label: str | None = None,
    *,
    pair: str | None = None,
    task: Task = "auto",
    classes: Sequence[str] = (),
) -> Examples:
    """Take labelled examples from a table; ``name`` is what errors call it, the rest as for :func:`read_examples`."""
    missing = [column for column in (text, pair, label) if column is not None and column not in table]
    if missing:
        raise ValueError(f"{name}: no column {', '.join(map(repr, missing))}; it has: {', '.join(table)}")
    pairs = None if pair is None else table[pair]
    if label is None:
        return Examples(table[text], pairs)
    targets, classes = _targets(table[label], task, tuple(classes), f"{name}: column {label!r}")
    return Examples(table[text], pairs, targets, classes)


def _targets(
    labels: list[str], task: Task, classes: tuple[str, ...], where: str
) -> tuple[list[int] | list[float], tuple[str, ...]]:
    numbers = _numbers(labels)
    if task == "regression" or (task == "auto" and not classes and numbers and any("." in label for label in labels)):
        if numbers is None:
            raise ValueError(f"{where}: regression needs a finite number in every row")
        return numbers, ()
    classes = classes or tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise ValueError(f"{where}: expected at least two classes, found only {classes[0]!r}")
    unknown = sorted(set(labels) - set(classes))
    if unknown:
        raise ValueError(f"{where}: labels {unknown[:5]} are not among the classes {list(classes)[:10]}")
    number = {name: i for i, name in enumerate(classes)}
    return [number[label] for label in labels], classes


def _numbers(labels: list[str]) -> list[float] | None:
    """Return the labels as floats, or None when one of them is no finite number."""
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return None
    return numbers if all(abs(number) < float("inf") for number in numbers) else None


def rated_words(part: Part) -> Examples:
    """Return one part of the VADER lexicon: words and emoticons with the mean rating that ten people gave them.

    Ratings run from −4 (negative) to 4 (positive). The part follows from the digest of the word alone, case ignored:
    about 70 % train, 10 % validation, 20 % test, and no word is in two parts.

    Raises:
        FishError: The package `vaderSentiment` is not installed.
    """
    spec = find_spec("vaderSentiment")
    if spec is None or not spec.submodule_search_locations:
        raise FishError("the rated words need the package vaderSentiment: pip install 'fishmask[demo]'")
    lexicon = Path(spec.submodule_search_locations[0]) / "vader_lexicon.txt"
    words: list[str] = []
    ratings: list[float] = []
    for line in lexicon.read_text(encoding="utf-8").splitlines():
        word, mean, *_ = line.split("\t")
        if _part_of(word) == part:
            words.append(word)
            ratings.append(float(mean))
    return Examples(words, targets=ratings)


def _part_of(word: str) -> Part:
    tenth = int.from_bytes(sha256(word.casefold().encode()).digest()[:4], "big") % 10
    return "test" if tenth < 2 else "validation" if tenth == 2 else "train"


@dataclass(frozen=True)
class Encoded:
    """Examples as token numbers, ready to be batched.

    Attributes:
        fields: For each of the model's inputs one list of numbers per example, unpadded.
        padding: The number that fills each field up.
        targets: Class numbers (int64) or regression targets (float32), or None.
        width: Pad every batch to so many tokens and shuffle freely; 0 to put examples of like length together and pad
            to the longest of each batch.
    """

    fields: dict[str, list[list[int]]]
    padding: dict[str, int]
    targets: Tensor | None
    width: int = 0

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def lengths(self) -> list[int]:
        """The number of tokens of each example."""
        return [len(ids) for ids in self.fields["input_ids"]]

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the given examples as one batch, padded on the right."""
        width = self.width or max(self.lengths[row] for row in rows)
        filled = {
            name: torch.tensor([lists[row] + [self.padding[name]] * (width - len(lists[row])) for row in rows])
            for name, lists in self.fields.items()
        }
        return filled if self.targets is None else filled | {"labels": self.targets[list(rows)]}

    def in_order(self, batch_size: int) -> list[list[int]]:
        """Return the rows of each batch from the shortest example to the longest: little padding, always the same."""
        rows = sorted(range(len(self)), key=self.lengths.__getitem__)
        return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]

    def shuffled(self, batch_size: int, seed: int) -> list[list[int]]:
        """Return the rows of each batch of one epoch: shuffled, yet examples of like length together."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self), generator=generator).tolist()
        lengths = self.lengths
        # Sorting inside large random groups saves most of the padding and keeps the batches different every epoch.
        group = batch_size if self.width else 50 * batch_size
        batches = []
        for start in range(0, len(order), group):
            rows = sorted(order[start : start + group], key=lengths.__getitem__)
            batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

    def sample(self, count: int, batch_size: int, seed: int) -> Iterator[dict[str, Tensor]]:
        """Yield batches of ``count`` examples drawn without replacement, sorted by length: what scoring reads."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(self), generator=generator)[:count].tolist()
        rows.sort(key=self.lengths.__getitem__)
        for start in range(0, len(rows), batch_size):
            yield self.batch(rows[start : start + batch_size])


def encode(
    examples: Examples, tokenizer: Any, max_length: int, padding: Literal["longest", "max"] = "longest"
) -> Encoded:
    """Turn texts into token numbers, cut off after ``max_length`` tokens.

    Args:
        examples: The texts.
        tokenizer: A tokenizer of transformers.
        max_length: The most tokens of an example.
        padding: Pad each batch to its longest example, or every batch to ``max_length``.
    """
    encoding = tokenizer(examples.texts, examples.pairs, truncation=True, max_length=max_length)
    fields = {name: [list(ids) for ids in encoding[name]] for name in tokenizer.model_input_names if name in encoding}
    if any(not ids for ids in fields["input_ids"]):
        raise FishError("a text gives no token at all; fill or remove the empty rows of the table")
    fill = dict.fromkeys(fields, 0) | {"input_ids": tokenizer.pad_token_id}
    targets = None
    if examples.targets is not None:
        targets = torch.tensor(examples.targets, dtype=torch.int64 if examples.classes else torch.float32)
    return Encoded(fields, fill, targets, max_length if padding == "max" else 0)
