"""Attention kernels, one file each; `engine.build` chooses among them by a reasoned rule."""
