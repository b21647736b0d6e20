"""The loop of every worker: a JSON command a line on stdin, its answer a line on stdout.

Standard library only: rivals run it under interpreters of their own, so that no thread pool shares
a process with ours. Between commands it blocks on stdin and uses no CPU. `harness.Worker` asks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any


class Generator:
    """What is timed of a model that runs a loop over tokens of its own."""

    def generate(self, prompt: list[int], count: int) -> tuple[list[float], list[int]]:
        """When each of `count` greedy tokens was there, and the tokens."""
        raise NotImplementedError

    def prefill(self, tokens: list[int]) -> dict[str, Any]:
        start = time.perf_counter()
        _, out = self.generate(tokens, 1)
        return {"seconds": time.perf_counter() - start, "tokens": out}

    def decode(self, prompt: list[int], count: int) -> dict[str, Any]:
        """Seconds of `count` steps after the first token."""
        times, out = self.generate(prompt, count + 1)
        return {"seconds": times[-1] - times[0], "tokens": out}


def serve(model: Callable[..., Any], **verbs: Callable[..., dict[str, Any]]) -> None:
    """Answers `load` by making a `model`, which has `close`; `verbs` by calling them; everything
    else by calling the loaded model's method."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints goes to stderr: stdout is for answers alone
    loaded: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        verb = command.pop("verb")
        try:
            if verb == "load":
                if loaded:
                    loaded.close()
                start = time.perf_counter()
                loaded = model(**command)
                answer = {"seconds": time.perf_counter() - start}
            elif verb in verbs:
                answer = verbs[verb](**command)
            elif loaded is None:
                raise RuntimeError("no model is loaded")
            else:
                answer = getattr(loaded, verb)(**command)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), file=answers, flush=True)
