"""An ONNX file is put together tensor by tensor, and is what protobuf writes of all at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from holdfast.training.export.onnx_export import CHUNK_BYTES, Stretch, whole_model

BYTES_BESIDE = 1024


def model_of(*tensors: onnx.TensorProto) -> onnx.ModelProto:
    names = [tensor.name for tensor in tensors]
    result = helper.make_tensor_value_info("sum", onnx.TensorProto.FLOAT, None)
    nodes = [helper.make_node("Sum", names, ["sum"])]
    graph = helper.make_graph(nodes, "graph", [], [result], list(tensors), doc_string="")
    return helper.make_model(graph, producer_name="test", functions=[])


@pytest.mark.parametrize("num_bytes", [4, 124, 128, BYTES_BESIDE, 2 * CHUNK_BYTES, 5_000_000])
def test_tensors_from_a_file_beside_the_graph_give_the_bytes_of_a_whole_model(
    tmp_path: Path, num_bytes: int
) -> None:
    values = np.random.default_rng(0).random(num_bytes // 4, dtype=np.float32)
    tensors = [numpy_helper.from_array(values, name) for name in ("first", "second")]
    tensors[0].doc_string = ""
    wanted = model_of(*tensors).SerializeToString(deterministic=True)
    onnx.save_model(
        model_of(*tensors),
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="model.data",
        size_threshold=BYTES_BESIDE,
    )
    beside = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    found = whole_model(beside, tmp_path)
    assert any(isinstance(part, Stretch) for part in found) == (num_bytes >= BYTES_BESIDE)
    joined = [b"".join(part.chunks()) if isinstance(part, Stretch) else part for part in found]
    assert b"".join(joined) == wanted


@pytest.mark.parametrize("name", ["Pictures", "Sequences", "TiedSequences"])
def test_an_export_is_what_protobuf_writes_of_its_model(
    exported: dict[str, Any], name: str
) -> None:
    path = exported[name].place.bundle / "1/model.onnx"
    content = path.read_bytes()
    assert onnx.load_model_from_string(content).SerializeToString(deterministic=True) == content
    assert sorted(path.parent.iterdir()) == [path], "nothing beside it"
