"""Writes the tables of README.md, eval/README.md and the guides from the files in eval/results, between markers.

A table stands between `<!-- figures: NAME -->` and `<!-- end -->`. A test compares the pages with what this script
would write, so no figure in such a table is typed by hand.

    python eval/figures.py        # or: make figures
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from llmqat.files import write_whole
from llmqat.guides import REPOSITORY, guides
from llmqat.terminal import markdown_table, show_any_text

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "eval" / "results"
PAGES = (ROOT / "README.md", ROOT / "eval" / "README.md", *guides().values())
MARKED = re.compile(r"(<!-- figures: ([\w-]+) -->\n).*?(<!-- end -->)", re.S)
FEW_BITS = {
    "int3-wikitext": "run-smollm2-135m-int3-wikitext.json",
    "int3-hour": "run-smollm2-135m-int3-hour.json",
    "int2-hour": "run-smollm2-135m-int2-hour.json",
}
"""What `llmqat train` wrote of runs on WikiText-2 validation."""
DEMO = {"int4": "demo-smollm2-135m-int4.json", "int3": "demo-smollm2-135m-int3.json"}
BUDGET, DOMAIN = "budget-smollm2-135m.json", "valid"
"""Results of eval/budget.py, and its text of the domain: WikiText-2 validation."""
FORMATS = ("schemes-formats-smollm2-135m.json", "schemes-floats-smollm2-135m.json")
"""Results of eval/schemes.py: integers, NVFP4 and zeros; other floats, on another draw of generated text."""
FINETUNING = ("finetuning-int4-smollm2-135m.json", "finetuning-smollm2-135m.json")
"""4 bits, and 3."""
WAYS = {
    "LoRA, rounded": "LoRA in bfloat16, then plain rounding",
    "LoRA, calibrated": "LoRA in bfloat16, then GPTQ",
    "LoRA, distilled": "the same, then distilled from the fine-tuned model, 38 steps",
    "LoRA, distilled by KL alone": "the same with the KL divergence alone, 128 steps",
    "LoRA, distilled for longer": "the same with cross-entropy too, 128 steps",
    "LoRA inside": "LoRA inside the quantizers, after GPTQ",
    "LoRA inside, from packed": "the same, of the packed model",
}
"""Ways of eval/finetuning.py, in words."""
TEST_TEXT = "test.txt"
"""WikiText-2 test, as the results call it."""
MANY = 1e6
"""A perplexity above it is not told in digits."""


def main() -> None:
    """Writes the pages whose tables have changed."""
    show_any_text()
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        after = rendered(before)
        if after != before:
            write_whole(page, after)
            print(page.relative_to(ROOT))


def rendered(text: str) -> str:
    """Returns a page with its tables made from the results.

    Raises:
        KeyError: it has a marker of a table that is not known.
    """
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def run_of(file: str) -> dict[str, Any]:
    """Returns what a run or a script found, as it wrote it."""
    found: dict[str, Any] = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    return found


def perplexities(run: dict[str, Any]) -> dict[str, float]:
    """Returns row -> perplexity on WikiText-2 test."""
    return {row["name"]: row["texts"][TEST_TEXT]["perplexity"] for row in run["comparison"]["rows"]}


def shown(perplexity: float) -> str:
    """Returns a perplexity in four digits."""
    if perplexity > MANY:
        return "over a million"
    return f"{perplexity:.2f}" if perplexity < 100 else f"{perplexity:.1f}"


def front() -> str:
    """Returns the table of README.md: each bit width by the text of its calibration, rounded, calibrated and trained.

    The run at 4 bits was on generated text and trained nothing; what text of the domain gives is in `BUDGET`.
    """
    own = {scheme: run_of(file) for scheme, file in DEMO.items()}
    wikitext = {"int4": own["int4"], "int3": run_of(FEW_BITS["int3-hour"]), "int2": run_of(FEW_BITS["int2-hour"])}
    full = next(row for row in own["int4"]["comparison"]["rows"] if row["role"] == "full precision")
    size = f"{full['bytes_on_disk'] / 1e6:.0f}"
    rows = [["full precision", "16", size, "", shown(perplexities(own["int4"])[full["name"]]), "", ""]]
    by_tokens = means("perplexity")["int4"]
    most = max(by_tokens)
    for scheme, on_wikitext in wikitext.items():
        stored = on_wikitext["checkpoint"]
        head = [f"`{scheme}`", f"{stored['bits_per_weight']:.2f}", f"{stored['weight_bytes'] / 1e6:.0f}"]
        if scheme in own:
            rows.append([*head, "generated", *_three(perplexities(own[scheme]), own[scheme]["training"])])
        found, training = perplexities(on_wikitext), on_wikitext["training"]
        if scheme == "int4":
            found = {**found, "calibrated": by_tokens[0], "trained": by_tokens[most]}
            training = {"tokens": most}
        rows.append([*head, "WikiText-2", *_three(found, training)])
    heads = ("scheme", "bits per weight", "size, MB", "text", "plain rounding", "calibrated", "and trained")
    return markdown_table(heads, rows)


def _three(found: Mapping[str, float], training: Mapping[str, Any] | None) -> list[str]:
    """Returns perplexities rounded, calibrated and trained; the last with its tokens, where anything was trained."""
    cells = [shown(found[name]) for name in ("plain rounding", "calibrated")]
    if not training:
        return [*cells, "not trained"]
    thousands = training["tokens"] // 1000
    amount = f"{thousands / 1000:.0f} M" if thousands >= 1000 else f"{thousands} k"
    return [*cells, f"{shown(found['trained'])} ({amount} tokens)"]


def means(figure: str) -> dict[str, dict[int, float]]:
    """Returns scheme -> tokens of training on `DOMAIN` -> a figure on WikiText-2 test; a mean of seeds."""
    seeds: dict[tuple[str, int], list[float]] = {}
    for row in run_of(BUDGET)["rows"]:
        if row["text"] == DOMAIN:
            seeds.setdefault((row["scheme"], row["asked_tokens"]), []).append(row["texts"]["test"][figure])
    found: dict[str, dict[int, float]] = {}
    for (scheme, tokens), values in seeds.items():
        found.setdefault(scheme, {})[tokens] = mean(values)
    return found


def by_scheme() -> str:
    """Returns the table of the guide `choose`."""
    runs = [
        *((scheme, "generated by the model", run_of(file)) for scheme, file in DEMO.items()),
        *((key[:4], "WikiText-2 validation", run_of(file)) for key, file in FEW_BITS.items()),
    ]
    rows = []
    for scheme, text, run in runs:
        found = {name: shown(value) for name, value in perplexities(run).items()}
        trained = f"{found['trained']} ({run['training']['steps']} steps)" if run["training"] else "not trained"
        rows.append([f"`{scheme}`", text, found["plain rounding"], found["calibrated"], trained])
    heads = ("scheme", "text for calibration and training", "plain rounding", "calibrated", "trained")
    return markdown_table(heads, rows)


def formats() -> str:
    """Returns the table of float formats and zeros in the guide `choose`: KL rounded, calibrated and trained."""
    found = sorted(
        (row for file in FORMATS for row in run_of(file)["rows"]), key=lambda row: float(row["trained"]["kl"])
    )
    rows = [
        [
            f"`{row['scheme']}`",
            f"{row['bits_per_weight']:.2f}",
            *(f"{row[role]['kl']:.3f}" for role in ("plain rounding", "training-free", "trained")),
            f"{row['trained']['top1']:.1%}",
        ]
        for row in found
    ]
    heads = ("scheme", "bits per weight", "plain rounding", "calibrated", "and trained", "top-1")
    return markdown_table(heads, rows)


def by_tokens() -> str:
    """Returns KL on WikiText-2 test by tokens of training, of all schemes."""
    found = means("kl")
    tokens = sorted({one for cells in found.values() for one in cells})
    heads = ["scheme", *(f"{one // 1000:,} k tokens" if one else "0" for one in tokens)]
    rows = [
        [f"`{scheme}`", *(f"{found[scheme][one]:.3g}" if one in found[scheme] else "" for one in tokens)]
        for scheme in sorted(found, reverse=True)
    ]
    return markdown_table(heads, rows)


def finetuning() -> str:
    """Returns what ways to a fine-tuned model keep of what LoRA in bfloat16 gained, and their minutes."""
    found = {scheme: ways for name in FINETUNING for scheme, ways in run_of(name)["summary"].items()}
    rows = []
    for way, label in WAYS.items():
        if not any(way in ways for ways in found.values()):
            continue
        row = [label]
        for ways in found.values():
            if way not in ways:
                row += ["", ""]
                continue
            share = f"{ways[way]['kept']:.0%}" if ways[way]["kept"] > 0 else "less than none"
            taken = ways[way]["minutes"]
            row += [share, "another processor" if taken is None else f"{taken:.0f}"]
        rows.append(row)
    return markdown_table(("way", *(head for one in found for head in (f"`{one}` keeps", "minutes"))), rows)


def ledger() -> str:
    """Returns the table of all results: files, the command that made them, its commit and date where they tell."""
    rows = []
    for stem in sorted({file.stem for file in RESULTS.iterdir()}):
        files = sorted(RESULTS.glob(f"{stem}.*"))
        heads = [_head(file) for file in files if file.suffix != ".png"]
        made = {name: value for head in reversed(heads) for name, value in head.items()}
        links = ", ".join(f"[{file.suffix[1:]}](results/{file.name})" for file in files)
        script = f"eval/{stem.partition('-')[0]}.py"
        known = f"`python {script}`, words not recorded" if (ROOT / script).is_file() else "not recorded"
        command = f"`{made['command']}`" if "command" in made else known
        rows.append([f"`{stem}`: {links}", command, made.get("commit", "not recorded"), made.get("date", "")])
    return markdown_table(("result", "made by", "commit", "date"), rows)


def _head(file: Path) -> dict[str, str]:
    """Returns what the head of a file of results says of its command (script and first words), commit and date."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        found = json.loads(text)
        told = found if isinstance(found, dict) else {}
        facts = {name: str(told[name]) for name in ("command", "commit", "date") if told.get(name)}
    else:
        patterns = {
            "command": r"((?:python eval|make|llmqat) ?[^`\n]*)",
            "commit": r"commit ([0-9a-f]{7,12}\+?)",
            "date": r"(\d{4}-\d\d-\d\d)",
        }
        head = text[:2000]
        facts = {name: one[1] for name, pattern in patterns.items() if (one := re.search(pattern, head))}
    if "command" in facts:
        facts["command"] = re.match(r"(?:python )?\S+(?: (?:train|plan|clients|bounds) ?\S*)?", facts["command"])[0]
    return {name: value[:10] if name == "date" else value for name, value in facts.items()}


def one_gpu(labels: dict[str, str]) -> str:
    """Returns rows of the table "One GPU" of eval/scaling.md under other names."""
    text = (ROOT / "eval" / "scaling.md").read_text(encoding="utf-8")
    section = text.partition("## One GPU\n")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    found = {cells[0]: cells[1:] for cells in lines}
    sizes = [cell.removesuffix(", GB") for cell in found[""]]
    return markdown_table(("peak, GB", *sizes), [[label, *found[name]] for name, label in labels.items()])


IN_README = {
    "GPTQ, a block at a time on the GPU": "GPTQ, one block at a time on the GPU",
    "LoRA, its own teacher": "train LoRA, original weights in bfloat16 (`lora-int4`)",
    "LoRA on the packed model, a teacher's cache": f"train LoRA, original weights in 4 bits ([how]({REPOSITORY}"
    "/llmqat/help/finetune.md))",
    "scales of the packed model, a teacher's cache": "train the scales alone, weights in 4 bits",
    "all weights, a teacher": "train all weights",
}
IN_MEMORY = {
    "block-wise, 256 k tokens, the model on the GPU": "stage `blockwise` alone, 256 k tokens, model on the GPU",
    "block-wise, a block at a time on the GPU": "stage `blockwise` alone, one block at a time on the GPU",
    "GPTQ, a block at a time on the GPU": "stage `gptq`, one block at a time on the GPU",
    "LoRA, its own teacher": "LoRA, the model is its own teacher",
    "LoRA on the packed model, a teacher's cache": "LoRA on a packed model, cached teacher",
    "scales of the packed model, a teacher's cache": "scales of a packed model, cached teacher",
    "scales of the packed model, a teacher": "scales of a packed model, teacher in memory",
    "all weights, a teacher": "all weights, teacher in memory",
}
TABLES: dict[str, Callable[[], str]] = {
    "front": front,
    "by-scheme": by_scheme,
    "formats": formats,
    "by-tokens": by_tokens,
    "fine-tuning": finetuning,
    "ledger": ledger,
    "one-gpu": lambda: one_gpu(IN_README),
    "memory": lambda: one_gpu(IN_MEMORY),
}
"""Marker -> what makes its table."""


if __name__ == "__main__":
    main()
