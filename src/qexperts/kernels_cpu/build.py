"""From a `Kind` to machine code: a driver writes LLVM, which is optimised for the instruction set, and disk keeps it.

Loading a kept kernel takes milliseconds. The file's name is a digest of everything that decides its content: the
sources of this package, the kind, the version of the compiler and, for the host's own features, the host.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import sys
import threading
import warnings
from pathlib import Path

from llvmlite import binding, ir

from ..files import cache_directory, replace
from .spec import Kind

__all__ = ["function"]

_lock = threading.Lock()
_engines: list[binding.ExecutionEngine] = []  # machine code lives as long as its engine
_FILES = ("vectors.py", "micro.py", "rows.py", "packing.py", "drivers.py", "spec.py", "build.py")


@functools.cache
def _sources() -> bytes:
    digest = hashlib.sha256()
    for name in _FILES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    digest.update(importlib.metadata.version("llvmlite").encode())
    digest.update(binding.get_process_triple().encode())
    return digest.digest()


def function(part: str, kind: Kind) -> int:
    """The address of `void part(void *record)`: "run", "pack" or "gemm" of a kind."""
    return _function(part, kind.deciding(part))


@functools.cache
def _function(part: str, kind: Kind) -> int:
    with _lock:
        name = hashlib.sha256(_sources() + repr((part, kind)).encode()).hexdigest()[:40]
        path = cache_directory() / f"{name}.o"
        code = _read(path)
        if code is None:
            print(f"qexperts: compiling {part} for {_describe(part, kind)}", file=sys.stderr, flush=True)
            code = _compile(part, kind)
            _write(path, code)
        return _load(code, kind)


def _describe(part: str, kind: Kind) -> str:
    if part == "run":
        return kind.isa.name
    text = f"{kind.format}, {kind.x} activations"
    text += " as int8" if kind.int8 else ""
    return f"{text} ({kind.source}, {kind.scale or 'no'} scales, {kind.panels * 16} columns) on {kind.isa.name}"


def _read(path: Path) -> bytes | None:
    """Machine code with the digest in front that its file was written with; None if there is none, or half of one."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return content[32:] if hashlib.sha256(content[32:]).digest() == content[:32] else None


def _write(path: Path, code: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, hashlib.sha256(code).digest() + code)
    except OSError as error:
        _warn_unwritable(str(path.parent), str(error.strerror))


@functools.cache
def _warn_unwritable(directory: str, why: str) -> None:
    warnings.warn(
        f"qexperts: compiled kernels cannot be kept in {directory} ({why}): each process compiles its own. Set "
        f"QEXPERTS_CACHE_DIR to a directory that can be written.",
        RuntimeWarning,
        stacklevel=6,
    )


@functools.cache
def _initialize() -> None:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()


def _machine(kind: Kind) -> binding.TargetMachine:
    _initialize()
    target = binding.Target.from_triple(binding.get_process_triple())
    return target.create_target_machine(cpu=kind.isa.cpu, features=kind.isa.features, opt=3, reloc="pic", jit=True)


def _compile(part: str, kind: Kind) -> bytes:
    """Machine code with a symbol `entry`: void entry(void *record)."""
    from .drivers import DRIVERS
    from .vectors import I8, write_function

    machine = _machine(kind)
    written = ir.Module(part)
    written.triple, written.data_layout = machine.triple, str(machine.target_data)
    write_function(written, "entry", [I8.as_pointer()], lambda e, record: DRIVERS[part](e, e.address(record), kind))
    module = binding.parse_assembly(str(written))
    options = binding.create_pipeline_tuning_options(speed_level=3)
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    return machine.emit_object(module)


def _load(code: bytes, kind: Kind) -> int:
    module = binding.parse_assembly("")
    engine = binding.create_mcjit_compiler(module, _machine(kind))
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    address = engine.get_function_address("entry")
    assert address, "the object has no entry"
    return address
