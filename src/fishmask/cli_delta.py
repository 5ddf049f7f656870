"""The commands ``fishmask delta ...``."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fishmask.cli_mask import Json
from fishmask.console import note, report, working

DeltaFile = Annotated[Path, typer.Argument(help="A delta file, or the folder of a training run.")]
Base = Annotated[str, typer.Argument(help="The base model: a local folder, or a name on the Hugging Face hub.")]
Folder = Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")]
app = typer.Typer(no_args_is_help=True, help="Look at, check, apply and make delta files.")


@app.command("show", no_args_is_help=True)
def show(delta: DeltaFile, json: Json = False) -> None:
    """Show what a delta file holds.

    Example: fishmask delta show run/delta.safetensors
    """
    path, loaded = _load(delta)
    report(_facts(path, loaded), json, str(path))


@app.command("verify", no_args_is_help=True)
def verify(
    delta: DeltaFile,
    base: Annotated[str | None, typer.Option(help="Check also that the delta fits this base model.")] = None,
    json: Json = False,
) -> None:
    """Check every byte of a delta file, and on request that it belongs to a base model.

    Example: fishmask delta verify run --base bert-base-uncased
    """
    path, loaded = _load(delta)
    if base is not None:
        with working("loading the base"):
            loaded.apply(_model(base, path))
    report({"file": path, "intact": True, "base": base, "fits_base": base and True}, json, "Verified")


@app.command("apply", no_args_is_help=True)
def apply(
    base: Base,
    delta: DeltaFile,
    output: Folder = Path("model"),
    any_base: Annotated[bool, typer.Option(help="Apply even if the base is another one. Results may be poor.")] = False,
    json: Json = False,
) -> None:
    """Write the whole fine-tuned model: a base model with a delta applied.

    Example: fishmask delta apply bert-base-uncased run -o model
    """
    from fishmask.hub import save_model

    path, loaded = _load(delta)
    with working("applying"):
        model = _model(base, path)
        loaded.apply(model, check_base=not any_base)
        save_model(model, output, tokenizer_of=base)
    report({"model": output, "entries": loaded.k, "base": base}, json, "Applied")


@app.command("between", no_args_is_help=True)
def between(
    base: Base,
    tuned: Annotated[str, typer.Argument(help="The fine-tuned model.")],
    output: Folder = Path("delta"),
    json: Json = False,
) -> None:
    """Make a delta of two checkpoints: the entries in which they differ.

    Example: fishmask delta between bert-base-uncased my-sparse-model -o delta
    """
    from fishmask.delta import Delta
    from fishmask.hub import DELTA_FILE, load_like

    with working("comparing"):
        after = load_like(tuned)
        delta = Delta.between(load_like(base, tuned), after, base_name=base)
    output.mkdir(parents=True, exist_ok=True)
    after.config.save_pretrained(output)
    delta.save(output / DELTA_FILE)
    if delta.mask.density > 0.5:
        note("most entries differ: this delta saves little; was the model trained whole?")
    report(_facts(output / DELTA_FILE, delta), json, "Delta")


def _load(path: Path) -> tuple[Path, Any]:
    from fishmask.delta import Delta
    from fishmask.run import delta_file

    path = delta_file(path)
    return path, Delta.load(path)


def _model(base: str, delta: Path) -> Any:
    """Load the base with the classes of the delta's own config.json, when there is one beside it."""
    from fishmask.hub import load_like

    return load_like(base, delta.parent if (delta.parent / "config.json").exists() else None)


def _facts(path: Path, delta: Any) -> dict[str, Any]:
    mask = delta.mask
    return {
        "file": path,
        "bytes": path.stat().st_size,
        "entries": mask.k,
        "of": mask.n,
        "density": mask.density,
        "bytes_per_entry": path.stat().st_size / mask.k,
        "values": delta.dtypes,
        "buffers": len(delta.buffers),
        "base": delta.base_name,
        "base_revision": delta.base_revision,
        "mask_digest": mask.digest,
    }
