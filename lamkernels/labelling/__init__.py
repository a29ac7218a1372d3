"""Latent action labels for whole data sets: batched, resumable, and the same bytes however the work is shared."""

from lamkernels.labelling.labeller import Labeller, Labels
from lamkernels.labelling.pairs import Pairs, read_pairs
from lamkernels.labelling.run import label

__all__ = ["Labeller", "Labels", "Pairs", "label", "read_pairs"]
