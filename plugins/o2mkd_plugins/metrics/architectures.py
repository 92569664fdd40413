"""Which architectures timm has, read from its source: to import it is to import torch."""

from __future__ import annotations

import difflib
import importlib.util
import re
from functools import cache
from pathlib import Path

from o2mkd_bench.core.errors import UserError

_REGISTERED = re.compile(r"^@register_model\b[^\n]*\n(?:[@#][^\n]*\n)*def (\w+)", re.MULTILINE)
_RENAMED = re.compile(r"^register_model_deprecations\(__name__, \{(.*?)^\}\)", re.MULTILINE | re.DOTALL)
_OLD = re.compile(r"['\"]([\w.]+)['\"]\s*:")


@cache
def timm_architectures() -> frozenset[str]:
    """The names timm registers, those it only still knows included; none where it is not installed."""
    found = importlib.util.find_spec("timm")
    folders = [] if found is None else list(found.submodule_search_locations or ())
    texts = [file.read_text(encoding="utf-8") for folder in folders for file in Path(folder, "models").rglob("*.py")]
    old = (name for text in texts for block in _RENAMED.findall(text) for name in _OLD.findall(block))
    return frozenset(name for text in texts for name in _REGISTERED.findall(text)) | frozenset(old)


def check_timm(model: str) -> None:
    """Refuse a model that timm has not; behind the dot of ``resnet50.a1_in1k`` stands a choice of weights.

    Raises:
        UserError: naming ``metrics.network``.
    """
    known = timm_architectures()
    name = model.partition(".")[0]
    if known and name not in known:
        near = difflib.get_close_matches(name, sorted(known), n=3)
        hint = f"near it are {', '.join(near)}" if near else "timm.list_models() lists what it has"
        raise UserError(f"metrics.network: timm has no model {model!r}; {hint}")
