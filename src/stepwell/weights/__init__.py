"""Finding repositories and reading their tensors. safetensors only: a pickle is never opened."""
