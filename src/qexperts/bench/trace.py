"""Record the routing of a real run: `qexperts trace`."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from ..files import unwritable
from ..integrations.transformers import from_pretrained
from ..integrations.transformers_modules import experts_modules
from ..layer import QuantExperts
from ..traces import Step, Trace
from .environment import environment, pick_device
from .model import model_path, open_config
from .model_session import progress
from .quality import read_text
from .trace_report import read_trace, show_trace

__all__ = ["TraceOptions", "Tracer", "record", "trace_session"]

EVERY_SECONDS = 1.0  # between two writings of the file


class Tracer:
    """Counts, while it is entered, the rows that the experts of a model get: ours, or those of transformers.

    Args:
        model: of `from_pretrained` or of transformers.
        name: what the trace calls it.
    Attributes:
        trace: what was seen so far. Between `step` and the end of its forward, layers that were not reached are None.

    Each layer is one host synchronisation: what is traced is slow.
    """

    def __init__(self, model: torch.nn.Module, name: str, **facts: str | None) -> None:
        self._modules = experts_modules(model)
        if not self._modules:
            raise ValueError(f"trace: {name} has no layer of experts that transformers' experts interface covers")
        top_k = model.config.get_text_config().num_experts_per_tok  # type: ignore[union-attr, operator]
        self.trace = Trace(name, int(top_k), [key for key, _ in self._modules], facts=facts)
        self._handles: list[Any] = []

    def __enter__(self) -> Tracer:
        for i, (_, module) in enumerate(self._modules):
            experts = module.gate_up.E if isinstance(module, QuantExperts) else module.num_experts
            hook = self._hook(i, int(experts))
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def step(self, phase: str, tokens: int) -> None:
        """What is counted from now on belongs to a new step: "prefill" or "decode"."""
        self.trace.steps.append(Step(phase, tokens, [None] * len(self._modules)))

    def _hook(self, layer: int, experts: int) -> Callable[..., None]:
        def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            ids = (args[1] if len(args) > 1 else kwargs["top_k_index"]).flatten()
            found = torch.bincount(ids[(ids >= 0) & (ids < experts)], minlength=experts).tolist()
            counts = self.trace.steps[-1].num_tokens_per_expert
            before = counts[layer]
            counts[layer] = found if before is None else [a + b for a, b in zip(before, found, strict=True)]

        return count


@torch.no_grad()
def record(
    model: Any, tracer: Tracer, ids: torch.Tensor, new_tokens: int, save: Callable[[Trace], None] = lambda trace: None
) -> None:
    """A prompt, then greedy steps, under a tracer.

    Args:
        ids: [1, tokens] on the device of the model.
        save: called with the trace after the prompt, about every second, and at the end, however that comes.
    """
    trace = tracer.trace
    try:
        with tracer:
            tracer.step("prefill", ids.numel())
            out = model(ids, use_cache=True, logits_to_keep=1)
            save(trace)
            saved = time.monotonic()
            for _ in range(new_tokens):
                tracer.step("decode", len(ids))
                token = out.logits[:, -1:].argmax(-1)
                out = model(token, past_key_values=out.past_key_values, use_cache=True)
                if time.monotonic() - saved > EVERY_SECONDS:
                    save(trace)
                    saved = time.monotonic()
        trace.complete = True
    finally:
        save(trace)


# ---- the command


@dataclasses.dataclass(frozen=True)
class TraceOptions:
    """What the command line asks for. tokens: of the text, at most; None: as many as the model has positions."""

    model: str | None
    tiny: str | None = None
    text: str | None = None
    tokens: int | None = None
    new_tokens: int = 16
    device: str | None = None
    save: str = "trace.json"
    seed: int = 0


def trace_session(options: TraceOptions) -> int:
    """Trace, save, show. Returns the exit code: 0, or 130 if interrupted. Raises ValueError or OSError, one line."""
    o, device = options, pick_device(options.device)
    config = open_config(o.model, o.tiny, "MODEL")
    if o.new_tokens < 0 or (o.tokens is not None and o.tokens < 1):
        raise ValueError(f"--tokens {o.tokens} --new-tokens {o.new_tokens}: expected at least 1 and 0")
    if os.path.exists(o.save):
        read_trace(o.save)  # another file is not overwritten
    if unwritable(Path(o.save).resolve().parent):
        raise ValueError(f"--save {o.save}: its folder is not there, or cannot be written")
    console = Console(stderr=True)
    tick = progress(console)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tick("loading the model")
    tracer = None
    try:
        with model_path(o.model, o.tiny, o.seed, device) as path:
            model = from_pretrained(path, device_map=device)
            text = read_text(o.text, path, config.get_text_config().vocab_size)
            ids = text.ids[: _fitting(config, o, len(text.ids))]
            kind = "bytes of the text as tokens" if text.tokenizer == "bytes" else "tokens"
            tick(f"prompt of {len(ids)} {kind}, then {o.new_tokens} steps")
            facts = environment(device)
            kept = {key: facts[key] for key in ("qexperts", "commit", "torch", "device", "time")}
            tracer = Tracer(model, o.tiny or path.resolve().name, **kept)
            record(model, tracer, ids[None].to(device), o.new_tokens, lambda trace: trace.write(o.save))
    except KeyboardInterrupt:
        seen = 0 if tracer is None else len(tracer.trace.steps)
        console.print(f"interrupted in step {seen}; what was seen is in {o.save}" if seen else "interrupted")
        return 130
    show_trace(tracer.trace, Console())
    console.print(f"saved: {o.save}", highlight=False, soft_wrap=True)
    return 0


def _fitting(config: Any, o: TraceOptions, tokens: int) -> int:
    """Tokens of the text that the model has room for."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    room = tokens if positions is None else positions - o.new_tokens
    if room < 1 or (o.tokens is not None and o.tokens > room):
        raise ValueError(
            f"--tokens {o.tokens} --new-tokens {o.new_tokens}: expected at most {max(room, 0)} tokens, "
            f"for the {positions} positions of the model and the {tokens} tokens of the text"
        )
    return min(tokens, room, o.tokens or tokens)
