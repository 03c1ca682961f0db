"""Lightning's Trainer, exact: ``Trainer(callbacks=[Exact()])``."""

from holdfast.training.integrations.lightning import Exact

__all__ = ["Exact"]
