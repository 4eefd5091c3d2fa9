"""What is timed of a whole model: a decode on a cache of fixed size, eager or from a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers.cache_utils import StaticLayer

__all__ = ["Decode", "capture", "parameter_bytes"]

CACHE = 1024  # tokens; there is room for what `issue_us` does without a reset


def parameter_bytes(modules: Sequence[nn.Module]) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in module.parameters())


class Decode:
    """Greedy generation, a token of each sequence a step, on a cache of fixed size: every step is the same work on the
    same addresses.

    All that changes from step to step (token, position, mask, length of the cache) is on the device and is advanced
    there, so that a step can be captured in a CUDA graph, and replaying it generates. A model with a sliding window
    makes its masks itself, and cannot be captured.

    Args:
        model: of transformers.
        select: called before steps, to choose the implementation of the model.
        prompt: [B, tokens]; int64.
        cache: tokens there is room for.
        select_prompt: `select` for the prompt, where another implementation takes it.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: Any,
        select: Callable[[], None],
        prompt: torch.Tensor,
        cache: int = CACHE,
        select_prompt: Callable[[], None] | None = None,
    ) -> None:
        self.model, self.select, self.select_prompt = model, select, select_prompt or select
        self.prompt, self.length = prompt, prompt.shape[1]
        self.cache: Any = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=cache)
        self.slides = any(type(layer) is not StaticLayer for layer in self.cache.layers)
        device, batch = prompt.device, prompt.shape[0]
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(batch, 1, dtype=torch.long, device=device)
        self.mask = torch.zeros(1, 1, 1, cache, dtype=torch.bool, device=device)
        self.first = self._prefill()
        self.reset()

    def _prefill(self) -> torch.Tensor:
        self.select_prompt()
        out = self.model(self.prompt, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1:].argmax(-1)

    @torch.no_grad()
    def reset(self) -> None:
        """Back to the end of the prompt. What was written to the cache after it is hidden by the mask; a window may
        have lost what was before, so there the prompt runs again."""
        self.token.copy_(self.first)
        self.position.fill_(self.length)
        self.mask.fill_(False)
        self.mask[..., : self.length] = True
        if self.slides:
            self.cache.reset()
            self._prefill()
        else:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(self.length)
        self.select()

    @torch.no_grad()
    def step(self) -> torch.Tensor:
        """Logits after the token, which is replaced by the next: [B, 1, vocabulary]."""
        self.mask.index_fill_(3, self.position[0], True)
        out = self.model(
            self.token,
            attention_mask=None if self.slides else self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.token.copy_(out.logits[:, -1:].argmax(-1))
        self.position.add_(1)
        return out.logits

    def generate(self, step: Callable[[], object], count: int) -> list[int]:
        """What the first sequence continues with: count tokens and the one after the prompt."""
        self.reset()
        found = [self.first[0].item()]
        for _ in range(count):
            step()
            found.append(self.token[0].item())
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
