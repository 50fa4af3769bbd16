"""English sentences that calibrate and judge a language model; sentences.txt holds them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["load_sentences"]

SENTENCES_PATH = Path(__file__).with_name("sentences.txt")
CALIBRATION = 512
HELD_OUT = slice(128, 728)


def load_sentences() -> tuple[list[str], list[str]]:
    """Load 512 sentences to calibrate with and 600 held-out ones, all different."""
    lines = SENTENCES_PATH.read_text(encoding="utf-8").splitlines()
    sentences = [line for line in lines if not line.startswith("#")]
    calibration = sentences[: HELD_OUT.start] + sentences[HELD_OUT.stop :]
    return calibration, sentences[HELD_OUT]
