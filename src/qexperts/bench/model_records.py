"""One flat JSON object per variant of a whole model: who runs its experts, in which format."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from .timing import percentile

__all__ = ["PHASES", "ModelRecord"]

PHASES = ("prefill", "first_token", "decode", "graph")
REFERENCE = "transformers"


@dataclasses.dataclass
class ModelRecord:
    """A model as one variant runs it. Times are milliseconds, sizes bytes; `None` means "does not apply" or "not
    measured here".

    prefill: one forward over the prompt. first_token: the same and the tokens, on the host. decode: one step, the mean
    of new_tokens in a row. graph: the same from a CUDA graph.
    """

    # what was asked
    model: str  # name of its directory, or of the architecture
    weights: str  # "checkpoint", or "random weights, seed 0"
    architecture: str
    layers: int
    expert_layers: int
    num_experts: int
    top_k: int
    hidden: int
    prompt_tokens: int
    new_tokens: int
    batch: int
    dtype: str  # of the model
    seed: int
    # who did it and how
    provider: str  # "transformers", "qexperts" or the name of a peer
    implementation: str | None  # of transformers' experts
    format: str  # of the experts' weights
    group_size: int | None
    weight_layout: str | None
    kind: str = "model"
    # what was measured
    rounds: int = 0  # samples asked for; an interrupted run has fewer
    status: str = "ok"  # "ok" | "WRONG" | "unsupported"
    reason: str | None = None  # why, when status is not "ok"
    graph_reason: str | None = None  # why there is no graph
    prefill_samples_ms: list[float] = dataclasses.field(default_factory=list)  # by round: the i-th belong together
    first_token_samples_ms: list[float] = dataclasses.field(default_factory=list)
    decode_samples_ms: list[float] = dataclasses.field(default_factory=list)
    graph_samples_ms: list[float] = dataclasses.field(default_factory=list)
    prefill_ms: float | None = None  # medians
    first_token_ms: float | None = None
    decode_ms: float | None = None
    graph_ms: float | None = None
    expert_bytes: int | None = None
    model_bytes: int | None = None
    load_peak_bytes: int | None = None  # while loading and quantizing, what stays included
    load_seconds: float | None = None
    run_peak_bytes: int | None = None  # of a prefill and a step, beyond the model
    text: str | None = None  # quality: "default", or the name of the file
    tokenizer: str | None = None  # "bytes": the text's bytes are the tokens; "model": the model's own
    text_tokens: int | None = None  # positions that were compared
    kl: float | None = None  # nats a token: KL of the next token's distribution, reference || this
    top1: float | None = None  # share of positions with the reference's likeliest token
    reference: str | None = None  # who the quality is measured against
    # where and when
    device: str = ""
    device_type: str = ""
    driver: str | None = None
    torch: str = ""
    triton: str | None = None
    transformers: str = ""
    python: str = ""
    qexperts: str = ""
    commit: str | None = None
    command: str = ""
    time: str = ""
    flush: str = ""
    schema: int = 1

    @property
    def label(self) -> str:
        """`transformers grouped_mm`, `qexperts`."""
        return " ".join(filter(None, (self.provider, self.implementation)))

    @property
    def is_reference(self) -> bool:
        return self.provider == REFERENCE

    def samples(self, phase: str) -> list[float]:
        return getattr(self, f"{phase}_samples_ms")

    def median(self, phase: str) -> float | None:
        """In ms; None unless the variant was right, and timed."""
        return percentile(self.samples(phase), 50) if self.status == "ok" and self.samples(phase) else None

    def finish(self) -> None:
        """Fill in the medians."""
        for phase in PHASES:
            setattr(self, f"{phase}_ms", self.median(phase))

    def tokens_per_second(self, phase: str) -> float | None:
        ms = self.median(phase)
        tokens = self.batch * (self.prompt_tokens if phase in ("prefill", "first_token") else 1)
        return None if ms is None else tokens / ms * 1e3

    def run_key(self) -> tuple[Any, ...]:
        """Records of one run, which share its rounds and its reference."""
        return (self.time, self.command, self.device, self.model)

    def config_key(self) -> tuple[Any, ...]:
        """Identity across runs, but for the machine and the versions."""
        return (
            self.kind, self.model, self.weights, self.architecture, self.layers, self.prompt_tokens, self.new_tokens,
            self.batch, self.dtype, self.seed, self.provider, self.implementation, self.format, self.group_size,
            self.text, self.text_tokens,
        )  # fmt: skip

    def to_json(self) -> str:
        """One line of strict JSON."""
        fields = dataclasses.asdict(self)
        for name in ("kl", "top1"):
            if fields[name] is not None and not math.isfinite(fields[name]):
                fields[name] = None
        return json.dumps(fields, separators=(",", ":"), allow_nan=False)
