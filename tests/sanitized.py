"""Every operator on the GPU, for compute-sanitizer: small, ragged, with ids and offsets that lie.

compute-sanitizer --tool memcheck python3 tests/sanitized.py
"""

import torch
from cases import lively, ragged_offsets, random_weights
from test_ops import NAMES, sample_calls

from nvfp4_moe import ops

# Rows an expert, E, N, K: every tile of Hopper's table (test_sm90.py); in the last size CTAs share tiles.
TILES = [
    (rows, *size)
    for rows in (1, 6, 12, 20, 28, 50, 60, 100, 140)
    for size in ((2, 264, 96), (96, 1536, 32), (24, 1536, 544))
    if rows == 1 or size[0] != 96
]
# T, k, E, H, I: 128x8 alone, wider tiles, and 256x8 whose CTAs share tiles of both products.
LAYERS = [(T, 3, 4, 128, 128) for T in (1, 20, 90)] + [(20, 4, 24, 1600, 1536)]


def main() -> None:
    torch.manual_seed(0)
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for name in NAMES:
        getattr(torch.ops.nvfp4, name)(*sample_calls("cuda")[name])
    for R, N, K, E in ((1, 1, 16, 1), (9, 130, 1040, 4), (3, 24, 64, 40), (0, 8, 32, 2)):
        w, a = random_weights(E, N, K), lively(R, K, dtype=torch.bfloat16)
        for offsets in (ragged_offsets(R, E), torch.randint(-9, 99, (E + 1,), dtype=torch.int32)):
            operands = (a, None, None, w.b, w.b_sf, w.alpha, offsets)
            ops.grouped_gemm(*(t if t is None else t.cuda() for t in operands))
    for rows, E, N, K in TILES:
        w, a = random_weights(E, N, K, 2), lively(rows * E, K, dtype=torch.bfloat16).cuda()
        layouts = [(w.b.cuda(), w.b_sf.cuda())]
        if N % 64 == 0 and hopper:
            layouts.append((ops.pack_sm90(*layouts[0]), layouts[0][1][:0].flatten()))
        for offsets in (ragged_offsets(rows * E, E), torch.randint(-9, 99, (E + 1,), dtype=torch.int32)):
            for b, b_sf in layouts:
                ops.grouped_gemm(
                    a, None, None, b, b_sf, w.alpha.cuda(), offsets.cuda(), torch.randn(E, N, device="cuda")
                )
    for T, k, E, H, I in LAYERS:  # and the activation fused into them
        w13, w2, ids = (
            random_weights(E, 2 * I, H, 2),
            random_weights(E, H, I),
            torch.randint(-1, E + 1, (T, k)),
        )
        tokens = (lively(T, H, dtype=torch.bfloat16).cuda(), ids.int().cuda(), torch.rand(T, k).cuda())
        layouts = [[(w.b.cuda(), w.b_sf.cuda(), w.alpha.cuda()) for w in (w13, w2)]]
        if hopper:
            layouts.append([(ops.pack_sm90(b, sf), sf[:0].flatten(), alpha) for b, sf, alpha in layouts[0]])
        for first, second in layouts:
            for compute in ops.COMPUTES:
                ops.moe(*tokens, *first, *second, 0, compute)
    for T, E, k in ((1, 8, 2), (70, 256, 8), (3000, 384, 6)):
        weights, ids = ops.route(torch.randn(T, E, device="cuda"), None, k)
        rows, offsets, slots = ops.permute(ids, E // 2, E // 4)
        ops.permute(torch.randint(-(2**31), 2**31 - 1, (T, k), dtype=torch.int32, device="cuda"), E, 0)
        y = torch.randn(T * k, 48, device="cuda").bfloat16()
        ops.combine(y, slots * 3, weights)
        ops.quantize_rows(y, rows - 5)
    for method in ops.MXFP4_METHODS:
        packed = torch.randint(0, 256, (2, 40, 64), dtype=torch.uint8, device="cuda")
        ops.mxfp4_to_nvfp4(
            packed, torch.randint(0, 256, (2, 40, 4), dtype=torch.uint8, device="cuda"), method
        )
    torch.cuda.synchronize()
    print("ran")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
