"""Code that a model's own repository brings: it runs only where the user has said so, once for a whole process."""

import logging

REMOTE_CODE = (
    "its repository brings code of its own, which runs only if you trust it: `trust_remote_code: true` in the config, "
    "--trust-remote-code for a command"
)
_allowed = False
logger = logging.getLogger(__name__)


def allow_remote_code(why: str) -> None:
    """From here on such code may run; `why` is the key or flag that says so, for the log."""
    global _allowed
    _allowed = True
    logger.warning("%s: code that comes with a model is run on this machine", why)


def remote_code_allowed() -> bool:
    return _allowed


def why_not(error: Exception) -> str:
    """What to tell of an error in which transformers couldn't load something."""
    return REMOTE_CODE if "trust_remote_code" in str(error) else str(error).splitlines()[0]
