"""The parts of `generate` that make its cache and choose its tokens, with pygen's in their place.

`patch()` puts them into `GenerationMixin`, `convert(model)` beneath one model.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin, LogitsProcessorList, cache_utils

from pygen.compat.handle import Changes, qualified_name
from pygen.compat.transformers import attention
from pygen.compat.transformers.cache import SERVED, Cache, kinds_of_layers
from pygen.compat.transformers.packed import PackedLinear, Packs, packed_weights, packing
from pygen.compat.transformers.sampling import Refusing, Sampler, processed
from pygen.compat.transformers.swapped import Swapped

GENERATE, PREPARE_CACHE, SAMPLE = "generate", "_prepare_cache_for_generation", "_sample"
BEAM_SEARCH, ASSISTED_DECODING = "_beam_search", "_assisted_decoding"

# The packed weights of converted models' layers, until the conversion is taken back.
packs: Packs = weakref.WeakKeyDictionary()


def cache_in_place_of(model: Any, made: Any) -> Cache | None:
    """The pygen cache for one that `generate` has just made; None where that is to stay."""
    config = model.config.get_text_config(decoder=True)
    kinds, _ = kinds_of_layers(config)
    # Latent attention has keys and values of different widths.
    latent = any(getattr(config, name, None) for name in ("qk_head_dim", "kv_lora_rank"))
    if model.config.is_encoder_decoder or made.offloading or latent or not SERVED.intersection(kinds):
        return None
    if type(made) is cache_utils.DynamicCache:
        return Cache(config)
    if type(made) is cache_utils.StaticCache and model.device.type == "cpu":
        # Elsewhere a static cache stands for a compiled model.
        return Cache(config, capacity=max(layer.get_max_length() for layer in made.layers))
    return None


def prepare_cache(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> None:
    """`_prepare_cache_for_generation`, and then pygen's cache for the one that it made."""
    bound = inspect.signature(original).bind(model, *args, **kwargs).arguments
    model_kwargs = bound["model_kwargs"]
    given = model_kwargs.get("past_key_values")
    original(model, *args, **kwargs)
    made = model_kwargs.get("past_key_values")
    if given is None and made is not None:
        cache = cache_in_place_of(model, made)
        if cache is not None:
            if bound["generation_config"].is_assistant:
                cache.activate_past_recording()
            model_kwargs["past_key_values"] = cache


def sample(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """`_sample`, whose processors and draws one kernel does."""
    bound = inspect.signature(original).bind(model, *args, **kwargs)
    do_sample = bool(bound.arguments["generation_config"].do_sample)
    bound.arguments["logits_processor"] = Sampler(bound.arguments["logits_processor"], do_sample)
    return processed(original(*bound.args, **bound.kwargs))


def beam_search(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """`_beam_search`, which refuses logits that are no distribution."""
    bound = inspect.signature(original).bind(model, *args, **kwargs)
    _check_scores(bound.arguments, beams=bound.arguments["generation_config"].num_beams)
    return original(*bound.args, **bound.kwargs)


def assisted_decoding(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
    """`_assisted_decoding`, which refuses logits that are no distribution."""
    bound = inspect.signature(original).bind(model, *args, **kwargs)
    refusing = _check_scores(bound.arguments, drafted=True)
    out = original(*bound.args, **bound.kwargs)
    refusing.check(getattr(out, "sequences", out))
    return out


def _check_scores(arguments: dict[str, Any], beams: int = 1, drafted: bool = False) -> Refusing:
    """Put the refusal behind the processors that a call is given."""
    refusing = Refusing(arguments["input_ids"].shape[1], beams, drafted)
    arguments["logits_processor"] = LogitsProcessorList([*arguments["logits_processor"], refusing])
    return refusing


class Generating(Swapped):
    """A model whose `generate` makes pygen's cache, samples by pygen's kernel and refuses what is no distribution."""

    @functools.wraps(GenerationMixin.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        with attention.under_sdpa(), packed_weights(self, packs):
            return _next(self, GENERATE)(self, *args, **kwargs)

    @functools.wraps(GenerationMixin._prepare_cache_for_generation)
    def _prepare_cache_for_generation(self: Any, *args: Any, **kwargs: Any) -> None:
        prepare_cache(_next(self, PREPARE_CACHE), self, *args, **kwargs)

    @functools.wraps(GenerationMixin._sample)
    def _sample(self: Any, *args: Any, **kwargs: Any) -> Any:
        return sample(_next(self, SAMPLE), self, *args, **kwargs)

    @functools.wraps(GenerationMixin._beam_search)
    def _beam_search(self: Any, *args: Any, **kwargs: Any) -> Any:
        return beam_search(_next(self, BEAM_SEARCH), self, *args, **kwargs)

    @functools.wraps(GenerationMixin._assisted_decoding)
    def _assisted_decoding(self: Any, *args: Any, **kwargs: Any) -> Any:
        return assisted_decoding(_next(self, ASSISTED_DECODING), self, *args, **kwargs)


def _next(model: Any, name: str) -> Callable[..., Any]:
    """A model's function of that name, but for `Generating`."""
    _, cls = type(model).__bases__
    function: Callable[..., Any] = getattr(cls, name)
    return function


def install(changes: Changes) -> None:
    """Put all of them into every model that generates."""
    kept: Packs = weakref.WeakKeyDictionary()

    def generate(original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any) -> Any:
        with packing(model, kept):
            return original(model, *args, **kwargs)

    for name, function, by in (
        (GENERATE, generate, PackedLinear), (PREPARE_CACHE, prepare_cache, Cache), (SAMPLE, sample, Sampler),
        (BEAM_SEARCH, beam_search, Refusing), (ASSISTED_DECODING, assisted_decoding, Refusing),
    ):  # fmt: skip
        original = getattr(GenerationMixin, name)
        changes.set(GenerationMixin, name, _instead(original, function, changes))
        changes.report_replaced(qualified_name(original), qualified_name(by), name)


def _instead(original: Callable[..., Any], function: Callable[..., Any], changes: Changes) -> Callable[..., Any]:
    # `generate` looks at the arguments of the functions that it calls: wraps shows it those of the original.
    @functools.wraps(original)
    def instead(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not changes.in_force:
            return original(model, *args, **kwargs)
        return function(original, model, *args, **kwargs)

    return instead
