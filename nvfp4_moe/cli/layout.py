"""nvfp4 layout: where a block scale lies in the interleaved layout that tensor cores read."""

from ..formats import ATOM, ATOM_COLS, ATOM_ROWS, BLOCK, sf_coord, sf_cosize, sf_offset
from .common import add_command

EXAMPLES = """\
  nvfp4 layout 300 28                   sizes and a map of the first atom
  nvfp4 layout 300 28 --at 129 5        the byte of row 129, column 5
  nvfp4 layout 300 28 --byte 4096       the row and column of a byte
"""


def add_layout(commands) -> None:
    parser = add_command(commands, "layout", run, "the interleaved layout of block scales", EXAMPLES)
    parser.add_argument("rows", type=int, help="rows of the weight")
    parser.add_argument("cols", type=int, help=f"scales in a row: K / {BLOCK}")
    parser.add_argument("--at", type=int, nargs=2, metavar=("ROW", "COL"))
    parser.add_argument("--byte", type=int)


def run(args) -> int:
    rows, cols = args.rows, args.cols
    if rows < 1 or cols < 1:
        raise SystemExit("nvfp4 layout: rows and cols must be positive")
    cosize = sf_cosize(rows, cols)
    print(f"scales [{rows}, {cols}] of a weight [{rows}, {cols * BLOCK}]")
    print(f"size {rows * cols} bytes, cosize {cosize}: {cosize // ATOM} atoms of {ATOM_ROWS} x {ATOM_COLS}")
    if args.at:
        row, col = args.at
        if not (0 <= row < rows and 0 <= col < cols):
            raise SystemExit(f"nvfp4 layout: no scale at {row}, {col}")
        print(f"row {row}, column {col}: byte {sf_offset(row, col, cols)} (linear: {row * cols + col})")
    elif args.byte is not None:
        if not 0 <= args.byte < cosize:
            raise SystemExit(f"nvfp4 layout: no byte {args.byte}")
        row, col = sf_coord(args.byte, cols)
        padding = "" if row < rows and col < cols else ": padding, always 0"
        print(f"byte {args.byte}: row {row}, column {col}{padding}")
    else:
        _draw(rows, cols)
        print(_cutlass(rows, cols))
    return 0


def _draw(rows: int, cols: int) -> None:
    """The first atom, 32 lines of 16 bytes; `.` is padding."""
    print("first atom: bytes 0 .. 511 as 32 lines of 16, each row:column")
    for line in (0, 1, 2, None, 31):
        if line is None:
            print("  ..")
            continue
        cells = []
        for byte in range(16 * line, 16 * line + 16):
            row, col = sf_coord(byte, cols)
            cells.append(f"{row}:{col}" if row < rows and col < cols else ".")
        print(f"  {16 * line:>3}  " + " ".join(f"{c:>5}" for c in cells))


def _cutlass(rows: int, cols: int) -> str:
    """Our formula beside CuTe's own layout, where its module is built."""
    try:
        from nvfp4_moe import _cute
    except ImportError:
        return "CUTLASS's layouts are not built here (nvfp4_moe._cute): not compared"
    theirs = _cute.sfb(rows, cols * BLOCK)
    ours = [sf_offset(r, c, cols) for r in range(rows) for c in range(cols)]
    same = theirs["offsets"] == ours and theirs["cosize"] == sf_cosize(rows, cols)
    return "CUTLASS's tile_atom_to_shape_SFB: " + ("the same bytes" if same else "DIFFERS")
