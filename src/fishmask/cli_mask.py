"""The commands ``fishmask mask ...``, and options that several commands share."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fishmask.console import print_json, print_table, report

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, for programs.")]
Keep = Annotated[list[str] | None, typer.Option(help="Train this parameter whole (a name or pattern; repeatable).")]
Exclude = Annotated[list[str] | None, typer.Option(help="Never train this parameter (a name or pattern; repeatable).")]
Text = Annotated[str, typer.Option(help="Column of the texts.")]
Pair = Annotated[str | None, typer.Option(help="Column of the second texts, for tasks on two sentences.")]
Label = Annotated[
    str, typer.Option(help="Column of the labels: names, or numbers with a decimal point for regression.")
]
Task = Annotated[Literal["auto", "classification", "regression"], typer.Option(help="What the labels are.")]
MaxLength = Annotated[int, typer.Option(help="Cut texts off after so many tokens.")]
Model = Annotated[str, typer.Argument(help="A local model folder, or a name on the Hugging Face hub.")]
TrainingData = Annotated[Path, typer.Argument(help="Training examples: .csv, .tsv or .jsonl.")]
Density = Annotated[float, typer.Option(help="Share of all entries to train, as a fraction: 0.005 is 0.5 %.")]
Block = Annotated[
    str | None, typer.Option(help="Choose whole blocks: 1x16, 16x16 or another height and width; rows; columns.")
]
MaskFile = Annotated[Path, typer.Argument(help="A mask file, a delta file, or the folder of a training run.")]
Device = Annotated[str, typer.Option(help="Where to compute: cpu, cuda, mps; auto takes the GPU when there is one.")]

app = typer.Typer(no_args_is_help=True, help="Choose the entries to train, and look at what was chosen.")


@app.command("select", no_args_is_help=True)
def select(
    scores: Annotated[Path, typer.Argument(help="A scores file from `fishmask score`.")],
    density: Density = 0.005,
    keep: Keep = None,
    exclude: Exclude = None,
    block: Block = None,
    keep_head: Annotated[bool, typer.Option(help="Without --keep: train the new head whole.")] = True,
    output: Annotated[Path, typer.Option("-o", "--output", help="The mask file.")] = Path("mask.safetensors"),
    json: Json = False,
) -> None:
    """Choose the entries with the largest scores over the whole model, or the blocks with the largest sums per entry.

    Example: fishmask mask select scores.safetensors --density 0.005 --exclude pooler -o mask.safetensors
    """
    from fishmask.mask import Mask
    from fishmask.scorefile import read_scores

    values, head = read_scores(scores)
    whole = keep or (head if keep_head else ())
    mask = Mask.from_scores(values, density, keep=whole, exclude=exclude or (), block=block)
    mask.save(output)
    report({"mask": output, **_facts(mask), "kept_whole": list(whole)}, json, "Mask")


@app.command("show", no_args_is_help=True)
def show(mask: MaskFile, json: Json = False) -> None:
    """Show how many entries of each parameter a mask chose.

    Example: fishmask mask show mask.safetensors
    """
    from fishmask.run import read_mask

    chosen = read_mask(mask)
    counts = {name: len(indices) for name, indices in chosen.indices.items()}
    parameters = [
        {"name": name, "entries": count, "density": count / chosen.shapes[name].numel(), "share": count / chosen.k}
        for name, count in counts.items()
    ]
    if json:
        print_json(_facts(chosen) | {"parameters": parameters})
        return
    report(_facts(chosen), False, str(mask))
    rows = [[p["name"], p["entries"], f"{p['density']:.3%}", f"{p['share']:.1%}"] for p in parameters]
    print_table("Chosen entries", ["parameter", "entries", "of the parameter", "of the mask"], rows)


@app.command("overlap", no_args_is_help=True)
def overlap(
    first: MaskFile,
    second: Annotated[Path, typer.Argument(help="Another mask, delta or folder.")],
    json: Json = False,
) -> None:
    """Count the entries that two masks share.

    Example: fishmask mask overlap fisher.safetensors random.safetensors
    """
    from fishmask.run import read_mask

    a, b = read_mask(first), read_mask(second)
    result = {
        "entries_first": a.k,
        "entries_second": b.k,
        "shared": (a & b).k,
        "share_of_first": a.overlap(b),
        "share_of_second": b.overlap(a),
        "equal": a == b,
    }
    report(result, json, "Overlap")


def _facts(mask: Any) -> dict[str, Any]:
    return {"entries": mask.k, "of": mask.n, "density": mask.density, "digest": mask.digest}


def device_named(name: str) -> str:
    """Return the device that an option means; refuse one that is not there."""
    import torch

    if name == "auto":
        # Without the check it names what torch was built for, which on most machines without a GPU is cuda.
        found = torch.accelerator.current_accelerator(check_available=True)
        return "cpu" if found is None else found.type
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch's words for an unknown one and for one that is not there
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name}: {reason} (expected cpu, cuda, mps or auto)") from error
    return name
