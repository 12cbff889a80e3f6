"""The one exception for mistakes that the user can mend, and the one for a stop on demand."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in a config, a folder or a file; printed as one message without a traceback.

    The message names the culprit, what was expected, and what to do.
    """


class Interrupted(Exception):
    """The work was asked to stop; what is saved can go on."""


class Pruned(Exception):
    """A trial of a search is worse than others by now, and not worth the rest of its epochs."""


def choose(what: str, value: str, known: Iterable[str]) -> str:
    """Returns `value` if it is one of `known`.

    Raises:
      UserError: names the nearest known value otherwise.
    """
    known = list(known)
    if value in known:
        return value
    near = difflib.get_close_matches(str(value), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UserError(f"{what}: {value!r} is not known; choose one of {', '.join(known)}.{hint}")
