"""From options, a model and a machine to a plan: every automatic choice, with its reason. Pure, and without torch."""

from __future__ import annotations

from dataclasses import dataclass

from stepwell.config.hardware import Hardware
from stepwell.config.schema import EngineOptions
from stepwell.errors import InvalidRequest, Unsupported

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
WIN = 1.3  # a kernel must be measured this much faster than the default one, so that noise never decides
MEMORY_SHARE = 0.6  # of a CPU's memory the weights may take in fp32
SATURATED_MS = {"cpu": 20.0, "cuda": 60.0}  # a step this long hides the host's own work
DEFAULT_GFLOPS = {"cpu": 50.0, "cuda": 400_000.0}


@dataclass(frozen=True, slots=True)
class Choice:
    """A value and why it was chosen."""

    value: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """How one model runs on one machine."""

    device: Choice
    dit_precision: Choice
    vae_precision: Choice
    text_encoder_precisions: tuple[Choice, ...]
    linear: Choice
    attention: Choice
    row_kernels: Choice
    threads: Choice
    batch_tokens: Choice

    def lines(self) -> list[tuple[str, str, str]]:
        """(what, value, reason) for people."""
        rows = []
        names = ("device", "dit_precision", "vae_precision", "linear", "attention", "row_kernels", "threads", "batch_tokens")
        for name in names:
            choice: Choice = {
                "device": self.device,
                "dit_precision": self.dit_precision,
                "vae_precision": self.vae_precision,
                "linear": self.linear,
                "attention": self.attention,
                "row_kernels": self.row_kernels,
                "threads": self.threads,
                "batch_tokens": self.batch_tokens,
            }[name]
            rows.append((name, choice.value, choice.reason))
        for index, choice in enumerate(self.text_encoder_precisions):
            rows.insert(3 + index, (f"text_encoder_precisions[{index}]", choice.value, choice.reason))
        return rows


def resolve(options: EngineOptions, *, parameters: int, text_encoders: int, hardware: Hardware) -> Plan:
    """Decide everything the options leave open. `parameters` are the denoiser's; `hardware` may hold measurements."""
    device = _device(options, hardware)
    dit = _dit_precision(options, parameters, device.value, hardware)
    vae = _given(options.vae_precision) or Choice(dit.value, "as the transformer")
    batch = _batch_tokens(options, parameters, device.value, dit.value, hardware)
    return Plan(
        device=device,
        dit_precision=dit,
        vae_precision=vae,
        text_encoder_precisions=_text_precisions(options, dit, text_encoders),
        linear=_linear(options, device.value, dit.value, hardware),
        attention=_attention(options, device.value, dit.value, hardware),
        row_kernels=_row_kernels(options, device.value, hardware),
        threads=_given(options.threads) or Choice(str(hardware.threads), "what torch uses by itself here"),
        batch_tokens=batch,
    )


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


def _linear(options: EngineOptions, device: str, precision: str, hardware: Hardware) -> Choice:
    if device != "cpu":
        if options.linear_backend == "packed":
            raise Unsupported("linear_backend = 'packed': oneDNN's packed weights are for CPUs", param="linear_backend")
        return Choice("torch", "vendor libraries are fastest on a GPU")
    if options.linear_backend != "auto":
        return Choice(options.linear_backend, "as asked")
    ratio = hardware.measured.get(f"packed_linear_{precision}")
    if ratio is None:
        return Choice("packed", "fuses GELU, and rows do not depend on their number; not measured here")
    if ratio * WIN < 1:
        return Choice("torch", f"packed was measured at {ratio:.2f}× of torch's speed here")
    return Choice("packed", f"measured at {ratio:.2f}× of torch's speed here, fused GELU included")


def _attention(options: EngineOptions, device: str, precision: str, hardware: Hardware) -> Choice:
    if options.attention_backend == "blocked" and device != "cpu":
        raise Unsupported("attention_backend = 'blocked': that kernel is for CPUs; use 'torch_sdpa'", param="attention_backend")
    if options.attention_backend != "auto":
        return Choice(options.attention_backend, "as asked")
    if device != "cpu":
        return Choice("torch_sdpa", "torch picks the vendor's kernel")
    ratio = hardware.measured.get(f"blocked_attention_{precision}")
    if ratio is not None and ratio >= WIN:
        return Choice("blocked", f"measured at {ratio:.2f}× of torch_sdpa's speed here")
    if ratio is not None:
        return Choice("torch_sdpa", f"blocked was measured at {ratio:.2f}× of its speed here; it takes {WIN}× to win")
    return Choice("torch_sdpa", "not measured here")


def _row_kernels(options: EngineOptions, device: str, hardware: Hardware) -> Choice:
    """plain, compiled or triton: the norms, modulation, gated sums and rotations between linears and attention."""
    fused, param = options.fused_kernels, "fused_kernels"
    if fused == "on" and options.enable_torch_compile:
        raise InvalidRequest("fused_kernels = 'on': enable_torch_compile = True does the same work; ask for one", param=param)
    if fused == "on" and device != "cuda":
        raise Unsupported("fused_kernels = 'on': Triton kernels are for CUDA GPUs; use 'auto' or 'off'", param=param)
    if fused == "on" and hardware.triton is None:
        raise Unsupported("fused_kernels = 'on': Triton is not installed (pip install triton); use 'auto' or 'off'", param=param)
    if options.enable_torch_compile:
        gain = "measured at 0.85 to 1.06× of eager's speed on a CPU" if device == "cpu" else "not measured on a GPU"
        return Choice("compiled", f"as asked; {gain}")
    if device != "cuda":
        return Choice("plain", "on a CPU compiled ones were measured at 0.85 to 1.06× of its speed")
    if fused == "off":
        return Choice("plain", "as asked")
    if hardware.triton is None:
        return Choice("plain", "Triton is not installed")
    found = "as asked" if fused == "on" else f"Triton {hardware.triton} is there"
    return Choice("triton", f"{found}; used if they pass a trial against eager PyTorch at load")


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
