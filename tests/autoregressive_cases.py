"""The autoregressive recipes, each as small as it can be and still have all its parts."""

from __future__ import annotations

from typing import Any

import torch

from pygen.autoregressive import AutoregressiveModel
from pygen.workbench.families import FAMILIES, build

SMALL_RECIPES: dict[str, dict[str, Any]] = {
    "gated-pixelcnn": {"layers": 3, "width": 12, "head": 12, "first_kernel_size": 3},
    "pixelcnn": {"layers": 2, "width": 12, "head": 12, "first_kernel_size": 3},
    "row-lstm": {"layers": 2, "width": 6, "head": 12, "first_kernel_size": 3},
    "diagonal-bilstm": {"layers": 2, "width": 6, "head": 12, "first_kernel_size": 3},
    "pixelcnn++": {"resolutions": 2, "blocks": 1, "width": 6, "mixtures": 3, "dropout": 0.0},
    "pixelsnail": {"blocks": 2, "layers": 1, "width": 6, "keys": 3, "values": 4, "mixtures": 3, "dropout": 0.0},
    "wavenet": {"layers": 3, "stacks": 2, "width": 6, "skip": 12},
    "made": {"width": 40, "layers": 2},
    "transformer": {"layers": 2, "width": 12, "heads": 3, "dropout": 0.0},
}
MIXTURES = ("pixelcnn++", "pixelsnail")
assert SMALL_RECIPES.keys() == FAMILIES["autoregressive"].keys()


def small(recipe: str, scatter: float = 0.5, **options: Any) -> AutoregressiveModel:
    """A small model in eval mode that is far from the uniform distribution that it starts as."""
    torch.manual_seed(0)
    model = build("autoregressive", recipe, **{**SMALL_RECIPES[recipe], **options}).eval()
    assert isinstance(model, AutoregressiveModel)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any() or "head.weight" in name or "last.weight" in name:
                parameter.normal_(0, scatter)
    return model


def random_pictures(model: AutoregressiveModel, n: int, seed: int = 0) -> torch.Tensor:
    """Pictures (n, channels, height, width) of levels that are all as likely."""
    generator = torch.Generator().manual_seed(seed)
    k = torch.randint(model.config.levels, (n, *model.config.shape), generator=generator)
    return model.dequantize(k).to(next(model.parameters()).dtype)
