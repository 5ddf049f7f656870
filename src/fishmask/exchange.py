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
from fishmask.select import Keys, budget, collect, divide, threshold
from fishmask.wire import Wire

_BLOCK = 1 << 20  # scores that each worker adds up at once


def choose(
    scores: Mapping[str, Tensor],
    density: float,
    keep: Patterns = (),
    exclude: Patterns = (),
    *,
    group: dist.ProcessGroup | None = None,
) -> Mask:
    """Choose one mask for all workers from the sum of their scores; all must call it, and get the same.

    Equal to ``Mask.from_scores`` on the sum, which is taken in float64 in the order of the ranks. No worker ever holds
    more than its own scores and 1/W of the sum. A worker sends (W - 1)/W n numbers, half a megabyte twice, and the
    chosen entries at about a byte each.

    Args:
        scores: This worker's scores, such as of its share of the examples (``fishmask.fisher`` sums, so shares add up).
        density: As for ``Mask.from_scores``, and so are ``keep`` and ``exclude``.
        keep: The same.
        exclude: The same.
        group: The process group; by default that of all workers.

    Raises:
        ValueError: As for ``Mask.from_scores``.
        HandshakeError: The workers' scores are not of one model, are not finite, or their arguments differ.
        RoundError: The connection broke off.

    Source:
        Sections 2 and 3 of the paper, where one process sums the Fisher information of all samples.
    """
    wire = Wire(group)
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
    group: dist.ProcessGroup | None = None,
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
    wire = Wire(group)
    kept, free, k = _agreed_budget(wire, scores, density, keep, exclude)
    room = sum(scores[name].numel() for name in free)
    if wire.size * k > room:
        raise ValueError(
            f"{wire.size} workers with {k:,} entries each need {wire.size * k:,}, but only {room:,} are free to "
            "choose; lower the density"
        )
    coordinates, best = _best(wire, {name: scores[name] for name in free}, wire.size * k)
    order = np.argsort(-best.numpy(), kind="stable")
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
        bad = [name for name, score in scores.items() if not bool(score.isfinite().all())]
        wrong = f"not finite: {', '.join(bad)}" if bad else ""
    except (TypeError, ValueError) as error:
        wrong = str(error)
    shapes = {name: f"{score.dtype} {tuple(score.shape)}" for name, score in scores.items()}
    request = json.dumps([density, keep, exclude])
    agree(wire, {"scores": wrong or "usable", "shapes of the scores": shapes, "density, keep, exclude": request})
    if wrong:
        raise ValueError(wrong)
    return parts


def _best(wire: Wire, scores: Mapping[str, Tensor], k: int) -> tuple[Tensor, Tensor]:
    """Return the sorted coordinates of the k largest sums over parameters laid end to end, and these sums."""
    first, sums = _shard(wire, scores)
    source = Keys({"": sums}, torch.float32)
    if k == 0:
        return torch.empty(0, dtype=torch.int64), sums[:0].cpu()
    limit, ties = threshold(source, k, wire.add)
    # Of those that tie with the last one, the lowest coordinates count: those of earlier ranks first.
    mine = sum(int((keys == limit).sum()) for keys in source.chunks(""))
    before = int(wire.gather(torch.tensor([mine]))[: wire.rank].sum())
    places = collect(source, limit, max(0, min(mine, ties - before))).get("", torch.empty(0, dtype=torch.int64))
    total = {"": sum(score.numel() for score in scores.values())}
    found = [_unpack(data, total) for data in wire.gather_bytes(_pack({"": places + first}, total))]
    coordinates = torch.cat([item.get("", places[:0]) for item in found])
    parts = wire.gather_bytes(sums.cpu()[places].numpy().astype("<f4").tobytes())
    return coordinates, torch.from_numpy(np.concatenate([np.frombuffer(part, "<f4") for part in parts]).astype("f4"))


def _shard(wire: Wire, scores: Mapping[str, Tensor]) -> tuple[int, Tensor]:
    """Return the first coordinate of this worker's share of all scores, and the sum of that share over all workers."""
    total = sum(score.numel() for score in scores.values())
    share = -(-total // wire.size)
    parts = []
    for start in range(0, share, _BLOCK):
        width = min(_BLOCK, share - start)
        rows = torch.stack([_cut(scores, w * share + start, width) for w in range(wire.size)])
        parts.append(_ordered_sum(wire.swap(rows)))
    first = min(wire.rank * share, total)
    sums = torch.cat(parts) if parts else torch.empty(0)
    return first, sums[: max(0, min(share, total - first))]


def _ordered_sum(rows: Tensor) -> Tensor:
    total = torch.zeros_like(rows[0], dtype=torch.float64)
    for row in rows:
        total += row.double()
    return total.float()


def _cut(scores: Mapping[str, Tensor], start: int, width: int) -> Tensor:
    """Return a run of the scores laid end to end, with zeros beyond their end."""
    parts, begin = [], 0
    for score in scores.values():
        end = begin + score.numel()
        if begin < start + width and end > start:
            parts.append(score.detach().reshape(-1)[max(0, start - begin) : start + width - begin].float())
        begin = end
    run = torch.cat(parts) if parts else torch.empty(0)
    return torch.nn.functional.pad(run, (0, width - len(run)))


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
