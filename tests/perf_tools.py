"""Parts of `perf_model.py`: a checkpoint of random weights, memory while loading, a decode on a fixed cache, timing."""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import gc
import json
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from qexperts import QuantExperts
from qexperts.bench.timing import Rotation, Sampler, host_ms, percentile, synchronize
from qexperts.testing import experts_loop

CACHE = 1024  # tokens; there is room for what `issue_us` does without a reset
SAMPLE_MS = 500  # of the slowest, where its steps are many
NEAR = 0.25  # relative difference of logits up to which two ways to compute them are taken for one model


def write_checkpoint(path: Path, sizes: dict[str, Any], device: torch.device) -> None:
    """A Qwen3-MoE checkpoint of random bf16 weights, one file a layer and one linear an expert, as published ones."""
    config = transformers.Qwen3MoeConfig(
        **sizes, max_position_embeddings=8192, pad_token_id=0, bos_token_id=1, eos_token_id=None
    )
    config.architectures, config.dtype = ["Qwen3MoeForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in transformers.Qwen3MoeForCausalLM(config).state_dict().items()}
    path.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(path)
    draw, index = _Random(device), {}
    files: dict[str, dict[str, torch.Size]] = {}
    for name, shape in shapes.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        files.setdefault(f"model-{layer[1] if layer else 'rest'}.safetensors", {})[name] = shape
    for file, members in files.items():
        tensors = {name: t for member, shape in members.items() for name, t in draw.parameter(member, shape)}
        save_file(tensors, path / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


class _Random:
    """Normal numbers from a pool, which is read from another place for each tensor: drawing billions takes minutes."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.pool = torch.randn(2**24 + 12345, generator=generator, device=device).bfloat16()
        self.at = 0

    def normal(self, shape: Sequence[int]) -> torch.Tensor:
        count = 1
        for n in shape:
            count *= n
        if count > len(self.pool):
            raise ValueError(f"a tensor of {tuple(shape)} is larger than the pool of {len(self.pool)} random numbers")
        self.at = (self.at * 31 + 1234567) % (len(self.pool) - count + 1)
        return (self.pool[self.at : self.at + count] * shape[-1] ** -0.5).view(*shape).cpu()

    def parameter(self, name: str, shape: Sequence[int]) -> Iterator[tuple[str, torch.Tensor]]:
        """A parameter of the model as the tensors of a checkpoint."""
        stem, _, projection = name.rpartition(".")
        if projection == "gate_up_proj":
            for e in range(shape[0]):
                for role in ("gate_proj", "up_proj"):
                    yield f"{stem}.{e}.{role}.weight", self.normal((shape[1] // 2, shape[2]))
        elif projection == "down_proj":
            yield from ((f"{stem}.{e}.down_proj.weight", self.normal(shape[1:])) for e in range(shape[0]))
        elif len(shape) == 1:
            yield name, torch.ones(*shape, dtype=torch.bfloat16)
        else:
            yield name, self.normal(shape)


class Peak:
    """Memory taken inside a `with`, beyond what was in use before, in bytes: of a GPU what torch allocates there, of a
    CPU what is anonymous in this process (mapped files are not).

    Attributes:
        peak: the most at any time.
        seconds: spent inside.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak, self.seconds = device, 0, 0.0

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device.type == "cuda":
            synchronize(self.device)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
                ctypes.CDLL(None).malloc_trim(0)  # what earlier sections freed is not there to be taken again
            self.before = self.highest = self._anonymous()
            self.done = threading.Event()
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        self.started = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        synchronize(self.device)
        self.seconds = time.perf_counter() - self.started
        if self.device.type == "cuda":
            self.highest = torch.cuda.max_memory_allocated(self.device)
        else:
            self.done.set()
            self.thread.join()
        self.peak = self.highest - self.before

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.highest = max(self.highest, self._anonymous())

    @staticmethod
    def _anonymous() -> int:
        status = Path("/proc/self/status")
        if not status.exists():
            raise RuntimeError("the memory of a process is read from /proc/self/status, which only Linux has")
        found = re.search(r"RssAnon:\s+(\d+)", status.read_text())
        assert found is not None
        return int(found[1]) * 1024


def experts_of(model: nn.Module) -> list[Any]:
    """The experts of each layer, ours or transformers'."""
    return [m for m in model.modules() if isinstance(m, QuantExperts) or hasattr(type(m), "_apply_gate")]


def parameter_bytes(modules: Sequence[nn.Module]) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


class Decode:
    """Greedy generation, a token a step, on a cache of fixed size: every step is the same work on the same addresses.

    All that changes from step to step (token, position, mask, length of the cache) is on the device and is advanced
    there, so that a step can be captured in a CUDA graph, and replaying it generates.
    """

    @torch.no_grad()
    def __init__(self, model: Any, select: Callable[[], None], prompt: torch.Tensor, cache: int = CACHE) -> None:
        self.model, self.select, self.length = model, select, prompt.shape[1]
        self.cache = transformers.StaticCache(config=model.config, max_cache_len=cache)
        device = prompt.device
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.mask = torch.zeros(1, 1, 1, cache, dtype=torch.bool, device=device)
        self.select()
        out = model(prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.first = out.logits[:, -1:].argmax(-1)
        self.reset()

    def reset(self) -> None:
        """Back to the end of the prompt. What was written to the cache after it is hidden by the mask."""
        self.select()
        self.token.copy_(self.first)
        self.position.fill_(self.length)
        self.mask.fill_(False)
        self.mask[..., : self.length] = True
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.length)

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Logits after the token, which is replaced by the next: [1, 1, vocabulary]."""
        self.mask.index_fill_(3, self.position.view(1), True)
        out = self.model(
            self.token,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        self.position.add_(1)
        return out.logits

    def generate(self, step: Callable[[], object], count: int) -> list[int]:
        self.reset()
        found = [self.first.item()]
        for _ in range(count):
            step()
            found.append(self.token.item())
        self.reset()
        return [int(token) for token in found]


def capture(run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
    """A call as a replay of a CUDA graph, and the tensor that a replay writes. Called before, so that kernels are
    compiled and libraries have made their workspaces."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> None:
        graph.replay()
        _ = out  # lives as long as the graph that writes it

    return replay, out


def relative(y: torch.Tensor, reference: torch.Tensor) -> float:
    return float((y.float() - reference.float()).norm() / reference.float().norm())


def check_decode(name: str, decode: Decode, prompt: torch.Tensor) -> None:
    """Raise unless a step on the fixed cache gives about the logits of the whole sequence without one."""
    decode.reset()
    decode.step()
    y = decode.step()[0, -1].clone()
    tokens = decode.generate(decode.step, 2)[:2]
    whole = torch.cat([prompt, torch.tensor([tokens], device=prompt.device)], 1)
    with torch.no_grad():
        expected = decode.model(whole, logits_to_keep=1).logits[0, -1]
    if not (difference := relative(y, expected)) < NEAR:
        raise RuntimeError(f"{name}: logits of a decode step differ by {difference:.2g} from those of a prefill")


@dataclasses.dataclass
class Timing:
    """Samples of one way to run something, in ms of one step."""

    name: str
    how: str
    run: Callable[[], object]
    before: Callable[[], None]
    samples: list[float] = dataclasses.field(default_factory=list)

    @property
    def ms(self) -> float:
        return percentile(self.samples, 50)


def time_all(timings: Sequence[Timing], device: torch.device, rounds: int, steps: int = 1) -> None:
    """Interleaved rounds; a sample is the mean of some steps in a row, of fewer where one takes long."""
    slowest = SAMPLE_MS / steps
    for t in timings if steps > 1 else ():
        for _ in range(2):  # the first compiles
            t.before()
            last = host_ms(t.run, device, repeats=1)
        slowest = max(slowest, last)
    steps = max(1, min(steps, int(SAMPLE_MS / slowest)))
    Sampler(device).rounds(
        [Rotation((t.run,) * steps) for t in timings],
        rounds,
        [t.samples for t in timings],
        before=[t.before for t in timings],
    )


def launches(run: Callable[[], object]) -> tuple[int, collections.Counter[str]]:
    """Kernels, copies and fills that a call starts on the GPU, in all and by name."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = profiler.events() or ()
    names = collections.Counter(e.name for e in events if str(e.device_type).endswith("CUDA"))
    if not names:
        raise RuntimeError("the profiler has seen no kernel")
    return sum(names.values()), names


class Loop(nn.Module):
    """What `QuantExperts` computes, one expert after the other in plain torch, on weights rounded to the dtype of x."""

    def __init__(self, experts: QuantExperts) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        m = self.experts
        biases = {"gate_up_bias": m.gate_up_bias, "down_bias": m.down_bias}
        return experts_loop(x, m.gate_up, m.down, ids, weights, m.activation, **biases)


def follow(model: Any, modules: Sequence[Any], routing: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """Make experts use a given routing."""
    for module, (ids, weights) in zip(modules, routing, strict=True):
        module.register_forward_pre_hook(
            lambda module, args, ids=ids, weights=weights: (args[0], ids, weights.to(args[2].dtype))
        )
    return model
