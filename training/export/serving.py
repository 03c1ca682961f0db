"""What Triton and MLflow read beside ``1/model.onnx``.

Triton takes the bundle as a model folder: ``config.pbtxt`` and the version ``1/``. It gives no
name, so that the folder may be called anything. MLflow takes ``1/`` as a model.
"""

from __future__ import annotations

import json

from holdfast.training.export.specification import Interface, TensorSpec

TRITON_TYPES = {
    "bfloat16": "TYPE_BF16",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "int8": "TYPE_INT8",
    "int16": "TYPE_INT16",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "uint8": "TYPE_UINT8",
    "uint16": "TYPE_UINT16",
    "uint32": "TYPE_UINT32",
    "uint64": "TYPE_UINT64",
    "bool": "TYPE_BOOL",
}
MAX_QUEUE_DELAY_US = 1000


def triton_config(interface: Interface, max_batch_size: int) -> str:
    """``config.pbtxt``: dimensions leave out the batch, as Triton wants it."""
    inputs = ",\n".join(_port(port) for port in interface.inputs)
    outputs = ",\n".join(_port(port) for port in interface.outputs)
    return f"""backend: "onnxruntime"
max_batch_size: {max_batch_size}
input [
{inputs}
]
output [
{outputs}
]
dynamic_batching {{ max_queue_delay_microseconds: {MAX_QUEUE_DELAY_US} }}
instance_group [ {{ kind: KIND_CPU }} ]
"""


def mlflow_model(interface: Interface, versions: dict[str, str], python_version: str) -> str:
    """``MLmodel`` of the onnx flavor, in JSON, which is YAML."""
    onnx_version = versions.get("onnx", "")
    model = {
        "flavors": {
            "onnx": {
                "data": "model.onnx",
                "onnx_version": onnx_version,
                "providers": ["CPUExecutionProvider"],
                "save_as_external_data": False,
            },
            "python_function": {
                "data": "model.onnx",
                "loader_module": "mlflow.onnx",
                "python_version": python_version,
            },
        },
        "signature": {
            "inputs": json.dumps([_mlflow_port(port) for port in interface.inputs]),
            "outputs": json.dumps([_mlflow_port(port) for port in interface.outputs]),
        },
    }
    return json.dumps(model, indent=2, sort_keys=True) + "\n"


def _port(port: TensorSpec) -> str:
    # Triton has no scalar samples: [1], which it reshapes to nothing for the model.
    dims = ", ".join(map(str, _sizes(port)))
    dims = f"dims: [ {dims} ]" if port.shape else "dims: [ 1 ] reshape: { shape: [ ] }"
    return f'  {{ name: "{port.name}" data_type: {TRITON_TYPES[port.dtype]} {dims} }}'


def _sizes(port: TensorSpec) -> list[int]:
    """-1 is what both have for a size that may vary."""
    return [-1 if isinstance(size, str) else size for size in port.shape]


def _mlflow_port(port: TensorSpec) -> dict[str, object]:
    shape = [-1, *_sizes(port)]
    return {
        "name": port.name,
        "tensor-spec": {"dtype": port.dtype, "shape": shape},
        "type": "tensor",
    }
