"""Find, check and load the model that is converted, and map its parameters to GGUF tensors."""
