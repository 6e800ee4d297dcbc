"""Small models of transformers' with random weights, made from configurations alone."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MllamaConfig,
    MllamaForConditionalGeneration,
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


_NARROW: dict[str, Any] = {**_LLAMA, "head_dim": 8, "sliding_window": WINDOW}
_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT: dict[str, Any] = {
    **_LLAMA, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "index_topk": 4, "index_head_dim": 16, "index_n_heads": 2,
}  # fmt: skip
_ALTERNATING = ["sliding_attention", "full_attention"]

# Models whose attention uses its cache, or the name of its implementation, in ways of its own.
UNLIKE_LLAMA: dict[str, tuple[str, dict[str, Any]]] = {
    "two values of one key": ("DiffLlamaConfig", _LLAMA),
    "its own call of PyTorch": (
        "FalconConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": False},
    ),
    "keys chosen by an index": ("DeepseekV32Config", _LATENT),
    "keys chosen by an index for several layers": ("GlmMoeDsaConfig", _LATENT),
    "keys of earlier layers": (
        "Gemma3nTextConfig",
        {
            **_NARROW, "num_hidden_layers": 4, "layer_types": _ALTERNATING * 2, "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "laurel_rank": 4,
            "altup_num_inputs": 2, "activation_sparsity_pattern": None,
        },
    ),
    "keys of earlier layers, read": (
        "Gemma4TextConfig",
        {
            **_NARROW, "num_hidden_layers": 4, "layer_types": _ALTERNATING * 2, "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
        },
    ),
    "values read before": ("DogeConfig", {**_LLAMA, "sliding_window": WINDOW}),
    "a view of what attention returns": (
        "AfmoeConfig", {**_NARROW, **_EXPERTS, "num_dense_layers": 1, "layer_types": _ALTERNATING},
    ),
    "a window in its cache alone": (
        "MoshiConfig", {**_NARROW, "num_key_value_heads": 4, "ffn_dim": 64, "intermediate_size": None},
    ),
}  # fmt: skip


@functools.cache
def unlike_llama(name: str) -> Any:
    """One of `UNLIKE_LLAMA`."""
    config, options = UNLIKE_LLAMA[name]
    torch.manual_seed(0)
    given = {key: value for key, value in {**options, **_TOKENS}.items() if value is not None or key == "eos_token_id"}
    made = AutoModelForCausalLM.from_config(getattr(transformers, config)(**given))
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.mul_(5)
    return made.eval()


@functools.cache
def of_pictures() -> tuple[Any, dict[str, torch.Tensor]]:
    """Mllama, half of whose layers attend to a picture, and what it is given for two texts with one each."""
    torch.manual_seed(0)
    vision = {
        "hidden_size": 32, "attention_heads": 2, "num_hidden_layers": 2, "num_global_layers": 1,
        "intermediate_size": 32, "image_size": 16, "patch_size": 4, "vision_output_dim": 64, "max_num_tiles": 2,
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "intermediate_layers_indices": [0],
    }  # fmt: skip
    text = {**_LLAMA, **_TOKENS, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=VOCABULARY - 1)
    made: Any = MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
            elif weight.numel() == 1:
                weight.fill_(1)  # of the gates
    tokens = prompts(2, 7).clamp(max=VOCABULARY - 2)
    tokens[:, 1] = VOCABULARY - 1
    return made.eval(), {
        "input_ids": tokens, "attention_mask": torch.ones_like(tokens), "pixel_values": torch.randn(2, 1, 2, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(2, 1, dtype=torch.long), "aspect_ratio_mask": torch.tensor([[[1, 0]]] * 2),
        "cross_attention_mask": torch.ones(2, 7, 1, 2, dtype=torch.long),
    }  # fmt: skip


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
