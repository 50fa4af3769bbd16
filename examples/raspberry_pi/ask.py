"""A client of serve.py: sends an .npz of inputs, prints the outputs."""

from __future__ import annotations

import argparse
import io
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np


def main() -> int:
    """Ask once."""
    parser = argparse.ArgumentParser(description="send an .npz to serve.py, print what it answers")
    parser.add_argument("input", type=Path)
    parser.add_argument("--port", type=int, default=8008)
    options = parser.parse_args()
    try:
        body = options.input.read_bytes()
        url = f"http://127.0.0.1:{options.port}/run"
        with urllib.request.urlopen(url, data=body) as response:
            answer = response.read()
    except urllib.error.HTTPError as error:
        print(f"ask: {error.code}: {error.read().decode().strip()}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"ask: {error}; is it running? systemctl status bapq-serve", file=sys.stderr)
        return 1
    with np.load(io.BytesIO(answer), allow_pickle=False) as outputs:
        for name in outputs.files:
            print(f"{name}: {outputs[name].dtype} {list(outputs[name].shape)}")
            if outputs[name].ndim > 1:
                print("  largest at", *outputs[name].argmax(axis=-1).ravel()[:20])
    return 0


if __name__ == "__main__":
    sys.exit(main())
