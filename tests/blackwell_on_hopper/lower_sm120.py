"""PTX for sm_120a, for sm_90a: its block-scaled mma.sync becomes a call of emulation_sm120.cuh's function and
the target another; everything else stays. What else Hopper lacks is left for ptxas to refuse."""

import re

NAME = "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue4m3"
REGISTERS = r"\{([^{}]*)\}"
# d, a, b, c, scales of a, their selectors, scales of b, theirs
PATTERN = re.escape(NAME) + r"\s+" + r",\s*".join([REGISTERS] * 8) + ";"


def mma(match: re.Match) -> str:
    d, a, b, c, scales_a, of_a, scales_b, of_b = (re.findall(r"[%\w]+", group) for group in match.groups())
    assert [*map(len, (d, a, b, c, scales_a, scales_b))] == [4, 4, 2, 4, 1, 1], match[0]
    assert of_a == of_b == ["0", "0"], f"selectors of scales are 0 here, found {of_a} {of_b}"
    lines = ["{", ".param .align 16 .b8 q[16];"]
    arguments = [*a, *b, *c, *scales_a, *scales_b]
    for i, register in enumerate(arguments):
        lines += [f".param .b32 p{i};", f"st.param.b32 [p{i}], {register};"]
    names = ", ".join(f"p{i}" for i in range(len(arguments)))
    lines += [f"call.uni (q), emulate_mma_sync, ({names});", f"ld.param.v4.b32 {{{', '.join(d)}}}, [q];", "}"]
    return "\n".join(lines)


def lower(text: str) -> tuple[str, dict[str, int]]:
    """The lowered PTX, and how many instructions were found."""
    text, found = re.subn(PATTERN, mma, text)
    return text.replace(".target sm_120a", ".target sm_90a"), {"mma.sync": found}
