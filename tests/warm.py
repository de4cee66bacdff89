"""Everything that a command imports, for `processes.py`."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


import spinquant.cli.learn
import spinquant.cli.main
import spinquant.cli.quantize
import spinquant.cli.rotate
import spinquant.entrypoints.folders
import spinquant.entrypoints.learn  # noqa: F401
