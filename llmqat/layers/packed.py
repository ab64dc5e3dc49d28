"""PackedModule: a weight held as packed codes, integers or floats. PackedLinear runs on the kernel that fits.

The scales of a packed weight can be trained while its codes stay (EfficientQAT's end-to-end phase). `train_scales` adds
a log-scale, and gradients go through the dequantization. No full-precision weight is kept: the backward pass
dequantizes the codes again.

LoRA adapters can be trained inside the quantizer of a packed weight, too (lora.py). What is quantized then is the
dequantized weight plus what the adapters add, so codes change. To fold the adapters is to put the new codes in place.

The buffers have the names, shapes and dtypes of compressed-tensors' `pack-quantized` files, so a checkpoint loads into
them by name. Two kinds of file have no int32 words: `int-quantized` has int8 codes, and floats have bytes. Both are
held in `weight_packed` as they are, with scales in the checkpoint's dtype, or in float32 (export/forms.py).

Source: EfficientQAT (2407.11062) section 3.3; for adapters LR-QAT (2406.06385) section 3.
Letters: O rows, I in features, G scales per row, b bits.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmqat.grid import (
    Grid,
    fake_quantize,
    gradient_factor,
    of_all_rows,
    pack_codes,
    pack_int32,
    packed_shape,
    quantize,
    scale_from_log,
    snap_scale,
    stored_codes,
    unpack_int32,
)
from llmqat.kernels import FileMappings, FilePages, PackedWeight, QuantizedInput, packed_linear
from llmqat.layers.activation import ActivationQuantizer
from llmqat.layers.config import ActivationConfig, WeightConfig
from llmqat.layers.kept import dtypes_kept
from llmqat.layers.linear import QuantLinear
from llmqat.layers.quantized import Adapter, QuantModule, compute_dtype

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from llmqat.layers.shared import SharedProduct

FEW_ROWS = 8
"""So few rows are faster on the kernels that read packed weights than on dequantized ones."""


@torch.no_grad()
def check_cast(scale: Tensor, dtype: torch.dtype, where: str = "the model") -> None:
    """Raises ValueError where scales would become zero or infinite in `dtype`; logs where they lose more than digits.

    float16 has fewer exponents than bfloat16 and float32: from 6e-5 on down it loses digits, below 6e-8 all of them.
    """
    if scale.is_meta or dtype != torch.float16 or scale.dtype == dtype or not scale.is_floating_point():
        return
    cast, wide = scale.to(dtype).float(), scale.float()
    if bool((~torch.isfinite(cast) | (cast == 0) & (wide != 0)).any()):
        raise ValueError(
            f"{where} has scales from {float(wide.abs().min()):.3g} to {float(wide.abs().max()):.3g}, which float16 "
            "does not hold; use bfloat16 or float32"
        )
    if bool(((cast - wide).abs() > torch.finfo(dtype).eps * wide.abs()).any()):
        _warn_of_float16()


@functools.cache
def _warn_of_float16() -> None:
    log.warning("scales below 6e-5 lose digits in float16, so the model is another one; use bfloat16 or float32")


def version_of(x: Tensor) -> int | None:
    """Returns what counts the changes of a tensor; an inference tensor does not tell, nor does one being traced."""
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


class PackedModule(nn.Module):
    """A matrix [O, I] of packed codes.

    Attributes:
        weight_packed: as `grid.pack_codes` gives it, for integers [O, ceil(I * b / 32)] int32; or [O, I] int8
            (`hold_int8`), codes of 8 bits as they are.
        weight_scale: [O, G], the checkpoint's dtype; float32 where that does not hold them (`hold_float32_scales`).
        weight_zero_point: [ceil(O * b / 32), G] int32, packed along O; None when symmetric.
        weight_shape: [2] int64, (O, I).
        dtype: the checkpoint's, of what is dequantized.
        global_scale: weight_global_scale of the file that an NVFP4 weight was read from, where its scales need it.
        weights: the scheme on disk (`WeightConfig.stored`).
        label: the scheme for tables; the trained one's where it is known.
        log_scale: [O, G] float32 parameter while scales are trained, [ceil(O / g), G] for blocks; else None.
        adapters: what adds LoRA to the dequantized weight inside its quantizer, or nothing.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_shape: Tensor
    log_scale: Tensor | None

    def __init__(
        self,
        rows: int,
        columns: int,
        weights: WeightConfig,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        name: str = "",
    ) -> None:
        """Makes an empty matrix, to be filled by `load_state_dict` or `take_codes`.

        Raises:
            ValueError: when the group size does not divide I, or the scheme is not one that is stored.
        """
        super().__init__()
        if weights != weights.stored:
            raise ValueError(f"{weights.label} is not packed as it is; use its stored form, {weights.stored.label}")
        self.rows, self.columns, self.weights, self.label = rows, columns, weights, weights.label
        bits = weights.num_bits
        shape = weights.scale_shape(rows, columns, name or "the layer")

        def empty(*size: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(*size, dtype=dtype, device=device)

        words, kind = packed_shape(rows, columns, self.grid)
        self.register_buffer("weight_packed", empty(*words, dtype=kind))
        self.register_buffer("weight_scale", empty(*shape, dtype=dtype))
        zeros = None if weights.symmetric else empty(-(-shape[0] * bits // 32), shape[1], dtype=torch.int32)
        self.register_buffer("weight_zero_point", zeros)
        self.register_buffer("weight_shape", empty(2, dtype=torch.int64))
        self.register_parameter("log_scale", None)
        self._runtime: PackedWeight | None = None
        self._versions: tuple[int | None, int | None] | None = None
        self._pages: FilePages | None = None
        self._dtype: torch.dtype | None = None
        self.global_scale: float | None = None
        self.adapters: tuple[Adapter, ...] = ()  # in a tuple no module of theirs becomes one of this module's

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the checkpoint, and of the weights that layers around this one have."""
        return self._dtype or self.weight_scale.dtype

    @property
    def has_float32_scales(self) -> bool:
        """Whether scales are float32 because the dtype of the checkpoint does not hold them."""
        return self._dtype is not None

    def hold_float32_scales(self, global_scale: float | None) -> None:
        """Makes room for scales that the dtype of the model does not hold; they stay float32 when it is cast."""
        self._dtype, self.global_scale = self.dtype, global_scale
        self.weight_scale = torch.empty_like(self.weight_scale, dtype=torch.float32)

    def hold_int8(self) -> None:
        """Makes room for int8 codes that are not packed, in the place of the words of an empty matrix of 8 bits."""
        empty = torch.empty(self.rows, self.columns, dtype=torch.int8, device=self.weight_packed.device)
        self.weight_packed = empty

    def mapped_by(self, mappings: FileMappings) -> None:
        """Notes which file pages codes and scales are mapped from; kernels release them after reading."""
        self._pages = mappings.pages_of(self.weight_packed, self.weight_scale)

    @torch.no_grad()
    def take_codes(self, layer: QuantModule, dtype: torch.dtype) -> None:
        """Fills the buffers with the codes of `layer`; its scales are stored in `dtype`."""
        codes, grid, factor = stored_codes(layer.codes(), layer.grid)
        scale, zero_point = layer.scale_and_zero_point()
        shape = (self.rows, self.weight_scale.shape[1])
        self.weight_packed = pack_codes(codes, grid)
        self.weight_scale = (scale * factor).to(dtype).expand(shape).contiguous()
        self.weight_shape = torch.tensor([self.rows, self.columns], dtype=torch.int64)
        if zero_point is not None:
            zeros = zero_point.expand(shape).t().to(torch.int64)
            self.weight_zero_point = pack_int32(zeros, grid).t().contiguous()
        self.label = layer.weights.label

    @property
    def grid(self) -> Grid:
        """The code range."""
        return self.weights.grid

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, made anew each time: for models that look at a layer's weight or its dtype."""
        return self.dequantized_weight(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        self._runtime = None  # moved or cast buffers: what kernels derived from the old ones is stale
        before = self.weight_scale
        kept = ("weight_packed", "weight_scale") if self.has_float32_scales else ("weight_packed",)
        with dtypes_kept(self, kept):
            found: PackedModule = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._dtype is not None:
            self._dtype = fn(torch.empty(0, dtype=self._dtype, device=before.device)).dtype
        check_cast(before, self.dtype)
        return found

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **options: Any) -> None:
        self._runtime = None
        scale = state_dict.get(f"{prefix}weight_scale")
        is_known = scale is not None and self.grid.levels == "float" and not scale.is_meta
        if is_known and not torch.equal(scale.to(self.dtype).float(), scale.float()):
            self.hold_float32_scales(None)
        super()._load_from_state_dict(state_dict, prefix, *args, **options)

    def packed_weight(self) -> PackedWeight:
        """Returns the weight as kernels take it; rebuilt when the buffers were loaded, moved or replaced."""
        runtime = self._runtime
        if runtime is None or not self.is_current():
            zero_point = None
            if self.weight_zero_point is not None:
                zero_point = unpack_int32(self.weight_zero_point.t().contiguous(), self.grid, self.rows).t()
            runtime = PackedWeight(self.weight_packed, self.weight_scale, zero_point, self.grid, self.columns)
            if self._pages is not None and self._pages.tensors[0] is self.weight_packed:
                runtime.release = self._pages
            versions = version_of(self.weight_packed), version_of(self.weight_scale)
            self._runtime, self._versions = runtime, None if None in versions else versions
        return runtime

    def is_current(self) -> bool:
        """Returns whether codes and scales are those that kernels were given, not replaced or changed since."""
        # Buffers are looked up where modules keep them: this is asked for every token.
        runtime, buffers = self._runtime, self._buffers
        packed, scale = buffers["weight_packed"], buffers["weight_scale"]
        if runtime is None or runtime.packed is not packed or runtime.scale is not scale:
            return False
        if self._versions is None or torch.compiler.is_compiling():
            return True
        return self._versions == (packed._version, scale._version)

    def check_scales_train(self) -> None:
        """Raises ValueError for scales that bfloat16 does not hold: trained ones are kept on its grid."""
        if not torch.equal(snap_scale(self.weight_scale.float(), self.grid), self.weight_scale.float()):
            raise ValueError(
                f"scales of {self.weight_scale.dtype} that bfloat16 does not hold cannot be trained further"
            )

    def train_scales(self) -> None:
        """Makes the scales trainable, from where they are.

        Raises:
            ValueError: for scales that bfloat16 does not hold.
        """
        self.check_scales_train()
        if self.log_scale is None:
            self.log_scale = nn.Parameter(torch.zeros_like(self._of_blocks(), dtype=torch.float32))
        self.log_scale.requires_grad_(True)

    @torch.no_grad()
    def fold_scales(self) -> None:
        """Puts trained scales in the place of the old ones: what the forward computes stays the same."""
        if self.log_scale is not None:
            self.weight_scale = self.scale().to(self.weight_scale.dtype)
            self.log_scale, self._runtime, self.global_scale = None, None, None

    def scale(self) -> Tensor:
        """Returns the scale [O, G] of the forward in float32, differentiable in log_scale."""
        if self.log_scale is None:
            return self.weight_scale.float()
        factor = gradient_factor(self.rows * self.columns // self.log_scale.numel(), self.grid)
        scale = scale_from_log(self._of_blocks().float(), self.log_scale, factor, self.grid)
        return of_all_rows(scale, self.weights.block, self.rows)

    def _of_blocks(self) -> Tensor:
        """Returns a view of the scales with each once: those of the first row where the rows of a block share them."""
        return self.weight_scale[:: self.weights.block]

    def dequantized_weight(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight in `dtype`, bit-equal to QuantModule.quantized_weight; differentiable in what trains."""
        adapters = [adapter for adapter in self.adapters if not adapter.is_folded()]
        if adapters:
            base = self.base()
            for adapter in adapters:
                base = adapter.adapted(base)
            return fake_quantize(self._as_rows(base), self.scale(), self._zero_point(), self.grid, dtype)
        if self.log_scale is None:
            return self.packed_weight().dequantized(dtype)
        weight: Tensor = _Dequantize.apply(self.scale(), self.packed_weight(), dtype)  # type: ignore[no-untyped-call]
        return weight

    @torch.no_grad()
    def base(self) -> Tensor:
        """Returns the weight that adapters are added to, in float32 and the layout of the layer: codes times scales."""
        return self.packed_weight().dequantized(torch.float32)

    @torch.no_grad()
    def put_base(self, weight: Tensor) -> Tensor:
        """Puts codes of `weight` in place, float32 in the layout of the layer; returns `weight_packed` before that."""
        before = self.weight_packed
        codes = quantize(self._as_rows(weight), self.scale(), self._zero_point(), self.grid)
        self.weight_packed = codes.to(torch.int8) if before.dtype == torch.int8 else pack_codes(codes, self.grid)
        return before

    def put_back(self, before: Tensor) -> None:
        """Undoes `put_base`, which returned `before`."""
        self.weight_packed = before

    @torch.no_grad()
    def levels(self) -> Tensor:
        """Returns the codes [O, I] as the numbers that scales multiply, in float32."""
        return _levels(self.packed_weight())

    def _as_rows(self, weight: Tensor) -> Tensor:
        """Returns a weight in the layout of the layer as [O, I]."""
        return weight

    def _zero_point(self) -> Tensor | None:
        """Returns the zero point [O, G] in float32, or None."""
        zero_point = self.packed_weight().zero_point
        return None if zero_point is None else zero_point.float()

    def product(self, x: Tensor | QuantizedInput, bias: Tensor | None, kernel: str) -> Tensor:
        """Returns x [*, I] @ ŵ.T + bias, [*, O], in x's dtype."""
        codes = x.codes if isinstance(x, QuantizedInput) else x
        if (kept := self.kept_for(codes)) is not None and kept.dtype == (values := _values(x)).dtype:
            return F.linear(values, kept, bias)
        if self.adapters:
            return F.linear(_values(x), self.dequantized_weight(_values(x).dtype), bias)
        if self.log_scale is None:
            return packed_linear(x, self.packed_weight(), bias, kernel)
        output: Tensor = _Product.apply(_values(x), self.scale(), bias, self.packed_weight())  # type: ignore[no-untyped-call]
        return output

    def kept_for(self, x: Tensor) -> Tensor | None:
        """Returns the dequantized weight [O, I] where it is kept and is faster for `x` [*, I], else None."""
        weight = self._runtime
        if weight is None or weight.kept is None or x.numel() <= FEW_ROWS * self.columns or self.adapters:
            return None
        return weight.kept if self.log_scale is None and weight.packed is self.weight_packed else None

    def extra_repr(self) -> str:
        """Returns the line that print(model) shows."""
        return f"{self.rows}×{self.columns}, weights={self.label}"


def _values(x: Tensor | QuantizedInput) -> Tensor:
    return x.values() if isinstance(x, QuantizedInput) else x


@contextmanager
def dequantized_once(model: nn.Module, most_bytes: int) -> Iterator[None]:
    """Inside, packed layers of `model` keep their dequantized weights, where all together take at most `most_bytes`.

    For many products with some dozens of rows each, such as decoding in a large batch: there a kernel spends more time
    on dequantizing than on multiplying. Weights must not change inside.
    """
    wanted = sum(map(_dequantized_bytes, _unchanging(model)))
    kept = keep_dequantized(model, most_bytes) if wanted <= most_bytes else []
    try:
        yield
    finally:
        for weight in kept:
            weight.kept = None


@torch.no_grad()
def keep_dequantized(model: nn.Module, most_bytes: int) -> list[PackedWeight]:
    """Keeps the dequantized weights of packed layers beside the packed ones, as many as take at most `most_bytes`.

    They are used for more than `FEW_ROWS` rows. A layer that is changed, moved or cast afterwards keeps none.

    Returns:
        Those that are kept now and were not before, in the order of the layers.
    """
    kept = []
    for module in _unchanging(model):
        weight, size = module.packed_weight(), _dequantized_bytes(module)
        if weight.kept is None and size <= most_bytes:
            weight.kept = module.dequantized_weight(module.dtype)
            weight.read()
            kept.append(weight)
            most_bytes -= size
    return kept


def _unchanging(model: nn.Module) -> list[PackedModule]:
    """Returns the packed modules in which nothing is trained."""
    found = [module for module in model.modules() if isinstance(module, PackedModule)]
    return [module for module in found if module.log_scale is None and not module.adapters]


def _dequantized_bytes(module: PackedModule) -> int:
    return module.rows * module.columns * module.dtype.itemsize


def _with_scale(weight: PackedWeight, scale: Tensor) -> PackedWeight:
    return PackedWeight(weight.packed, scale.detach(), weight.zero_point, weight.grid, weight.in_features)


def _levels(weight: PackedWeight) -> Tensor:
    return _with_scale(weight, torch.ones_like(weight.scale, dtype=torch.float32)).dequantized(torch.float32)


def _scale_gradient(weight: PackedWeight, gradient: Tensor) -> Tensor:
    """Returns dL/ds [O, G] from dL/dŵ [O, I]: the sum over each group of dL/dŵ times the level."""
    levels = _levels(weight)
    return (gradient.float() * levels).view(*weight.scale.shape, -1).sum(-1)


class _Dequantize(torch.autograd.Function):
    """The weight [O, I] as a function of the scales [O, G]."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, weight: PackedWeight, dtype: torch.dtype) -> Tensor:
        ctx.weight = weight
        return _with_scale(weight, scale).dequantized(dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _scale_gradient(ctx.weight, gradient), None, None


class _Product(torch.autograd.Function):
    """x @ ŵ.T + bias as a function of x, scales and bias; the weight is made twice and never kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, bias: Tensor | None, weight: PackedWeight) -> Tensor:
        ctx.weight = weight
        ctx.save_for_backward(x, scale)
        return F.linear(x, _with_scale(weight, scale).dequantized(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, scale = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        to_x, to_scale, to_bias = ctx.needs_input_grad[:3]
        return (
            (gradient @ _with_scale(ctx.weight, scale).dequantized(x.dtype)) if to_x else None,
            _scale_gradient(ctx.weight, rows.t() @ x.reshape(rows.shape[0], -1)) if to_scale else None,
            rows.sum(0) if to_bias else None,
            None,
        )


class PackedLinear(PackedModule):
    """A linear layer over packed codes.

    Attributes:
        bias: [O] or None.
        input_quantizer: what fake-quantizes the input, or None.
        kernel: "auto", or the name of the kernel to insist on.
        transposed: it stands for a Conv1D; the codes are [O, I] all the same.
        shared: the product that it shares with other layers of the same input (`shared.py`), or None.
        shows_weight: whether peft is about to put an adapter on it (lora.py): `named_parameters` of this module alone
            then names a `weight`.
    """

    bias: Tensor | None
    shared: SharedProduct | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        weights: WeightConfig,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        name: str = "",
        input_activations: ActivationConfig | None = None,
    ) -> None:
        """Makes an empty layer, to be filled by `load_state_dict` or `from_quant_linear`.

        Raises:
            ValueError: when the group size does not divide I.
        """
        super().__init__(out_features, in_features, weights, dtype, device, name)
        self.in_features, self.out_features, self.kernel = in_features, out_features, "auto"
        self.transposed, self.shared, self.shows_weight = False, None, False
        self.register_buffer("bias", torch.empty(out_features, dtype=dtype, device=device) if bias else None)
        self.input_quantizer = (
            None if input_activations is None else ActivationQuantizer(input_activations, device, name)
        )

    @classmethod
    @torch.no_grad()
    def from_quant_linear(cls, layer: QuantLinear, dtype: torch.dtype = torch.bfloat16) -> PackedLinear:
        """Returns the packed form of `layer`; its scales and bias are stored in `dtype`."""
        weights = layer.weights.stored
        packed = cls(layer.in_features, layer.out_features, layer.bias is not None, weights, dtype, "meta")
        packed.take_codes(layer, dtype)
        packed.input_quantizer, packed.transposed = layer.input_quantizer, layer.transposed
        if layer.bias is not None:
            packed.bias = layer.bias.detach().to(dtype)
        return packed.train(layer.training)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, laid out as in the layer that this one stands for.

        While peft puts an adapter on it, one number, NaN, of its shape: it refuses to be written to.
        """
        if self.shows_weight:
            shape = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
            return self.weight_scale.new_full((), float("nan"), dtype=self.dtype).expand(shape)
        return super().weight.mT if self.transposed else super().weight

    def base(self) -> Tensor:
        """Returns the weight that adapters are added to, in float32, [O, I] ([I, O] when transposed)."""
        return super().base().mT if self.transposed else super().base()

    def _as_rows(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yields the parameters, and, to peft, which looks for one to adapt, one of the shape of the weight."""
        yield from super().named_parameters(prefix, recurse, remove_duplicate)
        if self.shows_weight and not recurse:
            stand_in = nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)
            yield f"{prefix}.weight" if prefix else "weight", stand_in

    def forward(self, x: Tensor) -> Tensor:
        """Returns x [*, I] @ ŵ.T + bias, [*, O], in the autocast dtype or else x's."""
        shared = self.shared if self.kept_for(x) is None else None
        if shared is not None and (part := shared.take(self, x)) is not None:
            return part
        dtype = compute_dtype(x)
        return self.product(self.inputs(x, dtype), None if self.bias is None else self.bias.to(dtype), self.kernel)

    def inputs(self, x: Tensor, dtype: torch.dtype) -> Tensor | QuantizedInput:
        """Returns what the weight multiplies: x [*, I] in `dtype`, quantized, as integers where nothing trains."""
        quantizer = self.input_quantizer
        if quantizer is None:
            return x.to(dtype)
        integers = self.weights.num_bits == 8 and self.weights.levels != "float" and quantizer.config.levels != "float"
        if not integers or not quantizer.enabled or torch.is_grad_enabled() or not x.numel():
            return quantizer(x, dtype)
        return quantizer.integers(x.to(dtype))

    def extra_repr(self) -> str:
        """Returns the line that print(model) shows."""
        widened = self.weights.symmetric and self.weights.num_bits < 4
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weights={self.label}, kernel={self.kernel}"
            + (" (decoding on a CPU takes 4 bits a weight in memory)" if widened else "")
        )
