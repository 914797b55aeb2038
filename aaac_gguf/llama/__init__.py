"""Patch and build llama.cpp, and run its tools."""
