"""Converted networks against the networks themselves, and what conversion refuses."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from incremental_cases import CASES, Case, MaskedConv2d, PlainPixelCNN, build
from torch import Tensor, nn

from pygen import _native, ops
from pygen.autoregressive import fixed_point_sample
from pygen.autoregressive.incremental import ConversionError, Incremental, incremental
from pygen.autoregressive.incremental import converted as converted_module
from pygen.autoregressive.state import State
from pygen.ops.logistics import level_log_prob

CONVERTED: dict[str, tuple[Case, Incremental]] = {}


def converted(name: str) -> tuple[Case, Incremental]:
    if name not in CONVERTED:
        case = build(name)
        CONVERTED[name] = case, incremental(case.model, case.shape, levels=case.levels, **case.options)
    return CONVERTED[name]


def conditions(case: Case, n: int) -> Tensor | None:
    example = case.options.get("condition")
    if example is None:
        return None
    if example.is_floating_point():
        return torch.randn(n, *example.shape[1:], dtype=example.dtype)
    return torch.arange(n) % 3


def outputs(case: Case, net: Incremental, tokens: Tensor, condition: Tensor | None) -> Tensor:
    """The network's own outputs for each element, (n, length, outputs)."""
    with torch.no_grad():
        out = case.call(net.pictures(tokens), condition)
    n, length = tokens.shape
    if out.shape == (n, length, net.outputs):
        return out
    colours = net.geometry.channels
    if net.logistics:
        return out.flatten(2).transpose(1, 2).repeat_interleave(colours, 1)
    return out.reshape(n, colours, net.levels, -1).permute(0, 3, 1, 2).reshape(n, length, -1)


def levels(net: Incremental, tokens: Tensor, condition: Tensor | None) -> Tensor:
    """The logits of every element's levels, (n, length, levels)."""
    whole, colours = net.logits(tokens, condition=condition), net.geometry.channels
    if not net.logistics:
        return whole
    pixels = net.values[tokens].unflatten(1, (-1, colours))
    each = [
        level_log_prob(x, own.contiguous(), levels=net.levels)
        for x, own in zip(pixels.unbind(1), whole[:, ::colours].unbind(1), strict=True)
    ]
    return torch.cat(each, 1)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_logits_are_the_network_s(name: str) -> None:
    case, net = converted(name)
    tokens, condition = torch.randint(net.levels, (3, net.length)), conditions(case, 3)
    expected = outputs(case, net, tokens, condition)
    assert expected.std() > 0.05
    assert relative(net.logits(tokens, condition=condition), expected) < 1e-5


@pytest.mark.parametrize(
    "name", ["gated, classes", "plus plus", "snail", "wave", "transformer", "mixed", "class planes"]
)
def test_in_float64_the_logits_are_the_network_s_to_rounding(name: str) -> None:
    case = build(name, torch.float64)
    net = incremental(case.model, case.shape, levels=case.levels, **case.options)
    assert net.dtype == torch.float64
    tokens, condition = torch.randint(net.levels, (2, net.length)), conditions(case, 2)
    assert relative(net.logits(tokens, condition=condition), outputs(case, net, tokens, condition)) < 1e-12


def draw_one_by_one(case: Case, net: Incremental, n: int, seed: int, condition: Tensor | None) -> Tensor:
    """The naive way: a pass through the whole network for every element."""
    tokens, ids, colours = torch.zeros(n, net.length, dtype=torch.int64), torch.arange(n), net.geometry.channels
    for t in range(net.length):
        row = outputs(case, net, tokens, condition)[:, t]
        if net.logistics:
            first = t - t % colours
            x = torch.zeros(n, colours)
            x[:, : t - first] = tokens[:, first:t].float() * (2 / (net.levels - 1)) - 1
            known = (torch.arange(colours) < t - first).expand(n, -1)
            drawn, _ = ops.sample_discretized_logistics(
                row, seed=seed, sample_ids=ids, position=first, colours=colours, levels=net.levels, x=x, known=known
            )
            tokens[:, t] = ((drawn[:, t - first] + 1) * ((net.levels - 1) / 2)).round().long()
        else:
            tokens[:, t], _ = ops.sample_logits(row, seed=seed, sample_ids=ids, position=t)
    return tokens


@pytest.mark.parametrize("name", CASES)
def test_draws_what_the_naive_loop_draws(name: str) -> None:
    case, net = converted(name)
    condition = conditions(case, 2)
    x, log_prob = net.sample(2, condition=condition, seed=5)
    expected = draw_one_by_one(case, net, 2, 5, condition)
    assert torch.equal(net.tokens(x), expected)
    assert torch.equal(x, net.pictures(expected))
    scored = net.log_prob(x, condition=condition)
    torch.testing.assert_close(log_prob, scored, rtol=1e-5, atol=1e-5)
    if not net.logistics:
        chances = outputs(case, net, expected, condition).log_softmax(-1).gather(2, expected[..., None]).sum((1, 2))
        torch.testing.assert_close(log_prob, chances, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", ["gated, colours", "plus plus", "snail", "wave"])
@pytest.mark.usefixtures("four_threads")
def test_a_sample_is_the_same_bits_in_any_batch_order_and_number_of_threads(name: str) -> None:
    case, net = converted(name)
    n = 19
    condition, ids = conditions(case, n), torch.arange(n) * 3 - 7
    tokens = torch.randint(net.levels, (n, net.length))
    whole = net.logits(tokens, condition=condition)
    drawn = net.fill(tokens, ids=ids, condition=condition, seed=2)
    for threads in (1, 3):
        _native.set_num_threads(threads)
        for rows in (torch.arange(n).flip(0), torch.tensor([4]), torch.tensor([17, 0, 3, 3, 9])):
            part = None if condition is None else condition[rows]
            assert torch.equal(net.logits(tokens[rows], condition=part), whole[rows])
            for found, expected in zip(
                net.fill(tokens[rows], ids=ids[rows], condition=part, seed=2), drawn, strict=True
            ):
                assert torch.equal(found, expected[rows])
    _native.set_num_threads(0)


@pytest.mark.parametrize("name", ["gated, colours", "snail", "wave, embedding", "plus plus"])
def test_steps_are_the_same_bits_as_a_whole_sample(name: str) -> None:
    case, net = converted(name)
    condition, tokens = conditions(case, 3), torch.randint(net.levels, (3, net.length))
    whole = levels(net, tokens, condition)
    state = net.start(3, condition=condition)
    logits, state = net.step(None, state)
    assert torch.equal(logits, whole[:, 0])
    for t in range(min(9, net.length - 1)):
        logits, state = net.step(tokens[:, t], state)
        assert torch.equal(logits, whole[:, t + 1])
    at = state.position
    logits, state = net.step(tokens[:, at : at + 5], state)
    assert torch.equal(logits, whole[:, at + 1 : at + 6])

    forked = state.fork(2)
    state.reorder(torch.tensor([2, 0]))
    logits, state = net.step(tokens[[2, 0], at + 5], state)
    assert torch.equal(logits, whole[[2, 0], at + 6])
    logits, forked = net.step(tokens[:, at + 5].repeat_interleave(2), forked)
    assert torch.equal(logits, whole[:, at + 6].repeat_interleave(2, 0))

    forked.crop(3)
    logits, forked = net.step(tokens[:, 3:8].repeat_interleave(2, 0), forked)
    assert torch.equal(logits, whole[:, 4:9].repeat_interleave(2, 0))
    forked.crop(0)
    assert torch.equal(net.step(None, forked)[0], whole[:, 0].repeat_interleave(2, 0))


def test_several_tokens_at_once_from_a_mixture() -> None:
    _, net = converted("plus plus")
    tokens, state, position = torch.zeros(2, 0, dtype=torch.int64), net.start(2), 0
    while position < net.length:
        logits, state = net.step(tokens[:, -1] if position else None, state)
        token, _ = ops.sample_logits(logits, seed=5, sample_ids=torch.arange(2), position=position)
        tokens, position = torch.cat((tokens, token[:, None]), 1), position + 1
    assert torch.equal(fixed_point_sample(net, 2, seed=5).tokens, tokens)


@dataclasses.dataclass
class Course:
    """A state, and of each of its rows the class and the tokens that were fed to it."""

    state: State
    labels: Tensor
    tokens: Tensor

    def feed(self, net: Incremental, block: int) -> None:
        """Different tokens to each row: the logits are those of all that the row was ever fed."""
        at = self.state.position
        assert (self.state.rows, at) == self.tokens.shape
        fresh = torch.randint(net.levels, (self.state.rows, block))
        logits, self.state = net.step(fresh, self.state)
        self.tokens = torch.cat([self.tokens, fresh], 1)
        whole = F.pad(self.tokens, (0, net.length - at - block))
        assert torch.equal(logits, net.logits(whole, condition=self.labels)[:, at + 1 : at + 1 + block])

    def crop(self, position: int) -> None:
        self.state.crop(position)
        self.tokens = self.tokens[:, :position]

    def fork(self, copies: int) -> Course:
        return Course(
            self.state.fork(copies), self.labels.repeat_interleave(copies), self.tokens.repeat_interleave(copies, 0)
        )

    def reorder(self, index: Tensor) -> None:
        self.state.reorder(index)
        self.labels, self.tokens = self.labels[index], self.tokens[index]


@pytest.mark.parametrize("between_marks", [1, 3, converted_module._BETWEEN_MARKS])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_course_of_steps_crops_forks_and_reorders(
    between_marks: int, monkeypatch: pytest.MonkeyPatch, data: st.DataObject
) -> None:
    monkeypatch.setattr(converted_module, "_BETWEEN_MARKS", between_marks)
    _, net = converted("gated, classes")
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    rows = data.draw(st.integers(1, 3))
    labels = torch.arange(rows)
    courses = [Course(net.start(rows, condition=labels), labels, torch.zeros(rows, 0, dtype=torch.int64))]
    for _ in range(data.draw(st.integers(1, 12))):
        course = data.draw(st.sampled_from(courses))
        position, left = course.state.position, net.length - 1 - course.state.position
        move = data.draw(st.sampled_from(["feed", "feed", "crop", "fork", "reorder"]))
        if move == "feed" and left:
            course.feed(net, data.draw(st.integers(1, min(7, left))))
        elif move == "crop":
            course.crop(data.draw(st.integers(0, position)))
        elif move == "fork":
            courses.append(course.fork(data.draw(st.integers(1, 2))))
        elif move == "reorder":
            index = st.lists(st.integers(0, course.state.rows - 1), min_size=1, max_size=4)
            course.reorder(torch.tensor(data.draw(index)))
    for course in courses:
        if course.state.position < net.length - 1:
            course.feed(net, 1)


def test_what_is_taken_back_again_and_again_is_computed_from_a_mark(monkeypatch: pytest.MonkeyPatch) -> None:
    _, net = converted("wave")
    advance, run = net.advance, 0

    def counted(
        state: Tensor, tokens: Tensor, conditions: Tensor, begin: int, end: int, *args: Any, **options: Any
    ) -> Any:
        nonlocal run
        run += end - begin
        return advance(state, tokens, conditions, begin, end, *args, **options)

    monkeypatch.setattr(net, "advance", counted)
    state, token = net.start(2), torch.zeros(2, dtype=torch.int64)
    steps = []
    for i in range(50):
        run = 0
        _, state = net.step(token, state)
        steps.append(run)
        if i % 3 == 2:
            state.crop(state.position - 1)
    assert state.position == 34
    assert steps[9] == 8  # there was no mark yet
    assert max(steps) <= converted_module._BETWEEN_MARKS + 2


@pytest.mark.parametrize("name", ["gated, colours", "wave", "plus plus"])
def test_completion_keeps_what_is_known_and_draws_the_rest(name: str) -> None:
    case, net = converted(name)
    condition, ids = conditions(case, 4), torch.arange(4) + 9
    full, _ = net.sample(4, ids=ids, condition=condition, seed=1)
    tokens = net.tokens(full)
    half = torch.arange(net.length) < net.length // 2
    garbled = torch.where(half, tokens, (tokens + 1) % net.levels)
    again, log_prob = net.fill(garbled, half.expand(4, -1), ids=ids, condition=condition, seed=1)
    assert torch.equal(again, tokens)
    first_half, _ = net._advance(tokens, condition, "score", None)
    torch.testing.assert_close(log_prob, first_half[:, ~half].sum(1), rtol=1e-5, atol=1e-5)

    known = torch.rand(full.shape) < 0.4
    x, _ = net.complete(full.flip(0), known, ids=ids, condition=condition, seed=3)
    assert torch.equal(x[known], full.flip(0)[known])
    assert set(x.unique().tolist()) <= set(net.values.tolist())


def test_filters_are_those_of_sample_logits() -> None:
    _, net = converted("gated")
    ids = torch.arange(6)
    for options in ({"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.7}, {"min_p": 0.3}, {"typical_p": 0.6},
                    {"temperature": 0.0}):  # fmt: skip
        tokens, log_prob = net.fill(torch.zeros(6, net.length, dtype=torch.int64), seed=4, **options)
        logits = net.logits(tokens)
        total = torch.zeros(6, dtype=torch.float64)
        for t in range(net.length):
            token, chance = ops.sample_logits(logits[:, t], seed=4, sample_ids=ids, position=t, **options)
            assert torch.equal(token, tokens[:, t])
            total += chance
        torch.testing.assert_close(log_prob, total.float(), rtol=1e-6, atol=1e-6)


def test_progress_changes_nothing() -> None:
    _, net = converted("gated, colours")
    seen: list[tuple[int, int]] = []
    expected = net.sample(2, condition=torch.tensor([0, 1]))
    found = net.sample(2, condition=torch.tensor([0, 1]), progress=lambda done, total: seen.append((done, total)))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert seen == [((row + 1) * 18, 90) for row in range(5)]


def test_conversion_leaves_the_model_as_it_was() -> None:
    case = build("gated, classes")
    case.model.train()
    before = copy.deepcopy(case.model.state_dict())
    incremental(case.model, case.shape, levels=case.levels, **case.options)
    assert all(module.training for module in case.model.modules())
    for name, value in case.model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(p.grad is not None for p in case.model.parameters())


def test_a_converted_network_keeps_the_weights_that_it_was_made_with() -> None:
    case = build("gated")
    net = incremental(case.model, case.shape, levels=case.levels, **case.options)
    tokens = torch.randint(net.levels, (1, net.length))
    before = net.logits(tokens)
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.add_(0.1)
    assert torch.equal(net.logits(tokens), before)
    again = incremental(case.model, case.shape, levels=case.levels, **case.options)
    assert relative(again.logits(tokens), outputs(case, again, tokens, None)) < 1e-5


def test_converts_and_draws_in_inference_mode() -> None:
    case, net = converted("gated, classes")
    with torch.inference_mode():
        again = incremental(case.model, case.shape, levels=case.levels, **case.options)
        condition = torch.tensor([2, 0])
        assert torch.equal(again.sample(2, condition=condition)[0], net.sample(2, condition=condition)[0])


def test_zero_weights_read_nothing_and_all_shapes_convert() -> None:
    for shape in ((1, 1, 1), (1, 1, 5), (1, 5, 1), (1, 3, 8)):
        model = PlainPixelCNN(4, 3).eval()
        net = incremental(model, shape, levels=1)
        assert net.sample(2)[0].shape == (2, *shape)
        nn.init.zeros_(model.head[-1].weight)
        net = incremental(model, shape, levels=1)
        tokens = torch.zeros(1, net.length, dtype=torch.int64)
        assert torch.equal(net.logits(tokens), model.head[-1].bias.detach().expand(1, net.length, 1))


class Stack(nn.Module):
    """A causal convolution, then something."""

    def __init__(self, then: nn.Module, width: int = 4) -> None:
        super().__init__()
        self.first = MaskedConv2d("A", 1, width, 3, padding=1)
        self.then = then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.first(x))


class Spread(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(1).values


class Peeking(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Wide(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        q = x.flatten(2).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).view(n, c, h, w)


class Turned(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., :4] + x[..., :4].transpose(2, 3)


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (nn.Conv2d(4, 3, 3, padding=1),
         r"not causal: the output for element 0 .*row 0, column 0\) depends on element 5 .*drawn later"),
        (MaskedConv2d("B", 4, 3, 3, padding=1), ""),
        (nn.InstanceNorm2d(4), r"then \(InstanceNorm2d\) cannot be converted: aten.*norm"),
        (nn.GroupNorm(2, 4), r"then \(GroupNorm\) cannot be converted: aten.native_group_norm"),
        (nn.BatchNorm2d(4, track_running_stats=False), r"then \(BatchNorm2d\) cannot be converted"),
        (nn.AvgPool2d(3, 1, 1), r"then \(AvgPool2d\) cannot be converted: aten.avg_pool2d"),
        (Spread(), r"then \(Spread\) cannot be converted: aten.mean.dim: it is taken over places"),
        (Sorted(), r"then \(Sorted\) cannot be converted: aten.sort.default: this operation is not supported"),
        (Peeking(), r"then \(Peeking\) cannot be converted"),
        (Wide(), "not causal"),
        (Turned(), r"then \(Turned\) cannot be converted"),
    ],
)  # fmt: skip
def test_refuses_what_it_cannot_convert_and_names_it(then: nn.Module, message: str) -> None:
    model = Stack(then).eval()
    options: dict[str, Any] = {"levels": 3 if isinstance(then, nn.Conv2d) else 4}
    if message:
        with pytest.raises(ConversionError, match=message):
            incremental(model, (1, 4, 5), **options)
    else:
        incremental(model, (1, 4, 5), **options)


@pytest.mark.parametrize("verify", [False, True])
def test_a_parameter_that_is_not_finite_is_named(verify: bool) -> None:
    model = Stack(MaskedConv2d("B", 4, 3, 3, padding=1)).eval()
    with torch.no_grad():
        model.then.weight[0, 0, 0, 0] = torch.nan
    if verify:
        with pytest.raises(ConversionError, match="then.weight is not finite"):
            incremental(model, (1, 4, 5), levels=3)
    with torch.no_grad():
        model.then.weight.fill_(torch.inf)  # masked, too, which makes NaN of zero
    with pytest.raises(ConversionError, match="then.weight is not finite"):
        incremental(model, (1, 4, 5), levels=3, verify=verify)


def test_a_network_is_followed_in_whole_float32_and_what_was_set_is_again() -> None:
    model = MaskedConv2d("A", 1, 3, 3, padding=1)
    cudnn: Any = torch.backends.cudnn
    seen = []

    def forward(x: Tensor) -> Tensor:
        seen.append((cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision))
        return model(x)  # type: ignore[no-any-return]

    before = cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        incremental(model, (1, 4, 4), levels=3, forward=forward)
        assert (cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32) == (before[0], True)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before[1]
    assert set(seen) == {("ieee", "ieee")}


def test_refuses_a_network_in_16_bits() -> None:
    with pytest.raises(ConversionError, match="parameters are torch.bfloat16, but expected float32 or float64"):
        incremental(MaskedConv2d("A", 1, 3, 3, padding=1).bfloat16(), (1, 4, 4), levels=3)


def test_conditions_are_forgotten_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converted_module, "_MOST_CONDITIONS", 2)
    case = build("gated, classes")
    net = incremental(case.model, case.shape, levels=case.levels, **case.options)
    first = net.condition(torch.arange(3), 3)
    assert len(net._known_conditions) == 2
    assert torch.equal(net.condition(torch.arange(3).flip(0), 3), first.flip(0))


def test_refuses_a_network_that_sees_its_own_pixel() -> None:
    with pytest.raises(ConversionError, match=r"element 0 .*drawn at that step"):
        incremental(MaskedConv2d("B", 1, 3, 3, padding=1), (1, 4, 4), levels=3)


def test_refuses_arguments_that_do_not_fit() -> None:
    model = PlainPixelCNN().eval()
    with pytest.raises(ConversionError, match=r"output has shape \(1, 1, 4, 4\) .* 7 levels"):
        incremental(model, (1, 4, 4), levels=7)
    with pytest.raises(ValueError, match=r"shape is \(1, 2, 3, 4\)"):
        incremental(model, (1, 2, 3, 4), levels=1)
    with pytest.raises(ValueError, match="levels is 0"):
        incremental(model, (1, 4, 4), levels=0)
    with pytest.raises(ValueError, match=r"values has shape \(3,\), but expected \(2,\)"):
        incremental(model, (1, 4, 4), levels=2, values=torch.zeros(3))
    with pytest.raises(ValueError, match=r"condition has shape \(2,\)"):
        incremental(model, (1, 4, 4), levels=1, condition=torch.zeros(2))
    _, net = converted("gated, classes")
    with pytest.raises(ValueError, match="condition is None"):
        net.sample(2)
    with pytest.raises(ValueError, match=r"condition has shape \(3,\), but expected \(2\)"):
        net.sample(2, condition=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x has shape \(1, 2\)"):
        net.log_prob(torch.zeros(1, 2))


def test_parameters_that_are_not_finite_are_said_to_be_so() -> None:
    case = build("gated")
    with torch.no_grad():
        case.model.head.bias[2] = torch.nan
    net = incremental(case.model, case.shape, levels=case.levels, verify=False, **case.options)
    with pytest.raises(RuntimeError, match="sample 6 met logits that are no distribution"):
        net.sample(2, ids=torch.tensor([6, 7]))


def test_verification_sees_a_network_that_is_another_one_each_time() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls = PlainPixelCNN(), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.net(x) * (1 if self.calls <= 2 else 2)

    with pytest.raises(ConversionError, match="the converted network's outputs differ"):
        incremental(Growing().eval(), (1, 5, 5), levels=1)
