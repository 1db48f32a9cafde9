"""A server in a process of its own, for tests of signals: prints its URL, then what it did at the end."""

import sys

from dovetail_protocols.testing import FakeEngine
from dovetail_serve import ServeOptions, serve
from dovetail_serve.testing import ByteTokenizer


def main(port, drain):
    engine = FakeEngine(delay=0.005, max_running=100)
    options = ServeOptions(drain_seconds=drain)
    tokenizer = ByteTokenizer()
    serve(engine, tokenizer, model="tiny", port=port, options=options, ready=lambda url: print(url, flush=True))
    engine.close()
    print("closed", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
