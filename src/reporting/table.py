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
        lines.append(f"{name:<16}{size:>12}{tau:>13}{speed:>10}{speedup:>8.2f}x{mismatches:>12}".rstrip())

    plain = result["autoregressive"]["tokens_per_second"]
    for name, r in result["heads"].items():
        line(name, r, r["speedup"], r["tokens_per_step"], _mismatches(r["lossless"]))
    for name, r in result["baselines"].items():
        line(name, r, r["speedup"], r["tokens_per_step"], _mismatches(r.get("lossless")))
    line("no head", result["autoregressive"], 1.0, 1.0)
    if "hf_generate" in result:
        hf = result["hf_generate"]
        line("hf generate", hf, hf["tokens_per_second"] / plain, 1.0, hf["lossless"]["mismatches"])
    for name, r in result["heads"].items():
        lines += _of_head(name, r)
    return "\n".join(lines)


def _of_head(name: str, r: dict[str, Any]) -> list[str]:
    """The proof, what the speedup is made of, and where tokens per step come from."""
    proof, t, lines = r["lossless"], r["terms"], []
    if proof:
        lines.append(
            f"{name}: {proof['tokens']:,} tokens of {proof['prompts']} prompts compared with plain decoding and"
            f" with Hugging Face generate: {proof['mismatches']} mismatches, {proof['near_ties']} near ties"
        )
    elif r.get("lossy"):
        lines.append(f"{name}: LOSSY, typical acceptance: the text is not distributed as the base's")
    elif r.get("same_text_as_plain") is not None:
        lines.append(f"{name}: {r['same_text_as_plain']} texts are those of plain decoding with the same seed")
    if t:
        lines.append(
            f"{name}: tau {t['tokens_per_step']:.2f}; verification c(q)/c(1) {t['verify_cost']:.2f}, drafting"
            f" {t['draft_cost']:.2f}, rest {t['overhead']:.2f} -> predicted {t['predicted_speedup']:.2f}x,"
            f" measured {r['speedup']:.2f}x"
        )
    if r.get("tokens_per_step_interval"):
        low, high = r["tokens_per_step_interval"]
        depths = " ".join(f"{a:.2f}" for a in r["acceptance_by_depth"])
        lines.append(f"{name}: 95 % interval of tau over questions {low:.2f} to {high:.2f}; accepted by depth {depths}")
    for kind in ("source", "turn", "context"):
        parts = r.get(f"by_{kind}") or {}
        if len(parts) > 1:
            told = ", ".join(f"{label}: {p['tokens_per_step']:.2f}" for label, p in parts.items())
            lines.append(f"{name}: tau by {kind}  {told}")
    for size, p in (r.get("by_batch") or {}).items():
        lines.append(
            f"{name}: {size} prompts together  tau {p['tokens_per_step']:.2f}, {p['speedup']:.2f}x plain decoding of"
            f" the same batches; {p['same_text_as_alone']} of {p['prompts']} texts as alone"
        )
    return lines


def _mismatches(proof: dict[str, Any] | None) -> str:
    if proof is None:  # sampled
        return ""
    return f"{proof['mismatches']}" + (f" (+{proof['near_ties']})" if proof["near_ties"] else "")
