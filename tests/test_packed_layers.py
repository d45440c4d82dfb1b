"""pack_() and unpack_(): in place, reversible, and invisible in state_dict."""

import copy

import pytest
import torch
from compare import REFUSED, assert_same_bits
from torch import nn

from nvfp4_moe import Nvfp4GroupedLinear, Nvfp4Linear, Nvfp4MoE, Nvfp4Tensor, Router


def layers() -> dict[str, tuple]:
    """A layer that packs, a twin with other weights, and what its load_weights takes."""
    q = Nvfp4Tensor.quantize
    linear = lambda: Nvfp4Linear.from_float(nn.Linear(100, 60), nn.Linear(100, 68))  # noqa: E731
    grouped = lambda: Nvfp4GroupedLinear.from_float(torch.randn(3, 64, 50), 3)  # noqa: E731
    moe = lambda: Nvfp4MoE(Router(128, 4, 2), 4, 128, 80).load_weights(  # noqa: E731
        *(q(torch.randn(4, 80, 128)) for _ in range(2)), q(torch.randn(4, 128, 80))
    )
    return {
        "linear": (linear(), linear(), [q(torch.randn(n, 100)) for n in (60, 68)]),
        "grouped": (grouped(), grouped(), [q(torch.randn(3, 64, 50))]),
        "moe": (moe(), moe(), [*(q(torch.randn(4, 80, 128)) for _ in range(2)), q(torch.randn(4, 128, 80))]),
    }


def state(layer) -> dict:
    return {name: t.clone() for name, t in layer.state_dict().items()}


def assert_same_state(layer, want: dict, what: str = "") -> None:
    got = layer.state_dict()
    assert list(got) == list(want), what
    for name in want:
        assert_same_bits(got[name], want[name].cpu(), f"{what} {name}")


@pytest.mark.parametrize("name", layers())
class TestLayers:
    def test_packing_is_in_place_and_reversible(self, name, device):
        layer = layers()[name][0].to(device)
        want = state(layer)
        assert not layer.packed and layer.pack_() is layer and layer.packed
        first = next(iter(layer.weight_shapes))
        assert getattr(layer, f"{first}_sf").numel() == 0 and ", packed" in repr(layer)
        assert_same_state(layer, want, "packed")
        assert_same_state(copy.deepcopy(layer.pack_()), want, "packed twice, copied")
        assert_same_state(layer.unpack_().unpack_(), want, "unpacked")
        assert not layer.packed and all(torch.equal(b, want[n]) for n, b in layer.named_buffers()
                                        if b.element_size() > 1)  # fmt: skip

    def test_a_packed_layer_loads_what_an_unpacked_one_saved_and_the_other_way_round(self, name, device):
        layer, twin, _ = layers()[name]
        layer, twin = layer.to(device).pack_(), twin.to(device)
        want, others = state(layer), state(twin)
        layer.load_state_dict(others)
        assert layer.packed
        assert_same_state(layer, others, "loaded into packed")
        twin.load_state_dict(want)
        assert_same_state(twin, want, "saved from packed")

    def test_new_weights_go_into_a_packed_layer_packed(self, name, device):
        layer, twin, weights = layers()[name]
        weights = [w.to(device) for w in weights]
        layer, twin = (m.to(device).load_state_dict(twin.state_dict()) and m for m in (layer, twin))
        layer.pack_().load_weights(*weights)
        assert layer.packed
        assert_same_state(layer, state(twin.load_weights(*weights)))

    def test_on_the_cpu_a_packed_layer_says_what_to_do(self, name):
        layer = layers()[name][0].pack_()
        shape = {"linear": (5, 100), "grouped": (5, 3, 50), "moe": (5, 128)}[name]
        x = torch.randn(shape).bfloat16()
        with pytest.raises(REFUSED, match="is packed for sm90, got it on the CPU; unpack_sm90 gives"):
            layer(x)
        assert layer.unpack_()(x).shape[0] == 5


def test_a_layer_whose_rows_are_no_multiple_of_64_stays_as_it_was():
    layer = Nvfp4MoE(Router(96, 4, 2), 4, 96, 64)
    with pytest.raises(ValueError, match=r"Nvfp4MoE\.pack_: `w2` must have a multiple of 64 rows, got 96"):
        layer.pack_()
    assert not layer.packed


def test_weights_arrive_in_a_packed_layer_on_meta():
    layer, real = (Nvfp4MoE(Router(128, 4, 2, device=d), 4, 128, 64, device=d) for d in ("meta", "cpu"))
    real.load_weights(*(Nvfp4Tensor.quantize(torch.randn(4, *s)) for s in ((64, 128), (64, 128), (128, 64))))
    layer.pack_().load_state_dict(real.state_dict(), assign=True)
    assert layer.packed and layer.w13.device.type == "cpu"
    assert_same_state(layer, state(real))
