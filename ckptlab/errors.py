"""Every error that ckptlab raises on purpose.

A message names the file and the tensor, what was expected, what was found, and what to do.
"""

from collections.abc import Sequence


class CkptlabError(Exception):
    """The base of all errors of ckptlab: `except ckptlab.CkptlabError` catches whatever is the input's fault."""


class MeshError(CkptlabError, ValueError):
    """A mesh, an axis or a coordinate that does not exist."""


class NotationError(CkptlabError, ValueError):
    """A line of layout notation that cannot be parsed."""


class LayoutError(CkptlabError, ValueError):
    """A layout that does not fit a shape or a mesh."""


class CheckpointError(CkptlabError):
    """A checkpoint that is incomplete, inconsistent or damaged."""


class UnsafeFileError(CheckpointError):
    """A file that is refused because reading it could execute something, or that lies about its extents."""


class UnsupportedError(CheckpointError):
    """A checkpoint of a kind that ckptlab knows but cannot handle yet."""


class ReshapeError(CkptlabError, ValueError):
    """A target that the checkpoint cannot be reshaped to."""


class BackendError(CkptlabError, ValueError):
    """An array library, a device or a dtype of it that is not there, or that cannot hold what was asked for."""


class DestinationError(CkptlabError):
    """A destination that exists already or cannot be written."""


class LawError(CkptlabError, AssertionError):
    """A format or a strategy that does not obey the laws (see `ckptlab.testing`): an AssertionError in a test.

    broken: what was found, law by law.
    """

    def __init__(self, what: str, broken: Sequence[str]) -> None:
        super().__init__(f"{what} breaks {len(broken)} of the laws:\n" + "\n".join(f"  - {b}" for b in broken))
        self.broken = tuple(broken)


class InputError(CkptlabError, TypeError):
    """An argument of a kind that a function does not take."""


class ArgumentError(CkptlabError, AssertionError):
    """An argument of one of DeepSpeed's own functions that it asserts against: an AssertionError there and here."""


class MismatchError(CheckpointError, ValueError):
    """States that cannot be merged, or a file that is not what its name says: a ValueError in DeepSpeed."""


class DescriptorError(CheckpointError, RuntimeError):
    """Model files that contradict each other about the mesh: a RuntimeError in DeepSpeed."""


class UnknownNameError(CheckpointError, KeyError):
    """A name that a mapping of tensors does not have: a KeyError for whoever treats it as a dict."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError's own is in quotes
