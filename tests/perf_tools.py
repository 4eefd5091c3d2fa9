"""Parts of `perf_model.py`: a checkpoint of random weights, timing, what a step launches, a given routing."""

from __future__ import annotations

import collections
import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from qexperts.bench.timing import Rotation, Sampler, host_ms, percentile

SAMPLE_MS = 500  # of the slowest, where its steps are many


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


def follow(model: Any, modules: Sequence[Any], routing: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    """Make experts use a given routing."""
    for module, (ids, weights) in zip(modules, routing, strict=True):
        module.register_forward_pre_hook(
            lambda module, args, ids=ids, weights=weights: (args[0], ids, weights.to(args[2].dtype))
        )
    return model
