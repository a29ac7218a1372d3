"""The thin reference latent action model: real frames in, codes out, in a few minutes on a laptop."""

from lamkernels.lam import metrics
from lamkernels.lam.data import DataConfig, FrameData, load_frames
from lamkernels.lam.model import LAMConfig, LAMOutput, LatentActionModel
from lamkernels.lam.stock import StockVectorQuantize
from lamkernels.lam.train import TrainConfig, Trainer

__all__ = [
    "DataConfig",
    "FrameData",
    "LAMConfig",
    "LAMOutput",
    "LatentActionModel",
    "StockVectorQuantize",
    "TrainConfig",
    "Trainer",
    "load_frames",
    "metrics",
]
