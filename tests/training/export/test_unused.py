"""Tensors that no output depends on, found in the graph and told by the model card."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from holdfast.training.averages.averaging import write_weights
from holdfast.training.bundles.model_card import MAX_NAMES, _about_unused
from holdfast.training.bundles.stage import unused_weights
from holdfast.training.export.capturing import capture, unused_tensors
from holdfast.training.export.guard import GuardedModel


class Wasteful(nn.Module):
    """One layer is never called, what another returns is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.thrown, self.never = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("queue", torch.zeros(4, 2))

    def forward(self, points: Tensor) -> Tensor:
        self.thrown(points).exp()
        return self.norm(self.used(points))


UNUSED = ["never.bias", "never.weight", "queue", "thrown.bias", "thrown.weight"]


def test_what_no_output_depends_on_is_found_in_the_graph(tmp_path: Path) -> None:
    model = Wasteful().eval()
    found = unused_tensors(capture(GuardedModel(model).eval(), (torch.randn(2, 3),), 8))
    assert sorted(found) == ["never.bias", "never.weight", "norm.num_batches_tracked", *UNUSED[2:]]
    write_weights(tmp_path / "champion.safetensors", model.state_dict())
    (tmp_path / "unused.txt").write_text("\n".join(sorted(found)))
    assert list(unused_weights(tmp_path)) == UNUSED, "counts are no weights"


def test_what_any_part_uses_is_used(tmp_path: Path) -> None:
    write_weights(tmp_path / "champion.safetensors", Wasteful().state_dict())
    for folder, unused in ((".", UNUSED), ("parts/one", UNUSED[1:]), ("parts/two", UNUSED[:3])):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "unused.txt").write_text("\n".join(unused))
    assert unused_weights(tmp_path, ("one", "two")) == ("never.weight", "queue")


def test_the_card_tells_a_few_by_name() -> None:
    assert _about_unused(()) == []
    [line, _] = _about_unused([f"layer.{number}" for number in range(MAX_NAMES + 3)])
    assert line.startswith("No output depends on these tensors of the weights: `layer.0`, ")
    assert line.endswith("`layer.19` and 3 more.")
