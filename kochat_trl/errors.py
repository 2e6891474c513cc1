"""Errors that a person can mend, printed on one screen and without a traceback."""

import difflib
import os
import sys
import warnings
from collections.abc import Callable


class UserError(Exception):
    """Something in a file, a config or a command is wrong. The message says what, where, and what to do."""


def nearest(key: str, known: set[str], otherwise: str = ". See --help for the keys.") -> str:
    """The end of a sentence about an unknown key: the known one that it is most like, or `otherwise`."""
    matches = difflib.get_close_matches(key.lstrip("-").replace("-", "_"), sorted(known), n=1)
    return f". Did you mean '{matches[0]}'?" if matches else otherwise


def run(main: Callable[[], None]) -> None:
    """Call `main`, the body of a command; print a `UserError` as plain text and exit with status 1.

    In a distributed run every process meets the same error, and only the first one prints it.
    """
    warnings.filterwarnings("ignore", category=FutureWarning)  # of the libraries, about each other
    try:
        main()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(1)
