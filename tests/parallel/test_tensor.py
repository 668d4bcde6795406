"""Models of text whose weights are split over ranks: the same logits, and an end to all of them together."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import ProcessGroupGloo, TCPStore  # type: ignore[attr-defined]

from stepwell import DiffGenerator
from stepwell.cli.main import main
from stepwell.config.schema import EngineOptions
from stepwell.engine.local import LocalEngine
from stepwell.engine.remote import RemoteEngine
from stepwell.engine.steps import StepExecutor
from stepwell.models import llada2, sdar
from stepwell.models.block_causal import BlockCausal
from stepwell.ops.spans import Span
from stepwell.parallel.ranks import Ranks
from stepwell.parallel.team import Team
from stepwell.types import Chunk, Done, Failed, Request, SamplingParams, TextParams, replace
from stepwell.weights.reader import Safetensors
from tests.parallel.test_ranks import followers
from tests.support.llada2 import TINY, dense_logits, random_tensors, text_repository, write_model
from tests.support.ranks import Spoiled, ranked_engine
from tests.text.test_sdar import VARIANTS, reference, written

SIZE = 4  # of a block
LAYOUTS = {
    "groups of experts": {},
    "no shared expert": {"num_shared_experts": 0, "first_k_dense_replace": 0},
    "dense": {"first_k_dense_replace": 3},
    "many heads, tied": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8, "rotary_dim": 4,
                         "tie_word_embeddings": True},
}  # fmt: skip


def teams(size: int) -> list[Team]:
    """On one thread each they may be used at the same time."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def meet(member: int) -> Team:
        store = TCPStore("127.0.0.1", server.port, is_master=False)
        group: Any = ProcessGroupGloo(store, member, size)
        return Team(member=member, group=group, tensor=size)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(meet, range(size)))


def logits_of(model: BlockCausal, ids: list[int], known: int) -> torch.Tensor:
    """Of the last block, with `known` blocks before it in the pool and the others new."""
    pool = model.pool(8, SIZE)
    for block in range(known):
        span = Span(ids[block * SIZE : (block + 1) * SIZE], range(block))
        _, made = model(model.pack([span], SIZE), pool)
        pool.write(bytes([block]), slice(0, SIZE), made)
    pages = pool.find([bytes([block]) for block in range(known)])
    rest = ids[known * SIZE :]
    logits, _ = model(model.pack([Span(rest, pages, range(len(rest) - SIZE, len(rest)))], SIZE), pool)
    return logits


@pytest.mark.parametrize("changes", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("size", [2, 4])
def test_parts_make_the_logits_of_the_whole(tmp_path: Path, changes: dict[str, Any], size: int) -> None:
    config = {**TINY, **changes}
    if config["num_key_value_heads"] % size:
        pytest.skip("so many heads are not split into so many parts")
    tensors = random_tensors(config)
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    path = write_model(tmp_path, config, tensors)
    ids = torch.randint(0, config["vocab_size"], (5 * SIZE,), generator=torch.Generator().manual_seed(1)).tolist()
    wanted = dense_logits(tensors, config, ids, SIZE)[-SIZE:]
    whole = llada2.load(llada2.read_config(config), Safetensors(path), torch.float32, "cpu")

    def on_a_rank(team: Team) -> tuple[int, list[torch.Tensor]]:
        model = llada2.load(llada2.read_config(config), Safetensors(path), torch.float32, "cpu", team)
        parameters = sum(parameter.numel() for name, parameter in model.blocks.named_parameters() if "norm" not in name)
        return parameters, [logits_of(model, ids, known) for known in (0, 3)]

    with ThreadPoolExecutor(size) as pool:
        made = list(pool.map(on_a_rank, teams(size)))
    for known, got in enumerate(zip(*(logits for _, logits in made), strict=True)):
        assert all(torch.equal(got[0], other) for other in got[1:]), "ranks would go on differently"
        assert (got[0].double() - wanted).abs().max() <= 1e-5 * wanted.abs().max(), known
    parameters = sum(parameter.numel() for name, parameter in whole.blocks.named_parameters() if "norm" not in name)
    routers = sum(parameter.numel() for name, parameter in whole.blocks.named_parameters() if "router" in name)
    assert all(part - routers == (parameters - routers) // size for part, _ in made)


@pytest.mark.parametrize("changes", [VARIANTS["dense"], VARIANTS["experts"]], ids=["dense", "experts"])
def test_sdar_in_parts(tmp_path: Path, changes: dict[str, Any]) -> None:
    config, theirs = reference(changes)
    source = Safetensors(written(tmp_path, config, theirs))
    ids = list(range(3, 3 + 3 * SIZE))
    wanted = logits_of(sdar.load(sdar.read_config(config), source, torch.float32, "cpu"), ids, 1)

    def on_a_rank(team: Team) -> torch.Tensor:
        return logits_of(sdar.load(sdar.read_config(config), source, torch.float32, "cpu", team), ids, 1)

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(on_a_rank, teams(2))
    assert torch.equal(one, other) and (one - wanted).abs().max() <= 1e-5 * wanted.abs().max()


# ------------------------------------------------------------------------------------------------------------- engines
TEXTS = ("hello there", "a", "what is this? " * 4)
SAMPLED: dict[str, Any] = {"raw": True, "max_tokens": 40, "temperature": 0.8, "seed": 3, "logprobs": 2}


def asked(number: int) -> Request:
    return Request(TEXTS[number], SamplingParams(seed=3, num_outputs=1), id=f"text-{number}",
                   text=TextParams(max_tokens=40, temperature=0.8, logprobs=2))  # fmt: skip


def outcomes(engine: LocalEngine, requests: list[Request]) -> list[Any]:
    """The outputs of each, which run at the same time."""
    engine.open()
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda one: list(engine.stream(one))[-1], requests))


def text_of(done: Any) -> tuple[str, Any]:
    assert isinstance(done, Done), done
    return done.outputs[0].text.text, done.outputs[0].text.tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_repository(tmp_path_factory.mktemp("model"))


def test_texts_are_those_of_one_rank_and_a_batch_is_each_alone(model: Path) -> None:
    with DiffGenerator.from_pretrained(model, threads=1) as generator:
        wanted = [generator.generate(text, **SAMPLED)[0] for text in TEXTS]
    engine = ranked_engine(2, model_path=str(model), tp_size=2)
    together = [text_of(done) for done in outcomes(engine, [asked(number) for number in range(3)])]
    alone = [text_of(outcomes(engine, [replace(asked(number), id=f"alone-{number}")])[0]) for number in range(3)]
    engine.shut()
    assert [text for text, _ in together] == [one.text for one in wanted]
    assert together == alone, "bits of probabilities, too"


def test_an_error_of_one_rank_fails_the_request_and_nothing_else(model: Path) -> None:
    def spoil(stage: Any) -> Callable[[], None]:
        layer = stage.model.blocks[1].mlp.layer

        def fail(*_: Any) -> None:
            raise MemoryError("no room")

        layer.forward = fail
        return lambda: layer.__dict__.pop("forward")

    def watch(worker: StepExecutor, ranks: Ranks) -> StepExecutor:
        return Spoiled(worker, spoil) if ranks.rank == 1 else worker

    engine = ranked_engine(2, watch, model_path=str(model), tp_size=2)
    (failed,) = outcomes(engine, [asked(0)])
    assert isinstance(failed, Failed) and failed.message == "part 1 of 2: MemoryError: no room"
    (fine,) = outcomes(engine, [replace(asked(0), id="again")])
    assert isinstance(fine, Done)
    engine.shut()


def test_processes_by_the_command_line(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model-path", str(model), "--prompt", "hello there", "--max-tokens", "40", "--seed", "3", "--threads", "1"]
    assert main(["generate", *flags]) == 0
    one = capsys.readouterr().out
    assert main(["generate", *flags, "--tp-size", "2", "--trust-remote-code"]) == 0
    assert capsys.readouterr().out == one
    assert main(["doctor", str(model), "--tp-size", "2"]) == 0
    assert "tp_size" in capsys.readouterr().out


def test_what_a_lost_rank_was_doing_is_done_again(model: Path) -> None:
    async def test() -> None:
        engine = RemoteEngine(EngineOptions(model_path=str(model), tp_size=2, threads=1))
        await engine.start()
        request = replace(asked(2), text=replace(asked(2).text, max_tokens=150, ignore_eos=True))
        wanted = [event async for event in engine.generate(request)][-1]
        killed, last = 0, None
        async for event in engine.generate(replace(request, id="again")):
            last = event
            if isinstance(event, Chunk) and not killed:
                assert engine._child is not None
                (killed,) = followers(engine._child.process.pid)
                os.kill(killed, signal.SIGKILL)
        assert killed and isinstance(wanted, Done) and isinstance(last, Done)
        assert last.outputs[0].text.text == wanted.outputs[0].text.text
        await engine.close()

    asyncio.run(asyncio.wait_for(test(), 180))


def test_what_can_not_be_is_refused(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*flags: str) -> str:
        assert main(["generate", "--prompt", "a star", *flags]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    text = ("--model-path", str(model))
    assert "tp_size = 4: must divide the model's 2 key heads" in refused(*text, "--tp-size", "4")
    assert "tp_size = 2: takes num_gpus of as many; it is 3" in refused(*text, "--tp-size", "2", "--num-gpus", "3")
    assert "num_gpus = 2: LLaDA2MoeModelLM makes text" in refused(*text, "--num-gpus", "2")
    assert "tp_size = 2: is for models of text" in refused(*text, "--tp-size", "2", "--sp-degree", "2")
    assert "tp_size = 2: splits the weights of models of text only" in refused("--tp-size", "2")
    assert "tp_size = 2" in refused("--tp-size", "2", "--model-path", "stepwell/fake-image")
    assert "attention_backend = 'triton': needs a CUDA GPU or an AMD GPU" in refused(*text, "--attention-backend", "triton")
    assert "backend = 'flash': not for text models" in refused(*text, "--diffusers-attention-backend", "flash")
    assert "attention_backend = 'triton': not for this model" in refused("--attention-backend", "triton")
