"""What configs say about single linears, and every way in which a checkpoint can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import checkpoint_files as files
import pytest
import torch
from safetensors.torch import load_file, save_file

from qexperts.errors import UnsupportedError
from qexperts.integrations.checkpoints import Checkpoint
from qexperts.integrations.schemes import Scheme, make_rules
from qexperts.quantize import quantize

GATE = "model.layers.0.mlp.gate"
UP = "model.layers.0.mlp.experts.3.up_proj"
UP_11 = "model.layers.11.mlp.experts.3.up_proj"
QUERY = "model.layers.0.self_attn.q_proj"
NAMES = frozenset([f"{GATE}.weight", f"{UP}.qweight", f"{UP_11}.qweight", f"{QUERY}.qweight", "lm_head.weight"])

AR = files.AUTO_ROUND
CT = files.compressed_config()
GPTQ_V1 = {name: value for name, value in files.GPTQ.items() if name != "checkpoint_format"}


def ct_groups(*groups: tuple[list[str], int], **more: Any) -> dict[str, Any]:
    """One group for each (targets, bits)."""
    made = {
        f"group_{i}": {"targets": targets, "weights": CT["config_groups"]["group_0"]["weights"] | {"num_bits": bits}}
        for i, (targets, bits) in enumerate(groups)
    }
    return CT | {"config_groups": made} | more


RULES = [
    # auto-round: packing_format decides the zero points
    (AR, UP, ("int4_asym", "raw")),
    (AR | {"packing_format": "auto_round:gptqmodel"}, UP, ("int4_asym", "raw")),
    (AR | {"packing_format": "auto_round:auto_gptq"}, UP, ("int4_asym", "field-1")),
    (AR | {"packing_format": "auto_round:gptq", "sym": True}, UP, ("int4_sym", "field-1")),
    (AR | {"packing_format": "auto_round:auto_awq"}, UP, ("int4_asym", "raw")),
    (AR | {"block_name_to_quantize": "model.layers"}, UP, ("int4_asym", "raw")),
    (AR | {"block_name_to_quantize": "model.layers"}, "lm_head", None),
    (AR | {"block_name_to_quantize": [["model.layers.1", "model.visual"]]}, UP, None),
    (AR | {"to_quant_block_names": "model.layers.1,model.layers.0"}, UP, ("int4_asym", "raw")),
    (AR | {"block_name_to_quantize": "language_model.layers"}, UP, ("int4_asym", "raw")),  # of the composite model
    (AR | {"extra_config": {UP: {"bits": 8, "sym": True}}}, UP, ("int8_sym", "raw")),
    (AR | {"extra_config": {UP: {"bits": 16, "data_type": "float"}}}, UP, None),
    (AR | {"extra_config": {r".*self_attn.*": {"bits": 16}}}, QUERY, None),
    (AR | {"extra_config": {r".*self_attn.*": {"bits": 16}}}, UP, ("int4_asym", "raw")),
    (AR | {"extra_config": {r"experts\.\d+\.up": {"bits": 2}, UP: {"bits": 8}}}, UP, ("int8_asym", "raw")),
    (AR | {"extra_config": {r"experts\.\d+\.up": {"bits": 2}, UP: {"bits": 8}}}, UP_11, ("int2_asym", "raw")),
    (AR | {"extra_config": {"model.layers.0.mlp.experts": {"bits": 2}}}, UP, ("int2_asym", "raw")),
    (AR | {"extra_config": {GATE: {"bits": 16}}}, f"{GATE}_proj", ("int4_asym", "raw")),  # a name, not a pattern
    (
        AR | {"block_name_to_quantize": "model.layers", "extra_config": {"lm_head": {"bits": 8}}},
        "lm_head",
        ("int8_asym", "raw"),
    ),
    (AR | {"modules_to_not_convert": ["self_attn"]}, QUERY, None),
    # GPTQ: the first pattern that matches from the start decides
    (files.GPTQ, UP, ("int4_asym", "raw")),
    (GPTQ_V1, UP, ("int4_asym", "word-1")),
    (files.GPTQ | {"dynamic": {r"-:.*mlp\.gate$": {}}}, GATE, None),
    (files.GPTQ | {"dynamic": {r"-:mlp\.gate$": {}}}, GATE, ("int4_asym", "raw")),  # not from the start
    (files.GPTQ | {"dynamic": {r"+:.*experts": {"bits": 8}, r"-:.*": {}}}, UP, ("int8_asym", "raw")),
    (files.GPTQ | {"dynamic": {r"+:.*experts": {"bits": 8}, r"-:.*": {}}}, QUERY, None),
    (files.GPTQ | {"dynamic": {r".*experts": {"bits": 2, "sym": True}}}, UP, ("int2_sym", "raw")),
    (files.GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["up_proj"]]}, QUERY, ("int4_asym", "raw")),
    (files.GPTQ | {"modules_in_block_to_quantize": [["self_attn.q_proj"]]}, UP, None),
    # AWQ and FP8: from the start up to the end of a part, or a suffix
    (files.AWQ, UP, ("int4_asym", "raw")),
    (files.AWQ | {"zero_point": False}, UP, ("int4_sym", "raw")),
    (files.AWQ | {"modules_to_not_convert": ["model.layers.1"]}, UP_11, ("int4_asym", "raw")),
    (files.AWQ | {"modules_to_not_convert": ["model.layers.11"]}, UP_11, None),
    (files.AWQ | {"modules_to_not_convert": ["gate"]}, GATE, None),
    (files.AWQ | {"modules_to_not_convert": ["gate"]}, f"{GATE}_proj", ("int4_asym", "raw")),
    (files.AWQ | {"modules_to_not_convert": [r"model\.layers\.\d+\.mlp", "("]}, UP, None),
    (files.FP8, UP, ("fp8_e4m3", "none")),
    (files.FP8 | {"fmt": "e5m2", "weight_block_size": None}, UP, ("fp8_e5m2", "none")),
    (files.FP8 | {"modules_to_not_convert": ["lm_head"]}, "lm_head", None),
    (files.FP8 | {"ignored_layers": ["lm_head"]}, "lm_head", None),
    # compressed-tensors: names before patterns before classes, and ignore before all
    (CT, UP, ("int4_sym", "none")),
    (CT, "lm_head", None),
    (CT | {"ignore": ["re:.*self_attn.*"]}, QUERY, None),
    (CT | {"ignore": ["re:self_attn.*"]}, QUERY, ("int4_sym", "none")),
    (CT | {"ignore": ["model.layers.0"]}, UP, ("int4_sym", "none")),  # a whole name
    (ct_groups((["Linear"], 4), ([r"re:.*up_proj$"], 8)), UP, ("int8_sym", "none")),
    (ct_groups((["Linear"], 4), ([r"re:.*up_proj$"], 8)), QUERY, ("int4_sym", "none")),
    (ct_groups(([r"re:.*up_proj$"], 8), ([UP], 2)), UP, ("int2_sym", "none")),
    (ct_groups(([r"re:.*up_proj$"], 8), (["Embedding"], 4)), QUERY, None),
    (ct_groups((["Linear"], 3), ([UP], 2)), UP, ("int2_sym", "none")),  # 3 bits matter only where they are used
    (
        files.compressed_config("naive-quantized", num_bits=8, type="float", strategy="channel"),
        UP,
        ("fp8_e4m3", "none"),
    ),
]


@pytest.mark.parametrize(("config", "module", "expected"), RULES)
def test_rules(config: dict[str, Any], module: str, expected: tuple[str, str] | None) -> None:
    scheme = make_rules("here", config, NAMES)(module).scheme
    assert (scheme and (scheme.format, scheme.zeros)) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (AR | {"group_size": -1}, Scheme("auto-round auto_round", "gptq", "int4_asym", "channel", zeros="raw")),
        (
            AR | {"packing_format": "auto_round:fp8", "data_type": "fp", "bits": 8, "group_size": [128, 128]},
            Scheme("auto-round auto_round:fp8", "dense", "fp8_e4m3", "block", block=(128, 128)),
        ),
        (
            AR | {"packing_format": "auto_round:fp8_static", "data_type": "fp8_e5m2", "bits": 8, "group_size": 0},
            Scheme("auto-round auto_round:fp8_static", "dense", "fp8_e5m2", "tensor"),
        ),
        (
            {"quant_method": "awq", "w_bit": 4, "q_group_size": 64},
            Scheme("awq gemm", "awq", "int4_asym", "group", 64, zeros="raw"),
        ),
        (
            files.compressed_config("int-quantized", num_bits=8, strategy=None, group_size=None),
            Scheme("compressed-tensors int-quantized", "dense", "int8_sym", "tensor"),
        ),
        (
            files.compressed_config(
                "float-quantized", num_bits=8, type="float", strategy="block", block_structure="64x32"
            ),
            Scheme("compressed-tensors float-quantized", "dense", "fp8_e4m3", "block", block=(64, 32)),
        ),
    ],
)
def test_schemes(config: dict[str, Any], expected: Scheme) -> None:
    assert make_rules("here", config, NAMES)(UP).scheme == expected


UNREADABLE = [
    ({"quant_method": "hqq"}, "quant_method 'hqq'"),
    ({"bits": 4}, "quant_method None"),
    (AR | {"bits": 3}, "3-bit integers"),
    (AR | {"packing_format": "auto_round:llm_compressor"}, "packing_format 'auto_round:llm_compressor'"),
    (AR | {"data_type": "mx_fp"}, "data_type 'mx_fp'"),
    (AR | {"packing_format": "auto_round:fp8"}, "4-bit int in auto_round:fp8"),
    (AR | {"packing_format": "auto_round:auto_awq", "bits": 8}, "8-bit AWQ"),
    (AR | {"rotation_config": {"kind": "hadamard"}}, "rotation_config"),
    (files.GPTQ | {"bits": 3}, "3-bit integers"),
    (files.GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
    (files.GPTQ | {"pack_dtype": "int64"}, "pack_dtype 'int64'"),
    (files.AWQ | {"version": "gemv"}, "version 'gemv'"),
    (files.FP8 | {"expert_dtype": "fp4"}, "expert_dtype 'fp4'"),
    (files.FP8 | {"fmt": "e3m4"}, "fmt 'e3m4'"),
    (CT | {"format": "marlin-24"}, "format 'marlin-24'"),
    (CT | {"transform_config": {"x": 1}}, "transform_config"),
    (files.compressed_config(num_bits=3), "3-bit integers"),
    (files.compressed_config(strategy="tensor_group"), "strategy 'tensor_group'"),
    (files.compressed_config("nvfp4-pack-quantized", type="float"), "format 'nvfp4-pack-quantized'"),
    (files.compressed_config("int-quantized", num_bits=8, symmetric=False, strategy="tensor"), "asymmetric 8-bit int"),
]


@pytest.mark.parametrize(("config", "problem"), UNREADABLE)
def test_what_is_not_read_is_refused_by_name(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        make_rules("/dir/config.json", config, NAMES)(UP)
    message = str(caught.value)
    assert message.startswith("/dir/config.json") and problem in message and "\n  checkpoints: " in message


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (AR | {"group_size": 0}, "group_size is 0"),
        (files.GPTQ | {"dynamic": {"-:(": {}}}, r"'\(' is no regular expression"),
        (files.FP8 | {"weight_block_size": [128]}, r"the block of a scale is \[128\]"),
        (CT | {"config_groups": {}}, 'without "config_groups"'),
    ],
)
def test_malformed_configs(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make_rules("here", config, NAMES)(UP)


def linear(bits: int = 4, *, seed: int = 0, n: int = 32, k: int = 64, group: int = 32) -> files.Tensors:
    return files.gptq(*files.random_groups(bits, n, k, group, seed), bits, "raw")


def checkpoint(path: Path, tensors: files.Tensors, config: dict[str, Any] | None = files.GPTQ) -> Checkpoint:
    return Checkpoint.open(files.write(path, tensors, config))


PLAIN = {"weight": torch.ones(32, 64).half()}
FP8_WEIGHT = torch.ones(32, 64).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (PLAIN, files.GPTQ, None),
        (PLAIN, files.FP8, None),
        (PLAIN, AR, None),
        (PLAIN, AR | {"extra_config": {"m": {"bits": 4}}}, r"extra_config\['m'\], but lacks qweight, qzeros, scales"),
        (PLAIN, ct_groups((["m"], 4)), "lacks weight_packed, weight_scale, weight_shape"),
        (linear(), None, "unquantized by the absence of a quantization_config, but lacks weight and has qweight"),
        (linear(), AR | {"extra_config": {"m": {"bits": 16}}}, r"unquantized by extra_config\['m'\], but lacks weight"),
        (linear(), files.GPTQ | {"dynamic": {"-:m": {}}}, "unquantized by dynamic"),
        (linear(), CT, "lacks weight_packed, weight_scale, weight_shape and has qweight, qzeros, scales"),
        (linear() | {"lora_a": torch.ones(2)}, files.GPTQ, "has lora_a"),
        ({"scales": torch.ones(2, 32)}, files.GPTQ, "lacks qweight, qzeros"),
        ({"weight": FP8_WEIGHT}, None, "stores weight in 8 bits"),
        ({"weight": FP8_WEIGHT}, files.FP8, "lacks weight_scale_inv or weight_scale"),
        ({"weight": FP8_WEIGHT, "weight_scale": torch.ones(1)}, None, "has weight_scale and stores weight in 8 bits"),
        ({"weight_packed": linear()["qweight"]}, files.compressed_config(symmetric=False), "weight_zero_point"),
    ],
)
def test_config_and_files_agree(
    tensors: files.Tensors, config: dict[str, Any] | None, message: str | None, tmp_path: Path
) -> None:
    """A linear that the config names must be as it says; one that it only covers may be plain."""
    opened = checkpoint(tmp_path, files.under("m", tensors), config)
    if message is None:
        assert opened.scheme("m") is None and opened.linear("m").weight.format.name == "fp16"
        return
    with pytest.raises(ValueError, match=message) as caught:
        opened.scheme("m")
    assert "linear m " in str(caught.value) and str(tmp_path / "model.safetensors") in str(caught.value)


def test_routers_have_other_tensors(tmp_path: Path) -> None:
    tensors = {f"{GATE}.weight": torch.ones(4, 64), f"{GATE}.e_score_correction_bias": torch.ones(4)}
    assert checkpoint(tmp_path, tensors).scheme(GATE) is None
    with pytest.raises(ValueError, match=r"has no tensor model.nothing"):
        checkpoint(tmp_path, tensors).scheme("model.nothing")


WRONG = [
    (linear() | {"scales": torch.ones(1, 32).half()}, files.GPTQ, "scales", r"is \(1, 32\) .* expected \(2, 32\)"),
    (linear() | {"scales": torch.ones(2, 32, dtype=torch.float64)}, files.GPTQ, "scales", "torch.float64; expected"),
    (linear() | {"qzeros": torch.zeros(2, 3).int()}, files.GPTQ, "qzeros", r"is \(2, 3\) .* expected \(2, 4\)"),
    (linear() | {"qweight": torch.zeros(8, 32)}, files.GPTQ, "qweight", "torch.float32; expected a matrix in int32"),
    (linear() | {"g_idx": torch.zeros(32).int()}, files.GPTQ, "g_idx", r"is \(32,\) .* expected \(64,\)"),
    (linear(8), files.GPTQ, "scales", r"is \(2, 32\) .* expected \(4, 32\)"),  # says 4 bits
    (linear(group=64), files.GPTQ, "scales", r"is \(1, 32\) .* expected \(2, 32\)"),  # says groups of 32
    (linear(), files.GPTQ | {"group_size": 48}, "qweight", "K=64 is not a multiple of group_size=48"),
    (linear(), files.GPTQ | {"sym": True}, "qzeros", "zero points from 0 to 15; the config says symmetric"),
    (linear(), files.AWQ, "qweight", "K=8 is not a multiple of group_size=32"),
    (linear(n=8), files.GPTQ, "qweight", "N=8; N must be a positive multiple of 16"),
    (
        files.compressed(*files.random_groups(4, 32, 64, 32, 0), 4) | {"weight_shape": torch.tensor([32, 128])},
        files.compressed_config(symmetric=False),
        "weight_packed",
        r"is \(32, 8\) .* expected \(32, 16\)",
    ),
    (
        {"weight": FP8_WEIGHT, "weight_scale_inv": torch.ones(2, 1)},
        files.FP8,
        "weight_scale_inv",
        r"is \(2, 1\) .* expected \(1, 1\)",
    ),
    (
        {"weight": FP8_WEIGHT, "weight_scale": torch.ones(32, 1), "weight_zero_point": torch.ones(32, 1)},
        files.compressed_config("float-quantized", num_bits=8, type="float", strategy="channel"),
        "weight_zero_point",
        "zero points other than 0",
    ),
    ({"weight": torch.ones(64).half()}, None, "weight", r"is \(64,\) .* expected \[N, K\]"),
]


@pytest.mark.parametrize(("tensors", "config", "name", "message"), WRONG)
def test_wrong_tensors_are_named(
    tensors: files.Tensors, config: dict[str, Any] | None, name: str, message: str, tmp_path: Path
) -> None:
    opened = checkpoint(tmp_path, files.under("m", tensors), config)
    with pytest.raises(ValueError, match=message) as caught:
        opened.linear("m")
    assert f"m.{name} of {tmp_path / 'model.safetensors'}" in str(caught.value)


def test_experts_of_a_stack_agree(tmp_path: Path) -> None:
    """Mixed bits, sizes and biases name the expert, the tensor and the file."""
    tensors = {}
    for e in range(3):
        tensors |= files.under(f"{e}.gate", linear(8 if e == 2 else 4)) | files.under(f"{e}.up", linear())
    config = files.GPTQ | {"dynamic": {r"+:2\.gate": {"bits": 8}}}
    opened = checkpoint(tmp_path, tensors, config)
    file = tmp_path / "model.safetensors"
    assert opened.experts([["0.gate"], ["1.gate"]]).weight.E == 2
    with pytest.raises(ValueError, match=rf"expert 2: 2.gate.qweight of {file} is \[32, 64\] in int8_asym.* expected"):
        opened.experts([[f"{e}.gate"] for e in range(3)])
    with pytest.raises(ValueError, match=rf"2.up.qweight of {file} is int4_asym.*; expected int8_asym.* concatenated"):
        opened.experts([["2.gate", "2.up"]])
    with pytest.raises(ValueError, match=r"modules has \[2, 1\] linears an expert"):
        opened.experts([["0.gate", "0.up"], ["1.gate"]])
    with pytest.raises(ValueError, match="at least one expert"):
        opened.experts([])
    with pytest.raises(ValueError, match=r"1.gate.qweight of .* is quantized already .* Leave convert out"):
        opened.experts([["1.gate"]], convert=lambda dense: quantize(dense, "int4_sym"))
    with pytest.raises(ValueError, match=r"rows\(\) returned .* expected a permutation"):
        opened.experts([["1.gate"]], rows=lambda t: t[:16])
    tensors["0.gate.bias"] = torch.ones(32)
    opened = checkpoint(tmp_path, tensors, config)
    with pytest.raises(ValueError, match=r"0.gate.bias of .* exists, but not every one of 0.gate, 0.up has a bias"):
        opened.experts([["0.gate", "0.up"]])
    with pytest.raises(ValueError, match=r"1.gate.qweight of .* no bias; expected .* bias in torch.float32"):
        opened.experts([["0.gate"], ["1.gate"]])


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = files.under("0.gate", linear()) | files.under("1.gate", linear())
    del tensors["1.gate.qzeros"]
    opened = checkpoint(tmp_path, tensors)
    with pytest.raises(ValueError, match=r"1.gate.qweight of .*model.safetensors: linear 1.gate .* but lacks qzeros"):
        opened.experts([["0.gate"], ["1.gate"]])
    with pytest.raises(ValueError, match=rf"no tensor 1.gate.qzeros in {tmp_path}"):
        opened.tensor("1.gate.qzeros")


def sharded(path: Path) -> Path:
    tensors = files.under("0.gate", linear(seed=1)) | files.under("1.gate", linear(seed=2))
    return files.write(path, tensors, files.GPTQ, shards=["0."])


def test_broken_directories(tmp_path: Path) -> None:
    """Each broken file is named, when the checkpoint is opened."""
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        Checkpoint.open(tmp_path)
    index, first = tmp_path / "model.safetensors.index.json", tmp_path / "model-00001-of-00002.safetensors"
    assert len(Checkpoint.open(sharded(tmp_path)).names) == 6

    whole = first.read_bytes()
    for broken in (whole[:-8], whole[:20], b""):
        first.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"{first} \({len(broken)} bytes\) is truncated"):
            Checkpoint.open(tmp_path)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{first} is missing, but {index} lists it"):
        Checkpoint.open(tmp_path)

    sharded(tmp_path)
    tensors = load_file(first)
    del tensors["0.gate.scales"]
    save_file(tensors, first)
    with pytest.raises(ValueError, match=rf"{index} says that tensor 0.gate.scales is in {first.name}, which lacks it"):
        Checkpoint.open(tmp_path)

    for text, message in (
        ("{", "no valid JSON"),
        ("[]", "holds a list"),
        ("{}", 'has no "weight_map"'),
        (json.dumps({"weight_map": {"a": "../model.safetensors"}}), "expected the name of a file beside"),
    ):
        index.write_text(text)
        with pytest.raises(ValueError, match=message) as caught:
            Checkpoint.open(tmp_path)
        assert str(index) in str(caught.value)
    index.unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither model.safetensors nor model.safetensors.index.json"):
        Checkpoint.open(tmp_path)


def test_where_the_config_is(tmp_path: Path) -> None:
    """config.json, its text_config, then the files of AutoRound, AutoGPTQ and AutoAWQ."""
    files.write(tmp_path, files.under("m", linear()), None)
    assert Checkpoint.open(tmp_path).quantization is None
    for name, method in (("quant_config.json", "awq"), ("quantize_config.json", "gptq")):
        (tmp_path / name).write_text(json.dumps({"bits": 4, "w_bit": 4, "group_size": 16}))
        found = Checkpoint.open(tmp_path).quantization
        assert found == {"quant_method": method, "bits": 4, "w_bit": 4, "group_size": 16}
    (tmp_path / "quantization_config.json").write_text(json.dumps(AR))
    assert Checkpoint.open(tmp_path).quantization == AR
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": files.GPTQ}}))
    assert Checkpoint.open(tmp_path).quantization == files.GPTQ
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": files.GPTQ | {"quant_method": "x"}}))
    with pytest.raises(UnsupportedError, match=rf"Checkpoint {tmp_path}: cannot read quant_method 'x'"):
        Checkpoint.open(tmp_path)


def test_importing_needs_no_optional_package() -> None:
    code = "import sys, qexperts.integrations.checkpoints; print({'safetensors', 'transformers'} & set(sys.modules))"
    source = str(Path(__file__).parent.parent / "src")
    run = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": source}, capture_output=True, text=True)
    assert run.stdout.strip() == "set()", run.stderr
