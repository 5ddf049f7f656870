"""Which mask serves at half a per cent? The search for a recipe: masks, learning rates and seeds on the rated words.

    python -m experiments.recipe NAME ... [--task words|sst2] [--rates 3e-3 1e-2] [--seeds 0 1 2] [--part validation]

A contender is a line of `CONTENDERS`: a way to choose entries and its arguments. Every contender takes the same steps
in all: what a search or a warm-up takes is taken from the training ("free" ones say so in their name). The new head is
always trained whole, inside the budget. Everything but the final table was chosen on the validation part.

Appends one JSON line per run to results/recipe.jsonl and skips the runs that are there already. The results were taken
with one thread; the last bits of a sum, and so the fourth digit of a correlation, depend on the number of threads.
Times were taken beside other work; "seconds_search" is null where one search served several runs.
SST-2 is read from ../shared/data/glue: rows 0-3,000 train, 10,000-11,000 validate.
"""

import argparse
import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from fishmask.attach import attach
from fishmask.data import Examples, encode, rated_words, read_examples
from fishmask.demo import model_folder
from fishmask.fisher import scores
from fishmask.hub import load_for_training
from fishmask.mask import Mask
from fishmask.measure import environment
from fishmask.params import canonical_parameters
from fishmask.select import random_k, top_k
from fishmask.train import evaluate

RESULTS = Path("results/recipe.jsonl")
SST2 = Path("../shared/data/glue/SST-2/train.tsv")
SST2_ROWS = {"train": (0, 3000), "validation": (10000, 11000), "test": (20000, 22000)}
DENSITY, EPOCHS, BATCH, CLIP = 0.005, 3, 32, 1.0
LENGTHS = {"words": 16, "sst2": 64}

Scores = dict[str, Tensor]
Indices = dict[str, Tensor]


class Run:
    """One model on one task, and how many of its steps are used up.

    Attributes:
        model: MiniLM with a new head.
        step: Steps taken so far, by a search or by the training; `total` are all there are.
        k: Entries to choose besides the head.
    """

    def __init__(self, task: str, seed: int, part: str) -> None:
        train, other = (_examples(task, name) for name in ("train", part))
        loaded = load_for_training(model_folder(), classes=train.classes, seed=seed)
        self.task, self.seed, self.model, self.head = task, seed, loaded.model, list(loaded.head)
        self.train_data, self.other_data = (encode(e, loaded.tokenizer, LENGTHS[task]) for e in (train, other))
        self.per_epoch = math.ceil(len(self.train_data) / BATCH)
        self.total, self.step = EPOCHS * self.per_epoch, 0
        self.parameters = canonical_parameters(self.model)
        self.shapes = {name: p.shape for name, p in self.parameters.items()}
        self.n = sum(p.numel() for p in self.parameters.values())
        self.k = math.floor(DENSITY * self.n + 1e-6) - sum(self.shapes[name].numel() for name in self.head)
        torch.manual_seed(seed)

    def pool(self, which: str) -> list[str]:
        """Name the parameters to choose from: all but the head, or the weight matrices of the encoder's layers."""
        names = [name for name in self.shapes if name not in self.head]
        if which == "no pooler":
            names = [name for name in names if "pooler" not in name]
        if which == "matrices":
            names = [name for name in names if ".layer." in name and len(self.shapes[name]) == 2]
        return names

    def mask(self, indices: Indices) -> Mask:
        """Return the mask of these entries and the whole head."""
        whole = {name: torch.arange(self.shapes[name].numel()) for name in self.head}
        return Mask.from_indices({**indices, **whole}, self.shapes)

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """Yield the batches from the present step on."""
        epoch, left = divmod(self.step, self.per_epoch)
        while True:
            rows = list(self.train_data.shuffled(BATCH, seed=self.seed + 1000 * epoch))
            yield from (self.train_data.batch(r) for r in rows[left:])
            epoch, left = epoch + 1, 0

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the training loss; sentences are computed in bfloat16."""
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.task != "words"):
            loss: Tensor = self.model(**batch).loss
        return loss

    def train(
        self,
        values: Sequence[nn.Parameter],
        steps: int,
        rate: float,
        until: int,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Train ``values``; the rate falls linearly so that it would be zero after ``until`` steps."""
        optimizer = torch.optim.AdamW(values, lr=rate, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / until))
        for _, batch in zip(range(steps), self.batches(), strict=False):
            self.loss(batch).backward()
            nn.utils.clip_grad_norm_(values, CLIP)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            after()
        self.model.eval()


def _examples(task: str, part: str) -> Examples:
    if task == "words":
        return rated_words(part)  # type: ignore[arg-type]
    whole = read_examples(SST2, "sentence", "label")
    assert whole.targets is not None
    rows = slice(*SST2_ROWS[part])
    return Examples(whole.texts[rows], None, whole.targets[rows], whole.classes)


# --- which entries, given scores --------------------------------------------------------------------------------------


def equal_counts(run: Run, names: Sequence[str], k: int) -> dict[str, int]:
    """Divide k over parameters in proportion to their sizes."""
    sizes = torch.tensor([run.shapes[name].numel() for name in names])
    ends = (sizes.cumsum(0).double() * k / sizes.sum()).round().long()
    return dict(zip(names, ends.diff(prepend=ends.new_zeros(1)).tolist(), strict=True))


def best_in_each(given: Scores, counts: dict[str, int]) -> Indices:
    """Choose the largest scores of each parameter, as many as ``counts`` says."""
    return {name: given[name].flatten().topk(c).indices.sort().values for name, c in counts.items() if c}


def best_in_each_row(given: Scores, counts: dict[str, int]) -> Indices:
    """Choose equally many entries in every row, the best of it, as far as the counts divide."""
    ranked = {}
    for name in counts:
        rank = given[name].sort(dim=1, descending=True).indices.argsort(1)
        ranked[name] = given[name].double() / (given[name].max().double() * 1.001 + 1e-300) - rank
    return best_in_each(ranked, counts)


def best(run: Run, given: Scores, names: Sequence[str], how: str) -> Indices:
    """Choose the budget: "global", or "tensor" and "row" with the same density in each of them."""
    given = {name: given[name] for name in names}
    if how == "global":
        return top_k(given, run.k)
    counts = equal_counts(run, names, run.k)
    return best_in_each(given, counts) if how == "tensor" else best_in_each_row(given, counts)


def uniform(run: Run, name: str) -> Tensor:
    """Return random numbers in [0, 1) of a parameter's shape."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + 1000003 * run.seed)
    return torch.rand(run.shapes[name], generator=generator)


def gumbel(run: Run, name: str) -> Tensor:
    """Return Gumbel noise: the largest of log(weight) + noise are drawn with chances as the weights."""
    return -(-uniform(run, name).double().clamp_min(1e-12).log()).log()


# --- ways to choose ---------------------------------------------------------------------------------------------------


def choose_random(run: Run, pool: str = "matrices") -> Indices:
    """Every entry of the pool with the same chance."""
    return random_k({name: run.shapes[name].numel() for name in run.pool(pool)}, run.k, run.seed)


def warm_head(run: Run, steps: int) -> None:
    """Train the head alone first."""
    if steps:
        run.train([run.parameters[name] for name in run.head], steps, 3e-3, run.total)
        run.step += steps


def score(run: Run, method: str, examples: int) -> Scores:
    """Score the model as it is; "tstat" is |sum of g| / sqrt(sum of g²) over examples."""
    if method == "tstat":
        gradient, squares = (score(run, one, examples) for one in ("gradient", "fisher"))
        return {name: gradient[name] / (squares[name].sqrt() + 1e-12) for name in gradient}
    examples = min(examples, len(run.train_data))
    batches = run.train_data.sample(examples, BATCH, run.seed)
    return scores(run.model, batches, method=method, examples=examples, seed=run.seed)  # type: ignore[arg-type]


def choose_fisher(
    run: Run,
    pool: str = "matrices",
    how: str = "tensor",
    warm: int | None = None,
    a: float = 0.0,
    method: str = "fisher",
    examples: int = 1024,
) -> Indices:
    """The largest scores after an epoch's warm-up of the head, divided by (row mean x column mean) ** a."""
    warm_head(run, run.per_epoch if warm is None else warm)
    given = {name: score.double() for name, score in score(run, method, examples).items() if name in run.pool(pool)}
    if a:
        for name, s in given.items():
            given[name] = s / (s.mean(1, keepdim=True) * s.mean(0, keepdim=True)).clamp_min(1e-30) ** a
    return best(run, {name: s.float() for name, s in given.items()}, run.pool(pool), how)


def choose_sample(run: Run, power: float, warm: int = 40) -> Indices:
    """Entries drawn in each matrix with chances as Fisher ** power: 0 is random, infinity the largest."""
    warm_head(run, warm)
    given, names = score(run, "fisher", 1024), run.pool("matrices")
    drawn = {name: gumbel(run, name) + power * given[name].double().clamp_min(1e-30).log() for name in names}
    return best_in_each(drawn, equal_counts(run, names, run.k))


def choose_moved(
    run: Run, what: str = "tensor", pool: str = "matrices", steps: int = 0, rate: float = 1e-4, free: bool = False
) -> Indices:
    """The entries that move most when everything trains for a while; then everything is rewound.

    ``what`` ablates the mask: "global" are its very entries, "tensor" those of equal budgets; "counts" keeps of the
    global mask only how many entries each parameter has, "marginals" also how they spread over rows and columns
    (in expectation). With ``free`` the steps of the search do not count.
    """
    steps = steps or run.per_epoch
    before = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    run.train(list(run.model.parameters()), steps, rate, 10**9)
    moved = {name: (p.detach() - before[name]).abs() for name, p in run.parameters.items() if name not in run.head}
    run.model.load_state_dict(before)
    run.step += 0 if free else steps
    names = run.pool(pool)
    if what in ("global", "tensor"):
        return best(run, moved, names, what)
    chosen = top_k({name: moved[name] for name in names}, run.k)
    drawn = {name: uniform(run, name) if what == "counts" else gumbel(run, name) for name in names}
    for name, indices in chosen.items() if what == "marginals" else ():
        if len(run.shapes[name]) == 2:
            hits = torch.zeros(run.shapes[name].numel())
            hits[indices] = 1
            hits = hits.view(run.shapes[name]).double()
            drawn[name] += hits.sum(1, keepdim=True).log() + hits.sum(0, keepdim=True).log()
    return best_in_each(drawn, {name: len(chosen.get(name, ())) for name in names})


def choose_streamed(
    run: Run, what: str = "sign", rate: float = 1e-4, steps: int = 0, how: str = "tensor", free: bool = False
) -> Indices:
    """As `choose_moved`, without an optimizer's state: each gradient is applied and dropped inside the backward.

    "sign" steps by the gradient's sign, "factored" by the gradient over the root of row and column means of its square
    (as Adafactor; rows + columns numbers per matrix). The base is read again afterwards, from disk or the host.
    """
    steps = steps or run.per_epoch
    base = {name: p.detach().clone() for name, p in run.parameters.items()}
    means: dict[str, tuple[list[Tensor], int]] = {}

    def apply(name: str) -> Callable[[Tensor], None]:
        @torch.no_grad()
        def hook(p: Tensor) -> None:
            assert p.grad is not None
            direction = p.grad.sign() if what == "sign" else _factored(name, p.grad, means)
            p.sub_(direction, alpha=rate)
            p.grad = None

        return hook

    hooks = [p.register_post_accumulate_grad_hook(apply(name)) for name, p in run.parameters.items()]
    for _, batch in zip(range(steps), run.batches(), strict=False):
        run.loss(batch).backward()
    run.model.eval()
    moved = {}
    with torch.no_grad():
        for name, p in run.parameters.items():
            moved[name] = (p - base[name]).abs()
            p.copy_(base[name])
    for handle in hooks:
        handle.remove()
    run.step += 0 if free else steps
    return best(run, moved, run.pool("matrices"), how)


def _factored(name: str, gradient: Tensor, means: dict[str, tuple[list[Tensor], int]]) -> Tensor:
    """Divide a gradient by the root of its running second moment, kept as means over rows and columns."""
    square, matrix = gradient * gradient, gradient.dim() == 2
    now = [square.mean(1, keepdim=True), square.mean(0, keepdim=True)] if matrix else [square.mean()]
    old, step = means.get(name, ([torch.zeros_like(part) for part in now], 0))
    decay = 1 - (step + 1) ** -0.8
    new = [decay * a + (1 - decay) * b for a, b in zip(old, now, strict=True)]
    means[name] = new, step + 1
    second = new[0] * new[1] / new[0].mean() if matrix else new[0]
    direction: Tensor = gradient / (second.sqrt() + 1e-12)
    return direction / direction.pow(2).mean().sqrt().clamp_min(1.0)


def choose_candidates(
    run: Run, c: int = 10, rate: float = 3e-3, how: str = "tensor", rewind: bool = True, steps: int = 0
) -> Indices:
    """Train c times too many random entries for a while, keep those that moved most; state is c*k, never n.

    The head keeps what it has learnt; the chosen entries start again from the base if ``rewind``.
    """
    steps, names = steps or run.per_epoch, run.pool("matrices")
    room = sum(run.shapes[name].numel() for name in names)
    wide = random_k({name: run.shapes[name].numel() for name in names}, min(c * run.k, room), run.seed)
    tuning = attach(run.model, run.mask(wide))
    start = {name: values.detach().clone() for name, values in tuning.named_parameters()}
    run.train(list(tuning.parameters()), steps, rate, run.total)
    run.step += steps
    end = {name: values.detach().clone() for name, values in tuning.named_parameters()}
    moved = {name: (end[name] - start[name]).abs() for name in wide}
    kept = top_k(moved, run.k) if how == "global" else best_in_each(moved, equal_counts(run, names, run.k))
    tuning.revert()
    with torch.no_grad():
        for name in run.head:
            run.parameters[name].view(-1).copy_(end[name])
        for name, places in kept.items() if not rewind else ():
            run.parameters[name].view(-1)[wide[name][places]] = end[name][places]
    return {name: wide[name][places] for name, places in kept.items()}


def choose_on_the_way(run: Run, what: str, rate: float = 3e-3, how: str = "tensor") -> Indices:
    """Train a random mask for an epoch, sum every entry's direction on the way, rewind, take the largest sums.

    "sign" sums the gradient's sign, "factored" the gradient over the root of its factored second moment. The head keeps
    what it has learnt. One dense gradient at a time; n numbers are summed, as for Fisher.
    """
    steps, names = run.per_epoch, run.pool("matrices")
    guide = run.mask(choose_random(run))
    sums = {name: torch.zeros(run.shapes[name]) for name in names}
    means: dict[str, tuple[Tensor, Tensor]] = {}
    values = {n: nn.Parameter(run.parameters[n].detach().view(-1)[i].clone()) for n, i in guide.indices.items()}
    base = {name: v.detach().clone() for name, v in values.items()}

    def gather(name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            assert p.grad is not None
            if name in values:
                values[name].grad = p.grad.view(-1)[guide.indices[name]].clone()
            if name in sums:
                sums[name] += p.grad.sign() if what == "sign" else _direction(name, p.grad, means)
            p.grad = None

        return hook

    @torch.no_grad()
    def write_back() -> None:
        for name, v in values.items():
            run.parameters[name].view(-1)[guide.indices[name]] = v

    for name, p in run.parameters.items():
        p.requires_grad_(name in sums or name in values)
    used = [(name, p) for name, p in run.parameters.items() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(gather(name)) for name, p in used]
    run.train(list(values.values()), steps, rate, run.total, write_back)
    run.step += steps
    for handle in hooks:
        handle.remove()
    with torch.no_grad():
        for name in values.keys() - set(run.head):
            run.parameters[name].view(-1)[guide.indices[name]] = base[name]
    for p in run.parameters.values():
        p.requires_grad_(True)
    return best(run, {name: total.abs() for name, total in sums.items()}, names, how)


def _direction(name: str, gradient: Tensor, means: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    square = gradient * gradient
    now = square.mean(1, keepdim=True), square.mean(0, keepdim=True)
    old = means.get(name, (torch.zeros_like(now[0]), torch.zeros_like(now[1])))
    rows, columns = (0.99 * a + 0.01 * b for a, b in zip(old, now, strict=True))
    means[name] = rows, columns
    return gradient / ((rows * columns / rows.mean()).sqrt() + 1e-12)


# --- the contenders ---------------------------------------------------------------------------------------------------

Choose = Callable[..., Indices]
CONTENDERS: dict[str, tuple[Choose | None, dict[str, Any]]] = {
    "full": (None, {}),
    # Random masks.
    "random-everywhere": (choose_random, {"pool": "all"}),
    "random": (choose_random, {}),
    # Fisher as in the demo; then stratified, by row, divided by row and column means, drawn instead of sorted.
    "fisher": (choose_fisher, {"pool": "no pooler", "how": "global"}),
    "fisher-equal": (choose_fisher, {}),
    "fisher-equal-rows": (choose_fisher, {"how": "row"}),
    "fisher-over-means-half": (choose_fisher, {"a": 0.5}),
    "fisher-over-means": (choose_fisher, {"a": 1.0}),
    "fisher-drawn-half": (choose_sample, {"power": 0.5}),
    "fisher-drawn-quarter": (choose_sample, {"power": 0.25}),
    "tstat-equal": (choose_fisher, {"method": "tstat"}),
    # Movement in dense training with Adam, and what of it matters.
    "moved": (choose_moved, {"what": "global", "pool": "all"}),
    "moved-counts": (choose_moved, {"what": "counts", "pool": "all"}),
    "moved-marginals": (choose_moved, {"what": "marginals", "pool": "all"}),
    "moved-equal": (choose_moved, {}),
    "moved-equal-free": (choose_moved, {"free": True}),
    # Movement without an optimizer's state.
    "streamed-sign": (choose_streamed, {"what": "sign"}),
    "streamed-sign-free": (choose_streamed, {"what": "sign", "free": True}),
    "streamed-sign-slow": (choose_streamed, {"what": "sign", "rate": 3e-5}),
    "streamed-sign-slow-free": (choose_streamed, {"what": "sign", "rate": 3e-5, "free": True}),
    "streamed-sign-short": (choose_streamed, {"what": "sign", "steps": 40, "rate": 2e-4}),
    "streamed-factored": (choose_streamed, {"what": "factored"}),
    # Directions summed along the training of a random mask.
    "on-the-way-sign": (choose_on_the_way, {"what": "sign"}),
    "on-the-way-factored": (choose_on_the_way, {"what": "factored"}),
    # From wide to narrow.
    "candidates": (choose_candidates, {"how": "global"}),
    "candidates-kept": (choose_candidates, {"how": "global", "rewind": False}),
    "candidates-equal": (choose_candidates, {}),
    "candidates-equal-slow": (choose_candidates, {"rate": 1e-3}),
    "candidates-equal-4": (choose_candidates, {"c": 4}),
}


def measure(name: str, task: str, seed: int, rate: float, part: str) -> dict[str, Any]:
    """Choose, train and return the record of the run."""
    run = Run(task, seed, part)
    choose, arguments = CONTENDERS[name]
    begin = perf_counter()
    layers: dict[str, float] = {}
    if choose is None:
        values, entries = list(run.model.parameters()), run.n
    else:
        mask = run.mask(choose(run, **arguments))
        torch.manual_seed(seed + 77)  # so that the dropout of the training does not depend on the search
        values, entries = list(attach(run.model, mask).parameters()), mask.k
        layers = {layer.split(".", 1)[-1]: round(count / mask.k, 3) for layer, count, _ in mask.groups() if count}
    chosen, left = perf_counter(), run.total - run.step
    run.train(values, left, rate, left)
    trained = perf_counter()
    return {
        "name": name,
        "task": task,
        "seed": seed,
        "rate": rate,
        "part": part,
        **evaluate(run.model, run.other_data),
        "entries": entries,
        "steps_trained": left,
        "seconds_search": round(chosen - begin, 1),
        "seconds_training": round(trained - chosen, 1),
        "share_by_layer": layers,
        "arguments": arguments,
        **environment(),
    }


def known() -> list[dict[str, Any]]:
    """Return the records there are."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", choices=list(CONTENDERS), help=", ".join(CONTENDERS))
    parser.add_argument("--task", choices=list(LENGTHS), default="words")
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--part", choices=["validation", "test"], default="validation")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.names:
        for seed in options.seeds:
            for rate in options.rates:
                wanted = {"name": name, "task": options.task, "seed": seed, "rate": rate, "part": options.part}
                record = next((r for r in known() if wanted.items() <= r.items()), None)
                if record is None:
                    record = measure(**wanted)
                    RESULTS.parent.mkdir(exist_ok=True)
                    with RESULTS.open("a") as file:
                        print(json.dumps(record), file=file)
                quality = record.get("pearson", record.get("accuracy"))
                print(f"{name:>24} {options.task} seed {seed} rate {rate:g}: {quality:.4f}", flush=True)


if __name__ == "__main__":
    main()
