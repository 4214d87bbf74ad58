"""Triton kernels of sampled decode and their launchers; `hsr.backend` leads here where arrays lie on a GPU."""
