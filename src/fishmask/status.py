"""What PEFT's ``get_layer_status`` and ``get_model_status`` tell, of a ``FishModel``."""

from typing import TYPE_CHECKING, Any

from peft.peft_model import TunerLayerStatus, TunerModelStatus

from fishmask.fish_config import PEFT_TYPE

if TYPE_CHECKING:
    from fishmask.fish_model import FishModel


def layer_status(model: "FishModel") -> list[Any]:
    """Return one ``TunerLayerStatus`` for each module with entries of any adapter, in the base's order."""
    owners: dict[str, list[str]] = {}
    for adapter_name in model.peft_config:
        for path in dict.fromkeys(name.rpartition(".")[0] for name in model.mask(adapter_name).indices):
            owners.setdefault(path, []).append(adapter_name)
    return [
        TunerLayerStatus(
            name=f"model.{path}" if path else "model",
            module_type=type(module).__name__,
            enabled=model.enabled,
            active_adapters=[name for name in model.active_adapters if name in owners[path]],
            merged_adapters=[],
            requires_grad={name: _requires_grad(model, name) for name in owners[path]},
            available_adapters=sorted(owners[path]),
            devices={name: sorted({p.device.type for p in module.parameters(recurse=False)}) for name in owners[path]},
            quantization_backend=None,
        )
        for path, module in model.get_base_model().named_modules()
        if path in owners
    ]


def model_status(model: "FishModel") -> Any:
    """Return PEFT's ``TunerModelStatus``."""
    trained, total = model.get_nb_trainable_parameters()
    names = list(model.peft_config)
    devices = sorted({p.device.type for p in model.get_base_model().parameters()})
    return TunerModelStatus(
        base_model_type=type(model.get_base_model()).__name__,
        adapter_model_type=type(model).__name__,
        peft_types=dict.fromkeys(names, PEFT_TYPE),
        trainable_params=trained,
        total_params=total,
        num_adapter_layers=len(layer_status(model)),
        enabled=model.enabled,
        active_adapters=model.active_adapters,
        merged_adapters=[],
        requires_grad={name: _requires_grad(model, name) for name in names},
        available_adapters=names,
        devices=dict.fromkeys(names, devices),
        quantization_backend=None,
    )


def _requires_grad(model: "FishModel", name: str) -> bool:
    return name in model.values and all(p.requires_grad for p in model.values[name].parameters())
