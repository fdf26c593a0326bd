"""TinyBERT's data augmentation, and the training budgets that use it."""

from qpipe_data_augmentation.options import AugmentationOptions, DataAugmentationOptions
from qpipe_data_augmentation.plugin import DataAugmentation

__all__ = ["AugmentationOptions", "DataAugmentation", "DataAugmentationOptions"]
