"""Several ranks by their options: how many share a sequence or a model's weights, in which way, and what does not go with it."""

from __future__ import annotations

from collections.abc import Sequence

from stepwell.config.attention import SLIDING, SPARSE, Shape
from stepwell.config.choice import Choice
from stepwell.config.schema import EngineOptions
from stepwell.errors import InvalidRequest, Unsupported

MERGED = "torch_sdpa"  # the kernel whose results for some of the keys can be put together


def degrees(options: EngineOptions) -> tuple[int, int]:
    """How many ranks swap heads, and how many such rows there are in a ring: ulysses_degree and ring_degree, which make
    sp_degree. Raises InvalidRequest where they do not."""
    whole, ulysses, ring = options.sp_degree, options.ulysses_degree, options.ring_degree
    if whole is None:
        return ulysses or 1, ring or 1
    if ulysses is None:
        ulysses = whole if ring is None else max(1, whole // ring)
    if ring is None:
        ring = max(1, whole // ulysses)
    if ulysses * ring != whole:
        raise InvalidRequest(
            f"sp_degree = {whole}: must be ulysses_degree x ring_degree, which are {ulysses} and {ring}", param="sp_degree"
        )
    return ulysses, ring


def check_ranks(options: EngineOptions) -> None:
    """Refuse ways to spread what is computed that need more ranks than num_gpus, or another number of them."""
    ulysses, ring = degrees(options)
    if options.tp_size > 1 and options.num_gpus != options.tp_size:
        raise InvalidRequest(
            f"tp_size = {options.tp_size}: takes num_gpus of as many; it is {options.num_gpus}", param="tp_size"
        )  # fmt: skip
    if options.tp_size > 1 and (ulysses * ring > 1 or options.enable_cfg_parallel):
        raise InvalidRequest(
            f"tp_size = {options.tp_size}: is for models of text, which take no sp_degree and no enable_cfg_parallel",
            param="tp_size",
        )
    if options.num_gpus % (ulysses * ring):
        raise InvalidRequest(
            f"sp_degree = {ulysses * ring}: takes num_gpus of as many, or of several times as many; it is {options.num_gpus}",
            param="sp_degree",
        )
    if options.vae_sp and options.num_gpus == 1:
        raise InvalidRequest("vae_sp = True: takes num_gpus of 2 or more", param="vae_sp")
    if options.enable_cfg_parallel and options.num_gpus == ulysses * ring:
        raise InvalidRequest(
            f"enable_cfg_parallel = True: takes num_gpus of {2 * options.num_gpus} or more", param="enable_cfg_parallel"
        )


def check_kind(options: EngineOptions, architecture: str | None) -> None:
    """Refuse what is for models of another kind. `architecture`: of a model of texts, None for pictures and videos."""
    if architecture is None and options.tp_size > 1:
        raise Unsupported(
            f"tp_size = {options.tp_size}: splits the weights of models of text only; pictures and videos take num_gpus, "
            "sp_degree and enable_cfg_parallel",
            param="tp_size",
        )
    if architecture is not None and options.num_gpus != options.tp_size:
        raise Unsupported(
            f"num_gpus = {options.num_gpus}: {architecture} makes text, which several ranks make by parts of its weights: "
            f"give tp_size = {options.num_gpus}",
            param="num_gpus",
        )


def merging(options: EngineOptions) -> Choice | None:
    """The transformer's kernel where none is asked for, if keys and values have to be seen part by part."""
    return Choice(MERGED, "a ring puts together what is seen of parts of the keys") if degrees(options)[1] > 1 else None


def check_sequence(options: EngineOptions, shape: Shape | None, kernels: Sequence[str]) -> None:
    """Refuse what does not go with a sequence that is cut. `kernels`: of the transformer's layers."""
    ulysses, ring = degrees(options)
    if shape is not None and shape.heads % ulysses:
        raise InvalidRequest(
            f"ulysses_degree = {ulysses}: must divide the {shape.heads} attention heads; ring_degree may be any number",
            param="ulysses_degree",
        )
    for name in kernels:
        if ulysses * ring > 1 and name in (*SLIDING, *SPARSE):
            raise Unsupported(
                f"attention backend {name} with sp_degree = {ulysses * ring}: its pattern needs whole sequences; "
                "choose 'torch_sdpa' or another dense one",
                param="attention_backend",
            )
        if ring > 1 and name != MERGED:
            raise Unsupported(
                f"attention backend {name} with ring_degree = {ring}: its results for parts of the keys can't be put together; "
                f"choose {MERGED!r}, or ulysses_degree",
                param="attention_backend",
            )
