"""Denoise text: one refinement of the active blocks of any mix of requests in one packed forward.

A request's row of a step is what its sequence lacks in the pool of pages (its prompt at first, later the block it has just
finished) followed by the block being filled; so a prompt of any length takes one forward together with its first refinement,
and keeping a finished block costs none of its own. Whatever the pool has lost is computed again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from stepwell.cache.pages import PagePool, chained
from stepwell.ops.spans import Span, SpanLayout
from stepwell.parallel.team import ALONE, Team
from stepwell.samplers.predict import Prediction
from stepwell.samplers.unmask import Algorithm, Candidate, Canvas, Choice, LowConfidence, algorithm_of, merged, uniform
from stepwell.stages.base import Item, Stage, State
from stepwell.stages.form import Form, Reading
from stepwell.stages.preview_text import preview
from stepwell.stages.prompts import Prompts
from stepwell.stages.tokens import Codec, Writer
from stepwell.types import Chunk, DiffusionParams, Request, TextParams, TextResult, TextUsage, TokenInfo


class TextModel(Protocol):
    def pack(self, spans: Sequence[Span], size: int) -> SpanLayout: ...

    def __call__(self, layout: SpanLayout, pool: PagePool) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]: ...


@dataclass(frozen=True, slots=True)
class Schedule:
    """How blocks go through forwards. The defaults are what is served; others are there to be compared with.

    prefill_blocks: how many blocks a row may compute before the active one, None for all that the step has room for; a row
    that is not through with them has no active block. fuses: whether they share a forward with the active block. ends_early:
    whether tokens count as soon as they are certain, or only once their block is in the pool.
    """

    prefill_blocks: int | None = None
    fuses: bool = True
    ends_early: bool = True


@dataclass(frozen=True, slots=True)
class Draft:
    """A text in the making.

    settled: the tokens of the whole blocks before the active one, prompt first; chain: the hash of each of these blocks.
    written: how many tokens of the text the writer has had; infos: what is to be told of tokens, by position.
    """

    limit: int
    prompt_tokens: int
    settled: tuple[int, ...]
    chain: tuple[bytes, ...]
    canvas: Canvas
    algorithm: Algorithm
    writer: Writer = field(default_factory=Writer)
    text: str = ""
    written: int = 0
    infos: tuple[tuple[int, TokenInfo], ...] = ()
    told: tuple[TokenInfo, ...] = ()
    cached: int = -1  # tokens of the prompt that were in the pool at the first forward; before it -1
    forwards: int = 0
    commits: int = 0
    edits: int = 0
    finish: str | None = None
    full: str = "length"  # why it ends when it has all the tokens it may have
    form: Form | None = None  # where its grammar is, after all tokens that are certain
    prediction: Prediction | None = None

    @property
    def refinements(self) -> int:
        return self.forwards - self.commits

    def usage(self) -> TextUsage:
        accepted, rejected = 0, 0
        if self.prediction is not None:
            accepted = sum(position < self.prompt_tokens + self.written for position in self.prediction.accepted)
            rejected = max(0, len(self.prediction.ids) - accepted)
        cached = max(0, self.cached)
        return TextUsage(self.prompt_tokens, cached, self.written, self.forwards, self.commits, self.edits, accepted, rejected)

    @property
    def certain(self) -> tuple[int, ...]:
        """All up to the first mask."""
        masked = self.canvas.masked
        return self.settled + self.canvas.tokens[: masked[0] if masked else None]

    def filled(self, tokens: tuple[int, ...]) -> Draft:
        """Its active block begins with these, and has masks after them; as many blocks as they fill are settled."""
        size = len(self.canvas.tokens)
        whole = len(tokens) // size * size
        rest = (*tokens[whole:], *[self.canvas.mask] * (size - len(tokens) + whole))
        if not whole:
            return replace(self, canvas=replace(self.canvas, tokens=rest))
        settled, chain = self.settled + tokens[:whole], _chain(self.chain, tokens[:whole], size)
        return replace(self, settled=settled, chain=chain, canvas=Canvas(rest, self.canvas.mask))

    def predicted(self) -> Draft:
        """With what is predicted of the active block."""
        if self.prediction is None:
            return self
        certain = self.settled if self.algorithm.edits else self.certain
        first = max(len(certain) - len(self.settled), self.canvas.fixed)
        prediction = self.prediction.hinting(certain[self.prompt_tokens :], first, self.canvas)
        canvas = prediction.proposed(self.canvas) if self.algorithm.edits else self.canvas
        return replace(self, prediction=prediction, canvas=canvas)


@dataclass(frozen=True, slots=True)
class Row:
    """What one draft computes in a step: blocks `known` to `known + new` of its settled ones, and the active one if asked."""

    draft: Draft
    pages: tuple[int, ...]
    new: int
    places: tuple[int, ...]
    is_active: bool

    def span(self, size: int) -> Span:
        start = len(self.pages) * size
        ids = self.draft.settled[start : start + self.new * size]
        if not self.is_active:
            return Span(ids, self.pages)
        return Span(ids + self.draft.canvas.tokens, self.pages, [self.new * size + place for place in self.places])


@dataclass(frozen=True, slots=True)
class TextSettings:
    """The size of a block, how many tokens a step may hold, how blocks are filled where a request does not say, and who computes
    a forward together."""

    size: int
    batch_tokens: int
    defaults: DiffusionParams = field(default_factory=DiffusionParams)
    schedule: Schedule = field(default_factory=Schedule)
    team: Team = ALONE


class Unmask(Stage):
    """One refinement of each item's active block. A row that waits for another to compute their common beginning, or for room
    in the step, stays as it is."""

    name = "denoise"
    kinds = ("dit",)

    def __init__(self, model: TextModel, pool: PagePool, prompts: Prompts, settings: TextSettings):
        self.model, self.pool, self.prompts, self.settings = model, pool, prompts, settings
        self.codec: Codec = prompts.codec

    def tokens(self, request: Request) -> int:
        return self.settings.size

    def steps(self, request: Request) -> int:
        """At most; most texts end before, and most blocks take fewer."""
        prompt, size = self.prompts.of(request), self.settings.size
        before = len(prompt.ids) // size
        blocks = math.ceil((len(prompt.ids) + prompt.limit) / size) - before
        return max(1, before + blocks * (self._algorithm(request).most_steps(size) + 1))

    def _algorithm(self, request: Request) -> Algorithm:
        assert request.text is not None
        if request.text.is_held:  # values are written by a form, which takes as many steps at most
            return LowConfidence()
        return algorithm_of(merged(request.text.diffusion, self.settings.defaults))

    @torch.no_grad()
    def run(self, items: Sequence[Item]) -> list[bool]:
        begun = drafts = [state.draft or self._begun(state) for state, _ in items]
        rows = self._rows(drafts)
        active = [(row, state) for row, (state, _) in zip(rows, items, strict=True) if row is not None]
        if active:
            spans = [row.span(self.settings.size) for row, _ in active]
            layout = self.model.pack(spans, self.settings.size)
            logits, made = self.settings.team.together(lambda: self.model(layout, self.pool))
            updates = iter(self._updates(active, logits, made))
            drafts = [next(updates) if row else draft for row, draft in zip(rows, drafts, strict=True)]
        for (state, _), old, new in zip(items, begun, drafts, strict=True):
            self._hand_over(state, old, new)
        return [draft.finish is not None for draft in drafts]

    def _begun(self, state: State) -> Draft:
        assert state.prompt is not None
        ids, limit, suffix = state.prompt.ids, state.prompt.limit, state.prompt.suffix
        size, mask = self.settings.size, self.codec.mask
        whole = len(ids) // size * size
        given = ids[whole:]
        canvas = Canvas((*given, *[mask] * (size - len(given))), mask, len(given))
        if suffix:
            end = len(given) + limit
            known = (*given, *[mask] * limit, *suffix)
            canvas = replace(canvas, tokens=(*known, *[mask] * (size - len(known))), end=end)
        draft = Draft(limit, len(ids), ids[:whole], _chain((), ids[:whole], size), canvas, self._algorithm(state.request))
        draft = replace(draft, full="stop") if suffix else draft
        if state.prompt.grammar is not None:
            forced, form = Form.of(state.prompt.grammar, limit).forced()
            draft = self._formed(draft, form, [(token, None) for token in forced], state, logs=None)
            return self._written(replace(draft, full="stop"), 0, state)
        if state.prompt.predicted:
            draft = replace(draft, prediction=Prediction(state.prompt.predicted)).predicted()
        return draft if limit else replace(draft, finish="length")

    # ------------------------------------------------------------------------------------------------------ before a forward
    def _rows(self, drafts: Sequence[Draft]) -> list[Row | None]:
        """What each computes now, within the step's budget; the first one always does something."""
        room = max(1, self.settings.batch_tokens // self.settings.size)
        claimed: set[bytes] = set()
        rows: list[Row | None] = []
        for draft in drafts:
            row = None if draft.finish is not None else self._row(draft, room, claimed)
            if row is not None:
                room -= row.new + row.is_active
                claimed.update(draft.chain[len(row.pages) : len(row.pages) + row.new])
            rows.append(row)
        return rows

    def _row(self, draft: Draft, room: int, claimed: set[bytes]) -> Row | None:
        schedule = self.settings.schedule
        pages = tuple(self.pool.find(draft.chain))
        missing = len(draft.chain) - len(pages)
        if room <= 0 or (missing and draft.chain[len(pages)] in claimed):
            return None
        new = min(missing, room, schedule.prefill_blocks or missing)
        is_active = new == missing and new < room and (schedule.fuses or not missing)
        places = tuple(draft.algorithm.places(draft.canvas)) if is_active else ()
        return Row(draft, pages, new, places, is_active)

    # ------------------------------------------------------------------------------------------------------- after a forward
    def _updates(self, active: Sequence[tuple[Row, State]], logits: Tensor, made: Sequence[tuple[Tensor, Tensor]]) -> list[Draft]:
        """Each draft after the forward; then its finished blocks are kept, and the first draft's not given up for others."""
        refined = self._refined(active, logits)
        updated: list[Draft] = []
        keep: list[tuple[bytes, int]] = []
        start = 0
        for (row, state), own in zip(active, refined, strict=True):
            keep += [(key, start + i) for i, key in enumerate(row.draft.chain[len(row.pages) : len(row.pages) + row.new])]
            draft, is_kept = self._advanced(row, own)
            start += row.new
            if is_kept:
                keep.append((draft.chain[len(row.draft.chain)], start))
            start += row.is_active
            known = len(row.pages) + row.new + is_kept
            updated.append(self._written(draft, known * self.settings.size, state))
        size = self.settings.size
        for draft in updated:
            self.pool.touch(draft.chain)
        self.pool.protect(updated[0].chain)
        for key, block in keep:
            self.pool.write(key, slice(block * size, (block + 1) * size), made)
        return updated

    def _refined(self, active: Sequence[tuple[Row, State]], logits: Tensor) -> list[Draft]:
        """Each draft with what its logits make of the active block; what else the forward did for it is not in there."""
        logits[:, self.codec.mask] = -torch.inf
        parts: list[Tensor] = []
        memories: list[Any] = []
        for (row, state), own in zip(active, logits.split([len(row.places) for row, _ in active]), strict=True):
            text = state.request.text
            assert text is not None
            draft, adjusted, memory = row.draft, own, None
            if row.is_active:
                adjusted, memory = draft.algorithm.adjust(draft.canvas, row.places, _biased(own, text, draft))
            parts.append(adjusted)
            memories.append(memory)
        logs = torch.cat(parts).log_softmax(-1)
        best = logs.max(-1)
        tokens, values = best.indices.tolist(), best.values.tolist()
        refined: list[Draft] = []
        end = 0
        for (row, state), memory in zip(active, memories, strict=True):
            start, end = end, end + len(row.places)
            draft = row.draft
            if row.is_active and draft.form is not None:
                draft = self._read(row, state, draft.form, logs[start:end])
            elif row.is_active:
                own_tokens, own_values = self._drawn(row, state, logs[start:end], tokens[start:end], values[start:end])
                choice = _choice(row, memory, own_tokens, own_values)
                draft = self._chosen(draft, choice, self._told(row, state, choice, logs[start:end]))
            refined.append(draft)
        return refined

    def _chosen(self, old: Draft, choice: Choice, infos: dict[int, TokenInfo]) -> Draft:
        """The draft after a choice."""
        canvas = replace(old.canvas, tokens=choice.tokens, step=old.canvas.step + 1, memory=choice.memory)
        draft = replace(old, edits=old.edits + old.canvas.edits(choice.tokens))
        if old.prediction is not None and (choice.is_done or not old.algorithm.edits):
            draft = replace(draft, prediction=old.prediction.counted(choice.tokens, len(old.settled)))
        if infos:
            draft = replace(draft, infos=tuple({**dict(old.infos), **infos}.items()))
        draft = draft.filled(choice.tokens) if choice.is_done else replace(draft, canvas=canvas)
        return draft.predicted() if choice.is_done or not old.algorithm.edits else draft

    def _read(self, row: Row, state: State, form: Form, logs: Tensor) -> Draft:
        """The draft after a forward whose text a grammar holds."""
        text, old = state.request.text, row.draft
        assert text is not None
        threshold = merged(text.diffusion, self.settings.defaults).threshold
        first = len(old.settled) + row.places[0]

        def pick(scores: Tensor, mask: int) -> int:
            if text.temperature:
                noise = uniform(state.seed, first + mask, old.canvas.step)
                token = int(draw(scores.log_softmax(-1)[None], text.temperature, text.top_p, [noise])[0])
                if scores[token] > -torch.inf:
                    return token
            return int(scores.argmax())

        reading = Reading(logs, LowConfidence().threshold if threshold is None else threshold, pick)
        made, form = form.filled(reading)
        return self._formed(old, form, made, state, logs)

    def _formed(
        self, old: Draft, form: Form, made: Sequence[tuple[int, float | None]], state: State, logs: Tensor | None
    ) -> Draft:
        """A draft whose grammar has made some tokens. logs: (masks, vocabulary), what those with a log-probability came from"""
        count = state.request.text.logprobs if state.request.text else None
        infos = dict(old.infos)
        for index, (token, value) in enumerate(made if count is not None else ()):
            top = self._top(logs[index], count or 0) if logs is not None and value is not None else ()
            word = self.codec.decode([token])
            infos[len(old.certain) + index] = TokenInfo(token, word, value or 0.0, old.canvas.step, top)
        canvas = replace(old.canvas, step=old.canvas.step + (logs is not None))
        draft = replace(old, form=form, infos=tuple(infos.items()), canvas=canvas)
        return draft.filled((*old.certain[len(old.settled) :], *(token for token, _ in made)))

    def _drawn(
        self, row: Row, state: State, logs: Tensor, tokens: list[int], values: list[float]
    ) -> tuple[list[int], list[float]]:
        """Tokens and their log-probabilities: the likeliest as they are, or drawn at the request's temperature."""
        text = state.request.text
        assert text is not None
        if not text.temperature or not row.places:
            return tokens, values
        first, step = len(row.draft.settled), row.draft.canvas.step
        noise = [uniform(state.seed, first + place, step) for place in row.places]
        drawn = draw(logs, text.temperature, text.top_p, noise)
        return drawn.tolist(), logs.gather(1, drawn[:, None])[:, 0].tolist()

    def _told(self, row: Row, state: State, choice: Choice, logs: Tensor) -> dict[int, TokenInfo]:
        """Of each place that has another token now, or one that was proposed and has been left as it is."""
        count = state.request.text.logprobs if state.request.text else None
        if count is None:
            return {}
        told = {}
        first, canvas, known = len(row.draft.settled), row.draft.canvas, dict(row.draft.infos)
        for index, place in enumerate(row.places):
            token = choice.tokens[place]
            if token == canvas.mask or (token == canvas.tokens[place] and first + place in known):
                continue
            value, top = logs[index, token].item(), self._top(logs[index], count)
            told[first + place] = TokenInfo(token, self.codec.decode([token]), value, canvas.step, top)
        return told

    def _top(self, logs: Tensor, count: int) -> tuple[tuple[int, str, float], ...]:
        """The likeliest tokens. logs: (vocabulary,)"""
        top = logs.topk(count)
        each = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return tuple((i, self.codec.decode([i]), value) for i, value in each)

    def _advanced(self, row: Row, refined: Draft) -> tuple[Draft, bool]:
        """The draft after a forward, and whether the forward's own keys and values are those of its finished block."""
        old = row.draft
        size = self.settings.size
        cached = min(len(row.pages) * size, old.prompt_tokens) if old.cached < 0 else old.cached
        draft = replace(refined, forwards=old.forwards + 1, commits=old.commits + (not row.is_active), cached=cached)
        return draft, draft.settled[len(old.settled) :][:size] == old.canvas.tokens

    def _written(self, draft: Draft, known: int, state: State) -> Draft:
        """Hand tokens that are certain to the writer, until the text ends. known: positions that are in the pool now."""
        text = state.request.text
        assert text is not None
        certain = draft.settled if draft.algorithm.edits else draft.certain
        if not self.settings.schedule.ends_early and draft.form is None:
            certain = draft.settled[:known]
        infos = dict(draft.infos)
        writer, words, told, written, finish = draft.writer, draft.text, list(draft.told), draft.written, None
        for position in range(draft.prompt_tokens + written, len(certain)):
            token = certain[position]
            if token in self.codec.ends and not text.ignore_eos:
                finish = "stop"
                break
            written += 1
            before = len(words) + len(writer.held)
            writer, piece, is_stopped = writer.push(token, self.codec, text.stop)
            words += piece
            if position in infos:
                info = infos.pop(position)
                ends = len(words) + len(writer.rest(self.codec)[0])
                told.append(replace(info, start=max(before, ends - len(info.text))))
            if is_stopped or written == draft.limit:
                finish = "stop" if is_stopped else draft.full
                break
        if finish is None and draft.form is not None and draft.form.is_ended:
            finish = draft.full
        if finish is not None:
            rest, is_stopped = writer.rest(self.codec, text.stop)
            words, finish = words + rest, "stop" if is_stopped else finish
        left = tuple(infos.items())
        return replace(draft, writer=writer, text=words, told=tuple(told), written=written, infos=left, finish=finish)

    def _hand_over(self, state: State, old: Draft, new: Draft) -> None:
        """Keep the draft, and leave for the worker what is new of the text, and all of it at its end."""
        shown, told = (len(old.text), len(old.told)) if state.draft else (0, 0)
        every = state.request.preview_every
        if every and new.refinements > old.refinements and new.refinements % every == 0:
            state.text_preview = preview(old, new, state, self.codec)
        if len(new.text) > shown or len(new.told) > told:
            state.chunk = Chunk(state.request.id, state.index, shown, new.text[shown:], new.told[told:])
        if new.finish is not None:
            state.text = TextResult(new.text, new.finish, new.usage(), new.told)
        state.draft = new


# ----------------------------------------------------------------------------------------------------------------- maths
def draw(logs: Tensor, temperature: float, top_p: float, noise: Sequence[float]) -> Tensor:
    """Tokens by inverse transform, one number in [0, 1) each. logs: (rows, vocabulary) log-probabilities without temperature;
    top_p: the smallest set of tokens that has this much probability, at this temperature -> (rows,) int64"""
    weights = (logs / temperature).softmax(-1)
    order = None
    if top_p < 1:
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        weights = weights.masked_fill(weights.cumsum(-1) - weights >= top_p, 0.0)
    sums = weights.double().cumsum(-1)
    target = torch.tensor(noise, dtype=torch.float64, device=logs.device)[:, None] * sums[:, -1:]
    places = torch.searchsorted(sums, target, right=True).clamp_(max=logs.shape[1] - 1)
    return (places if order is None else order.gather(1, places))[:, 0]


def _biased(logits: Tensor, text: TextParams, draft: Draft) -> Tensor:
    """logit_bias, and penalties for the tokens the text has so far."""
    shifts = dict(text.logit_bias)
    if text.frequency_penalty or text.presence_penalty:
        counts: dict[int, int] = {}
        for token in draft.certain[draft.prompt_tokens :]:
            counts[token] = counts.get(token, 0) + 1
        for token, count in counts.items():
            shifts[token] = shifts.get(token, 0.0) - count * text.frequency_penalty - text.presence_penalty
    if not shifts or not len(logits):
        return logits
    ids = torch.tensor(list(shifts), device=logits.device)
    return logits.index_add(1, ids, logits.new_tensor([list(shifts.values())]).expand(len(logits), -1))


def _choice(row: Row, memory: Any, tokens: Sequence[int], values: Sequence[float]) -> Choice:
    """What a row's algorithm makes of its candidates: tokens and their log-probabilities."""
    draft = row.draft
    candidates = [Candidate(*each) for each in zip(row.places, tokens, map(math.exp, values), strict=True)]
    choice = draft.algorithm.choose(replace(draft.canvas, memory=memory), candidates)
    if draft.prediction is not None and not draft.algorithm.edits:
        choice = draft.prediction.agreed(draft.canvas, choice, candidates)
    return choice


def _chain(chain: tuple[bytes, ...], ids: Sequence[int], size: int) -> tuple[bytes, ...]:
    for start in range(0, len(ids), size):
        chain = (*chain, chained(chain[-1] if chain else b"", ids[start : start + size]))
    return chain
