"""Masks that workers choose together: scores are added up by shards, and the best entries of all found once."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from fishmask.container import bytes_tensor, decode_indices, encode_indices
from fishmask.handshake import agree
from fishmask.mask import Mask, Patterns
from fishmask.merge import ordered_sum
from fishmask.select import Keys, budget, check_scores, collect, divide, threshold, warn_of_zeros
from fishmask.wire import Wire

_BLOCK = 1 << 20  # scores that each worker adds up at once


def choose(
    scores: Mapping[str, Tensor],
    density: float,
    keep: Patterns = (),
    exclude: Patterns = (),
    *,
    group: dist.ProcessGroup | Wire | None = None,
) -> Mask:
    """Choose one mask for all workers from the sum of their scores; all must call it, and get the same.

    Equal to ``Mask.from_scores`` on the sum, which is taken in float64 in the order of the ranks and then rounded to
    float32, unless there are float64 scores. No worker ever holds more than its own scores and 1/W of the sum. A worker
    sends (W - 1)/W n numbers, half a megabyte twice, and the chosen entries at about a byte each.

    Args:
        scores: This worker's scores, such as of its share of the examples (``fishmask.fisher`` sums, so shares add up).
        density: As for ``Mask.from_scores``, and so are ``keep`` and ``exclude``.
        keep: The same.
        exclude: The same.
        group: The process group, or a wire of it to count on; by default that of all workers.

    Raises:
        ValueError: As for ``Mask.from_scores``.
        HandshakeError: The workers' scores are not of one model, one worker's are not finite, or the arguments differ.
        RoundError: The connection broke off.

    Source:
        Sections 2 and 3 of the paper, where one process sums the Fisher information of all samples.
    """
    wire = group if isinstance(group, Wire) else Wire(group)
    kept, free, k = _agreed_budget(wire, scores, density, keep, exclude)
    chosen, _ = _best(wire, {name: scores[name] for name in free}, k)
    mask = _mask(scores, kept, free, chosen)
    agree(wire, {"chosen mask": mask.digest})
    return mask


def deal(
    scores: Mapping[str, Tensor],
    density: float,
    keep: Patterns = (),
    exclude: Patterns = (),
    *,
    group: dist.ProcessGroup | Wire | None = None,
) -> Mask:
    """Choose masks of the workers' own from the sum of their scores, disjoint but for the kept parameters.

    The best W k entries of all are dealt out in the order of their scores: worker w gets the best but w, the best but
    w + W, and so on. What is kept all workers get. Arguments and errors are those of ``choose``; ``density`` is that of
    each worker.

    Returns:
        The mask of this worker.

    Source:
        Section 3 of the paper (GLUE).
    """
    wire = group if isinstance(group, Wire) else Wire(group)
    kept, free, k = _agreed_budget(wire, scores, density, keep, exclude)
    room = sum(scores[name].numel() for name in free)
    if wire.size * k > room:
        raise ValueError(
            f"{wire.size} workers with {k:,} entries each need {wire.size * k:,}, but only {room:,} are free to "
            "choose; lower the density"
        )
    coordinates, mine = _best(wire, {name: scores[name] for name in free}, wire.size * k)
    parts = wire.gather_bytes(mine.numpy().astype("<f8").tobytes())
    best = np.concatenate([np.frombuffer(part, "<f8") for part in parts])
    order = np.argsort(-best, kind="stable")
    dealt = torch.from_numpy(np.sort(coordinates.numpy()[order[wire.rank :: wire.size]]))
    return _mask(scores, kept, free, dealt)


def gather_masks(wire: Wire, mask: Mask) -> list[Mask]:
    """Return the masks of all workers in the order of their ranks; all must know the same shapes."""
    sizes = {name: shape.numel() for name, shape in mask.shapes.items()}
    return [Mask(_unpack(data, sizes), mask.shapes) for data in wire.gather_bytes(_pack(mask.indices, sizes))]


def _agreed_budget(
    wire: Wire, scores: Mapping[str, Tensor], density: float, keep: Patterns, exclude: Patterns
) -> tuple[list[str], list[str], int]:
    """Return kept names, free names and the number of free entries to choose, once all workers have the same."""
    sizes = {name: score.numel() for name, score in scores.items()}
    try:
        parts = budget(sizes, density, keep, exclude)
        check_scores({name: scores[name] for name in parts[1]})
        wrong = ""
    except (TypeError, ValueError) as error:
        wrong = str(error)
    shapes = {name: f"{score.dtype} {tuple(score.shape)}" for name, score in scores.items()}
    request = json.dumps([density, keep, exclude])
    agree(wire, {"scores": wrong or "usable", "shapes of the scores": shapes, "density, keep, exclude": request})
    if wrong:
        raise ValueError(wrong)
    return parts


def _best(wire: Wire, scores: Mapping[str, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return the sorted coordinates of the k largest sums over parameters laid end to end, and those in this share."""
    first, sums = _shard(wire, scores)
    # Finite scores may add up to infinity.
    finite = bool(wire.gather(sums.isfinite().all().view(1).to(torch.uint8)).all())
    if not finite:
        raise ValueError("the workers' scores add up to infinity: make them smaller, by the same factor everywhere")
    source = Keys({"": sums}, sums.dtype)
    if k == 0:
        return torch.empty(0, dtype=torch.int64), sums[:0].double().cpu()
    limit, ties = threshold(source, k, wire.add)
    if limit <= 0:
        warn_of_zeros(k, int(wire.add(sums.count_nonzero())))
    # Of those that tie with the last one, the lowest coordinates count: those of earlier ranks first.
    mine = sum(int((keys == limit).sum()) for keys in source.chunks(""))
    before = int(wire.gather(torch.tensor([mine]))[: wire.rank].sum())
    places = collect(source, limit, max(0, min(mine, ties - before))).get("", torch.empty(0, dtype=torch.int64))
    total = {"": sum(score.numel() for score in scores.values())}
    found = [_unpack(data, total) for data in wire.gather_bytes(_pack({"": places + first}, total))]
    return torch.cat([item.get("", places[:0]) for item in found]), sums.cpu()[places].double()


def _shard(wire: Wire, scores: Mapping[str, Tensor]) -> tuple[int, Tensor]:
    """Return the first coordinate of this worker's share of all scores, and the sum of that share over all workers."""
    total = sum(score.numel() for score in scores.values())
    double = any(score.dtype == torch.float64 for score in scores.values())
    dtype = torch.float64 if double else torch.float32
    share = -(-total // wire.size)
    parts = [torch.empty(0, dtype=dtype, device=wire.device)]
    for start in range(0, share, _BLOCK):
        width = min(_BLOCK, share - start)
        rows = torch.zeros(wire.size, width, dtype=dtype, device=wire.device)
        for worker, row in enumerate(rows):
            _cut(scores, worker * share + start, row)
        parts.append(ordered_sum(row.double() for row in wire.swap(rows)).to(dtype))
    first = min(wire.rank * share, total)
    return first, torch.cat(parts)[: max(0, min(share, total - first))]


def _cut(scores: Mapping[str, Tensor], start: int, row: Tensor) -> None:
    """Copy the scores from ``start`` on, all of them laid end to end, to a row as far as they go."""
    begin = 0
    for score in scores.values():
        first, last = max(start, begin), min(start + len(row), begin + score.numel())
        if first < last:
            row[first - start : last - start] = score.detach().reshape(-1)[first - begin : last - begin]
        begin += score.numel()


def _mask(scores: Mapping[str, Tensor], kept: Sequence[str], free: Sequence[str], coordinates: Tensor) -> Mask:
    """Build the mask of kept parameters and of coordinates over the free ones."""
    chosen = divide(coordinates, {name: scores[name].numel() for name in free})
    whole = {name: torch.arange(scores[name].numel()) for name in kept}
    return Mask(chosen | whole, {name: score.shape for name, score in scores.items()})


def _pack(indices: Mapping[str, Tensor], sizes: Mapping[str, int]) -> bytes:
    """Code indices with the codec of mask files."""
    planes, lengths = encode_indices(indices, sizes)
    head = json.dumps([sum(len(flat) for flat in indices.values()), *lengths]).encode()
    return head + b"\n" + planes.numpy().tobytes()


def _unpack(data: bytes, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    head, _, planes = data.partition(b"\n")
    k, *lengths = json.loads(head)
    return decode_indices(bytes_tensor(planes), lengths, k, sizes)
