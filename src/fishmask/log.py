"""The checkpoint log: a training's base once, its mask once, then one small immutable file per commit.

A third use of a fixed mask besides small deltas and small exchanges (the paper's "efficient checkpointing"): a
checkpoint holds the masked entries only. A commit here holds all k values and the optimizer's state over them, so that
a restore walks no chain within one mask, and once acknowledged it survives the death of the process and a loss of
power. ``docs/checkpoints.md`` is the guide.
"""

import operator
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from time import perf_counter
from typing import Any
from weakref import ref

import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn
from torch.optim import Optimizer

from fishmask import history, sharded, tree
from fishmask import rng as generators
from fishmask.attach import Tuning
from fishmask.container import Content
from fishmask.errors import FishError
from fishmask.fingerprint import raw_bits
from fishmask.folder import Commit, LogFolder, commit_of
from fishmask.follow import Followed, Overlay, lay_over, left_entries
from fishmask.history import Problem, Reference, Segment, Snapshot, changes, write_entries
from fishmask.live import tuning_of
from fishmask.mask import Mask
from fishmask.moments import check_members, gather
from fishmask.params import take
from fishmask.publish import make_folder, remove, replace_file
from fishmask.resume import Restored, check_base, check_buffers, check_request, fill, resume, whole_state


class CheckpointLog:
    """A folder of commits of one training.

    The first commit stores the base and the mask; a change of mask costs one file more. Commits are immutable. One
    process at a time may write to a log; anyone may read it meanwhile.

    Args:
        path: The folder; made at the first commit.
        store_base: Whether to keep the base's weights in the log, which makes it complete. Without them, a log of a
            well-known pretrained model stays small, and a restore takes a model that holds these weights.
        keep_last: Keep only this many of the newest commits; by default all, or with ``keep_every`` the newest one.
        keep_every: Keep besides every commit whose number this divides.

    Raises:
        ValueError: A number below 1.

    Example:
        >>> import tempfile, fishmask
        >>> model = nn.Linear(4, 2)
        >>> tuning = fishmask.attach(model, Mask.from_indices({"weight": [1, 6]}))
        >>> optimizer = torch.optim.AdamW(tuning.parameters())
        >>> log = CheckpointLog(tempfile.mkdtemp())
        >>> log.commit(tuning, optimizer, step=1).number
        1
        >>> log.restore(model, optimizer).step
        1
        >>> log.close()
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        store_base: bool = True,
        keep_last: int | None = None,
        keep_every: int | None = None,
    ) -> None:
        for name, number in (("keep_last", keep_last), ("keep_every", keep_every)):
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self.path = Path(path)
        self._store_base, self._keep_last, self._keep_every = store_base, keep_last, keep_every
        self._folder = LogFolder(self.path)
        self._followed: Followed | None = None
        self._executor: ThreadPoolExecutor | None = None
        self._pending: Future[Commit] | None = None

    def __enter__(self) -> "CheckpointLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"CheckpointLog({str(self.path)!r}, {len(self.numbers)} commits)"

    # --- reading ------------------------------------------------------------------------------------------------------

    @property
    def commits(self) -> list[Commit]:
        """All commits whose header can be read, oldest first, as it says; ``verify`` names the others."""
        return self._folder.commits()

    @property
    def numbers(self) -> list[int]:
        """The numbers of all commits, ascending; no file is opened."""
        return self._folder.numbers

    def read(self, at: int | None = None) -> tuple[Commit, list[Segment], Snapshot]:
        """Return a commit, the segments that it builds on (oldest first), and what it holds.

        Args:
            at: Number of the commit; by default the newest.

        Raises:
            FishError: There is no such commit, or a file is damaged.
        """
        found, chain, _ = self._folder.newest_intact(at, allow_older=False)
        commit = commit_of(self._folder.path_of("commit", found.file.number), found.metadata, found.size)
        return commit, chain, found.snapshot

    def mask(self, at: int | None = None) -> Mask:
        """Return the mask of a commit, so that a script that resumes need not choose it again.

        Args:
            at: Number of the commit; by default the newest.

        Raises:
            FishError: There is no such commit, or a file is damaged.
        """
        return self.read(at)[1][-1].mask

    def restore(
        self,
        model: nn.Module | Tuning,
        optimizer: Optimizer | None = None,
        *,
        state: Mapping[str, Any] | None = None,
        at: int | None = None,
        allow_older: bool = False,
        rng: bool = True,
    ) -> Restored:
        """Bring a model, and what trains it, to the state of a commit.

        Training that goes on from here equals the training that was never interrupted; on the CPU bit for bit. An
        attached model gets the log's base, the commit's mask, its values and its buffers, and this log then takes
        commits of it. A model that is not attached gets the weights and buffers of the commit, and nothing else
        happens. Files are verified and compared with the arguments before anything is changed.

        Args:
            model: The model or its ``Tuning``.
            optimizer: The optimizer of the tuning's values; it gets its state and the options of its groups.
            state: Objects with ``load_state_dict``, by the names that they had in the commit.
            at: Number of the commit; by default the newest.
            allow_older: Use an older commit where the newest one is damaged.
            rng: Whether to set the generators of random numbers too.

        Returns:
            Which commit it is, what it had besides, and what was skipped.

        Raises:
            FishError: No such commit, a damaged file, a model of another structure, without a stored base another base,
                or a tuning that rounds otherwise than that of the commit.
            ValueError: The optimizer or ``state`` does not fit.
        """
        tuning = model if isinstance(model, Tuning) else tuning_of(model)
        plain = model.model if isinstance(model, Tuning) else tuning.model if tuning else model
        if tuning is not None and not tuning.attached:
            raise FishError("this Tuning is no longer attached to its model: pass the model, or attach it again")
        sharded.refuse(plain, "CheckpointLog")
        if tuning is None and (optimizer is not None or state):
            raise ValueError(
                "an optimizer and other state can only be restored with an attached model: call fishmask.attach first"
            )
        if tuning is not None and optimizer is not None:
            check_members(dict(tuning.named_parameters()), optimizer)
        self.wait()
        newest = max(self.numbers, default=0)
        found, chain, skipped = self._folder.newest_intact(at, allow_older)
        path, snapshot = self._folder.path_of("commit", found.file.number), found.snapshot
        check_request(snapshot, optimizer, state or {}, path)
        kept = found.metadata.get("rounding", "nearest")
        if tuning is not None and kept != _rounding(tuning):
            raise FishError(
                f"{path} was written with rounding {kept}, the model is attached with {_rounding(tuning)}, so the same "
                "values would make other weights: attach it with the rounding and rounding_seed of the commit"
            )
        known, base = self._following(tuning), None
        if known is None or known.originals != chain[-1].base or not known.base_unchanged():
            base = history.read_base(self.path, chain[-1].base.number, chain[-1].base.digest)
            check_base(base, plain, tuning)
        check_buffers(snapshot, plain, path)
        if tuning is not None:
            for name, held in (state or {}).items():  # first: one that refuses its state leaves the model as it was
                held.load_state_dict(snapshot.state[name])
            resume(tuning, optimizer, base, chain, snapshot)
            below: Overlay = {}
            for segment in chain:
                lay_over(below, segment.sealed)
            self._followed = Followed(
                ref(tuning), tuning.mask, chain[-1].base, chain[-1], found.file, newest, below, tuning.loads
            )
            if rng:
                generators.reinstate({**chain[-1].rng, **snapshot.rng})
        elif base is not None:
            fill(plain, base, chain, snapshot)
        commit = commit_of(path, found.metadata, found.size)
        return Restored(commit, commit.step, snapshot.state, skipped, tuning)

    def verify(self) -> list[Problem]:
        """Read every byte of every file and follow every reference.

        Returns:
            The files that are damaged, or that need one that is; none when the log is sound.
        """
        return self._folder.verify()

    def export(self, folder: str | os.PathLike[str], *, at: int | None = None, model: nn.Module | None = None) -> Path:
        """Write the whole model of a commit as a plain ``model.safetensors`` that needs no fishmask.

        The configuration of a transformers model is written beside it, so that ``from_pretrained`` takes the folder.

        Args:
            folder: The folder to write; made when missing.
            at: Number of the commit; by default the newest.
            model: The base model, for a log that does not store it; it is not changed.

        Returns:
            The file.

        Raises:
            FishError: A file is damaged; or the log does not store its base and ``model`` is missing or another one.
        """
        found, chain, _ = self._folder.newest_intact(at, allow_older=False)
        base = history.read_base(self.path, chain[-1].base.number, chain[-1].base.digest)
        if base.fingerprint is not None and model is None:
            raise FishError(f"{self.path} does not store its base: pass the base model as model= (--base NAME)")
        tensors = whole_state(base, changes(chain, found.snapshot), found.snapshot, model)
        folder = Path(folder)
        make_folder(folder)
        replace_file(folder / "model.safetensors", [safetensors_bytes(tensors, {"format": "pt"})])
        if base.config is not None:
            replace_file(folder / "config.json", [base.config.encode()])
        return folder / "model.safetensors"

    # --- writing ------------------------------------------------------------------------------------------------------

    def commit(
        self,
        tuning: Tuning,
        optimizer: Optimizer | None = None,
        *,
        step: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> Commit:
        """Keep the present state of a training; on return it is durable.

        Commit between steps: a gradient that has not been used yet is not kept. The states of the generators of
        random numbers (Python, numpy, PyTorch and its CUDA devices) always are.

        Args:
            tuning: The attached model's tuning.
            optimizer: The optimizer of its values.
            step: The number of the training step.
            state: What else a resuming training needs, by name: objects with ``state_dict()`` (a scheduler, a
                ``GradScaler``, a data loader) or plain values (see ``fishmask.tree.pack``), such as the position in
                the data.

        Returns:
            The commit.

        Raises:
            FishError: Another process writes to this log; the log holds another training, or this one and has not been
                restored; the base was changed.
            ValueError: The optimizer trains something else.
            TypeError: Something in ``state`` cannot be kept.
            OSError: The files cannot be written, for instance because the disk is full. All earlier commits are as
                they were, and the next call may try again.
        """
        begin = perf_counter()
        return self._finish(*self._prepare(tuning, optimizer, step, state), begin)

    def commit_async(
        self,
        tuning: Tuning,
        optimizer: Optimizer | None = None,
        *,
        step: int = 0,
        state: Mapping[str, Any] | None = None,
    ) -> "Future[Commit]":
        """Copy the present state of a training and write it while the training goes on.

        At most one such commit is under way: the next call of any method that writes or restores waits for it, and
        raises its error. A first commit and one after a change of mask write their large part before returning.

        Args:
            tuning: As for ``commit``, and so are the other arguments and the errors.
            optimizer: The same.
            step: The same.
            state: The same.

        Returns:
            The commit to come; ``result()`` waits until it is durable.
        """
        begin = perf_counter()
        prepared = self._prepare(tuning, optimizer, step, state)
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fishmask-commit")
        self._pending = self._executor.submit(self._finish, *prepared, begin)
        return self._pending

    def wait(self) -> None:
        """Wait for the commit that is under way, if any, and raise its error."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Wait for the commit that is under way and let other processes write; the object can be used again."""
        try:
            self.wait()
        finally:
            if self._executor is not None:
                self._executor.shutdown()
                self._executor = None
            self._folder.release()

    def reinstate(self, at: int) -> Commit:
        """Make a copy of an earlier commit the newest one, so that training resumes from there; nothing is lost.

        Raises:
            FishError: There is no such commit, a file is damaged, or another process writes to this log.
        """
        begin = perf_counter()
        self.wait()
        self._folder.existing(at)  # before a folder is made
        self._claim()
        found, _, _ = self._folder.newest_intact(at, allow_older=False)
        self._followed = None  # the training that it followed has not gone back
        return replace(self._folder.copy_commit(found, found.segment), seconds=perf_counter() - begin)

    def delete(self, number: int) -> None:
        """Delete a commit, if it is there; the others do not need it."""
        self.wait()
        remove(self._folder.path_of("commit", number))
        if self._followed is not None and self._followed.newest == number:  # what is newer is another process's
            self._followed.newest = max((n for n in self.numbers if n <= number), default=0)

    def compact(self) -> Commit:
        """Fold the newest commit and all that it builds on into a new base, and delete everything else.

        The old files are deleted once the new ones have been read back and hold the same model, bit for bit. The
        original base is given up, and with it the way back to it.

        Returns:
            The only commit that is left.

        Raises:
            FishError: The log does not store its base, a file is damaged, or another process writes to this log.
        """
        begin = perf_counter()
        self.wait()
        self._folder.existing(None)  # before a folder is made
        self._claim()
        found, chain, _ = self._folder.newest_intact(None, allow_older=False)
        old = history.read_base(self.path, chain[-1].base.number, chain[-1].base.digest)
        if old.fingerprint is not None:
            raise FishError(f"{self.path} does not store its base, so there is nothing to fold the commits into")
        files = self._folder.files()
        write_entries(old.weights, changes(chain, found.snapshot))
        commit: Commit | None = None
        try:
            # Buffers stay the old base's: commits hold those that differ from it.
            number = self._folder.free("base")
            base = self._folder.add("base", number, history.base_content(number, replace(old, name=None)))
            new = history.read_base(self.path, base.number, base.digest)
            segment = self._folder.add_segment(replace(chain[-1], base=base, parent=None, sealed={}))
            commit = self._folder.copy_commit(found, segment.file)
            again, chain_again = history.read_all(self.path, commit.number)
            write_entries(new.weights, changes(chain_again, again.snapshot))
            if not (history.same_bits(old.weights, new.weights) and history.same_bits(old.buffers, new.buffers)):
                raise FishError(f"{self.path}: what was written does not read back as it was; the old files are kept")
        except BaseException:
            with suppress(OSError):  # what was half made would be in the way on a full disk
                if commit is not None:
                    remove(commit.path)
                self._folder.remove_unused(self._needed())
            raise
        followed, self._followed = self._followed, None
        if followed is not None and followed.last == found.file and (tuning := followed.tuning()) is not None:
            touched = tuning.originals.indices
            bits = {name: (index, take(raw_bits(old.weights[name]), index)) for name, index in touched.items()}
            # After a commit of another mask that failed, the folded segment is not that of the tuning's mask.
            mask = followed.mask if followed.segment.file == found.segment else chain[-1].mask
            self._followed = replace(
                followed, mask=mask, segment=segment, last=again.file, newest=commit.number, below=bits
            )
        self._folder.discard(files)
        return replace(commit, seconds=perf_counter() - begin)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _following(self, tuning: Tuning | None) -> Followed | None:
        """Return where in the log a tuning stands; None when the log does not follow this one."""
        known = self._followed
        return known if known is not None and tuning is not None and known.tuning() is tuning else None

    def _claim(self) -> None:
        """Take the lock, forget what another process has overtaken, and clear away what a crash may have left."""
        if self._folder.claimed:
            return
        self._folder.claim()
        if (known := self._followed) is not None:
            newest = max(self.numbers, default=0)
            if newest != known.newest or not self._folder.holds("segment", known.segment.file):
                self._followed = None
        self._folder.tidy(self._needed())

    def _needed(self) -> Reference | None:
        """Return the segment of a commit that failed and may be tried again."""
        return self._followed.segment.file if self._followed is not None else None

    def _prepare(
        self, tuning: Tuning, optimizer: Optimizer | None, step: int, state: Mapping[str, Any] | None
    ) -> tuple[int, Content]:
        """Copy the state of a training, and write the base and the segment where they are new."""
        self.wait()
        if not isinstance(tuning, Tuning):
            raise TypeError(f"commit takes the Tuning that fishmask.attach returned, got {type(tuning).__name__}")
        if not tuning.attached:
            raise FishError("this Tuning is no longer attached to its model, so there is nothing to commit")
        sharded.refuse(tuning.model, "CheckpointLog")
        if not hasattr(step, "__index__"):
            raise TypeError(f"step must be a whole number, got {step!r}")
        step = operator.index(step)
        known = self._following(tuning)
        if known is None and self.numbers:
            raise FishError(
                f"{self.path} holds commits already: restore one first to go on from there, or name another folder"
            )
        held = {
            name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in (state or {}).items()
        }
        tree.pack(held)  # refuses what cannot be kept before anything is written
        stays = known is not None and known.mask is tuning.mask
        # In the order of the segment, which a model that registers its modules in another order keeps to.
        order = known.segment.mask if known is not None and stays else tuning.mask
        named = dict(tuning.named_parameters())
        named = {name: named[name] for name in order.indices}
        moments = None if optimizer is None else gather(named, optimizer)
        tree.pack(moments.rest if moments else None, "the optimizer's state")
        if known is None or not stays or known.loads != tuning.loads:  # weights that came along may not be the base's
            tuning.originals.check(tuning.model)
        now = generators.capture()
        self._claim()
        if self._following(tuning) is not known or (known is None and self.numbers):
            self._folder.release()
            return self._prepare(tuning, optimizer, step, state)  # another process has written meanwhile
        if known is None or not stays:
            known = self._begin_segment(tuning, known, now)
        known.loads = tuning.loads
        changed = {name: s for name, s in now.items() if tree.pack(s) != tree.pack(known.segment.rng.get(name))}
        buffers = tuning.originals.changed_buffers(tuning.model)
        number = self._folder.free("commit")
        metadata = {
            "number": str(number),
            "step": str(step),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "mask": tuning.mask.digest,
            **known.segment.file.written("segment"),
            **(known.last.written("parent") if known.last else {}),
            **({} if tuning.rounding == "nearest" else {"rounding": _rounding(tuning)}),
        }
        values = torch.cat([p.detach() for p in named.values()])
        return number, history.commit_content(metadata, Snapshot(values, moments, buffers, changed, held))

    def _begin_segment(self, tuning: Tuning, known: Followed | None, now: dict[str, Any]) -> Followed:
        """Write the base when it is new, then the segment of the tuning's mask, and follow the tuning."""
        sealed = left_entries(tuning, known.below if known else {})
        if known is not None:
            base, parent, last = known.segment.base, known.segment.file, known.last
        else:
            number = self._folder.free("base")
            with tuning.originals.put_back(tuning.model):
                present = history.base_of(tuning.model, tuning.mask, self._store_base)
                base, parent, last = self._folder.add("base", number, history.base_content(number, present)), None, None
        try:
            segment = self._folder.add_segment(Segment(Reference(0, ""), base, parent, tuning.mask, sealed, now))
        except BaseException:
            if known is None:
                remove(self._folder.path_of("base", base.number))
            raise
        below = dict(known.below) if known else {}
        lay_over(below, sealed)
        originals = known.originals if known else base
        newest = known.newest if known else 0
        self._followed = Followed(ref(tuning), tuning.mask, originals, segment, last, newest, below, tuning.loads)
        return self._followed

    def _finish(self, number: int, content: Content, begin: float) -> Commit:
        """Write a prepared commit and delete those that are not to be kept; a thread does it for ``commit_async``."""
        file = self._folder.add("commit", number, content)
        if self._followed is not None:
            self._followed.last, self._followed.newest = file, number
        self._folder.prune(self._keep_last, self._keep_every)
        path = self._folder.path_of("commit", number)
        return commit_of(path, content.metadata, path.stat().st_size, perf_counter() - begin)


def _rounding(tuning: Tuning) -> str:
    """Write down how values become weights."""
    return tuning.rounding if tuning.rounding == "nearest" else f"{tuning.rounding} {tuning.rounding_seed}"
