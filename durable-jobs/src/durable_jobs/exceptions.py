"""What ends a task function."""

__all__ = ["JobError", "JobLost", "WorkerStopping"]

OVER_TIME_LIMIT = "Exceeded its time limit"


class JobError(Exception):
    """Ends a job with an error text for its owner: raise JobError("Row 17 has no email address").

    The text of any other exception is for staff: the owner only sees that the job failed.
    """


class JobLost(BaseException):
    """Ends a function whose job was cancelled or given to a newer run."""


class WorkerStopping(BaseException):
    """Ends a function that has stored a cursor, because its worker is shutting down."""
