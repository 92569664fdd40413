"""The ways a run can end badly, told apart by who can mend them."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. Its text is one sentence that names the file, the key and the mend; exit code 2."""


class StoreError(UserError):
    """The store cannot be written: full, read-only, forbidden. Nothing more can be done in this run."""


class PluginError(UserError):
    """A plugin that a suite needs is broken, ambiguous, or unknown."""


class SharedChanged(PluginError):
    """A plugin has changed what others learn from too: none of them may go on with it."""


class CorruptArtifact(Exception):
    """A stored file is not what its manifest says. The run discards the artifact and makes it anew."""

    def __init__(self, identity: str, reason: str) -> None:
        super().__init__(f"artifact {identity}: {reason}")
        self.identity = identity
        self.reason = reason


class NetworkUnavailable(UserError):
    """The weights of a feature network cannot be had here; the columns that need it stay empty."""


class StageFailed(Exception):
    """A stage could not be made; the cells that need it are recorded as failed with this text."""


class Diverged(StageFailed):
    """A loss or a weight is not finite."""
