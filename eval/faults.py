"""Faults of the disk in the middle of `llmqat quantize`: is anything lost, and does each message say what to do?

A tiny random Llama is quantized (ranges, gptq, blockwise) in a folder that is a disk of its own (tmpfs), again and
again, and each time something goes wrong:

- full: the disk has room for a share of what the run writes. Then it has room, and the same command is given again.
- deleted, truncated, halved bytes: the disk was full; now a file that the run has left is gone, empty, cut in half, or
  has other bytes in its middle; then it has room, and the same command is given again.
- clock: as full, and all that the run has left is a day ahead of the clock.

It ends well where the command gives the bytes of an undisturbed run, or refuses by the name of a file and gives these
bytes once that is deleted. Anything else is a failure: other bytes, another error, a message that names no file. Needs
the right to mount: root, or `unshare -rm python eval/faults.py ...`. A fault that was tried is not repeated. The last
lines are the headline, `name: number`.

    python eval/faults.py --out runs/faults --table eval/results/faults.txt
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from kills import digests, write_inputs
from made import recorded, result_options
from rich.table import Table

from llmqat.cli import main as llmqat_command
from llmqat.files import write_whole
from llmqat.paths import user_path
from llmqat.terminal import plain_console, show_any_text

ROOM = 1 << 30
"""Bytes of a disk that is large enough."""
DAY = 86_400
LIMIT = 600
"""Seconds after which a command is given up."""
KINDS = ("full", "full", "full", "deleted", "truncated", "halved", "bytes", "clock")
"""What goes wrong, one after the other."""


@dataclass(frozen=True)
class Fault:
    """What came of one.

    Attributes:
        kind: of `KINDS`.
        share: of the bytes of an undisturbed run that the disk had room for.
        file: that was damaged; "" where none was.
        first: last line of what the command said when the disk was full.
        second: the same of the next time, where that did not end well.
        well: whether it ended well.
    """

    kind: str
    share: float
    file: str
    first: str
    second: str
    well: bool


def main() -> None:
    """Tries as many faults as it was asked to; prints the table, then the headline."""
    show_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[result_options()]
    )
    parser.add_argument("--out", type=user_path, required=True, help="folder of the runs")
    parser.add_argument("--faults", type=int, default=100, help="how many")
    options = parser.parse_args()
    if options.faults < 1:
        parser.error("--faults is 1 or more")
    if os.geteuid() != 0:
        parser.error("it mounts disks of its own: be root, or put `unshare -rm` before the command")
    write_inputs(options.out)
    disk = options.out / "disk"
    mount(disk, ROOM)
    code, said = quantize(options.out)
    if code:
        raise SystemExit(f"the undisturbed run failed:\n{said}")
    expected, written = digests(disk / "packed"), most_used(options.out)
    kept = options.out / "faults.json"
    found = [Fault(**one) for one in json.loads(kept.read_text(encoding="utf-8"))] if kept.is_file() else []
    for number in range(len(found), options.faults):
        share = (number + 0.5) / options.faults
        found.append(tried(options.out, KINDS[number % len(KINDS)], share, number, int(share * written), expected))
        write_whole(kept, json.dumps([asdict(one) for one in found], indent=2) + "\n")
    unmount(disk)
    show(found[: options.faults])


def show(found: list[Fault]) -> None:
    """Prints the table and the headline."""
    table = Table("fault", "tried", "ended well", "what was said when the disk was full, and later")
    for kind in dict.fromkeys(KINDS):
        own = [one for one in found if one.kind == kind]
        said = Counter(words for one in own for words in (one.first, one.second) if words)
        shown = "\n".join(f"{count} x {words}" for words, count in said.most_common(4))
        table.add_row(kind, str(len(own)), str(sum(one.well for one in own)), shown)
    plain_console(width=160).print(table)
    print(f"faults: {len(found)}")
    print(f"ended well: {sum(one.well for one in found)}")


def tried(out: Path, kind: str, share: float, number: int, room: int, expected: dict[str, str]) -> Fault:
    """Has one thing go wrong, gives the command again, and compares."""
    disk, damaged = out / "disk", ""
    mount(disk, max(room, 1 << 15))
    code, said = quantize(out)
    first = last_line(said) if code else ""
    subprocess.run(["mount", "-o", f"remount,size={ROOM}", str(disk)], check=True)
    left = sorted(path for path in disk.rglob("*") if path.is_file())
    if kind in DAMAGE and left:
        file = left[number // len(KINDS) % len(left)]
        damaged = str(file.relative_to(disk))
        DAMAGE[kind](file)
    elif kind == "clock":
        for path in left:
            os.utime(path, (time.time() + DAY, time.time() + DAY))
    names_file = not code or ("the disk is full" in said and str(disk) in said)
    if not code:
        return Fault(kind, share, damaged, first, "", digests(disk / "packed") == expected or bool(damaged))
    code, said = quantize(out)
    second = last_line(said) if code else ""
    if code and damaged and Path(damaged).name in said:
        (disk / damaged).unlink(missing_ok=True)
        code, said = quantize(out)
    well = names_file and not code and digests(disk / "packed") == expected
    return Fault(kind, share, damaged, first, second, well)


def _halve(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def _change(file: Path) -> None:
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = bytes(255 - byte for byte in content[middle : middle + 8])
    file.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "deleted": Path.unlink,
    "truncated": lambda file: os.truncate(file, 0),
    "halved": _halve,
    "bytes": _change,
}
"""Kind -> what is done to a file."""


def mount(disk: Path, size: int) -> None:
    """Makes `disk` an empty disk of so many bytes."""
    unmount(disk)
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)


def unmount(disk: Path) -> None:
    """Takes the disk away, where there is one."""
    if disk.is_mount():
        subprocess.run(["umount", str(disk)], check=True)


def most_used(out: Path) -> int:
    """Returns the bytes that a run takes on the disk at most."""
    mount(out / "disk", ROOM)
    process = started(out)
    most = 0
    while process.is_alive():
        most = max(most, shutil.disk_usage(out / "disk").used)
        time.sleep(0.02)
    return most


def quantize(out: Path) -> tuple[int, str]:
    """Gives the command; returns its exit status and what it said."""
    process = started(out)
    process.join(LIMIT)
    if process.is_alive():
        process.kill()
        return 1, f"it did not end within {LIMIT} seconds"
    said = out / "said.txt"
    return process.exitcode or 0, said.read_text(encoding="utf-8")


def started(out: Path) -> multiprocessing.Process:
    """Starts the command in a process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmqat.recipe.quantize", "llmqat.cli"])
    process = context.Process(target=_command, args=(out,))
    process.start()
    return process  # type: ignore[return-value]


def _command(out: Path) -> None:
    words = ["quantize", str(out / "model"), "--out", str(out / "disk" / "packed"), "--method", "blockwise"]
    words += ["--text", str(out / "text.txt"), "--tokens", "512", "--block-size", "64", "--group-size", "32"]
    with (out / "said.txt").open("w", encoding="utf-8") as said:
        for stream in (1, 2):
            os.dup2(said.fileno(), stream)
    sys.argv = ["llmqat", *words]
    llmqat_command()


def last_line(said: str) -> str:
    """Returns the last line of what a command said, in at most 300 characters."""
    lines = [line for line in said.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


if __name__ == "__main__":
    with recorded("faults.py"):
        main()
