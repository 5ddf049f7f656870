"""Adapters with PEFT's verbs: a ``PeftModel`` whose adapters are masks and values of an untouched base.

Because it is a ``PeftModel``, ``transformers.Trainer``, TRL and accelerate treat it as one: they optimise, clip and
reduce the values, and save, resume and load adapters instead of whole models. ``docs/peft.md`` is the guide.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from fishmask.attach import Tuning, attach
from fishmask.card import write_card
from fishmask.data_parallel import agree_on, ignored_by_ddp, refuse_unseen, under_ddp
from fishmask.delta import Delta
from fishmask.errors import FishError
from fishmask.fish_config import PEFT_TYPE, FishConfig
from fishmask.hub import ADAPTER_FILE, CONFIG_FILE, adapter_folder, delta_in
from fishmask.live import tuning_of
from fishmask.mask import Mask
from fishmask.params import canonical_parameters
from fishmask.switch import Switch
from fishmask.value_tree import ValueTree

try:
    from peft import PeftModel
    from peft.peft_model import TunerLayerStatus, TunerModelStatus
except ImportError as error:
    raise FishError("adapters with PEFT's verbs need peft: pip install 'fishmask[peft]'") from error


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
        FishError: The model is attached or an adapter model already, or cannot be scored.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        >>> fish_model = get_fish_model(model, FishConfig(density=0.1, score="random"))
        >>> fish_model.print_trainable_parameters()
        trainable params: 5 || all params: 58 || trainable%: 8.6207
    """
    if isinstance(model, PeftModel) or tuning_of(model) is not None:
        raise FishError(
            "this model has adapters or is attached already: add_adapter() gives a FishModel another adapter, and "
            "FishModel(model) wraps an attached model"
        )
    return FishModel(model, peft_config, adapter_name, batches=batches, mask=mask, progress=progress)


@dataclass
class _Adapter:
    """One adapter: trainable with a tuning, or frozen and then in the switch."""

    config: FishConfig
    tuning: Tuning | None


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

    Args:
        model: The base; or a model that is attached already, whose tuning becomes the first adapter.
        peft_config: Settings of the first adapter. None without a first adapter, or to describe the attached one.
        adapter_name: Name of the first adapter.
        batches: As for ``get_fish_model``.
        mask: As for ``get_fish_model``.
        progress: As for ``get_fish_model``.

    Raises:
        FishError: A mask or batches are given for a model that is attached.
    """

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
        self.peft_type = PEFT_TYPE
        self.special_peft_forward_args: set[str] = set()
        self._is_prompt_learning = self._adapters_disabled = False
        self._adapters: dict[str, _Adapter] = {}
        self._active: str | None = None
        self._agreed = False
        self.base_model = _Base(model)
        self.values = nn.ModuleDict()
        self._switch = Switch(model)
        self._hook_state()
        tuning = tuning_of(model)
        if tuning is not None:
            if mask is not None or batches is not None or tuning.model is not model:
                raise FishError("this model is attached already: wrap all of it, without a mask or batches")
            config = peft_config or FishConfig(density=tuning.mask.density)
            self._enlist(adapter_name, config, tuning)
            self._active = adapter_name
        elif peft_config is not None:
            self.add_adapter(adapter_name, peft_config, batches=batches, mask=mask, progress=progress)
            self.set_adapter(adapter_name)

    # --- what it holds ------------------------------------------------------------------------------------------------

    @property
    def peft_config(self) -> dict[str, FishConfig]:
        """The configs of all adapters by name."""
        return {name: adapter.config for name, adapter in self._adapters.items()}

    @property
    def active_adapter(self) -> str | None:
        """Name of the active adapter."""
        return self._active

    @property
    def active_adapters(self) -> list[str]:
        """Name of the active adapter, in a list."""
        return [] if self._active is None else [self._active]

    @property
    def active_peft_config(self) -> FishConfig:
        """Config of the active adapter."""
        return self._known(self._active or "").config

    @property
    def has_active_enabled_adapter(self) -> bool:
        """Whether an adapter is active and not disabled."""
        return self._active is not None and not self._adapters_disabled

    @property
    def tuning(self) -> Tuning | None:
        """The tuning of the active adapter; None where it is frozen or there is none."""
        return None if self._active is None else self._adapters[self._active].tuning

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
        name = adapter_name or self._active or ""
        tuning = self._known(name).tuning
        return self._switch.delta(name).mask if tuning is None else tuning.mask

    def delta(self, adapter_name: str | None = None) -> Delta:
        """Return the delta of an adapter, by default of the active one, in the precision it is kept in."""
        name = adapter_name or self._active or ""
        tuning = self._known(name).tuning
        if tuning is None:
            return self._switch.delta(name)
        with self._active_while(name):
            return tuning.delta("values")

    @override
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Return how many entries are trained, and how many the base has."""
        total = sum(p.numel() for p in canonical_parameters(self.get_base_model()).values())
        return (0 if self.tuning is None else self.tuning.mask.k), total

    # --- forward ------------------------------------------------------------------------------------------------------

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base."""
        if under_ddp():
            self._check_replicas()
        return self.get_base_model()(*args, **kwargs)

    @override
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Call the base's ``generate``."""
        return self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]

    @contextmanager
    @override
    def disable_adapter(self) -> Iterator[None]:
        """Have the base's own weights, bit for bit, inside the ``with`` block; costs k numbers each way."""
        was, self._adapters_disabled = self._adapters_disabled, True
        try:
            with self._base():
                yield
        finally:
            self._adapters_disabled = was

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
            peft_config: How its mask is chosen, on the base.
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
        model = self.get_base_model()
        with self._base():
            chosen = peft_config.choose(model, batches, progress=progress) if mask is None else mask
        self._enlist(adapter_name, peft_config, self._attached_apart(chosen))

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

        Over an adapter that exists, the values are read into it: one that is trained goes on being trained, by the
        same optimizer.

        Args:
            model_id: A folder of ``save_pretrained`` or of ``fishmask train``, or a name on the hub.
            adapter_name: Its name.
            is_trainable: Whether it can be trained further; a frozen one costs less to switch.
            torch_device: Nothing to do here: values are where the weights are. So it is with the next four.
            autocast_adapter_dtype: See above.
            ephemeral_gpu_offload: See above.
            low_cpu_mem_usage: See above.
            key_mapping: See above.
            check_base: Refuse an adapter that was trained on other weights.
            **kwargs: ``subfolder``, ``revision`` and what else ``huggingface_hub.hf_hub_download`` takes.

        Returns:
            What ``nn.Module.load_state_dict`` returns, without missing or unexpected keys.

        Raises:
            FishError: The file is damaged, or the adapter does not fit the base.
            ValueError: There is no adapter there, or it is another method's.
        """
        if key_mapping:
            raise ValueError("key_mapping is for state dicts of PEFT; a delta knows its parameters by their names")
        folder = adapter_folder(model_id, **kwargs)
        config = FishConfig.from_pretrained(str(folder)) if (folder / CONFIG_FILE).is_file() else FishConfig()
        config.inference_mode = not is_trainable
        delta = Delta.load(delta_in(folder))
        known = self._adapters.get(adapter_name)
        if known is None:
            self._check_new(adapter_name)
            self._take_in(adapter_name, config, delta, check_base)
        elif known.tuning is None:
            with self._base():
                delta.check(self.get_base_model(), check_base)
                self._switch.remove(adapter_name)
                self._switch.add(adapter_name, delta, check_base=False)
        else:
            self._overwrite(known.tuning, delta, adapter_name, check_base)
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
        found = cls(model)
        found.load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
        if config is not None:
            found._adapters[adapter_name].config = config.replaced(inference_mode=not is_trainable)
        found.set_adapter(adapter_name)
        return found

    @override
    def set_adapter(self, adapter_name: str, inference_mode: bool | None = None) -> None:
        """Make an adapter the active one; the weights of the one before leave the model, bit for bit.

        Args:
            adapter_name: Its name.
            inference_mode: True freezes it, False makes it trainable, None leaves it as it was made or loaded.

        Raises:
            ValueError: There is none of that name.
        """
        self._known(adapter_name)
        if inference_mode is not None:
            self.set_requires_grad(adapter_name, not inference_mode)
        if adapter_name != self._active:
            before = self._active
            self._rest()
            try:
                self._wake(adapter_name)
            except BaseException:
                if before is not None:
                    self._wake(before)
                raise

    @override
    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable, or freeze them as they are.

        An optimizer of an adapter that is frozen serves it no more.

        Raises:
            ValueError: There is none of such a name.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for name in names:
            self._known(name)
        for name in names:
            adapter, active = self._adapters[name], self._active
            if (adapter.tuning is not None) == requires_grad:
                continue
            delta = self.delta(name)
            self._rest()
            try:
                self._discard(name)
                self._take_in(name, adapter.config.replaced(inference_mode=not requires_grad), delta, check_base=False)
            finally:
                if active is not None:
                    self._wake(active)

    @override
    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; where it was active, the first of the others becomes active.

        Raises:
            ValueError: There is none of that name.
        """
        self._known(adapter_name)
        if adapter_name == self._active:
            self._rest()
        self._discard(adapter_name)
        if self._active is None and self._adapters:
            self.set_adapter(next(iter(self._adapters)))

    def unload(self) -> nn.Module:
        """Return the base as it was before any adapter, bit for bit; this object is of no use afterwards."""
        self._rest()
        for name in list(self._adapters):
            self._discard(name)
        return self.get_base_model()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Return the base with the trained weights; this object is of no use afterwards.

        Nothing is computed, because the weights of the active adapter are in the model already.

        Args:
            progressbar: Nothing to show: there is nothing to do.
            safe_merge: Refuse values that are not finite.
            adapter_names: The one adapter to leave in the model; by default the active one.

        Raises:
            ValueError: A value is not finite and ``safe_merge`` is set; or several adapters are named.
        """
        if adapter_names is not None:
            if len(adapter_names) != 1:
                raise ValueError(f"merge one adapter, got {adapter_names}; add_weighted_adapter() makes one of several")
            self.set_adapter(adapter_names[0])
        if safe_merge and self._active is not None:
            wrong = [name for name, values in self.delta().values.items() if not bool(values.isfinite().all())]
            if wrong:
                raise ValueError(f"adapter {self._active!r} has values that are not finite: {', '.join(wrong)}")
        model, tuning = self.get_base_model(), self.tuning
        if tuning is not None:
            tuning.detach()
        self._switch.release()
        self._active = None
        self._adapters.clear()
        self.values.clear()
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
        names = list(self._adapters) if selected_adapters is None else selected_adapters
        if folder.is_file():
            raise ValueError(f"{folder} is a file; save_pretrained writes a folder")
        if not safe_serialization or path_initial_model_for_weight_conversion is not None:
            raise ValueError("a delta is a safetensors file and is never converted: leave these arguments as they are")
        for name in names:
            self._known(name)
        if not is_main_process:
            return
        for name in names:
            delta, adapter = self.delta(name), self._adapters[name]
            place = folder if name == "default" else folder / name
            place.mkdir(parents=True, exist_ok=True)
            config = adapter.config.replaced(
                inference_mode=True,
                base_model_name_or_path=adapter.config.base_model_name_or_path or delta.base_name,
                revision=adapter.config.revision or delta.base_revision,
            )
            delta.save(place / ADAPTER_FILE)
            config.save_pretrained(str(place))
        if names:
            self.create_or_update_model_card(folder)

    @override
    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        """Write a README.md about the active adapter into a folder, or update the part of it that is ours."""
        if self._active is not None:
            write_card(Path(output_dir), self.active_peft_config, self.mask(), self.get_base_model())

    # --- status -------------------------------------------------------------------------------------------------------

    @override
    def get_layer_status(self) -> list[Any]:
        """Return one ``TunerLayerStatus`` for each module with entries of any adapter."""
        owners: dict[str, list[str]] = {}
        for adapter_name in self._adapters:
            for name in self.mask(adapter_name).indices:
                adapters = owners.setdefault(name.rpartition(".")[0], [])
                adapters += [] if adapter_name in adapters else [adapter_name]
        modules = dict(self.get_base_model().named_modules())
        return [
            TunerLayerStatus(
                name=path,
                module_type=type(modules[path]).__name__,
                enabled=not self._adapters_disabled,
                active_adapters=[name for name in self.active_adapters if name in adapters],
                merged_adapters=[],
                requires_grad={name: self._adapters[name].tuning is not None for name in adapters},
                available_adapters=adapters,
                devices={name: [p.device.type for p in modules[path].parameters()][:1] for name in adapters},
                quantization_backend=None,
            )
            for path, adapters in owners.items()
        ]

    @override
    def get_model_status(self) -> Any:
        """Return PEFT's ``TunerModelStatus``."""
        trained, total = self.get_nb_trainable_parameters()
        layers = self.get_layer_status()
        device = next(self.get_base_model().parameters()).device.type
        return TunerModelStatus(
            base_model_type=type(self.get_base_model()).__name__,
            adapter_model_type=type(self).__name__,
            peft_types=dict.fromkeys(self._adapters, PEFT_TYPE),
            trainable_params=trained,
            total_params=total,
            num_adapter_layers=len(layers),
            enabled=not self._adapters_disabled,
            active_adapters=self.active_adapters,
            merged_adapters=[],
            requires_grad={name: adapter.tuning is not None for name, adapter in self._adapters.items()},
            available_adapters=list(self._adapters),
            devices={name: [device] for name in self._adapters},
            quantization_backend=None,
        )

    # --- inside -------------------------------------------------------------------------------------------------------

    @override
    def _apply(self, fn: Any, recurse: bool = True) -> "FishModel":
        """Move or convert the base while no adapter is in it; adapters follow."""
        with self._nothing_active():
            before = _places(self.get_base_model())
            self.base_model._apply(fn, recurse)
            if _places(self.get_base_model()) != before:
                for adapter in self._adapters.values():
                    if adapter.tuning is not None:
                        adapter.tuning.rebase()
                self._switch.rebase()
        return self

    def _hook_state(self) -> None:
        """Keep the base's weights out of the state, and out of what a load misses."""
        prefixes: list[str] = []

        def drop(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
            weights = {id(p) for p in self.get_base_model().parameters()}
            own = {f"{prefix}base_model.model.{n}" for n, p in self._base_names() if id(p) in weights}
            for key in own & state.keys():
                del state[key]

        def remember(module: nn.Module, state: Any, prefix: str, *rest: Any) -> None:
            prefixes[:] = [prefix]

        def forgive(module: nn.Module, incompatible: Any) -> None:
            own = {f"{prefixes[0]}base_model.model.{n}" for n, _ in self._base_names()}
            incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in own]
            if self.tuning is not None and self.tuning.attached:
                self.tuning.write_back()

        self.register_state_dict_post_hook(drop)
        self.register_load_state_dict_pre_hook(remember)
        self.register_load_state_dict_post_hook(forgive)

    def _base_names(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.get_base_model().named_parameters(remove_duplicate=False))

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DDP leaves alone, by the name it looks for: the base's weights, and buffers outside its state."""
        return [f"base_model.model.{name}" for name in ignored_by_ddp(self.get_base_model())]

    def _check_replicas(self) -> None:
        tuning = self.tuning
        if tuning is None or not torch.is_grad_enabled():
            return
        if not self._agreed:
            agree_on(tuning)
            self._agreed = True
        refuse_unseen(tuning)

    def _known(self, name: str) -> _Adapter:
        if name not in self._adapters:
            raise ValueError(f"there is no adapter {name!r}; there are: {', '.join(self._adapters) or 'none'}")
        return self._adapters[name]

    def _check_new(self, name: str) -> None:
        if name in self._adapters:
            raise ValueError(f"there is an adapter {name!r} already: delete_adapter() it first, or take another name")
        if not name or "." in name or "/" in name or os.sep in name:
            raise ValueError(f"an adapter's name becomes part of parameters' and folders' names, got {name!r}")

    def _enlist(self, name: str, config: FishConfig, tuning: Tuning | None) -> None:
        self._adapters[name] = _Adapter(config, tuning)
        if tuning is not None:
            self.values[name] = ValueTree(tuning)

    def _discard(self, name: str) -> None:
        """Forget an adapter that is not in the model."""
        tuning = self._adapters.pop(name).tuning
        if tuning is None:
            self._switch.remove(name)
        else:
            tuning.revert()
            del self.values[name]

    def _attached_apart(self, mask: Mask) -> Tuning:
        """Attach a mask to the base and suspend it, whatever is active."""
        with self._nothing_active():
            tuning = attach(self.get_base_model(), mask)
            tuning.suspend()
        for values in tuning.parameters():
            values.requires_grad_(False)
        return tuning

    def _take_in(self, name: str, config: FishConfig, delta: Delta, check_base: bool) -> None:
        """Make an adapter of a delta."""
        model = self.get_base_model()
        with self._nothing_active():
            if config.inference_mode:
                self._switch.add(name, delta, check_base=check_base)
                self._enlist(name, config, None)
                return
            delta.check(model, check_base)
            tuning = attach(model, delta.mask)
            try:
                _read_into(tuning, delta)
            finally:
                tuning.suspend()
            self._enlist(name, config, tuning)
            for values in tuning.parameters():
                values.requires_grad_(False)

    def _overwrite(self, tuning: Tuning, delta: Delta, name: str, check_base: bool) -> None:
        """Read a delta into a trainable adapter, whose values keep their identity where the mask is the same."""
        with self._base():
            delta.check(self.get_base_model(), check_base)
        with self._active_while(name):
            if tuning.check_mask(delta.mask) != tuning.mask:
                tuning.set_mask(delta.mask)
                self.values[name] = ValueTree(tuning)
            _read_into(tuning, delta)

    def _rest(self) -> None:
        """Take the active adapter out of the model."""
        tuning = self.tuning
        if tuning is not None:
            tuning.suspend()
            for values in tuning.parameters():
                values.requires_grad_(False)
        else:
            self._switch.use(None)
        self._active = None

    def _wake(self, name: str) -> None:
        """Put an adapter into the model, which holds none."""
        tuning = self._adapters[name].tuning
        if tuning is not None:
            tuning.resume()
        else:
            self._switch.use(name)
        self._active = name

    @contextmanager
    def _nothing_active(self) -> Iterator[None]:
        """Have no adapter active for a while."""
        active = self._active
        self._rest()
        try:
            yield
        finally:
            if active is not None:
                self._wake(active)

    @contextmanager
    def _active_while(self, name: str) -> Iterator[None]:
        """Have another adapter active for a while."""
        active = self._active
        if name == active:
            yield
            return
        with self._nothing_active():
            self._wake(name)
            try:
                yield
            finally:
                self._rest()

    @contextmanager
    def _base(self) -> Iterator[None]:
        """Have the base's weights in the model for a while, at the least cost; the active adapter stays active."""
        tuning = self.tuning
        if tuning is not None:
            with tuning.disabled():
                yield
            return
        in_use = self._switch.active
        self._switch.use(None)
        try:
            yield
        finally:
            self._switch.use(in_use)


def _read_into(tuning: Tuning, delta: Delta) -> None:
    """Set the values, and the buffers, of an attached model to those of a delta with the same mask."""
    with torch.no_grad():
        for name, values in tuning.named_parameters():
            values.copy_(delta.values[name])
        buffers = dict(tuning.model.named_buffers())
        for name, buffer in delta.buffers.items():
            buffers[name].copy_(buffer)
    tuning.write_back()


def _places(model: nn.Module) -> list[Any]:
    return [(p.dtype, p.device) for p in model.parameters()]
