"""Fewer bits per weight: schemes that replace linears of a plain, finished module at the seam of `ops.linear`."""
