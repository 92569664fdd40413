"""The door: ``o2mkd-bench VERB …``. One module a group of verbs; a verb imports what is heavy when it is called."""

from __future__ import annotations

from .door import app, main

__all__ = ["app", "main"]
