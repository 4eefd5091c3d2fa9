"""What a checkpoint's quantization config says about one linear: packing, format, group size, zero points.

Sources: the loaders of auto-round 0.16.1, GPTQModel 7.7.0, transformers 5.23.0 and compressed-tensors 0.20.0, whose
rules of matching names are repeated here.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..errors import UnsupportedError

__all__ = ["Rule", "Scheme", "make_rules"]

Config = Mapping[str, Any]

_TENSOR: dict[str, Any] = {"scale_layout": "tensor"}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one linear [N, K] is stored.

    Attributes:
        method: what the config calls it.
        packing: "gptq" (qweight int32 [K/pf, N]), "awq" (qweight int32 [K, N/pf]), "compressed" (weight_packed int32
            [N, K/pf]) or "dense" (weight [N, K] in fp8 or int8).
        format: the name in `FORMATS` that it becomes.
        scale_layout: "group", "channel", "tensor" or "block".
        group_size: consecutive k sharing a scale; "group" only.
        block: rows and columns sharing a scale; "block" only.
        zeros: how zero points are stored: "none"; "raw"; "word-1" (GPTQ v1: 1 was subtracted from every field with
            borrows that cross fields, so 1 is added to every field of the 32-bit word); "field-1" (auto-round's v1:
            add 1 to every field, without a mask: 2^bits occurs); "signed" (int8: stored minus 128, as the codes are).
    """

    method: str
    packing: str
    format: str
    scale_layout: str
    group_size: int | None = None
    block: tuple[int, int] | None = None
    zeros: str = "none"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What the config says of one module.

    Attributes:
        scheme: None for a module that stays unquantized.
        named: the config means this module, rather than covering it with all others.
        source: the entry of the config that decides.
    """

    scheme: Scheme | None
    named: bool
    source: str


def make_rules(where: str, config: Config, tensors: frozenset[str]) -> Callable[[str], Rule]:
    """The function module name -> `Rule` of a quantization config.

    Args:
        where: the file, for messages.
        tensors: names of all tensors, which tell names from patterns.
    Raises: UnsupportedError for a method, or an option of one, that this package does not read.
    """
    method = str(config.get("quant_method", "")).lower()
    makers = {
        "auto-round": _auto_round,
        "auto_round": _auto_round,
        "intel/auto-round": _auto_round,
        "gptq": _gptq,
        "awq": _awq,
        "compressed-tensors": _compressed_tensors,
        "fp8": _fp8,
    }
    if method not in makers:
        known = "auto-round, gptq, awq, compressed-tensors and fp8 are read"
        _refuse(
            where, f"quant_method {config.get('quant_method')!r}", f"{known}; convert the checkpoint to one of them"
        )
    for option in ("rotation_config", "transform_config"):
        if config.get(option):
            _refuse(where, f"{option} of {method}", "weights are read as stored; rotated activations are not applied")
    return makers[method](where, config, tensors)


def _refuse(where: str, problem: str, reason: str) -> Any:
    raise UnsupportedError(where, problem, {"checkpoints": reason}, answer="cannot read")


def _format(where: str, bits: Any, sym: bool) -> str:
    if bits not in (2, 4, 8):
        _refuse(where, f"{bits}-bit integers", "2, 4 and 8 bits are read")
    return f"int{bits}_{'sym' if sym else 'asym'}"


def _groups(where: str, group_size: Any) -> dict[str, Any]:
    """scale_layout and group_size of a config's group_size; -1 means one group a row."""
    if group_size in (-1, None):
        return {"scale_layout": "channel"}
    if not isinstance(group_size, int) or isinstance(group_size, bool) or group_size < 1:
        raise ValueError(f"{where}: group_size is {group_size!r}; expected a positive integer, or -1 for whole rows.")
    return {"scale_layout": "group", "group_size": group_size}


def _block(where: str, block: Any) -> dict[str, Any]:
    if isinstance(block, str):  # "128x128" in early compressed-tensors
        block = [int(size) for size in block.split("x") if size.isdigit()]
    if not isinstance(block, list | tuple) or len(block) != 2 or not all(isinstance(b, int) and b > 0 for b in block):
        raise ValueError(f"{where}: the block of a scale is {block!r}; expected two sizes, such as [128, 128].")
    return {"scale_layout": "block", "block": (block[0], block[1])}


def _patterns(entries: Iterable[str], form: str = "{}") -> list[tuple[str, re.Pattern[str] | None]]:
    """Entries of a config with their regular expressions; None for what is none, as the loaders have it."""
    found: list[tuple[str, re.Pattern[str] | None]] = []
    for entry in entries:
        try:
            found.append((entry, re.compile(form.format(entry))))
        except re.error:
            found.append((entry, None))
    return found


def _expression(where: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where}: {pattern!r} is no regular expression ({error}); mend the config.") from error


def _flat(names: Any) -> list[str]:
    """Names in lists of lists, or separated by commas."""
    if isinstance(names, str):
        return [name for name in names.split(",") if name]
    return [inner for name in names or () for inner in _flat(name)]


_AUTO_ROUND_PACKINGS = {
    "auto_round": ("gptq", "raw"),
    "auto_round:gptqmodel": ("gptq", "raw"),
    "auto_round:auto_gptq": ("gptq", "field-1"),
    "auto_round:gptq": ("gptq", "field-1"),
    "auto": ("gptq", "field-1"),
    "auto_round:auto_awq": ("awq", "raw"),
    "auto_round:awq": ("awq", "raw"),
    "auto_round:fp8": ("dense", "none"),
    "auto_round:fp8_static": ("dense", "none"),
}


def _auto_round(where: str, config: Config, tensors: frozenset[str]) -> Callable[[str], Rule]:
    packing = config.get("packing_format") or "auto_round:auto_gptq"  # auto-round's own default
    if packing not in _AUTO_ROUND_PACKINGS:
        _refuse(where, f"packing_format {packing!r}", f"{', '.join(_AUTO_ROUND_PACKINGS)} are read")
    blocks = _flat(config.get("quant_block_list")) or _flat(
        config.get("block_name_to_quantize") or config.get("to_quant_block_names")
    )
    if not any(name.startswith(block) for name in tensors for block in blocks):
        blocks = []  # they name another model's modules: of the composite model this one was taken from
    extra = dict(config.get("extra_config") or {})
    patterns = _patterns(key for key in extra if not any(f"{key}.{s}" in tensors for s in ("weight", "qweight")))
    skipped = _patterns(config.get("modules_to_not_convert") or [])
    inside = _patterns(_flat(config.get("modules_in_block_to_quantize")))

    def settings(module: str) -> tuple[str | None, Mapping[str, Any]]:
        """The entry that names the module, and what it changes."""
        if module in extra:
            return f"extra_config[{module!r}]", extra[module]
        for entry, pattern in skipped:
            if pattern and pattern.search(module):
                return f"modules_to_not_convert {entry!r}", {"bits": 16}
        for key, pattern in patterns:
            if pattern and extra[key] and pattern.search(module):
                return f"extra_config[{key!r}]", extra[key]
        return None, {}

    def rule(module: str) -> Rule:
        source, changes = settings(module)
        if source is None and blocks and not module.startswith(tuple(blocks)):
            return Rule(None, False, f"block_name_to_quantize {', '.join(blocks)}")
        if source is None and inside and not any(pattern and pattern.search(module) for _, pattern in inside):
            return Rule(None, False, "modules_in_block_to_quantize")
        options = {**config, **changes}
        if options.get("bits", 4) >= 16:
            return Rule(None, source is not None, source or "bits")
        scheme = _auto_round_scheme(where, packing, options)
        return Rule(scheme, module in extra, source or f"packing_format {packing}")

    return rule


def _auto_round_scheme(where: str, packing: str, options: Config) -> Scheme:
    kind, zeros = _AUTO_ROUND_PACKINGS[packing]
    method, bits, group_size = f"auto-round {packing}", options.get("bits", 4), options.get("group_size", 128)
    data_type = str(options.get("data_type") or "int")
    if kind == "dense":
        if bits != 8 or "fp" not in data_type:
            _refuse(where, f"{bits}-bit {data_type} in {packing}", "fp8 is read from this packing")
        format = "fp8_e5m2" if "e5m2" in f"{data_type} {options.get('fmt')}" else "fp8_e4m3"
        if isinstance(group_size, list | tuple):
            layout = _block(where, group_size)
        else:
            layout = _TENSOR if group_size == 0 else _groups(where, group_size)
        return Scheme(method, kind, format, **layout)
    if not data_type.startswith("int"):
        _refuse(where, f"data_type {data_type!r} in {packing}", "integers are read from this packing")
    if kind == "awq" and bits != 4:
        _refuse(where, f"{bits}-bit AWQ", "AWQ is read with 4 bits")
    format = _format(where, bits, bool(options.get("sym", True)))
    return Scheme(method, kind, format, **_groups(where, group_size), zeros=zeros)


def _gptq(where: str, config: Config, tensors: frozenset[str]) -> Callable[[str], Rule]:
    stored = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if stored not in ("gptq", "gptq_v2"):
        _refuse(where, f"checkpoint_format {stored!r}", "gptq and gptq_v2 are read; save the model in one of them")
    if str(config.get("pack_dtype") or "int32") != "int32":
        _refuse(where, f"pack_dtype {config['pack_dtype']!r}", "int32 is read; save the model with pack_dtype=int32")
    dynamic = []
    for key, changes in (config.get("dynamic") or {}).items():
        sign, pattern = (key[:2], key[2:]) if key[:2] in ("-:", "+:") else ("+:", key)
        dynamic.append((key, sign, _expression(f"{where}: dynamic", pattern), changes))
    inside = _patterns(_flat(config.get("modules_in_block_to_quantize")))
    zeros = "raw" if stored == "gptq_v2" else "word-1"

    def scheme(options: Config) -> Scheme:
        format = _format(where, options.get("bits"), bool(options.get("sym", True)))
        return Scheme(stored, "gptq", format, **_groups(where, options.get("group_size", 128)), zeros=zeros)

    default = scheme(config)

    def rule(module: str) -> Rule:
        for key, sign, pattern, changes in dynamic:  # the first match decides
            if pattern.match(module) and sign == "-:":
                return Rule(None, True, f"dynamic[{key!r}]")
            if pattern.match(module):
                return Rule(scheme({**config, **changes}), False, f"dynamic[{key!r}]")
        if inside and not any(pattern and pattern.search(module) for _, pattern in inside):
            return Rule(None, False, "modules_in_block_to_quantize")
        return Rule(default, False, f"checkpoint_format {stored}")

    return rule


def _awq(where: str, config: Config, tensors: frozenset[str]) -> Callable[[str], Rule]:
    version = str(config.get("version") or "gemm").lower()
    bits = config.get("bits", config.get("w_bit", 4))
    if version != "gemm" or bits != 4:
        _refuse(where, f"{bits}-bit AWQ of version {version!r}", "version gemm with 4 bits is read")
    sym = not config.get("zero_point", not config.get("sym", False))
    group_size = config.get("group_size", config.get("q_group_size", 128))
    scheme = Scheme("awq gemm", "awq", _format(where, bits, sym), **_groups(where, group_size), zeros="raw")
    return _by_exclusion(config, scheme)


def _by_exclusion(config: Config, scheme: Scheme) -> Callable[[str], Rule]:
    """One scheme for all but modules_to_not_convert, whose entries stand for a module from its start up to the end of a
    part, as a regular expression up to there, or as a suffix (should_convert_module of transformers)."""
    entries = config.get("modules_to_not_convert") or config.get("ignored_layers") or []
    skipped = _patterns(entries, r"(?:{})(?:(?<=\.)|(?=\.|$))")

    def rule(module: str) -> Rule:
        for entry, pattern in skipped:
            if module.endswith(entry) or (pattern and pattern.match(module)):
                return Rule(None, True, f"modules_to_not_convert {entry!r}")
        return Rule(scheme, False, f"quant_method {config['quant_method']}")

    return rule


def _fp8(where: str, config: Config, tensors: frozenset[str]) -> Callable[[str], Rule]:
    if config.get("expert_dtype", "fp8") != "fp8":
        _refuse(where, f"expert_dtype {config['expert_dtype']!r}", "experts in fp8 are read; there is no 4-bit float")
    fmt = str(config.get("fmt") or config.get("weight_format") or "e4m3").removeprefix("float8_")
    if fmt not in ("e4m3", "e4m3fn", "e5m2"):
        _refuse(where, f"fmt {fmt!r}", "e4m3 and e5m2 are read")
    block = config.get("weight_block_size")
    layout = _TENSOR if block is None else _block(where, block)
    return _by_exclusion(config, Scheme(f"fp8 {fmt}", "dense", f"fp8_{fmt.removesuffix('fn')}", **layout))


def _compressed_tensors(where: str, config: Config, tensors: frozenset[str]) -> Callable[[str], Rule]:
    groups = dict(config.get("config_groups") or {})
    if not groups:
        raise ValueError(f'{where}: compressed-tensors without "config_groups"; expected at least one group.')

    def matcher(entry: str) -> Callable[[str], object]:
        return _expression(where, entry[3:]).match if entry.startswith("re:") else entry.__eq__

    ignored = [(entry, matcher(entry)) for entry in config.get("ignore") or []]
    targets = [(target, matcher(target), key) for key in groups for target in groups[key].get("targets") or []]
    # exact names before patterns before classes, as compressed-tensors orders them
    targets.sort(key=lambda entry: (entry[0].startswith("re:"), entry[0]))
    schemes: dict[str, Scheme] = {}

    def rule(module: str) -> Rule:
        for entry, match in ignored:
            if match(module):
                return Rule(None, True, f"ignore {entry!r}")
        found = [(target, key) for target, match, key in targets if match(module)]
        found += [(target, key) for target, _, key in targets if target == "Linear"]
        if not found:
            return Rule(None, False, "config_groups, of which none targets it")
        target, key = found[0]
        if not groups[key].get("weights"):
            return Rule(None, target == module, f"config_groups[{key!r}], which has no weights")
        if key not in schemes:  # only groups that are asked for have to be readable
            schemes[key] = _compressed_scheme(f"{where}: config_groups[{key!r}]", config, groups[key])
        return Rule(schemes[key], target == module, f"config_groups[{key!r}]")

    return rule


def _compressed_scheme(where: str, config: Config, group: Config) -> Scheme:
    stored = group.get("format") or config.get("format")
    weights = group["weights"]
    bits, kind = weights.get("num_bits", 8), weights.get("type", "int")
    sym, strategy = bool(weights.get("symmetric", True)), weights.get("strategy")
    if strategy is None:  # compressed-tensors' own default
        strategy = "tensor" if weights.get("group_size") is None else "group"
    layout: dict[str, Any]
    if strategy == "group":
        layout = _groups(where, weights.get("group_size"))
    elif strategy == "block":
        layout = _block(where, weights.get("block_structure"))
    elif strategy in ("channel", "tensor"):
        layout = {"scale_layout": strategy}
    else:
        return _refuse(where, f"strategy {strategy!r}", "group, channel, tensor and block are read")
    method = f"compressed-tensors {stored}"
    by_row = strategy in ("group", "channel")
    if stored == "pack-quantized" and kind == "int" and by_row:
        return Scheme(method, "compressed", _format(where, bits, sym), **layout, zeros="none" if sym else "raw")
    if stored in ("float-quantized", "naive-quantized") and (kind, bits, sym) == ("float", 8, True):
        return Scheme(method, "dense", "fp8_e4m3", **layout)
    if stored in ("int-quantized", "naive-quantized") and (kind, bits) == ("int", 8) and (sym or by_row):
        return Scheme(method, "dense", _format(where, bits, sym), **layout, zeros="none" if sym else "signed")
    return _refuse(
        where,
        f"format {stored!r}, {'symmetric' if sym else 'asymmetric'} {bits}-bit {kind} weights, strategy {strategy!r}",
        "pack-quantized (2, 4, 8-bit int), float-quantized (8-bit float) and int-quantized (8-bit int) are read",
    )
