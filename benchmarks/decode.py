"""Tokens per second at batch 1: `python benchmarks/decode.py [MODEL] [--llama-python VENV/python]`.

128 greedy tokens after a prompt of 16, the end token ignored; time from the first token to the
last. See README.md for the rivals and how they are measured.
"""

from __future__ import annotations

import harness
import speed


def main() -> None:
    parser = speed.parser("Decode speed of Lacewing and its rivals, interleaved.")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=16)
    args = parser.parse_args()

    def measure(candidate: harness.Candidate, turn: int) -> float:
        return speed.decode(candidate, turn, args.prompt_tokens, args.tokens)

    speed.run("decode", args, measure)


if __name__ == "__main__":
    main()
