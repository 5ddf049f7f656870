"""What workers tell each other before they reduce and after it: a round goes on only while all agree."""

import json
from typing import NamedTuple

import torch

from fishmask.errors import RoundError
from fishmask.handshake import FACTS, ROUND
from fishmask.wire import Wire


class Standing(NamedTuple):
    """Where a worker stands when it comes to a round; 64 bytes on the wire.

    Attributes:
        number: Of its last round.
        trained: Whether its values have changed since.
        finished: Whether it trains no more.
        changed: Whether its buffers have changed since.
        wrong: Whether it has a message that says what is wrong with it.
        digest: The first bits of the digest of the values after its last round.
    """

    number: int
    trained: bool
    finished: bool
    changed: bool
    wrong: bool
    digest: int


def propose(wire: Wire, mine: Standing, message: str) -> list[Standing]:
    """Return where all workers stand, in the order of their ranks.

    Args:
        wire: The workers.
        mine: Where this one stands.
        message: What is wrong with it, if anything.

    Raises:
        RoundError: Something is wrong with one of them, or they have not had the same last round, or not all have come
            to a round; on all workers.
    """
    records = wire.gather(torch.tensor([ROUND, *map(int, mine), 0], dtype=torch.int64)).tolist()
    elsewhere = {rank: "compares what it trains instead" for rank, record in enumerate(records) if record[0] == FACTS}
    if elsewhere:
        wire.gather_bytes(message.encode())
        raise _failure(mine.number, elsewhere)
    everyone = [
        Standing(number, bool(trained), bool(finished), bool(changed), bool(wrong), digest)
        for _, number, trained, finished, changed, wrong, digest, _ in records
    ]
    reasons: dict[int, str] = {}
    if any(standing.wrong for standing in everyone):
        messages = wire.gather_bytes(message.encode())
        reasons = {rank: text.decode() for rank, text in enumerate(messages) if text}
    first = everyone[0]
    for rank, standing in enumerate(everyone):
        if standing.number != first.number:
            reasons.setdefault(rank, f"comes to round {standing.number + 1}, rank 0 to round {first.number + 1}")
        elif standing.digest != first.digest:
            reasons.setdefault(rank, "had other values than rank 0 after the last round")
    if reasons:
        raise _failure(mine.number, reasons)
    return everyone


def vote(wire: Wire, number: int, digest: str, wrong: str) -> None:
    """Find out whether all workers have come to the same.

    Args:
        wire: The workers.
        number: Of the last round.
        digest: Of the values that this worker has come to.
        wrong: What is wrong with them, if anything.

    Raises:
        RoundError: They have not, or something is wrong with one of them; on all workers.
    """
    votes = [json.loads(ballot) for ballot in wire.gather_bytes(json.dumps([digest, wrong]).encode())]
    reasons = {rank: text for rank, (_, text) in enumerate(votes) if text}
    if not reasons and len({result for result, _ in votes}) > 1:
        reasons = {rank: f"came to {result[:12]}" for rank, (result, _) in enumerate(votes)}
    if reasons:
        raise _failure(number, reasons)


def _failure(number: int, reasons: dict[int, str]) -> RoundError:
    told = "; ".join(f"rank {rank}: {reason}" for rank, reason in reasons.items())
    text = (
        f"round {number + 1} failed, and nothing was changed: {told}. The steps since round {number} are still in the "
        "values: train on to have them in the next round, or call discard() on all workers to go back to round "
        f"{number}"
    )
    return RoundError(text, reasons)
