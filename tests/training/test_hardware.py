"""The peak that MFU is divided by."""

import types

import jax
import pytest

from genai_jax.training.hardware import peak_of


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
    ],
)
def test_known_chips_have_their_published_peak(kind, expected):
    device = types.SimpleNamespace(device_kind=kind, platform="other")
    peak = peak_of([device] * 4)
    assert peak.flops_per_second == 4 * expected and "published" in peak.source


def test_an_unknown_chip_has_none_and_a_cpu_measures():
    assert peak_of([types.SimpleNamespace(device_kind="abacus", platform="other")]) is None
    peak = peak_of(jax.devices()[:1])
    assert peak.flops_per_second > 1e9 and "measured" in peak.source
