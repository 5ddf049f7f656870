"""The fast engine: one forward and one backward for a whole batch, the exact sum over examples for each parameter.

What is summed is the square of each example's gradient or its absolute value (`Power`). The parameters are frozen, so
autograd computes derivatives by activations only. A `TorchFunctionMode` sees each call that uses a parameter and
records rules for it (`calls`), which turn dY into per-example gradients (`rules`) while the backward runs. No
[B, O, I] tensor and no .grad is made: memory is the scores, the activations of the batch and one layer of scratch.

Where only some of the parameters are scored (`passes`), calls that use none of those are made as they are: nothing is
kept for them, and the backward ends at the first parameter that is scored.

Whatever it cannot prove exact it refuses before any score is touched:

- a parameter in a call that has no rule, or in a custom autograd function (found by walking the plain graph);
- an input that is changed in place after its use;
- an output whose first dimension only looks like the examples: on two examples, a trial backward for each must leave
  exact zeros in the rows of the other;
- a recorded forward whose output is not that of the plain model.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.overrides import resolve_name
from torch.utils.checkpoint import CheckpointError

from fishmask.batches import Batch, size
from fishmask.calls import HANDLERS, VIEWS
from fishmask.errors import FishError
from fishmask.guards import Guard, same, walk
from fishmask.likelihoods import Evaluation, Likelihood
from fishmask.rules import Rule, View
from fishmask.sums import Sums

# After these the rows of an activation may be in an order that depends on the data (as in mixtures of experts): a trial
# on one batch would prove nothing about the next.
_REORDERING = {
    getattr(owner, name)
    for owner in (torch, Tensor)
    for name in ("nonzero", "topk", "sort", "argsort", "unique", "masked_select")
}


_CASTS = (Tensor.to, Tensor.float, Tensor.type_as, Tensor.contiguous)


class Unsupported(Exception):
    """The batched engine cannot score this model exactly; the scores are untouched."""


class Recording(Guard):
    """Records one forward pass: which calls use which scored parameter, and what their rules need.

    The other parameters are known too, since a call may use one of either kind; their rules are not recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        scores: Mapping[str, Tensor],
        B: int,
        receive: Callable[[list[Rule], Tensor], None],
    ) -> None:
        super().__init__(model)
        self.B = B
        self._reordering = ""  # the function that may have changed the order of rows
        self.rules: list[Rule] = []
        self._scores, self._receive = scores, receive
        self._views = {id(p): View(name, p, lambda whole: whole) for name, p in parameters.items()}
        self._kept: list[tuple[Tensor, int, str]] = []
        self._now = ("", "")  # parameter and function of the call that is being made

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make one call; if it uses a parameter, by its handler."""
        kwargs = kwargs or {}
        self.check(func, args, kwargs)
        views = [*self._found(args), *self._found(tuple(kwargs.values()))]
        scored = next((view for view in views if view.name in self._scores), None)
        if scored is None:
            if func in _REORDERING or _selects(func, args, kwargs):
                self._reordering = _named(func)
            result = func(*args, **kwargs)
            if views and func in VIEWS:
                for part in _tensors(result):
                    self._views.setdefault(id(part), View(views[0].name, part, lambda whole: whole))
            return result
        before, self._now = self._now, (scored.name, _named(func))
        try:
            return self._use(func, args, kwargs)
        finally:
            self._now = before

    def _use(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in (Tensor.detach, Tensor.data.__get__, torch.detach):  # type: ignore[attr-defined]
            return func(*args, **kwargs)  # no gradient flows through these in any engine
        if func in HANDLERS or func in VIEWS:
            if not torch.is_grad_enabled():
                self.refuse("it is used under torch.no_grad(), as reentrant checkpointing does")
            if func in HANDLERS:
                return HANDLERS[func](self, *args, **kwargs)
            return self._alias(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name.endswith("_") and not name.endswith("__"):
            self.refuse("it changes the parameter in place")
        result = func(*args, **kwargs)
        if result is None or next(_tensors(result), None) is not None:
            self.refuse("no rule is known for it")  # None: it may have written the parameter into something
        return result  # a shape, a dtype, a flag

    def _found(self, values: Any) -> Iterator[View]:
        """Yield the parameters among ``values``, which may be nested."""
        for value in values:
            if isinstance(value, Tensor):
                if (view := self._views.get(id(value))) is not None:
                    yield view
            elif isinstance(value, list | tuple):
                yield from self._found(value)
            elif isinstance(value, dict):
                yield from self._found(value.values())

    def _alias(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look at a parameter in another way, and remember the result as a view of it."""
        source = self.view(args[0]) if args else None
        rest = args[1:]
        if source is None or any(self._found(rest)):
            self.refuse("no rule is known for it")
        if func is Tensor.__getitem__ and not _only_slices(rest[0]):
            self.refuse("it is indexed by something else than slices")
        of = source.of
        result = func(*args, **kwargs)
        if func in _CASTS:  # the entries stay where they are
            self._remember(View(source.name, result, of))
        elif isinstance(result, Tensor):
            self._remember(View(source.name, result, lambda whole: func(of(whole), *rest, **kwargs)))
        else:
            for i, part in enumerate(result):
                self._remember(View(source.name, part, partial(_part, func, of, rest, kwargs, i)))
        return result

    def _remember(self, view: View) -> None:
        whole = self._scores[view.name]
        seen = view.of(whole)
        if seen.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr() or seen.shape != view.tensor.shape:
            self.refuse("the result is a copy, not a view")
        self._views.setdefault(id(view.tensor), view)

    def view(self, value: Any) -> View | None:
        """Return the view that ``value`` is, None if it is no parameter."""
        return self._views.get(id(value)) if isinstance(value, Tensor) else None

    def keep(self, value: Tensor) -> Tensor:
        """Return an input that a rule needs later, watched for changes in place."""
        self._kept.append((value, value._version, self._told()))
        return value.detach()

    def record(self, out: Tensor, *rules: Rule) -> Tensor:
        """Return ``out``, wired so that the rules of scored parameters receive its derivative."""
        scored = [rule for rule in rules if rule.view.name in self._scores]
        if rules and not scored:
            return out
        if scored and self._reordering:
            self.refuse(f"{self._reordering} before it may have changed the order of the examples")
        if not out.requires_grad:
            out = out + torch.zeros((), dtype=out.dtype, device=out.device, requires_grad=True)
        self.rules += scored
        out.register_hook(partial(self._receive, scored))
        return out

    def refuse(self, reason: str) -> NoReturn:
        """Give up, naming parameter and function."""
        raise Unsupported(f"{self._told()}, and {reason}")

    def _told(self) -> str:
        return f"{self._now[0]} is used by {self._now[1]}"

    def check_kept(self) -> None:
        """Refuse if an input that a rule needs was changed in place after its use."""
        for value, version, told in self._kept:
            if value._version != version:
                raise Unsupported(f"{told}, whose input is changed in place afterwards")


class BatchedEngine:
    """Adds each example's squared or absolute gradients to sums, a batch at a time; parameters must be frozen.

    Args:
        model: The model.
        parameters: All its parameters by canonical name.
        likelihood: What is differentiated.
        sums: The sums of those parameters that are scored.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, nn.Parameter], likelihood: Likelihood, sums: Sums
    ) -> None:
        self.model, self.parameters, self.likelihood, self.sums = model, parameters, likelihood, sums
        self._foreign: list[Tensor] = []
        self._trial: int | None = None  # the example whose trial backward runs
        self._examples = 0
        self._uses: Counter[str] = Counter()
        self._waiting: dict[str, list[Rule]] = {}
        self._buffer = torch.empty(0, device=sums.device)

    def check(self, batch: Batch, whole: Tensor, alone: Tensor) -> None:
        """Try the engine on a batch of few examples.

        One size that works vouches for all: a dimension that is as long as the batch by chance is not for both sizes,
        and the trial backwards see it if it is.

        Args:
            batch: One example or more.
            whole: The model's plain output on it.
            alone: The output for one example, with the graph in which the parameters require gradients.

        Raises:
            Unsupported: The engine cannot score the model exactly.
        """
        reached, custom, self._foreign = walk(alone, self.parameters)
        for name, function in custom.items():
            if name in self.sums.tensors:
                raise Unsupported(
                    f"{name} is used by the custom autograd function {function}, and no rule is known for it"
                )
        recording, evaluation = self._forward(batch, 0)
        for name in sorted((reached & self.sums.tensors.keys()) - {rule.view.name for rule in recording.rules}):
            raise Unsupported(f"{name} is used by code that the batched engine does not see")
        if not same(evaluation.output.detach(), whole, 0.0):
            raise Unsupported(f"{next(iter(self.sums.tensors))} or others change the output when they are recorded")
        if not evaluation.output.requires_grad:
            return  # none of the scored parameters has a part in the output
        with self._foreign_gradients_kept():
            for n in range(recording.B):
                self._try(n, recording, evaluation.output)

    def add(self, batch: Batch, first: int) -> None:
        """Score ``batch``, whose first example is number ``first`` of the run.

        Raises:
            Unsupported: The scores are untouched then.
        """
        recording, evaluation = self._forward(batch, first)
        if not evaluation.output.requires_grad:
            return  # this batch went a way through the model that uses no parameter
        self._uses = Counter(rule.view.name for rule in recording.rules)
        with self._foreign_gradients_kept():
            for number, cotangent in enumerate(evaluation.cotangents(), start=1):
                evaluation.output.backward(cotangent, retain_graph=number < evaluation.passes)
                self._flush()

    def _forward(self, batch: Batch, first: int) -> tuple[Recording, Evaluation]:
        self._examples = size(batch)
        recording = Recording(self.model, self.parameters, self.sums.tensors, self._examples, self._receive)
        try:
            with recording:
                evaluation = self.likelihood(self.model, batch, first)
        except (FishError, torch.OutOfMemoryError):
            raise
        except RuntimeError as error:
            # The plain forward of the first batch went well, so this comes from being recorded: code that depends on
            # a shape, such as [1, S] where a lookup now gives [B, S].
            raise Unsupported(f"the forward fails while it is recorded ({error})") from error
        recording.check_kept()
        return recording, evaluation

    def _try(self, n: int, recording: Recording, output: Tensor) -> None:
        """Go backward from one example: no other may get anything."""
        cotangent = torch.zeros_like(output)
        cotangent[n] = torch.linspace(0.5, 1.5, max(1, cotangent[n].numel())).view(cotangent[n].shape)
        self._trial = n
        try:
            output.backward(cotangent, retain_graph=True)
        except CheckpointError as error:
            name = recording.rules[0].view.name
            raise Unsupported(f"{name} and others are used under gradient checkpointing") from error
        finally:
            self._trial = None

    def _receive(self, rules: list[Rule], dY: Tensor) -> None:
        if self._trial is not None:
            self._check_trial(rules, dY, self._trial)
            return
        for rule in rules:
            rule.receive(dY)
            name = rule.view.name
            if self._uses[name] == 1:
                with self.sums.adding(name) as total:
                    rule.sum_(self.likelihood.power, rule.view.of(total), self._scratch)
                rule.forget()
                continue
            waiting = self._waiting.setdefault(name, [])
            waiting.append(rule)
            if len(waiting) == self._uses[name]:
                self._sum_together(name, self._waiting.pop(name))

    def _check_trial(self, rules: list[Rule], dY: Tensor, n: int) -> None:
        rows = dY.reshape(self._examples, -1)
        if rules and (rows[:n].count_nonzero() or rows[n + 1 :].count_nonzero()):
            raise Unsupported(
                f"{rules[0].view.name} is used where the first dimension is not the examples (positions first, or "
                "examples mixed)"
            )

    def _flush(self) -> None:
        """Sum what still waits: some of the uses had no part in the output."""
        for name, rules in self._waiting.items():
            self._sum_together(name, rules)
        self._waiting.clear()

    def _sum_together(self, name: str, rules: list[Rule]) -> None:
        """Add the gradients of all uses of a parameter, example by example, and take the power of the sum."""
        with self.sums.adding(name) as total:
            for n in range(self._examples):
                gradient = self._scratch(total.shape).zero_()
                for rule in rules:
                    rule.add_(n, rule.view.of(gradient))
                self.likelihood.power.add_(total, gradient)
        for rule in rules:
            rule.forget()

    def _scratch(self, shape: torch.Size) -> Tensor:
        """Return uninitialised memory of one layer, the same for all."""
        if self._buffer.numel() < shape.numel():
            self._buffer = torch.empty(shape.numel(), device=self._buffer.device)
        return self._buffer[: shape.numel()].view(shape)

    @contextmanager
    def _foreign_gradients_kept(self) -> Iterator[None]:
        """Leave no trace in tensors that are not the model's, such as a teacher's weights in a loss."""
        before = [leaf.grad for leaf in self._foreign]
        for leaf in self._foreign:
            leaf.grad = None
        try:
            yield
        finally:
            for leaf, gradient in zip(self._foreign, before, strict=True):
                leaf.grad = gradient


def _part(
    func: Callable[..., Any],
    of: Callable[[Tensor], Tensor],
    rest: tuple[Any, ...],
    kwargs: dict[str, Any],
    number: int,
    whole: Tensor,
) -> Tensor:
    """Return one of the views that ``chunk`` and the like make."""
    part: Tensor = func(of(whole), *rest, **kwargs)[number]
    return part


def _named(func: Callable[..., Any]) -> str:
    return str(resolve_name(func) or getattr(func, "__name__", func))


def _selects(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call finds or takes the true places of a mask."""
    if func is torch.where:
        return len(args) + len(kwargs) == 1
    if func is not Tensor.__getitem__:
        return False
    parts = args[1] if isinstance(args[1], tuple) else (args[1],)
    return any(isinstance(part, Tensor) and part.dtype == torch.bool for part in parts)


def _only_slices(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(part is None or part is Ellipsis or isinstance(part, slice) for part in parts)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
