"""Everything CUTLASS's grouped launch reads on Blackwell, through the shadow executor: the same arrays,
scalar loops. Proves all but NVIDIA's main loop, on the CPU."""

import struct
from itertools import pairwise

import pytest
import torch
from cases import lively, ragged_offsets, random_weights
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gemm import check_groups

from nvfp4_moe import formats, reference

cute = pytest.importorskip("nvfp4_moe._cute", reason="the CuTe probe is built where nvcc and CUTLASS are")


class Product:
    """A grouped product, set up as for CUTLASS; `set_up` holds the arrays, `run` multiplies."""

    def __init__(self, R, N, K, E, alphas=1, bias=False, per_row=True, offsets=None):
        self.w, x = random_weights(E, N, K, alphas), lively(R, K)
        self.offsets = ragged_offsets(R, E) if offsets is None else torch.tensor(offsets, dtype=torch.int32)
        if per_row:
            self.a = reference.quantize_rows(x)
        else:
            scale = reference.tensor_scale(x)
            self.a = (*reference.quantize(x, scale), scale)
        self.bias = torch.randn(E, N) * 0.1 if bias else None
        self.b_sf = self.w.b_sf
        self.out = torch.zeros(R, N, dtype=torch.bfloat16)
        at = lambda t: 0 if t is None else t.data_ptr()  # noqa: E731
        self.set_up = cute.Product(
            {
                "a": at(self.a[0]), "a_sf": at(self.a[1]), "a_scale": at(self.a[2]),
                "a_scales": self.a[2].numel(),
                "b": at(self.w.b), "b_sf": at(self.b_sf), "alpha": at(self.w.alpha), "alphas": alphas,
                "bias": at(self.bias), "offsets": at(self.offsets), "out": at(self.out),
                "R": R, "N": N, "K": K, "E": E,
            }
        )  # fmt: skip

    def check(self):
        self.set_up.run()
        values = reference.dequantize(*self.a[:2], torch.ones(()))
        check_groups(self.out, values, self.w, self.offsets, self.a[2], self.bias)


@given(
    R=st.integers(0, 40), N=st.integers(1, 20), K=st.integers(1, 5), E=st.integers(1, 8),
    alphas=st.sampled_from([1, 2]), bias=st.booleans(), per_row=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_the_arrays_describe_the_product(R, N, K, E, alphas, bias, per_row):
    if R == 1:
        per_row = True  # one scale either way
    Product(R, 8 * N, 32 * K, E, alphas, bias, per_row).check()


@pytest.mark.parametrize("R, N, K, E", [(300, 136, 96, 2), (9, 264, 544, 3), (40, 8, 32, 512), (1, 8, 32, 1)])
def test_more_than_an_atom_and_many_experts(R, N, K, E):
    Product(R, N, K, E).check()


@pytest.mark.parametrize(
    "offsets",
    [[0, 3, 2, 8], [-5, 2, 100, 3], [7, 7, 7, 7], [8, 5, 3, 0], [2**31 - 1, -(2**31), 0, 5]],
    ids=str,
)
def test_offsets_that_lie_give_segments_inside_the_buffers(offsets):
    product = Product(8, 16, 64, 3, offsets=offsets)
    begins = struct.unpack("3i", product.set_up.array("begin"))
    rows = [struct.unpack("9i", product.set_up.array("shape"))[3 * e + 1] for e in range(3)]
    ends = [begin + n for begin, n in zip(begins, rows, strict=True)]
    assert all(n >= 0 for n in rows) and ends[-1] <= 8
    assert all(end <= begin for end, begin in zip(ends, begins[1:], strict=False))


def test_the_scales_room_suffices_for_the_worst_offsets():
    for R, E in [(1, 5), (130, 3), (512, 4), (3, 3)]:
        offsets = [min(R, e) for e in range(E)] + [R]  # as many short segments as there can be
        atoms = sum(-(-(b - a) // 128) for a, b in pairwise(offsets))
        assert atoms * formats.sf_cosize(1, 4) <= R // 128 * 512 + min(E, R) * 512
        Product(R, 8, 64, E, offsets=offsets).check()


def words(product, name, code):
    view = product.set_up.array(name)
    return view, list(struct.unpack(f"{len(view) // struct.calcsize(code)}{code}", view))


def put(view, code, values):
    view[:] = struct.pack(f"{len(values)}{code}", *values)


def shift(name, code, where, by):
    """A mutation that moves entries `where` of an array."""

    def mutate(product):
        view, values = words(product, name, code)
        for i in where:
            values[i] += by
        put(view, code, values)

    return mutate


def swap(one, other):
    def mutate(product):
        a, b = product.set_up.array(one), product.set_up.array(other)
        a[:], b[:] = bytes(b), bytes(a)

    return mutate


def unpadded(product):
    """Row scales of every expert right behind the last one's rows, as if cosize were size."""
    view, values = words(product, "tokens_sf", "q")
    rows = words(product, "shape", "i")[1][1::3]
    put(view, "q", [values[0] + sum(rows[:e]) * 4 for e in range(len(values))])


def poisoned_padding(product):
    """What the padding of K holds where nobody writes it, read by a K that is too long."""
    sf = torch.frombuffer(product.set_up.array("sf"), dtype=torch.uint8)
    row, col = formats.sf_coord(torch.arange(len(sf)), product.a[1].shape[1])
    sf[(col >= product.a[1].shape[1]) | (row >= 400)] = 0x7F
    shift("shape", "i", [2, 5, 8], 16)(product)


N, K, E = 144, 96, 3
S = K // 16
MUTATIONS = {
    "weights' scales by size, not cosize": shift("weights_sf", "q", [1, 2], N * S - formats.sf_cosize(N, S)),
    "tokens' scales by size, not cosize": unpadded,
    "scales of weights and tokens swapped": swap("weights_sf", "tokens_sf"),
    "the neighbour's alpha": lambda product: product.set_up.skew_alpha(1),
    "weights a tile too far apart": shift("weights_stride", "q", [0, 1, 2], 256),
    "tokens a tile too far apart": shift("tokens_stride", "q", [1], 256),
    "output rows too far apart": shift("out_stride", "q", [0, 1, 2], -8),
    "no padding behind K": poisoned_padding,
    "the second expert's rows one too far": shift("tokens", "q", [1], K // 2),
    "the second expert's scales one atom too far": shift("tokens_sf", "q", [1], -1024),
    "the second expert's output one row too far": shift("out", "q", [1], 2 * N),
    "row scales of the neighbour": shift("begin", "i", [1], 1),
    "one token too few": shift("shape", "i", [4], -1),
    "a shorter K": shift("shape", "i", [2, 5, 8], -32),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_argument_is_caught(name):
    product = Product(400, N, K, E, offsets=[0, 150, 290, 390])
    MUTATIONS[name](product)
    with pytest.raises(AssertionError):
        product.check()


def test_without_a_mutation_nothing_is_caught():
    Product(400, N, K, E, offsets=[0, 150, 290, 390]).check()
