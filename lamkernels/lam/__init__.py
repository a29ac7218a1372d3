"""The thin reference latent action model: real frames in, codes out, in a few minutes on a laptop."""

from lamkernels.lam import linear_metrics, metrics
from lamkernels.lam.data import DataConfig, FrameData, load_frames
from lamkernels.lam.linear import LinearLAM
from lamkernels.lam.linear_sgd import train_linear_lam
from lamkernels.lam.model import LAMConfig, LAMOutput, LatentActionModel
from lamkernels.lam.multi_step import multi_step_projection
from lamkernels.lam.sources import Batch, Source
from lamkernels.lam.stock import StockVectorQuantize
from lamkernels.lam.train import TrainConfig, Trainer
from lamkernels.lam.worlds import PopulationCovariance, World, make_world

__all__ = [
    "Batch",
    "DataConfig",
    "FrameData",
    "LAMConfig",
    "LAMOutput",
    "LatentActionModel",
    "LinearLAM",
    "PopulationCovariance",
    "Source",
    "StockVectorQuantize",
    "TrainConfig",
    "Trainer",
    "World",
    "linear_metrics",
    "load_frames",
    "make_world",
    "metrics",
    "multi_step_projection",
    "train_linear_lam",
]
