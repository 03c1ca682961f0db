"""The loader: the same microbatches from everywhere, and processes that behave."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from holdfast.training.data.loader import (
    FixedSizePlan,
    Loader,
    Microbatch,
    TokenPlan,
    evaluation_batches,
)
from holdfast.training.errors import DataFormatError, InputError, LoaderError
from holdfast.training.exactness.seeding import capture_generators, seed_generators
from holdfast.training.experiment.protocol import Dataset

sys.path.insert(0, str(Path(__file__).parent))  # loader processes get this path, too

from loader_datasets import (
    Augmented,
    Environment,
    Failing,
    LongSums,
    Marking,
    Whole,
)

NUM_ITEMS = 203


def loader_of(dataset: Dataset, batch_size: int = 24, **options: Any) -> Loader:
    plan = FixedSizePlan(len(dataset), batch_size, False, 1)
    return Loader(dataset, plan, **{"num_microbatches": 3, "seed": 5, **options})


def bytes_of(microbatch: Microbatch) -> tuple[Any, ...]:
    inputs, targets = microbatch.batch
    return (
        (microbatch.epoch, microbatch.step_in_epoch, microbatch.number, microbatch.num_samples),
        inputs.numpy().tobytes(),
        *(target.numpy().tobytes() for target in targets),
    )


def first(loader: Loader, epoch: int, step: int, num: int) -> list[tuple[Any, ...]]:
    with closing(loader):
        return [bytes_of(microbatch) for microbatch in islice(loader.steps(epoch, step), num)]


@pytest.fixture(scope="module")
def reference() -> list[tuple[Any, ...]]:
    """Two and a bit epochs of 9 steps, each of 3 microbatches, in the training process."""
    return first(loader_of(Augmented(NUM_ITEMS)), 0, 0, 60)


@pytest.mark.parametrize(
    ("num_workers", "is_persistent", "prefetch_factor"),
    [(1, True, 1), (2, True, 2), (2, False, 3), (4, True, 4), (4, False, 1)],
)
def test_any_number_of_workers_gives_the_same_bytes(
    reference: list[tuple[Any, ...]], num_workers: int, is_persistent: bool, prefetch_factor: int
) -> None:
    loader = loader_of(
        Augmented(NUM_ITEMS),
        num_workers=num_workers,
        has_persistent_workers=is_persistent,
        prefetch_factor=prefetch_factor,
    )
    assert first(loader, 0, 0, 60) == reference


@pytest.mark.parametrize("num_workers", [0, 2])
def test_many_resumes_within_an_epoch_give_the_same_bytes(
    reference: list[tuple[Any, ...]], num_workers: int
) -> None:
    loader = loader_of(Augmented(NUM_ITEMS), num_workers=num_workers)
    with closing(loader):
        for number in (0, 2, 3, 8, 9, 10, 17):
            microbatches = islice(loader.steps(*divmod(number, 9)), 4)
            expected = reference[3 * number : 3 * number + 4]
            assert [bytes_of(microbatch) for microbatch in microbatches] == expected


def test_the_end_of_an_epoch_is_the_start_of_the_next(reference: list[tuple[Any, ...]]) -> None:
    assert first(loader_of(Augmented(NUM_ITEMS)), 0, 9, 5) == reference[27:32]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_leaves_the_generators_of_this_process_untouched(num_workers: int) -> None:
    seed_generators(3)
    random.gauss(0, 1)
    np.random.randn()
    before = capture_generators()
    first(loader_of(Augmented(NUM_ITEMS), num_workers=num_workers), 0, 0, 10)
    after = capture_generators()
    assert all(torch.equal(before[name], state) for name, state in after.items())


def test_augmentation_differs_between_epochs_steps_and_seeds() -> None:
    def noise(epoch: int, step: int, seed: int) -> bytes:
        loader = loader_of(Augmented(NUM_ITEMS), seed=seed)
        return next(loader.steps(epoch, step)).batch[1][0].numpy().tobytes()

    assert len({noise(0, 0, 5), noise(1, 0, 5), noise(0, 1, 5), noise(0, 0, 6)}) == 4


def test_long_sums_round_alike_in_loader_processes_and_here() -> None:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sums = [
            next(loader.steps(0, 0)).batch[0].tolist()
            for num_workers in (0, 1)
            if (loader := loader_of(LongSums(), 8, num_microbatches=1, num_workers=num_workers))
        ]
    finally:
        torch.set_num_threads(num_threads)
    assert sums[0] == sums[1]


@pytest.mark.parametrize("num_microbatches", [1, 2, 3, 5, 24])
def test_microbatches_cut_a_step_into_nearly_equal_parts(num_microbatches: int) -> None:
    loader = loader_of(Augmented(NUM_ITEMS), num_microbatches=num_microbatches)
    steps: dict[int, list[Microbatch]] = {}
    for microbatch in loader.steps(0, 0):
        if microbatch.epoch == 1:
            break
        steps.setdefault(microbatch.step_in_epoch, []).append(microbatch)
    assert sum(m.num_samples for parts in steps.values() for m in parts) == NUM_ITEMS
    for parts in steps.values():
        sizes = [len(part.batch[0]) for part in parts]
        assert len(parts) == min(num_microbatches, sum(sizes)) == parts[0].num_in_step
        assert max(sizes) - min(sizes) <= 1
        assert sizes == [part.num_samples for part in parts]
        assert sum(part.weight for part in parts) == pytest.approx(1.0)
        assert [part.is_last_in_step for part in parts] == [False] * (len(parts) - 1) + [True]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_set_may_fetch_whole_batches(num_workers: int) -> None:
    with closing(loader_of(Whole(NUM_ITEMS), num_workers=num_workers)) as loader:
        plan = FixedSizePlan(NUM_ITEMS, 24, False, 1)
        microbatch = next(loader.steps(2, 4))
        assert microbatch.batch[1].tolist() == plan.indices(2, 4)[:8].tolist()


def test_a_token_plan_is_followed() -> None:
    plan = TokenPlan([1 + i % 7 for i in range(NUM_ITEMS)], 30, 0)
    loader = Loader(Augmented(NUM_ITEMS), plan, seed=0)
    for microbatch in islice(loader.steps(1, 3), 5):
        indices = plan.indices(microbatch.epoch, microbatch.step_in_epoch)
        assert microbatch.batch[1][2].tolist() == indices.tolist()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_failing_sample_is_named_with_the_line_that_failed(num_workers: int) -> None:
    expected = (
        r"^sample 13 could not be loaded \(pass 0 over the data, step \d of .*\): ValueError: "
        r"pixel out of range \(.*loader_datasets\.py:\d+ in __getitem__\)(\n|$)"
    )
    with closing(loader_of(Failing("value"), 4, num_workers=num_workers)) as loader:
        with pytest.raises(LoaderError, match=expected) as caught:
            list(islice(loader.steps(0, 0), 15))
        told = [str(caught.value.__cause__), *getattr(caught.value, "__notes__", [])]
        assert "pixel out of range" in "".join(told)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_malformed_file_stays_an_input_error(num_workers: int) -> None:
    with (
        closing(loader_of(Failing("format"), 4, num_workers=num_workers)) as loader,
        pytest.raises(InputError, match="line 13 has 2 columns") as caught,
    ):
        list(islice(loader.steps(0, 0), 15))
    assert caught.value.exit_code == 2
    assert num_workers or isinstance(caught.value, DataFormatError)


def test_an_index_that_a_data_set_does_not_have_comes_with_a_hint() -> None:
    class Short(Augmented):
        def __getitem__(self, index: int) -> Any:
            return [0][index + 1]

    with pytest.raises(LoaderError, match=r"IndexError.* in __getitem__\); the data set must retu"):
        next(loader_of(Short(), num_microbatches=1).steps(0, 0))


def test_a_batch_that_cannot_be_collated_is_named() -> None:
    class Ragged(Augmented):
        def __getitem__(self, index: int) -> Any:
            return torch.zeros(index)

    with pytest.raises(LoaderError, match=r"the samples \[\d+, .*\.\.\. could not be loaded"):
        next(loader_of(Ragged(), num_microbatches=1).steps(0, 0))


def test_a_killed_loader_process_gives_an_error_that_names_the_place() -> None:
    with (
        closing(loader_of(Failing("kill"), 4, num_workers=2)) as loader,
        pytest.raises(
            LoaderError, match=r"died while pass 0 over the data, step \d .* short of memory"
        ),
    ):
        list(islice(loader.steps(0, 0), 15))


def test_a_data_set_that_cannot_be_sent_is_refused_with_advice() -> None:
    class Local(Augmented):
        pass

    with pytest.raises(InputError, match=r"data\.num_workers=0"):
        next(loader_of(Local(), num_workers=1).steps(0, 0))


@pytest.mark.parametrize("built", ["module.Squares()", "_Collated(list(range(9)), module.squared)"])
def test_code_from_a_file_outside_of_any_package_reaches_loader_processes(
    tmp_path: Path, built: str
) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "class Squares:\n"
        "    def __len__(self): return 9\n"
        "    def __getitem__(self, index): return torch.tensor(index ** 2), 0\n"
        "def squared(items): return torch.tensor(items) ** 2, 0\n"
    )
    # The name under which experiment files are loaded; no loader process can import it.
    script = (
        "import importlib.util, sys\n"
        "from holdfast.training.data.loader import FixedSizePlan, Loader\n"
        "from holdfast.training.own_loop.loader import _Collated\n"
        "spec = importlib.util.spec_from_file_location('outside_of_packages', 'own.py')\n"
        "module = sys.modules['outside_of_packages'] = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "plan = FixedSizePlan(9, 9, False, 0)\n"
        f"loader = Loader({built}, plan, num_workers=1, seed=0)\n"
        "print(sorted(next(loader.steps(0, 0)).batch[0].tolist()))\n"
        "loader.close()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == str([i**2 for i in range(9)]), run.stderr


def fetching_processes(folder: Path) -> list[int]:
    """Processes that fetched an item of a ``Marking`` data set."""
    return [int(path.name) for path in folder.iterdir()]


def gone(find: Any, timeout_s: float = 10.0) -> bool:
    end = time.monotonic() + timeout_s
    while find():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def test_close_leaves_no_loader_process_behind(tmp_path: Path) -> None:
    loader = loader_of(Marking(tmp_path), 4, num_workers=2)
    next(loader.steps(0, 0))
    loader.close()
    loader.close()
    assert not [pid for pid in fetching_processes(tmp_path) if psutil.pid_exists(pid)]


def test_an_iterator_from_before_a_new_start_ends() -> None:
    loader = loader_of(Augmented(), num_workers=1, has_persistent_workers=False)
    with closing(loader):
        old = loader.steps(0, 0)
        next(old)
        new = loader.steps(0, 3)
        assert next(new).step_in_epoch == 3
        assert next(old, None) is None


def test_loader_processes_ignore_the_signals_of_a_notice_and_use_as_many_threads() -> None:
    with closing(loader_of(Environment(), 4, num_workers=2)) as loader:
        microbatches: Iterator[Microbatch] = loader.steps(0, 0)
        is_deaf, num_threads, process = next(microbatches).batch[1]
        assert is_deaf.all()
        assert num_threads.tolist() == [torch.get_num_threads()] * len(num_threads)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(int(process[0]), number)
        assert len(list(islice(microbatches, 20))) == 20


@pytest.mark.parametrize(
    "ending",
    [
        pytest.param("pass", marks=pytest.mark.slow),
        pytest.param("raise SystemExit(0)", marks=pytest.mark.slow),
        "sys.modules['kept'] = steps",
    ],
)
def test_a_process_that_forgot_to_close_its_loader_ends(ending: str) -> None:
    script = (
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from loader_datasets import Augmented\n"
        "from holdfast.training.data.loader import FixedSizePlan, Loader\n"
        "loader = Loader(Augmented(), FixedSizePlan(40, 4, False, 0), num_workers=1, seed=0)\n"
        "steps = loader.steps(0, 0)\n"
        "next(steps)\n"
        f"{ending}\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_loader_processes_go_when_the_training_process_is_killed(tmp_path: Path) -> None:
    script = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path\n"
        "from loader_datasets import Marking\n"
        "from holdfast.training.data.loader import FixedSizePlan, Loader\n"
        f"loader = Loader(Marking(Path({str(tmp_path)!r})), FixedSizePlan(40, 4, False, 0),\n"
        "                num_workers=2, prefetch_factor=4, seed=0)\n"
        "steps = loader.steps(0, 0)\n"
        "[next(steps) for _ in range(4)]\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # multiprocessing tells there that it cleans up
        text=True,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "ready\n"
        parent.kill()
    processes = fetching_processes(tmp_path)
    assert len(processes) == 2
    # Below an init that reaps nobody they would stay as zombies.
    assert gone(lambda: [p for p in processes if _is_running(p)])


def _is_running(process: int) -> bool:
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_evaluation_batches_come_in_the_order_of_the_data_set() -> None:
    batches = list(evaluation_batches(Augmented(10), 4))
    assert [batch[1][2].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    again = list(evaluation_batches(Augmented(10), 4))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(batches, again, strict=True))
