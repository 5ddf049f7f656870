"""Rated words, which the examples train on: words and emoticons of the VADER lexicon, from −4 to 4."""

from typing import Any, Literal

from fishmask.data import rated_words


def words(tokenizer: Any, part: Literal["train", "validation", "test"], count: int) -> list[dict[str, Any]]:
    """Return every n-th word of a part with its rating, as rows for a collator that pads.

    Args:
        tokenizer: Of the model.
        part: No word is in two parts.
        count: How many words.
    """
    found = rated_words(part)
    rows = []
    for row in range(0, len(found.texts), len(found.texts) // count)[:count]:
        encoded = tokenizer(found.texts[row], truncation=True, max_length=16)
        rows.append({**encoded, "labels": found.targets[row]})
    return rows
