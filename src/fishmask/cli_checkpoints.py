"""The commands ``fishmask checkpoints ...``."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import typer

from fishmask.cli_mask import Json
from fishmask.console import note, print_json, print_table, report, text_of, working

LogFolder = Annotated[Path, typer.Argument(help="The folder of a checkpoint log.")]
At = Annotated[int | None, typer.Option(help="Number of the commit; by default the newest.")]
app = typer.Typer(no_args_is_help=True, help="Look at, check, roll back and export the commits of a checkpoint log.")


@app.command("list", no_args_is_help=True)
def list_commits(log: LogFolder, json: Json = False) -> None:
    """List the commits of a log, as their headers say.

    Example: fishmask checkpoints list run/log
    """
    from fishmask.log import CheckpointLog

    opened = CheckpointLog(_existing(log))
    commits = opened.commits
    if damaged := sorted(set(opened.numbers) - {commit.number for commit in commits}):
        note(f"commits with a damaged header: {text_of(damaged)}; fishmask checkpoints verify tells more")
    if json:
        print_json([{**vars(commit), "path": str(commit.path)} for commit in commits])
        return
    rows = [[c.number, c.step, c.time, c.bytes, c.segment, c.mask[:12]] for c in commits]
    print_table(str(log), ("commit", "step", "time", "bytes", "segment", "mask"), rows)


@app.command("show", no_args_is_help=True)
def show(log: LogFolder, at: At = None, json: Json = False) -> None:
    """Show what a commit holds and what it builds on.

    Example: fishmask checkpoints show run/log --at 12
    """
    from fishmask import container, history
    from fishmask.log import CheckpointLog

    opened = CheckpointLog(_existing(log))
    commit, chain, found = opened.read(at)
    segment, base = chain[-1], history.path_of(log, "base", chain[-1].base.number)
    segments = [history.path_of(log, "segment", item.file.number) for item in chain]
    facts = {
        "commit": commit.number,
        "step": commit.step,
        "time": commit.time,
        "file": commit.path,
        "bytes": commit.bytes,
        "entries": segment.mask.k,
        "of": segment.mask.n,
        "density": segment.mask.density,
        "mask_digest": segment.mask.digest,
        "optimizer": sorted(found.moments.vectors) if found.moments else None,
        "buffers": len(found.buffers),
        "state": sorted(found.state),
        "segments": [item.file.number for item in chain],
        "segment_bytes": sum(path.stat().st_size for path in segments),
        "base": base.name,
        "base_bytes": base.stat().st_size,
        "base_stored": not container.peek(base, "base")["fingerprint"],
        "base_name": container.peek(base, "base").get("base_name"),
    }
    report(facts, json, str(log))


@app.command("verify", no_args_is_help=True)
def verify(log: LogFolder, json: Json = False) -> None:
    """Read every byte of a log and follow every reference; exit code 1 when anything is damaged.

    Example: fishmask checkpoints verify run/log
    """
    from fishmask import history
    from fishmask.log import CheckpointLog

    opened = CheckpointLog(_existing(log))
    with working("verifying"):
        problems = opened.verify()
    damaged = {problem.path for problem in problems}
    intact = [number for number in opened.numbers if history.path_of(log, "commit", number) not in damaged]
    facts = {
        "log": log,
        "intact": not problems,
        "commits": len(opened.numbers),
        "newest_intact_commit": max(intact, default=None),
        "problems": [f"{problem.path.name}: {problem.reason}" for problem in problems],
    }
    report(facts, json, "Verified")
    if problems:
        raise typer.Exit(1)


@app.command("restore", no_args_is_help=True)
def restore(
    log: LogFolder,
    at: Annotated[int, typer.Argument(help="Number of the commit to go back to.")],
    json: Json = False,
) -> None:
    """Make an earlier commit the newest one, so that training resumes from there; the later ones stay.

    Example: fishmask checkpoints restore run/log 12
    """
    from fishmask.log import CheckpointLog

    with CheckpointLog(_existing(log)) as opened:
        commit = opened.reinstate(at)
    report({"log": log, "newest": commit.number, "copy_of": at, "step": commit.step}, json, "Restored")


@app.command("compact", no_args_is_help=True)
def compact(log: LogFolder, json: Json = False) -> None:
    """Fold the newest commit into a new base and delete everything else; the original base is given up.

    Example: fishmask checkpoints compact run/log
    """
    from fishmask.log import CheckpointLog

    before = _size(_existing(log))
    with CheckpointLog(log) as opened, working("compacting"):
        commit = opened.compact()
    facts = {"log": log, "commit": commit.number, "step": commit.step, "bytes_before": before, "bytes": _size(log)}
    report(facts, json, "Compacted")


@app.command("export", no_args_is_help=True)
def export(
    log: LogFolder,
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")] = Path("model"),
    at: At = None,
    base: Annotated[
        str | None, typer.Option(help="The base model, for a log that does not store it: a folder or a hub name.")
    ] = None,
    json: Json = False,
) -> None:
    """Write the whole model of a commit as a plain model.safetensors, with its config.json where it has one.

    Example: fishmask checkpoints export run/log --at 12 -o model
    """
    from fishmask.log import CheckpointLog

    opened = CheckpointLog(_existing(log))
    with working("exporting"):
        path = opened.export(output, at=at, model=None if base is None else _base_model(opened, at, base))
    facts = {"model": path, "bytes": path.stat().st_size, "commit": opened.read(at)[0].number, "log": log}
    report(facts, json, "Exported")


def _base_model(log: Any, at: int | None, base: str) -> Any:
    """Load the base model with the classes and the head that the log's configuration tells."""
    from fishmask import history
    from fishmask.hub import load_like

    reference = log.read(at)[1][-1].base
    config = history.read_base(log.path, reference.number, reference.digest).config
    with TemporaryDirectory() as folder:
        if config is not None:
            (Path(folder) / "config.json").write_text(config, encoding="utf-8")
        return load_like(base, folder if config is not None else None)


def _existing(log: Path) -> Path:
    if not log.is_dir():
        raise FileNotFoundError(f"there is no folder {log}")
    return log


def _size(log: Path) -> int:
    return sum(path.stat().st_size for path in log.iterdir() if path.is_file())
