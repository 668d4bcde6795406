"""Configuration: one schema, one loader, one resolver. Nothing here imports torch."""
