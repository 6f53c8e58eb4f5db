"""The one error that a caller can mend."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """A caller's mistake: the message names the rule, the value received, what is accepted and a remedy.

    The command line prints it as one line and exits with status 2. Anything else that is raised is a bug.

    Examples:
        >>> RoutingConfig(top_k=0)
        Traceback (most recent call last):
        chronomoe.errors.InputError: ...
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the known name nearest to ``name`` in any case, or an empty string."""
    lower = {candidate.lower(): candidate for candidate in known}
    match = difflib.get_close_matches(name.lower(), list(lower), n=1, cutoff=0.5)
    return f" Did you mean {lower[match[0]]!r}?" if match else ""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Guard the imports of what an optional extra installs.

    Write ``with extra("lora"):`` and import inside the block.

    Raises:
        InputError: it is not installed; the message names the command that installs it.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise InputError(
            f"this needs {error.name}, which is not installed; run: pip install 'chronomoe[{name}]'"
        ) from error
