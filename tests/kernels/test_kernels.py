"""Every kernel against the reference, over the schemes and shapes it accepts, and the choice among them."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn

from llmqat.kernels import KERNELS, JoinedWeight, cpu, integer, packed_linear, products, registry
from llmqat.kernels.reference import int8_codes
from llmqat.kernels.zentorch import rounded_to_8_bits
from llmqat.layers import ActivationConfig, ActivationQuantizer, PackedLinear, QuantLinear, WeightConfig

SCHEMES = [
    WeightConfig(num_bits=bits, symmetric=symmetric, strategy="group" if group else "channel", group_size=group)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for group in (32, 64, 128, 48, None)
]


def packed_layer(scheme: WeightConfig, out_features: int = 64, in_features: int = 384) -> PackedLinear:
    return PackedLinear.from_quant_linear(
        QuantLinear.from_linear(nn.Linear(in_features, out_features, bias=False), scheme)
    )


DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 7, 16, 33, 200])
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
@pytest.mark.parametrize("name", list(KERNELS))
def test_a_kernel_agrees_with_the_product_in_float64(name: str, scheme: WeightConfig, rows: int, device: str) -> None:
    layer, x = packed_layer(scheme).to(device), torch.randn(rows, 384).bfloat16().to(device)
    weight = layer.packed_weight()
    if KERNELS[name].declines(x, weight) is not None:
        assert name != "reference"
        return
    taken = x.double() if KERNELS[name].exact else rounded_to_8_bits(x).double()
    exact = taken @ layer.dequantized_weight(torch.bfloat16).double().T
    bias = torch.randn(64).bfloat16().to(device)
    got = packed_linear(x, weight, bias, name).double()
    # bfloat16 inputs are exact in the product; the sum runs in float32 and is rounded to bfloat16 once or twice
    # (8 bits: half a unit is 2^-9 of the value). The int4 kernel forms each weight (q - 8) * s in bfloat16 again, 2^-9
    # of each term; together below 2^-7 of the sum of magnitudes.
    magnitude = taken.abs() @ layer.dequantized_weight(torch.bfloat16).double().abs().T
    bound = 2**-7 * (exact.abs() + bias.double().abs()) + 2**-8 * magnitude + 1e-6
    assert ((got - (exact + bias.double())).abs() <= bound).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.label)
@pytest.mark.parametrize("name", list(KERNELS))
def test_no_kernel_hides_what_is_not_finite_or_fails_without_rows(name: str, scheme: WeightConfig, device: str) -> None:
    weight, x = packed_layer(scheme).to(device).packed_weight(), torch.randn(4, 384).bfloat16().to(device)
    if KERNELS[name].declines(x, weight) is not None:
        return
    assert packed_linear(x[:0], weight, torch.zeros_like(weight.scale[:, 0]), name).shape == (0, 64)
    for value in (float("nan"), float("inf"), -float("inf")):
        x[2, 5] = value
        is_finite = packed_linear(x, weight, None, name).isfinite()
        assert not is_finite[2].any()
        assert is_finite[[0, 1, 3]].all()


@torch.no_grad()
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("has_bf16", [False, True])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_dequantized_products_round_once_on_any_processor(
    bits: int, has_bf16: bool, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_HAS_BF16", has_bf16)
    layer = packed_layer(WeightConfig(num_bits=bits, group_size=64))
    x, bias = torch.randn(40, 384).bfloat16(), torch.randn(64).bfloat16() if with_bias else None
    found = packed_linear(x, layer.packed_weight(), bias, "cpu-dequantize")
    weight = layer.dequantized_weight(torch.bfloat16).double()
    exact = x.double() @ weight.T + (0 if bias is None else bias.double())
    assert found.dtype == torch.bfloat16
    size = x.double().abs() @ weight.abs().T
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-18 * size).all()


INPUTS = {
    "token": ActivationConfig(),
    "token, zero points": ActivationConfig(symmetric=False),
    "4 bits": ActivationConfig(num_bits=4, symmetric=False),
    "static": ActivationConfig(dynamic=False, symmetric=False),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("in_features", [24, 384])
@pytest.mark.parametrize("rows", [1, 33])
@pytest.mark.parametrize("name", INPUTS)
def test_quantized_inputs_are_multiplied_as_integers(
    name: str, rows: int, in_features: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = packed_layer(WeightConfig(num_bits=8, strategy="channel"), in_features=in_features)
    quantizer = ActivationQuantizer(INPUTS[name])
    if not INPUTS[name].dynamic:
        quantizer.set_range(-2.5, 3.0)
    layer.input_quantizer = quantizer
    x = (torch.randn(rows, in_features) + 0.5).to(dtype)
    found = quantizer.integers(x)
    assert found.codes.dtype == torch.int8
    assert torch.equal(found.values(), quantizer(x))
    taken = (
        found.codes.double() - (0 if found.zero_point is None else found.zero_point.double())
    ) * found.scale.double()
    weight = layer.dequantized_weight(torch.float32).double()
    exact = taken @ weight.T
    monkeypatch.setattr(integer, "_MULTIPLIES_INT8", True)  # where it is slow, it is right all the same
    monkeypatch.setattr(cpu.CpuDequantizeKernel, "linear", None)  # it is not what runs
    got = layer(x).double()
    # The sums are exact in 32 bits; what is left are four roundings in float32 (2^-24 each) and one to the dtype.
    unit = 2**-8 if dtype == torch.bfloat16 else 0.0
    assert ((got - exact).abs() <= unit * exact.abs() + 2**-21 * (taken.abs() @ weight.abs().T)).all()


def test_quantized_inputs_of_other_weights_are_taken_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = packed_layer(WeightConfig(num_bits=4, group_size=64))
    x = ActivationQuantizer(ActivationConfig()).integers(torch.randn(3, 384).bfloat16())
    weight = layer.packed_weight()
    assert torch.equal(packed_linear(x, weight), packed_linear(x.values(), weight))
    monkeypatch.setattr(integer, "_MULTIPLIES_INT8", False)
    eight = packed_layer(WeightConfig(num_bits=8, strategy="channel")).packed_weight()
    assert torch.equal(packed_linear(x, eight), packed_linear(x.values(), eight))
    assert torch.equal(
        packed_linear(x, weight, None, "reference"), packed_linear(x.values(), weight, None, "reference")
    )
    with pytest.raises(ValueError, match="kernel='cpu-int8' cannot run here"):
        packed_linear(x, weight, None, "cpu-int8")


def test_which_kernel_runs_is_decided_by_rows_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[str] = []
    for name, kernel in KERNELS.items():

        def spy(x, weight, bias, _name=name, _linear=kernel.linear):  # type: ignore[no-untyped-def]
            used.append(_name)
            return _linear(x, weight, bias)

        monkeypatch.setattr(kernel, "linear", spy)
    weight = packed_layer(WeightConfig(num_bits=4, group_size=64)).packed_weight()
    for rows, dtype in ((1, torch.bfloat16), (32, torch.bfloat16), (33, torch.bfloat16), (1, torch.float32)):
        packed_linear(torch.randn(rows, 384).to(dtype), weight)
    tensor = packed_layer(WeightConfig(num_bits=4, strategy="tensor")).packed_weight()
    packed_linear(torch.randn(40, 384).bfloat16(), tensor)
    eight = packed_layer(WeightConfig(num_bits=8, strategy="channel")).packed_weight()
    for rows in (1, 17):
        packed_linear(torch.randn(rows, 384).bfloat16(), eight)
    ragged = packed_layer(WeightConfig(num_bits=8, strategy="channel"), in_features=24).packed_weight()
    packed_linear(torch.randn(1, 24).bfloat16(), ragged)
    assert used[5:] == ["cpu-int8", "cpu-dequantize", "cpu-dequantize"]
    assert used[:5] == ["cpu-int4", "cpu-int4", "cpu-dequantize", "cpu-dequantize", "cpu-dequantize"]


def test_the_int4_layout_is_built_once() -> None:
    layer = packed_layer(WeightConfig(num_bits=4, group_size=64))
    x = torch.randn(1, 384).bfloat16()
    layer(x)
    blob = layer.packed_weight().layouts["cpu-int4"][0]
    layer(x)
    assert layer.packed_weight().layouts["cpu-int4"][0] is blob


@pytest.mark.parametrize("symmetric", [True, False])
def test_words_put_into_the_int4_layout_are_what_torch_packs(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    scheme = WeightConfig(num_bits=4, group_size=64, symmetric=symmetric)
    joined = JoinedWeight([packed_layer(scheme, rows).packed_weight() for rows in (80, 112)])
    monkeypatch.setattr(cpu, "_PACKED_ELEMENTS", 64 * 384)
    blob, scales = cpu._int4_layout(joined, 64)
    monkeypatch.setattr(cpu, "_interleaves", lambda: False)
    by_torch, same_scales = cpu._int4_layout(joined, 64)
    assert torch.equal(blob, by_torch)
    assert torch.equal(scales, same_scales)


def test_a_reason_for_falling_back_is_logged_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_logged", set())
    weight = packed_layer(WeightConfig(num_bits=8, strategy="channel")).packed_weight()
    with caplog.at_level(logging.INFO, logger="llmqat"):
        for _ in range(3):
            packed_linear(torch.randn(1, 384).bfloat16(), weight)
    assert [r.getMessage() for r in caplog.records] == [
        f"kernel {name} is not used: it needs a grid of at most 4 bits" for name in ("cpu-brgemm", "cpu-int4")
    ]


def test_a_kernel_asked_for_by_name_must_fit() -> None:
    weight = packed_layer(WeightConfig(num_bits=8, strategy="channel")).packed_weight()
    with pytest.raises(ValueError, match="cannot run here: it needs a grid of at most 4 bits"):
        packed_linear(torch.randn(1, 384).bfloat16(), weight, kernel="cpu-int4")
    with pytest.raises(ValueError, match="kernel='cuda' is unknown; choose auto, cpu-brgemm, cpu-int4"):
        packed_linear(torch.randn(1, 384).bfloat16(), weight, kernel="cuda")


def test_loading_or_casting_a_layer_drops_what_was_derived_from_the_old_codes() -> None:
    layer, other = (packed_layer(WeightConfig(num_bits=4, group_size=64)) for _ in range(2))
    x = torch.randn(1, 384).bfloat16()
    layer(x)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer(x), other(x))
    assert layer.to(torch.float32).packed_weight().scale.dtype == torch.float32


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_unpacking_by_planes_gives_the_very_weights_of_the_reference(bits: int, symmetric: bool) -> None:
    scheme = WeightConfig(num_bits=bits, symmetric=symmetric, strategy="group", group_size=48)
    layer = packed_layer(scheme, out_features=80, in_features=96)
    weight = layer.packed_weight()
    planes = cpu._planes(weight, torch.bfloat16)
    assert planes == (8 // bits if 8 % bits == 0 else 8)
    unpacked = cpu._dequantized_planes(weight, planes).view(80, planes, -1).transpose(1, 2).reshape(80, 96)
    assert torch.equal(unpacked, weight.dequantized(torch.bfloat16))


@pytest.mark.parametrize("bits", [4, 3])
def test_a_large_weight_is_dequantized_in_slices(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [packed_layer(WeightConfig(num_bits=bits, group_size=64), rows).packed_weight() for rows in (80, 48)]
    x, joined = torch.randn(40, 384).bfloat16(), JoinedWeight(members)
    whole = packed_linear(x, joined, None, "cpu-dequantize")
    monkeypatch.setattr(cpu, "_CHUNK_ELEMENTS", 40 * 384)
    assert [(first, piece.out_features) for first, piece in cpu._slices(joined)] == [
        (0, 32),
        (32, 32),
        (64, 16),
        (80, 32),
        (112, 16),
    ]
    torch.testing.assert_close(packed_linear(x, joined, None, "cpu-dequantize"), whole, rtol=2**-6, atol=2**-6)
    torch.testing.assert_close(packed_linear(x, joined, None, "reference"), whole, rtol=2**-6, atol=2**-6)


def test_a_layer_that_never_ran_is_compiled_whole() -> None:
    """Which kernels this processor can run is no question for the compiler."""
    layer = packed_layer(WeightConfig(num_bits=4, group_size=64))
    x = torch.randn(200, 384).bfloat16()
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)(x)
        assert torch.equal(compiled, layer(x))


@pytest.mark.parametrize("joined", [False, True])
def test_codes_of_8_bits_are_taken_out_where_the_weight_is(joined: bool) -> None:
    layers = [packed_layer(WeightConfig(num_bits=8, strategy="channel")) for _ in range(2)]
    for layer in layers:
        layer.to("meta")
    weights = [layer.packed_weight() for layer in layers]
    assert int8_codes(JoinedWeight(weights) if joined else weights[0]).device.type == "meta"


def test_integers_are_multiplied_on_a_gpu_after_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in checks what torch asks of the shapes there."""
    given: list[tuple[int, ...]] = []
    of_torch = torch._int_mm

    def on_a_gpu(rows: Tensor, columns: Tensor) -> Tensor:
        assert rows.shape[0] > 16  # torch's own condition there, as are the next two
        assert rows.shape[1] % 8 == 0
        assert columns.shape[1] % 8 == 0
        given.append(tuple(rows.shape))
        return of_torch(rows, columns)

    monkeypatch.setattr(torch, "_int_mm", on_a_gpu)
    monkeypatch.setitem(integer._LEAST_ROWS, "cpu", integer._LEAST_ROWS["cuda"])
    x = ActivationQuantizer(ActivationConfig()).integers(torch.randn(3, 384).bfloat16())
    layer = packed_layer(WeightConfig(num_bits=8, strategy="channel"))
    weight = layer.packed_weight()
    expected = packed_linear(x.values(), weight, None, "reference")
    torch.testing.assert_close(integer.IntegerKernel().linear(x, weight, None), expected, rtol=2**-7, atol=2**-7)
    assert given == [(32, 384)]
    integer._tried.cache_clear()
    assert integer._refusal(torch.device("cpu"), weight) is None
    ragged = packed_layer(WeightConfig(num_bits=8, strategy="channel"), 60).packed_weight()
    assert integer._refusal(torch.device("cpu"), ragged) == "60 x 384 features are not multiples of 8"
    monkeypatch.setattr(torch, "_int_mm", lambda rows, columns: of_torch(rows, columns) + 1)
    integer._tried.cache_clear()
    assert integer._refusal(torch.device("cpu"), weight) == "torch gave other numbers"
    integer._tried.cache_clear()
