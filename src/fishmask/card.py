"""The README.md of an adapter's folder: what the hub and people read."""

from pathlib import Path
from typing import Any

from torch import nn

from fishmask.errors import FishError
from fishmask.mask import Mask

try:
    from huggingface_hub import ModelCard, ModelCardData
except ImportError as error:
    raise FishError("model cards need huggingface_hub: pip install 'fishmask[hf]'") from error

_BEGIN, _END = "<!-- begin fishmask -->", "<!-- end fishmask -->"


def write_card(folder: Path, config: Any, mask: Mask, base: nn.Module) -> None:
    """Write README.md into ``folder``, or replace in an existing one the part between our two comments.

    Args:
        folder: The folder; made when missing.
        config: The adapter's ``FishConfig``.
        mask: Its mask.
        base: The base model.
    """
    path = folder / "README.md"
    card = (
        ModelCard(path.read_text(encoding="utf-8"))
        if path.is_file()
        else ModelCard.from_template(ModelCardData(), template_str=_TEMPLATE)
    )
    name = config.base_model_name_or_path or getattr(getattr(base, "config", None), "_name_or_path", "") or ""
    card.data["library_name"] = "fishmask"
    tags = {*(card.data.get("tags") or []), "fishmask", "sparse", *(getattr(base, "model_tags", None) or [])}
    if name and not Path(name).is_absolute():
        card.data["base_model"] = name
        tags.add(f"base_model:adapter:{name}")
    card.data["tags"] = sorted(tags)
    text = card.text if _BEGIN in card.text else f"{card.text.rstrip()}\n\n{_BEGIN}\n{_END}\n"
    before, rest = text.split(_BEGIN, 1)
    known = "" if Path(name).is_absolute() else name
    card.text = before + _BEGIN + _about(config, mask, known) + _END + rest.split(_END, 1)[1]
    folder.mkdir(parents=True, exist_ok=True)
    card.save(path)


_TEMPLATE = "---\n{{ card_data }}\n---\n\n# A sparse adapter\n"


def _about(config: Any, mask: Mask, name: str) -> str:
    kept = f", `{'`, `'.join(config.keep)}` whole" if config.keep else ""
    return f"""
This adapter changes {mask.k:,} of the {mask.n:,} entries of its base ({100 * mask.density:.3g} %), chosen by
{config.score!r} scores{kept}. It is a *delta*: a mask and the trained values of its entries, to be put into the base's
weights, which it knows by their fingerprint.

```python
import fishmask

fishmask.load(model, "<this folder or repository>")  # model: {name or "its base"}
```

With the adapters of several tasks: `fishmask.FishModel.from_pretrained(model, "<this folder or repository>")`.
"""
