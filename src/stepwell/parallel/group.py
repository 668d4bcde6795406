"""What ranks talk through: torch's gloo, from and to the memory of the host."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Work(Protocol):
    def wait(self) -> object: ...


class Group(Protocol):
    """What is used of torch's ProcessGroupGloo."""

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Work: ...

    def broadcast(self, tensor: Tensor, root: int) -> Work: ...

    def alltoall_base(self, output: Tensor, input: Tensor, output_sizes: list[int], input_sizes: list[int]) -> Work: ...


class Lost(Exception):
    """A rank is gone, and the others can't go on."""

    @classmethod
    def because(cls, error: RuntimeError) -> Lost:
        text = " ".join(str(error).split()).partition(". This is typically")[0]  # what gloo guesses
        return cls(f"the other ranks are gone: {text[:300]}")
