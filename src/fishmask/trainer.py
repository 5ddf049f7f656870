"""Checkpoints of ``transformers.Trainer`` as commits of a log.

A ``checkpoint-N`` folder then holds no weights, only where its commit is and the Trainer's own ``trainer_state.json``,
so that ``resume_from_checkpoint=True``, ``save_total_limit`` and ``load_best_model_at_end`` find what they look for.
``docs/trainers.md`` is the guide.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from fishmask import rng
from fishmask.attach import Tuning
from fishmask.errors import FishError
from fishmask.folder import Commit
from fishmask.live import tuning_of
from fishmask.log import CheckpointLog
from fishmask.moments import check_members, leave_out_weights
from fishmask.pointer import Pointer
from fishmask.publish import replace_file, sync_directory

try:
    from accelerate.optimizer import AcceleratedOptimizer
    from transformers import TrainerCallback
    from transformers.trainer_callback import ExportableState, TrainerState
except ImportError as error:
    raise FishError("fishmask.trainer needs transformers and accelerate: pip install 'fishmask[hf]'") from error

_POINTER = "commit.json"
_STATE = "trainer_state.json"


class CheckpointCallback(TrainerCallback):  # type: ignore[misc]
    """Make every checkpoint of a Trainer a commit of a log.

    No event of a callback comes at the moment of a save or a load, so this one stands in for the Trainer's own methods
    that save and load a checkpoint, on this one object; subclasses of Trainer keep their other methods. Of an attached
    model without a ``FishModel`` around it, it clips and clears the gradients of the values as well: a Trainer does
    that for the parameters of its model, to which they do not belong then.

    Args:
        trainer: A Trainer of a ``FishModel`` whose active adapter is trainable; or of an attached model, with an
            optimizer of the values: ``optimizers=(optimizer, None)``. The callback adds itself to it.
        log: The log, or its folder.

    Attributes:
        checkpoint_log: The log.

    Raises:
        FishError: The model is not attached; the Trainer has such a callback already, or is one that it cannot serve:
            several processes or devices, DeepSpeed, FSDP, ``model_init``.
        ValueError: The optimizer does not train the values, all of them and nothing else.

    Example::

        trainer = Trainer(fishmask.get_fish_model(model, config), args, train_dataset=data)
        CheckpointCallback(trainer, "run/log")
        trainer.train(resume_from_checkpoint=True)
    """

    def __init__(self, trainer: Any, log: str | os.PathLike[str] | CheckpointLog) -> None:
        tuning = _tuning(trainer.model)
        _check(trainer)
        if trainer.optimizer is None and tuning.model is trainer.model:
            raise ValueError(
                "the Trainer would make an optimizer of the frozen weights: give it a fishmask.FishModel(model); or "
                "build one from tuning.parameters(), and pass it as Trainer(optimizers=(optimizer, None))"
            )
        trainer.create_optimizer()  # unless there is one
        leave_out_weights(_plain(trainer.optimizer), tuning)
        check_members(dict(tuning.named_parameters()), _plain(trainer.optimizer))
        self._trainer, self._tuning = trainer, tuning
        self._owned = not isinstance(log, CheckpointLog)
        self.checkpoint_log = log if isinstance(log, CheckpointLog) else CheckpointLog(log)
        self._begun = False  # whether this training's commits may go to the log
        self._generators: dict[str, Any] = {}  # of the commit that training resumes from
        self._loss: list[Any] | None = None  # its loss since the last record of the log history, and that step
        self._folders = self._known()
        for leftover in Path(trainer.args.output_dir).glob(_hidden(Path("checkpoint-*")).name):
            shutil.rmtree(leftover)
        if not self._folders and self.checkpoint_log.numbers:  # a crash before the first folder; folders were removed
            commit, _, snapshot = self.checkpoint_log.read()
            if "trainer" in snapshot.state:
                self._publish(self._folder(commit.step), commit, snapshot.state["trainer"])
        self._originals: dict[str, Callable[..., Any]] = {}
        for stand_in in (
            self._save_checkpoint, self._load_from_checkpoint, self._load_optimizer_and_scheduler, self._load_scaler,
            self._load_rng_state, self._load_best_model, self._clip_grad_norm, self._get_grad_norm,
            self._inner_training_loop,
        ):  # fmt: skip
            self._originals[stand_in.__name__] = getattr(trainer, stand_in.__name__)
            setattr(trainer, stand_in.__name__, stand_in)
        trainer.add_callback(self)

    # --- events -------------------------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse to add to the log of another training, before the first step; go on with the loss to be logged."""
        if not self._begun and (numbers := self.checkpoint_log.numbers):
            raise FishError(
                f"{self.checkpoint_log.path} holds {len(numbers)} commits of a training that this one does not resume: "
                "give resume_from_checkpoint, or another folder"
            )
        if self._loss is not None:
            loss, step = self._loss
            self._trainer._tr_loss, self._trainer._globalstep_last_logged = loss.to(args.device), step
            self._trainer._total_loss_scalar -= loss.item()  # the mean at the end is over the steps from here on
            self._loss = None
        self._clear_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Clear the gradients of the values, as the Trainer has just done for its model's parameters."""
        self._clear_gradients()

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Delete the commits whose folders the Trainer has just deleted."""
        self._forget_deleted()

    def _clear_gradients(self) -> None:
        for values in self._tuning.parameters():
            values.grad = None

    # --- in place of the Trainer's methods ----------------------------------------------------------------------------

    def _inner_training_loop(
        self,
        batch_size: int | None = None,
        args: Any = None,
        resume_from_checkpoint: str | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Let go of the log however the training ends, so that a notebook can go on."""
        try:
            train = self._originals["_inner_training_loop"]
            return train(batch_size, args, resume_from_checkpoint, trial, ignore_keys_for_eval)
        finally:
            if self._owned:
                self.checkpoint_log.close()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Commit, then write the folder that a resume looks for."""
        trainer, state = self._trainer, self._trainer.state
        trainer.store_flos()
        folder = self._folder(state.global_step)
        if state.best_global_step:
            best = self._folder(state.best_global_step)
            if best == folder or best.is_dir():
                state.best_model_checkpoint = str(best)
        saved = [c for c in (*trainer.callback_handler.callbacks, trainer.control) if isinstance(c, ExportableState)]
        state.stateful_callbacks = TrainerState(stateful_callbacks=saved).stateful_callbacks
        text = json.dumps(dataclasses.asdict(state), indent=2, sort_keys=True) + "\n"
        commit = self.checkpoint_log.commit(
            self._tuning,
            _plain(trainer.optimizer),
            step=state.global_step,
            state={"trainer": text, "loss": [trainer._tr_loss, trainer._globalstep_last_logged], **self._stateful()},
        )
        self._begun = True
        self._publish(folder, commit, text)
        self._rotate(trainer.args.save_total_limit, state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Have ``trainer_state.json``, which the Trainer reads next, be as the commit knows it."""
        folder = Path(resume_from_checkpoint)
        number = self._commit_of(folder)
        if number is None:
            self._originals["_load_from_checkpoint"](resume_from_checkpoint, model)
            return
        text = self.checkpoint_log.read(number)[2].state["trainer"].encode()
        if not (folder / _STATE).is_file() or (folder / _STATE).read_bytes() != text:
            replace_file(folder / _STATE, [text])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Restore model, optimizer, scheduler and scaler; the Trainer has made them all by now."""
        if (number := self._commit_of(checkpoint)) is None:
            self._originals["_load_optimizer_and_scheduler"](checkpoint)
            return
        restored = self.checkpoint_log.restore(
            self._tuning, _plain(self._trainer.optimizer), state=self._stateful(), at=number
        )
        self._loss = restored.state["loss"]
        self._generators = rng.capture()
        self._begun = True

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Leave it to the restore."""
        if self._commit_of(checkpoint) is None:
            self._originals["_load_scaler"](checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Set the generators when the Trainer does: after the batches that are skipped were drawn."""
        if self._commit_of(checkpoint) is None:
            self._originals["_load_rng_state"](checkpoint)
            return
        rng.reinstate(self._generators)

    def _load_best_model(self) -> None:
        """Restore the model of the best commit, and nothing else."""
        if (number := self._commit_of(self._trainer.state.best_model_checkpoint)) is None:
            self._originals["_load_best_model"]()
            return
        # The optimizer follows a change of mask, so that training can go on; its moments stay as they are.
        self._tuning.set_mask(self.checkpoint_log.mask(at=number), _plain(self._trainer.optimizer))
        self.checkpoint_log.restore(self._tuning, at=number, rng=False)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip the gradients of the values."""
        return self._trainer.accelerator.clip_grad_norm_(
            list(self._tuning.parameters()), self._trainer.args.max_grad_norm
        )

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Return the norm of the gradients of the values."""
        if grad_norm is None:
            grad_norm = self._trainer.accelerator.clip_grad_norm_(list(self._tuning.parameters()), float("inf"))
        return grad_norm

    # --- folders ------------------------------------------------------------------------------------------------------

    def _stateful(self) -> dict[str, Any]:
        """Return what is part of a commit besides the values and the optimizer, by name."""
        scaler = getattr(self._trainer.accelerator, "scaler", None)
        return {"scheduler": self._trainer.lr_scheduler, **({"scaler": scaler} if scaler is not None else {})}

    def _folder(self, step: int) -> Path:
        return Path(self._trainer.args.output_dir) / f"checkpoint-{step}"

    def _known(self) -> dict[int, Path]:
        """Return the checkpoint folders that point to commits of this log, by the number of the commit."""
        folders = [path.parent for path in Path(self._trainer.args.output_dir).glob(f"checkpoint-*/{_POINTER}")]
        pointers = {folder: _pointer(folder) for folder in folders}
        found = {
            folder: pointer.find(self.checkpoint_log) for folder, pointer in pointers.items() if pointer is not None
        }
        return {number: folder for folder, number in found.items() if number is not None}

    def _commit_of(self, folder: str | Path | None) -> int | None:
        """Return the number of the commit that a folder points to; None where it is a full checkpoint."""
        pointer = None if folder is None else _pointer(Path(folder))
        return None if pointer is None else pointer.found(self.checkpoint_log, Path(str(folder)))

    def _publish(self, folder: Path, commit: Commit, text: str) -> None:
        """Give a commit its checkpoint folder, durably; a folder of that name is never found without its pointer."""
        if folder.is_dir() and _pointer(folder) is None:
            _delete(folder)  # a full checkpoint of an earlier training, which the Trainer would overwrite too
        place = folder if folder.is_dir() else _hidden(folder)
        place.mkdir(parents=True, exist_ok=True)
        (place / _STATE).write_text(text, encoding="utf-8")  # need not be durable: a load checks it
        Pointer.to(commit, self.checkpoint_log).write(place / _POINTER)
        if place != folder:
            place.rename(folder)
        sync_directory(folder.parent)
        self._folders[commit.number] = folder

    def _rotate(self, limit: int | None, best: str | None) -> None:
        """Delete the oldest checkpoints beyond ``save_total_limit``, but neither the newest nor the best."""
        self._forget_deleted()
        if limit and limit > 0:
            kept = {max(self._folders)} | {n for n, folder in self._folders.items() if best and folder == Path(best)}
            for number in sorted(self._folders.keys() - kept)[: max(0, len(self._folders) - max(limit, len(kept)))]:
                _delete(self._folders[number])
        self._forget_deleted()

    def _forget_deleted(self) -> None:
        """Delete the commits whose folder is gone, or is a later commit's by now."""
        latest = {folder: number for number, folder in sorted(self._folders.items())}
        for number, folder in list(self._folders.items()):
            if latest[folder] != number or not folder.is_dir():
                del self._folders[number]
                self.checkpoint_log.delete(number)


def _pointer(folder: Path) -> Pointer | None:
    """Read the pointer in a checkpoint folder; None where there is none, as in a full checkpoint."""
    pointer = Pointer.read(folder / _POINTER)
    if pointer is None and (folder / _POINTER).exists():
        raise FishError(f"{folder / _POINTER} is damaged: delete {folder}, and resume from another checkpoint")
    return pointer


def _hidden(folder: Path) -> Path:
    """Return the name of a checkpoint folder in the making or unmaking, which nothing takes for a checkpoint."""
    return folder.with_name(f".{folder.name}.tmp")


def _delete(folder: Path) -> None:
    hidden = _hidden(folder)
    shutil.rmtree(hidden, ignore_errors=True)
    shutil.rmtree(folder.rename(hidden))


def _plain(optimizer: Any) -> Optimizer:
    """Return the optimizer that accelerate may have wrapped."""
    plain: Optimizer = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
    return plain


def _tuning(model: Any) -> Tuning:
    """Return the tuning of an attached model, or of the active adapter of a FishModel."""
    tuning = tuning_of(model)
    if tuning is None or (tuning.model is not model and getattr(model, "tuning", None) is not tuning):
        raise FishError(
            "the Trainer's model is not attached: give Trainer a FishModel whose active adapter is trainable, or call "
            "fishmask.attach(model, mask) before"
        )
    return tuning


def _check(trainer: Any) -> None:
    """Raise FishError where a Trainer would train the values wrongly or not at all."""
    args = trainer.args
    faults = []
    if args.world_size > 1:
        faults.append(f"{args.world_size} processes, which would not average the gradients of the values")
    if args.n_gpu > 1:
        faults.append(f"{args.n_gpu} devices in one process: make one of them visible (CUDA_VISIBLE_DEVICES)")
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        faults.append("DeepSpeed or FSDP, which take the weights apart")
    if any(isinstance(callback, CheckpointCallback) for callback in trainer.callback_handler.callbacks):
        faults.append("it commits to another log already")
    if trainer.model_init is not None:
        faults.append("model_init, which makes another model than the one that is attached")
    if faults:
        raise FishError("this Trainer cannot train the values of an attached model: " + "; ".join(faults))
