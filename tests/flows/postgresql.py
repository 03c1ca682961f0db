"""A PostgreSQL server on loopback from the system's packages, for one test."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.flows.prefect_server import free_port

USER = "prefect"
# PostgreSQL refuses to run as root; its Debian package brings this account.
SYSTEM_USER = "postgres" if os.geteuid() == 0 else None


def find_programs() -> Path | None:
    """The folder with initdb and pg_ctl, which Debian keeps out of PATH; None for none."""
    found = shutil.which("initdb")
    if found is not None:
        return Path(found).parent
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return versions[-1].parent if versions else None


@contextmanager
def postgresql(programs: Path) -> Iterator[str]:
    """A running server with an empty database; its address for Prefect."""
    # A folder of pytest cannot be entered by another account.
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))
    data, port, password = folder / "data", free_port(), secrets.token_hex(16)
    (folder / "password").write_text(password)

    def call(program: str, *arguments: str) -> None:
        subprocess.run(
            [str(programs / program), "--pgdata", str(data), *arguments],
            user=SYSTEM_USER,
            cwd=folder,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )

    try:
        if SYSTEM_USER is not None:
            for path in (folder, folder / "password"):
                shutil.chown(path, SYSTEM_USER)
        password_file = f"--pwfile={folder / 'password'}"
        call("initdb", "--username", USER, "--auth=scram-sha-256", password_file, "--no-sync")
        options = f"-h 127.0.0.1 -p {port} -k {folder} -c fsync=off"
        call("pg_ctl", "start", "--wait", "--log", str(folder / "log"), "--options", options)
        try:
            yield f"postgresql+asyncpg://{USER}:{password}@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "stop", "--mode=immediate")
    finally:
        shutil.rmtree(folder)
