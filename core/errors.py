"""The whole error tree. Every expected failure is one sentence: what was expected, what came, what to do.

    HoldfastError                     exit 1
    ├── UsageError                    exit 2   the command line contradicts itself
    │   └── RecipeError                        a recipe or its flags: unknown key, wrong type, out of range
    ├── InputError                    exit 1   what the user pointed at cannot be used
    │   ├── ModelSourceError                   missing, incomplete or unsafe model folder
    │   ├── UnsupportedArchitectureError       an architecture without a row in the table
    │   ├── TokenizerError                     no tokenizer.json, no chat template, template refused
    │   ├── VocabularyMismatchError            aligned model and base do not share a vocabulary
    │   └── SuiteError                         evaluation or calibration data: missing, empty, leaking
    ├── MissingExtraError                      an optional dependency is not installed
    ├── OutputExistsError                      would overwrite something
    ├── StepError                              a pipeline step could not do its work
    │   ├── ExportError
    │   ├── PruneError
    │   ├── CalibrationError
    │   ├── QuantizationError
    │   └── ParityError                        artifact and reference disagree beyond the tolerance
    ├── BundleError                            a bundle that cannot be read
    │   └── BundleIntegrityError               a file is missing, changed, truncated or unlisted
    ├── ExecutionError                         ONNX Runtime refused the graph or the provider
    ├── DiskFullError
    ├── NotVerifiedError              exit 3   serving refused: the verdict is not PASS
    └── InterruptedRun                exit 130 Ctrl-C; the message says how to resume

Foreign exceptions are translated where the foreign library is called, never further up.
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of every command."""

    VERIFIED = 0
    ERROR = 1
    USAGE = 2
    VERIFICATION_FAILED = 3
    INCONCLUSIVE = 4
    INTERRUPTED = 130  # 128 + SIGINT, as shells report it

    @classmethod
    def for_verdict(cls, outcome: str) -> ExitCode:
        """Exit code of a command that ends in a verdict (PASS, FAIL or INCONCLUSIVE)."""
        return {
            "PASS": cls.VERIFIED,
            "FAIL": cls.VERIFICATION_FAILED,
            "INCONCLUSIVE": cls.INCONCLUSIVE,
        }[outcome]


class HoldfastError(Exception):
    """Base of every expected failure."""

    exit_code: ExitCode = ExitCode.ERROR


class UsageError(HoldfastError):
    exit_code = ExitCode.USAGE


class RecipeError(UsageError):
    pass


class InputError(HoldfastError):
    pass


class ModelSourceError(InputError):
    pass


class UnsupportedArchitectureError(InputError):
    pass


class TokenizerError(InputError):
    pass


class VocabularyMismatchError(InputError):
    pass


class SuiteError(InputError):
    pass


class MissingExtraError(HoldfastError):
    pass


class OutputExistsError(HoldfastError):
    pass


class StepError(HoldfastError):
    pass


class ExportError(StepError):
    pass


class PruneError(StepError):
    pass


class CalibrationError(StepError):
    pass


class QuantizationError(StepError):
    pass


class ParityError(StepError):
    pass


class BundleError(HoldfastError):
    pass


class BundleIntegrityError(BundleError):
    pass


class ExecutionError(HoldfastError):
    pass


class DiskFullError(HoldfastError):
    pass


class NotVerifiedError(HoldfastError):
    exit_code = ExitCode.VERIFICATION_FAILED


class InterruptedRun(HoldfastError):
    exit_code = ExitCode.INTERRUPTED
