"""Small trained models that ship with the package, in the diffusers repository layout."""
