"""Rank and world size of this process, from the environment variables of torchrun; imports no torch."""

import os


def is_first() -> bool:
    """Whether this is rank 0, the process that reports to the user."""
    return int(os.environ.get("RANK", "0")) == 0


def is_alone() -> bool:
    """Whether this is the only process of its job."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1


def processes_here() -> int:
    """The number of processes of the job on this machine, which share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
