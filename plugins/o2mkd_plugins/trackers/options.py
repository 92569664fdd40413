"""Options of the built-in trackers. Torch-free."""

from __future__ import annotations

from o2mkd_bench import Options


class JsonLinesOptions(Options):
    """The file's name is always ``events.jsonl``, in the folder of the results."""


class TensorBoardOptions(Options):
    """The folder is always ``tensorboard``, in the folder of the results."""


class WandbOptions(Options):
    """Weights & Biases reads its own environment variables."""
