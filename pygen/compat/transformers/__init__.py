"""transformers' `generate` on pygen's kernels: `patch()` for the process, `convert(model)` for one model.

from pygen.compat import transformers as drop_in

with drop_in.patch():                       # its cache, attention, sampler and packed weights
    tokens = model.generate(**inputs)

handle = drop_in.convert(model)             # and rotary embedding, appending and attending in one call
print(handle)                               # what was replaced, and what was left with the reason

model.set_attn_implementation("pygen")      # or its parts alone
model.generate(**inputs, past_key_values=drop_in.Cache(model.config, window=1024, sinks=4, storage="int8"))
"""

from __future__ import annotations

import weakref
from typing import Any

from pygen.compat import require

require("transformers")

from torch import nn  # noqa: E402
from transformers import GenerationMixin, PreTrainedModel  # noqa: E402

from pygen.compat.handle import Changes, Handle, Patch, qualified_name  # noqa: E402
from pygen.compat.transformers import attention, generation, layers, packed, tables  # noqa: E402
from pygen.compat.transformers.cache import Cache  # noqa: E402
from pygen.compat.transformers.paged import PagedCache  # noqa: E402
from pygen.compat.transformers.swapped import swapped  # noqa: E402

__all__ = ["Cache", "PagedCache", "convert", "patch"]


def convert(model: Any, *, pack_weights: bool | None = None) -> Handle:
    """Generate with a live model on pygen's kernels.

    `generate` makes pygen's caches, attends by pygen's attention and draws by one kernel; attention layers like those
    of Llama, Mistral, Qwen2 and Qwen3 turn, append and attend in one call; RMSNorm is one call. Parameters, hooks,
    state dicts, the configuration and the class that `isinstance` sees stay. Layers that are left are named, with the
    reason. Until the handle is undone, pygen's attention is beneath "sdpa": what no pygen cache holds, in this model or
    another, goes to the function that was there.

    pack_weights: on the CPU, keep a second copy of every float32 linear layer's weight, from the first `generate` on,
        laid out as oneDNN multiplies a few rows by it the quickest. By default where these are a GiB at most in all.

    Returns:
        A `Handle` that lists both and takes the change back (`undo()`, or the end of a `with`).

    Raises:
        TypeError: `model` is not a `PreTrainedModel`.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model is a {qualified_name(type(model))}, but expected a transformers.PreTrainedModel, whose attention "
            "can be chosen"
        )
    changes = Changes()
    linear = {path: layer for path, layer in model.named_modules() if packed.can_pack(layer)}
    if pack_weights is None:
        pack_weights = packed.total_bytes(linear.values()) <= packed.BY_DEFAULT
    for path, layer in linear.items() if pack_weights else ():
        _pack(changes, layer, path)
    by_position = tables.position_tables(model)
    for path, layer in model.named_modules():
        stand_in = layers.stand_in(layer)
        if stand_in is not None:
            changes.report_replaced(qualified_name(type(layer)), qualified_name(stand_in), path)
            changes.set(layer, "__class__", swapped(stand_in, type(layer)))
            if stand_in is layers.FusedAttention and layer in by_position:
                changes.set(layer, layers.TABLES, by_position[layer])
        elif layers.is_attention(layer):
            changes.report_left(qualified_name(type(layer)), layers.reason_to_leave(layer) or "", path)
    attending = _attend(changes, model)
    if isinstance(model, GenerationMixin) and not isinstance(model, generation.Generating):
        changes.report_replaced(qualified_name(type(model)), qualified_name(generation.Generating), "")
        changes.set(model, "__class__", swapped(generation.Generating, type(model)))
    beneath = attention.under_sdpa()

    def undo() -> None:
        beneath.undo()
        changes.undo()
        for part in attending:
            _attending.discard(part)
        for layer in linear.values():
            if not isinstance(layer, packed.PackedLinear):
                generation.packs.pop(layer, None)

    return Handle("pygen.compat.transformers.convert", changes.replaced, changes.left, undo)


_attending: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # parts of converted models that attend by pygen's function


def _pack(changes: Changes, layer: nn.Module, path: str) -> None:
    changes.report_replaced(qualified_name(type(layer)), qualified_name(packed.PackedLinear), path)
    changes.set(layer, "__class__", swapped(packed.PackedLinear, type(layer)))


def _attend(changes: Changes, model: PreTrainedModel) -> list[nn.Module]:
    """Report what becomes of a model's attention; its parts whose attention that of pygen's has not been before."""
    parts = {id(part.config): (path, part) for path, part in model.named_modules() if isinstance(part, PreTrainedModel)}
    attending: list[nn.Module] = []
    for path, part in parts.values():
        # The name stays: some models go by it in what they do besides, as in their masks.
        name = part.config._attn_implementation
        if name == attention.SDPA and not part._can_set_attn_implementation():
            reason = "it cannot be chosen, and reads the keys that pygen's cache holds"
            changes.report_left(f"attention {name!r}", reason, path)
        elif name == attention.SDPA and part not in _attending:
            changes.report_replaced(f"attention {name!r}", qualified_name(attention.attention), path)
            attending.append(part)
        elif name not in (attention.SDPA, attention.NAME):
            changes.report_left(
                f"attention {name!r}", "chosen by the user: it reads the keys that pygen's cache holds", path
            )
    _attending.update(attending)
    return attending


_patch = Patch("transformers", generation.install)


def patch() -> Handle:
    """Let `generate` of every model in this process use pygen's cache, attention and sampler.

    Models keep what they are: attention "sdpa", transformers' default, goes to pygen's function, which leaves what no
    pygen cache holds to transformers' own; `generate` makes `Cache(config)` where it would make a `DynamicCache` (or,
    on the CPU, a `StaticCache`); tokens are drawn by `ops.sample_logits`, seeded by PyTorch's default generator. While
    `generate` runs on the CPU, float32 linear layers of a GiB at most in all multiply by packed copies of their
    weights, as `convert` describes it; the copies last as long as their layer, its weight and the patch.

    Returns:
        A `Handle`, also a context manager: `with pygen.compat.transformers.patch(): ...`. The last of nested patches to
        end restores everything.
    """
    beneath, generating = attention.under_sdpa(), _patch()

    def undo() -> None:
        generating.undo()
        beneath.undo()

    replaced = (*beneath.replaced, *generating.replaced)
    return Handle("pygen.compat.transformers.patch", replaced, generating.left, undo)
