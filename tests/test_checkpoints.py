"""Reading checkpoints: golden vectors of the real libraries, round trips of every packing, configs, clear errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_files as files
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from qexperts.errors import UnsupportedError
from qexperts.formats import FORMATS, QuantWeight
from qexperts.integrations.checkpoints import Checkpoint, StoredWeight
from qexperts.integrations.packing import Matrix, decode, sort_columns
from qexperts.integrations.schemes import Scheme
from qexperts.quantize import quantize, unpack
from qexperts.reference import exact_weight

DATA = Path(__file__).parent / "data" / "checkpoints"
GOLDEN = sorted(path.name for path in DATA.glob("*.safetensors"))
TINY = sorted(path.name for path in DATA.glob("ckpt_*"))
EXPERTS = "model.layers.0.mlp.experts"


def read_golden(name: str) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    with safe_open(DATA / name, framework="pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def golden_config(meta: dict[str, str]) -> dict[str, Any]:
    """The quantization config that a checkpoint with this vector would have."""
    sym, common = meta.get("sym") == "true", {}
    if "bits" in meta:
        common = {"bits": int(meta["bits"]), "group_size": int(meta["group_size"]), "sym": sym}
    if meta["lib"].startswith("auto-round"):
        packing = "auto_round:auto_gptq" if meta["zero_offset"] == "1" else "auto_round"
        return files.AUTO_ROUND | common | {"packing_format": packing}
    if meta["layout"] == "gptq":
        return files.GPTQ | common | {"checkpoint_format": meta["checkpoint_format"]}
    if meta["layout"] == "awq_gemm":
        return files.AWQ | {"group_size": common["group_size"]}
    if meta["layout"].endswith("pack-quantized"):
        group = common["group_size"] if meta["strategy"] == "group" else None
        return files.compressed_config(
            num_bits=common["bits"], symmetric=sym, strategy=meta["strategy"], group_size=group
        )
    if meta["layout"].endswith("float-quantized"):
        block = [16, 32] if meta["strategy"] == "block" else None
        return files.compressed_config(
            "float-quantized",
            num_bits=8,
            type="float",
            strategy=meta["strategy"],
            group_size=None,
            block_structure=block,
        )
    return files.FP8


NOT_STORED = ("codes", "zeros", "dequant", "qzeros_v1")


def natural(stored: StoredWeight, e: int = 0) -> torch.Tensor:
    """Exact weights with columns in the order of the input: [N, K] fp64."""
    w = exact_weight(stored.weight, e)
    return w if stored.order is None else torch.empty_like(w).index_copy_(1, stored.order[e].long(), w)


def unsigned(codes: torch.Tensor, format: str) -> torch.Tensor:
    """Packed codes -> [N, K], symmetric ones plus 2^(b-1)."""
    fmt = FORMATS[format]
    return unpack(codes, fmt).int() + (0 if fmt.asym else 2 ** (fmt.bits - 1))


def open_one(tmp_path: Path, tensors: files.Tensors, config: dict[str, Any] | None) -> Checkpoint:
    return Checkpoint.open(files.write(tmp_path, files.under("m", tensors), config))


def test_all_golden_data_is_here() -> None:
    assert len(GOLDEN) == 36 and len(TINY) == 4


@pytest.mark.parametrize("name", [name for name in GOLDEN if not name.startswith(("hf_fp8", "mxfp4"))])
def test_golden_vectors(name: str, tmp_path: Path) -> None:
    """Codes, zero points and weights of the library that wrote a vector, exactly, through the whole reader."""
    meta, vector = read_golden(name)
    stored = {key: t for key, t in vector.items() if key not in NOT_STORED}
    checkpoint = open_one(tmp_path, stored, golden_config(meta))
    scheme, linear = checkpoint.scheme("m"), checkpoint.linear("m")
    assert scheme is not None and linear.weight.format.name == scheme.format
    assert torch.equal(natural(linear).float(), vector["dequant"])
    assert torch.equal(linear.dense(torch.float32), vector["dequant"])
    assert checkpoint.used == checkpoint.names
    if "codes" not in vector:
        return
    matrix = decode(scheme, stored)
    assert torch.equal(unsigned(matrix.codes, scheme.format), vector["codes"].int())
    zero = torch.full_like(vector["zeros"], 2 ** (matrix.format.bits - 1)) if matrix.zeros is None else matrix.zeros
    assert torch.equal(zero.int(), vector["zeros"])
    # auto-round multiplies in fp16; rounding the exact product once is the same
    if linear.weight.scale_dtype == torch.float16 and linear.order is None:
        index = torch.arange(64) // int(meta["group_size"])
        difference = (vector["codes"].int() - vector["zeros"][:, index]).half()
        assert torch.equal(linear.dense(torch.float16), difference * vector["scales"].t()[:, index])


@pytest.mark.parametrize("name", [name for name in GOLDEN if name.startswith("gptqmodel")])
def test_golden_vectors_of_gptq_v1(name: str, tmp_path: Path) -> None:
    """GPTQModel's own conversion of zero points to v1, zero points 0 included."""
    meta, vector = read_golden(name)
    stored = {key: t for key, t in vector.items() if key not in NOT_STORED} | {"qzeros": vector["qzeros_v1"]}
    assert (vector["zeros"] == 0).any()
    linear = open_one(tmp_path, stored, golden_config(meta) | {"checkpoint_format": "gptq"}).linear("m")
    assert torch.equal(natural(linear).float(), vector["dequant"])
    assert (linear.order is not None) == name.endswith("desc_act.safetensors")


def test_golden_block_fp8(tmp_path: Path) -> None:
    meta, vector = read_golden("hf_fp8_block128.safetensors")
    linear = open_one(tmp_path, vector, golden_config(meta)).linear("m")
    assert linear.weight.scale_layout == "block128" and linear.weight.scale_dtype == torch.float32
    scale = vector["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(natural(linear), vector["weight"].double() * scale.double())


def test_mxfp4_is_named(tmp_path: Path) -> None:
    _, vector = read_golden("mxfp4_gpt_oss.safetensors")
    tensors = {f"{EXPERTS}.{key}": t for key, t in vector.items() if key.startswith("gate_up_proj")}
    checkpoint = Checkpoint.open(files.write(tmp_path, tensors, None))
    with pytest.raises(UnsupportedError, match=r"gate_up_proj_blocks of .*model.safetensors, which is MXFP4"):
        checkpoint.fused(f"{EXPERTS}.gate_up_proj")
    files.write(tmp_path, tensors, {"quant_method": "mxfp4"})
    with pytest.raises(UnsupportedError, match="cannot read quant_method 'mxfp4'"):
        Checkpoint.open(tmp_path)


def by_hand(tensors: files.Tensors, config: dict[str, Any]) -> torch.Tensor:
    """A slow decoder of one linear of the tiny checkpoints, apart from the one under test: [N, K] fp64."""
    bits = config["bits"] if "bits" in config else config["config_groups"]["group_0"]["weights"]["num_bits"]
    if "weight_packed" in tensors:
        codes, zeros, scales = files.unwords(tensors["weight_packed"], bits), 2 ** (bits - 1), tensors["weight_scale"]
    else:
        zeros, scales = files.unwords(tensors["qzeros"], bits), tensors["scales"].t()
        if config["quant_method"] == "awq":
            codes = files.unwords(tensors["qweight"], bits)
            back = torch.tensor([files.AWQ_ORDER.index(c) for c in range(8)])
            codes, zeros = (t.unflatten(-1, (-1, 8))[..., back].flatten(-2) for t in (codes, zeros))
            codes = codes.t()
        else:
            codes = files.unwords(tensors["qweight"].t(), bits)
            zeros = zeros + config["packing_format"].endswith("auto_gptq")
        zeros = zeros.t()
    return files.product(codes, zeros, scales, 32)


@pytest.mark.parametrize("name", TINY)
def test_tiny_checkpoints(name: str) -> None:
    checkpoint = Checkpoint.open(DATA / name)
    raw = load_file(DATA / name / "model.safetensors")
    config = checkpoint.quantization
    assert config is not None and checkpoint.names == set(raw)

    def reference(module: str) -> torch.Tensor:
        own = {key.removeprefix(f"{module}."): t for key, t in raw.items() if key.startswith(f"{module}.")}
        return by_hand(own, config)

    gate_up = checkpoint.experts([[f"{EXPERTS}.{e}.gate_proj", f"{EXPERTS}.{e}.up_proj"] for e in range(4)])
    down = checkpoint.experts([[f"{EXPERTS}.{e}.down_proj"] for e in range(4)])
    assert (gate_up.weight.E, gate_up.weight.N, gate_up.weight.K) == (4, 128, 64)
    for e in range(4):
        both = torch.cat([reference(f"{EXPERTS}.{e}.{p}_proj") for p in ("gate", "up")])
        assert torch.equal(exact_weight(gate_up.weight, e), both)
        assert torch.equal(exact_weight(down.weight, e), reference(f"{EXPERTS}.{e}.down_proj"))
    if gate_up.weight.zeros is None:
        assert gate_up.weight.scales is not None and (gate_up.weight.scales < 0).any()  # a property of auto-round
    query = "model.layers.0.self_attn.q_proj"
    assert torch.equal(checkpoint.linear(query).dense(torch.float64), reference(query))
    for module in ("lm_head", "model.layers.0.mlp.gate", "model.norm", "model.embed_tokens"):
        assert checkpoint.scheme(module) is None
    assert torch.equal(checkpoint.tensor("model.norm.weight"), raw["model.norm.weight"])
    assert {f"{query}.scales", f"{query}.weight_scale"} & checkpoint.used and "lm_head.weight" not in checkpoint.used


def sizes(bits: int) -> st.SearchStrategy[tuple[int, int, int, int, int]]:
    """bits, N, K, group size, seed; N fills words."""
    return st.tuples(
        st.just(bits),
        st.sampled_from((16, 32, 48)),
        st.integers(1, 4),
        st.sampled_from((16, 32)),
        st.integers(0, 99),
    ).map(lambda t: (t[0], t[1], t[2] * t[3], t[3], t[4]))


any_bits = st.sampled_from((2, 4, 8)).flatmap(sizes)


def check(matrix: Matrix, codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> None:
    assert torch.equal(unsigned(matrix.codes, matrix.format.name), codes.int())
    assert matrix.scales is not None and torch.equal(matrix.scales, scales) and matrix.scales.dtype == scales.dtype
    if matrix.format.asym:
        assert matrix.zeros is not None and torch.equal(matrix.zeros.int(), zeros)
    else:
        assert matrix.zeros is None and bool((zeros == 2 ** (matrix.format.bits - 1)).all())


@given(any_bits, st.booleans(), st.sampled_from(("raw", "word-1", "field-1")), st.sampled_from(("float16", "float32")))
def test_gptq_round_trip(size: tuple[int, ...], sym: bool, convention: str, dtype: str) -> None:
    bits, n, k, group, seed = size
    codes, zeros, scales = files.random_groups(bits, n, k, group, seed, sym=sym)
    if convention == "field-1":
        zeros = zeros.clamp(min=1)
        if not sym:
            zeros.view(-1)[0] = 2**bits  # auto-round reads the largest field plus 1 without a mask
    scales = scales.to(getattr(torch, dtype))
    scheme = Scheme("test", "gptq", f"int{bits}_{'sym' if sym else 'asym'}", "group", group, zeros=convention)
    check(decode(scheme, files.gptq(codes, zeros, scales, bits, convention)), codes, zeros, scales)


@given(sizes(4), st.booleans())
def test_awq_round_trip(size: tuple[int, ...], sym: bool) -> None:
    _, n, k, group, seed = size
    codes, zeros, scales = files.random_groups(4, n, k, group, seed, sym=sym)
    scheme = Scheme("test", "awq", f"int4_{'sym' if sym else 'asym'}", "group", group, zeros="raw")
    check(decode(scheme, files.awq(codes, zeros, scales)), codes, zeros, scales)


@given(st.sampled_from((2, 4, 8)), st.integers(1, 40), st.integers(1, 20), st.booleans(), st.integers(0, 99))
def test_compressed_tensors_round_trip(bits: int, n: int, units: int, sym: bool, seed: int) -> None:
    """One scale a row, so that K and N are anything that fills bytes: the last words have tails."""
    k = units * (8 // bits)
    codes, zeros, scales = files.random_groups(bits, max(n, 2), k, k, seed, sym=sym)
    stored = files.compressed(codes, None if sym else zeros, scales, bits)
    name = f"int{bits}_{'sym' if sym else 'asym'}"
    check(decode(Scheme("test", "compressed", name, "channel", zeros="raw"), stored), codes, zeros, scales)


@given(any_bits, st.booleans())
def test_act_order_round_trip(size: tuple[int, ...], sym: bool) -> None:
    """Sorting columns by group is exact, stable, and undone by order."""
    bits, n, k, group, seed = size
    codes, zeros, scales = files.random_groups(bits, n, k, group, seed, sym=sym)
    g_idx = torch.arange(k)[torch.randperm(k, generator=torch.Generator().manual_seed(seed))] // group
    scheme = Scheme("test", "gptq", f"int{bits}_{'sym' if sym else 'asym'}", "group", group, zeros="raw")
    stored = files.gptq(codes, zeros, scales, bits, "raw") | {"g_idx": g_idx.int()}
    matrix, order = sort_columns(decode(scheme, stored))
    other = files.compressed(codes, None if sym else zeros, scales, bits) | {"weight_g_idx": g_idx.int()}
    again, same = sort_columns(decode(dataclasses.replace(scheme, packing="compressed"), other))
    assert torch.equal(again.codes, matrix.codes) and (same is None) == (order is None)
    if torch.equal(g_idx, torch.arange(k) // group):
        assert order is None
        return
    assert order is not None and order.dtype == torch.int32
    assert torch.equal(g_idx[order.long()], torch.arange(k) // group)
    assert all((order[i : i + group].diff() > 0).all() for i in range(0, k, group))
    check(matrix, codes[:, order.long()], zeros, scales)


def test_v1_borrows_cross_fields() -> None:
    """The two readings of v1 differ as soon as a zero point was 0 (INTEROP 3.2)."""
    zeros = torch.full((8, 1), 8, dtype=torch.int32)
    zeros[2] = 0
    codes, scales = torch.zeros(8, 16, dtype=torch.uint8), torch.ones(8, 1).half()
    stored = files.gptq(codes, zeros, scales, 4, "word-1")

    def read(convention: str) -> list[int]:
        m = decode(Scheme("test", "gptq", "int4_asym", "group", 16, zeros=convention), stored)
        assert m.zeros is not None
        return m.zeros.int().flatten().tolist()

    assert read("word-1") == [8, 8, 0, 8, 8, 8, 8, 8]
    assert read("field-1") == [8, 8, 16, 7, 8, 8, 8, 8]


# kind -> tensors of one linear of N = 48, K = 64, its exact weights, and the config
def stored_kinds(seed: int) -> dict[str, tuple[files.Tensors, torch.Tensor, dict[str, Any] | None]]:
    codes, zeros, scales = files.random_groups(4, 48, 64, 32, seed)
    w4 = files.product(codes, zeros, scales, 32)
    wide, _, row = files.random_groups(8, 48, 64, 64, seed, sym=True)
    gen = torch.Generator().manual_seed(seed)
    fp8 = torch.randn(48, 64, generator=gen).to(torch.float8_e4m3fn)
    one, block = torch.rand(1, generator=gen), torch.rand(3, 2, generator=gen)
    per_element = block.repeat_interleave(16, 0).repeat_interleave(32, 1).double()
    plain = torch.randn(48, 64, generator=gen).bfloat16()
    floats = dict(num_bits=8, type="float", group_size=None)
    e8m0 = torch.tensor([[0.5]]).to(torch.float8_e8m0fnu)
    return {
        "gptq": (files.gptq(codes, zeros, scales, 4, "raw"), w4, files.GPTQ),
        "awq": (files.awq(codes, zeros, scales), w4, files.AWQ),
        "compressed": (files.compressed(codes, zeros, scales, 4), w4, files.compressed_config(symmetric=False)),
        "int8": (
            {"weight": wide.view(torch.int8) ^ -128, "weight_scale": row},
            files.product(wide, 128, row, 64),
            files.compressed_config("int-quantized", num_bits=8, strategy="channel"),
        ),
        "int8 asym": (
            {
                "weight": wide.view(torch.int8) ^ -128,
                "weight_scale": row,
                "weight_zero_point": torch.full((48, 1), -128).char(),
            },
            files.product(wide, 0, row, 64),
            files.compressed_config("int-quantized", num_bits=8, strategy="channel", symmetric=False),
        ),
        "fp8 tensor": (
            {"weight": fp8, "weight_scale": one, "input_scale": one},
            fp8.double() * one.double(),
            files.compressed_config("float-quantized", strategy="tensor", **floats),
        ),
        "fp8 block": (
            {"weight": fp8, "weight_scale_inv": block.bfloat16()},
            fp8.double() * per_element.bfloat16().double(),
            files.FP8 | {"weight_block_size": [16, 32]},
        ),
        "fp8 block across linears": (
            {"weight": fp8, "weight_scale_inv": block[:2]},
            fp8.double() * block[:2].repeat_interleave(32, 0)[:48].repeat_interleave(32, 1).double(),
            files.FP8 | {"weight_block_size": [32, 32]},
        ),
        "fp8 block128": ({"weight": fp8, "weight_scale_inv": e8m0}, fp8.double() * 0.5, files.FP8),
        "fp8 e5m2": (
            {"weight": fp8.to(torch.float8_e5m2), "weight_scale": row.flatten()},
            fp8.to(torch.float8_e5m2).double() * row.double(),
            files.AUTO_ROUND
            | {"packing_format": "auto_round:fp8", "bits": 8, "group_size": -1, "data_type": "fp8_e5m2"},
        ),
        "bf16": ({"weight": plain}, plain.double(), None),
    }


def interleave(t: torch.Tensor) -> torch.Tensor:
    return torch.stack(t.chunk(2), 1).flatten(0, 1)


@pytest.mark.parametrize("rows", [None, interleave], ids=["", "interleaved"])
@pytest.mark.parametrize("kind", stored_kinds(0))
def test_gate_and_up_are_concatenated(
    kind: str, rows: Callable[[torch.Tensor], torch.Tensor] | None, tmp_path: Path
) -> None:
    """Two experts of [gate, up] with biases, in every way of storing one linear, spread over shards."""
    tensors, expected, config = {}, [], None
    bias = torch.randn(4, 48)
    for i in range(4):
        own, w, config = stored_kinds(i)[kind]
        tensors |= files.under(f"{EXPERTS}.{i // 2}.{('gate', 'up')[i % 2]}_proj", own | {"bias": bias[i]})
        expected.append(w)
    path = files.write(tmp_path, tensors, config, shards=[f"{EXPERTS}.0", f"{EXPERTS}.1.up"])
    checkpoint = Checkpoint.open(path)
    modules = [[f"{EXPERTS}.{e}.gate_proj", f"{EXPERTS}.{e}.up_proj"] for e in range(2)]
    ragged = kind == "fp8 block128"  # rows 0..47 and 48..95 do not share scales, and K = 64 has no whole block
    if ragged:
        with pytest.raises(UnsupportedError, match=r"expert 0: .*0.gate_proj.weight of .*00001.* blocks of 128 x 128"):
            checkpoint.experts(modules, rows=rows)
        modules, expected, bias = [[names[0]] for names in modules], expected[::2], bias[::2]
        rows = None
    stored = checkpoint.experts(modules, rows=rows)
    per_expert = len(modules[0])
    for e in range(2):
        parts = slice(e * per_expert, (e + 1) * per_expert)
        w, b = torch.cat(expected[parts]), bias[parts].flatten()
        assert torch.equal(exact_weight(stored.weight, e), w if rows is None else rows(w))
        assert stored.bias is not None and torch.equal(stored.bias[e], b if rows is None else rows(b))
    assert ragged or checkpoint.used == checkpoint.names


def test_scales_keep_dtype_and_layout(tmp_path: Path) -> None:
    for kind, layout, dtype in (
        ("gptq", "group", torch.float16),
        ("int8", "channel", torch.float16),
        ("fp8 tensor", "tensor", torch.float32),
        ("fp8 block", "group", torch.bfloat16),
        ("fp8 block128", "block128", torch.float32),
        ("bf16", "none", None),
    ):
        tensors, w, config = stored_kinds(3)[kind]
        weight = open_one(tmp_path, tensors, config).linear("m").weight
        assert (weight.scale_layout, weight.scale_dtype) == (layout, dtype)
        assert torch.equal(exact_weight(weight, 0), w)


def test_scales_under_reordered_rows(tmp_path: Path) -> None:
    """One scale for all rows stays; blocks of rows that lie together stay, and become groups when rows move."""
    tensors, w, config = stored_kinds(3)["fp8 tensor"]
    moved = open_one(tmp_path, tensors, config).experts([["m"]], rows=interleave).weight
    assert moved.scale_layout == "tensor" and torch.equal(exact_weight(moved, 0), interleave(w))

    meta, vector = read_golden("hf_fp8_block128.safetensors")
    vector["weight_scale_inv"][1] *= -3
    tensors = files.under("gate", vector) | files.under("up", vector)
    short = {"weight": vector["weight"][:48], "weight_scale_inv": vector["weight_scale_inv"][:1]}
    tensors |= files.under("short", short)
    checkpoint = Checkpoint.open(files.write(tmp_path, tensors, golden_config(meta)))
    scale = vector["weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
    w = vector["weight"].double() * scale.double()
    for modules, rows, layout, expected in (
        (["gate", "up"], None, "block128", torch.cat([w, w])),
        (["gate", "short"], None, "block128", torch.cat([w, w[:48]])),
        (["short", "gate"], None, "group", torch.cat([w[:48], w])),
        (["gate", "up"], interleave, "group", interleave(torch.cat([w, w]))),
    ):
        weight = checkpoint.experts([modules], rows=rows).weight
        assert weight.scale_layout == layout and torch.equal(exact_weight(weight, 0), expected)


def act_order(seed: int, k: int = 64) -> torch.Tensor:
    return (torch.randperm(k, generator=torch.Generator().manual_seed(seed)) // 32).int()


def test_act_order_of_experts(tmp_path: Path) -> None:
    """Each expert has an order of its own, one none at all; multiplying x[:, order] by the stored weight is exact."""
    tensors, expected = {}, []
    for e in range(3):
        codes, zeros, scales = files.random_groups(4, 32, 64, 32, e)
        g_idx = torch.arange(64).int() // 32 if e == 1 else act_order(e)
        for name in ("gate_proj", "up_proj"):
            own = files.gptq(codes, zeros, scales, 4, "raw") | {"g_idx": g_idx}
            tensors |= files.under(f"{EXPERTS}.{e}.{name}", own)
        w = (codes.double() - zeros.double()[:, g_idx.long()]) * scales.double()[:, g_idx.long()]
        expected.append(torch.cat([w, w]))
    checkpoint = Checkpoint.open(files.write(tmp_path, tensors, files.GPTQ | {"desc_act": True}))
    stored = checkpoint.experts([[f"{EXPERTS}.{e}.{name}_proj" for name in ("gate", "up")] for e in range(3)])
    assert stored.order is not None and stored.order.shape == (3, 64)
    assert torch.equal(stored.order[1], torch.arange(64, dtype=torch.int32))
    for e in range(3):
        assert torch.equal(natural(stored, e), expected[e])
        assert torch.equal(exact_weight(stored.weight, e), expected[e][:, stored.order[e].long()])
    with pytest.raises(ValueError, match="E=3; expected one matrix"):
        stored.dense()


def test_act_order_that_cannot_be_sorted(tmp_path: Path) -> None:
    codes, zeros, scales = files.random_groups(4, 32, 64, 32, 0)
    own = files.gptq(codes, zeros, scales, 4, "raw")
    tensors = files.under("gate", own | {"g_idx": act_order(1)}) | files.under("up", own | {"g_idx": act_order(2)})
    with pytest.raises(
        UnsupportedError, match=r"expert 0: up.qweight of .*model.safetensors: cannot read a g_idx other"
    ):
        Checkpoint.open(files.write(tmp_path, tensors, files.GPTQ)).experts([["gate", "up"]])
    uneven = act_order(1)
    uneven[uneven.tolist().index(1)] = 0
    with pytest.raises(ValueError, match=r"m.g_idx of .*model.safetensors puts 33 columns into group 0; expected 32"):
        open_one(tmp_path, own | {"g_idx": uneven}, files.GPTQ).linear("m")
    with pytest.raises(ValueError, match=r"m.g_idx of .* groups from 0 to 7; expected 0 to 1"):
        open_one(tmp_path, own | {"g_idx": uneven.clone().index_fill_(0, torch.tensor([3]), 7)}, files.GPTQ).linear("m")
    unused = files.compressed(codes, zeros, scales, 4) | {"weight_g_idx": torch.full((64,), -1).int()}
    assert open_one(tmp_path, unused, files.compressed_config(symmetric=False)).linear("m").order is None


@pytest.mark.parametrize("transposed", [False, True])
def test_fused_experts(transposed: bool, tmp_path: Path) -> None:
    """[E, N, K] and [E, K, N] tensors, read, reordered and quantized one expert at a time."""
    w, bias = torch.randn(3, 32, 48), torch.randn(3, 32)
    stored = w.mT.contiguous() if transposed else w
    tensors = {"x.gate_up_proj": stored.bfloat16(), "x.gate_up_proj_bias": bias, "x.wide": stored}
    checkpoint = Checkpoint.open(files.write(tmp_path, tensors, None))
    plain = checkpoint.fused("x.gate_up_proj", transposed=transposed, rows=interleave)
    assert plain.weight.format.name == "bf16" and plain.bias is not None
    for e in range(3):
        assert torch.equal(plain.weight.codes[e], interleave(w[e]).bfloat16())
        assert torch.equal(plain.bias[e], interleave(bias[e]))
    assert checkpoint.used == {"x.gate_up_proj", "x.gate_up_proj_bias"}

    seen = []

    def convert(dense: torch.Tensor) -> QuantWeight:
        seen.append(tuple(dense.shape))
        return quantize(dense, "int4_asym", group_size=16)

    converted = checkpoint.fused("x.wide", transposed=transposed, convert=convert).weight
    assert seen == [(1, 32, 48)] * 3
    whole = quantize(w, "int4_asym", group_size=16)
    assert all(torch.equal(a, b) for a, b in zip(converted.tensors, whole.tensors, strict=True))
    with pytest.raises(
        ValueError, match=r"x.wide of .*model.safetensors is \(\d+, \d+\) torch.float32; .*Pass convert="
    ):
        checkpoint.fused("x.wide", transposed=transposed)
    with pytest.raises(ValueError, match=r"x.gate_up_proj_bias of .* is \(3, 32\); expected \[E, N, K\]"):
        checkpoint.fused("x.gate_up_proj_bias")
    with pytest.raises(ValueError, match=r"no tensor x.nothing in"):
        checkpoint.fused("x.nothing")


@pytest.mark.parametrize("format", ["bf16", "int8_sym", "fp8_e4m3"])
@pytest.mark.parametrize("layout", ["channel", "tensor"])
def test_float_linears_are_converted(format: str, layout: str, tmp_path: Path) -> None:
    w = torch.randn(2, 2, 32, 48)
    tensors = {f"{e}.{p}.weight": w[e, i] for e in range(2) for i, p in enumerate(("gate", "up"))}
    checkpoint = Checkpoint.open(files.write(tmp_path, tensors, None))
    modules = [[f"{e}.gate", f"{e}.up"] for e in range(2)]
    stored = checkpoint.experts(
        modules, rows=interleave, convert=lambda dense: quantize(dense, format, scale_layout=layout)
    )
    both = torch.stack([interleave(w[e].flatten(0, 1)) for e in range(2)])
    whole = quantize(both, format, scale_layout=layout)
    assert repr(stored.weight) == repr(whole)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(stored.weight.tensors, whole.tensors, strict=True))
    with pytest.raises(ValueError, match=r"0.gate.weight of .*model.safetensors is .* torch.float32; .*Pass convert="):
        checkpoint.experts(modules)
    with pytest.raises(ValueError, match=r"convert returned .* expected a QuantWeight with E=1"):
        checkpoint.linear("0.gate", convert=lambda dense: quantize(dense[:, :16], format, scale_layout=layout))
