"""Transformers' Trainer, exact: ``from holdfast.integrations.transformers import Trainer``."""

from holdfast.training.integrations.transformers import Exact, Trainer

__all__ = ["Exact", "Trainer"]
