"""Finding repositories and reading their tensors. safetensors and GGUF only: a pickle is never opened."""
