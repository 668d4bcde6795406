"""Noise schedules and their updates: pure maths on latents. A sampler never owns the loop."""
