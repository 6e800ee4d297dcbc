"""transformers' `generate` on pygen's kernels against its own caches: a Llama-like model, 6 layers of width 384.

A call takes seconds, over which it averages, and is measured as in a user's process:
`python benchmarks/run.py --family generate --rounds 2 --process default`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from measure import Case
from torch import Tensor

try:
    import transformers

    from pygen.compat.transformers import convert, patch
except ModuleNotFoundError:
    transformers = None  # type: ignore[assignment]

PROMPT = 4
VOCABULARY = 1024


def llama(device: torch.device, dtype: torch.dtype) -> Any:
    """11 million random weights."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        max_position_embeddings=2048, bos_token_id=0, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval().to(device, dtype)


def generate(model: Any, prompt: Tensor, tokens: int, **options: Any) -> Tensor:
    result: Tensor = model.generate(
        prompt, max_new_tokens=tokens, do_sample=True, top_k=50, disable_compile=True, **options
    )
    return result


def patched(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    with patch():
        return generate(model, prompt, tokens)


def cases(device: torch.device) -> Iterator[Case]:
    """By `patch()` and by `convert()`, for a batch and for one sequence; nothing without transformers."""
    if transformers is None:
        return
    for batch, tokens, dtype in ((8, 1020, torch.float32), (1, 252, torch.float32)):
        model = llama(device, dtype)
        converted = copy.deepcopy(model)
        convert(converted)
        prompt = torch.randint(1, VOCABULARY, (batch, PROMPT), device=device)
        rivals = {
            "DynamicCache": partial(generate, model, prompt, tokens),
            "StaticCache": partial(generate, model, prompt, tokens, cache_implementation="static"),
        }
        shape = f"{batch} x {tokens:,} tokens, {str(dtype).removeprefix('torch.')}"
        aimed = dtype == torch.float32 and batch == 8
        yield Case(
            "generate, patch()", shape, partial(patched, model, prompt, tokens), rivals,
            targets={"DynamicCache": 1.6, "StaticCache": 1.35} if aimed else {},
        )  # fmt: skip
        yield Case(
            "generate, convert()", shape, partial(generate, converted, prompt, tokens), rivals,
            targets={"DynamicCache": 1.8, "StaticCache": 1.5} if aimed else {},
        )  # fmt: skip
