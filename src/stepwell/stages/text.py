"""Encode text: prompts to conditioning, through a bounded cache."""

from __future__ import annotations

import hashlib
import html
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import ftfy
import torch
from PIL import Image
from torch import Tensor

from stepwell.errors import InvalidRequest, WeightsError
from stepwell.guidance import Guider
from stepwell.stages.base import Item, Stage
from stepwell.types import Frames, Request

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


class PictureTextEncoder(TextEncoder, Protocol):
    """The same of a prompt and the picture it is about, None for no picture."""

    def __call__(self, prompt: str, length: int, picture: Frames | None = None) -> Conditioning: ...


class FluxTextEncoder:
    """CLIP's pooled vector and T5's states, as `FluxPipeline.encode_prompt` makes them."""

    def __init__(self, clip_tokenizer: Any, clip: Any, t5_tokenizer: Any, t5: Any):
        self.clip_tokenizer, self.clip, self.t5_tokenizer, self.t5 = clip_tokenizer, clip, t5_tokenizer, t5

    def __call__(self, prompt: str, length: int) -> Conditioning:
        clip_ids = _padded_ids(self.clip_tokenizer, prompt, self.clip_tokenizer.model_max_length)
        t5_ids = _padded_ids(self.t5_tokenizer, prompt, length)
        pooled = self.clip(clip_ids.to(self.clip.device)).pooler_output[0]
        states = self.t5(t5_ids.to(self.t5.device)).last_hidden_state[0]
        return Conditioning(states, pooled)


class HunyuanTextEncoder:
    """Llama's states of a prompt's own tokens, asked for by a template, and CLIP's pooled vector, as
    `HunyuanVideoPipeline.encode_prompt` makes them. The first `crop_start` tokens are the template's."""

    CLIP_TOKENS = 77

    def __init__(self, llama_tokenizer: Any, llama: Any, clip_tokenizer: Any, clip: Any, template: str, crop_start: int):
        self.llama_tokenizer, self.llama, self.clip_tokenizer, self.clip = llama_tokenizer, llama, clip_tokenizer, clip
        self.template, self.crop_start = template, crop_start
        tokens = len(llama_tokenizer([template.format("")]).input_ids[0])
        if tokens <= crop_start:
            raise WeightsError(
                f"tokenizer: makes {tokens} tokens of the prompt's template, where {crop_start + 1} are right",
                param="tokenizer",
            )

    def __call__(self, prompt: str, length: int) -> Conditioning:
        clip_ids = _padded_ids(self.clip_tokenizer, prompt, self.CLIP_TOKENS)
        ids = _own_ids(self.llama_tokenizer, self.template.format(prompt), length, template=self.crop_start)
        pooled = self.clip(clip_ids.to(self.clip.device)).pooler_output[0]
        made = self.llama(torch.tensor([ids]).to(self.llama.device), output_hidden_states=True, use_cache=False)
        # what follows a token changes none of its states, so there is no need to pad; the last two layers are not for pictures
        return Conditioning(made.hidden_states[-3][0, self.crop_start :], pooled)


class HunyuanPictureEncoder:
    """Llava's states of a picture's tokens, one of `every` so many, then of the prompt's own, and CLIP's pooled vector, as
    `HunyuanVideoImageToVideoPipeline.encode_prompt` makes them, from the parts of its names.

    template: the reference's, which says where the picture's tokens are and where the prompt's begin. No picture stands for a
    black one, of which the reference takes every second state, whatever it takes of others.
    """

    CLIP_TOKENS, BLACK_EVERY = HunyuanTextEncoder.CLIP_TOKENS, 2
    HEADER = 4  # tokens of the template, between the prompt and its last one, that are left out: end of turn, "assistant"

    def __init__(self, parts: Mapping[str, Any], template: Mapping[str, Any], every: int):
        self.llava_tokenizer, self.llava = parts["tokenizer"], parts["text_encoder"]
        self.clip_tokenizer, self.clip = parts["tokenizer_2"], parts["text_encoder_2"]
        self.processor, self.every = parts["image_processor"], every
        self.template, self.crop_start = template["template"], template["crop_start"]
        self.place, self.end = template["image_emb_start"], template["image_emb_end"]
        self.image_token = self.llava.config.image_token_index
        ids = self.llava_tokenizer([self.template.format("")]).input_ids[0]
        self.tail, wanted = ids[self.crop_start :], self.crop_start + self.HEADER + 1
        if len(ids) != wanted or [i for i, id in enumerate(ids) if id == self.image_token] != [self.place]:
            raise WeightsError(
                f"tokenizer: makes {len(ids)} tokens of the prompt's template, where {wanted} are right, with the picture's "
                f"({self.image_token} in text_encoder/config.json) at {self.place}",
                param="tokenizer",
            )
        vision = self.llava.config.vision_config
        if (vision.image_size // vision.patch_size) ** 2 != self.end - self.place:
            raise WeightsError(
                f"text_encoder: sees a picture of {vision.image_size} pixels in patches of {vision.patch_size}, where "
                f"{self.end - self.place} patches are right",
                param="text_encoder",
            )

    def __call__(self, prompt: str, length: int, picture: Frames | None = None) -> Conditioning:
        clip_ids = _padded_ids(self.clip_tokenizer, prompt, self.CLIP_TOKENS)
        ids = _own_ids(self.llava_tokenizer, self.template.format(prompt), length, template=self.crop_start)
        if ids.count(self.image_token) != 1:
            raise InvalidRequest(
                f"prompt: holds {self.llava_tokenizer.convert_ids_to_tokens(self.image_token)!r}, which stands for the picture; "
                "leave it out",
                param="prompt",
            )
        pooled = self.clip(clip_ids.to(self.clip.device)).pooler_output[0]
        expanded = [*ids[: self.place], *[self.image_token] * (self.end - self.place), *ids[self.place + 1 :]]
        states = self._states(expanded, picture)
        own = states[self.end - 1 + self.crop_start - self.place :]
        is_whole = ids[-len(self.tail) :] == self.tail
        own = torch.cat((own[: -len(self.tail)], own[-1:])) if is_whole else own[: -self.HEADER]
        every = self.BLACK_EVERY if picture is None else self.every
        return Conditioning(torch.cat((states[self.place : self.end : every], own)), pooled)

    def _states(self, ids: list[int], picture: Frames | None) -> Tensor:
        """(tokens, channels); what follows a token changes none of its states, so there is no need to pad"""
        black = Image.new("RGB", (self.llava.config.vision_config.image_size,) * 2)
        seen = black if picture is None else Image.frombytes("RGB", (picture.width, picture.height), picture.data)
        pixels = self.processor(images=seen, return_tensors="pt").pixel_values.to(self.llava.device, self.llava.dtype)
        made = self.llava(
            input_ids=torch.tensor([ids]).to(self.llava.device),
            pixel_values=pixels,
            output_hidden_states=True,
            use_cache=False,
            logits_to_keep=1,
        )
        states: Tensor = made.hidden_states[-3][0]  # the last two layers are not for pictures
        return states


class Umt5Encoder:
    """UMT5's states of a prompt's own tokens, as `WanPipeline.encode_prompt` makes them; the zeros it pads with are counted."""

    def __init__(self, tokenizer: Any, model: Any):
        self.tokenizer, self.model = tokenizer, model

    def __call__(self, prompt: str, length: int) -> Conditioning:
        cleaned = re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()
        ids = _own_ids(self.tokenizer, cleaned, length)
        states = self.model(torch.tensor([ids]).to(self.model.device)).last_hidden_state[0]
        return Conditioning(states, states.new_zeros(0), padding=length - len(ids))


def _padded_ids(tokenizer: Any, prompt: str, length: int) -> Tensor:
    """(1, length) token ids"""
    _own_ids(tokenizer, prompt, length)  # says what is cut
    ids: Tensor = tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    return ids


def _own_ids(tokenizer: Any, prompt: str, length: int, template: int = 0) -> list[int]:
    """The ids of a prompt, cut at `length` tokens beside those of its `template`."""
    ids: list[int] = tokenizer([prompt]).input_ids[0]
    if len(ids) - template > length:
        logger.warning("the prompt has %d tokens; a text encoder sees the first %d of them only", len(ids) - template, length)
        ids = tokenizer([prompt], max_length=length + template, truncation=True).input_ids[0]
    return ids


class EncodeText(Stage):
    """One prompt at a time, so that a prompt's embedding does not depend on the prompts beside it."""

    name = "encode_text"
    kinds = ("text_encoder",)

    def __init__(self, encoder: TextEncoder, guider: Guider, cache_bytes: int):
        self.encoder = encoder
        self.guider = guider
        self.cache_bytes = cache_bytes
        self._cache: OrderedDict[Hashable, Conditioning] = OrderedDict()
        self._held_bytes = 0

    def tokens(self, request: Request) -> int:
        assert request.sampling.max_sequence_length is not None
        return request.sampling.max_sequence_length * len(self.guider.prompts(request))

    @torch.no_grad()
    def run(self, items: Sequence[Item]) -> list[bool]:
        for state, _ in items:
            length = state.request.sampling.max_sequence_length
            assert length is not None
            state.conditioning = tuple(self._branches(state.request, length))
        return [True] * len(items)

    def _branches(self, request: Request, length: int) -> Iterator[Conditioning]:
        for prompt in self.guider.prompts(request):
            yield self._cached((prompt, length), partial(self.encoder, prompt, length))

    def _cached(self, key: Hashable, encode: Callable[[], Conditioning]) -> Conditioning:
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        conditioning = encode()
        self._cache[key] = conditioning
        self._held_bytes += conditioning.nbytes
        while self._held_bytes > self.cache_bytes:
            self._held_bytes -= self._cache.popitem(last=False)[1].nbytes
        return conditioning


class EncodeTextAndPicture(EncodeText):
    """Of models that read the prompt together with the picture; the negative prompt comes with none."""

    def __init__(self, encoder: PictureTextEncoder, guider: Guider, cache_bytes: int):
        super().__init__(encoder, guider, cache_bytes)
        self.sees = encoder

    def _branches(self, request: Request, length: int) -> Iterator[Conditioning]:
        for prompt, picture in zip(self.guider.prompts(request), (request.image, None), strict=False):
            seen = None if picture is None else (hashlib.sha256(picture.data).digest(), picture.width)
            yield self._cached((prompt, length, seen), partial(self.sees, prompt, length, picture))
