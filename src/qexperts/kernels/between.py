"""What a layer does before, between and after its multiplications, one launch each.

    sort      program b ranks slots 32 b ... among all: by expert, then by slot; the last programs count the rows of 32
              experts each. S^2 comparisons, and still less than the launches of a sort for the S of a decode
    gate      a program computes a block of act(h[:, :I]) * h[:, I:], or act(h), rounded where torch rounds
    combine   a program adds up a block of one token's results, in fp32 and in the order of its slots

Index glossary: E experts, S slots, I intermediate size, N columns of the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .dequant import round_to
from .launcher import Launcher

__all__ = ["ACTIVATIONS", "MAX_SLOTS", "combine", "gate", "sort"]

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")
MAX_SLOTS = 8192  # that sort is faster for than a sort of torch
_BLOCK = 32  # slots or experts of a program
_COLUMNS = 1024


@triton.jit
def _expert(ids, E):
    """E for ids of no expert."""
    return tl.where((ids >= 0) & (ids < E), ids, E).to(tl.int32)


@triton.jit(do_not_specialize=["S", "E"])
def sort_kernel(
    row_to_slot_ptr, slot_to_row_ptr, row_to_token_ptr, counts_ptr, ids_ptr, S, E, TOP_K,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program, blocks = tl.program_id(0), tl.cdiv(S, BLOCK)
    offs = tl.arange(0, CHUNK)
    if program < blocks:
        slots = program * BLOCK + tl.arange(0, BLOCK)
        mine = _expert(tl.load(ids_ptr + slots, mask=slots < S, other=0), E)[:, None]
        rank = tl.zeros((BLOCK,), tl.int32)
        for i in range(0, S, CHUNK):
            others = i + offs
            ids = _expert(tl.load(ids_ptr + others, mask=others < S, other=0), E)
            ids = tl.where(others < S, ids, E + 1)[None, :]
            before = (ids < mine) | ((ids == mine) & (others[None, :] < slots[:, None]))  # [BLOCK, CHUNK]
            rank += tl.sum(before.to(tl.int32), 1)
        tl.store(slot_to_row_ptr + slots, rank, mask=slots < S)
        tl.store(row_to_slot_ptr + rank, slots, mask=slots < S)
        tl.store(row_to_token_ptr + rank, slots // TOP_K, mask=slots < S)
    else:
        experts = (program - blocks) * BLOCK + tl.arange(0, BLOCK)
        count = tl.zeros((BLOCK,), tl.int32)
        for i in range(0, S, CHUNK):
            others = i + offs
            ids = _expert(tl.load(ids_ptr + others, mask=others < S, other=-1), E)[None, :]
            count += tl.sum((ids == experts[:, None]).to(tl.int32), 1)
        tl.store(counts_ptr + experts, count, mask=experts < E)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """fp32 -> fp32"""
    if ACTIVATION == "silu":
        return x / (1.0 + tl.exp(-x))
    if ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x / (1.0 + tl.exp(-2.0 * inner))  # 0.5 * (1 + tanh(u)) is 1 / (1 + exp(-2 u))
    positive = tl.where(x < 0, 0.0, x)  # keeps NaN
    return positive * positive if ACTIVATION == "relu2" else positive


@triton.jit(do_not_specialize=["S"])
def gate_kernel(
    out_ptr, h_ptr, S, I, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_I: tl.constexpr, PATH: tl.constexpr
):
    DTYPE: tl.constexpr = h_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    offs_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask = offs_i < I
    h_ptrs = h_ptr + row * (2 * I if GATED else I) + offs_i
    y = round_to(_activate(tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32), ACTIVATION), DTYPE, PATH)
    if GATED:
        up = tl.load(h_ptrs + I, mask=mask, other=0.0)
        y = round_to(y.to(tl.float32) * up.to(tl.float32), DTYPE, PATH)
    tl.store(out_ptr + row * I + offs_i, y, mask=mask)


@triton.jit(do_not_specialize=["S", "E"])
def combine_kernel(
    out_ptr, y_ptr, slot_to_row_ptr, ids_ptr, weights_ptr, S, E, N,
    TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, PATH: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs_n < N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for j in range(TOP_K):
        slot = token * TOP_K + j
        ids = tl.load(ids_ptr + slot)
        known = (ids >= 0) & (ids < E)  # whatever the weight of another is, it contributes nothing
        row = tl.load(slot_to_row_ptr + slot).to(tl.int64)
        weight = tl.where(known, tl.load(weights_ptr + slot).to(tl.float32), 0.0)
        y = tl.load(y_ptr + row * N + offs_n, mask=offs_n < tl.where(known, N, 0), other=0.0)
        total += weight * y.to(tl.float32)
    tl.store(out_ptr + token * N + offs_n, round_to(total, out_ptr.dtype.element_ty, PATH), mask=mask)


_SORT, _GATE, _COMBINE = (
    Launcher(sort_kernel, "sort"),
    Launcher(gate_kernel, "gate"),
    Launcher(combine_kernel, "combine"),
)


def _path(t: torch.Tensor) -> str:
    return "interpreter" if t.device.type == "cpu" else "portable"


def sort(
    row_to_slot: torch.Tensor, slot_to_row: torch.Tensor, row_to_token: torch.Tensor, counts: torch.Tensor,
    expert_ids: torch.Tensor,
) -> None:  # fmt: skip
    """row_to_slot, slot_to_row, row_to_token: [S]; counts: [E]; int32. expert_ids: [T, top_k]; contiguous."""
    (tokens, top_k), experts = expert_ids.shape, counts.shape[0]
    slots = tokens * top_k
    chunk = 32 if slots <= 32 else 128
    launch = _SORT.bind(
        (expert_ids.dtype, top_k, chunk),
        expert_ids.device,
        (-(-slots // _BLOCK) + -(-experts // _BLOCK), 1, 1),
        (slots, experts, top_k),
        {"BLOCK": _BLOCK, "CHUNK": chunk},
        4,
        f"top_k={top_k}",
    )
    launch(row_to_slot, slot_to_row, row_to_token, counts, expert_ids)


def gate(out: torch.Tensor, h: torch.Tensor, activation: str) -> None:
    """out: [S, I]; h: [S, 2I], or [S, I] without a gate; contiguous. activation: one of `ACTIVATIONS`."""
    s, i = out.shape
    block, gated = min(_COLUMNS, triton.next_power_of_2(i)), h.shape[1] != i
    launch = _GATE.bind(
        (h.dtype, i, activation, gated, block),
        h.device,
        (s, -(-i // block), 1),
        (s, i),
        {"ACTIVATION": activation, "GATED": gated, "BLOCK_I": block, "PATH": _path(h)},
        4,
        f"{activation} (I={i})",
    )
    launch(out, h)


def combine(
    out: torch.Tensor, y: torch.Tensor, slot_to_row: torch.Tensor, expert_ids: torch.Tensor, weights: torch.Tensor,
    experts: int,
) -> None:  # fmt: skip
    """out: [T, N]; y: [S, N]; slot_to_row: [S]; expert_ids, weights: [T, top_k]; contiguous. experts: E."""
    tokens, n = out.shape
    top_k, block = expert_ids.shape[1], min(_COLUMNS, triton.next_power_of_2(n))
    launch = _COMBINE.bind(
        (out.dtype, expert_ids.dtype, weights.dtype, n, top_k, block),
        out.device,
        (tokens, -(-n // block), 1),
        (tokens * top_k, experts, n),
        {"TOP_K": top_k, "BLOCK_N": block, "PATH": _path(y)},
        4,
        f"top_k={top_k} (N={n})",
    )
    launch(out, y, slot_to_row, expert_ids, weights)
