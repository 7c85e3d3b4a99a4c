"""What sm_90's products do after they are issued, seen in machine code.

``HGMMA`` reads its left operand from registers and writes its sums to others until a ``WARPGROUP.DEPBAR`` waits for its
group. The assembler does not keep other instructions off those registers; a result that differs from run to run is how
one would notice.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import triton

Instruction = tuple[int, str]  # address, text
NO_RESULT = ("ST", "RED", "BAR", "SYNCS", "BRA", "EXIT", "WARP", "BSYNC", "BSSY", "ISETP", "FSETP", "UTMA", "UBLKCP")


def disassembled(cubin: Path, function: str) -> list[Instruction]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([str(tool), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    body = text.split(f"Function : {function}\n")[1].split("Function :")[0]
    return [(int(at, 16), code) for at, code in re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;\n]*?)\s*;", body)]


def _registers(code: str) -> tuple[set[int], set[int]]:
    """(registers written, registers read or written)."""
    code = re.sub(r"^@!?U?P\w+\s+", "", code)
    operation, _, operands = code.partition(" ")
    touched = {int(n) for n in re.findall(r"\bR(\d+)\b", operands)}
    first = re.match(r"(?:!?U?P\w+,\s*)*R(\d+)\b", operands.strip())
    if operation.startswith(NO_RESULT) or not first:
        return set(), touched
    count = 4 if ".128" in operation else 2 if re.search(r"\.64|WIDE|^CS2R", operation) else 1
    written = set(range(int(first[1]), int(first[1]) + count))
    return written, touched | written


def hazards(code: list[Instruction]) -> list[str]:
    """Instructions that touch a sum, or write a left operand, of a product that may still run."""
    index = {address: i for i, (address, _) in enumerate(code)}
    found: set[tuple[int, str]] = set()
    nothing: frozenset[tuple[str, int]] = frozenset()
    work = [(0, (nothing,))]  # groups in flight, the last one open
    seen = set(work)
    while work:
        i, groups = work.pop()
        address, text = code[i]
        if product := re.search(r"HGMMA\.64x(\d+)\S* R(\d+), R(\d+), gdesc", text):
            columns, sums, left = (int(n) for n in product.groups())
            used = {("sum", r) for r in range(sums, sums + columns // 2)} | {("left", r) for r in range(left, left + 4)}
            groups = (*groups[:-1], groups[-1] | used)
            if "gsb0" in text:
                groups = (*groups, nothing)
        elif wait := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", text):
            groups = groups[max(0, len(groups) - 1 - int(wait[1])) :]
        else:
            flying = nothing.union(*groups)
            if flying:
                written, touched = _registers(text)
                if any(("left", r) in flying for r in written) or any(("sum", r) in flying for r in touched):
                    found.add((address, text))
        following = [] if re.match(r"(BRA|EXIT)\b", text) else [i + 1]
        if jump := re.search(r"\bBRA (?:\S+, )?0x([0-9a-f]+)", text):
            following.append(index[int(jump[1], 16)])
        for state in ((n, groups) for n in following if n < len(code)):
            if state not in seen:
                seen.add(state)
                work.append(state)
    return [f"{address:#x}: {text}" for address, text in sorted(found)]
