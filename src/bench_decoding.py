"""draftsmith bench_decoding: what the engine costs beside the base's own forwards, and how honest its baseline is.

All of it in one process, interleaved, medians of whole passes in CPU-seconds, greedy texts of a fixed length. Plain
decoding stands beside Hugging Face's `generate` and a bare loop over the same model with its dynamic cache: a speedup
over a slow baseline would be worth nothing. A drafter that was told the text stands beside the base's forwards alone,
in pieces of as many tokens as it has per step: what is missing to those is the engine's own cost.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from draftsmith import artifacts, config, prepare, room
from draftsmith.errors import ConfigError, NumericsError

if TYPE_CHECKING:
    from draftsmith.base.lm import BaseLM

PLAIN, ORACLE = "plain", "oracle"
OTHERS = ("hf_generate", "bare_loop")


@dataclasses.dataclass(frozen=True)
class BenchDecodingConfig(prepare.MachineConfig):
    prompts: int = 8
    max_new_tokens: int = 96
    depth: int = 4  # of the oracle
    sizes: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3, 5, 9, 17, 33, 64])
    repeats: int = 5

    def __post_init__(self) -> None:
        for name, least in (("prompts", 1), ("max_new_tokens", 2), ("depth", 1), ("repeats", 1)):
            if getattr(self, name) < least:  # the first token comes with the prompt, and is no forward of its own
                raise ConfigError(f"bench.{name}={getattr(self, name)}: give at least {least}")
        if not self.sizes or min(self.sizes) < 1 or max(self.sizes) > self.read:
            raise ConfigError(
                f"bench.sizes={self.sizes}: give numbers of tokens from 1 to {self.read}, all that is read of a text of"
                f" bench.max_new_tokens={self.max_new_tokens}"
            )
        if self.depth >= self.read:
            raise ConfigError(
                f"bench.depth={self.depth}: give less than bench.max_new_tokens={self.max_new_tokens} - 1"
            )

    @property
    def read(self) -> int:
        """Tokens of a text that go into forwards: all but the last."""
        return self.max_new_tokens - 1


def run(cfg: DictConfig) -> dict[str, Any]:
    """Medians, printed and written to bench_decoding.json. NumericsError if an fp32 base's tokens differ."""
    own = config.typed(cfg.bench, BenchDecodingConfig, "bench")
    base_config = config.typed(cfg.base, prepare.BaseConfig, "base")
    folder = config.run_dir(cfg, "bench_decoding")
    room.ready(folder, "run_dir")
    own.apply()
    from draftsmith.data import chat
    from draftsmith.data.prompts import PromptsConfig, make_up
    from draftsmith.decoding import costs

    base = prepare.load_base(base_config, own.device)
    records = make_up(PromptsConfig(synthetic=own.prompts, seed=78))
    prompts = [chat.prompt_ids(base.tokenizer, r.messages, r.where) for r in records]
    decoded = _passes(base, prompts, own)
    texts = decoded[PLAIN][1]
    sizes = sorted({1, own.depth + 1, *own.sizes})
    works = {name: work for name, (work, _) in decoded.items()}
    works |= {f"forwards_{q}": costs.forwards(base, prompts, texts, q) for q in (1, own.depth + 1)}
    for q in sizes:  # whole pieces only, or the cost of so many would be that of fewer
        works[f"pieces_{q}"] = costs.forwards(base, prompts, [t[: own.read // q * q + 1] for t in texts], q)
    works["prompts"] = costs.forwards(base, prompts, [t[:1] for t in texts], 1)
    told = _told(costs.timed(works, own.repeats), sizes, own)
    told["tokens"] = {"compared": sum(map(len, texts)), "different": _different(decoded)}
    prepare.say(_said(told))
    artifacts.write_json(folder / "bench_decoding.json", {**told, "settings": dataclasses.asdict(own)})
    prepare.say(f"-> {folder / 'bench_decoding.json'}")
    if base_config.dtype == "float32" and any(told["tokens"]["different"].values()):
        raise NumericsError(f"tokens: {told['tokens']['different']} of {own.prompts} texts are others than plain ones")
    return told


def _passes(
    base: BaseLM, prompts: list[list[int]], own: BenchDecodingConfig
) -> dict[str, tuple[Callable[[], float], list[list[int]]]]:
    """name -> (a pass over all prompts, which returns its seconds; its tokens)."""
    from draftsmith.decoding import costs
    from draftsmith.decoding.drafters.oracle import Oracle, OracleConfig
    from draftsmith.decoding.engine import generate

    limit, clock = own.max_new_tokens, costs.clock_of(base.device)
    beyond = [generate(base, p, max_new_tokens=limit + own.depth + 1).tokens for p in prompts]

    def oracle(i: int) -> list[int]:
        drafter = Oracle(OracleConfig(own.depth), [*prompts[i], *beyond[i]])
        return generate(base, prompts[i], drafter=drafter, max_new_tokens=limit).tokens

    ways: dict[str, Callable[[int], list[int]]] = {
        PLAIN: lambda i: generate(base, prompts[i], max_new_tokens=limit).tokens,
        "hf_generate": lambda i: base.generate([prompts[i]], max_new_tokens=limit, eos=False)[0],
        "bare_loop": lambda i: base.bare_loop(prompts[i], max_new_tokens=limit),
        ORACLE: oracle,
    }

    def timed_pass(way: Callable[[int], list[int]]) -> Callable[[], float]:
        def work() -> float:
            began = clock()
            for i in range(len(prompts)):
                way(i)
            return clock() - began

        return work

    return {name: (timed_pass(way), [way(i) for i in range(len(prompts))]) for name, way in ways.items()}


def _told(seconds: dict[str, list[float]], sizes: list[int], own: BenchDecodingConfig) -> dict[str, Any]:
    """Ratios are medians of ratios within a repeat, so that a busy moment counts for both sides."""
    tokens = own.prompts * own.max_new_tokens

    def ratio(one: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[one], seconds[other], strict=True))

    def forward(size: int) -> float:
        """Seconds of one forward of so many tokens."""
        whole = zip(seconds[f"pieces_{size}"], seconds["prompts"], strict=True)
        return statistics.median(a - b for a, b in whole) / own.prompts / (own.read // size)

    alone = (seconds["forwards_1"], seconds[f"forwards_{own.depth + 1}"])
    four = zip(seconds[PLAIN], seconds[ORACLE], *alone, strict=True)
    share = statistics.median((plain / oracle) / (one / several) for plain, oracle, one, several in four)
    speedup, allowed = ratio(PLAIN, ORACLE), ratio("forwards_1", f"forwards_{own.depth + 1}")
    return {
        "tokens_per_second": {n: tokens / statistics.median(seconds[n]) for n in (PLAIN, *OTHERS, ORACLE)},
        "plain_over": {name: ratio(name, PLAIN) for name in OTHERS},
        "oracle": {"depth": own.depth, "speedup": speedup, "allowed": allowed, "share": share},
        "plain_share": ratio("forwards_1", PLAIN),
        "oracle_share": ratio(f"forwards_{own.depth + 1}", ORACLE),
        "forward_cost": {str(q): forward(q) / forward(1) for q in sizes},
    }


def _different(decoded: dict[str, tuple[Any, list[list[int]]]]) -> dict[str, int]:
    plain = decoded[PLAIN][1]
    return {n: sum(a != b for a, b in zip(t, plain, strict=True)) for n, (_, t) in decoded.items() if n != PLAIN}


def _said(told: dict[str, Any]) -> str:
    speed, over, oracle = told["tokens_per_second"], told["plain_over"], told["oracle"]
    return "\n".join(
        [
            "tokens/s   " + ", ".join(f"{name} {value:.0f}" for name, value in speed.items()),
            f"plain decoding is {over['hf_generate']:.2f} x Hugging Face generate and {over['bare_loop']:.2f} x a bare"
            " loop over the model with its dynamic cache",
            f"oracle of depth {oracle['depth']}: {oracle['speedup']:.2f}x; the base's forwards alone allow"
            f" {oracle['allowed']:.2f}x: {oracle['share']:.1%} of it",
            f"the base's forwards alone take {told['plain_share']:.1%} of plain decoding's time and"
            f" {told['oracle_share']:.1%} of the oracle's",
            "c(q)/c(1)  " + ", ".join(f"{q}: {cost:.2f}" for q, cost in told["forward_cost"].items()),
        ]
    )


def main() -> None:
    config.command("bench_decoding", run)


if __name__ == "__main__":
    main()
