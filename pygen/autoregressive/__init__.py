"""Autoregressive models: exact densities by the chain rule, one token after another."""

from pygen.autoregressive.blockwise import BlockwiseHeads, BlockwiseModel, blockwise_sample
from pygen.autoregressive.config import AutoregressiveConfig
from pygen.autoregressive.fixed_point import fixed_point_sample
from pygen.autoregressive.gated_pixelcnn import GatedPixelCNN, GatedPixelCNNConfig

# Not lazily: a later import of the folder `incremental` would put the module where this function is expected.
from pygen.autoregressive.incremental import ConversionError, Incremental, incremental
from pygen.autoregressive.made import MADEConfig, MaskedAutoencoder
from pygen.autoregressive.model import AutoregressiveModel
from pygen.autoregressive.palette import fit_palette
from pygen.autoregressive.pixelcnn import PixelCNN, PixelCNNConfig
from pygen.autoregressive.pixelcnnpp import PixelCNNPP, PixelCNNPPConfig
from pygen.autoregressive.pixelrnn import DiagonalBiLSTM, PixelRNNConfig, RowLSTM
from pygen.autoregressive.pixelsnail import PixelSNAIL, PixelSNAILConfig
from pygen.autoregressive.speculative import speculative_sample
from pygen.autoregressive.state import PrefixState, State, Stepper
from pygen.autoregressive.token_transformer import TokenTransformer, TokenTransformerConfig
from pygen.autoregressive.wavenet import WaveNet, WaveNetConfig

__all__ = [
    "AutoregressiveConfig",
    "AutoregressiveModel",
    "BlockwiseHeads",
    "BlockwiseModel",
    "ConversionError",
    "DiagonalBiLSTM",
    "GatedPixelCNN",
    "GatedPixelCNNConfig",
    "Incremental",
    "MADEConfig",
    "MaskedAutoencoder",
    "PixelCNN",
    "PixelCNNConfig",
    "PixelCNNPP",
    "PixelCNNPPConfig",
    "PixelRNNConfig",
    "PixelSNAIL",
    "PixelSNAILConfig",
    "PrefixState",
    "RowLSTM",
    "State",
    "Stepper",
    "TokenTransformer",
    "TokenTransformerConfig",
    "WaveNet",
    "WaveNetConfig",
    "blockwise_sample",
    "fit_palette",
    "fixed_point_sample",
    "incremental",
    "speculative_sample",
]
