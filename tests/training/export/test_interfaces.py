"""Sizes that may vary: declared, found in the data, proved at several values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from holdfast.training.averages.averaging import write_weights
from holdfast.training.configuration.schema import ExportConfig
from holdfast.training.errors import ExportError
from holdfast.training.export.artifacts import open_champion
from holdfast.training.export.formats import formats
from holdfast.training.export.interfaces import open_interface
from holdfast.training.export.serving import mlflow_model, triton_config
from holdfast.training.export.specification import ExportSpec
from holdfast.training.parity.champion import Champion
from holdfast.training.parity.parity import Int8Limits, check_artifact

DECLARED = {"x": {1: "length"}}


class Rows:
    """Items [n, 3] of several lengths n, padded to the longest of their batch."""

    def __init__(self, lengths: list[int]) -> None:
        draws = torch.Generator().manual_seed(0)
        self._items = [torch.rand(n, 3, generator=draws) + 0.1 for n in lengths]

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Any:
        return self._items[index], index % 2

    def collate(self, items: list[Any]) -> Any:
        inputs = nn.utils.rnn.pad_sequence([x for x, _ in items], batch_first=True)
        return inputs, torch.tensor([y for _, y in items])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        steps = self.layer(x)
        num = (x.sum(2) > 0).sum(1, keepdim=True)
        return {"logits": steps.sum(1) / num, "steps": steps, "twice": torch.cat((x, x), 1)}


class Ragged:
    dynamic_dimensions: Any = DECLARED
    lengths: list[int] = [4, 2, 9, 5, 6, 2, 7, 9, 3, 5] * 4
    net: type[nn.Module] = Net

    def __init__(self, **changed: Any) -> None:
        self.__dict__.update(changed)

    def dataset(self, split: str) -> Any:
        return Rows(self.lengths)

    def model(self) -> nn.Module:
        return self.net()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.score(model, batch)["loss"].mean()

    def score(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        return {"loss": cross_entropy(model(batch[0])["logits"], batch[1], reduction="none")}

    def metrics(self, records: Any) -> dict[str, float]:
        return {"loss": float(records["loss"].mean())}


def opened(experiment: Any) -> Any:
    return open_interface(experiment, experiment.model(), 4)


def test_sizes_get_their_names_in_inputs_and_outputs() -> None:
    found = opened(Ragged())
    assert [port.shape for port in found.interface.inputs] == [("length", 3)]
    assert [(port.name, port.shape) for port in found.interface.outputs] == [
        ("logits", (2,)),
        ("steps", ("length", 2)),
        ("twice", ("twice_1", 3)),
    ]
    sizes = {name: tuple(inputs[0].shape) for name, inputs in found.by_size.items()}
    assert sizes == {"length-2": (3, 2, 3), "length-5": (3, 5, 3), "length-9": (3, 9, 3)}
    assert len(found.examples[0][0]) == 9


def test_servers_are_told_that_a_size_may_vary() -> None:
    interface = opened(Ragged()).interface
    assert "dims: [ -1, 3 ]" in triton_config(interface, 8)
    assert '\\"shape\\": [-1, -1, 3]' in mlflow_model(interface, {}, "3.11")
    assert interface.as_json()["inputs"][0]["shape"] == ["length", 3]


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"dynamic_dimensions": {"y": {1: "length"}}}, "names the input y; the model has x"),
        ({"dynamic_dimensions": {"x": {3: "length"}}}, "names dimension 3 of x, which has the"),
        ({"dynamic_dimensions": {"x": {0: "rows"}}}, "dimensions from 1 on"),
        ({"dynamic_dimensions": {"x": {1: "a b"}}}, "with a name for their size"),
        ({"dynamic_dimensions": {"x": {1: "batch"}}}, "as the number of samples is called"),
        ({"dynamic_dimensions": {"x": 1}}, "must be like"),
        ({"dynamic_dimensions": ["x"]}, "must be like"),
        ({"dynamic_dimensions": {"x": {1: "n", 2: "n"}}}, "two sizes 'n' that differ"),
        ({"lengths": [5] * 9}, "length varies, and it is 5 in all validation samples"),
        ({"lengths": [1] * 9, "export_spec": lambda: OTHER}, "2 at least, since 1 is taken"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(changed: Any, told: str) -> None:
    with pytest.raises(ExportError) as caught:
        opened(Ragged(**changed))
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


OTHER = ExportSpec(probes={"long": (torch.rand(2, 12, 3),)})


def test_probes_of_another_size_are_enough() -> None:
    experiment = Ragged(lengths=[5] * 9, export_spec=lambda: OTHER)
    assert opened(experiment).interface.outputs[1].shape == ("length", 2)


def test_a_lone_sample_is_enough_beside_a_probe() -> None:
    experiment = Ragged(lengths=[5], export_spec=lambda: OTHER)
    assert list(opened(experiment).by_size) == ["length-5"]


class Baked(Net):
    """Divides by the length that it has seen: a trace keeps it."""

    def forward(self, x: Tensor) -> Any:
        found = super().forward(x)
        return {**found, "logits": found["logits"] / float(x.shape[1])}


@pytest.mark.parametrize(("net", "is_good"), [(Net, True), (Baked, False)])
def test_a_length_that_a_trace_keeps_is_found(net: Any, is_good: bool, tmp_path: Path) -> None:
    experiment: Any = Ragged(net=net)
    torch.manual_seed(1)
    path = tmp_path / "model.safetensors"
    write_weights(path, experiment.model().state_dict())
    config = ExportConfig(formats=("torchscript",))
    source, place = open_champion(experiment, path, config, tmp_path / "b", tmp_path / "s")
    names = ("weights", "torchscript")
    for name in names:
        formats()[name].write(source, place)
    if not is_good:
        with pytest.raises(ExportError, match="specialized it to be a constant"):
            _ = source.program
    champion = Champion.load(experiment, path, 16)
    for name in names:
        report = check_artifact(champion, name, formats()[name], place, Int8Limits())
        places = {finding.where.split(",")[0] for finding in report.findings}
        assert places >= ({"input length-2"} if name == "torchscript" and not is_good else set())
        assert report.is_good is (is_good or name == "weights"), report.findings
