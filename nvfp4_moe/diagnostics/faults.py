"""Every fault the doctor knows: which check finds it, how grave it is, what to do. The checks name them by
key."""

from dataclasses import dataclass

from .finding import ERROR, INFO, SEVERITIES, WARNING, Finding, Place

CHECKS = {  # name: what is compared
    "index": "the index against the shards' headers",
    "nan-scales": "block scales: NaN, negative",
    "saturation": "block scales: how many are 448",
    "scale-range": "block scales: the largest of a tensor",
    "underflow": "block scales: zero, or pinned at 2^-9",
    "global-scale": "global scales: finite, positive, of a sensible size",
    "inverted-scale": "global scales: multiplier or divisor",
    "gate-up": "global scales of gate and up",
    "qkv": "global scales of q, k and v",
    "folding": "what folding the global scale into E4M3 would lose",
    "input-scale": "input scales: missing, sentinels",
    "input-scale-pairs": "input scales of gate and up, and over experts",
    "activations": "input scales against activations measured at run time",
    "tensors": "missing and extra tensors",
    "experts": "numbers of experts",
    "dead-experts": "weights that are all zero, scales that are all one",
    "layout": "types, shapes and layouts",
    "e8m0": "MXFP4 exponents",
    "kv-scales": "scales of the KV cache",
    "config": "the config against the tensors",
    "codes": "use of the codes' range",
}


@dataclass(frozen=True)
class Fault:
    check: str
    severity: str
    title: str
    advice: str


AGAIN = "download or export the checkpoint again"
CALIBRATE = (
    "calibrate again with more data, or let the engine scale activations at run time, as nvfp4_moe does"
)
FAULTS = {
    "unreadable": Fault("index", ERROR, "the directory cannot be read as a checkpoint", AGAIN),
    "index-names": Fault(
        "index", WARNING, "the index and the shards name different tensors",
        "write the index again: loaders that trust it miss tensors or fail",
    ),
    "index-lacks-scales": Fault(
        "index", ERROR, "the index lacks scales that the shards hold",
        "write the index again: a loader that trusts it runs without these scales",
    ),
    "index-size": Fault(
        "index", WARNING, "the index's total_size is not the shards' size",
        "write the index again, after checking that no shard is of an older export",
    ),
    "nan-scale": Fault(
        "nan-scales", ERROR, "block scales are NaN (byte 0x7F or 0xFF)",
        "every output of these rows will be NaN: export again with scales clamped to 448",
    ),
    "negative-scale": Fault(
        "nan-scales", ERROR, "block scales are negative",
        "scales never are: the tensor is of another type or its bytes are damaged; " + AGAIN,
    ),
    "saturated": Fault(
        "saturation", WARNING, "many block scales are at 448: the amax was too small, large weights are cut",
        "export again with the amax of the whole weight (of all shards under tensor parallelism)",
    ),
    "low-scales": Fault(
        "scale-range", INFO, "the largest block scale is below 200: the amax was larger than the weights'",
        "nothing is wrong with the values; a plain export would use the range up to 448",
    ),
    "tiny-scales": Fault(
        "scale-range", WARNING, "the largest block scale is 2^-4 or less: most blocks are near underflow",
        "export again with the tensor's own amax",
    ),
    "lost-blocks": Fault(
        "underflow", ERROR, "block scales are zero under codes that are not: these weights are lost",
        "export again with block scales clamped to 2^-9",
    ),
    "pinned-blocks": Fault(
        "underflow", WARNING, "blocks pinned at the smallest scale, 2^-9, with codes that hardly move",
        "an outlier widens the tensor's range: give it a scale of its own (per expert, not per layer)",
    ),
    "ct-eighth": Fault(
        "underflow", INFO, "underflowed blocks, written as compressed-tensors does: scale 0.125, codes 0",
        "harmless where the weights were zero; otherwise these blocks are lost",
    ),
    "bad-global": Fault(
        "global-scale", ERROR, "the global scale is NaN, infinite, not positive or subnormal",
        "outputs will be NaN, zero or denormal: export this tensor again",
    ),
    "odd-global": Fault(
        "global-scale", WARNING, "the global scale is outside 1e-10 .. 1 as a multiplier",
        "compare with a neighbouring layer; weights of such a size are rare",
    ),
    "inverted-global": Fault(
        "inverted-scale", ERROR, "the global scale is the reciprocal of what its format stores",
        "ModelOpt's weight_scale_2 multiplies, compressed-tensors' weight_global_scale divides: store 1 / it",
    ),
    "gate-up-differ": Fault(
        "gate-up", WARNING, "gate and up have different global scales",
        "exact in nvfp4_moe (alpha is [E, 2]); others take gate's for both, and err as shown",
    ),
    "gate-up-far": Fault(
        "gate-up", ERROR, "gate and up have global scales more than 25 % apart",
        "exact in nvfp4_moe (alpha is [E, 2]); elsewhere export again, gate and up under one amax",
    ),
    "qkv-differ": Fault(
        "qkv", WARNING, "projections that engines fuse have different global scales",
        "exact in nvfp4_moe (alpha per row); engines that take the largest for all get the others too large",
    ),
    "folds-badly": Fault(
        "folding", INFO, "an engine that folds the global scale into E4M3 would lose blocks of this tensor",
        "nvfp4_moe keeps alpha apart; do not use a loader that multiplies it into weight_scale",
    ),
    "input-scale-missing": Fault(
        "input-scale", ERROR, "no input scale, though the config says activations are quantized with one",
        "engines read 0 or whatever is in memory, and return NaN for some prompts: " + CALIBRATE,
    ),
    "input-scale-bad": Fault(
        "input-scale", ERROR, "the input scale is zero, subnormal, negative, infinite or NaN",
        CALIBRATE,
    ),
    "input-scale-sentinel": Fault(
        "input-scale", WARNING, "the input scale is a placeholder: this module saw no calibration data",
        CALIBRATE,
    ),
    "input-scale-same": Fault(
        "input-scale", INFO, "all experts of a projection have the same input scale: one value was broadcast",
        "nothing is wrong; engines take the largest of a layer anyway",
    ),
    "input-scale-pair": Fault(
        "input-scale-pairs", WARNING, "gate and up see the same activations and have different input scales",
        "TensorRT-LLM refuses this; use the larger of the two for both",
    ),
    "input-scale-spread": Fault(
        "input-scale-pairs", WARNING, "input scales of a layer's experts are more than 1e4 apart",
        "engines take the largest for all, so small experts' activations underflow: scale at run time",
    ),
    "activation-above": Fault(
        "activations", WARNING, "measured activations exceed the calibrated range by more than 1.5",
        CALIBRATE,
    ),
    "activation-far-above": Fault(
        "activations", ERROR, "measured activations exceed the calibrated range more than twofold",
        "errors grow from 10 % at 2 to 28 % at 4 and 56 % at 8: " + CALIBRATE,
    ),
    "missing-tensor": Fault("tensors", ERROR, "a tensor of a quantized module is missing", AGAIN),
    "extra-tensor": Fault(
        "tensors", WARNING, "a tensor beside a quantized weight that its format does not have",
        "nobody reads it: it is left over from another format, or the module is not what it looks like",
    ),
    "excluded-quantized": Fault(
        "tensors", ERROR, "quantized, though the config excludes it",
        "engines would load it as BF16 and fail or return garbage: correct the config's ignore list",
    ),
    "not-quantized": Fault(
        "tensors", ERROR, "a linear layer that is not quantized, and the config does not exclude it",
        "engines would look for scales that are not there: add it to the config's ignore list",
    ),
    "expert-count": Fault(
        "experts", ERROR, "a layer's number of experts is not the config's", AGAIN,
    ),
    "expert-parts": Fault(
        "experts", ERROR, "experts without gate, up or down projection",
        AGAIN + "; an expert without down_proj may be a shared expert under a wrong name",
    ),
    "dead-weight": Fault(
        "dead-experts", WARNING, "all codes are zero",
        "a dead expert adds nothing: compare with the original weights; it may be padding",
    ),
    "one-scale": Fault(
        "dead-experts", INFO, "all block scales are the same default value (1 or 0.125)",
        "compare with the original weights: the scales look as if nobody had computed them",
    ),
    "refused": Fault("layout", ERROR, "a layout that is not read", "convert it with the tool that wrote it"),
    "wrong-layout": Fault(
        "layout", ERROR, "types or shapes of codes and scales do not fit each other",
        "the bytes are in another order or of another format than the names say: export again",
    ),
    "e8m0-nan": Fault(
        "e8m0", ERROR, "exponents above 125 (255 is NaN) on blocks that are not zero", AGAIN,
    ),
    "e8m0-nan-zero": Fault(
        "e8m0", WARNING, "exponent byte 255 (NaN) on blocks of zeros",
        "harmless in nvfp4_moe: read as zero; elsewhere the block may turn NaN",
    ),
    "e8m0-zero-byte": Fault(
        "e8m0", WARNING, "exponent byte 0 on blocks that are not zero: 2^-127, which some readers take for 0",
        "nothing is lost in nvfp4_moe; the weights are as good as zero",
    ),
    "e8m0-stray": Fault(
        "e8m0", WARNING, "exponents of all-zero blocks lie above every other block's",
        "harmless in nvfp4_moe; converters that look at exponents alone scale the whole tensor to zero by it",
    ),
    "e8m0-spread": Fault(
        "e8m0", WARNING, "exponents span more than 17: NVFP4 cannot hold the tensor without loss",
        "convert with method `best`, and compare the error it reports",
    ),
    "e8m0-pair-spread": Fault(
        "e8m0", WARNING, "exponents of gate and up together span more than 17",
        "one alpha for both loses blocks: convert with method `best`, or give each half its own",
    ),
    "kv-odd": Fault(
        "kv-scales", WARNING, "a KV-cache scale is 1 (not calibrated), above 100 or below 1e-5",
        "calibrate the KV cache, or serve it in BF16",
    ),
    "kv-bad": Fault(
        "kv-scales", ERROR, "a KV-cache scale is NaN, infinite or not positive", "serve it in BF16",
    ),
    "kv-names": Fault(
        "kv-scales", WARNING, "KV-cache scales of several naming families, or of k without v",
        "loaders look for one family and ignore the rest",
    ),
    "config-missing": Fault(
        "config", WARNING, "no config says how this checkpoint is quantized",
        "write quantization_config into config.json: other engines load these bytes as unquantized",
    ),
    "config-legacy": Fault(
        "config", WARNING, "hf_quant_config.json says how this checkpoint is quantized, config.json does not",
        "copy it into config.json as quantization_config: newer loaders read only that",
    ),
    "config-method": Fault(
        "config", ERROR, "the config's quant_method is not the tensors' format",
        "correct config.json: engines choose their loader by it",
    ),
    "config-case": Fault(
        "config", WARNING, "quant_algo is not in upper case",
        "some loaders compare it exactly: write it in upper case",
    ),
    "config-group": Fault(
        "config", ERROR, "the config's group_size is not the tensors'",
        "correct the config: 16 for NVFP4, 32 for MXFP4",
    ),
    "config-pattern": Fault(
        "config", WARNING, "patterns of the config's ignore list that are not applied",
        "they may take for ever to match, or are none: write them without a repeat in a repeat",
    ),
    "config-ignore": Fault(
        "config", INFO, "entries of the config's ignore list that match no module",
        "harmless, unless a name was meant to be protected: compare the spelling",
    ),
    "codes-unused": Fault(
        "codes", INFO, "blocks whose largest value is 3 or less: half of the codes' range is unused",
        "no quantizer that chooses scales by the block does this: another format's codes were copied",
    ),
}  # fmt: skip


class Collector:
    """Takes faults as the checks come upon them and makes findings of them, one for each kind of fault."""

    def __init__(self):
        self.ran: set[str] = set()
        self._places: dict[str, list[Place]] = {}

    def add(self, fault: str, name: str, detail: str = "", size: float = 0.0) -> None:
        self.ran.add(FAULTS[fault].check)
        self._places.setdefault(fault, []).append(Place(name, detail, size))

    def findings(self) -> list[Finding]:
        """Errors first, then in the order of CHECKS; a finding's worst place first."""
        found = [self._finding(fault, places) for fault, places in self._places.items()]
        order = list(CHECKS)
        return sorted(found, key=lambda f: (-SEVERITIES.index(f.severity), order.index(f.check), f.fault))

    def _finding(self, fault: str, places: list[Place]) -> Finding:
        known = FAULTS[fault]
        ordered = tuple(sorted(places, key=lambda p: -p.size))
        return Finding(known.check, known.severity, known.title, known.advice, fault, ordered)

    def verdicts(self) -> dict[str, str]:
        """Every check: its worst severity, or that there was nothing for it to look at."""
        worst = {check: "ok" if check in self.ran else "nothing to check" for check in CHECKS}
        for finding in reversed(self.findings()):
            worst[finding.check] = finding.severity
        return worst
