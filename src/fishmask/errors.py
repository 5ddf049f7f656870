"""The one exception of our own."""


class FishError(RuntimeError):
    """A condition that fishmask refuses: a damaged file, other weights than expected, an unsupported model.

    Misuse of a function (a wrong argument) raises ``ValueError`` or ``TypeError`` instead. Every message says what
    was expected, what came, and what to do.
    """


class Diverged(FishError):
    """The loss of a training run is not finite any more."""
