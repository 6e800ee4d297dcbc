"""The five families by name: where their model and its configuration live, imported when first used."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from pygen.model import GenerativeModel, ModelConfig


class Family(NamedTuple):
    """The module of a family, and in it the names of the model and of its configuration."""

    module: str
    model: str
    config: str


FAMILIES: dict[str, Family] = {
    "gan": Family("pygen.gan", "GAN", "GANConfig"),
    "vae": Family("pygen.vae", "VAE", "VAEConfig"),
    "flow": Family("pygen.flows", "RealNVP", "RealNVPConfig"),
    "diffusion": Family("pygen.diffusion", "Diffusion", "DiffusionConfig"),
    "autoregressive": Family("pygen.autoregressive", "GatedPixelCNN", "GatedPixelCNNConfig"),
}


def model_class(name: str) -> type[GenerativeModel]:
    """The model class of a family; ValueError for a name that is not in FAMILIES."""
    family = _family(name)
    found: type[GenerativeModel] = getattr(importlib.import_module(family.module), family.model)
    return found


def config_class(name: str) -> type[ModelConfig]:
    """The configuration class of a family; ValueError for a name that is not in FAMILIES."""
    family = _family(name)
    found: type[ModelConfig] = getattr(importlib.import_module(family.module), family.config)
    return found


def build(name: str, **config: Any) -> GenerativeModel:
    """A new model of a family, its weights drawn from PyTorch's generator.

    config: fields of the family's configuration; lists, as JSON has them, become tuples.

    Raises ValueError for an unknown family or field, with the nearest known one, and for values that the configuration
    refuses.
    """
    known = config_class(name)
    fields = [field.name for field in dataclasses.fields(known) if field.init]
    for key in config:
        if key not in fields:
            raise ValueError(f"{key!r} is no setting of the {name} family{suggestion(key, fields)}")
    return model_class(name)(known(**{key: tuples(value) for key, value in config.items()}))


def family_of(model: GenerativeModel) -> str | None:
    """The name of the family that `model` is of, or None for a model from outside FAMILIES."""
    found = (type(model).__module__, type(model).__qualname__)
    for name, family in FAMILIES.items():
        if found[1] == family.model and f"{found[0]}.".startswith(f"{family.module}."):
            return name
    return None


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown word: the nearest known word, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {near[0]!r}?" if near else f": expected one of {', '.join(known)}"


def tuples(value: Any) -> Any:
    """`value` with every list in it made a tuple."""
    return tuple(tuples(item) for item in value) if isinstance(value, (list, tuple)) else value


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ValueError(f"{name!r} is no family{suggestion(name, FAMILIES)}")
    return FAMILIES[name]
