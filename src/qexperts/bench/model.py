"""A whole model on this machine, unquantized and with its experts in each format: `bench model`.

All variants are held at once, so that they are timed in the same interleaved rounds: with a large model, name few
formats. Each is first checked, and what is wrong is not timed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from ..formats import WeightFormat
from ..integrations.shards import read_json
from ..integrations.tiny import NAMES, tiny_config, write_tiny
from ..integrations.transformers import from_pretrained
from ..integrations.transformers_modules import experts_modules
from ..layer import QuantExperts
from .environment import environment, pick_device
from .generation import Decode, capture, parameter_bytes
from .memory import Peak
from .model_check import NEAR, check_decode, check_experts, relative
from .model_records import REFERENCE, ModelRecord
from .quality import Text, compare_on, read_text
from .records import RecordWriter
from .timing import Rotation, Sampler, synchronize
from .workloads import select_formats

__all__ = ["ModelJob", "ModelOptions", "decode_peers", "measure_model", "model_path", "open_config", "prepare_model"]

TINY_FORMATS = "int8_sym,fp8_e4m3,int4_sym,int2_sym"
FORMATS = "int4_sym"  # of a model whose size is not known: two models in memory
ROUNDS, ROUNDS_DEVICE = 7, 20
PROMPT_TOKENS, PROMPT_TOKENS_DEVICE = 64, 512
# Who takes the prompt of an implementation of transformers' experts: batched_mm copies the weights of every slot.
PROMPTS = {"batched_mm": "grouped_mm"}
GPTQMODEL = "gptqmodel"


def decode_peers(device: torch.device) -> Sequence[str]:
    """Implementations of transformers' experts that can be the best in decode: batched_mm on GPUs only."""
    return ("grouped_mm", "eager") if device.type == "cpu" else ("grouped_mm", "batched_mm", "eager")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """What the command line asks for; None means the default, which may depend on the device.

    Attributes:
        model: a directory; tiny: a name in `NAMES`. One of them.
        text, text_tokens: file that quality is measured on, and how much of it.
    """

    model: str | None = None
    tiny: str | None = None
    formats: str | None = None
    group_size: int = 128
    prompt_tokens: int | None = None
    new_tokens: int = 16
    batch: int = 1
    text: str | None = None
    text_tokens: int = 1024
    device: str | None = None
    rounds: int | None = None
    save: str | None = None
    plot: str | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ModelJob:
    """Checked options. formats: None for a checkpoint that is quantized."""

    options: ModelOptions
    device: torch.device
    formats: Sequence[WeightFormat] | None
    prompt_tokens: int
    rounds: int
    writer: RecordWriter

    @property
    def name(self) -> str:
        return self.options.tiny or Path(str(self.options.model)).resolve().name


def prepare_model(options: ModelOptions) -> ModelJob:
    """Check every option, open the files. Raises ValueError or OSError, one line, naming the option."""
    o, device = options, pick_device(options.device)
    cpu = device.type == "cpu"
    config = open_config(o.model, o.tiny)
    for option in ("new_tokens", "batch", "text_tokens", "prompt_tokens", "rounds"):
        value = getattr(o, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} {value}: expected at least 1")
    prompt_tokens = o.prompt_tokens or (PROMPT_TOKENS if cpu else PROMPT_TOKENS_DEVICE)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and prompt_tokens + o.new_tokens > positions:
        raise ValueError(
            f"--prompt-tokens {prompt_tokens} --new-tokens {o.new_tokens}: the model has {positions} positions"
        )
    formats = None
    if getattr(config, "quantization_config", None) is None:
        formats = select_formats(o.formats or (TINY_FORMATS if o.tiny else FORMATS), "bf16")
    elif o.formats is not None:
        raise ValueError(f"--formats {o.formats}: {o.model} is quantized; it is measured as it is, without --formats")
    if o.text is not None:
        Path(o.text).read_bytes()
    if o.plot is not None:
        if importlib.util.find_spec("matplotlib") is None:
            raise ValueError("--plot: needs matplotlib; install the bench extra: pip install 'qexperts[bench]'")
        Path(o.plot).mkdir(parents=True, exist_ok=True)
    rounds = o.rounds or (ROUNDS if cpu else ROUNDS_DEVICE)
    return ModelJob(o, device, formats, prompt_tokens, rounds, RecordWriter(o.save))


def open_config(model: str | None, tiny: str | None, option: str = "--model PATH") -> Any:
    """The config of a directory or of a tiny model; ValueError unless exactly one is named, and there."""
    if (model is None) == (tiny is None):
        raise ValueError(f"give either {option} or --tiny NAME, one of {', '.join(NAMES)}")
    if tiny is not None:
        return tiny_config(tiny)
    path = Path(str(model))
    if not (path / "config.json").is_file():
        raise ValueError(f"{model}: no directory with a config.json; expected a model of transformers")
    config: Any = transformers.AutoConfig.from_pretrained(path)
    config.quantization_config = read_json(path / "config.json").get("quantization_config")
    return config


@contextlib.contextmanager
def model_path(model: str | None, tiny: str | None, seed: int, device: torch.device) -> Iterator[Path]:
    """The directory of a model; of a tiny one a temporary one that holds it."""
    with tempfile.TemporaryDirectory() as work:
        if tiny is not None:
            write_tiny(tiny, Path(work), seed, device=device)
        yield Path(work) if model is None else Path(model)


# ---- variants


@dataclasses.dataclass
class _Variant:
    """A model with one way to run its experts.

    Attributes:
        passes: times of the prompt, and of the prompt with its tokens on the host, in ms; the first is a warm-up.
    """

    record: ModelRecord
    model: Any
    decode: Decode | None = None
    passes: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def select(self, prompts: bool = False) -> None:
        name = self.record.implementation
        if name is not None:
            self.model.set_experts_implementation(PROMPTS.get(name, name) if prompts else name)

    def select_prompt(self) -> None:
        self.select(prompts=True)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        self.select_prompt()
        return self.model(ids, use_cache=False).logits

    @torch.no_grad()
    def prefill(self, prompt: torch.Tensor) -> None:
        """The prompt, and the tokens that follow it on the host."""
        synchronize(prompt.device)
        start = time.perf_counter_ns()
        logits = self.model(prompt, use_cache=True, logits_to_keep=1).logits
        synchronize(prompt.device)
        middle = time.perf_counter_ns()
        logits[:, -1].argmax(-1).tolist()
        self.passes.append(((middle - start) / 1e6, (time.perf_counter_ns() - start) / 1e6))


Tick = Callable[[str], None]


def measure_model(job: ModelJob, records: list[ModelRecord], tick: Tick = lambda text: None) -> None:
    """Load, check, compare and time all variants.

    Args:
        records: receives one a variant as soon as it is loaded. They are saved when all is done, and when it is
            interrupted: with the samples there are.
        tick: progress.
    """
    o = job.options
    variants: list[_Variant] = []
    try:
        tick("writing the tiny model" if o.tiny else "opening the model")
        with model_path(o.model, o.tiny, o.seed, job.device) as path, _on(job.device):
            for variant in _load(job, path, tick):
                variants.append(variant)
                records.append(variant.record)
            vocabulary = _size(variants[0].model, "vocab_size")
            text = read_text(o.text, path, vocabulary)
            prompt = text.prompt(job.prompt_tokens, o.batch).to(job.device)
            _check(job, variants, prompt, tick)
            right = [v for v in variants if v.record.status == "ok"]
            _quality(job, right, text, tick)
            _time(job, right, prompt, tick)
    finally:
        for v in variants:
            v.record.prefill_samples_ms = [first for first, _ in v.passes[1:]]
            v.record.first_token_samples_ms = [second for _, second in v.passes[1:]]
            v.record.finish()
        job.writer.write(records)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _size(model: Any, name: str) -> int:
    return int(getattr(model.config.get_text_config(), name))


def _load(job: ModelJob, path: Path, tick: Tick) -> Iterator[_Variant]:
    """The reference once for each implementation of transformers, then ours, and a peer for a quantized checkpoint."""
    facts = environment(job.device) | {"transformers": transformers.__version__}

    def record(model: Any, provider: str, implementation: str | None = None) -> ModelRecord:
        return _record(job, facts, model, provider, implementation)

    if job.formats is None:
        tick("loading the quantized model")
        with Peak(job.device) as peak:
            model = from_pretrained(path, device_map=job.device)
        yield _Variant(_sized(record(model, "qexperts"), model, peak), model)
        yield _gptqmodel(job, path, record, model)
        return
    if job.options.tiny:  # what the first model of a process imports is large beside it
        transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map=job.device)
        from_pretrained(path, device_map=job.device)
    tick("loading the reference")
    with Peak(job.device) as peak:
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto", device_map=job.device).eval()
    for name in decode_peers(job.device):
        yield _Variant(_sized(record(model, REFERENCE, name), model, peak), model)
    for fmt in job.formats:
        tick(f"{fmt.name}: loading and quantizing")
        options = {"quantize": fmt.name, "group_size": job.options.group_size} if fmt.quantized else {}
        with Peak(job.device) as peak:
            model = from_pretrained(path, device_map=job.device, **options)
        yield _Variant(_sized(record(model, "qexperts"), model, peak), model)


def _record(
    job: ModelJob, facts: dict[str, Any], model: Any, provider: str, implementation: str | None = None
) -> ModelRecord:
    o, dtype = job.options, str(model.dtype).removeprefix("torch.")
    dtype = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}.get(dtype, dtype)
    found = experts_modules(model)
    if not found:
        raise ValueError(f"{job.name}: no layer has experts that transformers' experts interface covers")
    weight = found[0][1].gate_up if isinstance(found[0][1], QuantExperts) else None
    experts: Any = found[0][1].num_experts if weight is None else weight.E
    return ModelRecord(
        model=job.name,
        weights=f"random weights, seed {o.seed}" if o.tiny else "checkpoint",
        architecture=model.config.get_text_config().model_type,
        layers=_size(model, "num_hidden_layers"),
        expert_layers=len(found),
        num_experts=experts,
        top_k=_size(model, "num_experts_per_tok"),
        hidden=_size(model, "hidden_size"),
        prompt_tokens=job.prompt_tokens,
        new_tokens=o.new_tokens,
        batch=o.batch,
        dtype=dtype,
        seed=o.seed,
        provider=provider,
        implementation=implementation,
        format=dtype if weight is None else weight.format.name,
        group_size=None if weight is None else weight.group_size,
        weight_layout=None if weight is None else weight.weight_layout,
        rounds=job.rounds,
        **facts,
    )


def _sized(record: ModelRecord, model: Any, peak: Peak) -> ModelRecord:
    record.expert_bytes = parameter_bytes([module for _, module in experts_modules(model)])
    record.model_bytes = parameter_bytes([model])
    record.load_peak_bytes, record.load_seconds = peak.peak, peak.seconds
    return record


def _gptqmodel(job: ModelJob, path: Path, record: Callable[..., ModelRecord], ours: Any) -> _Variant:
    """GPTQModel's own loader and kernels on the same checkpoint, if it is installed and takes it; whatever it raises is
    the reason that it is not measured. It has not been run yet."""
    found = record(ours, GPTQMODEL)
    found.weight_layout, found.status = None, "unsupported"
    if importlib.util.find_spec(GPTQMODEL) is None:
        found.reason = "GPTQModel is not installed"
        return _Variant(found, None)
    try:
        import gptqmodel  # pyright: ignore[reportMissingImports]

        with Peak(job.device) as peak:
            model = gptqmodel.GPTQModel.load(str(path), device=str(job.device)).model.eval()
        found.model_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    except Exception as error:
        found.reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return _Variant(found, None)
    found.load_peak_bytes, found.load_seconds, found.status = peak.peak, peak.seconds, "ok"
    return _Variant(found, model)


# ---- measurements


def _check(job: ModelJob, variants: Sequence[_Variant], prompt: torch.Tensor, tick: Tick) -> None:
    """Make a decode of each variant; what is wrong becomes its status."""
    expected: torch.Tensor | None = None
    for v in variants:
        if v.record.status != "ok":
            continue
        tick(f"{v.record.format}, {v.record.label}: compiling and checking")
        problem = check_experts(v.model, v.record.top_k)
        if problem is None:
            cache = job.prompt_tokens + max(job.options.new_tokens, 16) + 1
            v.decode = Decode(v.model, v.select, prompt, cache, v.select_prompt)
            problem = check_decode(v.decode)
        if problem is None and job.formats is None:  # one checkpoint, so one model
            with torch.no_grad():
                y = v.logits(prompt)
            expected = y if expected is None else expected
            if not (difference := relative(y, expected)) < NEAR:
                problem = f"logits differ by {difference:.2g} from those of qexperts on the same checkpoint"
        if problem is not None:
            v.record.status, v.record.reason = "WRONG", problem


def _quality(job: ModelJob, variants: Sequence[_Variant], text: Text, tick: Tick) -> None:
    """KL and top-1 agreement of every variant, the reference among them, against the reference."""
    reference = next((v for v in variants if v.record.is_reference), None)
    if reference is None:
        return
    ids = text.ids[: job.options.text_tokens].to(job.device)
    tick(f"quality on {len(ids)} tokens")
    found = compare_on(ids, reference.logits, [v.logits for v in variants])
    for v, (kl, top1) in zip(variants, found, strict=True):
        v.record.kl, v.record.top1, v.record.reference = kl, top1, reference.record.label
        v.record.text, v.record.tokenizer, v.record.text_tokens = text.name, text.tokenizer, len(ids)


def _time(job: ModelJob, variants: Sequence[_Variant], prompt: torch.Tensor, tick: Tick) -> None:
    gc.collect()
    decodes = [(v, v.decode) for v in variants if v.decode is not None]
    for v, decode in decodes:
        decode.reset()
        with Peak(job.device) as peak:
            v.select_prompt()
            v.prefill(prompt)
            decode.reset()
            decode.step()
        v.record.run_peak_bytes = peak.peak
        v.passes.clear()
    sampler = Sampler(job.device)
    own = [v for v in variants if v.record.implementation not in PROMPTS]
    tick(f"timing prompts of {job.prompt_tokens} tokens, {job.rounds} rounds")
    calls = [lambda v=v: v.prefill(prompt) for v in own]
    sampler.rounds(calls, job.rounds, [[] for _ in own], before=[v.select_prompt for v in own])
    tick(f"timing {job.options.new_tokens} steps of {job.options.batch} tokens, {job.rounds} rounds")
    steps = job.options.new_tokens
    sampler.rounds(
        [Rotation((decode.step,) * steps) for _, decode in decodes],
        job.rounds,
        [v.record.decode_samples_ms for v, _ in decodes],
        before=[decode.reset for _, decode in decodes],
    )
    if job.device.type == "cuda":
        tick("timing steps in CUDA graphs")
        replays = [(v, decode, run) for v, decode in decodes if (run := _graph(v, decode)) is not None]
        sampler.rounds(
            [Rotation((run,) * steps) for _, _, run in replays],
            job.rounds,
            [v.record.graph_samples_ms for v, _, _ in replays],
            before=[decode.reset for _, decode, _ in replays],
        )


def _graph(v: _Variant, decode: Decode) -> Callable[[], object] | None:
    """A step as a replay of a CUDA graph; None, and the reason in the record, for what cannot be captured."""
    if decode.slides or v.record.implementation == "eager":
        v.record.graph_reason = "it looks at the routing, or at the length of a window, on the host"
        return None
    decode.reset()
    eager = decode.step().clone()
    decode.reset()
    try:
        replay, y = capture(decode.step)
    except RuntimeError as error:
        if v.record.provider == "qexperts":
            raise
        torch.cuda.synchronize()
        v.record.graph_reason = str(error).splitlines()[0][:90]
        return None
    decode.reset()
    replay()
    if not (difference := relative(y, eager)) < NEAR / 10:
        v.record.graph_reason = f"its logits differ by {difference:.2g} from those of an eager step"
        return None
    return replay
