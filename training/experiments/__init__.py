"""The experiments that come with Holdfast. Importing this package imports none of them.

To add one, write a file here and a row below: its name, and ``module:Class``.
"""

from __future__ import annotations

EXPERIMENTS: dict[str, str] = {
    "digits": "training.experiments.digits:Digits",
    "turbofan": "training.experiments.turbofan:Turbofan",
    "translation": "training.experiments.translation:Translation",
}
