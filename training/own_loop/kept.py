"""What a script keeps: models, optimizers, and all else that changes from step to step."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from holdfast.training.checkpointing.json_state import encode
from holdfast.training.errors import InputError, UnsupportedStateError, kind_of
from holdfast.training.exactness.strictness import warn_of_inexactness
from holdfast.training.loop.experiment_state import Stateful
from holdfast.training.optimizers.building import CONFIGURED, parameters_of
from holdfast.training.own_loop.arguments import indexed
from holdfast.training.replicas.copies import own_module

SEVERAL_PROCESSES = "it trains in several processes: write run.parallel(model) in its place"
REFUSED = {
    "DataParallel": "use one process for each device; keep the module that it wraps",
    "DistributedDataParallel": SEVERAL_PROCESSES,
    "FullyShardedDataParallel": SEVERAL_PROCESSES,
    "FSDPModule": "its weights lie in several processes: keep a model that is not sharded",
    "DeepSpeedEngine": "its checkpoints are pickles, and it steps by itself: use torch's own",
    "ZeroRedundancyOptimizer": "its state lies in several processes: keep the optimizer itself",
    "DataLoader": "it cannot be told where it stands: take batches from run.loader(dataset, …)",
}


NOT_A_STEP = (
    "nothing of it is kept, and no notice is answered meanwhile: loop over run.steps(…), or in "
    "run.epochs(…) over the batches of run.loader(…), in the place of torch's DataLoader"
)
VALUES, OTHERS = "experiment/kept/values", "experiment/kept/others"
"""Where they stand in a state."""
IN_STATE = re.compile(rf"(?:state\.)?({VALUES}|{OTHERS})/(.+?) ((?:is|has) [^;]*)(.*)", re.DOTALL)
PLAIN = "numbers, text, lists, dicts or tensors"


class Kept:
    """Everything that a script has handed over, by name.

    As ``Stateful`` it is what is neither a module, an optimizer nor a scaler: schedulers,
    generators, whatever has a ``state_dict``, and the script's plain values.
    """

    def __init__(self) -> None:
        self.modules: dict[str, nn.Module] = {}
        self.optimizers: dict[str, Optimizer] = {}
        self.scaler: torch.amp.GradScaler | None = None
        self.others: dict[str, Stateful] = {}
        self.values: dict[str, Any] = {}

    def add(self, name: str, kept: Any) -> None:
        """Take an object. Raises InputError, which names it, where it cannot be kept."""
        if name in self.names:
            raise InputError(f"run.keep({name}=…): something is kept under that name already")
        kept = own_module(kept)
        kept = getattr(kept, "_orig_mod", kept)  # a compiled module has the names of its own
        _require_no_refused(name, kept)
        for other, known in (*self.modules.items(), *self.optimizers.items()):
            if known is kept:
                raise InputError(
                    f"run.keep({name}=…): it is kept already, as {other}: leave it out"
                )
        if isinstance(kept, nn.Module):
            _require_made(name, kept)
            self.modules[name] = kept
        elif isinstance(kept, Optimizer):
            self.optimizers[name] = kept
        elif isinstance(kept, torch.amp.GradScaler):
            if self.scaler is not None:
                raise InputError(f"run.keep({name}=…): one gradient scaler is kept already")
            self.scaler = kept
        else:
            self.others[name] = _stateful(name, kept)

    @property
    def names(self) -> Iterator[str]:
        """All names that are taken."""
        yield from (*self.modules, *self.optimizers, *self.others)

    def model(self) -> nn.Module:
        """All modules as one: that of a script which keeps one is itself.

        Raises InputError where there is none, or an optimizer trains what none has.
        """
        if not self.modules:
            raise InputError(
                "the script keeps no model: call run.keep(model=model, optimizer=optimizer, …) "
                "before run.steps or run.epochs"
            )
        lone = next(iter(self.modules.values()))
        whole = lone if len(self.modules) == 1 else nn.ModuleDict(self.modules)
        known = {id(parameter) for parameter in whole.parameters()}
        for name, optimizer in self.optimizers.items():
            if any(id(parameter) not in known for parameter in parameters_of(optimizer)):
                raise InputError(
                    f"the optimizer {name} trains parameters of a model that is not kept, or that "
                    f"was replaced since: keep every model, as it is when training begins, and a "
                    f"lone nn.Parameter in an nn.ParameterDict"
                )
        return whole

    def tell_of_lost_schedule(self) -> None:
        """Warn of an optimizer that has a scheduler, where nothing is kept that may be one."""
        if any(type(other) not in GENERATORS.values() for other in self.others.values()):
            return
        for name, optimizer in self.optimizers.items():
            if any("initial_lr" in group for group in optimizer.param_groups):  # set by schedulers
                warn_of_inexactness(
                    f"a learning rate scheduler of {name} is not kept, and a resume begins it "
                    f"anew: hand it to run.keep"
                )

    def named_optimizers(self) -> dict[str, Optimizer]:
        """As a state has them: a lone one goes without a name."""
        if len(self.optimizers) == 1:
            return {CONFIGURED: next(iter(self.optimizers.values()))}
        return dict(self.optimizers)

    def state_dict(self) -> dict[str, Any]:
        """The others and the values."""
        others = {name: dict(kept.state_dict()) for name, kept in sorted(self.others.items())}
        return {"others": others, "values": dict(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned. Raises InputError where the names differ."""
        if differing := sorted(state["others"].keys() ^ self.others.keys()):
            raise InputError(
                f"the checkpoint keeps {sorted(state['others'])}, the script keeps "
                f"{sorted(self.others)}: {', '.join(differing)} is in one of them only"
            )
        for name, kept in self.others.items():
            kept.load_state_dict(state["others"][name])
        _put_back(self.values, state["values"])


class WatchedUpdates:
    """Tells, once, of updates that a resume loses: outside of a step, or of what is not kept.

    An optimizer that is made anew in each step, as within a meta-learner's, has nothing to lose.
    """

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        self._step: int | None = None
        self._has_told = False
        self._moved: WeakKeyDictionary[Optimizer, int] = WeakKeyDictionary()
        self._hook = register_optimizer_step_post_hook(self._after_update)

    def begin_step(self, step: int) -> None:
        """From now on updates belong to this step."""
        self._step = step

    def end(self) -> None:
        """Look at no further update."""
        self._hook.remove()

    def _after_update(self, optimizer: Optimizer, *_: Any) -> None:
        is_kept = any(optimizer is kept for kept in self._kept.optimizers.values())
        if self._step is None:
            if is_kept and not self._has_told:
                self._has_told = True
                warn_of_inexactness(
                    f"an optimizer moves outside of a step of the run: {NOT_A_STEP}"
                )
        elif not is_kept and self._moved.setdefault(optimizer, self._step) < self._step:
            self._moved[optimizer] = sys.maxsize  # each is judged once
            if optimizer.state and not self._is_part_of_what_is_kept(optimizer):
                self.end()
                warn_of_inexactness(
                    f"{kind_of(optimizer)} that moves from step to step is not kept, and a resume "
                    f"begins it anew: hand it, and the model that it trains, to run.keep"
                )

    def _is_part_of_what_is_kept(self, optimizer: Optimizer) -> bool:
        """One within another object: its weights are trained by a kept one, or an object has it."""
        optimizers = self._kept.optimizers.values()
        known = {id(parameter) for one in optimizers for parameter in parameters_of(one)}
        if any(id(parameter) in known for parameter in parameters_of(optimizer)):
            return True
        inside = (getattr(other, "__dict__", {}) for other in self._kept.others.values())
        return any(part is optimizer for parts in inside for part in parts.values())


class _TorchGenerator:
    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def state_dict(self) -> dict[str, Any]:
        return {"state": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._generator.set_state(state["state"].cpu())


class _NumpyGenerator:
    def __init__(self, generator: np.random.Generator) -> None:
        self._bits = generator.bit_generator

    def state_dict(self) -> dict[str, Any]:
        return {"state": _plain(self._bits.state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._bits.state = {**self._bits.state, **state["state"]}


class _NumpyRandomState:
    def __init__(self, generator: np.random.RandomState) -> None:
        self._generator = generator

    def state_dict(self) -> dict[str, Any]:
        return {"state": _plain(self._generator.get_state(legacy=False))}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._generator.set_state(state["state"])


class _PythonGenerator:
    def __init__(self, generator: random.Random) -> None:
        self._generator = generator

    def state_dict(self) -> dict[str, Any]:
        return {"state": self._generator.getstate()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._generator.setstate(state["state"])


def _put_back(there: Any, kept: Any) -> Any:
    """What was kept, in the list or dict that is there: the script may have a name for it.

    A tensor is another one: what is there may be a model's own, which has been put back already.
    """
    if type(there) is dict and type(kept) is dict:
        found = {name: _put_back(there.get(name), value) for name, value in kept.items()}
        there.clear()
        there.update(found)
        return there
    if type(there) is list and type(kept) is list:
        there[:] = kept
        return there
    return kept


def _plain(value: Any) -> Any:
    """A generator's state with NumPy's arrays as lists, which ``encode`` takes."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


GENERATORS: dict[type, Any] = {
    torch.Generator: _TorchGenerator,
    np.random.Generator: _NumpyGenerator,
    np.random.RandomState: _NumpyRandomState,
    random.Random: _PythonGenerator,
}


def _require_no_refused(name: str, kept: Any) -> None:
    """Raise InputError for an object, or a part of a module, whose state no one process has."""
    parts = kept.named_modules() if isinstance(kept, nn.Module) else [("", kept)]
    for inner, part in parts:
        for kind in type(part).__mro__:
            if kind.__name__ in REFUSED:
                where = f" in {inner}" if inner else ""
                raise InputError(
                    f"run.keep({name}=…): no {kind.__name__}{where}: {REFUSED[kind.__name__]}"
                )


def _require_made(name: str, module: nn.Module) -> None:
    """Raise InputError for a lazy module that has not seen a batch, and so has no weights yet."""
    lazy = (inner for inner, tensor in module.named_parameters() if is_lazy(tensor))
    if (first := next(lazy, None)) is not None:
        raise InputError(
            f"run.keep({name}=…): {first} has no shape yet: call the model with a batch before"
        )


def _stateful(name: str, kept: Any) -> Stateful:
    if kept is None:
        raise InputError(f"run.keep({name}=…): found None; leave it out where there is none")
    if isinstance(kept, type):
        raise InputError(
            f"run.keep({name}=…): found the class {kept.__name__}; expected an object of it"
        )
    if isinstance(kept, nn.Parameter):
        raise InputError(
            f"run.keep({name}=…): found a lone nn.Parameter; keep nn.ParameterDict({{…: it}})"
        )
    for kind, wrapper in GENERATORS.items():
        if isinstance(kept, kind):
            wrapped: Stateful = wrapper(kept)
            return wrapped
    if not isinstance(kept, Stateful):
        raise InputError(
            f"run.keep({name}=…): {kind_of(kept)} has no state_dict and load_state_dict: "
            f"give it these, or put plain numbers, text and tensors into run.values"
        )
    state: object = kept.state_dict()
    if not isinstance(state, Mapping):
        raise InputError(f"run.keep({name}=…): its state_dict() returned {kind_of(state)}, no dict")
    require_plain(dict(state), f"{OTHERS}/{name}")
    return kept


def require_plain(value: Any, path: str) -> None:
    """Raise InputError, which names it as the script wrote it, for what no checkpoint can hold."""
    try:
        encode(value, path, {})
    except UnsupportedStateError as error:
        raise InputError(as_handed_over(str(error))) from error


def as_handed_over(message: str) -> str:
    """What is said of a place in a state, said of what the script has written."""
    found = IN_STATE.match(message)
    if found is None:
        return message
    root, names, told, rest = found.groups()
    if root == VALUES:
        told_of = told.partition(";")[0]
        return f"{indexed('run.values', names)} {told_of}; expected {PLAIN}"
    name, _, inner = names.partition("/")
    return f"run.keep({name}=…): {indexed('its state_dict()', inner)} {told}{rest}"
