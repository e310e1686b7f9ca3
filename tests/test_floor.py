"""The roofline floor of a phase by hand, at rates of each type."""

from __future__ import annotations

import pytest

from vramlab.capture.work import roofline


@pytest.mark.parametrize(
    ("phase", "seconds"),
    [
        ({"flops": {"bfloat16": 6e12}, "compulsory_bytes": 0}, 3.0),
        ({"flops": {"float16": 6e12}, "compulsory_bytes": 0}, 3.0),
        ({"flops": {"float32": 6e12}, "compulsory_bytes": 0}, 12.0),
        ({"flops": {"float64": 6e12}, "compulsory_bytes": 0}, 12.0),
        ({"flops": {"bfloat16": 2e12, "float32": 1e12}, "compulsory_bytes": 28e9}, 3.0),
        ({"flops": {"bfloat16": 2e12, "float32": 1e12}, "compulsory_bytes": 32e9}, 3.2),
    ],
)
def test_a_phases_floor_by_hand(phase, seconds):
    rates = {"bf16_tflops": 2.0, "fp32_tflops": 0.5, "gb_per_s": 10.0, "host_gb_per_s": 1.0}
    assert roofline({"forward": phase}, **rates).s == seconds
    assert roofline({"forward": phase, "backward": phase}, **rates).s == 2 * seconds
    assert roofline({}, **rates).s == 0
