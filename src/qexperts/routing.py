"""Where rows come from: routing of logits, and recorded or synthetic numbers of rows per expert."""

from __future__ import annotations

import json
import math
import os
import random
import re
import reprlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import NormalDist
from typing import TypeGuard

import torch

from .traces import Trace, is_trace

__all__ = [
    "RECORDED",
    "Distribution",
    "even",
    "from_file",
    "hot",
    "log_normal",
    "parse_distribution",
    "recorded",
    "resample",
    "route",
    "zipf",
]

MAX_ROWS = 2**31 - 1
# Far above any model; stops a number of rows given as a number of experts before it fills the memory.
MAX_EXPERTS = 2**16

_DATA = resources.files("qexperts") / "data"
RECORDED: list[str] = sorted(entry.name[:-5] for entry in _DATA.iterdir() if entry.name.endswith(".json"))


@dataclass(frozen=True)
class Distribution:
    """Rows of each expert in one step of one MoE layer.

    Attributes:
        name: what the CLI and the records call it.
        counts: num_tokens_per_expert; E non-negative ints, their sum S fits int32.
        source: provenance: who recorded it, or how it was made.
        scaled: how it differs from what it was derived from; None if it does not.

    Raises: ValueError if a field is out of these bounds.
    """

    name: str
    counts: tuple[int, ...]
    source: str
    scaled: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "counts", tuple(self.counts))
        for field, text in (("name", self.name), ("source", self.source)):
            if not (isinstance(text, str) and text.strip() and text.isprintable()):
                raise ValueError(f"Distribution: {field} is {reprlib.repr(text)}; expected one line of text.")
        if problem := _problem(self.counts, "counts"):
            raise ValueError(f"Distribution: {problem}.")

    @property
    def num_experts(self) -> int:
        """E."""
        return len(self.counts)

    @property
    def total_tokens(self) -> int:
        """S: rows over all experts."""
        return sum(self.counts)

    @property
    def active_experts(self) -> int:
        """Experts with at least one row."""
        return sum(n > 0 for n in self.counts)

    @property
    def max_tokens(self) -> int:
        """Rows of the largest expert."""
        return max(self.counts)

    def tensor(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """num_tokens_per_expert: [E]; int32; on `device`."""
        return torch.tensor(self.counts, dtype=torch.int32, device=device)


def recorded(name: str = "autoround-256") -> Distribution:
    """A distribution shipped with the package, as it was recorded.

    Args:
        name: one of `RECORDED`.
    Raises: ValueError for any other name.
    """
    if name not in RECORDED:
        raise ValueError(f"recorded: {reprlib.repr(name)} is not shipped; expected one of: {', '.join(RECORDED)}.")
    return _parse((_DATA / f"{name}.json").read_bytes(), f"recorded: {name}", name, "recorded counts")


def from_file(path: str | os.PathLike[str], choice: str | None = None) -> Distribution:
    """Read counts from a JSON file.

    Args:
        path: a list of counts, an object with `num_tokens_per_expert` and optionally `name` and `source`, or a trace.
            The name defaults to the file's. Counts may all be zero; such a distribution cannot be resampled to rows.
        choice: of a layer and step of a trace, as `Trace.choose` takes it.
    Raises: ValueError, one line that names the file and what is wrong with it.
    """
    where = f"from_file: {str(path)!r}"
    try:
        text = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{where} cannot be read ({reason}); give a JSON file of counts.") from None
    return _parse(text, where, Path(path).stem, f"counts read from {Path(path).name}", choice)


def even(num_experts: int, total_tokens: int, *, max_per_expert: int | None = None) -> Distribution:
    """The same number of rows for every expert; the first S mod E have one more.

    Args:
        num_experts: E >= 1.
        total_tokens: S >= 0 rows.
        max_per_expert: most rows an expert may get, normally the number of tokens T; None for no limit.
    Raises: ValueError for other sizes, or if E experts of max_per_expert rows cannot hold S.
    """
    _check_sizes("even", num_experts, total_tokens, max_per_expert)
    counts = _apportion("even", [1] * num_experts, total_tokens, max_per_expert)
    return Distribution("even", tuple(counts), "synthetic: the same number of rows for every expert")


def hot(
    share: float, num_experts: int, total_tokens: int, seed: int = 0, *, max_per_expert: int | None = None
) -> Distribution:
    """One expert with a share of all rows, the same number for every other.

    Args:
        share: of the hot expert, 1/E to 1.
        num_experts, total_tokens, seed, max_per_expert: as in `zipf`.
    Raises: ValueError as `even`, and for any other share.
    """
    _check_parameter("hot", "share", share)
    _check_sizes("hot", num_experts, total_tokens, max_per_expert)
    if not 1 <= share * num_experts <= num_experts:
        raise ValueError(f"hot: share is {share}; expected 1/E to 1, with E = {num_experts}.")
    others = (1 - share) / (share * max(1, num_experts - 1))
    exponents = [0.0] + [math.log(others) if others else -math.inf] * (num_experts - 1)
    rule = f"one expert has {_short(share)} of the rows, the others the same number"
    return _synthetic(f"hot:{_short(share)}", rule, exponents, total_tokens, seed, max_per_expert)


def zipf(
    s: float, num_experts: int, total_tokens: int, seed: int = 0, *, max_per_expert: int | None = None
) -> Distribution:
    """Rows by Zipf's law; the seed decides only which expert has which rank.

        rows(rank) ~ rank ** -s        rank = 1..E

    Args:
        s: finite, >= 0; 0 is even.
        num_experts, total_tokens, max_per_expert: as in `even`; the excess over max_per_expert goes to the experts
            below it, in proportion to their weights.
        seed: the same counts on every platform and Python.
    Raises: ValueError as `even`, and for any other s.
    """
    _check_parameter("zipf", "s", s)
    _check_sizes("zipf", num_experts, total_tokens, max_per_expert)
    exponents = [-s * math.log(rank) for rank in range(1, num_experts + 1)]
    return _synthetic(f"zipf:{_short(s)}", f"rank ** -{_short(s)}", exponents, total_tokens, seed, max_per_expert)


def log_normal(
    sigma: float, num_experts: int, total_tokens: int, seed: int = 0, *, max_per_expert: int | None = None
) -> Distribution:
    """Rows at the mid-quantiles of a log-normal distribution; the seed decides only which expert has which.

        rows(i) ~ exp(sigma * normal_quantile((i + 1/2) / E))        i = 0..E-1

    Quantiles instead of draws: every seed has the same shape, so that timings of two seeds can be compared.

    Args:
        sigma: finite, >= 0; 0 is even. 1.5 over 256 experts gives max/mean 25, where autoround-256 has 20.
        num_experts, total_tokens, seed, max_per_expert: as in `zipf`.
    Raises: ValueError as `even`, and for any other sigma.
    """
    _check_parameter("log_normal", "sigma", sigma)
    _check_sizes("log_normal", num_experts, total_tokens, max_per_expert)
    quantiles = [NormalDist().inv_cdf((i + 0.5) / num_experts) for i in reversed(range(num_experts))]
    exponents = [sigma * (quantile - quantiles[0]) for quantile in quantiles]
    rule = f"log-normal quantiles, sigma {_short(sigma)}"
    return _synthetic(f"log-normal:{_short(sigma)}", rule, exponents, total_tokens, seed, max_per_expert)


def resample(
    dist: Distribution,
    num_experts: int | None = None,
    total_tokens: int | None = None,
    seed: int = 0,
    *,
    max_per_expert: int | None = None,
) -> Distribution:
    """The same shape over another number of experts, of rows, or both; the sum is exact.

    Another total scales every expert in place by the largest-remainder rule: order and empty experts stay, and small
    experts may become empty only when the total shrinks. Another E keeps the share of empty experts and reads the
    sorted active ones at evenly spaced quantiles, interpolated, from the smallest to the largest; experts are then
    shuffled by the seed, since a router's expert numbers mean nothing. Keeping the largest expert keeps max/mean as
    far as E allows, which bounds it: 20.3 for autoround-256, 17.5 over 64 experts, 10.6 over 16. The rows of the
    largest tenth of the experts stay within 5 points of their share from 64 experts on.

    Args:
        dist: at least one row, unless total_tokens is 0.
        num_experts: E >= 1; None keeps it. More experts than `dist` has is fine.
        total_tokens: S >= 0 rows; None keeps it.
        seed: order of the experts, used only if E changes.
        max_per_expert: most rows an expert may get; the excess goes to the other active experts.
    Returns: `dist` itself if nothing changes; else `scaled` says what did.
    Raises: ValueError, one line with the numbers, for other sizes, rows out of an all-zero distribution, or
        max_per_expert too small for the active experts.
    """
    old = (dist.num_experts, dist.total_tokens)
    new = (old[0] if num_experts is None else num_experts, old[1] if total_tokens is None else total_tokens)
    where = f"resample: {dist.name}"
    _check_sizes(where, *new, max_per_expert)
    fits = max_per_expert is None or dist.max_tokens <= max_per_expert
    if new == old and fits:
        return dist
    if new[1] > 0 and old[1] == 0:
        raise ValueError(f"{where}: all {old[0]} experts have 0 rows; cannot be resampled to {new[1]} rows.")
    weights = list(dist.counts) if new[0] == old[0] else _shuffled(_reshape(dist.counts, new[0]), seed)
    counts = _apportion(where, weights, new[1], max_per_expert)
    size = "{} experts, {} rows"
    change = f"to {size.format(*new)}"
    if max_per_expert is not None and max(_apportion(where, weights, new[1], None)) > max_per_expert:
        change += f", at most {max_per_expert} rows per expert"
    begin = f"{dist.scaled}; then" if dist.scaled else f"{dist.name} resampled from {size.format(*old)}"
    return Distribution(dist.name, tuple(counts), dist.source, f"{begin} {change}")


SYNTHETIC = ("even", "hot", "zipf", "log-normal")
_DEFAULTS = {"hot": 0.6, "zipf": 1.0, "log-normal": 1.5}


def is_synthetic(text: str) -> bool:
    """Whether `parse_distribution` makes this distribution rather than reading it."""
    return _kind(text.strip())[0] in SYNTHETIC


def _kind(text: str) -> tuple[str, str, str]:
    """`zipf:1.2` as its kind, the colon and the parameter."""
    kind, colon, parameter = text.partition(":")
    return "log-normal" if kind == "lognormal" else kind, colon, parameter


def parse_distribution(
    text: str,
    *,
    num_experts: int | None = None,
    total_tokens: int | None = None,
    seed: int = 0,
    max_per_expert: int | None = None,
) -> Distribution:
    """What `--distribution` means.

    Args:
        text: a recorded name; `even`; `hot` or `hot:SHARE` (default 0.6); `zipf` or `zipf:S` (default 1);
            `log-normal` or `log-normal:SIGMA` (default 1.5); or a JSON file: anything with a path separator, ending in
            .json, or that exists. Names come first. FILE:layer=3,step=0 chooses from a trace.
        num_experts, total_tokens: the size to make or resample to; None is the size recorded, for synthetic ones that
            of autoround-256.
        seed, max_per_expert: as in `zipf` and `resample`.
    Raises: ValueError, one line.
    """
    text = text.strip()
    kind, colon, parameter = _kind(text)
    if text in RECORDED:
        return resample(recorded(text), num_experts, total_tokens, seed, max_per_expert=max_per_expert)
    if kind in SYNTHETIC:
        default = recorded()
        experts = default.num_experts if num_experts is None else num_experts
        rows = default.total_tokens if total_tokens is None else total_tokens
        if kind == "even":
            if colon:
                raise ValueError(f"distribution: {reprlib.repr(text)}; even takes no parameter, give even.")
            return even(experts, rows, max_per_expert=max_per_expert)
        value = _number(text, kind, parameter) if colon else _DEFAULTS[kind]
        make = {"hot": hot, "zipf": zipf, "log-normal": log_normal}[kind]
        return make(value, experts, rows, seed, max_per_expert=max_per_expert)
    separators = tuple(filter(None, (os.sep, os.altsep)))
    chosen = re.fullmatch(r"(.+):((?:layer|step)=.*)", text)
    file, choice = chosen.groups() if chosen and not os.path.exists(text) else (text, None)
    if file and (file.endswith(".json") or any(sep in file for sep in separators) or os.path.exists(file)):
        return resample(from_file(file, choice), num_experts, total_tokens, seed, max_per_expert=max_per_expert)
    known = ", ".join([*RECORDED, "even", "hot[:SHARE]", "zipf[:S]", "log-normal[:SIGMA]"])
    raise ValueError(f"distribution: {reprlib.repr(text)} is not known; expected one of {known}, or a JSON file.")


def route(logits: torch.Tensor, top_k: int, *, renormalize: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose top_k experts for each token.

        p = softmax(logits[t])        t = 0..T-1
        expert_ids[t] = the top_k largest of p
        expert_weights[t] = p[expert_ids[t]], divided by their sum if renormalize

    Args:
        logits: [T, E]; fp16, bf16, fp32 or fp64; any strides. The softmax is computed in fp32.
        top_k: 1..E.
        renormalize: weights of a token sum to 1 (Mixtral, Qwen); False keeps the softmax's.
    Returns: expert_ids [T, top_k] int32 and expert_weights [T, top_k] fp32, largest weight first; which of two equal
        experts comes first is torch.topk's choice.
    Raises: ValueError if logits are not a floating-point matrix with E >= 1, or for any other top_k.

    No host synchronisation; safe in a CUDA graph.
    """
    if logits.ndim != 2 or logits.shape[1] < 1 or not logits.is_floating_point():
        given = f"{tuple(logits.shape)} {str(logits.dtype).removeprefix('torch.')}"
        raise ValueError(f"route: logits are {given}; expected floating point [T, E] with E >= 1.")
    if not _is_int(top_k) or not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"route: top_k is {top_k!r}; expected an int in 1..E = 1..{logits.shape[1]}.")
    weights, ids = torch.softmax(logits, dim=-1, dtype=torch.float32).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return ids.to(torch.int32), weights


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _short(value: float) -> str:
    return str(float(value)).removesuffix(".0")


def _problem(counts: Sequence[object], what: str) -> str | None:
    """Why `counts` cannot be num_tokens_per_expert, or None."""
    if not counts:
        return f"{what} is empty; expected at least one expert"
    for e, n in enumerate(counts):
        if not _is_int(n) or n < 0:
            return f"{what}[{e}] is {reprlib.repr(n)}; expected a non-negative integer"
    total = sum(n for n in counts if _is_int(n))
    return f"{what} sums to {reprlib.repr(total)}; expected at most {MAX_ROWS} (int32)" if total > MAX_ROWS else None


def _parse(text: bytes, where: str, name: str, source: str, choice: str | None = None) -> Distribution:
    """A distribution from JSON; `name` and `source` hold where the file does not say."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON ({error}).") from None
    if is_trace(data):
        trace = Trace.of(data, where)
        chosen, counts = trace.choose(where, choice)
        return Distribution(f"{name}:{chosen}", tuple(counts), f"{chosen} of a trace of {trace.model}")
    if choice is not None:
        raise ValueError(f"{where} is no trace, so there is nothing to choose by {reprlib.repr(choice)}.")
    what = "the list"
    if isinstance(data, dict):
        what = "num_tokens_per_expert"
        if what not in data:
            raise ValueError(f"{where} is an object without {what}; add it, a list of counts.")
        name, source, data = data.get("name", name), data.get("source", source), data[what]
    if not isinstance(data, list):
        rule = "a list of counts, or an object with num_tokens_per_expert"
        raise ValueError(f"{where} holds {reprlib.repr(data)}; expected {rule}.")
    if problem := _problem(data, what):
        raise ValueError(f"{where}: {problem}.")
    try:
        return Distribution(name, tuple(data), source)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _number(text: str, kind: str, parameter: str) -> float:
    try:
        return float(parameter)
    except ValueError:
        rule = f"expected a number after the colon, as in {kind}:1.2"
        raise ValueError(f"distribution: {reprlib.repr(text)}; {rule}.") from None


def _check_parameter(where: str, what: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= sys.float_info.max:
        raise ValueError(f"{where}: {what} is {reprlib.repr(value)}; expected a finite number >= 0.")


def _check_sizes(where: str, num_experts: int, total_tokens: int, max_per_expert: int | None) -> None:
    if not _is_int(num_experts) or not 1 <= num_experts <= MAX_EXPERTS:
        given = reprlib.repr(num_experts)
        raise ValueError(f"{where}: cannot be spread over {given} experts; expected an int in 1..{MAX_EXPERTS}.")
    if not _is_int(total_tokens) or not 0 <= total_tokens <= MAX_ROWS:
        given = reprlib.repr(total_tokens)
        raise ValueError(f"{where}: cannot have {given} rows; expected an int in 0..{MAX_ROWS}.")
    if max_per_expert is not None and (not _is_int(max_per_expert) or max_per_expert < 0):
        given = reprlib.repr(max_per_expert)
        raise ValueError(f"{where}: max_per_expert is {given}; expected a non-negative int or None.")


def _apportion(where: str, weights: Sequence[int], total: int, cap: int | None) -> list[int]:
    """Integers in proportion to the weights: the largest-remainder (Hamilton) rule in exact arithmetic.

    A larger weight never gets less, equal remainders favour the first, weight 0 gets 0. With a cap, the largest are
    held at it and the rest share what is left, until every share fits (water-filling).
    """
    order = sorted((e for e, w in enumerate(weights) if w > 0), key=lambda e: -weights[e])
    if cap is not None and len(order) * cap < total:
        given = f"{len(order)} active experts of at most {cap} rows hold {len(order) * cap}, not {total} rows"
        raise ValueError(f"{where}: {given}; raise max_per_expert or lower the rows.")
    counts = [0] * len(weights)
    weight, capped = sum(weights), 0
    # Holding one at the cap never lowers the share of the rest, so one pass from the largest finds them all.
    while cap is not None and capped < len(order) and weights[order[capped]] * total >= cap * weight:
        counts[order[capped]] = cap
        total, weight, capped = total - cap, weight - weights[order[capped]], capped + 1
    remainders: list[tuple[int, int]] = []
    for e in order[capped:]:
        counts[e], remainder = divmod(weights[e] * total, weight)
        remainders.append((-remainder, e))
    missing = total - sum(counts[e] for e in order[capped:])
    for _, e in sorted(remainders)[:missing]:
        counts[e] += 1
    return counts


def _reshape(counts: Sequence[int], num_experts: int) -> list[int]:
    """Weights of another number of experts: the empty share kept, the active ones at evenly spaced quantiles."""
    ordered = sorted(n for n in counts if n > 0)
    if not ordered:
        return [0] * num_experts
    active = max(1, (2 * num_experts * len(ordered) + len(counts)) // (2 * len(counts)))
    if active == 1:
        return [1] + [0] * (num_experts - 1)
    last, steps = len(ordered) - 1, active - 1
    weights = []
    for i in range(active):
        low, part = divmod(i * last, steps)
        weights.append(ordered[low] * (steps - part) + ordered[min(low + 1, last)] * part)
    return weights[::-1] + [0] * (num_experts - active)


def _shuffled(values: list[int], seed: int) -> list[int]:
    # Python promises the same random() for a seed in every version, but not the same shuffle().
    rng = random.Random(seed)
    keys = [rng.random() for _ in values]
    return [values[i] for i in sorted(range(len(values)), key=keys.__getitem__)]


def _synthetic(
    name: str, rule: str, exponents: list[float], total_tokens: int, seed: int, max_per_expert: int | None
) -> Distribution:
    """Counts in proportion to exp(exponents), the largest exponent being 0, in an order given by the seed."""
    # 2**40 steps: below what a row can tell, above the last bit in which exp() differs between platforms.
    weights = [max(1, round(math.exp(exponent) * 2**40)) for exponent in exponents]
    counts = _apportion(name, weights, total_tokens, max_per_expert)
    scaled = None
    if max_per_expert is not None and max(_apportion(name, weights, total_tokens, None)) > max_per_expert:
        scaled = f"{name} with at most {max_per_expert} rows per expert, the excess spread over the others"
    source = f"synthetic: {rule}, experts shuffled with seed {seed}"
    return Distribution(name, tuple(_shuffled(counts, seed)), source, scaled)
