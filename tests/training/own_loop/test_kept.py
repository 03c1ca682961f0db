"""What a script keeps comes back whole, in the objects that the script has names for."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch

from holdfast.training.checkpointing.json_state import decode, encode
from holdfast.training.own_loop.kept import Kept


def restored(before: Kept, after: Kept) -> None:
    """Put into ``after`` what ``before`` has, by way of what a checkpoint's files hold."""
    tensors: dict[str, Any] = {}
    written = json.dumps(encode(before.state_dict(), "kept", tensors, keeps_order=True))
    after.load_state_dict(decode(json.loads(written), tensors))


def test_lists_and_dicts_of_values_stay_the_ones_that_the_script_has_names_for() -> None:
    before, after = Kept(), Kept()
    before.values |= {"history": [1.0, 2.0], "best": {"loss": 0.5, "epochs": [3]}, "step": 7}
    history = after.values["history"] = []
    best = after.values["best"] = {"loss": 9.0, "stale": True}
    restored(before, after)
    history.append(3.0)
    best["loss"] = 0.25
    assert after.values == {
        "history": [1.0, 2.0, 3.0],
        "best": {"loss": 0.25, "epochs": [3]},
        "step": 7,
    }


def test_a_value_that_begins_as_the_models_own_state_leaves_the_model_as_it_is() -> None:
    before, after = Kept(), Kept()
    before.values["best"] = {"weight": torch.ones(1, 2)}
    model = torch.nn.Linear(2, 1, bias=False)
    weight = model.weight.detach().clone()
    after.values["best"] = dict(model.state_dict())
    restored(before, after)
    assert torch.equal(model.weight, weight)
    assert torch.equal(after.values["best"]["weight"], torch.ones(1, 2))


def test_a_random_state_of_numpys_goes_on_where_it_stood() -> None:
    before, after = Kept(), Kept()
    draws, resumed = np.random.RandomState(1), np.random.RandomState(2)
    draws.randn()  # the second one of a pair is waiting
    before.add("draws", draws)
    after.add("draws", resumed)
    restored(before, after)
    assert draws.randn(3).tolist() == resumed.randn(3).tolist()
