"""Which process of a job this one is, read from the environment that torchrun sets; without torch."""

import os


def is_first() -> bool:
    """Whether this process is the one of its job that speaks to the user, as torchrun says."""
    return int(os.environ.get("RANK", "0")) == 0


def is_alone() -> bool:
    """Whether torchrun started no other process beside this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1
