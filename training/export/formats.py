"""The formats that a champion is exported to: one table.

To add a format, write a class with the four members of ``Format`` and add a row.
"""

from __future__ import annotations

from holdfast.training.export.protocol import Format


def formats() -> dict[str, Format]:
    """The table of formats, in the order in which they are made."""
    from holdfast.training.export.exported_program import ExportedProgramFormat
    from holdfast.training.export.int8 import Int8OnnxFormat
    from holdfast.training.export.onnx_export import OnnxFormat
    from holdfast.training.export.torchscript import TorchScriptFormat
    from holdfast.training.export.weights import WeightsFormat

    return {
        "weights": WeightsFormat(),
        "onnx": OnnxFormat(),
        "exported_program": ExportedProgramFormat(),
        "torchscript": TorchScriptFormat(),
        "onnx_int8": Int8OnnxFormat(),
    }
