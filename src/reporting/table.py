"""Results as text for a terminal."""

from __future__ import annotations

from typing import Any


def evaluation(result: dict[str, Any]) -> str:
    """The result for a terminal: one line per way of decoding."""
    lines = [f"{'':<16}{'parameters':>12}{'tokens/step':>13}{'tokens/s':>10}{'speedup':>9}{'mismatches':>12}"]

    def line(name: str, r: dict[str, Any], speedup: float, step: float | None, mismatches: Any = "") -> None:
        size = f"{r['parameters']:,}" if "parameters" in r else ""
        tau = f"{step:.2f}" if step else ""
        speed = f"{r['tokens_per_second']:.0f}"
        lines.append(f"{name:<16}{size:>12}{tau:>13}{speed:>10}{speedup:>8.2f}x{mismatches:>12}")

    plain = result["autoregressive"]["tokens_per_second"]
    for name, r in result["heads"].items():
        line(name, r, r["speedup"], r["tokens_per_step"], _mismatches(r["lossless"]))
    for name, r in result["baselines"].items():
        line(name, r, r["speedup"], r["tokens_per_step"])
    line("no head", result["autoregressive"], 1.0, 1.0)
    if "hf_generate" in result:
        hf = result["hf_generate"]
        line("hf generate", hf, hf["tokens_per_second"] / plain, 1.0, hf["lossless"]["mismatches"])
    for name, r in result["heads"].items():
        proof, t = r["lossless"], r["terms"]
        if proof:
            lines.append(
                f"{name}: {proof['tokens']:,} tokens of {proof['prompts']} prompts compared with plain decoding and"
                f" with Hugging Face generate: {proof['mismatches']} mismatches, {proof['near_ties']} near ties"
            )
        lines.append(
            f"{name}: tau {t['tokens_per_step']:.2f}; verification c(q)/c(1) {t['verify_cost']:.2f}, drafting"
            f" {t['draft_cost']:.2f}, rest {t['overhead']:.2f} -> predicted {t['predicted_speedup']:.2f}x,"
            f" measured {r['speedup']:.2f}x"
        )
    return "\n".join(lines)


def _mismatches(proof: dict[str, Any] | None) -> str:
    if proof is None:  # sampled
        return ""
    return f"{proof['mismatches']}" + (f" (+{proof['near_ties']})" if proof["near_ties"] else "")
