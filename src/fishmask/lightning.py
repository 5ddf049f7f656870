"""Checkpoints of a Lightning Trainer as commits of a log.

``ModelCheckpoint`` decides when and under which names, as ever; each of its files then holds no weights, only where its
commit is. ``docs/trainers.md`` is the guide.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from torch.utils.data import DataLoader

from fishmask import rng
from fishmask.attach import Tuning
from fishmask.errors import FishError
from fishmask.live import tuning_of
from fishmask.log import CheckpointLog
from fishmask.moments import check_members, leave_out_weights
from fishmask.pointer import Pointer
from fishmask.publish import make_folder

try:
    try:
        from lightning.pytorch import Callback
        from lightning.pytorch.plugins import CheckpointIO
    except ImportError:
        from pytorch_lightning import Callback
        from pytorch_lightning.plugins import CheckpointIO
except ImportError as error:
    raise FishError("fishmask.lightning needs lightning: pip install 'fishmask[lightning]'") from error

# What the constructors of module and data were called with: any objects, and a resuming script calls them itself.
_LEFT_OUT = {"hyper_parameters", "hparams_name", "hparams_type"}
_LEFT_OUT |= {f"datamodule_{name}" for name in _LEFT_OUT}


class CheckpointCallback(Callback):  # type: ignore[misc]
    """Make every checkpoint of a Lightning Trainer a commit of a log.

    Args:
        log: The log, or its folder.

    Attributes:
        checkpoint_log: The log.

    Example::

        module.net = fishmask.get_fish_model(net, config)  # or attach(net, mask), and an optimizer of its parameters
        trainer = Trainer(callbacks=[CheckpointCallback("run/log"), ModelCheckpoint("run", save_last=True)])
        trainer.fit(module, data, ckpt_path="last")
    """

    def __init__(self, log: str | os.PathLike[str] | CheckpointLog) -> None:
        self._owned = not isinstance(log, CheckpointLog)
        self.checkpoint_log = log if isinstance(log, CheckpointLog) else CheckpointLog(log)
        self._begun = False  # whether this training's commits may go to the log
        self._named: int | None = None  # the commit that Lightning loads, until it is restored

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Have the Trainer's checkpoints go through the log.

        Raises:
            FishError: Training in several processes, which would not average the gradients of the values; or another
                callback has the Trainer commit to another log.
        """
        self._named = None
        if trainer.world_size > 1:
            raise FishError(f"{trainer.world_size} processes, which would not average the gradients of the values")
        present = trainer.strategy.checkpoint_io
        if not isinstance(present, _Commits):
            trainer.strategy.checkpoint_io = _Commits(self, trainer, present)
        elif present.callback is not self:
            raise FishError(f"this Trainer commits to {present.callback.checkpoint_log.path} already")

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore the commit that training resumes from, or refuse to add to the log of another training."""
        tuning = _tuning(pl_module)
        optimizer = _optimizer(trainer)
        leave_out_weights(optimizer, tuning)
        check_members(dict(tuning.named_parameters()), optimizer)
        if self._named is None and not self._begun and (numbers := self.checkpoint_log.numbers):
            raise FishError(
                f"{self.checkpoint_log.path} holds {len(numbers)} commits of a training that this one does not resume: "
                "give fit(ckpt_path=...), or another folder"
            )
        if self._named is not None:
            self.checkpoint_log.restore(tuning, optimizer, at=self._named)
            self._begun, self._named = True, None

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore the model of the commit that is to be evaluated."""
        self._restore_model(pl_module)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore the model of the commit that is to be evaluated."""
        self._restore_model(pl_module)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Restore the model of the commit that is to predict."""
        self._restore_model(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let go of the log, so that a notebook can go on."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the log."""
        if self._owned:
            self.checkpoint_log.close()

    def _restore_model(self, pl_module: Any) -> None:
        if self._named is not None:
            self.checkpoint_log.restore(_tuning(pl_module), at=self._named, rng=False)
            self._begun, self._named = True, None

    def _save(self, trainer: Any, checkpoint: dict[str, Any], path: Path) -> None:
        """Commit the parts of a checkpoint that the log does not hold by itself, then write the file that names it."""
        kept = {key: part for key, part in checkpoint.items() if key not in _LEFT_OUT}
        tuning, optimizer = _tuning(trainer.lightning_module), None
        if "optimizer_states" in kept:  # not where only weights are saved
            kept["optimizer_states"], optimizer = [], _optimizer(trainer)
        inside = {id(buffer) for buffer in tuning.model.buffers()}
        kept["state_dict"] = {
            name: buffer
            for name, buffer in trainer.lightning_module.named_buffers()
            if name in checkpoint["state_dict"] and id(buffer) not in inside
        }
        if trainer.is_last_batch:  # the next epoch draws from its loaders anew
            kept["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)
        commit = self.checkpoint_log.commit(tuning, optimizer, step=trainer.global_step, state={"lightning": kept})
        self._begun = True
        before = Pointer.read(path)
        make_folder(path.parent)
        Pointer.to(commit, self.checkpoint_log).write(path)
        self._drop(before, path)

    def _load(self, trainer: Any, pointer: Pointer, path: Path) -> dict[str, Any]:
        """Return a checkpoint for Lightning to load, and keep in mind which commit is to be restored."""
        number = pointer.found(self.checkpoint_log, path)
        checkpoint: dict[str, Any] = self.checkpoint_log.read(number)[2].state["lightning"]
        self._named = number
        # What Lightning finds here it copies into the module: the module's own state, until the commit is restored.
        return {**checkpoint, "state_dict": {**trainer.lightning_module.state_dict(), **checkpoint["state_dict"]}}

    def _drop(self, pointer: Pointer | None, path: Path) -> None:
        """Delete the commit of a file that is gone or replaced, unless another file names it too."""
        if pointer is None or (number := pointer.find(self.checkpoint_log)) is None:
            return
        if not any(pointer.same(Pointer.read(other)) for other in path.parent.iterdir()):
            self.checkpoint_log.delete(number)


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` with which training resumes within an epoch: the same order, and the batch that was next.

    Lightning keeps the position of a loader that has ``state_dict()``. A plain ``DataLoader`` has none, so that a
    resume within an epoch would draw a new order. The batches before the position are drawn once more and passed over.
    Takes the arguments of ``DataLoader``, and a data set of known length.
    """

    _before: dict[str, Any] | None = None  # the generators before the first batch of this epoch
    _given = 0  # batches given in this epoch
    _resumed: dict[str, Any] | None = None  # where the next epoch begins

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Give the batches of an epoch; nothing is drawn before the first one is asked for."""
        resumed, self._resumed = self._resumed, None
        if resumed is not None:
            rng.reinstate(resumed["before"])
        self._before, self._given = rng.capture(), 0
        batches = super().__iter__()
        if resumed is not None:
            self._given = sum(1 for _ in zip(range(resumed["given"]), batches, strict=False))
            rng.reinstate(resumed["now"])
        for batch in batches:
            self._given += 1
            yield batch
        self._before = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position; nothing between two epochs."""
        if self._before is None:
            return {}
        return {"before": self._before, "given": self._given, "now": rng.capture()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Have the next epoch begin at a position."""
        self._resumed = state or None


class _Commits(CheckpointIO):  # type: ignore[misc]
    """How Lightning saves, loads and removes checkpoints; files of any other kind are left to what was there before."""

    def __init__(self, callback: CheckpointCallback, trainer: Any, other: Any) -> None:
        self.callback, self._trainer, self._other = callback, trainer, other

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.callback._save(self._trainer, checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        if (pointer := self._pointer(Path(path))) is not None:
            return self.callback._load(self._trainer, pointer, Path(path))
        loaded: dict[str, Any] = self._other.load_checkpoint(path, map_location, weights_only)
        return loaded

    def _pointer(self, path: Path) -> Pointer | None:
        """Read a pointer; the file of a commit names itself."""
        commits = self.callback.checkpoint_log.commits
        itself = [Pointer.to(c, self.callback.checkpoint_log) for c in commits if c.path.resolve() == path.resolve()]
        return itself[0] if itself else Pointer.read(path)

    def remove_checkpoint(self, path: Any) -> None:
        pointer = Pointer.read(Path(path))
        self._other.remove_checkpoint(path)
        self.callback._drop(pointer, Path(path))

    def teardown(self) -> None:
        self._other.teardown()


def _tuning(pl_module: Any) -> Tuning:
    """Return the tuning of the part of a LightningModule that is attached."""
    tuning = tuning_of(pl_module)
    if tuning is None:
        raise FishError(
            "no part of the LightningModule is attached: let it hold a FishModel, or call "
            "fishmask.attach(module.net, mask), before fit()"
        )
    return tuning


def _optimizer(trainer: Any) -> Optimizer:
    """Return the Trainer's optimizer, of which there must be one."""
    if len(trainer.optimizers) != 1:
        raise FishError(f"a commit holds one optimizer, and configure_optimizers() returned {len(trainer.optimizers)}")
    optimizer: Optimizer = trainer.optimizers[0]
    return optimizer
