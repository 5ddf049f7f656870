"""Every call that the batched engine knows, and every one that it must refuse by name."""

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fishmask import FishError, fisher, rules
from fishmask.costs import GPU
from fishmask.fisher import scores
from tests.cases import case, hf, seeded
from tests.reference import assert_close, loop


class Use(nn.Module):
    """Parameters of given shapes, and a function (module, x) -> output that uses them."""

    def __init__(self, forward, inner: nn.Module | None = None, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self._forward, self.inner = forward, inner
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def use(forward, inner=None, **shapes) -> nn.Module:
    return seeded(lambda: Use(forward, inner() if inner else None, **shapes))()


def data(B: int, *shape: int, words: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    x = torch.randint(words, (B, *shape), generator=g) if words else torch.randn(B, *shape, generator=g)
    return x, torch.randn(B, generator=g)


def total(x: Tensor) -> Tensor:
    """One number per example, not linear."""
    return torch.tanh(x).flatten(1).sum(1) + 0.1 * x.square().flatten(1).sum(1)


def known(model: nn.Module, batch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Using padding='same'")
        found = fisher(model, [batch], examples=len(batch[1]), engine="batched")
        assert_close(found, loop(model, batch))
        found = scores(model, [batch], method="absolute", examples=len(batch[1]), engine="batched")
        assert_close(found, loop(model, batch, torch.abs), floor=1e-2)


def refused(model: nn.Module, batch, message: str) -> None:
    count = len(batch[1])
    with pytest.raises(FishError, match=f"(?s)cannot score this model exactly: .*{message}.*engine='loop'"):
        fisher(model, [batch], examples=count, engine="batched")
    with pytest.warns(
        UserWarning, match=f"(?s)one example at a time by the loop engine, because .*{message}"
    ) as caught:
        found = fisher(model, [batch, batch], examples=2 * count)
    assert len(caught) == 1  # not once more for the second batch
    assert_close(found, {name: 2 * score for name, score in loop(model, batch).items()})


# -- known uses -------------------------------------------------------------------------------------------------------

SEQUENCE = data(4, 6, 5)
FLAT = data(4, 5)
IMAGE = data(3, 4, 7, 6)

PRODUCTS = {
    "linear": (lambda m, x: total(F.linear(x, m.w, m.b)), {"w": (3, 5), "b": (3,)}, SEQUENCE),
    "linear-4d": (lambda m, x: total(F.linear(x[:, :, None].expand(-1, -1, 2, -1), m.w)), {"w": (3, 5)}, SEQUENCE),
    "linear-bias-only": (lambda m, x: total(F.linear(x, torch.ones(3, 5).to(x), m.b)), {"b": (3,)}, SEQUENCE),
    "linear-keywords": (lambda m, x: total(F.linear(x, bias=m.b, weight=m.w)), {"w": (3, 5), "b": (3,)}, FLAT),
    "addmm": (
        lambda m, x: total(torch.addmm(m.b, x.view(-1, 5), m.w).view(-1, 6, 3)), {"w": (5, 3), "b": (3,)}, SEQUENCE),
    "matmul": (lambda m, x: total(x @ m.w), {"w": (5, 3)}, SEQUENCE),
    "mm": (lambda m, x: total(torch.mm(x, m.w)), {"w": (5, 3)}, FLAT),
    "matmul-transposed": (lambda m, x: total(torch.matmul(x, m.w.t())), {"w": (3, 5)}, SEQUENCE),
    "property-T": (lambda m, x: total(x @ m.w.T), {"w": (3, 5)}, SEQUENCE),
    "chunks": (
        lambda m, x: total(sum(F.linear(x, w) ** (i + 1) for i, w in enumerate(m.w.chunk(2)))), {"w": (6, 5)}, FLAT),
    "slices": (lambda m, x: total(F.linear(x, m.w[1:]) + F.linear(x, m.w[:-1])), {"w": (4, 5)}, SEQUENCE),
    "columns": (lambda m, x: total(F.linear(x[..., :3], m.w[:, :3])), {"w": (4, 5)}, SEQUENCE),
    "view": (lambda m, x: total(F.linear(x, m.w.view(3, 5))), {"w": (15,)}, SEQUENCE),
    "cast": (lambda m, x: total(F.linear(x.double(), m.w.to(torch.float64)).float()), {"w": (3, 5)}, SEQUENCE),
    "twice": (
        lambda m, x: total(F.linear(torch.tanh(F.linear(x, m.w, m.b)), m.w, m.b)), {"w": (5, 5), "b": (5,)}, SEQUENCE),
    "first-position": (lambda m, x: total(F.linear(x, m.w, m.b)[:, 0]), {"w": (3, 5), "b": (3,)}, SEQUENCE),
    "some-positions": (lambda m, x: total(F.linear(x, m.w, m.b)[:, 1:4]), {"w": (3, 5), "b": (3,)}, SEQUENCE),
    "no-effect": (
        lambda m, x: total(F.linear(x, m.w) + F.linear(x, m.v).detach()), {"w": (3, 5), "v": (3, 5)}, FLAT),
    "second-use-without-effect": (
        lambda m, x: total(F.linear(x, m.w)) + F.linear(x, m.w).detach().flatten(1).sum(1), {"w": (3, 5)}, FLAT),
}  # fmt: skip

CONVOLUTIONS = {
    "conv1d": (lambda m, x: total(F.conv1d(x, m.w, m.b, padding=1)), {"w": (3, 6, 3), "b": (3,)}, SEQUENCE),
    "conv2d": (lambda m, x: total(F.conv2d(x, m.w, m.b, (2, 1), (1, 0), 2)), {"w": (3, 4, 2, 3), "b": (3,)}, IMAGE),
    "conv2d-groups": (lambda m, x: total(F.conv2d(x, m.w, groups=2)), {"w": (6, 2, 3, 3)}, IMAGE),
    "conv2d-same": (lambda m, x: total(F.conv2d(x, m.w, padding="same", dilation=(1, 2))), {"w": (3, 4, 2, 4)}, IMAGE),
    "conv2d-valid": (lambda m, x: total(F.conv2d(x, m.w, padding="valid")), {"w": (3, 4, 2, 3)}, IMAGE),
    "conv3d": (lambda m, x: total(F.conv3d(x[:, None], m.w, m.b, 2)), {"w": (2, 1, 2, 3, 2), "b": (2,)}, IMAGE),
    "conv2d-twice": (
        lambda m, x: total(F.conv2d(F.conv2d(x, m.w, padding=1).relu_(), m.w)), {"w": (4, 4, 3, 3)}, IMAGE),
}  # fmt: skip

NORMS = {
    "layer-norm": (lambda m, x: total(F.layer_norm(x, (5,), m.w, m.b)), {"w": (5,), "b": (5,)}, SEQUENCE),
    "layer-norm-2d": (lambda m, x: total(F.layer_norm(x, (6, 5), m.w, m.b, 0.1)), {"w": (6, 5), "b": (6, 5)}, SEQUENCE),
    "rms-norm": (lambda m, x: total(F.rms_norm(x, (5,), m.w)), {"w": (5,)}, SEQUENCE),
    "group-norm": (lambda m, x: total(F.group_norm(x, 2, m.w, m.b)), {"w": (4,), "b": (4,)}, IMAGE),
    "batch-norm": (
        lambda m, x: total(F.batch_norm(x, x.new_full((4,), 0.2), x.new_full((4,), 2.0), m.w, m.b)),
        {"w": (4,), "b": (4,)}, IMAGE),
}  # fmt: skip

ELEMENTWISE = {
    "scale": (lambda m, x: total(m.w * x), {"w": (5,)}, SEQUENCE),
    "scalar": (lambda m, x: total(x * m.w + m.v), {"w": (), "v": (1,)}, SEQUENCE),
    "divide": (lambda m, x: total(x / m.w), {"w": (5,)}, SEQUENCE),
    "divide-by-x": (lambda m, x: total(m.w / (x + 9)), {"w": (6, 5)}, SEQUENCE),
    "subtract": (lambda m, x: total(m.w - x), {"w": (6, 1)}, SEQUENCE),
    "channels": (lambda m, x: total(x * m.w), {"w": (4, 1, 1)}, IMAGE),
    "in-place": (lambda m, x: total((x * 1).add_(m.w)), {"w": (5,)}, SEQUENCE),
    "augmented": (lambda m, x: total(augmented(x * 1, m.w)), {"w": (5,)}, SEQUENCE),
    "table": (lambda m, x: total(x + m.w[:, :6]), {"w": (1, 9, 5)}, SEQUENCE),
    "class-token": (lambda m, x: total(torch.cat([m.w.expand(len(x), -1, -1), x], 1)), {"w": (1, 1, 5)}, SEQUENCE),
    "class-token-of-vector": (lambda m, x: total(torch.cat([m.w.expand(len(x), 1, 5), x], 1)), {"w": (5,)}, SEQUENCE),
    "class-token-twice": (lambda m, x: total(torch.cat([m.w.repeat(len(x), 2, 1), x], 1)), {"w": (1, 1, 5)}, SEQUENCE),
    "class-token-with-place": (
        lambda m, x: total(torch.cat([(m.w + m.p[:, :1]).expand(len(x), -1, -1), x + m.p[:, 1:]], 1)),
        {"w": (1, 1, 5), "p": (1, 7, 5)}, SEQUENCE),
    "mask-token": (lambda m, x: total(torch.where(x[..., :1] > 0, m.w, x)), {"w": (5,)}, SEQUENCE),
    "expand-as": (lambda m, x: total(m.w.expand_as(x) * x), {"w": (5,)}, SEQUENCE),
}  # fmt: skip


def augmented(x: Tensor, w: Tensor) -> Tensor:
    x += w
    x *= w
    return x


TABLE = PRODUCTS | CONVOLUTIONS | NORMS | ELEMENTWISE


@pytest.mark.parametrize("name", TABLE)
def test_known_uses_are_exact(name):
    forward, shapes, batch = TABLE[name]
    known(use(forward, **shapes), batch)


@pytest.mark.parametrize("padding", [None, 2, -1])
def test_embedding(padding):
    x, y = data(4, 6, words=9)
    model = use(lambda m, x: total(F.embedding(x, m.w, padding)), w=(9, 3))
    known(model, (x, y))
    known(use(lambda m, x: total(F.embedding(x, m.w)), w=(9, 3)), (x[:, 0], y))  # one id for each example


def test_embedding_of_positions_that_serve_all_examples():
    x, y = SEQUENCE
    ids = torch.arange(6)[None]
    known(use(lambda m, x: total(x + F.embedding(ids, m.w)), w=(9, 5)), (x, y))


def test_tied_embedding_and_head():
    x, y = data(4, 6, words=8)
    known(use(lambda m, x: total(F.linear(torch.tanh(F.embedding(x, m.w, 0)), m.w, m.b)), w=(9, 3), b=(9,)), (x, y))


def padding(x: Tensor) -> Tensor:
    """Forbid some positions by their content, never the first."""
    return (x[..., 0] > 0.5) & (torch.arange(x.shape[1]) > 0)


SQUARE = torch.ones(6, 6, dtype=torch.bool).triu(1)
ATTENTION = {
    "weights": ({}, lambda a, x: a(x, x, x)),
    "every-heads-weights": ({}, lambda a, x: a(x, x, x, average_attn_weights=False)),
    "fast": ({}, lambda a, x: a(x, x, x, need_weights=False)),
    "no-bias": ({"bias": False}, lambda a, x: a(x, x, x, need_weights=False)),
    "causal": ({}, lambda a, x: a(x, x, x, need_weights=False, attn_mask=SQUARE, is_causal=True)),
    "float-mask": ({}, lambda a, x: a(x, x, x, attn_mask=torch.arange(36).view(6, 6).to(x) / 36)),
    "mask-by-head": ({}, lambda a, x: a(x, x, x, attn_mask=SQUARE.expand(2 * len(x), 6, 6))),
    "padding": ({}, lambda a, x: a(x, x, x, need_weights=False, key_padding_mask=padding(x))),
    "padding-and-causal": ({}, lambda a, x: a(x, x, x, key_padding_mask=padding(x), attn_mask=SQUARE)),
    "padding-and-float": ({}, lambda a, x: a(x, x, x, key_padding_mask=padding(x).to(x), need_weights=False)),
    "cross": ({}, lambda a, x: a(x, x[:, :4] * 2, x[:, :4] - 1, need_weights=False)),
    "other-widths": ({"kdim": 3, "vdim": 2}, lambda a, x: a(x, x[:, :4, :3], x[:, :4, :2])),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    options, forward = ATTENTION[name]
    model = use(
        lambda m, x: sum(total(part) for part in forward(m.inner, x) if part is not None),
        lambda: nn.MultiheadAttention(4, 2, batch_first=True, **options),
    )
    known(model, data(3, 6, 4))


# -- refused uses -----------------------------------------------------------------------------------------------------


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x)
        return 2 * x * w

    @staticmethod
    def backward(ctx, dY):
        (x,) = ctx.saved_tensors
        return None, (2 * dY * x).sum(0)


def without_gradient(m, x):
    with torch.no_grad():
        h = F.linear(x, m.v)
    return total(F.linear(x, m.w) + h)


def copied_in(m, x):
    h = x * 1
    h[:, :] = m.w[:, :5]
    return total(F.linear(h * x, m.w))


def permuted(m, x):
    """Examples first by shape, positions first in memory."""
    h = torch.tanh(x.transpose(0, 1).contiguous().transpose(0, 1))
    return total(F.linear(h.transpose(0, 1).view(-1, 5), m.w).view(6, -1, 3).transpose(0, 1))


def hidden(m, x):
    y = F.linear(x, m.w)
    with torch._C.DisableTorchFunction():
        return total(y + F.linear(x, m.v))


def changed_input(m, x):
    h = x * 2
    y = F.linear(h, m.w)
    h += 1
    return total(y + h)


def checkpointed(m, x):
    return total(checkpoint(lambda h: torch.tanh(F.linear(h, m.w)), x, use_reentrant=False))


REFUSED = {
    "unknown": (lambda m, x: total(F.bilinear(x, x, m.w)), {"w": (2, 5, 5)}, FLAT, r"w is used by .*bilinear"),
    "function-of-it": (lambda m, x: total(F.linear(x, torch.exp(m.w))), {"w": (3, 5)}, FLAT, r"w is used by torch\.e"),
    "two-of-them": (lambda m, x: total(F.linear(x, m.w * m.v)), {"w": (3, 5), "v": (3, 5)}, FLAT, "w is used by"),
    "one-of-many": (lambda m, x: total(F.linear(x, m.w[0])), {"w": (2, 3, 5)}, FLAT, "indexed by something else"),
    "listed": (lambda m, x: total(F.linear(x, torch.cat([m.w, m.w]))), {"w": (3, 5)}, FLAT, r"w is used by torch\.cat"),
    "custom": (lambda m, x: total(Double.apply(x, m.w)), {"w": (5,)}, FLAT, "used by the custom autograd function D"),
    "custom-view": (lambda m, x: total(Double.apply(x, m.w[:5])), {"w": (6,)}, FLAT, "w is used by the custom"),
    "copied-in": (copied_in, {"w": (1, 5)}, FLAT, r"w is used by .*setitem"),
    "no-grad": (without_gradient, {"w": (3, 5), "v": (3, 5)}, FLAT, r"v is used by .*linear.*no_grad"),
    "checkpoint": (checkpointed, {"w": (5, 5)}, SEQUENCE, "w and others are used under gradient checkpointing"),
    "flat-tokens": (lambda m, x: total(F.linear(x.transpose(0, 1).reshape(-1, 5), m.w).view(6, -1, 3).transpose(0, 1)),
        {"w": (3, 5)}, SEQUENCE, r"input, of shape \[12, 5\], does not have the 2 examples as first dimension"),
    "flat-tokens-of-a-permuted": (permuted, {"w": (3, 5)}, SEQUENCE, r"its input, of shape \[12, 5\], does not have"),
    "weight-of-one-row": (
        lambda m, x: total(F.linear(x, m.w + m.v)), {"w": (1, 5), "v": (1, 5)}, FLAT, "change the output"),
    "hidden": (hidden, {"w": (3, 5), "v": (3, 5)}, FLAT, "v is used by code that the batched engine does not see"),
    "scaled-sum": (lambda m, x: total(torch.add(x, m.w, alpha=2)), {"w": (5,)}, FLAT, "it is called with keywords"),
    "matrix-bias": (lambda m, x: total(torch.addmm(m.b, x, m.w)), {"w": (5, 3), "b": (1, 3)}, FLAT, "the bias has"),
    "chosen-rows": (lambda m, x: total(F.linear(x[x[:, 0].argsort()], m.w)[x[:, 0].argsort().argsort()]),
        {"w": (3, 5)}, FLAT, "argsort before it may have changed the order"),
    "masked-rows": (lambda m, x: total(F.linear(x[x[:, 0] > -99], m.w)), {"w": (3, 5)}, FLAT, "changed the order"),
    "vector": (lambda m, x: torch.tanh(x @ m.w), {"w": (5,)}, FLAT, r"only input @ matrix"),
    "from-the-left": (lambda m, x: total(m.w @ x.mT), {"w": (3, 5)}, SEQUENCE, r"only input @ matrix"),
    "scaled-addmm": (lambda m, x: total(torch.addmm(m.b, x, m.w, alpha=2)), {"w": (5, 3), "b": (3,)}, FLAT, "alpha"),
    "copied": (lambda m, x: total(F.linear(x, m.w.t().reshape(-1).view(3, 5))), {"w": (3, 5)}, FLAT, "a copy"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_unknown_uses_are_refused_by_name(name):
    forward, shapes, batch, message = REFUSED[name]
    model = use(forward, **shapes)
    refused(model, batch, message)


def test_an_input_that_is_changed_after_its_use_is_refused():
    """Plain autograd cannot differentiate such a model either, so there is no loop to fall back to."""
    with pytest.raises(FishError, match=r"w is used by .*linear, whose input is changed in place afterwards"):
        fisher(use(changed_input, w=(5, 5)), [FLAT], examples=4, engine="batched")


def test_embedding_options_that_change_the_gradient_are_refused():
    x, y = data(4, 6, words=8)
    scaled = use(lambda m, x: total(F.embedding(x, m.w, scale_grad_by_freq=True)), w=(9, 3))
    with pytest.raises(FishError, match=r"w is used by .*embedding, and max_norm or scale_grad_by_freq is set"):
        fisher(scaled, [(x, y)], examples=4, engine="batched")


@pytest.mark.parametrize("B", [2, 3, 6])
def test_positions_without_an_example_axis_are_refused_whatever_the_batch_size(B):
    ids = torch.arange(6)
    model = use(lambda m, x: total(x + F.embedding(ids, m.w)), w=(9, 5))
    refused(model, data(B, 6, 5), r"w is used by .*embedding, and the tensor of ids, of shape \[6\]")


@pytest.mark.parametrize("pick", [0, 1, -1])
@pytest.mark.parametrize("positions", [2, 4])
def test_positions_first_is_refused_even_with_as_many_positions_as_examples(positions, pick):
    """With two of both, each shape agrees with examples first, and one picked position could pass for an example."""

    def forward(m, x):
        x = x.transpose(0, 1)
        return total(F.linear(torch.tanh(F.linear(x, m.w)), m.v)[pick])

    batch = data(positions, positions, 5)
    refused(use(forward, w=(5, 5), v=(3, 5)), batch, "[vw] is used")


@pytest.mark.parametrize("B", [2, 7])
def test_torch_encoder_with_positions_first_and_as_many_examples(B):
    c = case("torch-encoder-positions-first")
    ids, y = c.batch(B, 0)
    batch = (ids[:, :B], y)
    model = c.make()
    model.place = nn.Parameter(model.place[:, :B].detach().clone())
    with pytest.warns(UserWarning, match="because .* is used"):
        found = fisher(model, [batch], examples=B)
    assert_close(found, fisher(model, [batch], examples=B, engine="loop"))


@pytest.mark.parametrize("power", [rules.SQUARE, rules.ABSOLUTE])
@pytest.mark.parametrize("x_first", [False, True])
@pytest.mark.parametrize("dead", [False, True])
def test_powers_of_all_examples_together(power, x_first, dead, monkeypatch):
    x, dY = torch.randn(3, 5, 4), torch.randn(3, 5, 6)
    if dead:  # examples of different lengths, one of them empty
        dY[0, 2:] = dY[1] = dY[2, 4:] = 0.0
    start = torch.rand((4, 6) if x_first else (6, 4))
    want = start.double()
    for n in range(3):
        gradient = x[n].double().t() @ dY[n].double()
        want += power.of(gradient if x_first else gradient.t())
    calls = []
    grouped = {False: lambda device: False, True: lambda device: calls.append(device) or True}
    for together in grouped:
        monkeypatch.setattr("fishmask.rules._grouped", grouped[together])
        rule = rules.Product(rules.View("w", start, lambda whole: whole), x, x_first)
        rule.receive(dY)
        found = start.clone()
        rule.sum_(power, found, torch.empty)
        assert torch.allclose(found.double(), want, rtol=1e-6)
    assert calls


def test_the_kernel_of_powers_serves_only_where_it_was_measured_to_win(monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr("fishmask.rules.available", lambda device: True)
    for square, grouped, wins in ((None, None, False), (2.0, 1.0, True), (1.0, 2.0, False)):
        monkeypatch.setattr(
            "fishmask.rules.costs_for", lambda device, s=square, g=grouped: replace(GPU, square=s, grouped=g)
        )
        assert rules._grouped(cuda) is wins
        assert not rules._grouped(cpu)


def test_a_batch_that_uses_no_parameter_adds_nothing():
    model = use(lambda m, x: total(F.linear(x, m.w) if x.shape[1] == 6 else x), w=(3, 5))
    first, second = data(3, 6, 5), data(3, 4, 5)
    for engine in ("batched", "loop"):
        assert_close(fisher(model, [first, second], examples=6, engine=engine), loop(model, first))


def test_relative_positions_with_as_many_positions_as_examples():
    c = case("t5")
    batch = c.batch(7, 1)
    with pytest.warns(UserWarning, match=r"relative_attention_bias\.weight is used by .*embedding"):
        found = fisher(c.make(), [batch], examples=7)
    assert_close(found, fisher(c.make(), [batch], examples=7, engine="loop"))


@pytest.mark.parametrize("option", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention_options_without_a_rule_are_refused(option):
    model = use(
        lambda m, x: total(m.inner(x, x, x)[0]), lambda: nn.MultiheadAttention(4, 2, batch_first=True, **option)
    )
    refused(model, data(3, 6, 4), r"inner\.in_proj_weight is used by .*multi_head_attention_forward, and bias_k")


def test_recurrent_layers_go_to_the_loop():
    model = use(lambda m, x: total(m.inner(x)[0]), lambda: nn.LSTM(5, 3, batch_first=True))
    refused(model, SEQUENCE, r"inner\.weight_ih_l0 is used by .*lstm")


def test_the_loop_takes_over_in_a_later_batch_with_the_scores_so_far():
    def forward(m, x):
        return total(F.linear(x, m.w) if x.shape[1] == 6 else x @ torch.exp(m.w).t())

    model = use(forward, w=(3, 5))
    first, second = data(3, 6, 5), data(3, 4, 5)
    with pytest.warns(UserWarning, match=r"w is used by torch\.exp"):
        found = fisher(model, [first, second, first], examples=9)
    parts = [loop(model, first), loop(model, second), loop(model, first)]
    assert_close(found, {"w": sum(part["w"] for part in parts)})


def test_a_parameter_in_a_frozen_model_is_still_found_missing():
    """Weights in a foreign autograd function must not pass as unused because they are frozen while recording."""
    refused(
        use(lambda m, x: total(Double.apply(F.linear(x, m.w), m.v)), w=(5, 5), v=(5,)), FLAT, "v is used by the custom"
    )


def test_other_families_that_are_not_in_the_table():
    settings = {"vocab_size": 40, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"intermediate_size": 16, "num_labels": 3, "pad_token_id": 1, "max_position_embeddings": 20}
    batch = case("bert-padded").batch(3, 0)
    for family in ("Roberta", "Electra"):
        make = hf(f"{family}ForSequenceClassification", f"{family}Config", **settings)
        found = fisher(make(), [batch], examples=3, engine="batched")
        assert_close(found, fisher(make(), [batch], examples=3, engine="loop"))
