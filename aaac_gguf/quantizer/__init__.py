"""Quantize one tensor: codebooks, search, error feedback."""
