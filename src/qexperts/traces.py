"""Recorded routing: the rows of each expert, in each layer and step of a real run, and nothing else of it.

A trace is a JSON object:

    {"kind": "trace", "schema": 1, "model": ..., "top_k": 8, "complete": true,
     "layers": ["model.layers.0.mlp.experts", ...],
     "steps": [{"phase": "prefill", "tokens": 512, "num_tokens_per_expert": [[E counts] of each layer]},
               {"phase": "decode", "tokens": 1, "num_tokens_per_expert": [...]}, ...]}

In a run that was interrupted `complete` is false, and layers that the last step did not reach have null for counts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import reprlib
import statistics
from collections.abc import Sequence
from typing import Any

from .files import replace

__all__ = ["Step", "Trace", "is_trace", "unevenness"]

SCHEMA = 1
PHASES = ("prefill", "decode")


@dataclasses.dataclass
class Step:
    """One forward: counts of each layer, None where it was not reached."""

    phase: str
    tokens: int
    num_tokens_per_expert: list[list[int] | None]


@dataclasses.dataclass
class Trace:
    """Steps of a run over the same layers, in order. facts: where and when, as strings or None."""

    model: str
    top_k: int
    layers: list[str]
    steps: list[Step] = dataclasses.field(default_factory=list)
    complete: bool = False
    facts: dict[str, str | None] = dataclasses.field(default_factory=dict)

    def counts(self, layer: int, step: int | str) -> list[int] | None:
        """Rows of each expert of a layer in one step, or summed over those of a phase; None if none has reached it."""
        steps = [self.steps[step]] if isinstance(step, int) else [s for s in self.steps if s.phase == step]
        seen = [c for s in steps if (c := s.num_tokens_per_expert[layer]) is not None]
        return [sum(column) for column in zip(*seen, strict=True)] if seen else None

    def choose(self, where: str, choice: str | None) -> tuple[str, list[int]]:
        """Counts of one layer and step.

        Args:
            choice: comma list of layer=INDEX or layer=all (the sum), and step=INDEX, step=prefill or step=decode (the
                sum over steps of one token). Default: the prefill, and of it the layer whose max / mean is the median
                of the layers'.
        Returns: the choice with everything named, and the counts.
        Raises: ValueError for a choice that the trace does not have.
        """
        named = self._named(where, choice)
        step = self._step(where, named.get("step", "prefill"))
        every = [self.counts(i, step) for i in range(len(self.layers))]
        seen = [i for i, counts in enumerate(every) if counts is not None]
        if not seen:
            raise ValueError(f"{where}: no layer was seen in step={step}; the run ended before")
        text = named.get("layer")
        if text == "all":
            if len(seen) < len(every):
                raise ValueError(f"{where}: layer=all, but the run ended before layer {self.layers[len(seen)]}")
            if len({len(counts or ()) for counts in every}) > 1:
                raise ValueError(f"{where}: layer=all, but the layers have different numbers of experts; choose one")
            return f"layer=all,step={step}", [sum(column) for column in zip(*every, strict=True)]  # type: ignore[arg-type]
        if text is None:
            ordered = sorted(seen, key=lambda i: unevenness(every[i] or [0]))
            text = str(ordered[(len(ordered) - 1) // 2])
        index = self._index(where, "layer", text, len(self.layers), "all")
        if (chosen := every[index]) is None:
            raise ValueError(f"{where}: layer {index} was not seen in step={step}; the run ended before")
        return f"layer={index},step={step}", chosen

    @staticmethod
    def _named(where: str, choice: str | None) -> dict[str, str]:
        named: dict[str, str] = {}
        for part in choice.split(",") if choice else ():
            key, equals, value = part.strip().partition("=")
            if key not in ("layer", "step") or not equals or key in named:
                raise ValueError(
                    f"{where}: {reprlib.repr(choice)}; expected layer=..., step=... or both, as in layer=3"
                )
            named[key] = value
        return named

    def _step(self, where: str, text: str) -> int | str:
        if text in PHASES:
            if not any(step.phase == text for step in self.steps):
                raise ValueError(f"{where}: step={text}, but the trace has no such step")
            return text
        return self._index(where, "step", text, len(self.steps), " or ".join(PHASES))

    @staticmethod
    def _index(where: str, key: str, text: str, count: int, words: str) -> int:
        if not text.isdecimal() or int(text) >= count:
            raise ValueError(f"{where}: {key}={text}; expected 0 to {count - 1}, or {words}")
        return int(text)

    def to_json(self) -> str:
        head = {"kind": "trace", "schema": SCHEMA, "model": self.model, "top_k": self.top_k, "complete": self.complete}
        data = {**head, **self.facts, "layers": self.layers, "steps": [dataclasses.asdict(s) for s in self.steps]}
        return json.dumps(data, separators=(",", ":")) + "\n"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Replace a file by this trace, at once: whoever reads it finds this one or the one before, never a part."""
        replace(path, self.to_json().encode())

    @classmethod
    def of(cls, data: Any, where: str) -> Trace:
        """A trace from parsed JSON. Raises: ValueError that names what is wrong."""
        if not is_trace(data) or data.get("schema") != SCHEMA:
            raise ValueError(f"{where} is no trace of schema {SCHEMA}; expected what `qexperts trace` writes.")
        layers, steps = data.get("layers"), data.get("steps")
        if not isinstance(layers, list) or not layers or not isinstance(steps, list):
            raise ValueError(f"{where}: a trace needs the lists layers and steps.")
        found = [_parse_step(step, f"{where}: steps[{i}]", len(layers)) for i, step in enumerate(steps)]
        top_k = data.get("top_k")
        if not isinstance(top_k, int):
            raise ValueError(f"{where}: top_k is {reprlib.repr(top_k)}; expected an integer.")
        own = {"kind", "schema", "model", "top_k", "complete", "layers", "steps"}
        facts = {k: v for k, v in data.items() if k not in own}
        return cls(str(data.get("model")), top_k, [str(n) for n in layers], found, bool(data.get("complete")), facts)


def is_trace(data: Any) -> bool:
    return isinstance(data, dict) and data.get("kind") == "trace"


def unevenness(counts: Sequence[int]) -> float:
    """Largest over mean: 1 if all experts have the same number of rows; 0 without rows."""
    return max(counts) / statistics.fmean(counts) if any(counts) else 0.0


def _parse_step(step: Any, where: str, layers: int) -> Step:
    counts = step.get("num_tokens_per_expert") if isinstance(step, dict) else None
    if not isinstance(counts, list) or len(counts) != layers or step.get("phase") not in PHASES:
        raise ValueError(f"{where}: expected a phase and num_tokens_per_expert of {layers} layers.")
    for i, row in enumerate(counts):
        if row is not None and not (isinstance(row, list) and row and all(type(n) is int and n >= 0 for n in row)):
            raise ValueError(f"{where}.num_tokens_per_expert[{i}] is {reprlib.repr(row)}; expected counts, or null.")
    return Step(step["phase"], int(step.get("tokens", 0)), counts)
