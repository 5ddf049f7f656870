"""Scoring, pass by pass: which engine, what is checked first, what goes on where an interrupted one stopped."""

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fishmask.batches import Batch, cut, digest, elements, first_examples, size
from fishmask.engine_batched import BatchedEngine, Unsupported
from fishmask.engine_loop import LoopEngine
from fishmask.errors import FishError
from fishmask.guards import check_independence, left_as_found, require_gradients, same
from fishmask.identity import loss_digest, structure_digest, weights_digest
from fishmask.likelihoods import Likelihood
from fishmask.params import canonical_parameters
from fishmask.passes import SUM_BYTES, Footprint, ScoringPlan, free_bytes, groups, weights_bytes
from fishmask.rules import ABSOLUTE
from fishmask.score_folder import Progress, ScoreFolder
from fishmask.sums import Place, Sums

Engine = Literal["auto", "batched", "loop"]
Parameters = Mapping[str, nn.Parameter]


class Scoring:
    """The sum over examples of squared or absolute gradients, in one pass over the examples or in several.

    Args:
        model: The model.
        batches: The batches; something that can be gone through again where there are several passes or a plan.
        likelihood: What is differentiated, and what is summed.
        examples: How many examples to use.
        engine: As for `fishmask.fisher`.
        memory: Bytes that the sums may take at once; None for one pass.
        place: Where the sums are.
        folder: Where finished passes and the sums of the one under way are kept; None to keep nothing.

    Raises:
        ValueError: ``memory`` is no number of bytes or too little for one parameter, ``place`` is unknown, or
            ``batches`` can be gone through only once.
        FishError: The folder is that of another scoring, or it cannot be told whether the loss is the same.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        likelihood: Likelihood,
        examples: int,
        engine: Engine = "auto",
        *,
        memory: int | None = None,
        place: Place = "device",
        folder: str | PathLike[str] | None = None,
    ) -> None:
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 1):
            raise ValueError(f"memory must be a positive number of bytes, or None for one pass; got {memory!r}")
        if place not in get_args(Place):
            raise ValueError(f"sums must be one of {', '.join(get_args(Place))}, got {place!r}")
        checked_batches(batches)
        self._model, self._batches, self._likelihood = model, batches, likelihood
        self._examples, self._engine, self._memory, self._place = examples, engine, memory, place
        self._parameters = canonical_parameters(model)
        self._device = next(iter(self._parameters.values())).device
        passes = len(groups({name: p.numel() for name, p in self._parameters.items()}, memory))
        if passes > 1 and isinstance(batches, Iterator):
            raise ValueError(
                f"memory={memory:,} takes {passes} passes, but batches is an iterator, which is used up after one; "
                "give a list or a loader"
            )
        self._folder = None if folder is None else ScoreFolder(Path(folder), self._about())
        self._groups = self._left()
        self._seen: list[str] = self._folder.batches if self._folder else []  # digests of batches
        self._first: list[float] = self._folder.first if self._folder else []  # what the first examples gave
        self._compared = False  # whether they were looked at by this call
        self._complete = bool(self._folder and self._folder.done)  # whether all batches are seen

    @property
    def steps(self) -> int:
        """How often an example is taken, over all passes."""
        return self._examples * len(self._groups)

    def close(self) -> None:
        """Let another scoring use the folder."""
        if self._folder is not None:
            self._folder.close()

    def clear(self) -> None:
        """Delete the folder's content once the scores are elsewhere; those that came from it are mapped, and end."""
        if self._folder is not None:
            self._folder.clear()

    def _about(self) -> dict[str, object]:
        """Say what decides the bits of the scores."""
        loss = self._likelihood.loss
        return {
            "weights": weights_digest(self._model),
            "model": type(self._model).__name__,
            "structure": structure_digest(self._model),
            "labels": self._likelihood.labels,
            "loss": None if loss is None else loss_digest(loss),
            "seed": self._likelihood.seed,
            "power": "absolute" if self._likelihood.power is ABSOLUTE else "square",
            "examples": self._examples,
            "engine": self._engine,
            "sums": self._place,
            "device": self._device.type,
            "torch": torch.__version__,
        }

    def _left(self) -> list[list[str]]:
        """Divide what is not scored yet into passes."""
        done = self._folder.done if self._folder else {}
        left = {name: p.numel() for name, p in self._parameters.items() if name not in done}
        return groups(left, self._memory, self._folder.under_way() if self._folder else ())

    def run(self, advance: Callable[[int], object] = lambda count: None) -> dict[str, Tensor]:
        """Score.

        Args:
            advance: Called with the number of examples that a pass has just done; an interrupted one begins with those
                it had.

        Returns:
            Scores by name. With a folder they are mapped from its files; after several passes they are on the CPU.

        Raises:
            FishError: As for `fishmask.fisher`, or a pass gets other batches than the one before.
        """
        scores: dict[str, Tensor] = {}
        with left_as_found(self._model):
            if not self._groups:  # the folder has all of them; are they those of these batches?
                done = sum(size(batch) for _, batch in self._taken())
            for names in self._groups:
                done, found = self._pass(names, advance)
                scores |= found
        if done < self._examples:
            message = f"only {done} examples were scored, because batches has no more; "
            warnings.warn(message + f"examples={self._examples} were asked for", UserWarning, stacklevel=3)
        if self._folder is not None:
            scores = self._folder.done
        return {name: scores[name] for name in self._parameters}

    def _pass(self, names: list[str], advance: Callable[[int], object]) -> tuple[int, dict[str, Tensor]]:
        """Go over the examples once; return how many there were, and the scores where no folder keeps them.

        With a folder nothing of the sums is left when the next pass makes its own.
        """
        sums = self._sums(names)
        run = _Run(self._model, self._parameters, self._likelihood, sums, self._engine)
        begun = self._folder.resume(sums.tensors) if self._folder else None
        if begun is not None:
            run.use(begun.engine)
            self._seen, self._first = self._seen or begun.batches, self._first or begun.first
            advance(begun.examples)
        done = 0
        for first, batch in self._taken():
            done = first + size(batch)
            if begun is not None and done <= begun.examples:
                continue
            run.add(batch, first)
            advance(size(batch))
            if self._folder is not None:
                self._folder.save(sums.tensors, Progress(done, run.engine, self._seen[: self._number], self._first))
        check_finite(sums.tensors)
        if self._folder is None:
            return done, sums.tensors if len(self._groups) == 1 else _on_cpu(sums.tensors)
        self._folder.finish(sums.tensors, Progress(done, run.engine, self._seen, self._first))
        return done, {}

    def _taken(self) -> Iterator[tuple[int, Batch]]:
        """Yield the batches with the numbers of their first examples; refuse others than in an earlier pass."""
        batches = checked_batches(self._batches)
        several = len(self._groups) > 1 or self._folder is not None
        self._number = 0
        for first, batch in first_examples(batches, self._examples, self._device):
            if several:
                found = digest(batch)
                if self._number == len(self._seen):
                    if self._complete:
                        raise FishError(
                            f"batches has more than the {self._number} batches that an earlier pass took; give the "
                            "same batches each time"
                        )
                    self._seen = [*self._seen, found]
                if found != self._seen[self._number]:
                    raise FishError(
                        f"batch {self._number} is not what it was in an earlier pass, so the passes would not score "
                        "the same examples; give the same batches in the same order (no shuffling) each time"
                    )
            if self._folder is not None and not self._compared:
                self._compare(cut(batch, 0, min(2, size(batch))))
            self._number += 1
            yield first, batch
        if self._number == 0:
            raise ValueError("batches has no examples; is it an iterator that was used up before?")
        if self._number < len(self._seen):
            raise FishError(
                f"batches has {self._number} batches, but an earlier pass took {len(self._seen)}; give the same "
                "batches each time"
            )
        self._complete = True

    def _compare(self, few: Batch) -> None:
        """See whether the first examples give what they gave when the folder was begun: code may have changed."""
        require_gradients(self._model, True)
        output = self._likelihood(self._model, few, 0).output.detach()
        rows = output.double().reshape(len(output), -1)
        found = torch.stack([rows.mean(1), rows.square().mean(1).sqrt()], dim=1)
        earlier = torch.tensor(self._first, dtype=torch.float64).view(-1, 2)
        # Each example by itself: one may be far smaller than the other. Kernels of other machines may differ a little.
        if self._first and not all(same(a.to(output.dtype), b, 0) for a, b in zip(found, earlier, strict=True)):
            raise FishError(
                f"the first examples do not give what they gave when the folder was begun, so the model or the loss "
                f"is another one though its weights are the same (means and root mean squares: {_told(self._first)} "
                f"then, {_told(found.flatten().tolist())} now); go on with that one, delete the folder, or name another"
            )
        self._first, self._compared = self._first or found.flatten().tolist(), True

    def _sums(self, names: list[str]) -> Sums:
        return Sums({name: self._parameters[name] for name in names}, self._place)

    def plan(self) -> ScoringPlan:
        """Find out what the passes will take: each is tried on examples of the largest batch, and timed.

        Raises:
            ValueError: ``batches`` can be gone through only once.
            FishError: As for `run`.
        """
        if isinstance(self._batches, Iterator):
            raise ValueError("a plan looks at the batches before they are scored; give a list or a loader")
        total = number = examples = most = 0
        largest: Batch = None
        for first, batch in first_examples(checked_batches(self._batches), self._examples, torch.device("cpu")):
            numbers = elements(batch)
            total, number, examples = total + numbers, number + 1, first + size(batch)
            if numbers > most:
                most, largest = numbers, batch
        if largest is None:
            raise ValueError("batches has no examples")
        count = min(2, size(largest)) if self._device.type == "cpu" else size(largest)  # a GPU needs work to be quick
        few = next(batch for _, batch in first_examples([largest], count, self._device))
        seconds, working, more = 0.0, 0, None
        with left_as_found(self._model):
            for names in self._groups:
                taken, peak, more = self._tried(names, few, more)
                seconds += taken * total / elements(few)
                working = max(working, peak + more * (size(largest) - count))
        p = max(self._parameters.values(), key=lambda p: p.numel())
        sizes = {name: p.numel() for name, p in self._parameters.items()}
        return ScoringPlan(
            model=type(self._model).__name__,
            device=self._device.type,
            dtype=str(p.dtype).removeprefix("torch."),
            entries=sum(sizes.values()),
            done=sum(sizes.values()) - sum(sizes[name] for names in self._groups for name in names),
            examples=examples,
            batches=number,
            passes=tuple(map(len, self._groups)),
            weights_bytes=weights_bytes(self._model),
            sums_bytes=max((SUM_BYTES * sum(sizes[n] for n in names) for names in self._groups), default=0),
            sums_place=self._place,
            working_bytes=working,
            scores_bytes=SUM_BYTES * sum(sizes.values()),
            on_disk=self._folder is not None,
            free_bytes=free_bytes(self._device),
            seconds=seconds,
        )

    def _tried(self, names: list[str], few: Batch, more: int | None) -> tuple[float, int, int]:
        """Try a pass on a few examples.

        Returns:
            Its seconds; the bytes that it and its checks work in, scratch included; and the bytes of each further
            example, which are measured where ``more`` is not known yet.
        """
        run = _Run(self._model, self._parameters, self._likelihood, self._sums(names), self._engine)
        with Footprint() as footprint:
            run.add(few, 0)  # this also wakes up what sleeps: files, caches, kernels
        start = time.perf_counter()
        run.add(few, 0)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        if more is None and size(few) > 1:
            peaks: list[int] = []
            for part in (cut(few, 0, 1), cut(few, 0, 2)):
                with Footprint() as again:
                    run.add(part, 0)
                peaks.append(again.peak)
            more = max(0, peaks[1] - peaks[0])
        return seconds, footprint.peak, more or 0


class _Run:
    """One pass: checks the first batch, picks the engine, falls back to the loop at most once."""

    def __init__(
        self, model: nn.Module, parameters: Parameters, likelihood: Likelihood, sums: Sums, engine: Engine
    ) -> None:
        self._model, self._likelihood, self._choice = model, likelihood, engine
        parts = (model, parameters, likelihood, sums)
        self._loop = LoopEngine(*parts)
        self._engine: BatchedEngine | LoopEngine = self._loop if engine == "loop" else BatchedEngine(*parts)
        self._checked_examples = 0

    @property
    def engine(self) -> str:
        """The engine that is used now."""
        return "loop" if self._engine is self._loop else "batched"

    def use(self, engine: str) -> None:
        """Go on with the engine that an interrupted pass used last."""
        if engine == "loop":
            self._engine = self._loop

    def add(self, batch: Batch, first: int) -> None:
        try:
            if self._checked_examples < min(2, size(batch)):
                self._check(cut(batch, 0, min(2, size(batch))))
            require_gradients(self._model, self._engine is self._loop)
            self._engine.add(batch, first)
        except Unsupported as reason:
            if self._choice == "batched":
                raise FishError(
                    f"the batched engine cannot score this model exactly: {reason}; use engine='auto' or "
                    "engine='loop', which takes one example at a time"
                ) from None
            name = type(self._model).__name__
            message = f"{name} is scored one example at a time by the loop engine, because {reason}"
            warnings.warn(message, UserWarning, stacklevel=5)
            self._engine = self._loop
            require_gradients(self._model, True)
            self._loop.add(batch, first)

    def _check(self, few: Batch) -> None:
        """Check one example if the first batch has no more, and two as soon as there are two."""
        self._checked_examples = size(few)
        require_gradients(self._model, True)
        whole, alone = check_independence(self._model, few, self._likelihood)
        if isinstance(self._engine, BatchedEngine):
            require_gradients(self._model, False)
            self._engine.check(few, whole, alone)


def checked_batches(batches: Iterable[Batch]) -> Iterable[Batch]:
    """Return ``batches``; refuse one batch in their place."""
    if isinstance(batches, Tensor | dict | str) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches must be an iterable of batches, got {type(batches).__name__}; wrap one batch: [batch]"
        )
    return batches


def check_finite(scores: Mapping[str, Tensor]) -> None:
    """Raise FishError if a score is not finite."""
    # One pass over each tensor; only a sum that is not finite needs the closer look (it may just be large).
    doubtful = [name for name, score in scores.items() if not bool(score.sum().isfinite())]
    bad = [name for name in doubtful if not bool(scores[name].isfinite().all())]
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise FishError(
            f"scores must be finite, but those of {shown} are not: a weight, an input or a gradient is infinite or "
            "not a number, or too large for its dtype; check the model on this data, or score it in float32"
        )


def _told(numbers: list[float]) -> str:
    return ", ".join(f"{number:.4g}" for number in numbers)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
