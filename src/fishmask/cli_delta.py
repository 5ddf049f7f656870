"""The commands ``fishmask delta ...``."""

import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fishmask.cli_mask import Json
from fishmask.console import bars, note, report, working

DeltaFile = Annotated[Path, typer.Argument(help="A delta file, or the folder of a training run.")]
Base = Annotated[str, typer.Argument(help="The base model: a local folder, or a name on the Hugging Face hub.")]
Folder = Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")]
Rename = Annotated[
    list[str] | None,
    typer.Option(help="Names of the base that begin with OLD begin with NEW here: OLD=NEW (repeatable)."),
]
Dtype = Literal["float32", "float64", "bfloat16", "float16"]
Target = Literal["shira", "supertuning", "composable", "dense", "tensors", "merged"]
Origin = Literal["auto", "shira", "supertuning", "composable", "dense", "tensors"]
app = typer.Typer(no_args_is_help=True, help="Look at, check, apply, make and convert delta files.")


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
    density: Annotated[float | None, typer.Option(help="Keep only the largest changes: this share of all.")] = None,
    k: Annotated[int | None, typer.Option("--k", help="The same as a number.")] = None,
    head: Annotated[list[str] | None, typer.Option(help="Keep this whole (a name or pattern; repeatable).")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Leave this out (a name or pattern; repeatable).")] = None,
    rename: Rename = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Convert both models first.")] = None,
    json: Json = False,
) -> None:
    """Make a delta of two checkpoints: the entries in which they differ. No model is loaded, files are read in pieces.

    Without --rename, --head and --ignore, names are fitted: what only the fine-tuned model has is kept whole, what only
    the base has is left out.

    Example: fishmask delta between bert-base-uncased my-sparse-model -o delta --density 0.005
    """
    import torch

    from fishmask.between import compare, fit
    from fishmask.hub import DELTA_FILE
    from fishmask.weights import locate, open_weights

    before, after = open_weights(base), open_weights(tuned)
    names = _renaming(rename)
    if not (rename or head or ignore):
        names, head, ignore = fit(before, after)
        for text, found in (("renamed", names), ("kept whole", head), ("left out", ignore)):
            if found:
                note(f"{text}: {found}")
    with bars() as progress:
        compared = compare(
            before,
            after,
            heads=head or (),
            ignore=ignore or (),
            rename=names,
            dtype=dtype and getattr(torch, dtype),
            progress=progress,
        )
        delta = compared.delta(density=density, k=k, base_name=base)
    output.mkdir(parents=True, exist_ok=True)
    if (config := locate(tuned) / "config.json").is_file():
        shutil.copyfile(config, output / config.name)
    delta.save(output / DELTA_FILE)
    changed = sum(compared.changed.values())
    if delta.mask.density > 0.5:
        note("most entries differ: this delta saves little; was the model trained whole? --density keeps the largest")
    facts = _facts(output / DELTA_FILE, delta)
    report(facts | {"changed": changed, "changed_left_out": changed - delta.k}, json, "Delta")


@app.command("export", no_args_is_help=True)
def export(
    delta: DeltaFile,
    to: Annotated[Target, typer.Option(help="The format.")],
    base: Annotated[str, typer.Option(help="The base model: a local folder, or a name on the Hugging Face hub.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file or folder to write.")],
    pad: Annotated[bool, typer.Option(help="Add entries that change nothing where PEFT wants more.")] = False,
    any_base: Annotated[bool, typer.Option(help="Do not ask whether the base is the delta's own.")] = False,
    rename: Rename = None,
    json: Json = False,
) -> None:
    """Write a delta in another program's format.

    shira, supertuning: an adapter folder for PEFT. composable: for composable-sft. dense: the differences as whole
    tensors. tensors: the changed tensors. merged: the whole model, written shard by shard.

    Example: fishmask delta export run --to merged --base bert-base-uncased -o model
    """
    from fishmask.between import guessed
    from fishmask.formats import export_delta
    from fishmask.peft_files import KINDS
    from fishmask.weights import open_weights

    path, loaded = _load(delta)
    config = path.parent if to == "merged" and (path.parent / "config.json").is_file() else None
    with working("exporting"):
        if to in KINDS:
            source, names = _model(base, path), {}
        else:
            source, names = base, _renaming(rename) or guessed(open_weights(base), loaded.mask.shapes)
        done = export_delta(
            loaded, to, output, base=source, pad=pad, check_base=not any_base, rename=names, like=config
        )
    report({"output": output, **{k: v for k, v in vars(done).items() if k != "path"}}, json, f"Exported to {to}")


@app.command("import", no_args_is_help=True)
def import_(
    source: Annotated[Path, typer.Argument(help="A file or folder of another program.")],
    base: Annotated[str, typer.Option(help="The base model: a local folder, or a name on the Hugging Face hub.")],
    output: Folder = Path("delta"),
    origin: Annotated[Origin, typer.Option("--from", help="What it is; auto looks.")] = "auto",
    like: Annotated[Path | None, typer.Option(help="A folder whose config.json belongs to the delta.")] = None,
    rename: Rename = None,
    json: Json = False,
) -> None:
    """Make a delta of another program's file or folder: what `export` writes, but for merged models.

    Example: fishmask delta import shira-adapter --base bert-base-uncased -o delta
    """
    from fishmask.between import guessed
    from fishmask.formats import import_delta, names_in
    from fishmask.hub import DELTA_FILE
    from fishmask.weights import open_weights

    with working("importing"):
        weights = open_weights(base)
        names = _renaming(rename) or guessed(weights, dict.fromkeys(names_in(source, origin)))
        delta = import_delta(source, base=weights, origin=origin, rename=names, base_name=base)
    output.mkdir(parents=True, exist_ok=True)
    if like is not None:
        shutil.copyfile(like / "config.json", output / "config.json")
    delta.save(output / DELTA_FILE)
    report(_facts(output / DELTA_FILE, delta), json, "Delta")


def _renaming(pairs: list[str] | None) -> dict[str, str]:
    if wrong := [pair for pair in pairs or () if "=" not in pair]:
        raise ValueError(f"--rename is OLD=NEW, as in --rename =bert. or --rename model.=; got {wrong[0]}")
    return {old: new for old, _, new in (pair.partition("=") for pair in pairs or ())}


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
