"""Prompt tokens per second: `python benchmarks/prefill.py [MODEL] [--llama-python VENV/python]`.

512 tokens, from the call to the first token; every round has another prompt.
"""

from __future__ import annotations

import harness
import speed


def main() -> None:
    parser = speed.parser("Prefill speed of Lacewing and its rivals, interleaved.")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    args = parser.parse_args()
    args.tokens = 1

    def measure(candidate: harness.Candidate, turn: int) -> float:
        tokens = harness.token_ids(args.prompt_tokens, seed=turn)
        answer = candidate.worker.ask("prefill", tokens=tokens)
        return float(args.prompt_tokens / answer["seconds"])

    speed.run("prefill", args, measure)


if __name__ == "__main__":
    main()
