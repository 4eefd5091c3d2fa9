"""What the public operations promise of their arguments, checked once; no value of a tensor is read."""

from __future__ import annotations

import torch

from .formats import FORMATS, QuantWeight

__all__ = [
    "PackedCall",
    "check_activation_format",
    "check_activations",
    "check_columns",
    "check_counts",
    "check_frozen",
    "check_out",
    "check_packed",
]

_FP8 = {torch.float8_e4m3fn: "fp8_e4m3", torch.float8_e5m2: "fp8_e5m2"}
_FLOAT = {torch.bfloat16: "bf16", torch.float16: "fp16"}

# activations, weights, num_tokens_per_expert, scales, zeros, weight_bits, group_size, asym
PackedCall = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None, int, int, bool]


def check_columns(
    where: str, activations: torch.Tensor, weights: torch.Tensor, scales: torch.Tensor | None
) -> tuple[torch.Tensor, QuantWeight]:
    """What `moe_gemm` promises: weights [E, K, N] as they are, scales by output column."""
    _check_3d(where, weights, "[E, K, N]")
    if weights.dtype not in _FLOAT or activations.dtype not in (weights.dtype, torch.float32):
        raise ValueError(
            f"{where}: weights is {weights.dtype}, activations {activations.dtype}; expected bf16 or fp16 weights in "
            f"the dtype of the activations. Quantized weights go to moe_gemm_prefill or moe_gemm_decode."
        )
    x = check_activations(where, activations, weights.shape[1], weights.device)
    weight = _weight(where, weights.mT, None, None, _FLOAT[weights.dtype], None)
    expected = (weight.E, weight.N)
    if scales is not None and (tuple(scales.shape) != expected or scales.dtype not in (*_FLOAT, torch.float32)):
        raise ValueError(
            f"{where}: scales is {tuple(scales.shape)} {scales.dtype}; expected [E, N] = {expected} in bf16, fp16 or "
            f"fp32."
        )
    if scales is not None:
        check_device(where, "scales", scales, x.device)
    return x, weight


def check_packed(where: str, scale_scheme: str | None, call: PackedCall) -> tuple[torch.Tensor, QuantWeight]:
    """Everything the tensor-level calls promise, checked once: ARK's contract, group scales in the activation dtype."""
    if scale_scheme is not None:
        return _check_per_tensor(where, scale_scheme, call)
    activations, weights, _, scales, zeros, weight_bits, group_size, asym = call
    _check_3d(where, weights, "[E, N, K_packed]")
    name = _format_name(where, activations, weights, weight_bits, asym)
    fmt = FORMATS[name]
    x = check_activations(where, activations, None, weights.device)
    k = x.shape[1]
    if weights.dtype != fmt.storage:
        raise ValueError(f"{where}: weights is {weights.dtype}; weight_bits={weight_bits} expected {fmt.storage}.")
    if k % fmt.codes_per_byte or weights.shape[2] != fmt.packed_k(k):
        raise ValueError(
            f"{where}: weights is {tuple(weights.shape)}; expected [E, N, K / {fmt.codes_per_byte}] with K={k} from "
            f"activations {tuple(activations.shape)}, weight_bits={fmt.bits}."
        )
    for label, t in (("scales", scales), ("zeros", zeros)):
        if t is not None and fmt.quantized and t.dtype != x.dtype:
            raise ValueError(
                f"{where}: {label} is {t.dtype}; expected {x.dtype}, as the activations. Weights with other scales go "
                f"to grouped_gemm as a QuantWeight."
            )
    return x, _weight(where, weights, scales, zeros, name, group_size if fmt.quantized else None)


def _check_per_tensor(where: str, scale_scheme: str, call: PackedCall) -> tuple[torch.Tensor, QuantWeight]:
    activations, weights, _, scales, zeros, _, _, asym = call
    if scale_scheme != "per_tensor":
        raise ValueError(f"{where}: scale_scheme is {scale_scheme!r}; expected None or 'per_tensor'.")
    if asym or zeros is not None:
        raise ValueError(f"{where}: scale_scheme='per_tensor' is symmetric; drop asym and zeros.")
    _check_3d(where, weights, "[E, K, N]")
    name = {torch.int8: "int8_sym", **_FP8}.get(weights.dtype)
    if name is None:
        raise ValueError(
            f"{where}: weights is {weights.dtype}; scale_scheme='per_tensor' expected torch.int8, float8_e4m3fn or "
            f"float8_e5m2 [E, K, N]."
        )
    x = check_activations(where, activations, weights.shape[1], weights.device)
    if scales is None or scales.dtype != torch.float32 or tuple(scales.shape) != (weights.shape[0],):
        given = "None" if scales is None else f"{tuple(scales.shape)} {scales.dtype}"
        raise ValueError(f"{where}: scales is {given}; scale_scheme='per_tensor' expected ({weights.shape[0]},) fp32.")
    codes = (weights.view(torch.uint8) if weights.dtype == torch.int8 else weights).mT
    return x, _weight(where, codes, scales, None, name, None, "tensor")


def _format_name(where: str, activations: torch.Tensor, weights: torch.Tensor, weight_bits: int, asym: bool) -> str:
    if weights.dtype in _FP8:
        if asym:
            raise ValueError(f"{where}: asym=True with {weights.dtype} weights; FP8 has no zero points, drop it.")
        return _FP8[weights.dtype]
    if not isinstance(weight_bits, int) or weight_bits not in (2, 4, 8, 16):
        raise ValueError(f"{where}: weight_bits is {weight_bits!r}; expected 2, 4, 8 or 16.")
    if weight_bits < 16:
        return f"int{weight_bits}_{'asym' if asym else 'sym'}"
    if asym:
        raise ValueError(f"{where}: asym=True with weight_bits=16; unquantized weights have no zero points, drop it.")
    if weights.dtype not in _FLOAT or (weights.dtype != activations.dtype and activations.dtype != torch.float32):
        raise ValueError(
            f"{where}: weights is {weights.dtype}, activations {activations.dtype}; weight_bits=16 expected bf16 or "
            f"fp16 weights in the dtype of the activations."
        )
    return _FLOAT[weights.dtype]


def _check_3d(where: str, weights: torch.Tensor, expected: str) -> None:
    if weights.ndim != 3 or weights.shape[0] < 1:
        raise ValueError(f"{where}: weights is {tuple(weights.shape)}; expected {expected} with at least one expert.")


def check_activations(where: str, x: torch.Tensor, k: int | None, device: torch.device) -> torch.Tensor:
    """[total_tokens, K] in a supported dtype on the device of the weights, with contiguous rows."""
    allowed = (*_FLOAT, torch.float32) if x.device.type == "cpu" else tuple(_FLOAT)
    if x.ndim != 2 or x.shape[1] < 1 or (k is not None and x.shape[1] != k):
        raise ValueError(
            f"{where}: activations is {tuple(x.shape)}; expected [total_tokens, K]" + (f" with K={k}." if k else ".")
        )
    if x.dtype not in allowed:
        raise ValueError(f"{where}: activations is {x.dtype}; expected bf16 or fp16 (fp32 on the CPU only).")
    check_device(where, "weights", x, device, "activations")
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def check_device(where: str, name: str, t: torch.Tensor, device: torch.device, other: str | None = None) -> None:
    if t.device != device:
        pair = f"{other} is on {t.device}, {name} on {device}" if other else f"{name} is on {t.device}, not on {device}"
        raise ValueError(f"{where}: {pair}; put all tensors on one device.")


def check_out(where: str, out: torch.Tensor, x: torch.Tensor, n: int) -> None:
    if tuple(out.shape) != (x.shape[0], n) or out.dtype != x.dtype or out.device != x.device:
        raise ValueError(
            f"{where}: out is {tuple(out.shape)} {out.dtype} on {out.device}; expected {(x.shape[0], n)} {x.dtype} on "
            f"{x.device}."
        )
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError(f"{where}: out= has no gradient; drop it, or call under torch.no_grad().")


def check_phase(where: str, phase: str, decode_threshold: int | None) -> None:
    """The phase of a call, and the rows per expert up to which "auto" takes it for a decode."""
    if phase not in ("auto", "decode", "prefill"):
        raise ValueError(f"{where}: phase is {phase!r}; expected 'auto', 'decode' or 'prefill'.")
    if decode_threshold is None:
        return
    if not isinstance(decode_threshold, int) or isinstance(decode_threshold, bool) or decode_threshold < 0:
        raise ValueError(
            f"{where}: decode_threshold is {decode_threshold!r}; expected rows per expert, an int >= 0, or None."
        )


def check_activation_format(where: str, activation_format: str | None, *, traced: bool) -> None:
    """None, or "int8" for a call that is run rather than recorded; who can run it says the selection."""
    if activation_format not in ((None,) if traced else (None, "int8")):
        raise ValueError(f"{where}: activation_format is {activation_format!r}; expected None, or untraced 'int8'.")


def check_frozen(where: str, **tensors: torch.Tensor | None) -> None:
    for name, t in tensors.items():
        if t is not None and t.requires_grad:
            raise ValueError(
                f"{where}: {name} requires a gradient; experts are frozen, only activations have one. Use "
                f"{name}.requires_grad_(False), or torch.no_grad()."
            )


def _weight(
    where: str,
    codes: torch.Tensor,
    scales: torch.Tensor | None,
    zeros: torch.Tensor | None,
    name: str,
    group_size: int | None,
    scale_layout: str = "group",
) -> QuantWeight:
    try:
        return QuantWeight(codes, scales, zeros, FORMATS[name], group_size, scale_layout)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_counts(where: str, counts: torch.Tensor, x: torch.Tensor, weight: QuantWeight) -> None:
    """Shape, dtype and device of the counts; no value is read."""
    if not isinstance(counts, torch.Tensor):
        raise ValueError(
            f"{where}: num_tokens_per_expert is a {type(counts).__name__}; expected a tensor [E] = ({weight.E},) int32."
        )
    if counts.ndim != 1 or counts.shape[0] != weight.E or counts.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"{where}: num_tokens_per_expert is {tuple(counts.shape)} {counts.dtype}; expected [E] = ({weight.E},) "
            f"int32."
        )
    check_device(where, "num_tokens_per_expert", counts, x.device)
