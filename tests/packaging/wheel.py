"""Build the wheel, install it into a fresh environment, and train with it, far from the sources.

    python -m tests.packaging.wheel --python /path/to/python3.13

The interpreter's environment has to have the dependencies; the fresh one borrows them. Nothing is
downloaded. Exit code 0 if all of it worked.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SOURCES = ("training", "tasks", "flows")
WHERE = "import pathlib, torch; print(pathlib.Path(torch.__file__).parents[1])"
FACE = (
    "import holdfast, sys; from holdfast.flows.command_line.commands.deploy import DEFINITIONS; "
    "assert DEFINITIONS.joinpath('prefect.yaml').is_file(); "
    "print(holdfast.__version__, sys.version.split()[0], holdfast.__file__)"
)
SEGMENT = "--experiment digits --store alone --run-id alone --set train.num_epochs=1"
SHORT = "--set train.num_epochs=2 --set export.num_latency_runs=10"
COMMANDS = (
    f'python -c "{FACE}"',
    "holdfast --help",
    "holdfast doctor",
    f"python -m holdfast.training segment {SEGMENT}",
    f"holdfast run digits --run-id whole {SHORT} --set export.formats=[]",
    "holdfast checkpoints verify whole",
    "holdfast pull digits --to model",
    "holdfast verify model",
    "python -P model/verify.py",
)


def build(folder: Path) -> Path:
    """The wheel of the sources as git knows them, new ones included; nothing is left in them."""
    sources = folder / "sources"
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    found = subprocess.run(listing, cwd=REPOSITORY, check=True, capture_output=True, text=True)
    for name in filter(None, found.stdout.split("\0")):
        if os.path.lexists(REPOSITORY / name):
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(REPOSITORY / name, sources / name, follow_symlinks=False)
    argv = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*argv, "--wheel-dir", str(folder), str(sources)], check=True, cwd=folder)
    return next(folder.glob("holdfast-*.whl"))


def problems(wheel: Path) -> list[str]:
    """What is in the wheel and should not be, or the other way round."""
    with zipfile.ZipFile(wheel) as archive:
        entries = archive.infolist()
    names = {entry.filename for entry in entries}
    wanted = {
        f"holdfast/{path.relative_to(REPOSITORY).as_posix()}"
        for folder in SOURCES
        for path in (REPOSITORY / folder).rglob("*.py")
    }
    wanted |= {
        f"holdfast/{path.relative_to(REPOSITORY).as_posix()}"
        for path in (REPOSITORY / "deployments").rglob("*")
        if path.is_file()
    }
    face = ["holdfast/py.typed", "holdfast/*.py", "holdfast/integrations/*.py"]
    found = (path for pattern in face for path in REPOSITORY.glob(pattern))
    wanted |= {path.relative_to(REPOSITORY).as_posix() for path in found}
    packed = {name for name in names if ".dist-info/" not in name}
    links = [entry.filename for entry in entries if stat.S_ISLNK(entry.external_attr >> 16)]
    return [
        *(f"missing: {name}" for name in sorted(wanted - packed)),
        *(f"not ours: {name}" for name in sorted(packed - wanted)),
        *(f"a link: {name}" for name in links),
    ]


def install(wheel: Path, folder: Path, python: str) -> Path:
    """A fresh environment with the wheel, and with the dependencies of ``python``'s own."""
    environment = folder / "environment"
    subprocess.run([python, "-m", "venv", str(environment)], check=True)
    where = subprocess.run([python, "-c", WHERE], check=True, capture_output=True, text=True)
    own = next(environment.glob("lib/python*/site-packages"))
    argv = [str(environment / "bin/python"), "-m", "pip", "install", "--quiet"]
    argv += ["--no-deps", "--no-index", str(wheel)]
    subprocess.run(argv, check=True)
    (own / "borrowed.pth").write_text(where.stdout)
    return environment


def use(environment: Path, folder: Path) -> None:
    """Do what a user does, in an empty folder. Raises CalledProcessError."""
    folder.mkdir()
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables |= {"PREFECT_HOME": str(folder / "prefect"), "OMP_NUM_THREADS": "1"}
    for command in COMMANDS:
        print("$", command, flush=True)
        program, *arguments = shlex.split(command)
        argv = [str(environment / "bin" / program), *arguments]
        subprocess.run(argv, check=True, cwd=folder, env=variables, stdin=subprocess.DEVNULL)


def main() -> None:
    """Try it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=sys.executable, help="interpreter with dependencies")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        if found := problems(wheel):
            sys.exit("\n".join(found))
        use(install(wheel, folder, options.python), folder / "project")
    print("the wheel works")


if __name__ == "__main__":
    main()
