"""The demo learns, survives quantization, and each planted bug shows."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
pytest.importorskip("rich")

import capitals
import demo
from tiny_moe import batch, generate

from nvfp4_moe import Nvfp4MoE
from nvfp4_moe.formats import MX_BLOCK, e2m1_decode, e8m0_decode, unpack

TRAINING, HELD_OUT = capitals.sentences()
TOKENIZER = capitals.Tokenizer(TRAINING + HELD_OUT)
FEW = TRAINING[:42]  # half a dozen countries, learnt in seconds
PROMPTS = ("The capital of France is", "On the map of Spain")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(one_thread):
    return demo.train_model(TOKENIZER, FEW, steps=400)


@pytest.fixture(scope="module")
def rows(trained):
    with torch.inference_mode():
        exam = demo.Exam(trained[0], TOKENIZER, FEW, held_out=FEW)
        models, bugs = demo.compare(trained[0], exam)
    return models, bugs


def quantized(model, compute):
    return demo.with_experts(model, lambda moe: Nvfp4MoE.from_float(moe, compute=compute))


def test_every_sentence_survives_tokenization():
    for sentence in TRAINING + HELD_OUT:
        assert TOKENIZER.decode(TOKENIZER.encode(sentence)) == " " + sentence


def test_held_out_facts_are_trained_in_other_words():
    assert not set(TRAINING) & set(HELD_OUT)
    for country, capital, _ in capitals.countries():
        told = [s for s in TRAINING if country in s and capital in s]
        assert len(told) >= len(capitals.TEMPLATES) - 1


def test_training_lowers_the_loss(trained):
    losses = trained[1]
    assert sum(losses[-20:]) < 0.1 * sum(losses[:20])


@pytest.mark.parametrize("compute", ["bf16", "nvfp4"])
def test_quantized_model_says_what_the_bf16_model_says(trained, compute):
    model = trained[0]
    nvfp4 = quantized(model, compute)
    ids, _ = batch([TOKENIZER.encode(s) for s in FEW])
    with torch.inference_mode():
        # a tenth for each layer's experts, and what the residual stream carries past them is exact
        assert demo.rms_error(nvfp4(ids), model(ids)) < 0.15
    for prompt in PROMPTS:
        tokens = TOKENIZER.encode(prompt)
        assert generate(nvfp4, tokens) == generate(model, tokens)


def test_mxfp4_copy_becomes_nvfp4_without_loss():
    w = torch.randn(2, 8, 96)
    packed, e8m0 = demo.to_mxfp4(w)
    values = e2m1_decode(unpack(packed)) * e8m0_decode(e8m0).repeat_interleave(MX_BLOCK, -1)
    assert torch.equal(demo.through_mxfp4(w).dequantize(), values)
    assert not torch.equal(demo.requantized(w).dequantize(), values)


def test_nvfp4_holds_the_experts_in_a_third_of_the_bytes(rows):
    bf16, weights_only, *_ = rows[0]
    assert weights_only["expert_bytes"] < bf16["expert_bytes"] / 3


def test_each_bug_shows(rows):
    (_, _, nvfp4, mxfp4), (folded, size, stale, requantized) = rows
    for bug in (folded, size, stale):
        assert bug["perplexity"] > nvfp4["perplexity"]
        assert min(bug["layer_errors"]) > 3 * max(nvfp4["layer_errors"])
    assert stale["weights"]["changed"] == 0
    assert requantized["weights"]["changed"] > 0.3
    assert min(requantized["layer_errors"]) > max(mxfp4["layer_errors"])


def test_static_scales_are_fine_while_they_fit(trained, monkeypatch):
    monkeypatch.setattr(demo, "STALE", 1)
    model = trained[0]
    ids, _ = batch([TOKENIZER.encode(s) for s in FEW])
    with torch.inference_mode():
        fixed = demo.with_experts(model, demo.StaleScales.from_float)
        assert demo.rms_error(fixed(ids), model(ids)) < 0.15


def test_demo_prints_its_table_and_writes_it(tmp_path, capsys):
    demo.main(["--steps", "2", "--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    printed = capsys.readouterr().out
    assert len(report["models"]) == len(report["bugs"]) == 4
    assert all(f"bug {i}" in printed for i in (1, 2, 3, 4))
