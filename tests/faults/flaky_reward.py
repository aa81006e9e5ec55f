"""A user's reward that fails on some completions: by an exception, by no number, by hanging, by ending its process."""

import hashlib
import os
import time

KINDS = ("raises", "no number", "hangs", "ends")
ONE_IN = 100  # completions for each kind


def brevity(prompt, completion):
    digest = hashlib.sha256(prompt.image + completion.text.encode()).digest()
    kind = int.from_bytes(digest[:4]) % ONE_IN
    if kind >= len(KINDS):
        return max(0.0, 1 - len(completion.text) / 400)
    match KINDS[kind]:
        case "raises":
            raise ValueError("this judge does not like it")
        case "no number":
            return float("nan")
        case "hangs":
            time.sleep(600)
        case "ends":
            os._exit(1)
