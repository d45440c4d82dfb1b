"""nvfp4 convert: MXFP4 checkpoints become NVFP4 ones of the same values; the report says where not."""

import json
import shutil

import pytest
import torch
from checkpoint_weights import mxfp4
from checkpoints import make, write_directory
from compare import assert_same_bits

from nvfp4_moe import formats, ops
from nvfp4_moe.checkpoint import CheckpointError, open_checkpoint
from nvfp4_moe.checkpoint.convert import METHODS, plan_conversion, surely_exact
from nvfp4_moe.checkpoint.fidelity import compare
from nvfp4_moe.tensor import Mxfp4Tensor, Nvfp4Tensor

FORMS = ("deepseek-v4", "compressed-tensors-mxfp4", "kimi-k3", "gpt-oss", "gpt-oss-original", "quark-mxfp4")
TARGETS = [(form, to) for form in FORMS for to in ("modelopt", "compressed-tensors")]
TARGETS.remove(("deepseek-v4", "compressed-tensors"))


def one_pair(path, packed, e8m0, **more):
    """A checkpoint of two modules, gate_proj and up_proj of one expert, in compressed-tensors' MXFP4."""
    names = "model.layers.0.mlp.experts.0.gate_proj", "model.layers.0.mlp.experts.0.up_proj"
    tensors = {}
    for name, p, e in zip(names, packed, e8m0, strict=True):
        tensors |= {f"{name}.weight_packed": p, f"{name}.weight_scale": e}
    config = {"quantization_config": {"quant_method": "compressed-tensors"}}
    write_directory(path, tensors | more, config)
    return names


def random_pair(N: int = 8, K: int = 64):
    packed = [torch.randint(0, 256, (N, K // 2), dtype=torch.uint8) for _ in range(2)]
    e8m0 = [torch.randint(110, 120, (N, K // 32)).to(torch.uint8) for _ in range(2)]
    return packed, e8m0


class TestEveryFormat:
    @pytest.mark.parametrize("form, to", TARGETS, ids=str)
    def test_keeps_every_value(self, form, to, tmp_path):
        make(tmp_path / "source", form, shards=3)
        result = plan_conversion(tmp_path / "source", to).run(tmp_path / "target", max_shard_bytes=10**5)
        before, after = open_checkpoint(tmp_path / "source"), open_checkpoint(tmp_path / "target")
        assert list(after.moe_layers()) == list(before.moe_layers()) and not after.warnings
        for prefix in before.moe_layers():
            old, new = before.moe(prefix), after.moe(prefix)
            if prefix.startswith("mtp."):
                assert isinstance(new.w13, Mxfp4Tensor)  # as DeepSeek-V4's engines expect
                continue
            assert isinstance(new.w13, Nvfp4Tensor) and new.gated
            assert_same_bits(new.w13.dequantize(), old.w13.dequantize(), f"{prefix} w13")
            assert_same_bits(new.w2.dequantize(), old.w2.dequantize(), f"{prefix} w2")
            assert torch.equal(new.w13.alpha[:, 0], new.w13.alpha[:, 1])
            for bias in ("w13_bias", "w2_bias"):
                got, want = getattr(new, bias), getattr(old, bias)
                assert want is None if got is None else torch.equal(got, want)
        assert all(r["exact"] for r in result.reports.values()) and result.reports

    @pytest.mark.parametrize("form", FORMS)
    def test_copies_what_is_not_mxfp4_byte_for_byte(self, form, tmp_path):
        truth = make(tmp_path / "source", form)
        plan_conversion(tmp_path / "source").run(tmp_path / "target")
        before, after = open_checkpoint(tmp_path / "source"), open_checkpoint(tmp_path / "target")
        owned = {t for m in before.modules.values() for t in m.tensors.values()}
        copied = [name for name in truth.tensors if name not in owned]
        assert len(copied) > 5
        for name in copied:
            assert_same_bits(after.shards[name], truth.tensors[name], name)

    @pytest.mark.parametrize("form, to", TARGETS, ids=str)
    def test_config_says_weights_only_unless_input_scales_are_written(self, form, to, tmp_path):
        make(tmp_path / "source", form)
        for amax, compute in ((None, "bf16"), (400.0, "nvfp4")):
            plan_conversion(tmp_path / "source", to, activation_amax=amax).run(tmp_path / str(amax))
            after = open_checkpoint(tmp_path / str(amax))
            modules = {n: m for n, m in after.modules.items() if m.kind == "nvfp4"}
            assert {m.compute for m in modules.values()} == {compute}
            for name, module in modules.items():
                assert ("input_scale" in module.tensors) == (amax is not None), name
                if amax:
                    assert after.input_scale(name) == pytest.approx(400 / 2688, rel=1e-6)

    def test_alpha_is_an_experts_own(self, tmp_path):
        make(tmp_path / "source", "gpt-oss", sizes=(64, 96, 16))
        plan_conversion(tmp_path / "source").run(tmp_path / "target")
        after = open_checkpoint(tmp_path / "target")
        alphas = after.moe("model.layers.0.mlp").w13.alpha[:, 0]
        assert len(alphas.unique()) > 2
        assert torch.equal(alphas.log2(), alphas.log2().round()), "powers of two"


class TestWhatItMakes:
    def test_is_what_the_operator_makes_of_gate_and_up_together(self, tmp_path):
        packed, e8m0 = random_pair()
        e8m0[1] += 30  # a span beyond the window, over the two
        for method in METHODS:
            gate, up = one_pair(tmp_path / f"{method}-source", packed, e8m0)
            plan_conversion(tmp_path / f"{method}-source", "modelopt", method).run(tmp_path / method)
            after = open_checkpoint(tmp_path / method)
            want = ops.mxfp4_to_nvfp4(torch.cat(packed), torch.cat(e8m0), method)
            for name, rows in ((gate, slice(0, 8)), (up, slice(8, 16))):
                got = after.weight(name)
                assert_same_bits(
                    (got.packed, got.sf, got.alpha), (want[0][rows], want[1][rows], want[2]), name
                )

    def test_joins_gate_and_up_from_different_shards(self, tmp_path):
        truth = make(tmp_path / "source", "compressed-tensors-mxfp4", shards=40)
        where = json.loads((tmp_path / "source/model.safetensors.index.json").read_text())["weight_map"]
        parted = [
            n
            for n in truth.values
            if n.endswith("gate_proj")
            and where[n + ".weight_packed"] != where[n.replace("gate_", "up_") + ".weight_packed"]
        ]
        assert parted
        plan_conversion(tmp_path / "source").run(tmp_path / "target")
        after = open_checkpoint(tmp_path / "target")
        for name in parted:
            other = name.replace("gate_", "up_")
            assert after.weight(name).alpha == after.weight(other).alpha
            assert torch.equal(after.weight(name).dequantize(), truth.values[name])

    def test_joins_what_a_dense_model_fuses_too(self, tmp_path):
        tensors = {}
        for i, proj in enumerate(("q_proj", "k_proj", "v_proj", "o_proj")):
            packed, e8m0, _ = mxfp4(torch.randn(8, 64) * 4.0**i)
            name = f"model.layers.0.self_attn.{proj}"
            tensors |= {f"{name}.weight_packed": packed, f"{name}.weight_scale": e8m0}
        write_directory(tmp_path / "source", tensors, {})
        plan_conversion(tmp_path / "source").run(tmp_path / "target")
        after = open_checkpoint(tmp_path / "target")
        q, k, v, o = (after.weight(n.removesuffix(".weight_packed")).alpha for n in list(tensors)[::2])
        assert q == k == v != o

    def test_keeps_the_sign_of_zeros_and_zero_blocks_with_stray_exponents(self, tmp_path):
        packed, e8m0 = random_pair()
        packed[0][0, :16], e8m0[0][0, 0] = 0x80, 0xFF  # zeros and minus zeros under a NaN
        gate, _ = one_pair(tmp_path / "source", packed, e8m0)
        result = plan_conversion(tmp_path / "source").run(tmp_path / "target")
        got = open_checkpoint(tmp_path / "target").weight(gate)
        assert_same_bits(got.packed, packed[0])
        assert result.reports[gate]["exact"] and result.reports[gate]["nan_scales_on_zeros"] == 1

    def test_reads_and_writes_in_the_order_of_the_source(self, tmp_path):
        """Each job where its first tensor lies: disks read forward."""
        tensors = {}
        for proj in ("q_proj", "o_proj", "k_proj"):  # q and k are one job
            packed, e8m0, _ = mxfp4(torch.randn(8, 64))
            tensors |= {f"a.{proj}.weight_packed": packed, f"a.{proj}.weight_scale": e8m0}
            tensors[f"{proj[0]}_norm.weight"] = torch.ones(64)
        write_directory(tmp_path, tensors, {}, shards=3)
        plan = plan_conversion(tmp_path)
        firsts = [min(plan.shards.place(name) for name in job.reads) for job in plan.jobs]
        assert firsts == sorted(firsts) and plan.modules == ["a.q_proj", "a.k_proj", "a.o_proj"]

    def test_takes_side_files_along_and_no_other_weights(self, tmp_path):
        source = tmp_path / "source"
        make(source, "gpt-oss")
        files = {"tokenizer.json": "{}", "chat_template.jinja": "x", "generation_config.json": "{}"}
        for name in (*files, "pytorch_model.bin", ".hidden", "model.gguf"):
            (source / name).write_text(files.get(name, ""))
        (source / "original").mkdir()
        plan_conversion(source).run(tmp_path / "target")
        there = {p.name for p in (tmp_path / "target").iterdir()}
        assert there == {
            *files,
            "config.json",
            "hf_quant_config.json",
            "model.safetensors",
            "nvfp4-conversion.json",
        }
        assert (tmp_path / "target/chat_template.jinja").read_text() == "x"

    def test_nvfp4_modules_of_a_mixed_checkpoint_keep_their_bytes(self, tmp_path):
        packed, e8m0 = random_pair()
        w = Nvfp4Tensor.quantize(torch.randn(8, 64))
        more = {"a.o_proj.weight_packed": w.packed, "a.o_proj.weight_scale": w.sf}
        more["a.o_proj.weight_global_scale"] = torch.tensor([1024.0])
        one_pair(tmp_path / "source", packed, e8m0, **more)
        for to in ("modelopt", "compressed-tensors"):
            plan_conversion(tmp_path / "source", to).run(tmp_path / to)
            got = open_checkpoint(tmp_path / to).weight("a.o_proj")
            assert_same_bits((got.packed, got.sf, got.alpha), (w.packed, w.sf, torch.tensor(1 / 1024)))


class TestTheReport:
    def lossy(self, tmp_path, method="best"):
        packed, e8m0 = random_pair(64, 256)
        e8m0[1][5:] = 140
        names = one_pair(tmp_path / "source", packed, e8m0)
        result = plan_conversion(tmp_path / "source", method=method).run(tmp_path / "target")
        return names, packed, e8m0, result

    @pytest.mark.parametrize("method", METHODS)
    def test_measures_what_changed(self, method, tmp_path):
        names, packed, e8m0, result = self.lossy(tmp_path, method)
        after = open_checkpoint(tmp_path / "target")
        for name, p, e in zip(names, packed, e8m0, strict=True):
            want = Mxfp4Tensor(p, e).dequantize(torch.float64)
            w = after.weight(name)
            codes = formats.e2m1_decode(formats.unpack(w.packed)).double()
            got = codes * w.sf.double().repeat_interleave(16, -1) * w.alpha.double()
            report = result.reports[name]
            changed = (got != want).unflatten(-1, (-1, 16)).any(-1).sum()
            assert report["exact"] == (changed == 0)
            if changed:
                assert report["changed"] == changed
                assert report["relative_rms"] == pytest.approx(float((got - want).norm() / want.norm()))
                assert report["spread"] == int(e.max()) - int(e.min())
        assert not result.reports[names[0]]["exact"], "the gate lies below the window"

    def test_is_in_the_target_with_the_worst_first(self, tmp_path):
        self.lossy(tmp_path)
        report = json.loads((tmp_path / "target/nvfp4-conversion.json").read_text())
        assert report["modules"] == 2 and report["changed"] == len(report["worst"]) == 2 - report["exact"]
        assert report["options"]["method"] == "best"
        errors = [w["relative_rms"] for w in report["worst"]]
        assert errors == sorted(errors, reverse=True)

    def test_finds_one_changed_value(self):
        packed, e8m0 = torch.full((4, 32), 0x22, dtype=torch.uint8), torch.full((4, 2), 120).to(torch.uint8)
        source = Mxfp4Tensor(packed, e8m0)
        made = source.to_nvfp4()
        assert compare(source, made)["exact"]
        made.packed[3, 31] ^= 0x10
        report = compare(source, made)
        assert not report["exact"] and report["changed"] == 1
        made = source.to_nvfp4()
        made.sf.view(torch.uint8)[0, 0] += 1
        assert compare(source, made)["changed"] == 1

    def test_calls_doubled_codes_under_halved_scales_exact(self):
        packed, e8m0 = torch.full((4, 32), 0x22, dtype=torch.uint8), torch.full((4, 2), 120).to(torch.uint8)
        source = Mxfp4Tensor(packed, e8m0)
        made = source.to_nvfp4()
        twice = Nvfp4Tensor(packed * 2, made.sf, made.alpha / 2)  # codes 2 -> 4: 1 -> 2
        assert compare(source, twice)["exact"]

    def test_dry_run_knows_from_the_scales_what_is_exact(self, tmp_path):
        packed, e8m0 = random_pair()
        one_pair(tmp_path / "narrow", packed, e8m0)
        e8m0[1][0, 0] = 150
        one_pair(tmp_path / "wide", packed, e8m0)
        assert surely_exact(tmp_path / "narrow") == (2, 2) and surely_exact(tmp_path / "wide") == (0, 2)
        e8m0 = [torch.full_like(e, 253) for e in e8m0]  # alike, and beyond float32
        one_pair(tmp_path / "high", packed, e8m0)
        assert surely_exact(tmp_path / "high") == (0, 2)
        make(tmp_path / "oss", "gpt-oss")
        sure, total = surely_exact(tmp_path / "oss")
        assert sure == total == 2 * 2 * 4  # gate_up and down, 2 layers, 4 experts


class TestRefuses:
    @pytest.mark.parametrize("byte", [253, 254, 255])
    def test_exponents_without_a_value_by_name(self, byte, tmp_path):
        packed, e8m0 = random_pair()
        packed[1][2, 20], e8m0[1][2, 1] = 0x11, byte
        _, up = one_pair(tmp_path / "source", packed, e8m0)
        with pytest.raises(CheckpointError, match=up.replace(".", r"\.")):
            plan_conversion(tmp_path / "source").run(tmp_path / "target")
        with pytest.raises(CheckpointError, match="unfinished"):
            open_checkpoint(tmp_path / "target")

    @pytest.mark.parametrize("form, why", [("modelopt", "no MXFP4"), ("bf16", "nvfp4 quantize")])
    def test_a_source_without_mxfp4(self, form, why, tmp_path):
        make(tmp_path / "source", form)
        with pytest.raises(CheckpointError, match=why):
            plan_conversion(tmp_path / "source")

    @pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.uint8])
    def test_weights_that_are_quantized_in_another_way(self, dtype, tmp_path):
        packed, e8m0 = random_pair()
        more = {"a.o_proj.weight": torch.zeros(8, 64).to(dtype)}
        if dtype == torch.uint8:  # no codes of ours: the reader would have missed their scales
            more = {"a.o_proj.weight_packed": torch.zeros(8, 64, dtype=torch.int32)}
        one_pair(tmp_path / "source", packed, e8m0, **more)
        with pytest.raises(
            CheckpointError, match=r"a\.o_proj\.weight(_packed)? is .*: other quantized weights"
        ):
            plan_conversion(tmp_path / "source")

    def test_to_write_over_anything(self, tmp_path):
        make(tmp_path / "source", "gpt-oss")
        plan = plan_conversion(tmp_path / "source")
        with pytest.raises(CheckpointError, match="same directory"):
            plan.run(tmp_path / "source")
        (tmp_path / "target").mkdir()
        (tmp_path / "target/config.json").write_text("mine")
        with pytest.raises(CheckpointError, match="not empty"):
            plan.run(tmp_path / "target")
        assert (tmp_path / "target/config.json").read_text() == "mine"

    def test_deepseek_v4_in_compressed_tensors_names(self, tmp_path):
        make(tmp_path / "source", "deepseek-v4")
        with pytest.raises(CheckpointError, match="FP8 layers"):
            plan_conversion(tmp_path / "source", "compressed-tensors")

    def test_an_unknown_method_or_target(self, tmp_path):
        make(tmp_path / "source", "gpt-oss")
        with pytest.raises(CheckpointError, match=r"method must be best \|"):
            plan_conversion(tmp_path / "source", method="fastest")
        with pytest.raises(CheckpointError, match=r"modelopt \| compressed-tensors, got gguf"):
            plan_conversion(tmp_path / "source", "gguf")
        shutil.rmtree(tmp_path / "source")
