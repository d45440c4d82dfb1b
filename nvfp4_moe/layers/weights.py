"""What layers hold weights in: buffers in the public layout or, after pack_(), in Hopper's own order."""

import torch
from torch import Tensor, nn

from .. import ops
from ..formats import BLOCK, PACKED_ROWS, sf_cosize
from ..tensor import Nvfp4Tensor


def pad_k(K: int) -> int:
    """GPU GEMMs want K % 32 = 0: 16-byte rows for the copy engine."""
    return -(-K // 32) * 32


def pad_n(N: int) -> int:
    return -(-N // 8) * 8


class Nvfp4Weights(nn.Module):
    """Weights as buffers {name} [.., N, K/2], {name}_sf [.., cosize] and {name}_alpha; packed: {name}
    [.., bytes] and an empty {name}_sf. state_dict() is the public layout either way."""

    def __init__(self):
        super().__init__()
        self.weight_shapes: dict[str, tuple[tuple[int, ...], int, int]] = {}  # name: leading shape, N, K

    def hold(self, name: str, lead: tuple[int, ...], N: int, K: int, alphas: tuple[int, ...], device) -> None:
        """Register the buffers of one tensor, all zero."""
        self.weight_shapes[name] = lead, N, K
        self.register_buffer(name, torch.zeros(*lead, N, K // 2, dtype=torch.uint8, device=device))
        sf = torch.zeros(*lead, sf_cosize(N, K // BLOCK), dtype=torch.uint8, device=device)
        self.register_buffer(f"{name}_sf", sf.view(torch.float8_e4m3fn))
        self.register_buffer(f"{name}_alpha", torch.zeros((*lead, *alphas), device=device))

    def put(self, name: str, weight: Nvfp4Tensor, index=...) -> None:
        """Copy codes and scales, padded to N and K, over those held; `index` is the expert."""
        b, sf = weight.packed, weight.interleaved_sf()
        if self._is_packed(name):
            getattr(self, name)[index].copy_(ops.pack_sm90(b, sf))
        else:
            getattr(self, name)[index].copy_(b)
            getattr(self, f"{name}_sf")[index].copy_(sf)

    def _is_packed(self, name: str) -> bool:
        return getattr(self, name).dim() == len(self.weight_shapes[name][0]) + 1

    @property
    def packed(self) -> bool:
        return any(map(self._is_packed, self.weight_shapes))

    @property
    def order(self) -> str:
        """For extra_repr."""
        return ", packed" if self.packed else ""

    def pack_(self):
        """Swap the weights for the order in which Hopper's kernels decode them (ops.pack_sm90), which only a
        Hopper GPU runs. One tensor after another: the most that is held twice is one of them. Call it before
        a CUDA graph is captured; loading weights into a packed layer packs them."""
        for name, (_, N, _) in self.weight_shapes.items():
            if N % PACKED_ROWS:
                layer = type(self).__name__
                raise ValueError(
                    f"{layer}.pack_: `{name}` must have a multiple of {PACKED_ROWS} rows, got {N}"
                )
        for name in self.weight_shapes:
            if not self._is_packed(name):
                sf = getattr(self, f"{name}_sf")
                setattr(self, name, ops.pack_sm90(getattr(self, name), sf))
                setattr(self, f"{name}_sf", sf.new_empty(0))
        return self

    def unpack_(self):
        """The public layout again, bit for bit."""
        for name in self.weight_shapes:
            if self._is_packed(name):
                b, sf = self._unpacked(name)
                setattr(self, name, b)
                setattr(self, f"{name}_sf", sf)
        return self

    def _unpacked(self, name: str) -> tuple[Tensor, Tensor]:
        return ops.unpack_sm90(getattr(self, name), self.weight_shapes[name][2])

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in filter(self._is_packed, self.weight_shapes):
            destination[prefix + name], destination[f"{prefix}{name}_sf"] = self._unpacked(name)

    def _load_from_state_dict(self, *args, **kwargs):
        packed = self.packed
        self.unpack_()
        super()._load_from_state_dict(*args, **kwargs)
        if packed:
            self.pack_()
