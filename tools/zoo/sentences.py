"""English sentences that calibrate and judge a language model; sentences.txt holds them."""

from __future__ import annotations

from pathlib import Path

__all__ = ["load_sentences"]

SENTENCES_PATH = Path(__file__).with_name("sentences.txt")
CALIBRATION = 128
HELD_OUT = 600


def load_sentences() -> tuple[list[str], list[str]]:
    """(128 to calibrate with, 600 held out), all different."""
    lines = SENTENCES_PATH.read_text(encoding="utf-8").splitlines()
    sentences = [line for line in lines if not line.startswith("#")]
    return sentences[:CALIBRATION], sentences[CALIBRATION : CALIBRATION + HELD_OUT]
