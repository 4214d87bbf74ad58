"""Every default kernel compiles for sm_90 without spills; no GPU needed, but the compilers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")


def test_kernels_compile_for_sm90_without_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "gpu.sm90"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
