"""Read and write files: the AAAC format, GGUF, and importance matrices."""
