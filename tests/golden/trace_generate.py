"""Writes trace.jsonl: made-up requests in the format of Mooncake's traces, 512 tokens for every id.

    python tests/golden/trace_generate.py

Chats go on from what was said, with a system prompt that all share; few-shot prompts share examples; others are alone.
"""

import json
import pathlib
import random

BLOCK = 512


def requests(rng):
    numbers = iter(range(10**6))
    fresh = lambda count: [next(numbers) for _ in range(count)]
    system = fresh(2)
    shots = [fresh(rng.randint(2, 5)) for _ in range(6)]
    chats = []
    for i in range(400):
        kind = rng.random()
        if kind < 0.6 and chats:
            chat = rng.choice(chats[-25:])
            chat += fresh(rng.randint(1, 2))
            ids = list(chat)
        elif kind < 0.7 or not chats:
            chats.append([*system, *fresh(rng.randint(1, 3))])
            ids = list(chats[-1])
        elif kind < 0.9:
            ids = [*rng.choice(shots), *fresh(1)]
        else:
            ids = fresh(rng.randint(1, 8))
        length = len(ids) * BLOCK - (rng.randint(0, BLOCK - 1) if kind >= 0.7 else 0)
        yield {"timestamp": 300 * i, "input_length": length, "output_length": rng.randint(1, 500), "hash_ids": ids}


if __name__ == "__main__":
    lines = [json.dumps(request) for request in requests(random.Random(0))]
    pathlib.Path(__file__).with_name("trace.jsonl").write_text("\n".join(lines) + "\n")
