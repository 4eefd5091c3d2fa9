"""Measured profiles: tables that are shipped, and over them the user's own, which `qexperts tune` writes.

A table is a JSON object; there is one for a device and a release of what compiles or multiplies there:

    {"kind": "tuned", "schema": 2, "device": "NVIDIA H100 80GB HBM3", "software": "triton 3.6",
     "entries": [{"backend": "triton", "phase": "decode", "format": "int4_sym", "dtype": "bf16", "scale": "bf16",
                  "layout": "tiles128", "group": 128, "n": 3072, "k": 1536, "experts": 192, "rows": 64,
                  "rules": "DecodeConfig(block_n=128, ...)", "config": {"warps": 8}, ...}]}

An entry is for a `Case`; `config` names what differs from the rules of a backend (nothing: they were the fastest), of
which only what is FREE there may be named. It says nothing where the rules choose something else than `rules`: for
other numbers of rows of the same bucket, or since they were changed. What else an entry has, the times that it rests
on, is for readers.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from .files import cache_directory, replace
from .formats import FORMATS

__all__ = [
    "DECODE_THRESHOLD", "DTYPES", "PHASES", "Case", "Choice", "Entry", "Profile", "bucket", "device_name", "forget",
    "key_of", "lookup", "neighbours", "noted", "own_path", "profiles", "read", "tuned", "used", "with_entry", "write",
]  # fmt: skip

SCHEMA = 2
PHASES = ("prefill", "decode", "auto")
BACKENDS = ("hopper", "triton", "torch")  # those that something is tuned of
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
DECODE_THRESHOLD = 4  # rows per expert up to which a call is a decode, if neither it nor a table says how many
SHIPPED = Path(__file__).parent / "data" / "tuned"
GIVEN = "QEXPERTS_PROFILE"  # names a table that stands over the others


@dataclasses.dataclass(frozen=True)
class Choice:
    """What is chosen for a case, by a rule; one class for each kind of case.

    Attributes:
        FREE: fields that tables may change, and the values that they may have: those that are tried.
    """

    FREE: ClassVar[Mapping[str, tuple[Any, ...]]] = {}


Chosen = TypeVar("Chosen", bound=Choice)
Check = Callable[[Any], "str | None"]  # why a choice cannot be, or None


@dataclasses.dataclass(frozen=True)
class Case:
    """What is looked up.

    Attributes:
        backend: that runs it.
        phase: that the call names; "auto" if it leaves that to the counts.
        dtype, scale: of the activations and of the scales, as in `DTYPES`.
        layout, group: of the weight, as the backend tells them apart.
        rows: S, as a `bucket`.
    """

    backend: str
    phase: str
    format: str
    dtype: str
    scale: str
    layout: str
    group: int
    n: int
    k: int
    experts: int
    rows: int

    def __str__(self) -> str:
        sizes = f"N={self.n} K={self.k}, {self.experts} experts, up to {self.rows:,} rows"
        return f"{self.backend} {self.phase} {self.format} {sizes}"


@dataclasses.dataclass(frozen=True)
class Entry:
    """What was measured for a case.

    Attributes:
        rules: what the rules chose, as it prints.
        config: fields of a `Choice`, where they differ from the rules.
        facts: what it rests on.
        source: file and number, for error messages.
    """

    case: Case
    rules: str
    config: Mapping[str, Any]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Profile:
    """A table that was found.

    Attributes:
        unused: why it is not used here, or None.
    """

    path: Path
    entries: tuple[Entry, ...] = ()
    unused: str | None = None


_KINDS = {int: "an integer", str: "a string", list: "a list"}
_FIELDS = {f.name: int if f.type == "int" else str for f in dataclasses.fields(Case)}
_REMEDY = "mend it, or delete it and run qexperts tune again"


def bucket(rows: int) -> int:
    """The power of two that so many rows are looked up by: the next one."""
    return 1 << max(rows - 1, 0).bit_length()


def tuned(rules: Chosen, case: Case, device: torch.device, check: Check = lambda choice: None) -> Chosen:
    """What the rules choose, or a table says instead."""
    entry = lookup(device, case)
    return rules if entry is None or entry.rules != repr(rules) else with_entry(rules, entry, check)


def with_entry(rules: Chosen, entry: Entry, check: Check = lambda choice: None) -> Chosen:
    """The rules with what an entry changes. Raises: ValueError, with the file and the entry, if it may not."""
    free = rules.FREE
    for name, value in entry.config.items():
        if name not in free:
            raise ValueError(f"{entry.source}: config names {name}; expected only {', '.join(free)}; {_REMEDY}")
        if not any(value == allowed and type(value) is type(allowed) for allowed in free[name]):
            allowed = ", ".join(map(repr, free[name]))
            raise ValueError(f"{entry.source}: {name} is {value!r}; expected one of {allowed}; {_REMEDY}")
    choice = dataclasses.replace(rules, **entry.config)
    if (reason := check(choice)) is not None:
        raise ValueError(f"{entry.source}: {reason}; {_REMEDY}")
    return choice


def neighbours(choice: Chosen, check: Check = lambda choice: None) -> list[Chosen]:
    """Those that differ in one field that is free, and can be."""
    found = [
        dataclasses.replace(choice, **{name: value})
        for name, values in choice.FREE.items()
        for value in values
        if value != getattr(choice, name)
    ]
    return [c for c in found if check(c) is None]


def lookup(device: torch.device, case: Case) -> Entry | None:
    """The entry for a case on a device, of the last table that has one; tables are read once in a process."""
    key = key_of(device)
    return _table(*key).get(case) if key is not None else None


def profiles(device: torch.device) -> list[Profile]:
    """The tables that were found, each over those before it, with the reason if it is not for this device."""
    key = key_of(device)
    return _profiles(*key) if key is not None else []


def used(device: torch.device) -> str:
    """The tables that say something of this device, for people; "" if none does."""
    return ", ".join(str(p.path) for p in profiles(device) if p.entries)


def noted(how: str, device: torch.device) -> str:
    """How something is run, and which tables may have a say in it."""
    found = used(device)
    return f"{how}; profile {found}" if found else how


def own_path(device: torch.device) -> Path | None:
    """The user's own table for a device, whether it exists or not; None where nothing is tuned."""
    key = key_of(device)
    if key is None:
        return None
    return cache_directory() / "tuned" / (re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(key)) + ".json")


def forget() -> None:
    """Read tables anew at the next look-up; calls that are bound keep what they have."""
    _profiles.cache_clear()
    _table.cache_clear()


def device_name(device: torch.device) -> str:
    """ "NVIDIA H100 80GB HBM3", or the processor and the number of threads torch uses."""
    if device.type == "cpu":
        return f"{_processor()}, {torch.get_num_threads()} threads"
    return str(torch.get_device_module(device).get_device_name(device))


@functools.cache
def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def key_of(device: torch.device) -> tuple[str, str] | None:
    """What a table is for: a device's name, and the release of Triton or, on a CPU, of torch. None without either."""
    software = _release("torch" if device.type == "cpu" else "triton")
    if software is None or device.type == "meta":
        return None
    if device.type != "cpu" and not torch.get_device_module(device).is_available():
        return None
    return device_name(device), software


@functools.cache
def _release(package: str) -> str | None:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # builds for other GPUs have names of their own
        names = importlib.metadata.packages_distributions().get(package)
        if not names:
            return None
        version = importlib.metadata.version(names[0])
    return f"{package} " + ".".join(version.split(".")[:2])


@functools.cache
def _table(device: str, software: str) -> dict[Case, Entry]:
    return {entry.case: entry for profile in _profiles(device, software) for entry in profile.entries}


@functools.cache
def _profiles(device: str, software: str) -> list[Profile]:
    paths = [*sorted(SHIPPED.glob("*.json")), *sorted((cache_directory() / "tuned").glob("*.json"))]
    if given := os.environ.get(GIVEN):
        if not Path(given).is_file():
            raise ValueError(f"{GIVEN}={given}: no such file; expected a table that qexperts tune --save wrote")
        paths.append(Path(given))
    return [read(path, (device, software)) for path in paths]


def read(path: Path, key: tuple[str, str] | None = None) -> Profile:
    """A table; without its entries if it is not for the device and the software named.

    Raises: ValueError, with the file and the entry, for anything that is not as it should be.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a profile ({error}); {_REMEDY}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from None
    if not isinstance(data, dict) or data.get("kind") != "tuned":
        raise ValueError(f"{path}: expected a JSON object of kind tuned; {_REMEDY}")
    for name, kind in (("schema", int), ("device", str), ("software", str), ("entries", list)):
        if not isinstance(data.get(name), kind):
            raise ValueError(f"{path}: {name} is {data.get(name)!r}; expected {_KINDS[kind]}; {_REMEDY}")
    if data["schema"] != SCHEMA:
        return Profile(path, unused=f"is of schema {data['schema']}, this is {SCHEMA}; run qexperts tune again")
    found = (data["device"], data["software"])
    if key not in (None, found):
        return Profile(path, unused=f"is for {' with '.join(found)}, this is {' with '.join(key or ())}")
    return Profile(path, tuple(_entry(item, f"{path}: entry {i}") for i, item in enumerate(data["entries"], 1)))


def _entry(item: object, where: str) -> Entry:
    if not isinstance(item, dict):
        raise ValueError(f"{where} is {item!r}; expected an object; {_REMEDY}")
    for name, kind in _FIELDS.items():
        if type(item.get(name)) is not kind:
            raise ValueError(f"{where}: {name} is {item.get(name)!r}; expected {_KINDS[kind]}; {_REMEDY}")
    for name, values in (("backend", BACKENDS), ("phase", PHASES), ("format", tuple(FORMATS))):
        if item[name] not in values:
            raise ValueError(f"{where}: {name} is {item[name]!r}; expected one of {', '.join(values)}; {_REMEDY}")
    rules, config = item.get("rules"), item.get("config")
    if not isinstance(rules, str):
        raise ValueError(f"{where}: rules is {rules!r}; expected a string; {_REMEDY}")
    if not isinstance(config, dict):
        raise ValueError(f"{where}: config is {config!r}; expected an object; {_REMEDY}")
    facts = {key: value for key, value in item.items() if key not in (*_FIELDS, "rules", "config")}
    return Entry(Case(**{name: item[name] for name in _FIELDS}), rules, config, facts, where)


def write(path: Path, key: tuple[str, str], entries: Iterable[Entry]) -> None:
    """Replace a table, at once, by one for a device and a release with these entries."""
    items = [{**dataclasses.asdict(e.case), "rules": e.rules, "config": dict(e.config), **e.facts} for e in entries]
    lines = ",\n".join(json.dumps(item) for item in items)
    head = json.dumps({"kind": "tuned", "schema": SCHEMA, "device": key[0], "software": key[1]})
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, f'{head[:-1]}, "entries": [\n{lines}\n]}}\n'.encode())
