"""Per-example gradients of single uses of a parameter.

A rule belongs to one use of a parameter in one forward pass. It keeps what the forward left, receives the derivative
dY by the output of the call, and turns both into per-example gradients.

Shapes: B examples, M positions (all dimensions between the first and the last), I in, O out, V rows, D columns.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fishmask.costs import costs_for
from fishmask.kernels import add_powers_, available

TILE_BYTES = 1 << 19  # a tile of scratch and one of scores stay in the level-2 cache


@dataclass(frozen=True)
class Power:
    """What is summed over examples: the square of each gradient, or its absolute value.

    Attributes:
        of: Takes it entry by entry. It is multiplicative: of(a b) = of(a) of(b).
        add_: Adds it for one gradient to the scores (scores, gradient); the gradient may be overwritten.
    """

    of: Callable[[Tensor], Tensor]
    add_: Callable[[Tensor, Tensor], object]


SQUARE = Power(torch.square, lambda scores, gradient: scores.addcmul_(gradient, gradient))
ABSOLUTE = Power(torch.abs, lambda scores, gradient: scores.add_(gradient.abs_()))


@dataclass(frozen=True)
class View:
    """A parameter, or a view of one that the forward made, such as ``weight.t()``.

    Attributes:
        name: Canonical name of the parameter.
        tensor: The tensor that the forward uses.
        of: Maps a tensor shaped like the whole parameter to the same view of it.
    """

    name: str
    tensor: Tensor
    of: Callable[[Tensor], Tensor]


class Rule(ABC):
    """One use of a parameter. Gradients are float32 and shaped like the view."""

    def __init__(self, view: View) -> None:
        self.view = view

    @abstractmethod
    def receive(self, dY: Tensor) -> None:
        """Take the derivative by the output, first dimension B times positions."""

    @abstractmethod
    def add_(self, n: int, out: Tensor) -> None:
        """Add the gradient of example ``n``."""

    @abstractmethod
    def sum_(self, power: Power, acc: Tensor, scratch: Callable[[torch.Size], Tensor]) -> None:
        """Add the sum over examples of squared or absolute gradients."""

    @abstractmethod
    def forget(self) -> None:
        """Drop the derivative received last."""


class Small(Rule):
    """A use whose B gradients fit in memory together: biases, norms, tables that are added."""

    def __init__(self, view: View, gradients: Callable[[Tensor], Tensor]) -> None:
        super().__init__(view)
        self._reduce = gradients
        self._gradients: Tensor | None = None

    def receive(self, dY: Tensor) -> None:
        """Reduce to gradients [B, *shape]."""
        gradients = self._reduce(dY).float()
        self._gradients = gradients.reshape(gradients.shape[0], *self.view.tensor.shape)

    def add_(self, n: int, out: Tensor) -> None:
        """Add one gradient."""
        assert self._gradients is not None
        out.add_(self._gradients[n])

    def sum_(self, power: Power, acc: Tensor, scratch: Callable[[torch.Size], Tensor]) -> None:
        """Take the power of all and sum."""
        assert self._gradients is not None
        acc.add_(power.of(self._gradients).sum(0))

    def forget(self) -> None:
        """Drop the gradients."""
        self._gradients = None


class Product(Rule):
    """A matrix product with inputs x [B, M, I]: gradient dYᵀ X [O, I], or Xᵀ dY where the weight is stored [I, O].

    A position whose dY is exactly zero (padding; all but the first position in the last block of a classifier) adds
    nothing and is dropped. With at most one position left the power of the product is the product of the powers.
    """

    def __init__(self, view: View, x: Tensor, x_first: bool) -> None:
        super().__init__(view)
        self._x, self._x_first = x, x_first
        self._dY: Tensor | None = None
        self._live: Tensor | None = None

    def receive(self, dY: Tensor) -> None:
        """Keep dY as [B, M, O], and which rows of it are not zero."""
        self._dY = dY = dY.reshape(self._x.shape[0], -1, dY.shape[-1])
        # The first column mostly proves at once that no row is zero.
        if (dY[..., 0] != 0).all():
            self._live = None
        else:
            wide = torch.promote_types(dY.dtype, torch.float32)
            self._live = torch.linalg.vector_norm(dY, torch.inf, dim=-1, dtype=wide) != 0

    def _factors(self, n: int) -> tuple[Tensor, Tensor]:
        """Return the float32 factors of the gradient of example ``n``: left [M, rows] and right [M, columns]."""
        assert self._dY is not None
        dY, x = self._dY[n], self._x[n]
        if self._live is not None and not self._live[n].all():
            kept = self._live[n].nonzero().squeeze(1)
            dY, x = dY.index_select(0, kept), x.index_select(0, kept)
        return (x.float(), dY.float()) if self._x_first else (dY.float(), x.float())

    def add_(self, n: int, out: Tensor) -> None:
        """Add one product."""
        left, right = self._factors(n)
        out.addmm_(left.t(), right)

    def sum_(self, power: Power, acc: Tensor, scratch: Callable[[torch.Size], Tensor]) -> None:
        """Multiply and take the power example by example, in row tiles that stay in the cache."""
        assert self._dY is not None
        if self._dY.shape[1] == 1 or (self._live is not None and int(self._live.sum(1).max()) <= 1):
            self._sum_single(power, acc)
            return
        if power in (SQUARE, ABSOLUTE) and _grouped(acc.device):
            add_powers_(*self._together(), acc, absolute=power is ABSOLUTE)
            return
        factors = [self._factors(n) for n in range(self._dY.shape[0])]
        rows, columns = acc.shape
        step = rows if acc.device.type != "cpu" else max(1, TILE_BYTES // (4 * columns))
        tile = scratch(torch.Size((min(step, rows), columns)))
        for start in range(0, rows, step):
            part = acc[start : start + step]
            product = tile[: part.shape[0]]
            for left, right in factors:
                torch.mm(left[:, start : start + step].t(), right, out=product)
                power.add_(part, product)

    def _together(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return both factors with the tokens of all examples one after the other, and where each example begins."""
        assert self._dY is not None
        B, M = self._dY.shape[:2]
        dY, x = self._dY.flatten(0, 1), self._x.flatten(0, 1)
        if self._live is None:
            offsets = torch.arange(0, B * M + 1, M, dtype=torch.int32, device=dY.device)
        else:
            kept = self._live.flatten().nonzero().squeeze(1)
            dY, x = dY.index_select(0, kept), x.index_select(0, kept)
            offsets = F.pad(self._live.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        return (x, dY, offsets) if self._x_first else (dY, x, offsets)

    def _sum_single(self, power: Power, acc: Tensor) -> None:
        assert self._dY is not None
        rows = torch.arange(self._dY.shape[0], device=acc.device)
        at = torch.zeros_like(rows) if self._live is None else self._live.to(torch.int8).argmax(1)
        dY, x = power.of(self._dY[rows, at].float()), power.of(self._x[rows, at].float())
        left, right = (x, dY) if self._x_first else (dY, x)
        acc.addmm_(left.t(), right)

    def forget(self) -> None:
        """Drop dY."""
        self._dY = self._live = None


def _grouped(device: torch.device) -> bool:
    """Whether the kernel that adds powers without writing gradients was measured to be quicker on this device."""
    if device.type == "cpu":
        return False
    costs = costs_for(device)
    if costs.square is None or costs.grouped is None:
        return False
    return costs.grouped < costs.square and available(device)


class Lookup(Rule):
    """An embedding: only the rows that were looked up have a gradient."""

    def __init__(self, view: View, ids: Tensor, padding_idx: int | None) -> None:
        super().__init__(view)
        self._ids = ids.reshape(ids.shape[0], -1)  # [B, M]
        self._counted = None if padding_idx is None else self._ids != padding_idx
        self._dY: Tensor | None = None

    def receive(self, dY: Tensor) -> None:
        """Keep dY as [B, M, D]."""
        self._dY = dY.reshape(*self._ids.shape, -1).float()
        if self._counted is not None:
            self._dY = self._dY * self._counted[..., None]

    def add_(self, n: int, out: Tensor) -> None:
        """Add the rows of one example."""
        assert self._dY is not None
        out.index_add_(0, self._ids[n], self._dY[n])

    def sum_(self, power: Power, acc: Tensor, scratch: Callable[[torch.Size], Tensor]) -> None:
        """Sum rows with equal example and id, take the power, and add them to the table."""
        assert self._dY is not None
        B, V = self._ids.shape[0], acc.shape[0]
        keys = self._ids + V * torch.arange(B, device=self._ids.device)[:, None]
        unique, inverse = keys.unique(return_inverse=True)
        rows = self._dY.new_zeros(unique.shape[0], acc.shape[1])
        rows.index_add_(0, inverse.flatten(), self._dY.flatten(0, 1))
        acc.index_add_(0, unique % V, power.of(rows))

    def forget(self) -> None:
        """Drop dY."""
        self._dY = None


class Convolution(Rule):
    """The weight of a convolution, example by example."""

    def __init__(self, view: View, x: Tensor, options: tuple[list[int], list[int], list[int], int]) -> None:
        super().__init__(view)
        self._x, self._options = x, options
        self._dY: Tensor | None = None

    def receive(self, dY: Tensor) -> None:
        """Keep dY."""
        self._dY = dY

    def _gradient(self, n: int) -> Tensor:
        assert self._dY is not None
        stride, padding, dilation, groups = self._options
        gradient: Tensor = torch.ops.aten.convolution_backward(
            self._dY[n : n + 1].float(),
            self._x[n : n + 1].float(),
            self.view.tensor.detach().float(),
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            [False, True, False],
        )[1]
        return gradient

    def add_(self, n: int, out: Tensor) -> None:
        """Add one gradient."""
        out.add_(self._gradient(n))

    def sum_(self, power: Power, acc: Tensor, scratch: Callable[[torch.Size], Tensor]) -> None:
        """Take the power example by example."""
        assert self._dY is not None
        for n in range(self._dY.shape[0]):
            power.add_(acc, self._gradient(n))

    def forget(self) -> None:
        """Drop dY."""
        self._dY = None
