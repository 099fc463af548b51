"""Count machine instructions in the hot loop of a kernel, from the cubin's disassembly; needs no GPU."""

import collections
import re
import subprocess
import tempfile

from ..compile.disassemble import MissingDisassembler, tool

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")


def disassembler():
    """The path of `cuobjdump`; None if there is none."""
    try:
        return tool("cuobjdump")
    except MissingDisassembler:
        return None


def instructions(cubin):
    """{kernel: [(address, opcode, operands)]} of every kernel in the cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([disassembler(), "-sass", file.name], capture_output=True, text=True, check=True).stdout
    kernels, current = {}, None
    for row in text.splitlines():
        if "Function :" in row:
            current = kernels.setdefault(row.split("Function :")[1].strip(), [])
        elif match := INSTRUCTION.search(row):
            current.append((int(match[1], 16), match[2], match[3]))
    return kernels


def hottest_loop(code):
    """The longest innermost backward branch's body: a counter of opcodes without their modifiers."""
    loops = []
    for address, opcode, operands in code:
        target = re.search(r"0x([0-9a-f]+)", operands)
        if opcode == "BRA" and target and int(target[1], 16) < address:
            loops.append((int(target[1], 16), address))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    if not inner:
        return {}
    start, stop = max(inner, key=lambda loop: loop[1] - loop[0])
    body = [opcode.split(".")[0] for address, opcode, _ in code if start <= address <= stop]
    return dict(collections.Counter(body).most_common())


def loop_counts(cubin, names):
    """Opcode counts of the hot loop of each kernel, or a note that no disassembler is installed."""
    if disassembler() is None:
        return "no cuobjdump found"
    code = instructions(cubin)
    return {name: hottest_loop(code[name]) for name in names}
