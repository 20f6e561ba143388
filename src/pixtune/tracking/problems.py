"""Reports failures of what a run can do without (samples, held-out loss, log, tracker, report), and lets it go on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pixtune.launch.stop import Stopped
from pixtune.tracking.metrics import MetricsLog

log = logging.getLogger(__name__)


class Problems:
    """The failures of a run's services. Each is reported once, until the service has worked again.

    Args:
        print_line: prints a line for the user.
    """

    def __init__(self, print_line: Callable[[str], None]) -> None:
        self._print_line = print_line
        self._failing: dict[str, str] = {}
        self._counts: dict[str, int] = {}
        self.metrics: MetricsLog | None = None
        """Log that problems are written to as well; None in all processes but the first."""

    @contextmanager
    def of(self, service: str, step: int) -> Iterator[None]:
        """Reports what goes wrong within the block, which ends the block alone, as does a request to stop."""
        try:
            yield
        except Stopped:
            log.debug("%s at step %d were left out: the run is asked to stop", service, step)
        except Exception as error:  # a library may raise anything, and none of it is worth the steps of a run
            log.debug("%s failed", service, exc_info=True)
            self.report(service, step, error)
        else:
            self._failing.pop(service, None)

    def report(self, service: str, step: int, error: Exception | str, outcome: str = "The run goes on without") -> None:
        """Prints that a service has failed, unless the last line about it was the same."""
        self._counts[service] = self._counts.get(service, 0) + 1
        kind = error if isinstance(error, str) else f"{type(error).__name__} {getattr(error, 'errno', '')}"
        if self._failing.get(service) == kind:
            return
        self._failing[service] = kind
        message = f"{service} failed at step {step}: {in_words(error).rstrip('.')}. {outcome}."
        if self.metrics is not None:
            self.metrics.write("problem", step, service=service, message=message)
        self._print_line(f"warning: {message}")

    def is_failing(self, service: str) -> bool:
        """Returns whether a service has failed and not worked since."""
        return service in self._failing

    def sum_up(self) -> None:
        """Prints how often services have failed, where one has more than once."""
        often = [f"{service} {count} times" for service, count in self._counts.items() if count > 1]
        if often:
            self._print_line(f"warning: failed in this session: {', '.join(often)}")


def in_words(error: Exception | str) -> str:
    """Describes an error in one line, by its kind where its text alone would not be understood."""
    text = " ".join(str(error).split())
    if isinstance(error, str | OSError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
