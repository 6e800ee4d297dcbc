"""The families by name, and in each its recipes by name: where a model lives, and how it is trained.

A model is imported when it is first used. The numbers of steps are such that on two cores each trains for about the
same time on the digits.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pygen.workbench.settings import TrainingConfig

if TYPE_CHECKING:
    from pygen.model import GenerativeModel, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """One model of a family.

    module, model, config: the module, and in it the names of the model and of its configuration.
    training: the settings of the quick budget.
    changes: what the model's configuration changes from its defaults when no one else says what.
    """

    module: str
    model: str
    config: str
    training: TrainingConfig
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# The first recipe of a family is the one that stands for it.
FAMILIES: dict[str, dict[str, Recipe]] = {
    "gan": {
        "gan": Recipe(
            module="pygen.gan",
            model="GAN",
            config="GANConfig",
            training=TrainingConfig(steps=1100, batch_size=64, learning_rate=1e-3, betas=(0.0, 0.95), warmup=50),
            changes={"width": 16},
        ),
    },
    "vae": {
        "vae": Recipe(
            module="pygen.vae",
            model="VAE",
            config="VAEConfig",
            training=TrainingConfig(steps=1200, batch_size=64, learning_rate=2e-3, warmup=100),
        ),
    },
    "flow": {
        "realnvp": Recipe(
            module="pygen.flows",
            model="RealNVP",
            config="RealNVPConfig",
            training=TrainingConfig(
                steps=900, batch_size=128, learning_rate=2e-3, betas=(0.9, 0.999), weight_decay=0.05, warmup=50
            ),
        ),
        "nice": Recipe(
            module="pygen.flows",
            model="NICE",
            config="NICEConfig",
            training=TrainingConfig(
                steps=2500, batch_size=128, learning_rate=2e-3, betas=(0.9, 0.99), weight_decay=0.3, warmup=50
            ),
            changes={"width": 200, "layers": 3, "margin": 0.05},
        ),
        "glow": Recipe(
            module="pygen.flows",
            model="Glow",
            config="GlowConfig",
            training=TrainingConfig(steps=1200, batch_size=64, learning_rate=3e-3, betas=(0.9, 0.999), warmup=50),
            changes={"scales": 2, "steps": 8, "width": 64, "labels": "steps", "margin": 0.05},
        ),
        "maf": Recipe(
            module="pygen.flows",
            model="MAF",
            config="MAFConfig",
            training=TrainingConfig(
                steps=1500, batch_size=128, learning_rate=4e-3, betas=(0.9, 0.99), weight_decay=1.0, warmup=50
            ),
            changes={"hidden": 128},
        ),
        "iaf": Recipe(
            module="pygen.flows",
            model="IAF",
            config="MAFConfig",
            training=TrainingConfig(
                steps=1500, batch_size=64, learning_rate=4e-3, betas=(0.9, 0.99), weight_decay=1.0, warmup=50
            ),
            changes={"layers": 3, "hidden": 128},
        ),
        "nsf": Recipe(
            module="pygen.flows",
            model="NeuralSplineFlow",
            config="NeuralSplineFlowConfig",
            training=TrainingConfig(
                steps=1200, batch_size=128, learning_rate=4e-3, betas=(0.9, 0.99), weight_decay=0.3, warmup=50
            ),
            changes={"layers": 5, "hidden": 128, "blocks": 1, "dropout": 0.5},
        ),
        "nsf-ar": Recipe(
            module="pygen.flows",
            model="AutoregressiveSplineFlow",
            config="NeuralSplineFlowConfig",
            training=TrainingConfig(
                steps=1000, batch_size=128, learning_rate=3e-3, betas=(0.9, 0.99), weight_decay=1.0, warmup=50
            ),
            changes={"layers": 3, "hidden": 128, "blocks": 1},
        ),
        "flowpp": Recipe(
            module="pygen.flows",
            model="FlowPP",
            config="FlowPPConfig",
            training=TrainingConfig(steps=350, batch_size=64, learning_rate=2e-3, betas=(0.9, 0.999), warmup=50),
            changes={"width": 32, "blocks": 1, "components": 8, "dequantizer_blocks": 1, "margin": 0.05},
        ),
        "tarflow": Recipe(
            module="pygen.flows",
            model="TarFlow",
            config="TarFlowConfig",
            training=TrainingConfig(
                steps=900, batch_size=64, learning_rate=1e-2, betas=(0.9, 0.99), weight_decay=0.5, warmup=50
            ),
        ),
    },
    "diffusion": {
        "ddpm": Recipe(
            module="pygen.diffusion",
            model="Diffusion",
            config="DiffusionConfig",
            training=TrainingConfig(steps=1200, batch_size=64, learning_rate=2e-3, warmup=100),
        ),
    },
    "autoregressive": {
        "gated-pixelcnn": Recipe(
            module="pygen.autoregressive",
            model="GatedPixelCNN",
            config="GatedPixelCNNConfig",
            training=TrainingConfig(steps=900, batch_size=64, learning_rate=3e-3, betas=(0.9, 0.999), warmup=50),
        ),
        "pixelcnn": Recipe(
            module="pygen.autoregressive",
            model="PixelCNN",
            config="PixelCNNConfig",
            training=TrainingConfig(steps=1200, batch_size=64, learning_rate=3e-3, betas=(0.9, 0.999), warmup=50),
            changes={"layers": 5, "width": 30, "head": 60, "first_kernel_size": 5, "dropout": 0.1},
        ),
        "row-lstm": Recipe(
            module="pygen.autoregressive",
            model="RowLSTM",
            config="PixelRNNConfig",
            training=TrainingConfig(steps=600, batch_size=64, learning_rate=4e-3, betas=(0.9, 0.999), warmup=50),
            changes={"layers": 3, "width": 24, "head": 60, "first_kernel_size": 5, "dropout": 0.1},
        ),
        "diagonal-bilstm": Recipe(
            module="pygen.autoregressive",
            model="DiagonalBiLSTM",
            config="PixelRNNConfig",
            training=TrainingConfig(steps=500, batch_size=64, learning_rate=4e-3, betas=(0.9, 0.999), warmup=50),
            changes={"layers": 2, "width": 24, "head": 60, "first_kernel_size": 5, "dropout": 0.1},
        ),
        "pixelcnn++": Recipe(
            module="pygen.autoregressive",
            model="PixelCNNPP",
            config="PixelCNNPPConfig",
            training=TrainingConfig(steps=500, batch_size=64, learning_rate=3e-3, betas=(0.9, 0.999), warmup=50),
            changes={"resolutions": 2, "blocks": 1, "width": 24, "mixtures": 5, "dropout": 0.1},
        ),
        "pixelsnail": Recipe(
            module="pygen.autoregressive",
            model="PixelSNAIL",
            config="PixelSNAILConfig",
            training=TrainingConfig(steps=500, batch_size=64, learning_rate=6e-3, betas=(0.9, 0.999), warmup=50),
            changes={"blocks": 2, "layers": 2, "width": 32, "keys": 8, "values": 32, "mixtures": 5, "dropout": 0.05},
        ),
        "wavenet": Recipe(
            module="pygen.autoregressive",
            model="WaveNet",
            config="WaveNetConfig",
            training=TrainingConfig(steps=1200, batch_size=64, learning_rate=3e-3, betas=(0.9, 0.999), warmup=50),
            changes={"layers": 5, "stacks": 2, "width": 24, "skip": 60},
        ),
        "made": Recipe(
            module="pygen.autoregressive",
            model="MaskedAutoencoder",
            config="MADEConfig",
            training=TrainingConfig(
                steps=1500, batch_size=64, learning_rate=4e-3, betas=(0.9, 0.99), weight_decay=2.0, warmup=50
            ),
            changes={"width": 300},
        ),
        "transformer": Recipe(
            module="pygen.autoregressive",
            model="TokenTransformer",
            config="TokenTransformerConfig",
            training=TrainingConfig(
                steps=700, batch_size=64, learning_rate=4e-3, betas=(0.9, 0.95), weight_decay=0.1, warmup=50
            ),
            changes={"layers": 3, "width": 64, "heads": 4, "dropout": 0.1},
        ),
    },
}


def find(family: str, recipe: str | None = None) -> Recipe:
    """A recipe of a family, by default the first; ValueError, with the nearest known name, for an unknown one."""
    name = resolve(family, recipe)
    return FAMILIES[family][name]


def resolve(family: str, recipe: str | None = None) -> str:
    """The name of a recipe of a family, by default that of the first; ValueError as of `find`."""
    if family not in FAMILIES:
        raise ValueError(f"{family!r} is no family{suggestion(family, FAMILIES)}")
    recipes = FAMILIES[family]
    if recipe is None:
        return next(iter(recipes))
    if recipe not in recipes:
        raise ValueError(f"{recipe!r} is no recipe of the {family} family{suggestion(recipe, recipes)}")
    return recipe


def label(family: str, recipe: str | None = None) -> str:
    """What to call a run: the family, and the recipe where it is not the one that stands for the family."""
    return family if resolve(family, recipe) == resolve(family) else f"{family} {recipe}"


def model_class(family: str, recipe: str | None = None) -> type[GenerativeModel]:
    """The model class of a recipe; ValueError as of `find`."""
    found = find(family, recipe)
    model: type[GenerativeModel] = getattr(importlib.import_module(found.module), found.model)
    return model


def config_class(family: str, recipe: str | None = None) -> type[ModelConfig]:
    """The configuration class of a recipe; ValueError as of `find`."""
    found = find(family, recipe)
    config: type[ModelConfig] = getattr(importlib.import_module(found.module), found.config)
    return config


def build(family: str, recipe: str | None = None, /, **config: Any) -> GenerativeModel:
    """A new model of a family, by default of its first recipe, its weights drawn from PyTorch's generator.

    config: fields of the recipe's configuration; lists, as JSON has them, become tuples.

    Raises ValueError for an unknown family, recipe or field, with the nearest known one, and for values that the
    configuration refuses.
    """
    known = config_class(family, recipe)
    fields = [field.name for field in dataclasses.fields(known) if field.init]
    for key in config:
        if key not in fields:
            raise ValueError(f"{key!r} is no setting of the {label(family, recipe)} family{suggestion(key, fields)}")
    return model_class(family, recipe)(known(**{key: tuples(value) for key, value in config.items()}))


def recipe_of(model: GenerativeModel) -> tuple[str, str] | None:
    """The names of the family and the recipe that `model` is of, or None for a model from outside FAMILIES."""
    found = (type(model).__module__, type(model).__qualname__)
    for family, recipes in FAMILIES.items():
        for name, recipe in recipes.items():
            if found[1] == recipe.model and f"{found[0]}.".startswith(f"{recipe.module}."):
                return family, name
    return None


def suggestion(word: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown word: the nearest known word, or all of them."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f": did you mean {near[0]!r}?" if near else f": expected one of {', '.join(known)}"


def tuples(value: Any) -> Any:
    """`value` with every list in it made a tuple."""
    return tuple(tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
