"""Triton kernels of sampled decode with their launchers, and faiss over tensors; `hsr.backend` leads here."""
