"""What a client is told of an exception that nobody expected."""

from __future__ import annotations

import logging
import secrets

from stepstate.errors import Internal, StepstateError

log = logging.getLogger(__name__)


def surprise(what: str, error: Exception, session_id: str) -> StepstateError:
    """An error with an id; the log has all of it under the same id. An error of ours is itself."""
    if isinstance(error, StepstateError):
        return error.with_traceback(None)
    told = Internal(secrets.token_hex(8))
    log.error(what, exc_info=error, extra={"error_id": told.error_id, "session_id": session_id})
    return told
