"""`from spinquant.demo_model import demo_model`, now in `spinquant.demo.model`."""

from spinquant.demo.model import demo_model

__all__ = ["demo_model"]
