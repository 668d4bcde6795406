"""Text from an engine whose process dies: its owner sees every character and every token once."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from stepwell.config.schema import EngineOptions
from stepwell.engine.remote import RemoteEngine
from stepwell.types import Chunk, Done, Request, SamplingParams, TextParams
from tests.support.llada2 import byte_ids, text_repository


def test_tokens_come_once_though_the_process_dies(tmp_path: Path) -> None:
    options = EngineOptions(model_path=str(text_repository(tmp_path / "model")), threads=1)
    text = TextParams(prompt_ids=tuple(byte_ids("Once upon a time")), max_tokens=160, ignore_eos=True, logprobs=0)

    async def run() -> tuple[list[Chunk], Done, int]:
        engine = RemoteEngine(options)
        await engine.start()
        chunks: list[Chunk] = []
        done = None
        try:
            async for event in engine.generate(Request("", SamplingParams(seed=1), text=text)):
                if isinstance(event, Chunk):
                    chunks.append(event)
                    if len(chunks) == 8 and engine._child is not None:
                        os.kill(engine._child.process.pid, signal.SIGKILL)
                elif isinstance(event, Done):
                    done = event
            assert done is not None
            return chunks, done, engine.restarts
        finally:
            await engine.close()

    chunks, done, restarts = asyncio.run(run())
    result = done.outputs[0].text
    assert restarts == 1 and result is not None and result.usage.prompt_tokens == 16
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert [token.id for chunk in chunks for token in chunk.tokens] == [token.id for token in result.tokens]
    assert len(result.tokens) == 160
