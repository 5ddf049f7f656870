"""The README.md of an adapter's folder: what the hub and people read."""

from pathlib import Path
from typing import Any

from torch import nn

from fishmask.errors import FishError
from fishmask.mask import Mask

try:
    from huggingface_hub import ModelCard, ModelCardData
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id
except ImportError as error:
    raise FishError("model cards need huggingface_hub: pip install 'fishmask[hf]'") from error

_BEGIN, _END = "<!-- begin fishmask -->", "<!-- end fishmask -->"


def write_card(folder: Path, config: Any, mask: Mask, base: nn.Module) -> None:
    """Write README.md into ``folder``, or replace in an existing one the part between our two comments.

    The base is named if it is one of the hub's: a path says nothing to others.

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
    name = name if _on_the_hub(name) else ""
    card.data["library_name"] = "fishmask"
    tags = {*(card.data.get("tags") or []), "fishmask", "sparse", *(getattr(base, "model_tags", None) or [])}
    if name:
        card.data["base_model"] = name
        tags.add(f"base_model:adapter:{name}")
    card.data["tags"] = sorted(tags)
    before, begin, rest = card.text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        before, after = f"{card.text.rstrip()}\n\n", "\n"
    card.text = before + _BEGIN + _about(config, mask, name) + _END + after
    folder.mkdir(parents=True, exist_ok=True)
    card.save(path)


def _on_the_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


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
