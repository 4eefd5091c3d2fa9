"""Matrix instructions of sm_90 whose left operand is overwritten while they may still read it.

HGMMA runs behind the program. Its left operand, four registers, may be read until a `WARPGROUP.DEPBAR.LE gsb0, n` has
left at most n later groups unfinished (PTX: wgmma.wait_group); neither hardware nor assembler guards them before. A
compiler that lets groups run on into the next round of a loop writes the next operands over them: results are wrong
now and then. Triton 3.6 does, where nothing in the loop uses the sums.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

__all__ = ["overwritten", "spilled"]

Line = tuple[int, str]  # address, instruction

_NO_RESULT = ("ST", "RED", "ATOM", "LDGSTS", "BAR", "R2UR", "ISETP", "FSETP", "PLOP3", "BRA", "WARPGROUP", "DEPBAR")


def overwritten(sass: str) -> list[str]:
    """Instructions in innermost loops that write a register of a left operand in flight, in the text of cuobjdump."""
    return [line for body in _innermost(sass) for line in _in_loop(body)]


def spilled(sass: str) -> list[str]:
    """Instructions in innermost loops that move registers to and from memory.

    What reaches from a multiplication to a copy of the producer is no loop: retries of a wait, which jump back to it,
    may stand behind the whole program.
    """
    bodies = (body for body in _innermost(sass) if not any("UTMALDG" in text for _, text in body))
    return [text for body in bodies for _, text in body if re.search(r"\b(STL|LDL)\b", text)]


def _innermost(sass: str) -> Iterator[list[Line]]:
    """Bodies of loops that multiply and have no such loop in them."""
    lines = [(int(a, 16), t) for a, t in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    for body in _loops(lines):
        if not any(True for _ in _loops(body[:-1])):
            yield body


def _loops(lines: list[Line]) -> Iterator[list[Line]]:
    """Bodies of loops that multiply, from the target of a branch back to the branch."""
    position = {address: i for i, (address, _) in enumerate(lines)}
    for i, (address, text) in enumerate(lines):
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            body = lines[position.get(int(target[1], 16), i) : i + 1]
            if any("HGMMA" in t for _, t in body):
                yield body


def _in_loop(body: list[Line]) -> list[str]:
    """The same of one loop: two rounds of it, since operands of one are overwritten in the next."""
    flying: list[set[int]] = []  # operands of groups that may not have finished, oldest first
    group: set[int] = set()
    found = []
    for _, line in body * 2:
        text = re.sub(r"^@!?(U?P\d+|PT) ", "", line)
        operation = text.split()[0]
        if operation.startswith("HGMMA"):
            registers = re.findall(r"\bR(\d+)\b", text)  # sums, left operand, sums
            if text.count("gdesc") == 1 and len(registers) >= 2:
                group |= set(range(int(registers[1]), int(registers[1]) + 4))
            if "gsb0" in text:
                flying.append(group)
                group = set()
        elif operation.startswith("WARPGROUP.DEPBAR"):
            left = int(text.split(",")[1].split()[0], 16)
            flying = flying[-left:] if left else []
        elif not operation.startswith(_NO_RESULT):
            written = re.match(r"\S+ (?:U?PT?\d*, )?R(\d+)\b", text)
            if written:
                first = int(written[1])
                result = set(range(first, first + _width(operation)))
                if any(result & operand for operand in (*flying, group)):
                    found.append(line)
    return found


def _width(operation: str) -> int:
    """Registers that an instruction writes."""
    for width, marks in ((4, (".128", "LDSM.16.M88.4", "LDSM.16.MT88.4")), (2, (".64", ".WIDE", ".88.2"))):
        if any(mark in operation for mark in marks):
            return width
    return 1
