"""Which tensors make a quantized module: one row for each way FP4 weights are stored.

The tensors decide, by names, types and shapes; config files are compared with them later (claims.py).
Every row: FP4 codes two a byte along K, low nibble = even k. The nibble order cannot be seen in the data, so
a layout that is not in the table is refused and never guessed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from .header import CheckpointError, TensorInfo

NVFP4, MXFP4 = "nvfp4", "mxfp4"
GROUP = {NVFP4: 16, MXFP4: 32}  # values that share a block scale


@dataclass(frozen=True)
class Dialect:
    name: str  # of the format, as users say it
    kind: str
    packed: str  # suffixes: what follows the module's name
    packed_dtypes: tuple[str, ...]
    scale: str
    scale_dtypes: tuple[str, ...]
    alpha: str = ""  # "" for MXFP4: there is none
    inverse: bool = False  # alpha and input_scale are stored as 1 / x
    layout: str = "rows"  # rows [.., N, K/2] · columns [E, K/2, N] · blocks [E, N, K/32, 16]
    input_scale: tuple[str, ...] = ()
    bias: str = ".bias"
    pre_quant_scale: str = ""


E4M3, E8M0, BYTE, I8 = ("F8_E4M3",), ("F8_E8M0",), ("U8",), ("I8",)

DIALECTS = (
    Dialect(  # AMD Quark's NVFP4 too: the same but for input_scale_2
        "modelopt-nvfp4", NVFP4, ".weight", BYTE, ".weight_scale", E4M3, ".weight_scale_2",
        input_scale=(".input_scale", ".input_scale_2"), pre_quant_scale=".pre_quant_scale",
    ),
    Dialect(  # experts of Llama 4 and gpt-oss, stacked for a batched matmul: K before N
        "modelopt-nvfp4", NVFP4, "", BYTE, "_weight_scale", E4M3, "_weight_scale_2",
        layout="columns", input_scale=("_input_scale",), bias="_bias", pre_quant_scale="_pre_quant_scale",
    ),
    Dialect(
        "compressed-tensors-nvfp4", NVFP4, ".weight_packed", BYTE, ".weight_scale", E4M3,
        ".weight_global_scale", inverse=True, input_scale=(".input_global_scale",),
    ),
    Dialect(
        "compressed-tensors-mxfp4", MXFP4, ".weight_packed", BYTE, ".weight_scale", BYTE + E8M0,
    ),
    Dialect(
        "gpt-oss-mxfp4", MXFP4, "_blocks", BYTE, "_scales", BYTE + E8M0, layout="blocks", bias="_bias",
    ),
    Dialect(  # the names OpenAI published; mlp1_weight's bias is mlp1_bias
        "gpt-oss-mxfp4", MXFP4, ".blocks", BYTE, ".scales", BYTE + E8M0, layout="blocks", bias="",
    ),
    Dialect("deepseek-v4-fp4", MXFP4, ".weight", I8, ".scale", E8M0),
    Dialect("quark-mxfp4", MXFP4, ".weight", BYTE, ".weight_scale", BYTE + E8M0),
)  # fmt: skip

# what may follow a module's name
SUFFIXES = {s for d in DIALECTS for s in (d.packed, d.scale, d.alpha) if s}

# Layouts we know and do not read: what gives each away, and why not.
REFUSED = {
    ".comfy_quant": "ComfyUI's: the high nibble is the even k and scales are interleaved",
    ".weight_scale.nvfp4_csf_fixed": "CSF's compressed block scales",
    ".qweight": "GPTQ's, AWQ's or FPQuant's (which multiplies by a Hadamard matrix as well)",
    ".act_global_scale": "FPQuant's, which multiplies by a Hadamard matrix as well",
    "_qdata": "torchao's flattened tensors, whose scales may be interleaved",
    "._rowwise_data": "TransformerEngine's training state",
    ".svdquant_lora_a": "ModelOpt's NVFP4_SVD: weights need a low-rank correction",
    ".weight_lora_a": "ModelOpt's NVFP4_SVD: weights need a low-rank correction",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes' FP4",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes' NF4",
}


@dataclass(frozen=True)
class Module:
    """One quantized weight [N, K], or `experts` of them stacked."""

    name: str
    kind: str  # nvfp4 | mxfp4
    compute: str  # nvfp4: activations are quantized too · bf16: weights only
    experts: int | None
    shape: tuple[int, int]  # (N, K)
    group: int  # values that share a block scale; 32 in some of ModelOpt's NVFP4, where one stands for two
    # role -> full name: packed, sf or e8m0, and where there: alpha, input_scale, bias, pre_quant_scale
    tensors: Mapping[str, str]
    dialect: Dialect = field(repr=False)


def find_modules(
    tensors: Mapping[str, TensorInfo], errors: list[str], claimed_group: int | None = None
) -> dict[str, Module]:
    """Quantized modules by name (compute still open); what is wrong with a module goes to `errors`.

    claimed_group: NVFP4's group_size by the config. 16 needs no claim; 32 (NVFP4_MLP_WEIGHT_ONLY_CFG of
    ModelOpt) is believed if config and shapes agree on it, for codes with other scales could be anything."""
    modules = {}
    for name in tensors:
        for dialect in DIALECTS:
            base = name.removesuffix(dialect.packed) if dialect.packed else name
            if base == name and dialect.packed:
                continue
            scale = tensors.get(base + dialect.scale)
            if (
                tensors[name].dtype not in dialect.packed_dtypes
                or scale is None
                or scale.dtype not in dialect.scale_dtypes
                or (dialect.kind == MXFP4 and base + ".weight_scale_2" in tensors)
            ):
                continue
            try:
                modules[base] = _module(base, dialect, tensors, claimed_group)
            except CheckpointError as error:
                errors.append(str(error))
            break
    return modules


def _module(base: str, dialect: Dialect, tensors: Mapping[str, TensorInfo], claimed_group) -> Module:
    roles = {"packed": base + dialect.packed, "sf" if dialect.kind == NVFP4 else "e8m0": base + dialect.scale}
    if dialect.alpha:
        if base + dialect.alpha not in tensors:
            raise CheckpointError(
                f"{base}: {dialect.alpha.lstrip('._')} is missing: the weight's size is unknown"
            )
        roles["alpha"] = base + dialect.alpha
    optional = [("bias", dialect.bias), ("pre_quant_scale", dialect.pre_quant_scale)]
    for role, suffix in optional + [("input_scale", s) for s in dialect.input_scale]:
        if suffix and base + suffix in tensors:
            roles[role] = base + suffix
    if dialect.packed == ".blocks" and base.endswith("_weight") and base[:-6] + "bias" in tensors:
        roles["bias"] = base[:-6] + "bias"
    packed, scale = tensors[roles["packed"]].shape, tensors[base + dialect.scale].shape
    experts, N, K = _sizes(base, dialect, packed)
    group = _group(base, dialect, packed, scale, experts, N, K, claimed_group)
    if dialect.alpha:
        check_multipliers(f"{base}: alpha", tensors[roles["alpha"]], experts, ("F32",))
    return Module(base, dialect.kind, "", experts, (N, K), group, roles, dialect)


def _sizes(base: str, dialect: Dialect, packed: tuple[int, ...]) -> tuple[int | None, int, int]:
    """(experts or None, N, K)"""
    found = None
    if dialect.layout == "columns" and len(packed) == 3:
        found = packed[0], packed[2], 2 * packed[1]
    elif dialect.layout == "blocks" and len(packed) == 4 and packed[3] == 16:
        found = packed[0], packed[1], 32 * packed[2]
    elif dialect.layout == "rows" and len(packed) in (2, 3):
        found = packed[0] if len(packed) == 3 else None, packed[-2], 2 * packed[-1]
    if found is None or found[2] % GROUP[dialect.kind]:
        raise CheckpointError(f"{base}: packed codes of shape {list(packed)} are not {dialect.name}'s")
    return found


def _group(base: str, dialect: Dialect, packed, scale, experts, N: int, K: int, claimed_group) -> int:
    """Values a scale stands for, if the scales' shape fits the codes'."""

    def wanted(group: int) -> tuple[int, ...]:
        lead = () if experts is None else (experts,)
        return (*lead, K // group, N) if dialect.layout == "columns" else (*lead, N, K // group)

    def fits(group: int) -> bool:
        # [1, N, S] beside [N, K/2] occurs
        return K % group == 0 and scale in (wanted(group), *[(1, *wanted(group))] * (experts is None))

    usual = GROUP[dialect.kind]
    if fits(usual):
        return usual
    if dialect.kind == NVFP4 and claimed_group == 32 and fits(32):
        return 32
    why, other = "", 48 - usual
    if fits(other):
        why = f"; one scale for {other} values belongs to {'MXFP4' if other == 32 else 'NVFP4'}"
    elif len(scale) == len(wanted(usual)) and all(s >= w for s, w in zip(scale, wanted(usual), strict=True)):
        why = "; are they interleaved or padded?"
    raise CheckpointError(
        f"{base}: block scales must have shape {list(wanted(usual))} for codes {list(packed)},"
        f" got {list(scale)}{why}"
    )


def check_multipliers(what: str, info: TensorInfo, experts: int | None, dtypes: tuple[str, ...]) -> None:
    """One value, one for each expert, or [E, 2]: gate's and up's. Not [2, E], which holds as many."""
    E, count = experts or 1, prod(info.shape)
    pairs = experts is not None and tuple(d for d in info.shape if d != 1) == ((E, 2) if E > 1 else (2,))
    if info.dtype not in dtypes or not (count in (1, E) or pairs):
        wanted = "1 value" if experts is None else f"1 value, [{E}] or [{E}, 2]"
        raise CheckpointError(
            f"{what} must be {' or '.join(dtypes)} with {wanted}, got {info.dtype} {list(info.shape)}"
        )


def refusal(tensors: Mapping[str, TensorInfo], metadata: Mapping[str, Mapping[str, str]]) -> str | None:
    """Why this checkpoint is not read at all, or None."""
    for file, keys in metadata.items():
        if "_quantization_metadata" in keys:
            return f"{file} carries _quantization_metadata: ComfyUI's layout, {REFUSED['.comfy_quant']}"
    for name in tensors:
        for suffix, whose in REFUSED.items():
            if name.endswith(suffix):
                return f"{name}: this layout is {whose}; it is not read"
    return None
