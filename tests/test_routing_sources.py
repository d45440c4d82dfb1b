"""route and permute on the CPU from csrc/kernels/cuda's own sources: the reference's bits. And mistakes in
them, all of which must be caught."""

import ctypes
import math
import re
from itertools import product

import pytest
import torch
from compare import assert_same_bits
from simt import ROOT, build, in_namespace, run_with, with_mistake
from test_moe import awkward_logits, tied_logits

from nvfp4_moe import reference

SCORES = ("softmax", "sigmoid", "sqrt_softplus")
INF = torch.inf
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# name: what the source says, what the mistake says
ROUTE = {
    "ties to the higher expert": ("m < lane ? key - 1 : key", "m > lane ? key - 1 : key"),
    "equals in one place": ("m < lane ? key - 1 : key", "key"),
    "one key too few listed": ("before < p.top_k ? best", "before < p.top_k - 1 ? best"),
    "the last of a list alone": ("m < count; m += 4", "m < count - 1; m += 4"),
    "more than the list holds": ("count <= kListed ? choose_listed", "count <= kListed + 1 ? choose_listed"),
    "place in the list counted from 1": ("((1u << lane) - 1)", "((2u << lane) - 1)"),
    "old keys behind the list": ("if (lane >= count) a.list[lane] = kNever;", ""),
    "NaN chosen from few experts": ("return kNever + 1;", "return kNever;"),
    "ids of choices that ran out": ("(a.listed[lane]) : -1", "(a.listed[lane]) : 0"),
    "weights of choices that ran out": ("id < 0 ? 0.0f : a.scores[id];\n  }", "a.scores[max(id, 0)];\n  }"),
    "a float16 for a bfloat16": ("p.dtype == Real::bf16 ?", "p.dtype != Real::bf16 ?"),
    "experts beyond the last one": (": 0x7fff7fffu", ": 0"),
    "sums of a softmax in another order": ("half = 16; half; half /= 2", "half = 1; half < 32; half *= 2"),
    "NaN in the sum": ("is_nan(term) ? 0.0f : term", "term"),
    "a bias that weighs": ("a.scores[lane + 32 * i] = x[i];", "a.scores[lane + 32 * i] = x[i] + bias[i];"),
    "the second best of a group left out": ("value_of(first) + value_of(second)", "value_of(first)"),
    "one losing group too few": ("before >= p.topk_group", "before > p.topk_group"),
    "equal groups in one place": ("a.groups[h] == a.groups[g] && h < g", "false"),
    "a group that is no number last": ("is_nan(sum) ? kAll", "is_nan(sum) ? kNever"),
    "a team's lanes not compared": ("take(other);", ""),
    "keys beyond the group": ("at < width ? at : at - width", "at"),
    "a choice made twice in turn": ("& (at > last_e)", "& (at >= last_e)"),
    "ties in turn to the higher": ("_min_sync(kAll, mine.key == best ? static_cast<uint32_t>(mine.e) : kAll)",
                                   "_max_sync(kAll, mine.key == best ? static_cast<uint32_t>(mine.e) : 0u)"),
    "32 choices in turn": ("first < p.top_k; first += 32", "first < 32; first += 32"),
    "a token too many": ("if (a.t >= p.T) return;", ""),
    "a CTA's last experts": ("from - lane < a.E;", "from - lane < a.E - 128;"),
}  # fmt: skip
BARRIERS = {  # of a warp or a CTA, left out, and what stands behind
    "best of the lanes read before it is written": ("warp", "const int before = greater"),
    "list read before it is written": ("warp", "return count;"),
    "weights added before they are there": ("warp", "float total = 0.0f;\n#"),
    "groups compared before they are scored": ("warp", "for (int g = lane >> shift"),
    "a CTA's scores before they are there": ("threads", "if (threadIdx.x >= 32)"),
}
PERMUTE = {
    "a mark before itself": ("((1u << threadIdx.x % 32) - 1)", "((2u << threadIdx.x % 32) - 1)"),
    "warps before left out": ("w < warp; ++w) place", "w < 0; ++w) place"),
    "one bit for a warp": ("1 << threadIdx.x % 32);", "1);"),
    "tiles before left out": ("starts[e] = start + before;", "starts[e] = start;"),
    "own tile among those before": ("tile < blockIdx.x ?", "tile <= blockIdx.x ?"),
    "marks of the last window kept": ("      clear();\n    }", "    }"),
    "marks for 64": ("plan.part == 32 ?", "plan.part <= 64 ?"),
    "the first window alone": ("return expert >= first &&", "return first == 0 && expert >= 0 &&"),
    "experts counted from the first of all": ("p.ids[i] - p.first_expert", "p.ids[i]"),
    "foreign choices keep their slots": ("} else if (i >= 0 && expert < 0) {", "} else if (false) {"),
    "rows behind the last one left": ("p.rows[i] = 0;", ";"),
    "a place for all equals": ("starts[e] + counts[e] + rank", "starts[e] + counts[e]"),
    "equals of the warp not counted on": ("counts[e] += __popc(equals)", "counts[e] += 1"),
    "warps that start alike": ("counts[(w + i) * width + e] = mine;", "counts[(w + i) * width + e] = 0;"),
    "a scan without what is before": ("(kAll, lane < warp ? of_warp : 0)", "(kAll, 0)"),
    "the next chunk on the last one": ("sorted + all + scan", "sorted + scan"),
    "the next window on the last one": ("sorted + all + scan", "all + scan"),
}  # fmt: skip
BARRIERS_OF_PERMUTE = {
    "marks while others still clear": ("threads", "if constexpr (kMarks)\n      own.mark"),
    "sums of what others still mark": ("threads", "sorted += place_window"),
    "places while others still add": ("threads", "if constexpr (kMarks)\n      own.scatter"),
    "cleared while others still place": ("threads", "clear();\n    }"),
    "a warp's sum before it is there": ("threads", "const int of_warp"),
    "a warp's sum while others still read": ("threads", "int mine = 0, before = 0;"),
    "counts while others still place": ("warp", "if (here && rank == 0)"),
}


def mistakes_in(file: str, said: dict, barriers: dict) -> dict:
    """Those, and `barriers`: one that is gone from before what stands behind it."""
    text = (ROOT / "csrc/kernels/cuda" / file).read_text()
    gone = {}
    for name, (kind, after) in barriers.items():
        found = re.findall(rf"(?:if \(from\) )?__sync{kind}\(\);\s*{re.escape(after)}", text)
        assert len(found) == 1, f"{name}: the source has changed, say it anew"
        gone[name] = found[0], after
    return said | gone


MISTAKES = {
    "route": mistakes_in("route.cu", ROUTE, BARRIERS),
    "permute": mistakes_in("permute.cu", PERMUTE, BARRIERS_OF_PERMUTE),
}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    def source(kernel):
        text = (ROOT / f"csrc/kernels/cuda/{kernel}.cu").read_text()
        driver = (ROOT / f"tests/cpp/{kernel}.cpp").read_text()
        return lambda name, mistake: in_namespace(name, with_mistake(text, mistake) + driver, "cuda")

    return {
        kernel: build(
            tmp_path_factory.mktemp(kernel), ['"tests/cpp/small_kernels.h"'], source(kernel), mistakes
        )
        for kernel, mistakes in MISTAKES.items()
    }


def address(x):
    return None if x is None else ctypes.c_void_p(x.data_ptr())


def results(run, *args, shapes, dtypes):
    """What run leaves. Behind every result is memory, -7 wherever a mistake does not write."""
    sizes = [math.prod(shape) for shape in shapes]
    memory = [torch.full((4 * n + 4096,), -7, dtype=t) for n, t in zip(sizes, dtypes, strict=True)]
    run(*args, *map(address, memory))
    assert all((all_of[n:] == -7).all() for n, all_of in zip(sizes, memory, strict=True))
    return tuple(all_of[:n].view(shape) for n, all_of, shape in zip(sizes, memory, shapes, strict=True))


def numbers(*sizes):
    return (ctypes.c_int * len(sizes))(*sizes)


# ---- route ------------------------------------------------------------------------------------------------

# E, top_k, score, n_group, topk_group, dtype, with a bias
ROUTINGS = [
    (256, 8, "sigmoid", 8, 4, torch.float32, True),
    (384, 6, "sqrt_softplus", 1, 1, torch.bfloat16, False),
    (33, 3, "softmax", 1, 1, torch.float16, True),
    (8, 2, "softmax", 1, 1, torch.float32, False),
    (5, 5, "sigmoid", 5, 2, torch.float32, False),
    (96, 35, "softmax", 12, 7, torch.float32, True),
    (600, 9, "softmax", 1, 1, torch.bfloat16, False),
    (800, 6, "sigmoid", 20, 5, torch.float32, True),
]


def check_route(run, logits, k, score="softmax", n_group=1, topk_group=1, bias=None):
    """On a card of one multiprocessor, where a CTA has four tokens, and on one with room for all, where
    threads run backwards."""
    (T, E), dtype = logits.shape, DTYPES.index(logits.dtype)
    logits = torch.cat([logits, logits])[:T]  # a token too many finds one
    for multiprocessors, renormalize, backwards in ((1, True, False), (T, False, True)):
        want = reference.route(logits, bias, k, score, n_group, topk_group, renormalize, 2.5)
        sizes = dtype, T, E, k, n_group, topk_group, SCORES.index(score), renormalize
        args = address(logits), address(bias), numbers(*sizes, multiprocessors, backwards)
        got = results(run, *args, shapes=[(T, k)] * 2, dtypes=[torch.float32, torch.int32])
        assert_same_bits(got, want)


def check_routings(run):
    torch.manual_seed(0)
    for E, k, score, n_group, topk_group, dtype, biased in ROUTINGS:
        bias = torch.randn(E) if biased else None
        check_route(run, awkward_logits(11, E, dtype), k, score, n_group, topk_group, bias)
    for E, k in ((32, 16), (33, 1), (384, 6), (384, 16), (384, 17)):
        check_route(run, tied_logits(E), k)
    infinite = torch.zeros(12)  # inf and -inf in one group make its score a NaN
    infinite[0], infinite[1], infinite[4:6], infinite[8] = INF, -INF, INF, -INF
    check_route(run, torch.zeros(3, 12), 6, "sigmoid", 6, 2, infinite)


# ---- permute ----------------------------------------------------------------------------------------------

# T, k, E, the first expert
CHOICES = [
    (64, 6, 384, 0),
    (40, 3, 3000, 10),  # two windows of experts, and more of them than threads
    (300, 3, 2100, -5),  # more than 32 choices a warp
    (550, 2, 7, 0),
    (700, 3, 20, 4),  # five tiles
    (3000, 1, 700, 0),  # and more than 32 choices a warp
    (3, 2, 0, 0),
    (0, 2, 5, 0),
    (4, 0, 5, 0),
    (33000, 1, 5, 0),  # 65 tiles
]


def check_permutes(run):
    torch.manual_seed(0)
    for (T, k, E, first), backwards in product(CHOICES, (False, True)):
        ids = torch.randint(first - 2, first + E + 2, (T, k), dtype=torch.int32)
        shapes = (T * k,), (E + 1,), (T, k)
        got = results(
            run, address(ids), numbers(T, k, E, first, backwards), shapes=shapes, dtypes=[torch.int32] * 3
        )
        assert_same_bits(got, reference.permute(ids, E, first))


CHECKS = {"route": check_routings, "permute": check_permutes}


@pytest.mark.parametrize("kernel", CHECKS)
def test_the_source_gives_the_references_bits(libraries, kernel):
    CHECKS[kernel](libraries[kernel].run_as_it_is)


@pytest.mark.parametrize("kernel, mistake", [(k, m) for k, of in MISTAKES.items() for m in of])
def test_a_mistake_is_caught(libraries, kernel, mistake):
    run = run_with(libraries[kernel], MISTAKES[kernel], mistake)
    with pytest.raises(AssertionError):
        CHECKS[kernel](run)
