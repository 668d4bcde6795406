"""From options, a model and a machine to a plan: every automatic choice, with its reason. Pure, and without torch."""

from __future__ import annotations

from dataclasses import dataclass, fields

from stepwell.config.attention import WIN, Shape, Site, check_options, choose, choose_parts
from stepwell.config.choice import Choice
from stepwell.config.hardware import Hardware
from stepwell.config.schema import EngineOptions
from stepwell.config.sequence import check_sequence, merging
from stepwell.errors import InvalidRequest, Unsupported

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MEMORY_SHARE = 0.6  # of a CPU's memory the weights may take in fp32
SATURATED_MS = {"cpu": 20.0, "cuda": 60.0}  # a step this long hides the host's own work
FP8_CAPABILITY = (8, 9)
DEFAULT_GFLOPS = {"cpu": 50.0, "cuda": 400_000.0}


@dataclass(frozen=True, slots=True)
class Plan:
    """How one model runs on one machine."""

    device: Choice
    dit_precision: Choice
    vae_precision: Choice
    text_encoder_precisions: tuple[Choice, ...]
    quantization: Choice
    linear: Choice
    attention: Choice
    attention_parts: tuple[tuple[str, Choice], ...]  # of text encoders, and of patterns of layers
    row_kernels: Choice
    threads: Choice
    batch_tokens: Choice
    offload: Choice  # the kinds of parts that are offloaded, and "layers", with commas between

    def lines(self) -> list[tuple[str, str, str]]:
        """(what, value, reason) for people."""
        named: list[tuple[str, Choice]] = []
        for name, made in ((field.name, getattr(self, field.name)) for field in fields(self)):
            if name == "attention_parts":
                named += [(f"attention of {part}", choice) for part, choice in made]
            elif name == "text_encoder_precisions":
                named += [(f"{name}[{index}]", choice) for index, choice in enumerate(made)]
            else:
                named.append((name, made))
        return [(name, choice.value, choice.reason) for name, choice in named if choice.reason]

    @property
    def offloaded(self) -> frozenset[str]:
        """Kinds of parts that rest in memory while others compute: text_encoder, vae, dit; layers are the dit's blocks."""
        return frozenset(self.offload.value.split(",")) - {"none"}


def resolve(
    options: EngineOptions,
    *,
    parameters: int,
    text_encoders: int,
    hardware: Hardware,
    shape: Shape | None = None,
    weights: int | None = None,
) -> Plan:
    """Decide everything the options leave open. `parameters` and `shape` are a denoiser's, `weights` those of all, if there are
    several; `hardware` may hold measurements."""
    device = _device(options, hardware)
    dit = _dit_precision(options, weights or parameters, device.value, hardware)
    vae = _given(options.vae_precision) or Choice(dit.value, "as the transformer")
    texts = _text_precisions(options, dit, text_encoders)
    if device.value == "cpu":
        vae, texts = _slow_half(vae), tuple(_slow_half(choice) for choice in texts)
    batch = _batch_tokens(options, parameters, device.value, dit.value, hardware)
    site = Site(device.value, dit.value, hardware, shape)
    attention = choose(options, site, merging(options))
    encoders = {name: choice.value for name, choice in zip(encoder_names(text_encoders), texts, strict=True)}
    attention_parts = choose_parts(options, encoders, site)
    kernels = [attention.value, *(choice.value for part, choice in attention_parts if part not in encoders)]
    check_options(options, kernels)
    check_sequence(options, shape, kernels)
    return Plan(
        device=device,
        dit_precision=dit,
        vae_precision=vae,
        text_encoder_precisions=texts,
        quantization=_quantization(options, device.value, hardware),
        linear=_linear(options, device.value, dit.value, hardware),
        attention=attention,
        attention_parts=attention_parts,
        row_kernels=_row_kernels(options, device.value, hardware),
        threads=_given(options.threads) or Choice(str(hardware.threads), "what torch uses by itself here"),
        batch_tokens=batch,
        offload=_offload(options, device.value),
    )


def encoder_names(count: int) -> list[str]:
    """text_encoder, text_encoder_2, … as repositories call them."""
    return ["text_encoder" if number == 1 else f"text_encoder_{number}" for number in range(1, count + 1)]


def _given(value: object) -> Choice | None:
    return None if value is None else Choice(str(value), "as asked")


def _device(options: EngineOptions, hardware: Hardware) -> Choice:
    if options.device == "cuda" and hardware.gpu is None:
        raise InvalidRequest("device = 'cuda': no CUDA GPU is visible to torch here; use 'cpu' or 'auto'", param="device")
    if options.device != "auto":
        return Choice(options.device, "as asked")
    if hardware.gpu is not None:
        return Choice("cuda", f"{hardware.gpu} is there")
    return Choice("cpu", "no CUDA GPU is visible to torch")


def _dit_precision(options: EngineOptions, parameters: int, device: str, hardware: Hardware) -> Choice:
    if options.dit_precision is not None:
        if options.dit_precision == "fp16" and device == "cpu":
            raise Unsupported("dit_precision = 'fp16': CPUs compute in fp32 or bf16; use one of those", param="dit_precision")
        return Choice(options.dit_precision, "as asked")
    if device == "cuda":
        return Choice("bf16", "the precision models are published and run in on GPUs")
    needed = parameters * BYTES["fp32"]
    if needed <= MEMORY_SHARE * hardware.memory_bytes:
        return Choice("fp32", f"{needed / 2**30:.2f} GiB of weights fit; fp32 is what diffusers computes in by default")
    return Choice("bf16", f"{needed / 2**30:.1f} GiB of fp32 weights do not fit into {hardware.memory_bytes / 2**30:.0f} GiB")


def _text_precisions(options: EngineOptions, dit: Choice, count: int) -> tuple[Choice, ...]:
    given = options.text_encoder_precisions
    if given is None:
        return (Choice(dit.value, "as the transformer"),) * count
    if len(given) not in (1, count):
        raise InvalidRequest(
            f"text_encoder_precisions = {given!r}: this model has {count} text encoders, give one value for all or {count}",
            param="text_encoder_precisions",
        )
    return tuple(Choice(precision, "as asked") for precision in (given * count if len(given) == 1 else given))


def _slow_half(choice: Choice) -> Choice:
    """Small parts may run in fp16 on a CPU; it is not fast."""
    slow = Choice(choice.value, f"{choice.reason}; on a CPU bf16 and fp32 are several times faster")
    return slow if choice.value == "fp16" else choice


def _quantization(options: EngineOptions, device: str, hardware: Hardware) -> Choice:
    """Kernels and facts: see `stepwell.quant`. A scheme the device has no fast and exact kernel for is refused."""
    asked = options.quantization
    if asked == "none":
        return Choice("none", "nothing was asked for; it would change pictures a little")
    refused = None
    if asked == "int8_dynamic" and device != "cpu":
        refused = "it is for CPUs; on a GPU use 'fp8' (compute capability 8.9 and up) or 'int8_weight_only'"
    elif asked == "int8_dynamic" and not hardware.vnni:
        refused = f"{hardware.cpu} has no VNNI, without which sums of int8 products overflow; use 'int8_weight_only'"
    elif asked == "fp8" and device == "cpu":
        refused = "CPUs emulate fp8, four times slower than bf16; use 'int8_dynamic'"
    elif asked == "fp8" and (hardware.capability is None or hardware.capability < FP8_CAPABILITY):
        has = "unknown" if hardware.capability is None else ".".join(map(str, hardware.capability))
        refused = f"it takes compute capability 8.9 or more, that of {hardware.gpu} is {has}; use 'int8_weight_only'"
    if refused is not None:
        raise Unsupported(f"quantization = {asked!r}: {refused}", param="quantization")
    return Choice(asked, "as asked, for the linears of the blocks; first and last layers and embedders keep their precision")


def _linear(options: EngineOptions, device: str, precision: str, hardware: Hardware) -> Choice:
    if device != "cpu":
        if options.linear_backend == "packed":
            raise Unsupported("linear_backend = 'packed': oneDNN's packed weights are for CPUs", param="linear_backend")
        return Choice("torch", "vendor libraries are fastest on a GPU")
    if options.dit_layerwise_offload:
        if options.linear_backend == "packed":
            raise Unsupported(
                "linear_backend = 'packed': packed weights can't leave memory, so it does not go with dit_layerwise_offload; "
                "use 'torch' or 'auto'",
                param="linear_backend",
            )
        return Choice("torch", "packed weights can't leave memory, and dit_layerwise_offload keeps them in a file")
    if options.linear_backend != "auto":
        return Choice(options.linear_backend, "as asked")
    ratio = hardware.measured.get(f"packed_linear_{precision}")
    if ratio is None:
        return Choice("packed", "fuses GELU, and rows do not depend on their number; not measured here")
    if ratio * WIN < 1:
        return Choice("torch", f"packed was measured at {ratio:.2f}× of torch's speed here")
    return Choice("packed", f"measured at {ratio:.2f}× of torch's speed here, fused GELU included")


def _offload(options: EngineOptions, device: str) -> Choice:
    """What is offloaded. The reason is empty where nobody asked."""
    parts = {
        "text_encoder": options.text_encoder_cpu_offload,
        "vae": options.vae_cpu_offload,
        "dit": options.dit_cpu_offload,
    }
    layers = ("layers",) if options.dit_layerwise_offload else ()
    asked = [kind for kind, is_asked in parts.items() if is_asked]
    if device != "cpu":
        if asked or layers:
            return Choice(",".join((*asked, *layers)), "as asked")
        idle = "pin_cpu_memory does not apply: nothing is offloaded" if options.pin_cpu_memory else ""
        return Choice("none", idle, is_warning=bool(idle))
    flags = [f"{kind}_cpu_offload" for kind in asked] + ["pin_cpu_memory"] * options.pin_cpu_memory
    idle = (
        f"{' and '.join(flags)} {'do' if len(flags) > 1 else 'does'} not apply: everything is on the CPU already" if flags else ""
    )
    if layers:
        where = "the blocks' weights are read from a file, one block ahead"
        return Choice("layers", f"{where}; {idle}" if idle else where, is_warning=bool(idle))
    return Choice("none", idle, is_warning=bool(idle))


def _row_kernels(options: EngineOptions, device: str, hardware: Hardware) -> Choice:
    """plain, compiled or triton: the norms, modulation, gated sums and rotations between linears and attention."""
    param = "fused_kernels"
    if options.fused_kernels:
        if options.enable_torch_compile:
            raise InvalidRequest("fused_kernels = True: enable_torch_compile does the same work; ask for one", param=param)
        if device != "cuda":
            raise Unsupported("fused_kernels = True: Triton kernels are for CUDA GPUs; leave it out", param=param)
        if hardware.triton is None:
            raise Unsupported("fused_kernels = True: Triton is not installed (pip install triton); leave it out", param=param)
        return Choice("triton", "as asked, and tried against eager PyTorch at load")
    if options.enable_torch_compile:
        gain = "measured at 0.85 to 1.06× of eager's speed on a CPU" if device == "cpu" else "not measured on a GPU"
        return Choice("compiled", f"as asked; {gain}")
    if device == "cpu":
        return Choice("plain", "on a CPU compiled ones were measured at 0.85 to 1.06× of its speed")
    return Choice("plain", "neither compiled nor fused kernels have been timed on a GPU yet")


def _batch_tokens(options: EngineOptions, parameters: int, device: str, precision: str, hardware: Hardware) -> Choice:
    if options.max_batch_tokens is not None:
        return Choice(str(options.max_batch_tokens), "as asked")
    measured = hardware.measured.get(f"gflops_{precision}") if device == "cpu" else None
    gflops = measured or DEFAULT_GFLOPS[device]
    tokens = max(1, int(SATURATED_MS[device] / 1e3 * gflops * 1e9 / (2 * parameters)))
    source = "measured" if measured else "assumed"
    return Choice(
        str(tokens),
        f"a step of {SATURATED_MS[device]:.0f} ms saturates the device ({gflops:.0f} GFLOP/s {source}); "
        "more would only make everyone wait",
    )
