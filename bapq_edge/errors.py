"""Every exception and warning of BAPQ-Edge, in one place.

    BapqError
    ├── ModelError                      the source model
    │   ├── ModelFormatError            not an ONNX model, or a broken one
    │   ├── NoHeavyLayerError           nothing in it is worth a bank
    │   ├── CoverageError               more of it would stay in float than was allowed
    │   └── UnsupportedModelError       uses what the host pipeline cannot carry
    ├── CalibrationError                samples: calibration data, or what is evaluated on
    │   ├── CalibrationArrayError       an array is missing, or one too many
    │   ├── CalibrationShapeError       an array's shape or type does not fit the model
    │   └── CalibrationValueError       NaN or infinity
    ├── BankError                       a bank on disk
    │   ├── BankNotFoundError           no such bank
    │   ├── BankFormatError             breaks the specification (docs/reference/bank_format.md)
    │   ├── BankVersionError            written for another format version
    │   ├── BankPathError               names a file outside the bank
    │   ├── BankTruncatedError          a file is shorter than what it must hold
    │   ├── BankIntegrityError          bytes differ from their checksum or digest
    │   └── BankSignatureError          not signed with the key that is required
    ├── RequestError                    what the caller asked for
    │   ├── UnknownLevelError           a level that the bank does not hold
    │   ├── BudgetTooSmallError         the smallest budget that works is in the message
    │   ├── RunInputError               a feed or an output name that does not fit the model
    │   ├── SizeError                   not a size such as 64MiB
    │   ├── RecipeError                 a recipe that is malformed, or does not fit the model
    │   ├── ProfileError                a device profile that is unknown or malformed
    │   ├── KeyFileError                not a key that banks are signed or checked with
    │   └── SensorError                 a malformed mock trace, or a needed reading is absent
    ├── BoundaryError                   a boundary model cannot be fitted
    │   ├── TooFewSamplesError          the message says how many are needed
    │   ├── SingleClassError            every sample has the same answer
    │   ├── NoTapError                  no tensor to find regions from, or not the one named
    │   └── TargetNotMetError           the message says which agreement can be met
    ├── EvaluationError                 answers cannot be judged
    │   ├── LabelError                  labels are absent, of another number, or of no class
    │   ├── MetricError                 a metric that is unknown, does not fit or fails
    │   └── NoReferenceError            there is nothing to compare answers with
    ├── NoMonitorError                  no session tells its status there
    ├── SessionClosedError              the session was closed before
    ├── ForkedSessionError              the session was opened before this process was forked
    ├── ExecutionError                  the graph engine failed during a run
    ├── ResourceError                   the system gives no more file handles or threads
    │   └── OutOfMemoryError            the system gives no more memory
    ├── StorageError                    the disk: full, unreadable, not writable
    │   └── InputFileError              a file that was named is missing or cannot be read
    ├── PlatformError                   this machine cannot run BAPQ-Edge
    ├── ClusterError                    the Dask cluster of a build cannot be used
    ├── WorkerError                     a process of a build was killed
    └── MissingExtraError               an optional package is not installed

    BapqWarning
    ├── MissingPlaneWarning             a plane file is absent: fewer levels
    ├── InterruptedUpdateWarning        a bank's update was cut off: the old one is used
    ├── UncalibratedWarning             built without calibration data
    ├── CalibrationWarning              calibration samples are too few, too alike, of one class
    ├── FrozenInputWarning              what a caller could override in the model is a constant now
    ├── DegradedWarning                 a run used a lower level than planned
    ├── LateAnswerWarning               an answer in doubt stands for want of time
    ├── BudgetExceededWarning           a run needed more memory than the budget leaves
    ├── IgnoredSettingWarning           a setting of another library means nothing to a bank
    ├── EnergyWarning                   a power meter did not tell the energy of a window
    ├── BoundaryDroppedWarning          a bank is written again without its boundary models
    ├── SignatureDroppedWarning         a bank is written again, and its signature is not for that
    └── BoundaryWarning                 a fit left something out, or doubts what it was given

Each exception also derives from the builtin that fits, and carries the exit code that the command
line ends with. A message is one line: what was wrong, both values, the next step.
"""

from __future__ import annotations


class BapqError(Exception):
    """Base of every error that BAPQ-Edge raises on purpose."""

    exit_code = 1


class ModelError(BapqError, ValueError):
    """The source model cannot be compiled."""

    exit_code = 10


class ModelFormatError(ModelError):
    """The file is not an ONNX model, or it is broken."""

    exit_code = 11


class NoHeavyLayerError(ModelError):
    """No layer of the model is heavy enough to be worth a bank."""

    exit_code = 12


class CoverageError(ModelError):
    """Less of the model's weights can go into planes than was asked for."""

    exit_code = 14


class UnsupportedModelError(ModelError):
    """The model uses what the host pipeline cannot carry."""

    exit_code = 13


class CalibrationError(BapqError, ValueError):
    """The samples, for calibration or evaluation, cannot be used."""

    exit_code = 20


class CalibrationArrayError(CalibrationError):
    """The calibration file lacks an array that the model needs, or has one too many."""

    exit_code = 21


class CalibrationShapeError(CalibrationError):
    """A calibration array's shape or type does not fit the model's input."""

    exit_code = 22


class CalibrationValueError(CalibrationError):
    """A calibration array holds NaN or infinity."""

    exit_code = 23


class BankError(BapqError):
    """A bank on disk cannot be used."""

    exit_code = 30


class BankNotFoundError(BankError, FileNotFoundError):
    """There is no bank at that path."""

    exit_code = 31


class BankFormatError(BankError, ValueError):
    """The bank breaks the specification in docs/reference/bank_format.md."""

    exit_code = 32


class BankVersionError(BankError, ValueError):
    """The bank is written for another version of the format."""

    exit_code = 33


class BankPathError(BankError, ValueError):
    """The manifest names a file outside the bank."""

    exit_code = 34


class BankTruncatedError(BankError, OSError):
    """A file of the bank is shorter than what it must hold."""

    exit_code = 35


class BankIntegrityError(BankError, ValueError):
    """Bytes of the bank differ from their checksum or digest."""

    exit_code = 36


class BankSignatureError(BankError, ValueError):
    """The bank is not signed, or not with the key that is required, or is not what was signed."""

    exit_code = 37


class RequestError(BapqError, ValueError):
    """The caller asked for something that cannot be had."""

    exit_code = 40


class UnknownLevelError(RequestError):
    """The level is not one that the bank holds."""

    exit_code = 41


class BudgetTooSmallError(RequestError, MemoryError):
    """The memory budget is too small; the message names the smallest that works."""

    exit_code = 42


class RunInputError(RequestError):
    """A feed of a run is missing or has a wrong type or shape, or an output is unknown."""

    exit_code = 43


class SizeError(RequestError):
    """A size is not written as 64MiB, 64MB or a number of bytes."""

    exit_code = 44


class ProfileError(RequestError):
    """A device profile is unknown, or breaks the schema in device_profiles/README.md."""

    exit_code = 47


class KeyFileError(RequestError):
    """What was given is no key that banks are signed or checked with, or the password is wrong."""

    exit_code = 54


class SensorError(RequestError):
    """BAPQ_SENSORS or its trace is malformed, or a reading that is needed is absent."""

    exit_code = 48


class RecipeError(RequestError):
    """A recipe is malformed, or does not fit the model it is given for."""

    exit_code = 49


class BoundaryError(BapqError, ValueError):
    """A boundary model cannot be fitted to this bank and these samples."""

    exit_code = 70


class TooFewSamplesError(BoundaryError):
    """There are too few samples for regions; the message says how many are needed."""

    exit_code = 71


class SingleClassError(BoundaryError):
    """All samples have the same answer, so there is no boundary between answers."""

    exit_code = 72


class NoTapError(BoundaryError):
    """There is no tensor that regions could be found from, or not the one that was named."""

    exit_code = 73


class TargetNotMetError(BoundaryError):
    """Held-out samples do not show the wished agreement; the message says what they show."""

    exit_code = 74


class EvaluationError(BapqError, ValueError):
    """Answers cannot be judged."""

    exit_code = 80


class LabelError(EvaluationError):
    """Labels are absent, of another number than the samples, or not what the output could give."""

    exit_code = 81


class MetricError(EvaluationError):
    """A metric is unknown, does not fit the outputs, or failed."""

    exit_code = 82


class NoReferenceError(EvaluationError):
    """There is neither a float model nor labels to compare answers with."""

    exit_code = 83


class NoMonitorError(BapqError, ConnectionError):
    """No session tells its status: none was opened with a monitor, or it was closed."""

    exit_code = 64


class SessionClosedError(BapqError, RuntimeError):
    """The session was closed before this call."""

    exit_code = 45


class ForkedSessionError(BapqError, RuntimeError):
    """The session was opened before this process was forked: its threads are not here."""

    exit_code = 39


class ExecutionError(BapqError, RuntimeError):
    """The graph engine failed during a run; its own words are in the message."""

    exit_code = 46


class ResourceError(BapqError, OSError):
    """The system gives this process no more file handles or threads."""

    exit_code = 52
    more_handles = "close some files, or raise 'ulimit -n'"
    """Next step where file handles have run out."""


class OutOfMemoryError(ResourceError, MemoryError):
    """The system gives this process no more memory; the next call may find some."""

    exit_code = 53


class StorageError(BapqError, OSError):
    """The disk is full, unreadable or not writable."""

    exit_code = 50


class InputFileError(StorageError):
    """A file that was named as an input is missing or cannot be read."""

    exit_code = 51


class PlatformError(BapqError, RuntimeError):
    """This machine or its Python cannot run BAPQ-Edge."""

    exit_code = 60


class MissingExtraError(BapqError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""

    exit_code = 61


class ClusterError(BapqError, ConnectionError):
    """The Dask cluster that a build was to use does not answer, or failed."""

    exit_code = 62


class WorkerError(BapqError, RuntimeError):
    """A process that a build had started was killed, most often for lack of memory."""

    exit_code = 63


class BapqWarning(UserWarning):
    """Base of every warning that BAPQ-Edge gives."""


class MissingPlaneWarning(BapqWarning):
    """A plane file is absent, so the levels that need it cannot run."""


class InterruptedUpdateWarning(BapqWarning):
    """The update of a bank was cut off; the one from before is used, where the update left it."""


class UncalibratedWarning(BapqWarning):
    """Built without calibration data, as a whole or in some layers: low levels lose accuracy."""


class FrozenInputWarning(BapqWarning):
    """Initializers that the model lets a caller override become constants of the bank."""


class CalibrationWarning(BapqWarning):
    """The calibration samples are too few, too alike or of one class to choose low levels by."""


class BoundaryWarning(BapqWarning):
    """A fit goes on without something, or doubts that its reference belongs to the bank."""


class DegradedWarning(BapqWarning):
    """A chunk could not be read at its level; the run used a lower one that was in memory."""


class LateAnswerWarning(BapqWarning):
    """An answer in doubt was not made again in time, so the one at fewer bits stands."""


class BudgetExceededWarning(BapqWarning):
    """A run needed more memory besides weights than the budget leaves; nothing is pinned now."""


class IgnoredSettingWarning(BapqWarning):
    """A setting that a program gives another library cannot be honoured; given once by name."""


class EnergyWarning(BapqWarning):
    """A power meter is there, but did not tell the energy of a window, or it does not count."""


class BoundaryDroppedWarning(BapqWarning):
    """A bank is written again with other rows or chunks, so its boundary models do not fit it."""


class SignatureDroppedWarning(BapqWarning):
    """A bank is written again with other content, and its signature does not come along."""
