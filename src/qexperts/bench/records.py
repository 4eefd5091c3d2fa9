"""One flat JSON object per measurement; every table and plot is a view of these.

A record is written the moment it is measured, so an interrupted run keeps what it has.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

from .model_records import ModelRecord

SCHEMA = 1


@dataclasses.dataclass
class Record:
    """One measured (or refused) configuration.

    Times are milliseconds, sizes bytes, rates 1e12 FLOP/s and 1e9 B/s. `None` means "does not apply"
    or "not measured here"; a number that was not measured does not exist.
    """

    # what was asked
    kind: str  # "prefill" | "decode" | "layer"
    distribution: str  # name or file of the token distribution
    scaled: str | None  # how the workload differs from the recorded one, None when it does not
    num_experts: int
    active_experts: int
    total_tokens: int  # S: rows over all experts
    max_tokens: int  # rows of the largest expert
    num_tokens_per_expert: list[int]  # the distribution itself; layer: what each layer's counts are drawn from
    n: int  # layer: N and K are those of w_gate_up, 2I and H
    k: int
    group_size: int | None
    format: str
    dtype: str  # of the activations: "bf16" | "fp16" | "fp32"
    seed: int
    # who did it and how
    provider: str  # "torch"; "fused": kernels on packed weights; "triton", "hopper": of that backend; a peer's name
    # "per_expert" | "pad_and_clip" | "full_pad" | "grouped" | "auto": the public call; layer: how the model calls
    strategy: str
    threshold: int | None  # of pad_and_clip
    scope: str  # "base mm": weights dequantized before the clock; "base+deq": inside it; "fused"
    gather: str | None  # small experts' weights made contiguous "before" or "inside" the clock
    graph: bool  # replayed from a CUDA graph
    api: str  # "raw": launcher on preallocated buffers; "wrapper": the public call
    weight_layout: str  # "public" | "prepared"
    phase: str | None = None  # "decode" | "prefill" | "auto" (by the counts); None: no such choice
    scale_dtype: str | None = None  # of the scales; in older records None: that of the activations
    activation_format: str | None = None  # "int8": activations rounded by row and group; "q8_0": by row and 32 of k
    config: str | None = None  # of the kernel: tile sizes; of a peer: its version and configuration
    batch: int | None = None  # decode: tokens
    top_k: int | None = None  # decode: experts per token
    step: str | None = None  # layer: "prefill" | "decode"; times and sizes are those of one such step of all layers
    layers: int | None = None
    decode_steps: int | None = None  # layer: a sample is the mean of as many, and so are active experts and bytes
    decode_threshold: int | None = None  # layer: rows per expert up to which a call that looks at counts is a decode
    threads: int | None = None  # CPU: asked for beside others; None: as many as `device` says
    # what was counted
    launches: int | None = None  # GEMM launches
    schedule_launches: int | None = None  # making or restoring tile schedules
    dequant_launches: int | None = None
    gather_launches: int | None = None  # weight gathers
    pad_launches: int | None = None
    scatter_launches: int | None = None  # unpadding
    padded_rows: int | None = None
    plan_ms: float | None = None  # planning, from counts on the device to launches; None where the time contains it
    # what was measured
    rounds: int = 0  # samples asked for; an interrupted run has fewer
    flush: str = "write"  # of the caches, before each sample; "read", "write+read": `timing.py`; older records: "write"
    status: str = "ok"  # "ok" | "WRONG" | "unsupported"
    reason: str | None = None  # why, when status is not "ok"
    error: float | None = None  # RMS error against the oracle (x as it is), relative to the oracle's RMS
    error_peer: float | None = None  # the same of torch in the working dtype
    samples_ms: list[float] = dataclasses.field(default_factory=list)  # by round: the i-th of a run belong together
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    peak_bytes: int | None = None  # device memory beyond x and weights: result, scratch, gathered weights
    schedule_ms: float | None = None  # GPU: the kernel that makes the tile schedule, by itself; the time contains it
    host_us: float | None = None  # GPU: host time to issue one warmed eager call, without waiting for the device
    # what it is judged by
    flop: int = 0  # 2 S N K: useful work
    mandatory_bytes: int = 0  # codes, scales, zeros of active experts, x and y, once each
    ceiling_tflops: float | None = None  # matmul, measured on the spot
    ceiling_copy_gbps: float | None = None  # copy, bytes read plus written
    ceiling_read_gbps: float | None = None  # reading only; of a decode on a CPU: in the same rounds
    # where and when
    device: str = ""
    device_type: str = ""
    driver: str | None = None
    torch: str = ""
    triton: str | None = None
    python: str = ""
    qexperts: str = ""
    commit: str | None = None
    command: str = ""
    time: str = ""
    schema: int = SCHEMA

    @property
    def scales(self) -> str | None:
        """Dtype of the scales; None without scales."""
        return self.scale_dtype or (None if self.group_size is None else self.dtype)

    @property
    def tflops(self) -> float | None:
        """Useful work over the median time, 1e12 FLOP/s."""
        return self.flop / self.median_ms / 1e9 if self.median_ms else None

    @property
    def gbps(self) -> float | None:
        """Mandatory bytes over the median time, 1e9 B/s."""
        return self.mandatory_bytes / self.median_ms / 1e6 if self.median_ms else None

    @property
    def floor_ms(self) -> float | None:
        """The larger of arithmetic and bytes at the measured ceilings."""
        if not self.ceiling_tflops or not self.ceiling_copy_gbps:
            return None
        return max(self.flop / self.ceiling_tflops / 1e9, self.mandatory_bytes / self.ceiling_copy_gbps / 1e6)

    @property
    def roofline(self) -> float | None:
        """Fraction of the roofline reached: floor over median."""
        floor = self.floor_ms
        return floor / self.median_ms if floor and self.median_ms else None

    @property
    def read_fraction(self) -> float | None:
        """Mandatory bytes at the measured read bandwidth, over the median time."""
        if not self.ceiling_read_gbps or not self.median_ms:
            return None
        return self.mandatory_bytes / self.ceiling_read_gbps / 1e6 / self.median_ms

    def baseline_key(self) -> tuple[Any, ...]:
        """Records with equal keys share one baseline: eager `per_expert` of the same provider and scope."""
        return (
            self.kind, self.workload_key(), self.format, self.provider, self.scope, self.api, self.weight_layout,
            self.activation_format,
        )  # fmt: skip

    def workload_key(self) -> tuple[Any, ...]:
        """What was multiplied, apart from the format, where, and after which flush: times that may be compared."""
        return (
            self.distribution, tuple(self.num_tokens_per_expert), self.num_experts, self.total_tokens, self.n, self.k,
            self.group_size, self.dtype, self.scales,
            self.seed, self.batch, self.top_k, self.layers, self.decode_steps, self.step, self.device, self.torch,
            self.flush,
        )  # fmt: skip

    def config_key(self) -> tuple[Any, ...]:
        """Identity across runs: what `compare` matches on (not device, versions or time)."""
        return (
            self.kind, self.distribution, tuple(self.num_tokens_per_expert), self.num_experts, self.total_tokens,
            self.n, self.k, self.group_size, self.scales,
            self.format, self.dtype, self.seed, self.provider, self.strategy, self.threshold, self.scope, self.gather,
            self.graph, self.api, self.weight_layout, self.phase, self.batch, self.top_k, self.activation_format,
            self.threads, self.step, self.layers, self.decode_steps, self.decode_threshold,
        )  # fmt: skip

    def same_rounds(self, other: Record) -> bool:
        """Whether samples with one index were taken in one round: the same workload in the same run."""
        return (self.time, self.command, self.kind, self.distribution, self.n, self.k, self.format, self.batch) == (
            other.time, other.command, other.kind, other.distribution, other.n, other.k, other.format, other.batch,
        )  # fmt: skip

    def is_baseline(self) -> bool:
        return self.strategy == "per_expert" and not self.graph

    def to_json(self) -> str:
        """One line of strict JSON; an error that is not a number becomes null, the status says the rest."""
        fields = dataclasses.asdict(self)
        for name in ("error", "error_peer"):
            if fields[name] is not None and not math.isfinite(fields[name]):
                fields[name] = None
        return json.dumps(fields, separators=(",", ":"), allow_nan=False)


_NUMBERS = (
    "total_tokens", "n", "k", "median_ms", "p20_ms", "p80_ms", "launches", "flop", "mandatory_bytes",
    "prompt_tokens", "new_tokens", "batch", "prefill_ms", "decode_ms", "expert_bytes", "kl", "top1",
)  # fmt: skip
_OTHER_KINDS = {"model": ModelRecord}


def record_from_json(line: str, where: str) -> Any:
    """Parse one line into the class of its kind; ValueError names the file and line, and what is wrong."""
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}, column {error.colno}); expected a record") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"{where}: schema {found!r}; expected a benchmark record with schema {SCHEMA}")
    kind = _OTHER_KINDS.get(str(data.get("kind")), Record)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    missing = {
        name for name, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING
    } - data.keys()
    if missing:
        raise ValueError(f"{where}: record lacks {', '.join(sorted(missing))}")
    record = kind(**{key: value for key, value in data.items() if key in fields})
    for name in _NUMBERS:
        value = getattr(record, name, None)
        if value is not None and (not isinstance(value, (int, float)) or isinstance(value, bool)):
            raise ValueError(f"{where}: {name} is {value!r}; expected a number")
    return record


def load_all(path: str | os.PathLike[str]) -> list[Any]:
    """Read a .jsonl file of records of any kind."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; expected a file of benchmark records") from None
    return [record_from_json(line, f"{path}:{i}") for i, line in enumerate(text.splitlines(), 1) if line.strip()]


def load_records(path: str | os.PathLike[str]) -> list[Record]:
    """Read a .jsonl file of records of one multiplication each; ValueError if it holds others."""
    found = load_all(path)
    for i, record in enumerate(found, 1):
        if not isinstance(record, Record):
            raise ValueError(f"{path}: record {i} is of kind {record.kind}; expected prefill or decode")
    return found


class RecordWriter:
    """Appends records to a file, flushed one by one; earlier runs in the file are kept.

    Opening raises at once, before anything is measured: OSError if the path cannot be written, ValueError if it
    holds something other than records.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        self._file: IO[str] | None = None
        if path is not None:
            if os.path.isfile(path):
                load_all(path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  open for the whole run, see close()

    def write(self, records: Iterable[Record | ModelRecord]) -> None:
        if self._file is None:
            return
        for record in records:
            self._file.write(record.to_json() + "\n")
        self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
