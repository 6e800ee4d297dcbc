"""Networks as people write them: attention in its idioms, shifts before matrices, conditions, what a network keeps to
itself; and what stays as it was around a conversion."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from incremental_cases import MaskedConv2d, PlainPixelCNN
from torch import Tensor, nn

from pygen.autoregressive import incremental
from pygen.autoregressive.incremental import ConversionError

LEVELS, WIDTH = 4, 8


def later(length: int) -> Tensor:
    """True where a key comes later than a query."""
    return torch.ones(length, length).triu(1).bool()


class Sequence(nn.Module):
    """Tokens moved on by one, then something, then logits."""

    def __init__(self, then: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(LEVELS + 1, WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, LEVELS)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        z = self.embed(F.pad(x, (1, 0), value=LEVELS)[:, :-1])
        return self.head(z + self.then(self.query(z), self.key(z), self.value(z)))


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(2, (2, -1))


def einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bihd,bjhd->bhij", heads(q), heads(k)) / 2
    weights = weights.masked_fill(later(q.shape[1]), -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, heads(v)).flatten(2)


def einsum_of_columns(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (heads(each).permute(0, 2, 3, 1) for each in (q, k, v))
    weights = (torch.einsum("bhdi,bhdj->bhij", q, k) - 1e9 * later(q.shape[3])).softmax(-1)
    return torch.einsum("bhij,bhdj->bhdi", weights, v).flatten(1, 2).transpose(1, 2)


def of_gpt_1(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = (~later(q.shape[1])).float()
    scores = (q @ k.transpose(1, 2)) * seen - 1e4 * (1 - seen)
    return scores.softmax(-1) @ v


def unmasked_zeros(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    seen = (~later(q.shape[1])).float()
    return ((q @ k.transpose(1, 2)) * seen).softmax(-1) @ v


class Library(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = self.attention(q, k, v, attn_mask=later(q.shape[1]))[0]
        return out


def check(model: nn.Module, shape: tuple[int, ...], **options: object) -> None:
    """Verified by the conversion, and drawn with the probability that the network says."""
    net = incremental(model.eval(), shape, levels=LEVELS, **options)  # type: ignore[arg-type]
    x, log_prob = net.sample(3, seed=1)
    tokens = net.tokens(x)
    with torch.no_grad():
        logits = net.logits(tokens).log_softmax(-1)
    torch.testing.assert_close(log_prob, logits.gather(2, tokens[:, :, None]).sum((1, 2)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [2, 6])
@pytest.mark.parametrize("then", [Function(einsum), Function(einsum_of_columns), Function(of_gpt_1), Library()])
def test_idioms_of_attention(then: nn.Module, length: int) -> None:
    check(Sequence(then), (length,), values=torch.arange(LEVELS))


@pytest.mark.parametrize(
    "then",
    [
        unmasked_zeros,
        lambda q, k, v: v + (q @ k.transpose(1, 2)).masked_fill(later(q.shape[1]), -torch.inf).softmax(-1).mean(),
        lambda q, k, v: (q @ k.transpose(1, 2)).tanh().softmax(-1) @ v,
        lambda q, k, v: F.pad(q @ k.transpose(1, 2), (0, 1))[..., :-1].softmax(-1) @ v,
        lambda q, k, v: F.conv1d(q @ k.transpose(1, 2), torch.ones(6, 6, 1)).softmax(-1) @ v,
        lambda q, k, v: F.layer_norm(q @ k.transpose(1, 2), (6,)).softmax(-1) @ v,
        lambda q, k, v: F.linear(v.flatten(1), torch.ones(48, 48)).view_as(v),
        lambda q, k, v: F.pad(v.transpose(1, 2), (1, 0), mode="circular")[..., :-1].transpose(1, 2),
        lambda q, k, v: torch.full_like(v, v.tolist()[0][0][0]),
    ],
)
def test_what_is_not_supported_is_refused_in_words(then: Callable[..., Tensor]) -> None:
    with pytest.raises(ConversionError, match=r"(then|Sequence).* cannot be converted: "):
        incremental(Sequence(Function(then)).eval(), (6,), levels=LEVELS, values=torch.arange(LEVELS))


def down(x: Tensor) -> Tensor:
    return F.pad(x, (0, 0, 1, 0))[:, :, :-1]


def right(x: Tensor) -> Tensor:
    return F.pad(x, (1, 0))[..., :-1]


class Picture(nn.Module):
    """A causal convolution, something, then logits."""

    def __init__(self, then: Callable[..., Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = MaskedConv2d("A", 1, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, LEVELS, 1)
        self.linear, self.norm, self.slope = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.PReLU(WIDTH)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.head(z + self.then(self, z))


def attend_to_shifted(self: Picture, z: Tensor) -> Tensor:
    q, k, v = (each.flatten(2).transpose(1, 2)[:, None] for each in (z, right(z), right(z)))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0].transpose(1, 2).reshape(z.shape)


def written(self: Picture, z: Tensor) -> Tensor:
    z = z.clone()
    z[:, :, 0] = 0.0
    z[:, :, 1:, 0] = 2.0
    return z


@pytest.mark.parametrize("shape", [(1, 4, 5), (1, 2, 5), (1, 5, 2), (1, 1, 3), (1, 1, 1)])
@pytest.mark.parametrize(
    "then",
    [
        lambda self, z: self.linear(down(z).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        lambda self, z: self.norm(right(z).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        lambda self, z: self.linear(down(z).flatten(2).transpose(1, 2)).tanh().transpose(1, 2).view_as(z),
        attend_to_shifted,
        lambda self, z: self.slope(F.hardswish(z)) + F.hardsigmoid(z),
    ],
)
def test_lines_of_zeros_stay_rows_and_columns(then: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    check(Picture(then), shape)


def test_numbers_are_written_into_what_the_network_made() -> None:
    check(Picture(written), (1, 4, 5))


class OfLength(nn.Module):
    """As many levels as elements: of (1, levels, length) and (1, length, levels) only one makes sense."""

    def __init__(self, levels_first: bool) -> None:
        super().__init__()
        self.conv, self.levels_first = nn.Conv1d(1, LEVELS, 2), levels_first

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.conv(F.pad(x, (2, 0))[..., :-1])
        return logits if self.levels_first else logits.transpose(1, 2)


@pytest.mark.parametrize("levels_first", [True, False])
def test_as_many_levels_as_elements(levels_first: bool) -> None:
    check(OfLength(levels_first), (1, LEVELS))


# Conditions.


class Labelled(nn.Module):
    def __init__(self, coded: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = MaskedConv2d("A", 1, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, LEVELS, 1)
        self.label, self.coded = nn.Linear(10, WIDTH), coded

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x) + self.label(self.coded(label))[:, :, None, None]))  # type: ignore[no-any-return]


def scattered(label: Tensor) -> Tensor:
    return torch.zeros(len(label), 10).scatter_(1, label[:, None], 1.0)


@pytest.mark.parametrize("coded", [lambda label: F.one_hot(label, 10).float(), scattered])
def test_labels_as_one_hot_codes(coded: Callable[[Tensor], Tensor]) -> None:
    model = Labelled(coded).eval()
    net = incremental(model, (1, 4, 4), levels=LEVELS, condition=torch.tensor([0]))
    labels = torch.arange(10)
    for _ in range(2):  # the second time from what is kept
        x, log_prob = net.sample(10, condition=labels)
        with torch.no_grad():
            expected = F.cross_entropy(model(x, labels), net.tokens(x).view(10, 4, 4), reduction="none").sum((1, 2))
        torch.testing.assert_close(log_prob, -expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("coded", "message"),
    [
        (lambda label: torch.eye(10)[int(label[0])][None], "looks at the values of the condition"),
        (lambda label: torch.ones(1, 10) if (label == 0).all() else torch.zeros(1, 10), "values of the condition"),
        (lambda label: F.pad(F.one_hot(label).float(), (0, 9 - int(label.max()))), r"condition|other number"),
        (lambda label: torch.from_numpy(label.numpy() * torch.ones(1, 10).numpy()).float(), "outputs differ"),
    ],
)
def test_branches_on_a_condition_are_refused(coded: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        incremental(Labelled(coded).eval(), (1, 4, 4), levels=LEVELS, condition=torch.tensor([0]))


# What a network keeps to itself, and what is the process's.


@functools.lru_cache
def kept_mask(size: int) -> Tensor:
    return torch.tril(torch.ones(size, size))


def test_a_network_may_keep_what_it_made() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head, self.ones = (
                MaskedConv2d("A", 1, WIDTH, 3, padding=1),
                nn.Conv2d(WIDTH, LEVELS, 1),
                None,
            )

        def forward(self, x: Tensor) -> Tensor:
            z = self.first(x)
            if self.ones is None:
                self.ones = torch.ones_like(z[:, :1])
            q = z.flatten(2).transpose(1, 2)
            scores = (q @ q.transpose(1, 2)).masked_fill(kept_mask(q.shape[1]) == 0, -torch.inf)
            return self.head(z * self.ones + (scores.softmax(-1) @ q).transpose(1, 2).view_as(z))  # type: ignore[no-any-return]

    model = Keeping().eval()
    check(model, (1, 4, 4))
    x = torch.zeros(1, 1, 4, 4)
    with torch.no_grad():
        x[:, :, 0, 0].copy_(model(x)[:, 0, 0, 0, None])
    model(x).sum().backward()
    torch.optim.SGD(model.parameters()).step()
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_threads_convert_one_after_another_and_leave_things_as_they_were() -> None:
    models = [PlainPixelCNN(4, 3).train() for _ in range(4)]
    start, errors = threading.Barrier(len(models)), []

    def convert(model: nn.Module) -> None:
        start.wait()
        try:
            incremental(model, (1, 5, 5), levels=1)
        except Exception as error:  # every kind is a failure
            errors.append(error)

    threads = [threading.Thread(target=convert, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert all(module.training for model in models for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_network_is_followed_without_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        check(Picture(lambda self, z: z), (1, 4, 4))


def test_a_level_may_be_forbidden() -> None:
    model = Picture(lambda self, z: z)
    with torch.no_grad():
        model.head.bias[2] = -torch.inf
    net = incremental(model.eval(), (1, 4, 4), levels=LEVELS)
    assert not (net.tokens(net.sample(50)[0]) == 2).any()


def test_bad_input_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    net = incremental(Picture(lambda self, z: z).eval(), (1, 4, 4), levels=LEVELS)
    x, _ = net.sample(2, progress=True)
    assert "16/16 tokens" in capsys.readouterr().err
    known = torch.ones(4, 4, dtype=torch.bool)
    for call, error, message in (
        (lambda: net.sample(-1), ValueError, "n is -1"),
        (lambda: net.start(-1), ValueError, "n is -1"),
        (lambda: net.complete(x, known.float()), TypeError, "known has dtype torch.float32"),
        (lambda: net.complete(x, known[:3]), ValueError, r"known has shape \(3, 4\)"),
        (lambda: net.complete(x[..., :3], known), ValueError, r"x has shape \(2, 1, 4, 3\)"),
        (lambda: net.complete(x * torch.nan, known), ValueError, "x has NaN"),
        (lambda: net.logits(net.tokens(x).float()), TypeError, "tokens has dtype torch.float32"),
        (lambda: net.logits(net.tokens(x)[:, :3]), ValueError, r"tokens has shape \(2, 3\)"),
    ):
        with pytest.raises(error, match=message):
            call()
    assert net.log_prob(x * torch.nan).isnan().all()
    kept = net.complete(torch.where(known.tril(), x, torch.nan), known.tril(), seed=3)[0]
    assert torch.equal(kept, net.complete(x, known.tril(), seed=3)[0])
