"""Small models of transformers' with random weights, made from configurations alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pygen.compat.transformers import Cache, PagedCache, convert, patch

VOCABULARY = 97
WINDOW = 8
NEW = 20  # tokens to generate
_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
_TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 0}

# Full attention; a window in every layer; a window in one of two, with norms of query and key; no rotary embedding.
ARCHITECTURES = ("llama", "mistral", "qwen3", "gpt2")


@functools.cache
def model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A model whose weights are large enough for its tokens to depend on all that it is given."""
    torch.manual_seed(seed)
    made: PreTrainedModel
    if name == "llama":
        made = LlamaForCausalLM(LlamaConfig(**_LLAMA, **_TOKENS))
    elif name == "mistral":
        made = MistralForCausalLM(MistralConfig(**_LLAMA, **_TOKENS, sliding_window=WINDOW))
    elif name == "qwen3":
        kinds = ["sliding_attention", "full_attention"]
        made = Qwen3ForCausalLM(
            Qwen3Config(
                **_LLAMA, **_TOKENS, head_dim=16, use_sliding_window=True, sliding_window=WINDOW, layer_types=kinds
            )
        )
    else:
        made = GPT2LMHeadModel(
            GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256, **_TOKENS)
        )
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.mul_(3)
    return made.eval().to(dtype)


def prompts(rows: int = 3, length: int = 21, seed: int = 0) -> torch.Tensor:
    """int64 (rows, length)."""
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(prompt: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch with padding on the left of all rows but the last, and its mask."""
    rows, length = prompt.shape
    missing = torch.tensor([(rows - 1 - row) * (length // rows) for row in range(rows)])
    seen = torch.arange(length) >= missing[:, None]
    return {"input_ids": prompt.masked_fill(~seen, 0), "attention_mask": seen.long()}


@contextlib.contextmanager
def choose(of: Any, name: str) -> Iterator[None]:
    before = of.config._attn_implementation
    of.set_attn_implementation(name)
    try:
        yield
    finally:
        of.set_attn_implementation(before)


@contextlib.contextmanager
def run_with(name: str, of: Any) -> Iterator[Callable[[], dict[str, Any]]]:
    """How pygen comes into `generate`; yields what makes the arguments that it is given besides."""
    if name == "patch":
        with patch():
            yield dict
    elif name == "convert":
        with convert(of):
            yield dict
    elif name == "parts":
        with choose(of, "pygen"):
            yield lambda: {"past_key_values": Cache(of.config)}
    elif name == "paged":
        with choose(of, "pygen"):
            yield lambda: {"past_key_values": PagedCache(of.config, pages=400, page_size=4)}
    else:  # the cache alone, read by the attention that the model has
        with choose(of, name):
            yield lambda: {"past_key_values": Cache(of.config)}


def greedy(of: Any, **options: Any) -> Any:
    """What `generate` makes of these arguments without drawing."""
    return of.generate(**{"max_new_tokens": NEW, "do_sample": False, **options})
