"""The experiments that come with Holdfast. Importing this package imports none of them.

To add one, write a file here and a row below: its name, and ``module:Class``.
"""

from __future__ import annotations

EXPERIMENTS: dict[str, str] = {
    "digits": "holdfast.training.experiments.digits:Digits",
    "turbofan": "holdfast.training.experiments.turbofan.experiment:Turbofan",
    "translation": "holdfast.training.experiments.translation.experiment:Translation",
    "language_model": "holdfast.training.experiments.language_model.experiment:LanguageModel",
    "language_model_lora": (
        "holdfast.training.experiments.language_model.adapters:AdaptedLanguageModel"
    ),
}

SAME_BYTES: dict[str, tuple[str, ...]] = {
    "digits": ("sha256:abb611de972bd00f1c23efe23a4d0963b172c4149277237629579646924880e1",),
    "turbofan": ("sha256:ce68ecdb76d273fc07fd20a6eccd6ccf7253d79a1a2965cbba13d04fc630eae1",),
    "translation": ("sha256:e9a1b387f06817bba2f4f2d6d7131818bc68298f7a3a0a24b2e60f3f022df2c6",),
}
"""Digests of earlier code of these experiments that gives the same bytes: a run that was begun with
it goes on without a warning. Version 0.1.0, before the files were moved."""
