"""Text for Dynamo's frontend: it makes the tokens of a prompt, and words of the tokens that come back."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import aclosing
from typing import Any

from stepwell.dynamo.live import Context, Live
from stepwell.dynamo.requests import FRONTEND_NOTES, PROBE, annotated
from stepwell.errors import InvalidRequest, Unsupported
from stepwell.samplers.unmask import params_of
from stepwell.types import Chunk, Done, ModelInfo, Request, SamplingParams, TextParams, TextResult, TokenInfo

PROBE_PRIORITY = 1000
PREFIX = "dllm_"  # of annotations that say how blocks are filled
# what asks for nothing, of the frontend's options that no text model here has
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "top_k": (0, -1),
    "min_p": (0.0,),
    "repetition_penalty": (1.0,),
    "length_penalty": (1.0,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "include_stop_str_in_output": (False,),
    "min_tokens": (0,),
    "stop_token_ids": ([],),
    "stop_token_ids_visible": ([],),
    "max_thinking_tokens": (),
    "prompt_logprobs": (),
}


class Text:
    """What a worker for texts does with one request."""

    def __init__(self, live: Live, model: ModelInfo):
        self._live, self._model = live, model

    def probe(self) -> dict[str, Any]:
        """One token behind one token."""
        return {"token_ids": [0], "stop_conditions": {"max_tokens": 1, "ignore_eos": True}}

    async def answers(self, request: Mapping[str, Any], context: Context) -> AsyncIterator[dict[str, Any]]:
        """Tokens as they settle, and at the end of each text why it ended. Raises StepwellError."""
        asked, logprobs = self._translated(request)
        sent: dict[int, int] = {}
        async with aclosing(self._live.events(asked, context)) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Chunk) and event.tokens:
                    sent[event.index] = sent.get(event.index, 0) + len(event.tokens)
                    yield _chunk(event.index, event.tokens, logprobs)
                elif isinstance(event, Done):
                    texts = [output.text for output in event.outputs if output.text is not None]
                    rests = [text.tokens[sent.get(index, 0) :] for index, text in enumerate(texts)]
                    for chunk in _ends(texts, rests, tuple(request.get("eos_token_ids") or ()), logprobs):
                        yield chunk

    def _translated(self, request: Mapping[str, Any]) -> tuple[Request, bool]:
        """The request, and whether log-probabilities were asked for."""
        stop, sampling, output = (request.get(name) or {} for name in ("stop_conditions", "sampling_options", "output_options"))
        for name, value in {**stop, **sampling, **output}.items():
            if value is not None and name in NEUTRAL and value not in NEUTRAL[name]:
                raise Unsupported(f"{name} = {value!r:.100}: not for text models in this version; leave it out", param=name)
        for name in ("multi_modal_data", "prompt_embeds"):
            if request.get(name):
                raise Unsupported(f"{name}: {self._model.id} reads text only", param=name)
        logprobs = output.get("logprobs")
        given = {
            name: value
            for name, value in {**sampling, **stop}.items()
            if value is not None
            and name in ("max_tokens", "temperature", "top_p", "ignore_eos", "frequency_penalty", "presence_penalty")
        }
        text = TextParams(
            prompt_ids=tuple(request["token_ids"]),
            stop=tuple(stop.get("stop") or ()),
            logprobs=0 if logprobs is None else int(logprobs),  # what names the tokens, too
            diffusion=params_of(_annotated(request.get("annotations") or ()), "annotations"),
            schema=_schema(sampling.get("guided_decoding")),
            **given,
        )
        asked = Request(
            prompt="",
            sampling=SamplingParams(seed=sampling.get("seed"), num_outputs=sampling.get("n")),
            text=text,
            model=self._model.id,
            priority=PROBE_PRIORITY if request.get(PROBE) else 0,
        )
        return asked, logprobs is not None

    def close(self) -> None:
        """Nothing is held."""


def _annotated(annotations: Any) -> dict[str, Any]:
    """Parameters of the algorithm, which is all that annotations may say of a text."""
    for note in map(str, annotations):
        name, colon, _ = note.partition(":")
        if name.strip() not in FRONTEND_NOTES and not (colon and name.strip().startswith(PREFIX)):
            raise InvalidRequest(
                f"annotations: {note[:100]!r} says nothing of a text; write '{PREFIX}parameter:value', such as "
                f"'{PREFIX}threshold:0.9'; what OpenAI has a field for goes there",
                param="annotations",
            )
    return {name.removeprefix(PREFIX): value for name, value in annotated(annotations).items()}


def _schema(guided: Any) -> dict[str, Any] | None:
    """The JSON schema of a guided text; other ways of guiding one are refused."""
    asked = {name: value for name, value in (guided or {}).items() if value not in (None, [], {}) or name == "json"}
    schema = asked.pop("json", None)
    if asked:
        raise Unsupported(f"guided_decoding = {asked!r:.100}: texts are guided by a JSON schema only", param="guided_decoding")
    if schema is not None and not isinstance(schema, dict):
        raise InvalidRequest(f"guided_decoding.json = {schema!r:.100}: must be an object", param="guided_decoding")
    return schema


def _chunk(index: int, tokens: tuple[TokenInfo, ...], logprobs: bool) -> dict[str, Any]:
    chunk: dict[str, Any] = {"token_ids": [token.id for token in tokens], "index": index}
    if logprobs and tokens:
        chunk["log_probs"] = [token.logprob for token in tokens]
        chunk["top_logprobs"] = [
            [
                {"rank": rank, "token_id": id, "token": text, "logprob": logprob}
                for rank, (id, text, logprob) in enumerate(token.top or ((token.id, token.text, token.logprob),), start=1)
            ]
            for token in tokens
        ]
    return chunk


def _ends(
    texts: list[TextResult], rests: list[tuple[TokenInfo, ...]], eos_ids: tuple[int, ...], logprobs: bool
) -> Iterator[dict[str, Any]]:
    """What is left of each text, and why it ended. Dynamo takes nothing after the first reason, so one text gives it: one whose
    end the frontend does not see by itself, as it does at the token that ends a text, and at a stop string."""
    last = next((index for index, text in enumerate(texts) if text.finish_reason != "stop"), len(texts) - 1)
    for index, text in enumerate(texts):
        if index == last:
            continue
        if rests[index]:
            yield _chunk(index, rests[index], logprobs)
        if text.finish_reason == "stop" and eos_ids:
            yield {"token_ids": [eos_ids[0]], "index": index}
    yield {**_chunk(last, rests[last], logprobs), "finish_reason": texts[last].finish_reason, **_usage(texts)}


def _usage(texts: list[TextResult]) -> dict[str, Any]:
    """OpenAI's count: the prompt once, whatever the number of texts."""
    prompt, completion = texts[0].usage.prompt_tokens, sum(text.usage.completion_tokens for text in texts)
    cached = {"cached_tokens": texts[0].usage.cached_tokens}
    usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    return {"completion_usage": {**usage, "prompt_tokens_details": cached}}
