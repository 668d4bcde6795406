"""Fused Triton kernels. Only here is Triton imported; `engine.build` tries each against its torch twin before using it."""
