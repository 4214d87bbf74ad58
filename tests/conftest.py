"""Hypothesis profiles: ``ci`` unless HYPOTHESIS_PROFILE or ``--hypothesis-profile`` names another.

Without a GPU, kernels are interpreted.
"""

from __future__ import annotations

import os
from pathlib import Path

from hypothesis import settings

if not any(Path("/dev").glob("nvidia[0-9]*")):  # without a GPU kernels are interpreted, as Triton's import decides
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("ci", max_examples=200, derandomize=True, deadline=None)
settings.register_profile("nightly", max_examples=500, deadline=None)  # `test_report` takes 2,000
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
