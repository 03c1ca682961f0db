"""The experiments that come with Holdfast. Importing this package imports none of them.

To add one, write a file here and a row below: its name, and ``module:Class``.
"""

from __future__ import annotations

EXPERIMENTS: dict[str, str] = {
    "digits": "holdfast.training.experiments.digits:Digits",
    "turbofan": "holdfast.training.experiments.turbofan.experiment:Turbofan",
    "translation": "holdfast.training.experiments.translation.experiment:Translation",
}
