"""The one error that a caller can mend."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A caller's mistake: the message names the rule, the value received, what is accepted and a remedy.

    The command line prints it as one line and exits with status 2. Anything else that is raised is a bug.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name nearest to ``name``, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""
