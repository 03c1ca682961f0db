"""Run the benchmarks and write what they print into the documentation.

    python -m benchmarks                            what takes minutes, printed
    python -m benchmarks --data FOLDER --write
    python -m benchmarks averaging --data FOLDER --store RUNS --write       takes hours

``FOLDER`` holds ``cmapss/train_FD001.txt`` and so on, ``tatoeba_deu_eng/deu.txt``, and
``tinyshakespeare/input.txt``; without it the rows that need real data are left out. A section whose
program fails says so, and the exit code is 1. With ``--store``, trainings that are there already
are not done again. With ``--only``, the other sections of the page stay as they are.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).parent
DATA, STORE = "{data}", "{store}"
CMAPSS = f"data.folder={DATA}/cmapss"
TURBOFAN = ("--experiment", "turbofan", "--set", CMAPSS)
SHAKESPEARE = (
    *("--experiment", "language_model", "--config", "docs/language_model_shakespeare.toml"),
    *("--set", f"data.folder={DATA}/tinyshakespeare"),
)
SHORT = ("--steps", "4", "--repetitions", "15")
COMPARE = ("candidates_compared.py", "--store", STORE)
CONFIGURATIONS = Path("benchmarks", "configurations")


@dataclass(frozen=True)
class Section:
    """A program of this folder, how to call it, what is aimed at, and what to compare it with."""

    title: str
    aim: str
    calls: tuple[tuple[str, ...], ...]
    context: str = ""


@dataclass(frozen=True)
class Page:
    """A page of the documentation that programs write."""

    path: Path
    head: str
    sections: tuple[Section, ...]


def compare(name: str, config: str, seeds: int, *options: str) -> tuple[str, ...]:
    """All candidates of some seeds of a configuration."""
    return (*COMPARE, "--name", name, "--config", config, "--seeds", str(seeds), *options)


AVERAGING = (
    Section(
        "Digits, 15 % wrong labels, constant rate",
        "top-5 average and best EMA beat the single best on test loss in most of ten seeds",
        (compare("noise", str(CONFIGURATIONS / "digits_label_noise.toml"), 10),),
    ),
    Section(
        "Digits, right labels, decaying rate",
        "about no gain",
        (compare("clean", str(CONFIGURATIONS / "digits_clean.toml"), 10),),
    ),
    *(
        Section(
            f"Turbofan, {subset}",
            f"the champion's rmse below {goal}, that of gradient-boosted trees",
            (
                compare(
                    f"compared-{subset}",
                    str(CONFIGURATIONS / "turbofan.toml"),
                    3,
                    *TURBOFAN,
                    *("--set", f"experiment.subset={subset}"),
                    *("--set", f"experiment.train_stride={stride}"),
                    *("--set", f"experiment.validation_windows={windows}"),
                    *("--metric", "rmse", "--metric", "rmse_raw", "--metric", "nasa_score"),
                ),
            ),
            "`rmse` is in cycles at the last cycle of each test engine, its label capped at 125; "
            "`rmse_raw` and `nasa_score` take the label as it is. Epoch and candidate are chosen "
            f"on validation engines. Published are {published}, but read them with care: the usual "
            "protocol chooses the epoch on the test engines, and caps the test labels or does not "
            "without saying so. On the other hand, these runs see windows of 60 cycles and the age "
            "of the engine; the network of Li et al. sees 30 or 20 cycles and no age.",
        )
        for subset, stride, windows, goal, published in (
            (
                "FD001",
                20,
                30,
                "12.38",
                "12.61 (CNN, Li et al. 2018) and 16.14 (LSTM, Zheng et al. 2017)",
            ),
            (
                "FD002",
                50,
                10,
                "13.81",
                "22.36 (CNN, Li et al. 2018) and 24.49 (LSTM, Zheng et al. 2017)",
            ),
        )
    ),
    *(
        Section(
            f"Translation, English to German, {num_epochs} epochs",
            "what averaging the best five is worth in BLEU",
            (
                compare(
                    name,
                    "docs/translation_tatoeba.toml",
                    3,
                    *("--experiment", "translation"),
                    *("--set", f"data.folder={DATA}/tatoeba_deu_eng"),
                    *("--set", f"train.num_epochs={num_epochs}"),
                    *("--metric", "bleu:max", "--metric", "loss"),
                ),
            ),
            f"The best five are the ends of five of {num_epochs} epochs.",
        )
        for num_epochs, name in ((6, "tatoeba"), (12, "tatoeba-12"))
    ),
    *(
        Section(
            f"Language model, Shakespeare's characters, {num_steps} steps",
            aim,
            (
                compare(
                    name,
                    "docs/language_model_shakespeare.toml",
                    3,
                    *("--experiment", "language_model"),
                    *("--set", f"data.folder={DATA}/tinyshakespeare"),
                    *overrides,
                    *("--split", "validation", "--split", "test"),
                    *("--metric", "loss", "--metric", "bits_per_byte"),
                ),
            ),
            "The figures are of the last tenth of the text, which nanoGPT validates on. Of it, the "
            "first half validates here, and so chose epoch and candidate; the second half tests.",
        )
        for num_steps, name, aim, overrides in (
            (
                2000,
                "shakespeare",
                "the loss of 1.88 that nanoGPT's README publishes for this model, text and budget",
                (),
            ),
            (
                8000,
                "shakespeare-4",
                "what averages are worth at four times that length",
                (
                    *("--set", "train.num_epochs=32"),
                    *("--set", "scheduler.args.T_max=7900"),
                ),
            ),
        )
    ),
    Section(
        "Language model, Shakespeare's characters, beside nanoGPT's loop",
        "the losses of a plain loop with the same model, and its time",
        (("beside_nanogpt.py", "--seeds", "3", *SHAKESPEARE[2:]),),
        "Both train on one thread, in turns of 50 steps, for 2000 steps. `loss, whole` is that of "
        "each token of the last tenth of the text; `loss, estimated` is what nanoGPT prints, 20 "
        "batches of 12 windows at random places of it. Steps are training alone; all is with what "
        "each loop does beside them: 20 batches of both parts of the text every 250 steps there, "
        "half of the last tenth, whole, and checkpoints here. The plain loop keeps no moving "
        "averages, and Holdfast two.",
    ),
)

SPEED = (
    Section(
        "Steps per second",
        "against a bare PyTorch loop that does the same work; at least 0.97 on digits and 0.99 on "
        "turbofan and language_model",
        (
            ("steps_per_second.py", "--steps", "20", "--repetitions", "101"),
            ("steps_per_second.py", "--steps", "5", "--repetitions", "21", *TURBOFAN),
            ("steps_per_second.py", "--steps", "5", "--repetitions", "41", *SHAKESPEARE),
        ),
    ),
    Section(
        "Steps per second of a script's own loop",
        "against the script without `holdfast.run`, saves included in both; at least 0.99",
        (("own_loop_speed.py",),),
    ),
    Section(
        "Deterministic algorithms against speed mode",
        "what `train.mode=speed` would win; below 1 the deterministic mode is slower",
        (
            ("determinism.py",),
            ("determinism.py", "--steps", "10", *TURBOFAN),
            ("determinism.py", "--experiment", "language_model"),
            ("determinism.py", "--experiment", "translation"),
        ),
    ),
    Section(
        "Saving and restoring 400 MB",
        "from the loop at most 1.3 of a copy in memory, to durable at most 1.3 of writing and "
        "flushing, restore at most 1.3 of reading",
        (("checkpoint.py",),),
    ),
    Section(
        "Steps per second of several processes",
        "against torch's own DDP and FSDP2 at least 0.97 without `num_shards`; with as many shards "
        "as processes 0.85",
        (
            ("several_processes.py",),
            ("several_processes.py", *SHORT, *SHAKESPEARE),
            ("several_processes.py", "--strategy", "fsdp", *SHORT, *SHAKESPEARE),
        ),
        "Processes of one thread each, one for each core. Two shards a process are two passes over "
        "half as many samples: they are to be held against the plain loop that does so, too.",
    ),
    Section(
        "A save by several processes",
        "from the loop at most 1.3 of a copy in memory, to durable at most 1.3 of writing and "
        "flushing",
        (("saving_together.py",),),
        "Weights, the state of AdamW and an average lie in slices. DCP is torch's own, with its "
        "default writer and with that of safetensors: neither reads back what it has written, nor "
        "publishes it at one stroke.",
    ),
    Section(
        "All processes stop after the same step",
        "no message of its own in a step",
        (("stop_step.py",),),
    ),
    Section(
        "From SIGKILL of one process to the first new step",
        "20 s",
        (("lost_rank.py",),),
    ),
    Section(
        "First batch after a resume",
        "the same time and memory at any place of any data set",
        (("resume_position.py",),),
    ),
    Section(
        "Samples from stream files",
        "ahead of webdataset and mosaicml-streaming on the same samples; the first batch after a "
        "resume costs the same at any place",
        (("stream_speed.py",),),
        "10,000 samples of 16 KiB in 50 tars, read from the page cache by one process, shuffled "
        "within 4,096; mosaicml-streaming reads them from its own shards.",
    ),
    Section(
        "One update of a moving average of 25 M parameters",
        "at most 1.15 of `torch._foreach_lerp_`",
        (("ema_update.py", "--num-threads", "1"),),
    ),
    Section(
        "Averaging five files of 400 MB",
        "below 1.2 GB of memory, at least 0.7 of the speed of reading the files",
        (("averaging.py",),),
    ),
    Section(
        "Export, parity and bundle",
        "memory grows by at most 4 times the weights and 25 MB",
        (("export_cost.py", f"{DATA}/cmapss"),),
    ),
    Section(
        "A lost machine, by a driven clock",
        "noticed within 10 s; no run that two processes write, none that stays where it is",
        (("rescue_trials.py",),),
        "The real leases, verdicts and rescuer, by a clock that is driven. Six of ten processes "
        "are killed, two sleep up to 40 s; one call in twenty to the store or the server is late, "
        "by up to 2 s, some by up to 9 s. One that sleeps longer than a lease is taken for dead as "
        "it should be: it changes nothing when it wakes up. The others had a call to the store "
        "that took seven seconds before a renewal.",
    ),
    Section(
        "Leases on a loaded machine",
        "nobody who lives is taken for dead",
        (("lease_under_load.py", "--minutes", "3"),),
    ),
    Section(
        "From SIGKILL of everything to the first new step",
        "20 s",
        (("time_to_recover.py", "--kills", "20"),),
        "Digits on two machines, which are groups of processes here. All processes of the one that "
        "trains are killed, again and again; the other one's worker takes the run up.",
    ),
    Section(
        "A bucket, beside its client library alone",
        "upload and download at most 1.1",
        (("bucket.py", "transfer"),),
        "Parts of 8 MB, eight at once, in both; a restore digests, writes and flushes, too.",
    ),
    Section(
        "Saving 400 MB while a bucket is kept up to date",
        "from the loop at most 1.3 of a copy in memory, as without a bucket",
        (("bucket.py", "stall"),),
        "Another process reads the state before this one from the disk, digests it and brings it "
        "up meanwhile, to a server on the same cores.",
    ),
    Section(
        "A checkpoint of several machines on its way to a bucket",
        "with N machines 1 / N of the time that one alone needs, and the time to carry and to look",
        (("bringing_up.py",),),
        "Machines are commands on the same cores, with one process, a scratch disk and a limit of "
        "bandwidth each. From when the checkpoint is begun on the first machine's disk, which the "
        "others' slices are carried to, until the bucket's head names it.",
    ),
    Section(
        "Requests to a bucket",
        "what a provider's prices are for",
        (("bucket.py", "requests"),),
        "Deletions are counted as writes, though most providers ask nothing for them.",
    ),
    Section(
        "Status of 1,000 runs in a bucket",
        "below 5 s",
        (("bucket.py", "status"),),
    ),
    Section(
        "What the pipeline adds to training",
        "below 5 s that are ours for the whole pipeline",
        (("pipeline_overhead.py",),),
    ),
)

PEERS = (
    Section(
        "Digits, stopped twice",
        "every run that Holdfast keeps is exact",
        (("peers/compare.py",),),
        "Dropout, batch norm, and items that draw their augmentation; 75 steps. A run is stopped "
        "twice at seeded steps, started again as its trainer's documentation says, and its "
        "weights are compared with those of a calm run of the same seed, which is the same when it "
        "is repeated. Alone means: "
        "Transformers with `save_steps=10`, a callback that saves at SIGTERM, and "
        "`resume_from_checkpoint`; Lightning with "
        "`ModelCheckpoint(every_n_train_steps=10, save_on_exception=True)` and `ckpt_path`; "
        "Accelerate with `save_state` every ten steps and at SIGTERM, `load_state`, "
        "`skip_first_batches` and a seedable sampler.",
    ),
)

SIMULATE = (
    Section(
        "All traces",
        "the interval that training finds for itself reaches 98 % of the best one's useful share",
        (("traces.py", "--traces", f"{DATA}/spot_traces"),),
        "Step, save and durable save of the first run were measured on that GPU; the second has "
        "the pace of `turbofan` and stands for small models. 30 s of notice, 20 starts, prices of "
        "0.92 and 3.06 an hour.",
    ),
    Section(
        "Held against real replays",
        "the simulator's finish within 10 % of the real one",
        (
            ("simulated.py", "--trace", f"{DATA}/spot_traces/p3-trace.csv"),
            ("simulated.py", "--trace", f"{DATA}/spot_traces/g4dn-trace.csv"),
        ),
        "Steps of 30 ms, done by real segments on machines that come and go as the trace says, its "
        "time compressed; machines are told 4 s before they go, and half of them vanish without. A "
        "start is not compressed, so it weighs hundreds of times more than it would. Processes are "
        "forked from one that has imported torch, and the next is started at once: noticing, and "
        "Prefect, are no part of it.",
    ),
)

SIMULATE_HEAD = """# What preemptions would cost

`holdfast simulate` sets a run's own costs (a step, a save, a start, read from its records) against
machines that come and go, and says when the run would end, which share of the time that is paid
would be useful, which interval between saves would have been the best, and what it would cost.
Nothing is trained.

```bash
holdfast simulate first --trace p3-trace.csv
holdfast simulate first --mean-life-s 3600 --num-steps 500000 \\
    --set prices.spot_per_hour=0.92 --set prices.on_demand_per_hour=3.06
holdfast simulate --mean-life-s 3600 --num-steps 100000 --step-s 0.5 --save-s 0.05 \\
    --durable-s 2 --start-s 15
```

The first takes the run's costs and its number of steps; options take their place. The last needs no
run at all. `--json` prints the same for programs.

A trace is a CSV file with a row for each event, a time, `add` or `remove`, and the machine:
`60000,add,node1`. Times are milliseconds; a first row `seconds,event,machine` has them in seconds
(or minutes, or hours). One that is empty, malformed or runs backwards is refused with its line.
Times that are all multiples of a minute were seen by somebody who looked once a minute: each is
drawn from the minute before.

What is assumed:

- The run trains on one machine at a time: the one that has been there longest and was not told of
  its end. Where none is there, it waits. After its end the trace begins again.
- A machine is told `--notice-s` before it goes (`preemption.grace_period_s`), and saves if that is
  time enough; `--without-notice` is the share of those that vanish.
- The next segment begins `--takeover-s` after a machine vanished, `--handover-s` after one that was
  told: the medians of the run's own pauses, or 15 and 8 s where it had none
  ([coming_back.md](coming_back.md)).
- The online interval is that of Young and Daly as training computes it, from a save's cost and the
  lives so far. The best one is a fixed interval that is known afterwards; ends of epochs are saved
  in both. Closeness is the useful share of the first as a part of that of the second.
- Paid is all time in which a segment lives, at `prices.spot_per_hour`; on demand the same work has
  one start and no step twice, at `prices.on_demand_per_hour`. The report of a run has this line of
  money, too, from what it really took."""

PAGES = {
    "simulate": Page(Path("docs", "simulate.md"), SIMULATE_HEAD, SIMULATE),
    "speed": Page(
        Path("docs", "benchmarks.md"),
        "# Benchmarks\n\nEvery ratio is the median of rivals that took turns within one run.\n\n"
        "What needs a GPU is no part of this page: a save beside the computation, deterministic\n"
        "mode without fills of fresh memory, a restore: `benchmarks/on_gpu.py` measures these\n"
        "where there is one, in ten minutes.",
        SPEED,
    ),
    "peers": Page(
        Path("docs", "peers.md"),
        "# Trainers, stopped and gone on with\n\nWhat is exact of trainings that people have, "
        "with [integrations.md](integrations.md) and without.",
        PEERS,
    ),
    "averaging": Page(
        Path("docs", "averaging.md"),
        "# What averaging is worth\n\nEvery candidate on test data, mean and standard deviation "
        "over seeds, beside the single best\ncheckpoint of the same seed. In a run, only the "
        "champion and the single best meet test data. The last row\nis no result: it shows how "
        "much better one looks by choosing on test data.\n\n"
        "Two decays with equal figures are one average: the training was too short for the\n"
        "higher one, see [selection.md](selection.md). Names that end in `-bn` have statistics of\n"
        "batch norm recomputed on training data; where such a row gains and the one without does\n"
        "not, it is the statistics that gained.",
        AVERAGING,
    ),
}


def run(call: tuple[str, ...]) -> tuple[bool, str]:
    """Run a program; whether it worked, and what it printed."""
    print(f"$ python benchmarks/{' '.join(call)}", file=sys.stderr, flush=True)
    command = [sys.executable, str(HERE / call[0]), *call[1:]]
    # What a figure says of training, saving or recovering is no figure of the rehearsal.
    environment = {**os.environ, "HOLDFAST_REHEARSAL_DEPTH": "none"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stderr, file=sys.stderr)
        return False, f"failed with exit code {done.returncode}"
    return True, done.stdout.strip()


def filled(call: tuple[str, ...], places: Mapping[str, str | None]) -> tuple[str, ...] | None:
    """The call with folders in it; None where it needs one that was not named."""
    for mark, folder in places.items():
        if folder is None and any(mark in word for word in call):
            return None
        call = tuple(word.replace(mark, folder or "") for word in call)
    return call


def section_text(section: Section, places: Mapping[str, str | None]) -> tuple[bool, str]:
    """A section of the page. Paths of this machine are left out of it."""
    is_good, parts = True, [f"{heading(section)}\n\nAimed at: {section.aim}."]
    parts += [section.context] if section.context else []
    for call in section.calls:
        words = filled(call, places)
        if words is None:
            continue
        was_good, output = run(words)
        is_good &= was_good
        shown = " ".join(word.replace(DATA, "DATA").replace(STORE, "RUNS") for word in call)
        parts.append(f"`python benchmarks/{shown}`\n\n{output}")
        print(f"\n{output}\n", file=sys.stderr, flush=True)
    parts.append(f"Measured on {machine()}.")
    return is_good, "\n\n".join(parts)


def heading(section: Section) -> str:
    """The line that a section begins with."""
    return f"## {section.title}"


def page_text(page: Page, name: str, texts: Mapping[str, str]) -> str:
    """The page with new texts of some sections, and the others as they stand in it."""
    old = page.path.read_text().strip() if page.path.exists() else ""
    kept = {text.partition("\n")[0]: text for text in re.split(r"\n\n(?=## )", old)}
    written = [
        texts.get(section.title) or kept.get(heading(section), "") for section in page.sections
    ]
    head = f"{page.head}\n\nWritten by `python -m benchmarks {name}`; no figure is typed by hand."
    return "\n\n".join([head, *filter(None, written)]) + "\n"


def machine() -> str:
    """What was measured on."""
    information = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*:\s*(.*)", information)
    name = found.group(1).strip() if found else platform.machine()
    return (
        f"{len(os.sched_getaffinity(0))} cores of {name}, Python {platform.python_version()}, "
        f"torch {version('torch')}, {datetime.now(UTC):%Y-%m-%d}"
    )


def main() -> int:
    """Returns 1 if a program failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("page", nargs="?", choices=list(PAGES), default="speed")
    parser.add_argument("--data", help="folder with real data")
    parser.add_argument("--store", help="keep trainings there")
    parser.add_argument("--write", action="store_true", help="into the documentation")
    parser.add_argument(
        "--only", action="append", help="sections whose title has this in it; may be repeated"
    )
    arguments = parser.parse_args()
    page = PAGES[arguments.page]
    with tempfile.TemporaryDirectory() as folder:
        places = {DATA: arguments.data, STORE: arguments.store or folder}
        words = [word.lower() for word in arguments.only or [""]]
        chosen = [one for one in page.sections if any(w in one.title.lower() for w in words)]
        results = {section.title: section_text(section, places) for section in chosen}
    texts = {title: text for title, (_, text) in results.items()}
    print("\n\n".join(texts.values()))
    if arguments.write:
        page.path.write_text(page_text(page, arguments.page, texts))
    return 0 if all(is_good for is_good, _ in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
