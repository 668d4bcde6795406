"""Step caches: denoising steps that reuse what an earlier step computed. A pass over `ops.Blocks`."""
