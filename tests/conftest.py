"""Hypothesis profiles: ``ci`` unless HYPOTHESIS_PROFILE or ``--hypothesis-profile`` names another."""

from __future__ import annotations

import os

from hypothesis import settings

settings.register_profile("ci", max_examples=200, derandomize=True, deadline=None)
settings.register_profile("nightly", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
