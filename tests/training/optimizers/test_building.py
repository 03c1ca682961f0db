"""Which optimizers there are, over which groups, and what is refused in one line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, Adam, Optimizer, SparseAdam

from holdfast.training.configuration.schema import OptimizerConfig
from holdfast.training.errors import ConfigError, ExperimentError
from holdfast.training.optimizers.building import CONFIGURED, build_optimizer, build_optimizers
from holdfast.training.optimizers.factors import labelled_groups


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 4)
        self.two = nn.Linear(4, 2)


class Groups:
    """Returns what it is given, made of the model."""

    def __init__(self, make: Any) -> None:
        self._make = make

    def parameter_groups(self, model: Net) -> Any:
        return self._make(model)


class Several:
    sharing_optimizers: tuple[str, ...] = ()

    def __init__(self, make: Any, sharing: tuple[str, ...] = ()) -> None:
        self._make = make
        self.sharing_optimizers = sharing

    def optimizers(self, model: Net) -> Mapping[str, Optimizer]:
        made: Mapping[str, Optimizer] = self._make(model)
        return made

    def training_step(self, model: Net, step: Any) -> Any: ...


class Alone(Several):
    training_step = None  # type: ignore[assignment]


class Both(Several):
    def parameter_groups(self, model: Net) -> Any: ...


class NeedsClosure(SGD):
    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return super().step(closure)


def group(name: Any, *params: Any, **options: Any) -> dict[str, Any]:
    return {"name": name, "params": [*params], **options}


def test_groups_keep_their_names_and_options() -> None:
    model = Net()
    model.two.bias.requires_grad_(False)

    def groups(model: Net) -> Any:
        yield group("slow", model.one.weight, lr=0.01)
        yield {"name": "rest", "params": iter([model.one.bias, model.two.weight, model.two.bias])}

    optimizer = build_optimizer(OptimizerConfig(), model, Groups(lambda m: [*groups(m)]))
    assert [(g["name"], g["lr"], len(g["params"])) for g in optimizer.param_groups] == [
        ("slow", 0.01, 1),
        ("rest", 1e-3, 3),
    ]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: [group("all", *m.one.parameters())], r"leaves out two\.weight, two\.bias: each"),
        (
            lambda m: [group("a", *m.parameters()), group("b", m.one.weight)],
            r"names a parameter more than once: one\.weight in a and b; leave one out",
        ),
        (
            lambda m: [group("a", *m.parameters(), m.two.bias)],
            r"more than once: two\.bias in a and a",
        ),
        (lambda m: [group("a", *m.parameters(), nn.Linear(2, 2).bias)], "a holds what is no param"),
        (lambda m: [group("a", *m.named_parameters())], "a holds what is no parameter .* a tuple"),
        (lambda m: [group("a", m.one.weight), group("a", m.one.bias)], "names must differ"),
        (
            lambda m: [group(None, *m.parameters())],
            "must return a list of dicts with a text 'name'",
        ),
        (lambda _: None, "must return a list of dicts .*; found None"),
        (lambda m: [*m.parameters()], "must return a list of dicts"),
        (
            lambda m: [group("a", *m.parameters(), weight_decy=0.1)],
            "AdamW has no option 'weight_decy'; did you mean 'weight_decay'",
        ),
    ],
)
def test_groups_that_are_none_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ExperimentError, match=message) as caught:
        build_optimizer(OptimizerConfig(), Net(), Groups(make))
    assert "Groups.parameter_groups" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_optimizers_of_ones_own_have_names() -> None:
    def make(model: Net) -> dict[str, Optimizer]:
        groups = [group("bias", model.one.bias), group("weight", model.one.weight)]
        return {"first": SGD(groups, lr=0.1), "second": LBFGS(model.two.parameters())}

    optimizers = build_optimizers(Several(make), OptimizerConfig(), Net())
    labels = [found.label for found in labelled_groups(optimizers)]
    assert labels == ["first/bias", "first/weight", "second"]
    unnamed = {"one": SGD([{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)], lr=1.0)}
    assert [found.label for found in labelled_groups(unnamed)] == ["one/0", "one/1"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: {"one": Adam(m.one.parameters())}, r"leaves out two\.weight, two\.bias"),
        (
            lambda m: {"one": Adam(m.parameters()), "two": SGD(m.two.parameters())},
            r"two\.weight in one and two, .* or name optimizers that may share in sharing_optim",
        ),
        (
            lambda m: {"an": Adam([*m.parameters(), nn.Linear(2, 2).bias])},
            "an holds what is no par",
        ),
        (lambda _: {}, "must return torch optimizers by names"),
        (lambda m: Adam(m.parameters()), "must return torch optimizers by names"),
        (lambda m: {"a/b": Adam(m.parameters())}, "by names that are identifiers"),
        (lambda m: {"one": [*m.parameters()]}, "must return torch optimizers by names"),
    ],
)
def test_optimizers_that_are_none_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ExperimentError, match=message) as caught:
        build_optimizers(Several(make), OptimizerConfig(), Net())
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_declared_may_be_shared() -> None:
    def make(model: Net) -> dict[str, Optimizer]:
        return {"adam": Adam(model.parameters()), "lbfgs": LBFGS(model.parameters())}

    found = build_optimizers(Several(make, ("adam", "lbfgs")), OptimizerConfig(), Net())
    assert found.keys() == {"adam", "lbfgs"}


def test_what_has_no_effect_is_refused() -> None:
    def make(model: Net) -> dict[str, Optimizer]:
        return {"all": Adam(model.parameters())}

    with pytest.raises(ConfigError, match=r"'SGD' with .* has no effect: Several\.optimizers"):
        build_optimizers(Several(make), OptimizerConfig(name="SGD"), Net())
    for kind in (Alone, Both):
        with pytest.raises(
            ExperimentError, match=r"has optimizers\(model\): it needs training_step"
        ):
            build_optimizers(kind(make), OptimizerConfig(), Net())


def test_an_attribute_that_is_called_like_a_method_is_none() -> None:
    class Keeps:
        def __init__(self) -> None:
            self.optimizers = {"mine": 1}

    assert build_optimizers(Keeps(), OptimizerConfig(), Net()).keys() == {CONFIGURED}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("LBFGS", "its step\\(\\) needs a closure: write optimizers\\(model\\) and training_step"),
        (f"{__name__}:NeedsClosure", "its step\\(\\) needs a closure: write optimizers"),
        ("SparseAdam", "it takes sparse gradients alone, .*: write optimizers"),
        ("no_such_module:Lion", "module no_such_module cannot be imported"),
        ("torch.optim:Lion", "torch.optim has no class Lion"),
        ("torch.nn:Linear", r"'torch.nn:Linear' is no torch.optim.optimizer.Optimizer"),
        ("lion.py:Lion", "expected package.module:Class, found 'lion.py:Lion'"),
        (":Lion", "expected package.module:Class"),
    ],
)
def test_an_optimizer_that_cannot_be_configured_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_optimizer(OptimizerConfig(name=name, args={}), Net())
    assert "optimizer.name = " in str(caught.value)


def test_arguments_of_a_class_of_ones_own_are_held_against_its_constructor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_of_test.py").write_text(
        "from torch.optim import SGD\n"
        "class Plain(SGD):\n"
        "    def __init__(self, params, lr, scale=1.0, *, flag: bool = False):\n"
        "        super().__init__(params, lr=lr * scale)\n"
        "class Open(SGD):\n"
        "    def __init__(self, params, **options):\n"
        "        super().__init__(params, **options)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def built(name: str, **args: Any) -> Optimizer:
        config = OptimizerConfig(name=f"own_of_test:{name}", args=args)
        return build_optimizer(config, Net())

    assert built("Plain", lr=0.1, scale=0.5).param_groups[0]["lr"] == 0.05
    assert built("Open", lr=0.1, momentum=0.5).param_groups[0]["momentum"] == 0.5
    with pytest.raises(ConfigError, match=r"unknown key optimizer\.args\.scal;"):
        built("Plain", lr=0.1, scal=0.5)
    with pytest.raises(ConfigError, match=r"optimizer\.args\.flag = 1: expected true or false"):
        built("Plain", lr=0.1, flag=1)
    with pytest.raises(ConfigError, match=r"optimizer\.args\.lr is missing"):
        built("Plain")
    with pytest.raises(ConfigError, match=r"optimizer\.args = .* do not fit"):
        built("Open", lr=0.1, momentun=0.5)


def test_sparse_gradients_have_their_optimizer_in_ones_own_steps() -> None:
    model = nn.Embedding(4, 2, sparse=True)
    found = build_optimizers(
        Several(lambda m: {"sparse": SparseAdam(m.parameters())}), OptimizerConfig(), model
    )
    assert isinstance(found["sparse"], SparseAdam)
