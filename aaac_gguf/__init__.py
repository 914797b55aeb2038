"""Hugging Face checkpoints to 4-bit GGUF with two learned codebooks per matrix (AAAC, arXiv 2605.08692)."""

__version__ = "0.1.0"
