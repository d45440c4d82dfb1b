"""PTX of an SM100 kernel for Hopper: its tcgen05 instructions become calls of emulation.cuh's functions, its
copies of packed FP4 count bytes (Hopper's tensor maps know no FP4). Anything else stays; an instruction that
is not known here is left for ptxas to refuse."""

import re
from collections import Counter

R, RD, RS = r"(%r\d+)", r"(%rd\d+)", r"(%rs\d+)"


def call(function: str, *arguments: str, result: str = "") -> str:
    """A call in braces; arguments are registers or numbers, %rd of 64 bits."""
    lines, names = ["{"], []
    for i, value in enumerate(arguments):
        kind = "b64" if value.startswith("%rd") else "b32"
        lines += [f".param .{kind} p{i};", f"st.param.{kind} [p{i}], {value};"]
        names.append(f"p{i}")
    back = "(q), " if result else ""
    lines += [".param .b64 q;"] if result else []
    lines.append(f"call.uni {back}{function}, ({', '.join(names)});")
    lines += [f"ld.param.b64 {result}, [q];"] if result else []
    return "\n".join([*lines, "}"])


def load(match: re.Match) -> str:
    """tcgen05.ld: registers in the order of the PTX ISA's figures."""
    shape, registers, address = match[1], re.findall(r"%r\d+", match[2]), match[3]
    row = 4 * 512  # bytes of a lane of tensor memory
    if shape == "16x256b":  # four registers for every 8 columns
        offsets = [32 * (i // 4) + 8 * row * (i % 4 // 2) + 4 * (i % 2) for i in range(len(registers))]
    else:  # 32x32b: a lane's columns
        offsets = [4 * i for i in range(len(registers))]
    loads = [f"ld.global.cg.u32 {r}, [a+{o}];" for r, o in zip(registers, offsets, strict=True)]
    where = call("emulate_ld", address, str(int(shape == "16x256b")), result="a")
    return "\n".join(["{ .reg .b64 a;", where, *loads, "}"])


def mma(m: re.Match) -> str:
    flag = "{ .reg .b32 acc; selp.b32 acc, 1, 0, p;\n"
    return flag + call("emulate_mma", *m.groups(), "acc") + "}"


def commit(m: re.Match) -> str:
    widened = f"{{ .reg .b32 w; cvt.u32.u16 w, {m[2]};\n"
    return widened + call("emulate_commit", m[1], "w") + "}"


RULES = [
    (
        rf"tcgen05\.alloc\.cta_group::\d\.sync\.aligned\.shared::cta\.b32 \[{R}\], %r\d+;",
        lambda m: call("emulate_alloc", m[1]),
    ),
    (r"tcgen05\.(?:dealloc|relinquish_alloc_permit|wait::ld|wait::st)[^;]*;", lambda m: ""),
    (
        rf"tcgen05\.cp\.cta_group::(\d)\.32x128b\.warpx4 \[{R}\], {RD};",
        lambda m: call("emulate_cp", *m.groups()),
    ),
    (
        r"tcgen05\.mma\.cta_group::(\d)\.kind::mxf4nvf4\.block_scale\.block16 "
        rf"\[{R}\], {RD}, {RD}, {R}, \[{R}\], \[{R}\], p;",
        mma,
    ),
    (
        r"tcgen05\.commit\.cta_group::\d\.mbarrier::arrive::one\.shared::cluster\.multicast::cluster\.b64 "
        rf"\[{R}\], {RS};",
        commit,
    ),
    (
        rf"tcgen05\.commit\.cta_group::1\.mbarrier::arrive::one\.shared::cluster\.b64 \[{R}\];",
        lambda m: call("emulate_commit", m[1], "1"),
    ),
    (rf"tcgen05\.ld\.sync\.aligned\.(32x32b|16x256b)\.x\d+\.b32\s*\{{([^}}]*)\}},\s*\[{R}\];", load),
]
COPY = re.compile(
    r"(cp\.async\.bulk\.tensor\.(\d)d)(\.cta_group::2)?"
    r"(\.shared::cluster\.global\.mbarrier::complete_tx::bytes)"
    rf"(\.multicast::cluster)?(\.L2::cache_hint) \[{R}\], \[(%rd\d+), \{{(%r\d+)([^}}]*)\}}\], \[{R}\], "
    r"(?:(%rs\d+), )?(%rd\d+);"
)
EXTENT = rf"tensormap\.replace\.tile\.global_dim\.shared::cta\.b1024\.b32 \[%rd\d+\], (\d), {R};"


def halved(text: str, register: str) -> str:
    """The instruction with half of what `register` holds in the place of @."""
    return f"{{ .reg .b32 h; shr.u32 h, {register}, 1;\n{text.replace('@', 'h')} }}"


def packed_extents(text: str) -> str:
    """The inner extents of the two FP4 maps: of two dimensions (the rest set from one register, of 1),
    and alike, as both are K."""
    found = list(re.finditer(EXTENT, text))
    maps = [found[i : i + 5] for i in range(0, len(found), 5)]
    assert all([m[1] for m in group] == list("01234") for group in maps), "tensor maps are set in another way"
    flat = [group for group in maps if len({m[2] for m in group[2:]}) == 1]
    inner = Counter(group[0][2] for group in flat).most_common(1)[0]
    assert inner[1] == 2, f"two FP4 operands, found {inner}"
    for group in reversed([g for g in flat if g[0][2] == inner[0]]):
        m = group[0]
        line = m[0].replace(m[2] + ";", "@;")
        text = text[: m.start()] + halved(line, m[2]) + text[m.end() :]
    return text


class Copies:
    """Copies into shared memory: of FP4 (two dimensions) and of scales (four)."""

    def __init__(self, text: str):
        self.codes = 0  # operand a, b, a, b, ..
        waits = set(re.findall(r"mbarrier\.arrive\.expect_tx\.shared::cta\.b64 _, \[%r\d+\], (%r\d+);", text))
        values = {int(n) for r in waits for n in re.findall(rf"mov\.(?:u|b)32 \t{r}, (\d+);", text)}
        # a pair's stage: 128 rows a CTA of a, N / 2 of b, each 128 bytes and 16 of scales; b's scales go to
        # both
        self.pair_columns = (max(values) - 2 * 128 * 144) // 160 if values else 0

    def __call__(self, m: re.Match) -> str:
        head, rank, pair, middle, multicast, hint, to, map_, inner, rest, barrier, mask, policy = m.groups()
        codes = rank == "2"
        second = codes and self.codes % 2 == 1
        self.codes += codes

        def line(bar: str) -> str:
            return f"{head}{middle}{hint} [{to}], [{map_}, {{@{rest}}}], [{bar}], {policy};"

        if not pair:
            assert not multicast, "multicast needs a pair of CTAs here"
            return halved(line(barrier), inner) if codes else line(barrier).replace("@", inner)
        # of all CTAs of the mask together: an operand's rows of one CTA, but b's scales are the pair's
        rows = 128 if not second and not multicast else self.pair_columns // (2 if codes else 1)
        size = str(rows * (128 if codes else 16))
        body = halved(line("own"), inner) if codes else line("own").replace("@", inner)
        where = "mov.b32 mask, 0;" if not mask else f"cvt.u32.u16 mask, {mask};"
        return "\n".join(
            [
                "{ .reg .b32 own, mask; .reg .b64 at;", where,
                call("emulate_copy_begin", size, "mask", result="at"),
                "cvt.u32.u64 own, at;", body, call("emulate_copy_end", to, barrier, size, "mask"), "}",
            ]
        )  # fmt: skip


def lower(text: str) -> tuple[str, dict[str, int]]:
    """The lowered PTX, and how often each kind of instruction was found."""
    counts = Counter()
    text = packed_extents(text)
    text, counts["copy"] = re.subn(COPY, Copies(text), text)
    for pattern, replacement in RULES:
        text, found = re.subn(pattern, replacement, text)
        counts[re.match(r"tcgen05\\\.([\w?:(|]+)", pattern)[1]] += found
    return text, dict(counts)
