"""A server that trains, in a process of its own, as a script: ``served.py FOLDER DISTRIBUTION-JSON``.

Prints its address when it is ready. Its state lies in ``FOLDER/state``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llama_stack.server import serve
from tests.providers.meta_reference.post_training.stage import stack

if __name__ == "__main__":
    folder, described = sys.argv[1:]
    sys.exit(serve(stack(Path(folder), json.loads(described)), on_ready=lambda url: print(url, flush=True)))
