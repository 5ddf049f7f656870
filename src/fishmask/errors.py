"""The exceptions of our own."""

from typing import Any


class FishError(RuntimeError):
    """A condition that fishmask refuses: a damaged file, other weights than expected, an unsupported model.

    Misuse of a function (a wrong argument) raises ``ValueError`` or ``TypeError`` instead. Every message says what
    was expected, what came, and what to do.
    """


class Diverged(FishError):
    """The loss of a training run is not finite any more."""


class HandshakeError(FishError):
    """The workers of a distributed training do not train the same thing; every worker raises it, with the same text.

    Attributes:
        disagreements: What they disagree on: for every such fact the ranks by what they have.
    """

    def __init__(self, message: str, disagreements: dict[str, dict[str, list[int]]]) -> None:
        super().__init__(message)
        self.disagreements = disagreements

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.disagreements)


class RoundError(FishError):
    """An exchange between workers failed; every value of every worker that is alive is as it was before it.

    Attributes:
        reasons: Why, by rank; empty when the connection broke off.
    """

    def __init__(self, message: str, reasons: dict[int, str] | None = None) -> None:
        super().__init__(message)
        self.reasons = reasons or {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.reasons)
