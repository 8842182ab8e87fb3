"""Images and words -> batches. Readers of files are imported from their modules: they need the `datasets` package."""

from data.collate import collate
from data.dataset import PaliGemmaDataset
from data.processor import Processor

__all__ = ["PaliGemmaDataset", "Processor", "collate"]
