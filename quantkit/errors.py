"""The errors a user can cause. Everything else is a bug in quantkit and may end in a traceback.

A message says where, what was found, what was required, and what to do, in one line:
``layers.3.mlp.down_proj: in_features 11008 is not a multiple of group_size 96; use 32, 64 or 128``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuantkitError(Exception):
    """Base of every error that is shown to a user without a traceback."""

    exit_code = 1


class RequestError(QuantkitError):
    """The request cannot be right: an unknown name, a setting out of range, an impossible combination."""

    exit_code = 2


class FileError(QuantkitError):
    """A file or folder is missing, truncated, inconsistent, or cannot be written."""


class NumericalError(QuantkitError):
    """The numbers do not allow the computation: NaN or Inf, a singular Hessian, a scale out of range."""


class NotPositiveDefiniteError(NumericalError):
    """A Hessian stayed indefinite at every damping that was tried."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The tail of an "unknown name" message: the nearest known name, then the whole list.

    >>> did_you_mean("gtpq", ["rtn", "gptq"])
    "did you mean 'gptq'? known: gptq, rtn"
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names)}"


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line; its type's name if it says nothing.

    >>> first_line(OSError("no such tensor\\nTraceback: ..."))
    'no such tensor'
    """
    text = str(error).strip()
    if "trust_remote_code" in text:  # transformers says so in its third line
        return "the model comes with code of its own; read it, then pass --trust-remote-code (trust_remote_code=True)"
    return text.partition("\n")[0] or type(error).__name__
