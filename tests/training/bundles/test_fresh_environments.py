"""Bundles in environments that other teams have. They are made here, from the package index."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from holdfast.training.bundles.registry import Registry
from tests.training.bundles.whole_export import export

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
REPOSITORY = Path(__file__).parents[3]
SOURCES = (
    "holdfast",
    "deployments",
    "flows",
    "tasks",
    "training",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)


def run(*words: str | Path, code: int = 0) -> str:
    """What a command printed, errors included, when it ended as it should."""
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def make_environment(folder: Path, *packages: str) -> Path:
    """The folder of the programs of a new virtual environment with these packages alone."""
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin/pip", "install", "--quiet", *packages)
    return folder / "bin"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one published bundle, the champion."""
    bundle = export(tmp_path_factory.mktemp("store"))
    registry = Registry(bundle.parents[2])
    name, version = registry.publish(bundle)
    registry.move_alias(name, "champion", version, reason="test", after=None)
    return bundle.parents[2]


def test_a_consumer_with_onnxruntime_and_numpy_pulls_verifies_and_predicts(
    store: Path, tmp_path: Path
) -> None:
    pins = str(REPOSITORY / "constraints.txt")
    programs = make_environment(tmp_path / "venv", "-c", pins, "onnxruntime", "numpy")
    for name in SOURCES:
        source, target = REPOSITORY / name, tmp_path / "source" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
    run(programs / "pip", "install", "--quiet", "--no-deps", tmp_path / "source")
    (name,) = Registry(store).names()
    there, holdfast = tmp_path / "there", programs / "holdfast"

    run(programs / "python", "-c", "import torch", code=1)
    assert f"{name}@1" in run(holdfast, "bundles", "--store", store)
    run(holdfast, "pull", name, "--store", store, "--to", there, "--only", "onnx")
    assert "golden outputs are right on this machine" in run(holdfast, "verify", there)
    assert "golden outputs are right" in run(programs / "python", there / "verify.py")

    images = np.load(there / "golden/ordinary.input.images.npy")
    np.save(tmp_path / "in.npy", images)
    run(holdfast, "predict", there, tmp_path / "in.npy", "--to", tmp_path / "out.npy")
    wanted = np.load(there / "golden/ordinary.output.logits.npy")
    np.testing.assert_allclose(np.load(tmp_path / "out.npy")[:, :3], wanted, rtol=1e-4)

    handler = partial(SimpleHTTPRequestHandler, directory=str(store))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}"
        words = (holdfast, "pull", name, "--store", url, "--to", tmp_path / "over-http")
        assert "pip install httpx" in run(*words, code=2)
        run(programs / "pip", "install", "--quiet", "-c", pins, "httpx")
        assert "every digest is right" in run(*words)
        server.shutdown()


def test_tritons_own_client_parses_the_configuration(store: Path, tmp_path: Path) -> None:
    """In an environment of its own: it wants older versions than PyTorch and ONNX are used with."""
    programs = make_environment(tmp_path / "venv", "tritonclient[grpc]")
    (name,) = Registry(store).names()
    code = (
        "import sys; from pathlib import Path; from google.protobuf import text_format;"
        "from tritonclient.grpc.model_config_pb2 import ModelConfig;"
        "found = text_format.Parse(Path(sys.argv[1]).read_text(), ModelConfig());"
        "print(found.backend, found.max_batch_size, *(p.name for p in found.input), "
        "*(f'{p.name}{list(p.dims)}' for p in found.output))"
    )
    configuration = Registry(store).bundle(name, 1) / "config.pbtxt"
    printed = run(programs / "python", "-c", code, configuration)
    assert printed.strip() == "onnxruntime 4096 images logits[3] amount[1]"
