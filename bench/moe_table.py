"""Text of bench/moe.py's results."""

import math
import re

from cases import Model

DECODE = 64  # tokens up to which the summary counts a point as decode
PEER_COLUMNS = {"humming grouped": 15, "humming indexed": 15, "Marlin": 9, "BF16": 9}


def nvfp4_peers(row: dict) -> dict[str, float]:
    return {n: t["us"] for n, t in row["times"].items() if n != "BF16" and not n.startswith("ours")}


def public_name(row: dict) -> str:
    """The time of the layout that every chip reads, where ours is Hopper's own order."""
    return next((name for name in row["times"] if name.endswith(" public")), "none")


def best_peer(row: dict) -> float:
    return min(nvfp4_peers(row).values(), default=math.nan)


def number(us: float) -> str:
    return f"{us:.1f}" if us < 1000 else f"{us:.0f}"


def show_model(model: Model, rows: list[dict], ceilings: dict[str, float]) -> None:
    size = f"hidden {model.hidden}, intermediate {model.intermediate}"
    print(f"\n{model.name}: {size}, {model.experts} experts, top {model.top_k}; us")
    peers = " ".join(f"{name:>{width}}" for name, width in PEER_COLUMNS.items())
    print(
        f"{'T':>6} {'hit':>4} {'floor':>8} | {'ours':>8} {'[IQR]':>7} {'% floor':>7} {'GB/s':>5}"
        f" {'TFLOP/s':>7} {'roof':>9} {'public':>8} {'nvfp4':>8} | {peers} | best peer / ours"
    )
    for row in rows:
        print(line(row, ceilings))
    for name, reason in sorted({item for row in rows for item in row["failed"].items()}):
        print(f"  n/a {name}: {reason}")


def roof(row: dict, us: float, ceilings: dict[str, float]) -> str:
    """Share of the rate measured in this run that binds: reading (net of the launch) or the tensor cores'."""
    if row["memory_us"] == row["floor_us"]:
        read = row["weight_bytes"] / (us - ceilings["launch us"]) / 1e6
        return f"{100 * read / ceilings['read TB/s']:.0f}% read"
    return f"{100 * row['flop'] / us / 1e6 / ceilings['BF16 8192^3 TFLOP/s']:.0f}% gemm"


def line(row: dict, ceilings: dict[str, float]) -> str:
    def us(name: str) -> str:
        return number(row["times"][name]["us"]) if name in row["times"] else "n/a"

    head = f"{row['T']:>6} {row['hit']:>4} {number(row['floor_us']):>8} |"
    peers = " ".join(f"{us(name):>{width}}" for name, width in PEER_COLUMNS.items())
    time = row["times"].get("ours bf16") or row["times"].get("ours nvfp4")
    if not time:
        return f"{head} {'n/a':>8} {'':>58} | {peers} |"
    ours, rate = time["us"], row["flop"] / time["us"] / 1e6
    cells = (
        f"{number(ours):>8} {number(time['high'] - time['low']):>7} {100 * row['floor_us'] / ours:>6.0f}%",
        f"{row['weight_bytes'] / ours / 1e3:>5.0f} {rate:>7.1f} {roof(row, ours, ceilings):>9}",
        f"{us(public_name(row)):>8} {us('ours nvfp4'):>8} | {peers} | {best_peer(row) / ours:.2f}x",
    )
    return " ".join((head, *cells))


def short(kernel: str) -> str:
    """nvfp4::cuda::gemm_kernel<...>(...) -> gemm_kernel, and the first of its template's arguments."""
    name = re.sub(r"\(anonymous namespace\)::|^void ", "", kernel).split("(")[0]
    name, _, arguments = name.partition("<")
    return f"{name.rsplit('::', 1)[-1]}<{arguments[:40]}" if arguments else name.rsplit("::", 1)[-1]


def show_breakdown(rows: list[dict]) -> None:
    print("\nours by kernel: us inside one eager call, in order")
    for row in rows:
        for compute, kernels in row.get("kernels", {}).items():
            total = sum(ns for _, ns in kernels) / 1e3
            parts = " + ".join(f"{number(ns / 1e3)} {short(name)}" for name, ns in kernels)
            print(f"{row['model']} T={row['T']} {compute}: {number(total)} = {parts}")


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else math.nan


def show_summary(rows: list[dict]) -> None:
    """Ours beside the best NVFP4 peer and beside BF16, and W4A4 beside W4A16."""
    both = [r for r in rows if "ours bf16" in r["times"]]
    ahead = {
        (r["model"], r["T"]): best_peer(r) / r["times"]["ours bf16"]["us"] for r in both if nvfp4_peers(r)
    }
    if ahead:
        at_decode = [v for (_, T), v in ahead.items() if DECODE >= T]
        print(f"\nbest peer / ours, geometric mean: T <= {DECODE} {geometric_mean(at_decode):.2f}, ", end="")
        print(f"all {geometric_mean(list(ahead.values())):.2f}")
        behind = [f"{model} T={T} ({v:.2f}x)" for (model, T), v in ahead.items() if v < 1]
        print(f"behind the best peer: {', '.join(behind) or 'nowhere'}")
    public = [(r["T"], r["times"]["ours bf16 public"]["us"] / r["times"]["ours bf16"]["us"])
              for r in both if "ours bf16 public" in r["times"]]  # fmt: skip
    if public:
        at_decode = geometric_mean([v for T, v in public if DECODE >= T])
        print(f"public layout / ours, geometric mean: T <= {DECODE} {at_decode:.3f}, ", end="")
        print(f"all {geometric_mean([v for _, v in public]):.3f}")
    pairs = [r["times"] for r in both if "ours nvfp4" in r["times"]]
    if pairs:
        cost = [t["ours nvfp4"]["us"] / t["ours bf16"]["us"] for t in pairs]
        print(f"nvfp4 / bf16 of ours: geometric mean {geometric_mean(cost):.3f}, most {max(cost):.3f}")
