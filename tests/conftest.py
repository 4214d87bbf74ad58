"""Hypothesis profiles: ``ci`` unless HYPOTHESIS_PROFILE or ``--hypothesis-profile`` names another."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("ci", max_examples=200, derandomize=True, deadline=None)
settings.register_profile("nightly", max_examples=500, deadline=None)  # `test_report` takes 2,000
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
