"""What is wrong here: with this machine (environment), with a checkpoint (check_checkpoint).

Returns data; only `text` prints."""

from .doctor import check_checkpoint
from .environment import environment
from .faults import CHECKS, FAULTS
from .finding import ERROR, INFO, OK, WARNING, Finding, Histogram, Place, Report, exit_code
from .probe import ActivationProbe

__all__ = [
    "CHECKS",
    "ERROR",
    "FAULTS",
    "INFO",
    "OK",
    "SEVERITIES",
    "WARNING",
    "ActivationProbe",
    "Finding",
    "Histogram",
    "Place",
    "Report",
    "check_checkpoint",
    "environment",
    "exit_code",
]
