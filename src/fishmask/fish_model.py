"""Adapters with PEFT's verbs: a ``PeftModel`` whose adapters are masks and values of an untouched base.

Because it is a ``PeftModel``, ``transformers.Trainer``, TRL and accelerate treat it as one: they optimise, clip and
reduce the values, and save, resume and load adapters instead of whole models. ``docs/peft.md`` is the guide.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from fishmask import applied
from fishmask.adapters import Adapters
from fishmask.attach import Tuning
from fishmask.card import write_card
from fishmask.data_parallel import ignored_by_ddp, under_ddp
from fishmask.delta import Delta
from fishmask.errors import FishError
from fishmask.fish_config import PEFT_TYPE, FishConfig
from fishmask.fish_state import ReplicaCheck, hook_state
from fishmask.hub import ADAPTER_FILE, adapter_folder, delta_in
from fishmask.live import tuning_of
from fishmask.mask import Mask
from fishmask.quantized import weights
from fishmask.status import layer_status, model_status
from fishmask.value_tree import ValueTree

try:
    from peft import PeftModel
except ImportError as error:
    raise FishError("adapters with PEFT's verbs need peft: pip install 'fishmask[peft]'") from error

# What PEFT's loaders take besides, for adapters that are modules of their own; values are where the weights are.
_NOT_NEEDED = {
    "device_map",
    "max_memory",
    "offload_folder",
    "offload_dir",
    "offload_buffers",
    "ignore_mismatched_sizes",
}


def get_fish_model(
    model: nn.Module,
    peft_config: FishConfig,
    batches: Iterable[Any] | None = None,
    *,
    adapter_name: str = "default",
    mask: Mask | None = None,
    progress: bool = False,
) -> "FishModel":
    """Give a model an adapter to train: choose its mask and attach it. What ``get_peft_model`` is in PEFT.

    Args:
        model: The base, on the device and in the dtype it will train in.
        peft_config: How the mask is chosen.
        batches: Examples to score on, where the score needs them (``fishmask.fisher``).
        adapter_name: Name of the adapter.
        mask: A mask that is chosen already; batches are not needed then.
        progress: Show a progress bar while scoring.

    Raises:
        TypeError: The config is not a ``FishConfig``.
        ValueError: As for ``FishConfig.choose`` and ``fishmask.attach``.
        FishError: The model is attached or an adapter model already, has no memory, or cannot be scored.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> fish_model = get_fish_model(model, FishConfig(density=0.1, score="random"))
        >>> fish_model.print_trainable_parameters()
        trainable params: 5 || all params: 58 || trainable%: 8.6207
    """
    _check_base(model)
    if tuning_of(model) is not None:
        raise FishError("this model is attached or has adapters already: FishModel(model) wraps an attached model")
    return FishModel(model, peft_config, adapter_name, batches=batches, mask=mask, progress=progress)


class _Base(nn.Module):
    """What ``PeftModel.base_model`` is to those who look into one: the holder of ``model``, the base."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)


class FishModel(PeftModel):  # type: ignore[misc]
    """A base model with adapters, of which one is active, trained in place or frozen.

    The base keeps its classes and names, and its forward is its own. The values of trainable adapters are parameters
    of this module (``values.<adapter>.<name of the parameter>``) and the only ones that require gradients, but for
    those on the general path. ``state_dict`` holds the values and the base's buffers, and no weight of the base.

    Whatever a method raises, the model and its adapters are as they were before the call; or as after it, where it is
    interrupted while it puts the active adapter back.

    Args:
        model: The base; or a model that is attached already, whose tuning becomes the first adapter.
        peft_config: Settings of the first adapter. None without a first adapter, or to describe the attached one.
        adapter_name: Name of the first adapter.
        batches: As for ``get_fish_model``.
        mask: As for ``get_fish_model``.
        progress: As for ``get_fish_model``.

    Attributes:
        prefix: How names of values begin, for those who tell them from the base's (TRL).
        values: The values of the trainable adapters, by adapter.

    Raises:
        FishError: A mask or batches are given for a model that is attached, or the model is without memory.
    """

    prefix = "values."

    def __init__(
        self,
        model: nn.Module,
        peft_config: FishConfig | None = None,
        adapter_name: str = "default",
        *,
        batches: Iterable[Any] | None = None,
        mask: Mask | None = None,
        progress: bool = False,
    ) -> None:
        nn.Module.__init__(self)  # PeftModel's own would look for one of PEFT's methods
        _check_base(model)
        self.peft_type = PEFT_TYPE
        self.special_peft_forward_args: set[str] = set()
        self._is_prompt_learning = self._adapters_disabled = False
        self._configs: dict[str, FishConfig] = {}
        self._adapters = Adapters(model)
        self._check_replica = ReplicaCheck()
        self.base_model = _Base(model)
        self.values = nn.ModuleDict()
        hook_state(self)
        tuning = tuning_of(model)
        if tuning is not None:
            if mask is not None or batches is not None or tuning.model is not model:
                raise FishError("this model is attached already: wrap all of it, without a mask or batches")
            self._check_new(adapter_name)
            self._adapters.wrap(adapter_name, tuning)
            self._describe(adapter_name, peft_config or FishConfig(density=tuning.mask.density))
            self.mirror()
        elif peft_config is not None:
            try:
                self.add_adapter(adapter_name, peft_config, batches=batches, mask=mask, progress=progress)
                self.set_adapter(adapter_name)
            except BaseException:
                self.unload()
                raise

    # --- what it holds ------------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, FishConfig]:
        """The configs of all adapters by name."""
        return self._configs

    @property
    def active_adapter(self) -> str | None:
        """Name of the active adapter."""
        return self._adapters.active

    @property
    def active_adapters(self) -> list[str]:
        """Name of the active adapter, in a list."""
        return [] if self._adapters.active is None else [self._adapters.active]

    @property
    def active_peft_config(self) -> FishConfig:
        """Config of the active adapter."""
        return self._configs[self._named(None)]

    @property
    def enabled(self) -> bool:
        """Whether the active adapter takes part in forwards."""
        return self._adapters.enabled and not self._adapters_disabled

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter is active and not disabled."""
        return self.active_adapter is not None and self.enabled

    @property
    def tuning(self) -> Tuning | None:
        """The tuning of the active adapter; None where it is frozen or there is none."""
        return None if self.active_adapter is None else self._adapters.tuning(self.active_adapter)

    @property
    def model_tags(self) -> list[str]:
        """Tags for the hub, which a Trainer puts into the card that it writes."""
        return [*(getattr(self.get_base_model(), "model_tags", None) or []), "fishmask"]

    @override
    def get_base_model(self) -> nn.Module:
        """Return the base itself, with the active adapter in its weights."""
        model: nn.Module = self.base_model.model
        return model

    def mask(self, adapter_name: str | None = None) -> Mask:
        """Return the mask of an adapter, by default of the active one."""
        return self._adapters.mask(self._named(adapter_name))

    def delta(self, adapter_name: str | None = None) -> Delta:
        """Return the delta of an adapter, by default of the active one, in the precision it is kept in."""
        return self._adapters.delta(self._named(adapter_name))

    @override
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many entries are trained, and how many the base has."""
        total = sum(p.numel() for p in weights(self.get_base_model()).values())
        return (0 if self.tuning is None else self.tuning.mask.k), total

    @override
    def get_layer_status(self) -> list[Any]:
        """Return one ``TunerLayerStatus`` for each module with entries of any adapter."""
        return layer_status(self)

    @override
    def get_model_status(self) -> Any:
        """Return PEFT's ``TunerModelStatus``."""
        return model_status(self)

    @override
    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return False: single entries of a weight are no matrix of low rank."""
        return False

    # --- forward ------------------------------------------------------------------------------------------------------

    @override
    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Call the base.

        Raises:
            ValueError: ``adapter_names``, which mixes adapters within one batch, is given.
        """
        _refuse_mixed(adapter_names)
        # A compiled forward must not depend on which adapter is active, or each switch would compile it anew.
        if (under_ddp() or not torch.compiler.is_compiling()) and (tuning := self.tuning) is not None:
            if not self._has_values_of(tuning):
                self.mirror()
            self._check_replica(tuning)
        return self.get_base_model()(*args, **kwargs)

    @override
    def generate(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """Call the base's ``generate``; as ``forward``."""
        _refuse_mixed(adapter_names)
        return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    @override
    def disable_adapter(self) -> Iterator[None]:
        """Have the base's own weights, bit for bit, inside the ``with`` block; costs k numbers each way.

        Adapters cannot be added, changed or saved inside the block.
        """
        was, self._adapters_disabled = self._adapters_disabled, True
        try:
            with self._adapters.base():
                yield
        finally:
            self._adapters_disabled = was

    def disable_adapter_layers(self) -> None:
        """Have the base's own weights until ``enable_adapter_layers``; adapters can come and go meanwhile."""
        self._adapters.enable(False)

    def enable_adapter_layers(self) -> None:
        """Have the active adapter in the model again."""
        self._adapters.enable(True)

    # The same under the names that they have in transformers.
    disable_adapters, enable_adapters = disable_adapter_layers, enable_adapter_layers

    # --- adapters come and go -----------------------------------------------------------------------------------------

    @override
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: FishConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        *,
        batches: Iterable[Any] | None = None,
        mask: Mask | None = None,
        progress: bool = False,
    ) -> None:
        """Add an adapter to train; it becomes active by ``set_adapter``.

        Args:
            adapter_name: Its name.
            peft_config: How its mask is chosen, on the base. With the very config of another adapter, and without
                batches, it takes that one's mask (so does TRL when it makes a reference adapter).
            low_cpu_mem_usage: Nothing to do here: an adapter costs k numbers.
            autocast_adapter_dtype: Nothing to do here: values are float32.
            batches: As for ``get_fish_model``.
            mask: As for ``get_fish_model``.
            progress: As for ``get_fish_model``.

        Raises:
            TypeError: The config is not a ``FishConfig``.
            ValueError: The name is taken or cannot name a module; or as for ``FishConfig.choose``.
        """
        self._check_new(adapter_name)
        if not isinstance(peft_config, FishConfig):
            raise TypeError(f"a FishModel takes a FishConfig, got {type(peft_config).__name__}")
        if mask is None and batches is None:
            mask = next((self.mask(name) for name, config in self._configs.items() if config is peft_config), None)
        if mask is None:
            with self._adapters.base():
                mask = peft_config.choose(self.get_base_model(), batches, progress=progress)
        self._adapters.add(adapter_name, mask)
        if peft_config.inference_mode:
            self._adapters.set_trained(adapter_name, False)
        self._describe(adapter_name, peft_config)
        self.mirror()

    @override
    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        check_base: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Read an adapter from a folder or the hub; it becomes active by ``set_adapter``.

        Over an adapter that exists, the values are read into it, also while it is in use: one that is trained goes on
        being trained, by the same optimizer if the mask is the same.

        Args:
            model_id: A folder of ``save_pretrained`` or of ``fishmask train``, or a name on the hub.
            adapter_name: Its name.
            is_trainable: Whether it can be trained further; a frozen one costs less to switch.
            torch_device: Nothing to do here: values are where the weights are. So it is with the next three.
            autocast_adapter_dtype: See above.
            ephemeral_gpu_offload: See above.
            low_cpu_mem_usage: See above.
            key_mapping: For state dicts of PEFT; refused.
            check_base: Refuse an adapter that was trained on other weights.
            **kwargs: ``subfolder``, ``revision`` and what else ``huggingface_hub.hf_hub_download`` takes.

        Returns:
            What ``nn.Module.load_state_dict`` returns, without missing or unexpected keys.

        Raises:
            FishError: The file is damaged, or the adapter does not fit the base; or there is no adapter there.
            ValueError: It is another method's, or a new name cannot name a module.
            TypeError: An argument is not known.
        """
        if key_mapping:
            raise ValueError("key_mapping is for state dicts of PEFT; a delta knows its parameters by their names")
        download, others = self._split_kwargs(kwargs)
        if unknown := set(others) - _NOT_NEEDED:
            raise TypeError(f"load_adapter() takes no argument {', '.join(sorted(unknown))}")
        if adapter_name not in self._configs:
            self._check_new(adapter_name)
        folder = adapter_folder(model_id, **download)
        config = FishConfig.of_folder(folder)
        config.inference_mode = not is_trainable
        delta = Delta.load(delta_in(folder))
        try:
            self._adapters.take(adapter_name, delta, trained=is_trainable, check_base=check_base)
        finally:
            if adapter_name in self._adapters:
                self._describe(adapter_name, self._configs.get(adapter_name, config))
            self.mirror()
        if not is_trainable:
            self.eval()
        return nn.modules.module._IncompatibleKeys([], [])

    @classmethod
    @override
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: FishConfig | None = None,
        **kwargs: Any,
    ) -> "FishModel":
        """Load an adapter onto its base; arguments as for ``load_adapter``.

        Args:
            model: The base.
            model_id: See ``load_adapter``.
            adapter_name: See ``load_adapter``.
            is_trainable: See ``load_adapter``.
            config: Replaces the config in the folder.
            **kwargs: See ``load_adapter``.
        """
        _check_base(model)
        if tuning_of(model) is not None:
            raise FishError("this model is attached or has adapters already: load_adapter() adds one to a FishModel")
        found = cls(model)
        try:
            found.load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
            if config is not None:
                config.inference_mode = not is_trainable
                found._describe(adapter_name, config)
            found.set_adapter(adapter_name)
        except BaseException:
            found.unload()
            raise
        return found

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        *,
        overlap: Literal["refuse", "sum", "mean", "last"] = "refuse",
    ) -> None:
        """Add a frozen adapter that is the base plus a weighted sum of others' differences from it.

        Args:
            adapters: Names of the others.
            weights: One number for each; may be negative.
            adapter_name: Name of the new one; ``set_requires_grad`` makes it trainable.
            combination_type: "linear"; PEFT's other types are about matrices of low rank.
            overlap: What becomes of entries that several of them have: see ``fishmask.combine``.

        Raises:
            ValueError: A name is unknown or taken, or as for ``fishmask.combine``.
            FishError: They share entries, and ``overlap`` is "refuse".
        """
        if combination_type != "linear":
            raise ValueError(f"deltas are combined by combination_type='linear', got {combination_type!r}")
        self._check_new(adapter_name)
        combined = self._combined(adapters, weights, overlap)
        try:
            self._adapters.take(adapter_name, combined, trained=False, check_base=False)
        finally:
            if adapter_name in self._adapters:
                self._describe(adapter_name, self._configs[adapters[0]].replaced(inference_mode=True))

    @override
    def set_adapter(self, adapter_name: str, inference_mode: bool | None = None) -> None:
        """Make an adapter the active one; the weights of the one before leave the model, bit for bit.

        Args:
            adapter_name: Its name.
            inference_mode: True freezes it, False makes it trainable, None leaves it as it was made or loaded.

        Raises:
            ValueError: There is none of that name.
        """
        self._adapters.check(adapter_name)
        if inference_mode is not None:
            self.set_requires_grad(adapter_name, not inference_mode)
        self._adapters.use(adapter_name)

    @override
    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them as they are.

        An optimizer of an adapter that is frozen serves it no more.

        Raises:
            ValueError: There is none of such a name.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            self._adapters.check(name)
        try:
            for name in names:
                self._adapters.set_trained(name, requires_grad)
                self._describe(name, self._configs[name].replaced(inference_mode=not requires_grad))
        finally:
            self.mirror()

    def set_mask(self, mask: Mask, optimizer: Optimizer | None = None) -> None:
        """Train other entries of the active adapter from now on: ``Tuning.set_mask``.

        Args:
            mask: The new mask.
            optimizer: The optimizer of the present values; its groups and state are carried over.

        Raises:
            FishError: The active adapter is frozen, or there is none.
            ValueError: As for ``Tuning.set_mask``.
        """
        self.check_free()
        if self.tuning is None:
            raise FishError("only a trainable adapter has a mask to change: set_adapter() one first")
        self.tuning.set_mask(mask, optimizer)
        self.mirror()

    @override
    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; where it was active, the first of the others becomes active.

        Raises:
            ValueError: There is none of that name.
        """
        was_active = adapter_name == self.active_adapter
        self._adapters.drop(adapter_name)
        del self._configs[adapter_name]
        self.mirror()
        if was_active and self._configs:
            self.set_adapter(next(iter(self._configs)))

    # --- out of the adapters ------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Do nothing but check: the weights of the active adapter are in the model already.

        Args:
            adapter_names: The active adapter, or nothing.
            safe_merge: Refuse values that are not finite.

        Raises:
            ValueError: Others than the active one are named, or a value is not finite.
        """
        if adapter_names is not None and adapter_names != self.active_adapters:
            raise ValueError(
                f"the adapter in the model is {self.active_adapter!r}, so {adapter_names} cannot be merged beside it: "
                "set_adapter() switches, and add_weighted_adapter() makes one of several"
            )
        if safe_merge:
            self._check_finite(self.active_adapters)

    def unmerge_adapter(self) -> None:
        """Do nothing: adapters are never merged for good while there is a FishModel."""

    def unload(self) -> nn.Module:
        """Return the base as it was before any adapter, bit for bit; this object has no adapters afterwards."""
        self._adapters.use(None)
        return self._released()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Return the base with the trained weights; this object has no adapters afterwards.

        Nothing is computed for one adapter, because the weights of the active one are in the model already. Several
        are added up as by ``add_weighted_adapter`` with weights of 1; they may not share entries.

        Args:
            progressbar: Nothing to show.
            safe_merge: Refuse values that are not finite.
            adapter_names: The adapters to leave in the model; by default the active one.

        Raises:
            ValueError: A name is unknown; or a value is not finite and ``safe_merge`` is set.
            FishError: Several adapters share entries.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        for name in names:
            self._adapters.check(name)
        if safe_merge:
            self._check_finite(names)
        if len(names) < 2:
            self._adapters.enable(True)
            self._adapters.use(names[0] if names else None)
            return self._released()
        combined = self._combined(names, [1.0] * len(names), "refuse")
        model = self.unload()
        combined.apply(model, check_base=False)
        applied.forget(model, combined)
        return model

    # --- files --------------------------------------------------------------------------------------------------------

    @override
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write adapters as folders: the delta, the config, and a card for people.

        The adapter named "default" goes into the folder itself, others into one of their name inside it. Values of a
        trainable adapter are float32, so that training can go on from them.

        Args:
            save_directory: The folder; made when missing.
            safe_serialization: Must be true: there is one format.
            selected_adapters: Names of the adapters; by default all.
            save_embedding_layers: Nothing to do here: entries of embeddings are entries like others.
            is_main_process: Whether this process writes.
            path_initial_model_for_weight_conversion: For LoRA alone; refused.
            **kwargs: Ignored; a Trainer passes a state dict.

        Raises:
            ValueError: The path is a file, an adapter is not known, or an argument cannot be served.
        """
        folder = Path(save_directory)
        names = list(self._configs) if selected_adapters is None else selected_adapters
        if folder.is_file():
            raise ValueError(f"{folder} is a file; save_pretrained writes a folder")
        if not safe_serialization or path_initial_model_for_weight_conversion is not None:
            raise ValueError("a delta is a safetensors file and is never converted: leave these arguments as they are")
        for name in names:
            self._adapters.check(name)
        if not is_main_process:
            return
        deltas = {name: self.delta(name) for name in names}
        for name, delta in deltas.items():
            place = folder if name == "default" else folder / name
            place.mkdir(parents=True, exist_ok=True)
            config = self._configs[name]
            config = config.replaced(
                inference_mode=True,
                base_model_name_or_path=config.base_model_name_or_path or delta.base_name,
                revision=config.revision or delta.base_revision,
            )
            delta.save(place / ADAPTER_FILE)
            config.save_pretrained(str(place))
            write_card(place, config, delta.mask, self.get_base_model())

    @override
    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write a README.md about the active adapter into a folder, or update the part of it that is ours."""
        if self.active_adapter is not None:
            write_card(Path(output_dir), self.active_peft_config, self.mask(), self.get_base_model())

    @override
    def _upload_modified_files(self, working_dir: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Put our part back into the card, which ``push_to_hub`` has written anew, and upload the folder."""
        self.create_or_update_model_card(working_dir)
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    # --- inside -------------------------------------------------------------------------------------------------------

    def check_free(self) -> None:
        """Raise FishError inside ``disable_adapter()``, where no adapter can come or go."""
        self._adapters.check_free()

    def mirror(self) -> None:
        """Have the values of all trainable adapters, and no others, as parameters of this module."""
        tunings = {name: tuning for name in self._adapters if (tuning := self._adapters.tuning(name)) is not None}
        for name in self.values.keys() - tunings.keys():
            del self.values[name]
        for name, tuning in tunings.items():
            tree = self.values._modules.get(name)
            if not isinstance(tree, ValueTree) or not tree.serves(tuning):
                self.values[name] = ValueTree(tuning)

    def _has_values_of(self, tuning: Tuning) -> bool:
        """Whether the active adapter's values are parameters of this module; another mask makes all of them anew."""
        name, values = next(tuning.named_parameters())
        tree = self.values._modules.get(self.active_adapter or "")
        return isinstance(tree, ValueTree) and tree.has(name, values)

    @override
    def _apply(self, fn: Any, recurse: bool = True) -> "FishModel":
        """Move or convert the base while no adapter is in it; adapters follow."""
        self._adapters.convert(lambda: self.base_model._apply(fn, recurse))
        return self

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DDP leaves alone, by the name it looks for: the base's weights, and buffers outside its state."""
        return [f"base_model.model.{name}" for name in ignored_by_ddp(self.get_base_model())]

    def _named(self, name: str | None) -> str:
        """Return a name, by default that of the active adapter."""
        if name is None and self.active_adapter is None:
            raise ValueError("no adapter is active: add_adapter() or load_adapter(), then set_adapter()")
        found = name or self.active_adapter or ""
        self._adapters.check(found)
        return found

    def _check_new(self, name: str) -> None:
        if name in self._configs:
            raise ValueError(f"there is an adapter {name!r} already: delete_adapter() it first, or take another name")
        if not name or "." in name or "/" in name or os.sep in name or hasattr(nn.ModuleDict, name):
            raise ValueError(f"an adapter's name becomes part of parameters' and folders' names, and {name!r} cannot")

    def _describe(self, name: str, config: FishConfig) -> None:
        config.in_use = True
        self._configs[name] = config

    def _check_finite(self, names: Sequence[str]) -> None:
        for name in names:
            entries = self.delta(name).entries(self.get_base_model())
            if wrong := [parameter for parameter, (_, values) in entries.items() if not bool(values.isfinite().all())]:
                raise ValueError(f"adapter {name!r} has values that are not finite: {', '.join(wrong)}")

    def _combined(self, names: Sequence[str], weights: Sequence[float], overlap: Any) -> Delta:
        from fishmask.combine import combine

        deltas = [self.delta(self._named(name)) for name in names]
        with self._adapters.base():
            return combine(self.get_base_model(), deltas, weights, overlap=overlap, check_base=False)

    def _released(self) -> nn.Module:
        """Forget all adapters and return the base with what is in it."""
        self._adapters.release()
        self._configs.clear()
        self.mirror()
        return self.get_base_model()


def _refuse_mixed(adapter_names: list[str] | None) -> None:
    if adapter_names is not None:
        raise ValueError(
            "one adapter at a time is in the weights, so adapter_names cannot mix several within a batch: split the "
            "batch by adapter and call set_adapter() before each part"
        )


def _check_base(model: nn.Module) -> None:
    """Raise FishError if adapters cannot be values in this model's weights."""
    if isinstance(model, PeftModel):
        raise FishError(
            "this model has adapters already: add_adapter() gives a FishModel another one; unload() or "
            "merge_and_unload() gives back the base of any PeftModel"
        )
    if applied.is_changed(model):
        raise FishError(
            "other deltas are applied to this model, and adapters belong to the base below: revert() them first, or "
            "load them as adapters with load_adapter()"
        )
    if without := [name for name, p in model.named_parameters() if p.is_meta]:
        raise FishError(
            f"{len(without)} weights of the base are without memory (on the meta device), such as {without[0]}: "
            "adapters are values in its weights, so load them all, without offloading"
        )
