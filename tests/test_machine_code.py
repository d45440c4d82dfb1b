"""The machine code of all libraries: for exactly the architectures claimed, nothing in local memory, with the
instructions that the tile table promises."""

import re
import sys
from pathlib import Path

import pytest
from machine_code import dump, kernels, tools

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CHIPS = pytest.importorskip("setup", reason="not a checkout").CHIPS

LIBRARIES = sorted((ROOT / "nvfp4_moe").glob("libnvfp4*.so"))  # the core, and one for each chip built
BLOCKS_OF_16 = {"sm_100a": ".4X", "sm_103a": ".BLOCK16"}  # how nvdisasm calls a scale for 16 values


pytestmark = pytest.mark.skipif(tools() is None, reason="no cuobjdump and nvdisasm")


@pytest.fixture(params=LIBRARIES, ids=lambda p: p.stem)
def library(request):
    return request.param


def blackwell(chip: str = "sm100") -> Path:
    library = ROOT / f"nvfp4_moe/libnvfp4_{chip}.so"
    if not library.exists():
        pytest.skip(f"built without {chip}")
    return library


def test_there_is_code_for_the_architectures_claimed_and_nothing_to_be_compiled_later(library):
    found = set(re.findall(r"\.(sm_\w+)\.cubin", dump(library, "-lelf")))
    if library.stem == "libnvfp4":
        assert found <= {f"sm_{core}" for core, _ in CHIPS.values()}
    else:
        assert found == {f"sm_{a}" for a in CHIPS[library.stem.removeprefix("libnvfp4_")][1]}
    assert "ptx" not in dump(library, "-lptx")


def test_no_kernel_keeps_values_in_local_memory(library):
    usage = re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
                       dump(library, "--dump-resource-usage"))  # fmt: skip
    if library.stem == "libnvfp4" and not usage:
        pytest.skip("built for the CPU alone")
    assert usage
    for name, registers, stack, _, local in usage:
        assert int(local) == 0 and int(stack) == 0 and int(registers) <= 255, name


def mma_kernels() -> dict[tuple[str, int, int, bool], str]:
    """(architecture, rows of weights, tokens, are these multicast) -> SASS of the tile's kernel."""
    found = {}
    for (arch, name), code in kernels(blackwell()).items():
        if m := re.search(r"SM100_MMA_MXF4\w*?E?Li(\d+)ELi(\d+)ELi16E", name):
            shared = "UTMALDG.2D.MULTICAST" in code  # codes; scales of a pair's tokens always do
            found[arch, int(m[1]), int(m[2]), shared] = code
    return found


def test_every_tile_multiplies_with_the_block_scaled_instruction():
    tiles = {(128, 64, False), (128, 128, False), (128, 256, False), (256, 256, False), (256, 256, True)}
    found = mma_kernels()
    assert set(found) == {(f"sm_{a}", *tile) for a in CHIPS["sm100"][1] for tile in tiles}
    for (arch, rows, tokens, shared), code in found.items():
        wanted = "UTCOMMA" + (".2CTA" if rows == 256 else "") + BLOCKS_OF_16[arch]
        mma = set(re.findall(r"UTCOMMA\S*", code))
        assert mma == {wanted}, (arch, rows, tokens, shared, mma)
        assert "UTCCP" in code and "LDTM" in code and "UTMALDG" in code and "UTMASTG" in code
        for slow in ("HMMA", "FFMA", "LDL", "STL"):
            assert not re.search(rf"\b{slow}\b", code), (arch, rows, tokens, shared, slow)


def test_a_launch_of_every_tile_fits_its_registers():
    """256 threads of a CTA share 65,536 registers."""
    for name, registers in re.findall(
        r"Function (\S+):\s*\n\s*REG:(\d+)", dump(blackwell(), "--dump-resource-usage")
    ):
        assert int(registers) * 256 <= 65536, name


def test_every_tile_of_sm120_multiplies_with_the_block_scaled_instruction():
    """A warp's products of a stage, 256 values of K: 16 rows x 8 tokens x 64 each."""
    products = {32: 1 * 4 * 4, 64: 2 * 4 * 4, 128: 2 * 8 * 4}
    found = {}
    for (arch, name), code in kernels(blackwell("sm120")).items():
        if m := re.search(r"block_scaled_gemmILi(\d+)E", name):
            found[arch, int(m[1])] = code
    assert set(found) == {(f"sm_{a}", tokens) for a in CHIPS["sm120"][1] for tokens in products}
    for (arch, tokens), code in found.items():
        mma = re.findall(r"\b\w*MMA\S*", code)
        assert set(mma) == {"OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X"}, (arch, tokens, set(mma))
        assert len(mma) == products[tokens], (arch, tokens)
        for fast in ("LDGSTS.E.BYPASS.128", "LDSM.16.M88.4", "STSM.16.MT88"):
            assert fast in code, (arch, tokens, fast)
        for slow in ("FFMA", "LDL", "STL"):
            assert not re.search(rf"\b{slow}\b", code), (arch, tokens, slow)


def test_a_launch_of_every_tile_of_sm120_fits_registers_and_shared_memory():
    usage = dump(blackwell("sm120"), "--dump-resource-usage")
    registers = re.findall(r"Function \S*block_scaled_gemm\S*:\s*\n\s*REG:(\d+)", usage)
    assert len(registers) == 3 * len(CHIPS["sm120"][1])
    assert all(int(n) * 256 <= 65536 for n in registers)


def test_two_of_the_widest_ctas_of_quantize_rows_fit_a_multiprocessor():
    """448 threads each, so 72 registers a thread: with one CTA an H200 copies at 65 % (16384 x 28672)."""
    core = ROOT / "nvfp4_moe/libnvfp4.so"
    usage = dump(core, "--dump-resource-usage", "--gpu-architecture", "sm_90")
    found = re.findall(
        r"Function \S*quantize_rows_kernelILi4E\S*GatheredRowsINS_4bf16\S*:\s*\n\s*REG:(\d+)", usage
    )
    if not found:
        pytest.skip("built without sm90")
    assert all(int(registers) <= 72 for registers in found)
