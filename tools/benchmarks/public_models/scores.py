"""How well a bank answers, in each task's own measure: 1 where it answers as the float model.

Each is a metric of `bapq eval`: a function of the outputs, those of the float model and a label,
which nobody has here. The file is loaded by its path, so it imports nothing of the package.
"""

import difflib

import numpy as np


def _only(outputs):
    return next(iter(outputs.values()))


def top1(outputs, wanted, label):
    """Share of the inputs of the same class."""
    return float(np.mean(_only(outputs).argmax(-1) == _only(wanted).argmax(-1)))


def characters(outputs, wanted, label):
    """Likeness of two readings: shared characters over the length of both."""
    ours, theirs = _reading(outputs), _reading(wanted)
    return difflib.SequenceMatcher(None, ours, theirs, autojunk=False).ratio()


def _reading(outputs):
    """Classes of a line: without repetitions, then without blanks (Graves et al., 2006)."""
    best = _only(outputs)[0].argmax(-1)
    kept = best[np.diff(best, prepend=-1) != 0]
    return kept[kept != 0].tolist()


def text_map(outputs, wanted, label):
    """Overlap of the areas that hold text: intersection over union at 0.3."""
    return overlap(_only(outputs) > 0.3, _only(wanted) > 0.3)


def overlap(ours, theirs):
    """Intersection over union; 1 where there is nothing in either."""
    either = int((ours | theirs).sum())
    return 1.0 if either == 0 else int((ours & theirs).sum()) / either


def speech(outputs, wanted, label):
    """Whether both hear a voice, or both none."""
    return float((outputs["output"] > 0.5).item() == (wanted["output"] > 0.5).item())


def opinion(outputs, wanted, label):
    """1 less the distance of two mean opinion scores, of 1 to 5, over their range."""
    return 1.0 - float(np.abs(_only(outputs) - _only(wanted)).mean()) / 4


def notes(outputs, wanted, label):
    """Overlap of the notes that sound, F1 at 0.3: intersection over the mean of both."""
    name = min(outputs, key=lambda each: outputs[each].shape[-1])
    ours, theirs = outputs[name] > 0.3, wanted[name] > 0.3
    both = int(ours.sum()) + int(theirs.sum())
    return 1.0 if both == 0 else 2 * int((ours & theirs).sum()) / both


def letters(outputs, wanted, label):
    """Share of the letters that are given the same points."""
    same = [
        outputs[name].argmax(-1) == wanted[name].argmax(-1)
        for name in outputs
        if outputs[name].dtype.kind == "f"
    ]
    return float(np.mean(np.logical_and.reduce(same)))


def direction(outputs, wanted, label):
    """The cosine of two embeddings."""
    a, b = outputs["sentence_embedding"], wanted["sentence_embedding"]
    return float((a * b).sum() / (np.linalg.norm(a) * np.linalg.norm(b)))


def regions(outputs, wanted, label):
    """Overlap of the places where the scores of an object are above 0.4, F1."""
    names = [name for name in outputs if outputs[name].min() >= 0 and outputs[name].max() <= 1]
    ours = np.concatenate([(outputs[name] > 0.4).ravel() for name in names])
    theirs = np.concatenate([(wanted[name] > 0.4).ravel() for name in names])
    both = int(ours.sum()) + int(theirs.sum())
    return 1.0 if both == 0 else 2 * int((ours & theirs).sum()) / both


def features(outputs, wanted, label):
    """The cosine of two lists of features, whatever their shape."""
    a, b = _only(outputs).ravel(), _only(wanted).ravel()
    return float((a * b).sum() / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))


def face(outputs, wanted, label):
    """Overlap of the boxes of the surest face, intersection over union; none in both is 1."""
    ours, theirs = _box(outputs), _box(wanted)
    if ours is None or theirs is None:
        return float(ours is None and theirs is None)
    low, high = np.maximum(ours[:2], theirs[:2]), np.minimum(ours[2:], theirs[2:])
    shared = np.prod(np.maximum(high - low, 0))
    both = np.prod(ours[2:] - ours[:2]) + np.prod(theirs[2:] - theirs[:2])
    return float(shared / max(both - shared, 1e-12))


def _box(outputs):
    """(left, top, right, bottom) in parts of the image; None where no face is as likely as not."""
    chances, boxes = outputs["classificators"][0, :, 0], outputs["regressors"][0]
    best = int(chances.argmax())
    if chances[best] < 0:
        return None
    # 2 boxes for each of 16 x 16 places, then 6 for each of 8 x 8
    side, place = (16, best // 2) if best < 512 else (8, (best - 512) // 6)
    centre = (np.array([place % side, place // side]) + 0.5) / side + boxes[best, :2] / 128
    half = np.abs(boxes[best, 2:4]) / 256
    return np.concatenate([centre - half, centre + half])


def points(outputs, wanted, label):
    """1 less the mean distance of the points of a face, over the face's size; at least 0."""
    name = max(wanted, key=lambda each: wanted[each].size)
    ours, theirs = outputs[name].reshape(-1, 3)[:, :2], wanted[name].reshape(-1, 3)[:, :2]
    size = np.linalg.norm(np.ptp(theirs, axis=0))
    return float(max(0, 1 - np.linalg.norm(ours - theirs, axis=1).mean() / max(size, 1e-12)))
