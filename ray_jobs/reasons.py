"""Why a job failed, in the one sentence that our own errors are, wherever in the cluster they were
raised.

What a task or an actor raises comes back as a RayTaskError, which has the traceback of the worker
as its text and the error itself as its cause. A function of Ray Data would hand on the text alone:
`keep_reasons` makes Ray Data raise what was raised. Of what the constructor of an actor raises only
the text is left.
"""

import logging
import sys

from ray.exceptions import RayTaskError

from data_lake.errors import LakeError
from ray_jobs.errors import JobError
from recsys.errors import RecsysError

OURS = (LakeError, RecsysError, JobError, OSError)
"""What is raised on purpose, or says by itself what is wrong: nobody needs its traceback."""
_TALKATIVE = ("ray.data.exceptions", "ray.data._internal.execution.streaming_executor_state")
"""Loggers that would show the traceback, and ask to report it as a fault of Ray."""
_NOTE = "\nFailed to apply UDF transform after "
"""With that Ray Data begins what it adds to the text of an error on how often it has tried."""


def keep_reasons() -> None:
    """Lets errors of functions of Ray Data arrive as they were, for datasets that are made after.

    Only ours are kept out of Ray's log: a fault that nobody expected is told with its traceback.
    """
    # Here, for what needs no Ray Data need not wait until it is imported.
    from ray.data import DataContext

    DataContext.get_current().raise_original_map_exception = True
    for name in _TALKATIVE:
        logging.getLogger(name).addFilter(_is_unexpected)


def reason_of(error: BaseException) -> BaseException:
    """The error itself, without the tracebacks of the workers that it came through."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def sentence_of(error: BaseException) -> str:
    """What the error itself says, and nothing of what Ray says of it."""
    return str(reason_of(error)).partition(_NOTE)[0]


def _is_unexpected(record: logging.LogRecord) -> bool:
    told = record.exc_info[1] if record.exc_info else None
    # Ray logs several lines while it handles one error.
    being_handled = sys.exc_info()[1]
    return not any(
        isinstance(reason_of(error), OURS) for error in (told, being_handled) if error is not None
    )
