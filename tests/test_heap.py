"""What the C library does with freed memory, seen in page faults of a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from llmqat.heap import SETTINGS_OF_THE_USER

SCRIPT = """
import resource
from llmqat.heap import keep_freed_memory
print(keep_freed_memory())
b"x" * 40_000_000
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    b"x" * 40_000_000
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's heap")
@pytest.mark.parametrize("variable", [None, "MALLOC_MMAP_THRESHOLD_"])
def test_freed_memory_is_kept_unless_the_user_says_otherwise(variable: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS_OF_THE_USER)}
    if variable:
        environment[variable] = "1000000"
    command = [sys.executable, "-c", SCRIPT]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    pages = 40_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert output[0] == str(variable is None)
    assert int(output[1]) < pages if variable is None else int(output[1]) > 4 * pages


GIVEN_BACK = """
from llmqat.evaluate.memory import resident
from llmqat.heap import give_back_freed_memory, keep_freed_memory
assert keep_freed_memory()
start = resident("VmRSS")
held = [b"x" * 1_000_000 for _ in range(100)]
last = b"x" * 1_000_000  # what is free lies under it
del held
print(resident("VmRSS") - start)
give_back_freed_memory()
print(resident("VmRSS") - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="trims glibc's heap")
def test_a_peak_is_counted_from_what_is_held_and_not_from_what_was_freed() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS_OF_THE_USER)}
    script = GIVEN_BACK.replace("give_back_freed_memory()", "forget_peak()").replace(
        "from llmqat.evaluate.memory import resident", "from llmqat.evaluate.memory import forget_peak, resident"
    )
    script = script.replace("import give_back_freed_memory, ", "import ")
    command = [sys.executable, "-c", script]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    kept, left = map(int, output)
    assert kept > 90_000_000
    assert left < 10_000_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="trims glibc's heap")
def test_kept_memory_is_given_back_when_asked() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS_OF_THE_USER)}
    command = [sys.executable, "-c", GIVEN_BACK]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    kept, left = map(int, output)
    assert kept > 90_000_000
    assert left < 10_000_000


LARGE = """
import resource
from llmqat.heap import keep_freed_memory, large_tensors_given_back
def faults():
    b"x" * 40_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        b"x" * 40_000_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
assert keep_freed_memory()
print(faults())
with large_tensors_given_back():
    print(faults())
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's heap")
def test_large_tensors_are_given_back_where_a_model_may_be_larger_than_memory() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS_OF_THE_USER)}
    output = subprocess.run([sys.executable, "-c", LARGE], env=environment, capture_output=True, text=True, check=True)
    kept, given_back, kept_again = map(int, output.stdout.split())
    pages = 40_000_000 // os.sysconf("SC_PAGE_SIZE")
    assert kept < pages
    assert given_back > 4 * pages
    assert kept_again < pages
