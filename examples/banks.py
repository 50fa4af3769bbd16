"""Banks for the examples, built once into build/examples out of models that are at hand."""

from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]


def digits() -> tuple[Path, np.ndarray, np.ndarray]:
    """The bundled CNN's bank; test images (600, 1, 8, 8) and their labels (600,)."""
    from bapq_tools import build_bank
    from benchmarks.zoo.digits import digits_cnn_path, split_of

    split, bank = split_of("cnn"), ROOT / "build" / "examples" / "digits.bank"
    if not bank.is_dir():
        bank.parent.mkdir(parents=True, exist_ok=True)
        build_bank(digits_cnn_path(), bank, calibration={"image": split.x_calibration})
    return bank, split.x_test, split.y_test


def minilm() -> Path:
    """The bank of a sentence encoder of 22.5 million weights; `make demo` fetches them."""
    from bapq_tools import build_bank
    from benchmarks.zoo.minilm import build_minilm, encode, minilm_dir
    from benchmarks.zoo.sentences import load_sentences

    bank = ROOT / "build" / "examples" / "minilm.bank"
    if not bank.is_dir():
        model = bank.with_suffix(".onnx")
        model.parent.mkdir(parents=True, exist_ok=True)
        build_minilm(minilm_dir(), model)
        sentences = load_sentences()[0][:64]
        build_bank(model, bank, calibration=encode(sentences, minilm_dir()), levels=(8, 4))
    return bank


def voice() -> Path:
    """The bank of a trained detector of voices; `make .cache/silero/.ready` fetches it."""
    from bapq_tools import build_bank
    from benchmarks.zoo.voice import conversation, detector_path, listen, open_detector

    bank, model = ROOT / "build" / "examples" / "voice.bank", detector_path()
    if not bank.is_dir():
        bank.parent.mkdir(parents=True, exist_ok=True)
        heard = listen(open_detector(model).run, conversation(range(100, 106)))
        feeds = [{**feed, "input": feed["input"][0]} for feed, _ in heard]
        data = {name: np.stack([feed[name] for feed in feeds]) for name in feeds[0]}
        build_bank(model, bank, calibration=data)
    return bank
