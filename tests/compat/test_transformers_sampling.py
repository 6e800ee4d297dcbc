"""Tokens drawn by one kernel for transformers' processors: their distribution, seeds, scores and errors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from goodness import fit
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation import logits_process as processors
from transformers_cases import NEW, VOCABULARY, greedy, model, prompts, run_with

from pygen.compat.transformers import patch
from pygen.compat.transformers.sampling import Sampler, Undrawn

FILTERS: dict[str, dict[str, Any]] = {
    "plain": {"top_k": 0},
    "temperature": {"top_k": 0, "temperature": 0.1},
    "top k": {"top_k": 7, "temperature": 0.3},
    "top p": {"top_k": 0, "top_p": 0.8, "temperature": 0.15},
    "both": {"top_k": 20, "top_p": 0.9, "temperature": 0.2},
    "min p": {"top_k": 0, "min_p": 0.05, "temperature": 0.2},
    "typical": {"top_k": 0, "typical_p": 0.7, "temperature": 0.2},
    "repetition": {"top_k": 30, "repetition_penalty": 1.8, "temperature": 0.2},
    "epsilon": {"top_k": 0, "epsilon_cutoff": 0.02, "temperature": 0.2},
    "top h": {"top_k": 9, "top_h": 0.5, "temperature": 0.2},
}


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("way", ["patch", "convert"])
def test_draws_have_transformers_distribution(way, filters):
    of, prompt = model("llama"), prompts(1)
    options = {"max_new_tokens": 2, "do_sample": True, **FILTERS[filters]}
    reference = of.generate(prompt, **options, output_scores=True, return_dict_in_generate=True)
    expected = reference.scores[0][0].softmax(0)
    with run_with(way, of):
        tokens = of.generate(prompt, **options, num_return_sequences=20_000)[:, prompt.shape[1]]
    assert 0.02 < expected.max() < 0.6
    assert set(tokens.tolist()) <= set(expected.nonzero().squeeze(1).tolist())
    assert fit(tokens, expected) > 1e-4


def test_the_draw_does_what_transformers_have_a_processor_for():
    """Nothing is left to run in Python, other than the processors that the kernel has not."""
    config = GenerationConfig(
        do_sample=True, temperature=0.5, top_k=9, top_p=0.9, min_p=0.1, typical_p=0.9, repetition_penalty=1.2,
        suppress_tokens=[1], renormalize_logits=True, num_beams=1,
    )  # fmt: skip
    given = model("llama")._get_logits_processor(config, input_ids_seq_length=4, device="cpu")
    assert len(given) == 8
    assert Sampler(given, True).first == 0
    cases = [
        ([processors.TopPLogitsWarper(0.9), processors.TemperatureLogitsWarper(0.5)], 1),  # in another order
        ([processors.TopKLogitsWarper(3, filter_value=-1e9)], 1),
        ([processors.TopPLogitsWarper(0.9, min_tokens_to_keep=2), processors.MinPLogitsWarper(0.1)], 1),
        ([processors.TemperatureLogitsWarper(0.5), processors.EpsilonLogitsWarper(0.1)], 2),
        ([processors.TopKLogitsWarper(3), processors.TopKLogitsWarper(5)], 1),
    ]
    for processor_list, first in cases:
        assert Sampler(processor_list, True).first == first


class Banned(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 0, -torch.inf)


@pytest.mark.parametrize("way", ["patch", "convert"])
def test_processors_of_the_users_own_run_as_they_are(way):
    of, prompt = model("llama"), prompts(4)
    own = LogitsProcessorList([Banned()])
    with run_with(way, of):
        drawn = of.generate(prompt, max_new_tokens=NEW, do_sample=True, logits_processor=own)
        largest = greedy(of, input_ids=prompt, logits_processor=own)
    assert bool((drawn[:, prompt.shape[1] :] % 2 == 1).all())
    assert torch.equal(largest, greedy(of, input_ids=prompt, logits_processor=own))


@pytest.mark.parametrize("do_sample", [False, True])
def test_scores_are_transformers_tensors(do_sample):
    of, prompt = model("llama"), prompts(2)
    options = {
        "max_new_tokens": 5, "do_sample": do_sample, "output_scores": True, "return_dict_in_generate": True,
        "repetition_penalty": 1.3, **({"top_k": 5, "temperature": 0.1} if do_sample else {}),
    }  # fmt: skip
    with patch():
        actual = of.generate(prompt, **options)
    forced = actual.sequences[:, : prompt.shape[1]]
    expected = of.generate(forced, **options)
    assert len(actual.scores) == 5
    assert {type(scores) for scores in actual.scores} == {Tensor}
    torch.testing.assert_close(actual.scores[0], expected.scores[0])
    transitions = of.compute_transition_scores(actual.sequences, actual.scores, normalize_logits=True)
    assert bool((transitions > -torch.inf).all())


def test_a_softmax_or_an_argmax_of_anything_else_is_pytorchs():
    scores = torch.randn(3, VOCABULARY)
    sampler = Sampler([processors.TemperatureLogitsWarper(0.5)], True)
    undrawn = sampler(prompts(3), scores)
    assert isinstance(undrawn, Undrawn)
    expected = scores / 0.5
    for function in (
        lambda x: x + 1,
        lambda x: torch.argmax(x),
        lambda x: torch.argmax(x, dim=0),
        lambda x: torch.argmax(x, dim=-1, keepdim=True),
        lambda x: torch.nn.functional.softmax(x, dim=0),
        lambda x: torch.nn.functional.softmax(x, dim=-1, dtype=torch.float64),
        lambda x: torch.nn.functional.softmax(x, dim=-1) * 2,
        lambda x: x[1],
        lambda x: torch.stack((x, x)),
    ):
        actual = function(undrawn)
        assert type(actual) is Tensor
        torch.testing.assert_close(actual, function(expected))
    assert undrawn.shape == scores.shape
    several = torch.multinomial(torch.nn.functional.softmax(undrawn, dim=-1), num_samples=2)
    assert several.shape == (3, 2)


def test_the_callers_seed_gives_the_tokens():
    of, prompt = model("llama"), prompts(4)
    with patch():
        runs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            runs += [of.generate(prompt, max_new_tokens=NEW, do_sample=True, temperature=2.0) for _ in range(2)]
        assert torch.equal(runs[0], runs[2])
        assert torch.equal(runs[1], runs[3])
        assert not torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[4])


class Spoiled(LogitsProcessor):
    def __init__(self, value: float, rows: Sequence[int] = (1, 3)) -> None:
        self.value = value
        self.rows = list(rows)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == 23:
            scores = scores.clone()
            scores[self.rows] = self.value
        return scores


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("way", ["patch", "convert"])
def test_logits_without_a_token_are_refused_by_their_rows(way, do_sample, value):
    own = LogitsProcessorList([Spoiled(value)])
    of = model("llama")
    with run_with(way, of), pytest.raises(ValueError, match=r"^logits of row 1, 3 .* in step 2,"):
        of.generate(prompts(4), max_new_tokens=NEW, do_sample=do_sample, logits_processor=own)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("way", ["patch", "convert"])
def test_beams_without_a_token_are_refused_by_their_prompt(way, do_sample, value):
    of, inputs = model("llama"), {"inputs": prompts(4), "max_new_tokens": NEW, "num_beams": 2, "do_sample": do_sample}
    with run_with(way, of), pytest.raises(ValueError, match=r"^logits of row 1, 3 .* in step 2,"):
        of.generate(**inputs, logits_processor=LogitsProcessorList([Spoiled(value, (2, 3, 6, 7))]))
    if value == -torch.inf:  # one of a prompt's beams may end
        own = LogitsProcessorList([Spoiled(value, (2, 7))])
        torch.manual_seed(0)
        expected = of.generate(**inputs, logits_processor=own)
        torch.manual_seed(0)
        with run_with(way, of):
            assert torch.equal(of.generate(**inputs, logits_processor=own), expected)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("way", ["patch", "convert"])
def test_drafts_without_a_token_are_refused(way, as_dict, value):
    of, options = model("llama"), {"input_ids": prompts(1), "return_dict_in_generate": as_dict}
    own = LogitsProcessorList([Spoiled(value, (0,))])
    with run_with(way, of), pytest.raises(ValueError, match=r"^logits of row 0 .* in step 2,"):
        greedy(of, prompt_lookup_num_tokens=3, logits_processor=own, **options)
    of = copy.deepcopy(of)
    of.lm_head.register_forward_hook(lambda layer, given, out: out.clone().fill_(value))  # of the model, not the drafts
    with run_with(way, of), pytest.raises(ValueError, match=r"^logits of row 0 .* in step 0,"):
        greedy(of, assistant_model=model("llama", seed=1), **options)


class Leading(LogitsProcessor):
    """Lets these tokens be followed alone: behind a draft of others there is none."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens
        self.astray = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if torch.equal(input_ids, self.tokens[:, : input_ids.shape[1]]):
            return scores
        self.astray += 1
        return torch.full_like(scores, -torch.inf)


@pytest.mark.parametrize("way", ["patch", "convert"])
def test_nothing_need_follow_a_draft_that_is_not_taken(way):
    of, prompt = model("llama"), prompts(1).tile(1, 2)
    expected = greedy(of, input_ids=prompt)
    own = Leading(expected)
    with run_with(way, of):
        tokens = greedy(of, input_ids=prompt, prompt_lookup_num_tokens=3, logits_processor=LogitsProcessorList([own]))
    assert own.astray
    assert torch.equal(tokens, expected)
