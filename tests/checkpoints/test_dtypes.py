"""numpy's conversions against torch's, bit for bit: exhaustively where there are 65,536 patterns to try."""

import numpy as np
import pytest
import torch

from btx_merge.checkpoints.dtypes import SAFETENSORS_NAMES, STORED, TORCH_NAMES, all_finite, from_float32, to_float32

HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}
ALL_16_BITS = np.arange(2**16, dtype=np.uint16)


def patterns_of_float32() -> np.ndarray:
    """Bits of float32 values around everything at which rounding can go wrong, and many random ones.

    Every bf16 pattern with a lower half below, at and above the tie; every fp16 value and every middle between
    two, with its neighbours; the smallest and largest of both formats; zeros, infinities, NaNs.
    """
    upper = ALL_16_BITS.astype(np.uint32) << 16
    around_bf16 = [upper | lower for lower in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    halves = ALL_16_BITS.view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    middles = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    near = np.concatenate([finite, middles])
    inf = np.float32(np.inf)
    around_f16 = [np.nextafter(near, -inf), near, np.nextafter(near, inf)]
    around_f16.append(np.array([65504, 65519.996, 65520, 65536, 2**-24, 2**-25, 2**-26, 6e-8, 3e-8], np.float32))
    random = np.random.default_rng(0).integers(0, 2**32, 300_000, dtype=np.uint32)
    return np.concatenate([*around_bf16, *(values.view(np.uint32) for values in around_f16), random])


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_every_16_bit_pattern_becomes_the_same_float32_as_in_torch(name):
    ours = to_float32(ALL_16_BITS.view(np.uint8), name)
    theirs = torch.from_numpy(ALL_16_BITS.view(np.int16)).view(HALVES[name]).float().numpy()
    assert ours.dtype == np.float32
    nan = np.isnan(theirs)
    assert nan.sum() == {"BF16": 2 * 127, "F16": 2 * 1023}[name]
    np.testing.assert_array_equal(np.isnan(ours), nan)
    np.testing.assert_array_equal(ours[~nan].view(np.uint32), theirs[~nan].view(np.uint32))


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_rounding_from_float32_is_torchs(name):
    values = patterns_of_float32().view(np.float32)
    ours = from_float32(values, name).view(np.uint16)
    theirs = bits_of(torch.from_numpy(values).to(HALVES[name]))
    nan = np.isnan(values)
    assert nan.sum() > 1000
    np.testing.assert_array_equal(ours[~nan], theirs[~nan])
    exponent, mantissa = {"BF16": (0x7F80, 0x007F), "F16": (0x7C00, 0x03FF)}[name]
    assert ((ours[nan] & exponent) == exponent).all()  # a NaN stays one, whatever its payload
    assert ((ours[nan] & mantissa) != 0).all()


@pytest.mark.parametrize(
    ("name", "value", "bits"),
    [
        ("BF16", 1.0 + 2**-8, 0x3F80),  # a tie: down to the even 1.0
        ("BF16", 1.0 + 3 * 2**-8, 0x3F82),  # a tie: up to the even 1 + 4/256
        ("BF16", 3.3895314e38, 0x7F7F),  # the largest
        ("BF16", 3.4e38, 0x7F80),  # above its last tie: Inf
        ("BF16", 9.2e-41, 0x0001),  # the smallest subnormal
        ("BF16", -0.0, 0x8000),
        ("F16", 1.0 + 2**-11, 0x3C00),
        ("F16", 1.0 + 3 * 2**-11, 0x3C02),
        ("F16", 65504.0, 0x7BFF),
        ("F16", 65520.0, 0x7C00),  # a tie between the largest and what would come next: Inf
        ("F16", 2**-24, 0x0001),
        ("F16", 2**-25, 0x0000),  # a tie with zero
        ("F16", -float("inf"), 0xFC00),
    ],
)
def test_rounding_known_values(name, value, bits):
    assert from_float32(np.array([value], np.float32), name).view(np.uint16)[0] == bits


@pytest.mark.parametrize("name", ["BF16", "F16"])
def test_every_16_bit_value_survives_the_way_there_and_back(name):
    values = to_float32(ALL_16_BITS.view(np.uint8), name)
    back = from_float32(values, name).view(np.uint16)
    number = ~np.isnan(values)
    np.testing.assert_array_equal(back[number], ALL_16_BITS[number])


def test_float32_passes_unchanged_nans_included():
    bits = patterns_of_float32()
    np.testing.assert_array_equal(to_float32(bits.view(np.uint8), "F32").view(np.uint32), bits)
    np.testing.assert_array_equal(from_float32(bits.view(np.float32), "F32").view(np.uint32), bits)


@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
def test_all_finite_finds_every_single_pattern(name):
    if name == "F32":
        bits = patterns_of_float32()[::61]
        finite = np.isfinite(bits.view(np.float32))
    else:
        bits = ALL_16_BITS
        finite = torch.from_numpy(bits.view(np.int16)).view(HALVES[name]).isfinite().numpy()
    assert 0 < finite.sum() < len(bits)
    background = bits[finite][:7]  # finite values around the one that is tried
    ours = [all_finite(np.concatenate([background, bits[i : i + 1]]).view(np.uint8), name) for i in range(len(bits))]
    np.testing.assert_array_equal(ours, finite)


@pytest.mark.parametrize("name", ["BF16", "F16", "F32"])
def test_all_finite_of_all_finite_values_together_and_of_nothing(name):
    bits = patterns_of_float32() if name == "F32" else ALL_16_BITS
    finite = bits[np.isfinite(to_float32(bits.view(np.uint8), name))]
    assert all_finite(finite.view(np.uint8), name) is True
    assert all_finite(np.empty(0, np.uint8), name) is True


def test_a_transposed_array_is_stored_row_by_row():
    values = np.arange(6, dtype=np.float32).reshape(2, 3).T
    for name in STORED:
        assert to_float32(from_float32(values, name), name).tolist() == [0, 3, 1, 4, 2, 5]


def test_from_float32_does_not_change_its_input():
    values = np.array([1 / 3, float("nan"), 3.4e38], np.float32)
    before = values.copy()
    for name in STORED:
        from_float32(values, name)
    np.testing.assert_array_equal(values.view(np.uint32), before.view(np.uint32))


def test_names_of_the_dtypes():
    assert TORCH_NAMES == {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    assert SAFETENSORS_NAMES == {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
