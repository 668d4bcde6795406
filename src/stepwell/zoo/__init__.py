"""Small trained models that ship with the package, in the layouts of diffusers and transformers."""
