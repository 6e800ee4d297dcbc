"""Speculative acceptance: against its reference, and by the distribution of its tokens."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, LAYOUTS, opcheck
from goodness import fit
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pygen import ops


def drafted(logits: Tensor, ids: Tensor, seed: int = 3, position: int | Tensor = 5) -> Tensor:
    """Tokens drawn from (rows, k, vocabulary) logits at the drafts' own addresses."""
    tokens = [
        ops.sample_logits_reference(logits[:, i], seed=seed, sample_ids=ids, position=position + i)[0]
        for i in range(logits.shape[1])
    ]
    return torch.stack(tokens, 1) if tokens else ids.new_zeros(len(ids), 0)


def agree(tokens: Tensor, draft: Tensor, target: Tensor, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.arange(len(tokens), device=tokens.device) + 5
    arguments = {"seed": 3, "sample_ids": ids, "position": 5, **options}
    actual = ops.speculative_accept(tokens, draft, target, **arguments)
    expected = ops.speculative_accept_reference(tokens, draft, target, **arguments)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])
    assert actual[2].dtype == (torch.float64 if target.dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(actual[2], expected[2], rtol=2e-6, atol=3e-6, equal_nan=True)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference(backend, device, dtype):
    for vocabulary in (1, 2, 65, 700):
        for drafts in (0, 1, 4):
            for distance in (0.0, 0.3, 3.0):
                target = 2 * torch.randn(8, drafts + 1, vocabulary, device=device)
                draft = target[:, :drafts] + distance * torch.randn(8, drafts, vocabulary, device=device)
                ids = torch.arange(8, device=device) + 5
                tokens = drafted(draft.to(dtype), ids)
                if drafts:
                    tokens[1, 0] = tokens[2, -1] = -1
                agree(tokens, draft.to(dtype), target.to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_takes_any_strides(backend, device, layout):
    for dtype in (torch.float32, torch.bfloat16):
        target, draft = LAYOUTS[layout]((6, 4, 50), dtype, device), LAYOUTS[layout]((6, 3, 50), dtype, device)
        ids = torch.arange(12, device=device)[::2]
        tokens = torch.randint(50, (3, 6), device=device).T
        positions = torch.arange(6, device=device).flip(0)
        agree(tokens, draft, target, sample_ids=ids, seed=ids.flip(0), position=positions)


def test_tokens_have_the_targets_distribution(backend, device):
    """The first token, of any draft; and a second one, which follows the first."""
    draws = 1500 if backend == "simt" else 60_000
    ids = torch.arange(draws, device=device)
    p, q = torch.randn(12, device=device) * 1.5, torch.randn(12, device=device) * 1.5
    transitions = 1.5 * torch.randn(12, 12, device=device)  # of the target: the second token given the first
    others = transitions + torch.randn(12, 12, device=device)
    first = drafted(q.expand(draws, 1, 12), ids, seed=0, position=0)[:, 0]
    draft = torch.stack((q.expand(draws, 12), others[first]), 1)
    tokens = torch.stack((first, drafted(draft[:, 1:], ids, seed=0, position=1)[:, 0]), 1)
    target = torch.stack((p.expand(draws, 12), transitions[first], transitions[tokens[:, 1]]), 1)
    kept, accepted, log_prob = ops.speculative_accept(tokens, draft, target, seed=0, sample_ids=ids, position=0)
    assert fit(kept[:, 0].cpu(), p.softmax(-1).cpu()) > 1e-4
    overlap = torch.minimum(p.softmax(-1), q.softmax(-1)).sum()
    assert abs(float((accepted >= 1).double().mean() - overlap)) < 5 * math.sqrt(0.25 / draws)
    # Where there is a second token, it follows from the first: of the drafts that were kept, as p q / max(p, q) has it.
    second = accepted >= 1
    probability = torch.minimum(p.softmax(-1), q.softmax(-1))[:, None] * transitions.softmax(-1)
    pairs = (kept[second, 0] * 12 + kept[second, 1]).cpu()
    assert fit(pairs, (probability / probability.sum()).flatten().cpu()) > 1e-4
    third = accepted == 2
    triples = kept[third, 1] * 12 + kept[third, 2]
    joint = (first[third, None] == torch.arange(12, device=device)).double().mean(0)  # of the first token, as it came
    weight = torch.minimum(transitions.softmax(-1), others.softmax(-1)).double()
    middle = (joint @ (weight / weight.sum(-1, keepdim=True)))[:, None] * transitions.softmax(-1)
    assert fit(triples.cpu(), middle.flatten().cpu()) > 1e-4
    expected = p.log_softmax(-1)[kept[:, 0]]
    torch.testing.assert_close(log_prob[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_the_goodness_of_fit_sees_a_draft_that_is_always_kept():
    p, q = 1.5 * torch.randn(12), 1.5 * torch.randn(12)
    ids = torch.arange(1500)
    first = drafted(q.expand(1500, 1, 12), ids, seed=0, position=0)[:, 0]
    assert fit(first, p.softmax(-1)) < 1e-12
    # Nor is it enough to draw from the target where a draft is refused.
    kept = torch.rand(1500) < (p.softmax(-1) / q.softmax(-1))[first]
    again = torch.where(kept, first, torch.multinomial(p.softmax(-1), 1500, replacement=True))
    assert fit(again, p.softmax(-1)) < 1e-6


def test_equal_distributions_keep_every_draft(backend, device):
    target = 3 * torch.randn(50, 4, 90, device=device)
    ids = torch.arange(50, device=device)
    tokens = drafted(target[:, :3], ids)
    kept, accepted, _ = ops.speculative_accept(tokens, target[:, :3], target, seed=3, sample_ids=ids, position=5)
    assert (accepted == 3).all()
    assert torch.equal(kept[:, :3], tokens)
    assert torch.equal(kept[:, 3], ops.sample_logits(target[:, 3], seed=3, sample_ids=ids, position=8)[0])


def test_greedy_distributions_keep_what_both_choose(backend, device):
    target, draft = torch.randn(40, 3, 7, device=device), torch.randn(40, 2, 7, device=device)
    one_hot = [ops.filter_logits(x.flatten(0, 1), temperature=0).view_as(x) for x in (draft, target)]
    tokens = draft.argmax(-1)
    kept, accepted, log_prob = ops.speculative_accept(
        tokens, *one_hot, seed=0, sample_ids=torch.arange(40, device=device), position=0
    )
    agrees = (tokens == target[:, :2].argmax(-1)).int().cumprod(1)
    assert torch.equal(accepted, agrees.sum(1))
    best = target.argmax(-1)
    for row in range(40):
        stop = int(accepted[row]) + 1
        assert torch.equal(kept[row, :stop], best[row, :stop])
        assert (kept[row, stop:] == -1).all()
        assert (log_prob[row, :stop] == 0).all()


def test_rows_without_drafts_are_drawn_from_the_target(backend, device):
    target, draft = torch.randn(9, 3, 20, device=device), torch.randn(9, 2, 20, device=device)
    ids = torch.arange(9, device=device)
    kept, accepted, log_prob = ops.speculative_accept(
        torch.full((9, 2), -1, device=device), draft, target, seed=1, sample_ids=ids, position=ids
    )
    expected = ops.sample_logits(target[:, 0], seed=1, sample_ids=ids, position=ids)
    assert (accepted == 0).all()
    assert torch.equal(kept[:, 0], expected[0])
    assert torch.equal(log_prob[:, 0], expected[1])
    assert (kept[:, 1:] == -1).all()


def test_rows_that_are_no_distribution_are_marked(backend, device):
    target = torch.randn(6, 3, 20, device=device)
    draft = target[:, :2].clone()
    ids = torch.arange(6, device=device)
    tokens = drafted(draft, ids, position=0)
    target[0, 0, 3] = math.nan
    target[1, 2] = -math.inf
    draft[2, 1, 19] = math.nan
    tokens[3, 1] = 20
    target[4, 1, 0] = math.inf
    for function in (ops.speculative_accept, ops.speculative_accept_reference):
        kept, accepted, log_prob = function(tokens, draft, target, seed=3, sample_ids=ids, position=0)
        assert accepted.tolist() == [0, 2, 1, 1, 1, 2]
        assert (kept.gather(1, accepted[:, None])[:, 0] == -1).tolist() == [True] * 5 + [False]
        assert torch.equal(log_prob.isnan(), kept == -1)


def test_a_row_does_not_depend_on_its_batch(backend, device):
    target, draft = torch.randn(5, 4, 300, device=device), torch.randn(5, 3, 300, device=device)
    ids = torch.tensor([7, 2**40, -3, 0, 99], device=device)
    tokens = drafted(draft, ids)
    together = ops.speculative_accept(tokens, draft, target, seed=3, sample_ids=ids, position=5)
    for row in range(5):
        own = slice(row, row + 1)
        alone = ops.speculative_accept(tokens[own], draft[own], target[own], seed=3, sample_ids=ids[own], position=5)
        for whole, part in zip(together, alone, strict=True):
            assert torch.equal(part[0].nan_to_num(9), whole[row].nan_to_num(9))


def test_backends_agree_in_every_bit(backend, device):
    if backend != "simt":
        pytest.skip("compares the CPU kernels with the CUDA sources")
    target, draft, ids = 3 * torch.randn(20, 4, 500), 3 * torch.randn(20, 3, 500), torch.arange(20)
    tokens = drafted(draft, ids)
    fibers = ops.speculative_accept(tokens, draft, target, seed=3, sample_ids=ids, position=5)
    cpu = torch.ops.pygen.speculative_accept(tokens, draft, target, ids, 3, None, 5, None)
    for one, other in zip(fibers, cpu, strict=True):
        assert torch.equal(one.nan_to_num(9), other.nan_to_num(9))


@given(st.integers(0, 5), st.integers(1, 80), st.integers(0, 4), st.floats(0, 5), st.integers(0, 2**30))
def test_any_rows(rows, vocabulary, drafts, distance, seed):
    torch.manual_seed(seed)
    target = 2 * torch.randn(rows, drafts + 1, vocabulary, dtype=torch.float64)
    draft = target[:, :drafts] + distance * torch.randn(rows, drafts, vocabulary, dtype=torch.float64)
    agree(torch.randint(-1, vocabulary, (rows, drafts)), draft, target, seed=seed)


def test_raw_operator_passes_opcheck(backend, device, namespace):
    operator = getattr(torch.ops, namespace).speculative_accept.default
    target, ids = torch.randn(2, 3, 9, device=device), torch.arange(2, device=device)
    tokens = drafted(target[:, :2], ids)  # all kept: opcheck takes two NaN for different results
    opcheck(operator, (tokens, target[:, :2], target, ids, 3, None, 0, torch.full_like(ids, 5)))


def test_compiles_in_one_graph(backend, device):
    target, draft = torch.randn(3, 3, 40, device=device), torch.randn(3, 2, 40, device=device)
    tokens, ids = torch.randint(40, (3, 2), device=device), torch.arange(3, device=device)

    def step(target: Tensor, draft: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return ops.speculative_accept(tokens, 2 * draft, 2 * target, seed=1, sample_ids=ids, position=ids)

    for actual, expected in zip(torch.compile(step, fullgraph=True)(target, draft), step(target, draft), strict=True):
        assert torch.equal(actual.nan_to_num(9), expected.nan_to_num(9))


def test_graph_replay(backend, device):
    if backend != "cuda":
        pytest.skip("graphs are captured on a GPU only")
    target, draft = (torch.randn(4, drafts, 3000, device=device) for drafts in (4, 3))
    tokens, ids = torch.zeros(4, 3, dtype=torch.int64, device=device), torch.arange(4, device=device)
    position = torch.zeros((), dtype=torch.int64, device=device)
    options = {"seed": 1, "sample_ids": ids, "position": position}
    ops.speculative_accept(tokens, draft, target, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = ops.speculative_accept(tokens, draft, target, **options)
        position += 1
    for step in range(3):
        target.normal_()
        draft.normal_().add_(target[:, :3])
        tokens.copy_(drafted(draft, ids, 1, step))
        graph.replay()
        expected = ops.speculative_accept(tokens, draft, target, **{**options, "position": step})
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one.nan_to_num(9), other.nan_to_num(9))


REFUSALS = {
    "target_logits has shape (2, 0, 5), but expected (rows, drafts + 1, vocabulary)": {
        "target_logits": torch.zeros(2, 0, 5)
    },
    "draft_logits has shape (2, 3, 5), but expected (2, 2, 5)": {"draft_logits": torch.zeros(2, 3, 5)},
    "draft_tokens has shape (2, 3), but expected (2, 2)": {"draft_tokens": torch.zeros(2, 3, dtype=torch.int64)},
    "draft_tokens has dtype torch.int32": {"draft_tokens": torch.zeros(2, 2, dtype=torch.int32)},
    "draft_logits has dtype torch.float64, but expected torch.float32": {"draft_logits": torch.zeros(2, 2, 5).double()},
    "target_logits has dtype torch.int64": {"target_logits": torch.zeros(2, 3, 5, dtype=torch.int64)},
    "sample_ids has shape (3,)": {"sample_ids": torch.arange(3)},
    "sample_ids is on meta": {"sample_ids": torch.arange(2, device="meta")},
    "position is 1073741822, but expected": {"position": 2**30 - 2},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refuses_in_one_sentence(message):
    arguments = {
        "draft_tokens": torch.zeros(2, 2, dtype=torch.int64), "draft_logits": torch.zeros(2, 2, 5),
        "target_logits": torch.zeros(2, 3, 5), "seed": 0, "sample_ids": torch.arange(2), "position": 2**30 - 3,
    }  # fmt: skip
    ops.speculative_accept(**arguments)
    with pytest.raises((ValueError, TypeError)) as error:
        ops.speculative_accept(**{**arguments, **REFUSALS[message]})
    assert message in str(error.value)
