"""Every causal language model that transformers can build, tiny and random, from `prepare` to a checkpoint.

For each entry of transformers' causal-LM mapping: the share of weights that is quantized; whether each quantizer has an
effect; whether block-wise calibration sees the model's own hidden states, however the text is cut into batches; a
training step; a packed checkpoint with its proof; `llmqat.load`; plain transformers. What is refused is recorded in the
words of the refusal. What is wrong and was not said counts as silent: there should be none.

Each architecture runs in a process of its own. Results are written after each, and a repeated command goes on.

    python eval/architectures.py --json eval/results/architectures.json --table eval/results/architectures.md
    python eval/architectures.py --only llama gemma4_text
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import multiprocessing
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import llmqat
from llmqat.calibrate import open_walk
from llmqat.calibrate.walk import Walk
from llmqat.export import ProofError
from llmqat.layers import CoverageAudit, QuantModule, quantizers_off
from llmqat.layers.probe import probe_inputs
from llmqat.models import cast_parameters
from llmqat.paths import check_outputs, user_path
from llmqat.terminal import plain_console, show_any_text

SECONDS = 600
"""Time that an architecture may take."""
GROUP_SIZE = 16
ROUNDING = 0.001
"""Relative difference of hidden states in float32 that is rounding."""
BFLOAT16_ROUNDING = 0.1
"""Relative difference of logits in bfloat16 that is rounding: `load` multiplies q, k and v as one, and the weights of a
tiny model are made so large that rounding is."""
LEAST_QUANTIZED = 0.5
"""Share of the weights outside of embeddings and head below which a note must say what was left alone."""

VOCABULARY = 384
_NAMES = {
    64: "hidden_size d_model n_embd embedding_size dim embed_dim emb_dim word_embed_proj_dim hidden_dim "
    "encoder_hidden_dim hidden_size_global",
    128: "intermediate_size ffn_dim d_ff n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim d_inner dff "
    "intermediate_size_mlp dense_intermediate_size feed_forward_size mamba_d_ssm",
    96: "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size shared_experts_intermediate_size",
    2: "num_hidden_layers n_layer num_layers decoder_layers encoder_layers n_layers num_encoder_layers "
    "num_decoder_layers num_experts_per_tok num_experts_per_token moe_topk moe_k top_k_experts num_key_value_heads "
    "num_kv_heads n_kv_heads num_nextn_predict_layers",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts index_n_heads index_topk",
    16: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim state_size ssm_state_size mamba_d_state mamba_headdim "
    "mamba_d_head mamba_head_dim global_head_dim kv_channels attention_head_dim d_kv sliding_window time_step_rank "
    "hidden_size_per_layer_input",
    32: "q_lora_rank kv_lora_rank index_head_dim image_size linear_key_head_dim linear_value_head_dim",
    256: "max_position_embeddings n_positions max_target_positions max_source_positions max_seq_len "
    "max_sequence_length",
    8: "num_mel_bins patch_size rotary_dim mamba_n_heads mamba_num_heads n_mamba_heads laurel_rank",
    1: "n_group topk_group n_groups first_k_dense_replace bos_token_id",
    VOCABULARY: "vocab_size vocab_size_per_layer_input pronunciation_vocab_size shape_vocab_size",
}
SHAPE = {name: size for size, names in _NAMES.items() for name in names.split()}
"""Field of a configuration -> its value in a tiny model, where the architecture has such a field."""

LATENT = (
    *("axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
    *("hy_v4", "kimi_linear", "longcat_flash", "minicpm3", "youtu"),
)
"""Architectures with multi-head latent attention, whose keys and values have as many heads as the queries."""
SHARED = {
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
}
HYBRID = {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2}
LEFT_OUT = object()
"""Instead of a value: the field is left as it is."""
CHANGES: dict[str, dict[str, Any]] = {
    **{model_type: {"num_key_value_heads": 4} for model_type in LATENT},
    **{model_type: {"head_dim": 16} for model_type in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    **{model_type: {**SHARED, "global_head_dim": 16} for model_type in ("gemma4_text", "gemma4_unified_text")},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "cpmant": {"prompt_length": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_key_value_heads": 4, "num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}},
    "doge": {"keep_window_size": 8},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "falcon": {"head_dim": LEFT_OUT},
    "gemma3n_text": {**SHARED, "activation_sparsity_pattern": [0.0] * 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "prophetnet": {"num_hidden_layers": LEFT_OUT},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xlnet": {"max_position_embeddings": LEFT_OUT},
    "xlstm": {"v_head_dim": LEFT_OUT},
    "xmod": {"default_language": "en_XX"},
    "zamba": HYBRID,
    "zamba2": {**HYBRID, "hybrid_layer_ids": [1, 3]},
    "zaya": {"num_experts_per_tok": 1},
}
"""Architecture -> fields that `SHAPE` does not get right."""

COLUMNS = (
    "model type",
    "quantized",
    "quantizers",
    "walk",
    "training",
    "saved",
    "llmqat.load",
    "transformers",
    "silent",
)
_REFUSALS = (ValueError, OSError, ImportError)


def main() -> None:
    """Examines what is missing, writes after each, prints the table, then the headline."""
    show_any_text()
    options = parse_options()
    check_outputs({"--json": options.json, "--table": options.table})
    versions = {"llmqat": llmqat.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    known = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.is_file() else {}
    if known and known["versions"] != versions:
        raise SystemExit(f"{options.json} holds results of {known['versions']}; remove it, or give another file")
    rows: dict[str, dict[str, Any]] = known.get("rows", {})
    console = plain_console(width=200)
    for model_type in options.only or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        if model_type in rows and not options.only:
            continue
        rows[model_type] = alone(model_type)
        console.print(" | ".join(shown(model_type, rows[model_type])), markup=False, highlight=False)
        if options.json:
            _write(
                options.json, json.dumps({"versions": versions, "rows": dict(sorted(rows.items()))}, indent=1) + "\n"
            )
    if options.table:
        _write(options.table, markdown(rows, versions))
    table = Table(*COLUMNS)
    for model_type, row in sorted(rows.items()):
        table.add_row(*shown(model_type, row))
    console.print(table)
    for name, number in headline(rows).items():
        print(f"{name}: {number}")


def parse_options() -> argparse.Namespace:
    """Returns the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    parser.add_argument("--only", nargs="+", choices=known, metavar="TYPE", help="model types; all where not given")
    parser.add_argument("--json", type=user_path, help="file for the results; a file that is there is gone on with")
    parser.add_argument("--table", type=user_path, help="Markdown file for the table")
    return parser.parse_args()


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


# One architecture


def alone(model_type: str) -> dict[str, Any]:
    """Returns what `examined` does in a process of its own; a crash or a time-out is a result too."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llmqat", "llmqat.calibrate", "llmqat.export", "llmqat.train", "peft"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(model_type, sender))
    process.start()
    sender.close()
    try:
        found: dict[str, Any] = receiver.recv() if receiver.poll(SECONDS) else {"crash": f"over {SECONDS} s"}
    except EOFError:
        process.join()
        found = {"crash": f"the process ended with {process.exitcode}"}
    process.kill()
    process.join()
    return found


def _child(model_type: str, sender: Any) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="llmqat-") as folder:
        sender.send(examined(model_type, Path(folder)))
    sender.close()


def examined(model_type: str, folder: Path) -> dict[str, Any]:
    """Returns what an architecture does at each step; `silent` lists what is wrong and was not said.

    Args:
        model_type: an entry of transformers' causal-LM mapping.
        folder: an empty folder for checkpoints.
    """
    row: dict[str, Any] = {"silent": []}
    try:
        model = tiny(model_type)
        inputs = probe_inputs(model, rows=4, length=24)
        with torch.no_grad():
            model(**inputs, use_cache=False)
    except Exception as error:  # transformers' own affair, whatever it is
        return {**row, "not built": _words(error)}
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    teacher = copy.deepcopy(model)
    try:
        audit = llmqat.prepare(model, llmqat.QuantConfig.preset("int4", group_size=GROUP_SIZE))
    except _REFUSALS as error:
        return {**row, "refused": _words(error)}
    row |= coverage(model, audit)
    row |= effects(model, inputs)
    row["walk"] = walked(model)
    row["training"] = _step(lambda: trained(model, teacher, inputs, folder / "trainer"))
    if not row["training"].startswith("refused"):
        row |= packed(model.eval(), inputs, folder / "packed")
    row["silent"] = silent(row)
    return row


def tiny(model_type: str) -> PreTrainedModel:
    """Returns a random model of a type in float32, with weights that its outputs depend on visibly, and none zero."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(tiny_config(model_type))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
            elif parameter.dim() >= 2:
                parameter.mul_(4)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def tiny_config(model_type: str) -> Any:
    """Returns a configuration of a type with small sizes, nested ones included."""
    known = AutoConfig.for_model(model_type)
    fields = _tiny_fields(known)
    for name in getattr(type(known), "sub_configs", None) or {}:
        inner = _value(known, name)
        if hasattr(inner, "to_dict"):
            changes = CHANGES.get(inner.model_type, {})
            fields[name] = _without_left_out({**_tiny_fields(inner), **changes}) | {"model_type": inner.model_type}
    return AutoConfig.for_model(model_type, **_without_left_out({**fields, **CHANGES.get(model_type, {})}))


def _tiny_fields(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        name: size for name, size in SHAPE.items() if type(_value(config, name)) is int and name != "model_type"
    }
    for name in dir(config):
        if name.endswith("_token_id") and name not in found:
            value = _value(config, name)
            if isinstance(value, list) or (isinstance(value, int) and value >= VOCABULARY):
                found[name] = [1] if isinstance(value, list) else 1
    return found


def _value(config: Any, name: str) -> Any:
    """Returns a field of a configuration; None where it has none, or one for each layer."""
    try:
        return getattr(config, name, None)
    except Exception:  # asking may raise anything
        return None


def _without_left_out(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not LEFT_OUT}


# Steps


def coverage(model: PreTrainedModel, audit: CoverageAudit) -> dict[str, Any]:
    """Returns the share of weights that is quantized, embeddings and output head aside, and the audit's notes."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    ends = {id(end.weight) for end in (*embeddings, model.get_output_embeddings()) if end is not None}
    apart = {name for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in ends}
    kept = sum(entry.numel for entry in audit.kept if len(entry.shape) > 1 and entry.name not in apart)
    quantized = sum(entry.numel for entry in audit.quantized)
    return {"quantized": quantized / max(kept + quantized, 1), "notes": list(audit.notes)}


@torch.no_grad()
def effects(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns how many quantizers there are, and which of them change nothing, or never run, in a forward."""
    ran: set[nn.Module] = set()
    hook = register_module_forward_pre_hook(lambda module, _: ran.add(module))
    try:
        wanted = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    idle, unreached = [], []
    quantizers = {name: module for name, module in model.named_modules() if isinstance(module, QuantModule)}
    for name, module in quantizers.items():
        with quantizers_off(module):
            changed = not torch.equal(model(**inputs, use_cache=False).logits, wanted)
        if not changed:
            (idle if module in ran else unreached).append(name)
    return {"quantizers": len(quantizers), "without effect": idle, "never run": unreached}


@torch.no_grad()
def walked(model: PreTrainedModel) -> str:
    """Returns whether a walk block by block ends with the hidden states of the model's own forward, for each batch.

    Both chains are compared, in float32, on a whole batch and on what is left over.
    """
    ids = probe_inputs(model, rows=6, length=24, seed=3)["input_ids"]
    worst = 0.0
    try:
        with open_walk(model, ids, batch_size=4, dtype=torch.float32) as walk:
            for block in walk.blocks:
                block.run_full(walk.full, walk.full)
                block.run(walk.quantized, walk.quantized)
            for rows in (slice(0, 4), slice(4, 6)):
                worst = max(worst, _difference(walk.quantized[rows], _last_output(model, walk, ids[rows])))
                with quantizers_off(model):
                    worst = max(worst, _difference(walk.full[rows], _last_output(model, walk, ids[rows])))
    except _REFUSALS as error:
        return f"refused: {_words(error)}"
    except Exception as error:
        return f"crash: {_words(error)}"
    return "equal" if worst < ROUNDING else f"DIFFERS by {worst:.2g}"


def _last_output(model: PreTrainedModel, walk: Walk, ids: Tensor) -> Tensor:
    seen: list[Any] = []
    hook = walk.blocks[-1].module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        hook.remove()
    output = seen[-1]
    return output if isinstance(output, Tensor) else output[0]


def _difference(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def trained(model: PreTrainedModel, teacher: PreTrainedModel, inputs: Mapping[str, Tensor], folder: Path) -> str:
    """Trains a step, in place; returns which quantizers it did not move."""
    before = {
        name: (module.weight.detach().clone(), module)
        for name, module in model.named_modules()
        if isinstance(module, QuantModule)
    }
    arguments = llmqat.QATArguments(
        output_dir=str(folder),
        max_steps=1,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=1,
    )
    rows = [{"input_ids": ids, "labels": ids} for ids in inputs["input_ids"]]
    llmqat.QATTrainer(model=model, teacher=teacher, args=arguments, train_dataset=rows).train()
    still = [name for name, (weight, module) in before.items() if torch.equal(module.weight, weight)]
    return f"{len(before) - len(still)} of {len(before)} moved"


def packed(model: PreTrainedModel, inputs: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """Returns whether the model is saved with its proof, and read as it was by llmqat and by transformers."""
    row: dict[str, Any] = {}
    try:
        report = llmqat.save(model, folder)
    except (*_REFUSALS, ProofError) as error:
        return {"saved": f"refused: {_words(error)}"}
    except Exception as error:
        return {"saved": f"crash: {_words(error)}"}
    row["saved"], row["said"] = "proved", [note for note in report.notes if "transformers" in note]
    loader = report.stock.loader
    with torch.no_grad(), cast_parameters(model, torch.bfloat16):
        wanted = model(**inputs, use_cache=False).logits.float()
    row["loaded"] = _step(lambda: _compared(llmqat.load(folder, kernel="reference"), inputs, wanted))
    row["stock"] = _step(lambda: _stock(loader, folder, inputs, wanted))
    return row


def _stock(loader: str, folder: Path, inputs: Mapping[str, Tensor], wanted: Tensor) -> str:
    """Returns what the class of transformers that `save` has named makes of a checkpoint."""
    kind = getattr(transformers, loader)
    model, found = kind.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    if found["missing_keys"]:
        return f"{len(found['missing_keys'])} tensors random: {sorted(found['missing_keys'])[0]}"
    return _compared(model.eval(), inputs, wanted)


@torch.no_grad()
def _compared(model: PreTrainedModel, inputs: Mapping[str, Tensor], wanted: Tensor) -> str:
    found = model(**inputs, use_cache=False).logits.float()
    if torch.equal(found, wanted):
        return "equal"
    difference = _difference(found, wanted)
    return f"within {difference:.1g}" if difference < BFLOAT16_ROUNDING else f"DIFFERS by {difference:.2g}"


def _step(action: Callable[[], str]) -> str:
    try:
        return action()
    except _REFUSALS as error:
        return f"refused: {_words(error)}"
    except Exception as error:
        return f"crash: {_words(error)}"


def _words(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


# What it comes to


def silent(row: Mapping[str, Any]) -> list[str]:
    """Returns what is wrong with an architecture that nothing has said."""
    found = []
    idle = row["without effect"] + [name for name in row["never run"] if "expert" not in name]
    if idle:
        found.append(f"quantizers without effect: {', '.join(idle[:3])}")
    if row["quantized"] < LEAST_QUANTIZED and not row["notes"]:
        found.append(f"{row['quantized']:.0%} of weights quantized, and no note")
    if "DIFFERS" in row["walk"]:
        found.append(f"calibration sees other hidden states: {row['walk']}")
    if "DIFFERS" in row.get("loaded", ""):
        found.append(f"llmqat.load {row['loaded']}")
    stock = row.get("stock", "equal")
    if not stock.startswith(("equal", "within")) and not row["said"]:
        found.append(f"transformers: {stock}")
    return found


def headline(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """Returns the counts that the table comes to."""
    counts: Counter[str] = Counter()
    for row in rows.values():
        counts["entries"] += 1
        counts["built and run"] += "parameters" in row
        counts["refused before training"] += is_refused(row)
        counts["saved and reloaded equal"] += row.get("loaded", "").startswith(("equal", "within"))
        counts["equal in plain transformers"] += row.get("stock", "").startswith(("equal", "within"))
        counts["crashed"] += is_crashed(row)
        counts["silent"] += bool(row.get("silent"))
    return dict(counts)


def is_refused(row: Mapping[str, Any]) -> bool:
    """Returns whether an architecture was refused before anything was trained."""
    return "refused" in row or str(row.get("training", "")).startswith("refused")


def is_crashed(row: Mapping[str, Any]) -> bool:
    """Returns whether a step ended with an error that is no refusal, or `save` refused what was trained."""
    steps = (str(row.get(step, "")) for step in ("walk", "training", "saved", "loaded"))
    return "crash" in row or any(step.startswith("crash") for step in steps) or is_lost(row)


def is_lost(row: Mapping[str, Any]) -> bool:
    """Returns whether a model was trained and could not be saved."""
    return str(row.get("saved", "")).startswith("refused")


def shown(model_type: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns a row of the table."""
    for key in ("not built", "refused", "crash"):
        if key in row:
            return (model_type, f"{key}: {row[key]}", *[""] * (len(COLUMNS) - 2))
    reached = row["quantizers"] - len(row["never run"])
    return (
        model_type,
        f"{row['quantized']:.0%}",
        f"{reached - len(row['without effect'])} of {row['quantizers']}",
        row["walk"],
        row["training"],
        row.get("saved", ""),
        row.get("loaded", ""),
        row.get("stock", "") + (" (said)" if row.get("said") else ""),
        "; ".join(row["silent"]),
    )


def markdown(rows: Mapping[str, Mapping[str, Any]], versions: Mapping[str, str]) -> str:
    """Returns the table as Markdown, headline first."""
    lines = [
        "# Architectures",
        "",
        f"`python eval/architectures.py`, {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        *(f"- {name}: {number}" for name, number in headline(rows).items()),
        "",
        f"| {' | '.join(COLUMNS)} |",
        "|" + "---|" * len(COLUMNS),
    ]
    lines += [
        f"| {' | '.join(cell.replace('|', '/') for cell in shown(name, row))} |" for name, row in sorted(rows.items())
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
