"""Triton kernels and their launchers will live here; there are no kernels yet."""
