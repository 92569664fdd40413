"""Warnings of the libraries below us say nothing that a user of a suite could mend."""

from __future__ import annotations

import logging
import os
import sys
import warnings


def quiet() -> None:
    """Silence other packages' warnings, unless ``-W`` or ``PYTHONWARNINGS`` asks for them; keep those of plugins.

    Call it before torch is imported: some warnings are given on import.
    """
    if sys.warnoptions:
        return
    warnings.simplefilter("ignore")
    warnings.filterwarnings("default", category=UserWarning, module="o2mkd_")
    for package in ("torch", "diffusers", "timm", "transformers", "huggingface_hub"):
        logging.getLogger(package).setLevel(logging.ERROR)
    for package in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{package}_VERBOSITY", "error")
