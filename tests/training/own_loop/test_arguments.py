"""What a script hands to its run is refused at once where it is wrong, in words that help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from holdfast.training.errors import InputError
from holdfast.training.exactness.reproducibility import child_environment
from holdfast.training.own_loop.kept import OTHERS, VALUES, as_handed_over, require_plain
from tests.warm_start import WarmProcess

SCRIPT = Path(__file__).with_name("bad_calls_script.py")
WHOLE = "expected a whole number of at least"
NUMBER = "expected a number, found"
BEFORE = {
    'run.steps("10")': f"run.steps(…): {WHOLE} 1, found a str, '10'",
    "run.steps(-3)": f"run.steps(…): {WHOLE} 1, found an int, -3",
    "run.steps(0)": f"run.steps(…): {WHOLE} 1, found an int, 0",
    "run.steps(2.0)": f"run.steps(…): {WHOLE} 1, found a float, 2.0",
    "run.steps(True)": f"run.steps(…): {WHOLE} 1, found a bool, True",
    "run.steps(None)": f"run.steps(…): {WHOLE} 1, found None",
    "run.steps(torch.ones(1))": f"run.steps(…): {WHOLE} 1, found a tensor of shape (1,)",
    'run.epochs("10")': f"run.epochs(…): {WHOLE} 1, found a str, '10'",
    "run.epochs(0)": f"run.epochs(…): {WHOLE} 1, found an int, 0",
    "run.keep(model)": "run.keep(…): found a Linear without a name; write run.keep(model=model",
    "run.keep(best=3)": "run.keep(best=…): an int has no state_dict and load_state_dict",
    "run.keep(heat=nn.Parameter(torch.ones(1)))": "found a lone nn.Parameter; keep nn.Par",
    "run.keep(lazy=torch.nn.LazyLinear(1))": "run.keep(lazy=…): weight has no shape yet: call the",
    "run.loader([])": "run.loader(…): expected at least one item, found a list of none",
    "run.loader(Stream())": "run.loader(…): expected a data set with __len__ and __getitem__",
    "run.loader(7)": "can be gone back to, found an int",
    'run.loader(data, "8")': f"run.loader(batch_size=…): {WHOLE} 1, found a str, '8'",
    "run.loader(data, 0)": f"run.loader(batch_size=…): {WHOLE} 1, found an int, 0",
    "run.loader(data, 8, drop_last=True)": "the data set has 4 items, which make no batch",
    "run.loader(data, drop_last=1)": "run.loader(drop_last=…): expected True or False, found an",
    "run.loader(data, num_workers=-1)": f"run.loader(num_workers=…): {WHOLE} 0, found an int, -1",
    "run.loader(data, prefetch_factor=0)": f"run.loader(prefetch_factor=…): {WHOLE} 1",
    "run.loader(data, collate_fn=3)": "run.loader(collate_fn=…): expected a function, found an",
    "run.loader(data, worker_init_fn=3)": "run.loader(worker_init_fn=…): expected a function",
    'run.loader(data, pin_memory="yes")': "run.loader(pin_memory=…): expected True or False",
    "run.loader(data, shuffle=True)": "nothing",
    "run.loader(data, shuffle=False)": "run.loader(shuffle=…): the order comes from (seed, epoch)",
    "run.loader(data, sampler=[1])": "run.loader(sampler=…): the order comes from (seed, epoch)",
    "run.loader(data, timeout=3)": "run.loader(timeout=…): it takes batch_size, drop_last, num_",
    "run.values = {}": "run.values = …: it is there already, and is kept: write run.values[name]",
    "run.log(loss=1.0)": "run.log(…) stands outside of a step: such are those of run.steps(…), and",
    "next(run.loader(data))": "the batches of run.loader(…); for passes that do not train take",
    "next(iter(run.loader(data)))": "for batch in loader: stands outside of run.epochs(…): loop",
    "len(run.loader(data).dataset)": "nothing",
    "run.validated(loss=1.0)": "run.validated(…) stands outside of run.steps(…) and run.epochs(…)",
    'run.averaged("0.9").__enter__()': "run.averaged('0.9'): expected one of settings={'ema.decays",
    "run.averaged(0.5).__enter__()": "found a float, 0.5; it names 0.9",
    "run.champion(model=model)": "run.champion(…) came after 0 steps, and training had not ended",
    'holdfast.run("a", "b")': "holdfast.run was called twice in one process",
}
STEP = {
    'run.log(loss="high")': f"run.log(loss=…): {NUMBER} a str, 'high'",
    "run.log(loss=None)": f"run.log(loss=…): {NUMBER} None",
    "run.log(rate=[1.0])": f"run.log(rate=…): {NUMBER} a list",
    "run.log(loss=torch.ones(3))": f"run.log(loss=…): {NUMBER} a tensor of shape (3,): take its",
    "run.log(rate=np.ones(2))": f"run.log(rate=…): {NUMBER} an array of shape (2,): take",
    "run.log(rate=np.float32(1), n=np.int64(2), t=torch.ones(1))": "nothing",
    'run.validated(loss="low")': f"run.validated(loss=…): {NUMBER} a str, 'low'",
    "run.validated(loss=torch.ones(3))": f"run.validated(loss=…): {NUMBER} a tensor of shape (3,)",
    "run.validated(loss=torch.ones(1, dtype=torch.complex64))": f"{NUMBER} a complex",
    "run.validated()": "run.validated(): expected metrics by name, such as loss=…",
    "run.steps(5)": "run.steps(…) stands within a step of the loop",
    "run.epochs(5)": "run.epochs(…) stands within a step of the loop",
    "run.keep(late=model)": "run.keep(late) came after training had begun",
    "run.loader(data)": "run.loader(…) came after training had begun: make it before",
}
AFTER = {
    "run.steps(5)": "run.steps(…) came after a loop that had ended: a run has one loop",
    "run.epochs(5)": "run.epochs(…) came after a loop that had ended: a run has one loop",
    "run.champion(model=model, evaluate=3)": "run.champion(evaluate=…): expected a function of",
    "run.champion(model=3)": "run.champion(model=…): expected the model that is kept, or a",
    "run.champion(model=model, evaluate=len, example_inputs=3)": "run.champion(example_inputs=…): "
    "expected what the model is called with",
    "run.champion(model=model, evaluate=len, example_inputs=torch.ones(1, 2), metrics=3)": (
        "run.champion(metrics=…): expected a function, found an int, 3"
    ),
    "run.champion(model=model, evaluate=len, example_inputs=torch.ones(1, 2), spec=3)": (
        "run.champion(spec=…): expected a holdfast.ExportSpec, found an int, 3"
    ),
    "run.champion(model=model, evaluate=len, example_inputs=torch.ones(1, 2), "
    "dynamic_dimensions=3)": "run.champion(dynamic_dimensions=…): expected a dict of",
}


def test_wrong_arguments_are_told_with_what_was_expected_and_found(tmp_path: Path) -> None:
    places = {"before": BEFORE, "step": STEP, "after": AFTER}
    calls = [[place, call] for place, expected in places.items() for call in expected]
    process = WarmProcess(["store", json.dumps(calls)], child_environment(1), tmp_path, SCRIPT)
    out, errors = process.communicate(240)
    assert process.returncode == 0, errors
    told = [json.loads(line) for line in out.splitlines()]
    assert [call for call, _ in told] == [call for _, call in calls]
    wrong = [
        (call, words, expected[call])
        for (place, call), (_, words) in zip(calls, told, strict=True)
        if (expected := places[place])[call] not in words
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("value", "path", "message"),
    [
        ({"best": {1}}, VALUES, 'run.values["best"] is a set; expected numbers, text, lists,'),
        ({"a b": [{"c": object()}]}, VALUES, 'run.values["a b"][0]["c"] is an object; expected'),
        (
            {"tensors": {1}},
            f"{OTHERS}/ema",
            'run.keep(ema=…): its state_dict()["tensors"] is a set',
        ),
    ],
)
def test_what_cannot_be_saved_is_named_as_it_was_written(
    value: object, path: str, message: str
) -> None:
    with pytest.raises(InputError) as raised:
        require_plain(value, path)
    assert str(raised.value).startswith(message)


def test_a_tensor_that_no_file_holds_is_named_as_it_was_written() -> None:
    told = "state.experiment/kept/values/mask is a tensor of layout torch.sparse_coo on cpu; a file"
    assert as_handed_over(told).startswith('run.values["mask"] is a tensor of layout torch.sparse')
    assert as_handed_over("optimizer.x is odd; leave it") == "optimizer.x is odd; leave it"
