"""What is wrong here: with this machine (environment), with a checkpoint (check_checkpoint). Returns data."""

from .environment import environment
from .finding import ERROR, INFO, OK, WARNING, Finding, Histogram, Place, Report, exit_code

__all__ = [
    "ERROR",
    "INFO",
    "OK",
    "WARNING",
    "Finding",
    "Histogram",
    "Place",
    "Report",
    "environment",
    "exit_code",
]
