"""Servers that runners start: on this machine's own address only, and always stopped."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

START = 300
"""Seconds that a server may take to be ready."""
HOST = "127.0.0.1"


@contextmanager
def served(
    command: Sequence[str], ready: str, variables: Mapping[str, str]
) -> Iterator[tuple[str, subprocess.Popen[bytes], float]]:
    """Yields the address of a server that is ready, its process, and the seconds that it took.

    Args:
        command: starts it; takes --host and --port.
        ready: a path of the address that answers once it is ready.
        variables: of the server's environment, where they are not set.

    Raises:
        RuntimeError: it has ended, with what it said of the reason.
    """
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--host", HOST, "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={"HF_HUB_OFFLINE": "1", **variables, **os.environ},
        )
        try:
            while not _is_ready(f"http://{HOST}:{port}{ready}"):
                if process.poll() is not None or time.perf_counter() - start > START:
                    log.seek(0)
                    raise RuntimeError(_reason(log.read().decode(errors="replace")))
                time.sleep(0.5)
            yield f"http://{HOST}:{port}", process, time.perf_counter() - start
        finally:
            children = tree(process.pid)
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for child in children[1:]:
                _end(child)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _reason(log: str) -> str:
    """Returns the first line that names an error, which later ones only follow from, or the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line]
    return errors[0] if errors else lines[-1] if lines else "it ended without a word"


def tree(process: int) -> list[int]:
    """Returns a process and all below it; only itself where the system does not tell (Linux does)."""
    below: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
        below.setdefault(parent, []).append(int(stat.parent.name))
    found = [process]
    for one in found:
        found += below.get(one, [])
    return found


def _end(process: int) -> None:
    """Ends a process that a server has left."""
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return
