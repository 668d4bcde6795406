"""Encode text: prompts to conditioning, through a bounded cache."""

from __future__ import annotations

import html
import logging
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from stepwell.guidance import Guider
from stepwell.stages.base import Item, Stage
from stepwell.types import Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Conditioning:
    """An encoded prompt, and what a picture adds to it, for one guidance branch.

    states: (tokens, channels); pooled: (channels,), empty where a family has none; padding: how many zero vectors follow the
    states. image: (tokens, channels) of an image encoder; given: the leading tokens of the latents that hold no noise.
    """

    states: Tensor
    pooled: Tensor
    padding: int = 0
    image: Tensor | None = None
    given: int = 0

    @property
    def nbytes(self) -> int:
        return self.states.nbytes + self.pooled.nbytes


class TextEncoder(Protocol):
    """Turns one prompt into conditioning. Padded to, and cut at, `length` tokens."""

    def __call__(self, prompt: str, length: int) -> Conditioning: ...


class FluxTextEncoder:
    """CLIP's pooled vector and T5's states, as `FluxPipeline.encode_prompt` makes them."""

    def __init__(self, clip_tokenizer: Any, clip: Any, t5_tokenizer: Any, t5: Any):
        self.clip_tokenizer, self.clip, self.t5_tokenizer, self.t5 = clip_tokenizer, clip, t5_tokenizer, t5

    def __call__(self, prompt: str, length: int) -> Conditioning:
        clip_ids = self._ids(self.clip_tokenizer, prompt, self.clip_tokenizer.model_max_length)
        t5_ids = self._ids(self.t5_tokenizer, prompt, length)
        pooled = self.clip(clip_ids.to(self.clip.device)).pooler_output[0]
        states = self.t5(t5_ids.to(self.t5.device)).last_hidden_state[0]
        return Conditioning(states, pooled)

    @staticmethod
    def _ids(tokenizer: Any, prompt: str, length: int) -> Tensor:
        """(1, length) token ids"""
        whole = tokenizer([prompt]).input_ids[0]
        if len(whole) > length:
            logger.warning("the prompt has %d tokens; a text encoder sees the first %d of them only", len(whole), length)
        return tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


class Umt5Encoder:
    """UMT5's states of a prompt's own tokens, as `WanPipeline.encode_prompt` makes them; the zeros it pads with are counted."""

    def __init__(self, tokenizer: Any, model: Any):
        self.tokenizer, self.model = tokenizer, model

    def __call__(self, prompt: str, length: int) -> Conditioning:
        cleaned = re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()
        ids = self.tokenizer([cleaned]).input_ids[0]
        if len(ids) > length:
            logger.warning("the prompt has %d tokens; the text encoder sees the first %d of them only", len(ids), length)
            ids = self.tokenizer([cleaned], max_length=length, truncation=True).input_ids[0]
        states = self.model(torch.tensor([ids]).to(self.model.device)).last_hidden_state[0]
        return Conditioning(states, states.new_zeros(0), padding=length - len(ids))


class EncodeText(Stage):
    """One prompt at a time, so that a prompt's embedding does not depend on the prompts beside it."""

    name = "encode_text"
    kinds = ("text_encoder",)

    def __init__(self, encoder: TextEncoder, guider: Guider, cache_bytes: int):
        self.encoder = encoder
        self.guider = guider
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[tuple[str, int], Conditioning] = OrderedDict()
        self._held_bytes = 0

    def tokens(self, request: Request) -> int:
        assert request.sampling.max_sequence_length is not None
        return request.sampling.max_sequence_length * len(self.guider.prompts(request))

    @torch.no_grad()
    def run(self, items: Sequence[Item]) -> list[bool]:
        for state, _ in items:
            length = state.request.sampling.max_sequence_length
            assert length is not None
            state.conditioning = tuple(self._encode(prompt, length) for prompt in self.guider.prompts(state.request))
        return [True] * len(items)

    def _encode(self, prompt: str, length: int) -> Conditioning:
        key = (prompt, length)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        conditioning = self.encoder(prompt, length)
        self._cache[key] = conditioning
        self._held_bytes += conditioning.nbytes
        while self._held_bytes > self.cache_bytes:
            self._held_bytes -= self._cache.popitem(last=False)[1].nbytes
        return conditioning
