"""Trainers that people have, kept exact: ``holdfast.integrations.transformers`` and ``.lightning``.

Each needs its extra: ``pip install holdfast[transformers]`` or ``holdfast[lightning]``.
"""
