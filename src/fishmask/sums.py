"""The running sums of scores: beside the model, or off its device behind one layer of scratch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

Place = Literal["device", "cpu"]


class Sums:
    """One float32 sum for every entry of some parameters, beginning at zero.

    On the model's device every example is added to the sum itself. Off it, the examples of a batch are added up in
    scratch as large as one parameter, and the scratch is added to the sum once: what crosses to the CPU are four bytes
    for each entry and batch, however many examples it has. The two orders of adding differ in rounding.

    Args:
        parameters: The parameters, by canonical name.
        place: "device", or "cpu" to keep the sums in the CPU's memory.

    Attributes:
        tensors: The sums, shaped like the parameters.
        place: Where they are.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], place: Place = "device") -> None:
        self.place = place
        self.device = next(iter(parameters.values())).device
        home = self.device if place == "device" else torch.device("cpu")
        self.tensors = {name: torch.zeros(p.shape, dtype=torch.float32, device=home) for name, p in parameters.items()}
        self._scratch = torch.empty(0, device=self.device)
        self._arrived = torch.empty(0)  # where scratch from a GPU arrives: page-locked, so that it comes at full speed

    @contextmanager
    def adding(self, name: str) -> Iterator[Tensor]:
        """Give a tensor on the model's device, shaped like a parameter, to add scores of it to."""
        total = self.tensors[name]
        if self.place == "device":
            yield total
            return
        if self._scratch.numel() < total.numel():
            self._scratch = torch.empty(total.numel(), device=self.device)
            if self.device.type == "cuda":
                self._arrived = torch.empty(total.numel(), pin_memory=True)
        scratch = self._scratch[: total.numel()]
        yield scratch.zero_().view(total.shape)
        if self.device.type == "cuda":
            scratch = self._arrived[: total.numel()].copy_(scratch)
        total.view(-1).add_(scratch.cpu())
