"""Weights that are not where they are computed with: fetched layer by layer, or part by part, and sent home again."""
