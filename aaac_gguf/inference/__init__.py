"""Multiply with AAAC blocks: the CUDA kernels on arrays, a torch layer, and whole models in transformers."""
